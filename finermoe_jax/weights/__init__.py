"""Weights on disk: Hugging Face directories, Orbax checkpoints, conversion and upcycling."""
