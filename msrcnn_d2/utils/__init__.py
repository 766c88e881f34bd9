"""What several rooms need: errors, files, processes that act together, fonts."""
