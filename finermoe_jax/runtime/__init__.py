"""Files, locks, signals and multi-process coordination. Independent of models."""
