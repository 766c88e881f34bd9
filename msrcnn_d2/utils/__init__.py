"""What several packages share: errors, files, messages, fonts, distributed training."""
