"""Prefill, decoding, sampling; text completion and chat."""
