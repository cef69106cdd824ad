"""This process and its machine: files, signals, other processes. Knows no model."""
