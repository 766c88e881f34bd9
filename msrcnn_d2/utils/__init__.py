"""What several rooms need: errors, files, text of messages, fonts, distributed training."""
