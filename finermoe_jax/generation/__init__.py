"""Prefill, decoding, the next token; text and conversations."""
