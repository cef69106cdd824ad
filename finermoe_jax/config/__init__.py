"""What can be asked for: models, upcycling, runs, presets. No arrays."""
