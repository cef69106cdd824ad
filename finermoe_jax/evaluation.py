"""Scores of a text: the held-out loss of a run, perplexity of a file."""

import functools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from finermoe_jax import sharding
from finermoe_jax.checkpoint import load_model
from finermoe_jax.errors import InputError
from finermoe_jax.losses import cross_entropy_sum
from finermoe_jax.model import Decoder
from finermoe_jax.packing import Batch, counted, masks
from finermoe_jax.rows import Mixture, Windows
from finermoe_jax.text import TextFile, tokenize
from finermoe_jax.token_files import TokenStream
from finermoe_jax.tokenizers import load_tokenizer


def perplexity(checkpoint: str, text: Path, sequence_length: int) -> dict[str, float | int]:
    """Loss (nats per token), perplexity and number of scored tokens of a text file.

    The text is cut into windows of sequence_length tokens (0: the model's limit, at most 2048),
    each scored on its own; a last, shorter window is left out.

    Raises InputError: unreadable text, fewer tokens than one window, a length beyond the limit.
    """
    pieces = list(TextFile(text).pieces())
    model, files = load_model(checkpoint)
    limit = model.config.max_position_embeddings
    length = sequence_length or min(limit, 2048)
    if not 1 <= length <= limit:
        raise InputError(f"--sequence_length={length} must lie in 1 … {limit}, the model's limit")
    tokenizer = load_tokenizer(files, model.config.vocab_size)
    tokens = tokenize(pieces, tokenizer, show_progress=True).ids
    if len(tokens) < 2:
        raise InputError(f"{text} has {len(tokens)} tokens; at least 2 are needed")
    if not sequence_length:
        length = min(length, len(tokens) - 1)
    windows = Windows(TokenStream([tokens]), length)
    if not len(windows):
        raise InputError(
            f"{text} has {len(tokens)} tokens, fewer than a window of --sequence_length={length} "
            "and its target"
        )
    rows = Mixture([windows], [str(text)], [Fraction(1)])
    loss = held_out_loss(model, rows, len(rows), chunk_tokens=1024)
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": len(windows) * length}


def held_out_loss(model: Decoder, rows: Mixture, count: int, chunk_tokens: int) -> float:
    """Mean cross-entropy, nats per counted target, of the first `count` rows, sources in shares.

    The sum is of float64, on the host.
    """
    graphdef, state = nnx.split(model)
    indices = rows.in_order(count)
    mesh = model.placement.mesh
    parts = sharding.batch_parts(mesh) if mesh else 1
    size = -(-min(16, len(indices)) // parts) * parts
    total, targets = 0.0, 0
    for start in range(0, len(indices), size):
        part = rows.read(indices[start : start + size])
        real = np.arange(size) < len(part.tokens)
        targets += int(np.asarray(counted(part)).sum())
        missing = ((0, size - len(part.tokens)), (0, 0))
        batch = jax.tree.map(functools.partial(np.pad, pad_width=missing), part)
        total += float(_score(graphdef, state, batch, real, chunk_tokens))
    return total / max(1, targets)


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk_tokens"))
def _score(
    graphdef: Any, state: Any, batch: Batch, real: Array, chunk_tokens: int
) -> Float[Array, ""]:
    """Summed cross-entropy of the counted targets of a batch's real rows."""
    model = nnx.merge(graphdef, state)
    hidden = model.features(batch.tokens[:, :-1], **masks(batch)).hidden
    targets = batch.tokens[:, 1:]
    mask = counted(batch) & real[:, None]
    return cross_entropy_sum(model, hidden, targets, mask, chunk_tokens)
