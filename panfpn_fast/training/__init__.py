"""Training: losses, the loop around them, checkpoints and logs."""
