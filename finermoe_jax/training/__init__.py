"""Training runs: initial weights, steps, checkpoints, workdir."""
