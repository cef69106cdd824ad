"""Scores of texts and of the benchmarks' tasks."""
