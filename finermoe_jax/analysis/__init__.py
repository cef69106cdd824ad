"""Parameter counts, compile-time costs of a run, and similarity of experts."""
