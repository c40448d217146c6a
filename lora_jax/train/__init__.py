"""Training: data, step, loop, checkpoints and metrics."""
