"""What the models cost and how fast they run."""
