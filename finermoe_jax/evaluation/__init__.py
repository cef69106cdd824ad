"""Perplexity of texts and benchmark scores."""
