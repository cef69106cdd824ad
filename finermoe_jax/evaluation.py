"""Perplexity of a text."""

import math
from pathlib import Path

from finermoe_jax import data
from finermoe_jax.checkpoint import load_model
from finermoe_jax.errors import InputError
from finermoe_jax.tokenizers import load_tokenizer
from finermoe_jax.training import held_out_loss


def perplexity(checkpoint: str, text: Path, sequence_length: int) -> dict[str, float | int]:
    """Loss (nats per token), perplexity and number of scored tokens of a text file.

    The text is cut into windows of sequence_length tokens (0: the model's limit, at most 2048),
    each scored on its own; a last, shorter window is left out.

    Raises InputError: unreadable text, fewer tokens than one window, a length beyond the limit.
    """
    documents = data.read_documents(text)
    model, files = load_model(checkpoint)
    limit = model.config.max_position_embeddings
    length = sequence_length or min(limit, 2048)
    if not 1 <= length <= limit:
        raise InputError(f"--sequence_length={length} must lie in 1 … {limit}, the model's limit")
    tokenizer = load_tokenizer(files, model.config.vocab_size)
    tokens = data.tokenize(documents, tokenizer, show_progress=True)
    if len(tokens) < 2:
        raise InputError(f"{text} has {len(tokens)} tokens; at least 2 are needed")
    if not sequence_length:
        length = min(length, len(tokens) - 1)
    windows = data.Windows(tokens, length)
    if not len(windows):
        raise InputError(
            f"{text} has {len(tokens)} tokens, fewer than a window of --sequence_length={length} "
            "and its target"
        )
    loss = held_out_loss(model, windows, len(windows), chunk_tokens=1024)
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": len(windows) * length}
