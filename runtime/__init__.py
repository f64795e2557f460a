"""What every run needs and no task changes."""
