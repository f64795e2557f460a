"""Training with a teacher's opinion of every place of an image (token labelling, arXiv 2104.10858)."""
