"""Batches of tokens, and whole documents packed into their rows. Letters: config/model.py.

Documents are packed in stored order (next fit): a row takes as many whole documents as fit, so it
is a contiguous range of the token stream. A document longer than a row is cut into rows that
overlap by one token, so every token except the first is a target once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1 << 20  # documents per searchsorted call


class Batch(NamedTuple):
    """Rows of tokens: inputs are [:, :-1], targets [:, 1:].

    tokens is int32 [B, T + 1]. segment_ids, int32 of the same shape, numbers the documents of each
    row from 1, with 0 at padding; None: each row is one segment.
    """

    tokens: Any
    segment_ids: Any = None


def counted(batch: Batch) -> Any:
    """Returns True at targets in the same document as their input, bool [B, T]: the loss's mask."""
    if batch.segment_ids is None:
        return jnp.ones(batch.tokens[:, 1:].shape, bool)
    inputs, targets = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return (inputs == targets) & (targets != 0)


def masks(batch: Batch) -> dict[str, Any]:
    """Returns the arguments of Decoder.features that separate documents, int32 [B, T].

    Positions restart at 0 in each document.
    """
    if batch.segment_ids is None:
        return {}
    segments = jnp.asarray(batch.segment_ids[:, :-1])
    slots = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    return {
        "attention_mask": (segments != 0).astype(jnp.int32),
        "segment_ids": segments,
        "position_ids": slots - first,
    }


def pack(starts: np.ndarray, first: int, last: int, size: int) -> np.ndarray:
    """Returns the rows: ranges [R, 2], int64, of the tokens first … last - 1, each at most `size`.

    Args:
      starts: first tokens of documents, ascending; one is at or before `first`.
      first: a document's first token.
      last: end of the last document.
      size: tokens of a row, targets included.
    """
    inner = starts[(starts > first) & (starts < last)]
    bounds = np.concatenate([[first], inner, [last]]).astype(np.int64)
    documents = len(bounds) - 1
    begins: list[int] = []
    ends: list[int] = []
    place = 0  # first document of the next row
    for block in range(0, documents, _BLOCK):
        here = bounds[block : min(block + _BLOCK, documents)]
        fits = (np.searchsorted(bounds, here + size, side="right") - 1).tolist()
        while block <= place < block + len(here):
            following = fits[place - block]
            if following > place:
                begins.append(int(bounds[place]))
                ends.append(int(bounds[following]))
                place = following
                continue
            begin, end = int(bounds[place]), int(bounds[place + 1])
            while end - begin > size:
                begins.append(begin)
                ends.append(begin + size)
                begin += size - 1
            # The document's rest shares a row with the following documents.
            place = int(np.searchsorted(bounds, begin + size, side="right")) - 1
            begins.append(begin)
            ends.append(int(bounds[place]))
    return np.stack([np.asarray(begins, np.int64), np.asarray(ends, np.int64)], axis=1)
