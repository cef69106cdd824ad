"""Scores of a text: the held-out loss of a run, perplexity of a file."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from finermoe_jax import data, sharding
from finermoe_jax.checkpoint import load_model
from finermoe_jax.errors import InputError
from finermoe_jax.losses import cross_entropy_sum
from finermoe_jax.model import Decoder
from finermoe_jax.tokenizers import load_tokenizer


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


def held_out_loss(model: Decoder, windows: data.Windows, count: int, chunk_tokens: int) -> float:
    """Mean cross-entropy, nats per token, of the first `count` windows; float64 sum on the host."""
    graphdef, state = nnx.split(model)
    count = min(count, len(windows))
    mesh = model.placement.mesh
    parts = sharding.batch_parts(mesh) if mesh else 1
    rows = -(-min(16, count) // parts) * parts
    total = 0.0
    for start in range(0, count, rows):
        batch = np.zeros((rows, windows.length + 1), np.int32)
        real = np.arange(rows) < count - start
        batch[real] = [windows[start + i] for i in range(real.sum())]
        total += float(_score(graphdef, state, batch, real, chunk_tokens))
    return total / (count * windows.length)


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk_tokens"))
def _score(
    graphdef: Any, state: Any, batch: Array, real: Array, chunk_tokens: int
) -> Float[Array, ""]:
    """Summed cross-entropy of the real rows of a batch of windows [B, T + 1]."""
    model = nnx.merge(graphdef, state)
    hidden = model.features(batch[:, :-1]).hidden
    targets = batch[:, 1:]
    mask = jnp.broadcast_to(real[:, None], targets.shape)
    return cross_entropy_sum(model, hidden, targets, mask, chunk_tokens)
