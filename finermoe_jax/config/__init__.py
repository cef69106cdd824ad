"""Configs of models, upcycling and runs; presets. No arrays."""
