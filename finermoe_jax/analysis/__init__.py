"""Costs of a model or a run before it is made; the similarity of experts."""
