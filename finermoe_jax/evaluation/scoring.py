"""Log-likelihoods of continuations.

Requests are sorted by length, padded to few shapes and sharded over the mesh. Logits are computed
for scored positions only, in chunks. Axis letters: config/model.py; here M counts scored positions.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from finermoe_jax.errors import InputError
from finermoe_jax.generation.decode import bucket
from finermoe_jax.layers import sharding
from finermoe_jax.layers.basic import project
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.losses import log_likelihood

BATCH_TOKENS = 2048  # per device
_CHUNK = 256  # scored positions whose logits are computed at a time


class Continuation(NamedTuple):
    """Scores `targets`, each given all tokens before it. Neither field may be empty."""

    context: Sequence[int]
    targets: Sequence[int]


class Score(NamedTuple):
    """log_likelihood: sum over the targets, nats. greedy: every target is the most likely token."""

    log_likelihood: float
    greedy: bool


def score(
    model: Decoder,
    requests: Sequence[Continuation],
    *,
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
) -> list[Score]:
    """Returns the log-likelihood of every request, in order.

    A context that exceeds the model's limit is truncated on the left. Requests with equal inputs,
    such as one-token answers to one question, share one computation.

    Args:
      model: any decoder; on a mesh, batch rows are sharded over it.
      requests: contexts and targets, as token ids.
      batch_tokens: tokens per batch and device, padding included; at least one row.
      show_progress: shows a progress bar on stderr.

    Raises:
      InputError: a request has no context, no targets or more targets than the limit, or
        log-likelihoods are not finite.
    """
    limit = model.config.context_length
    # Input tokens → indices of the requests, each scored at the last positions.
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, targets) in enumerate(requests):
        if not context or not targets:
            raise InputError(
                f"{len(targets)} tokens after a context of {len(context)}: both must be at least 1"
            )
        if len(targets) > limit:
            raise InputError(
                f"a continuation of {len(targets)} tokens exceeds the model's "
                f"context of {limit} tokens; shorten it"
            )
        inputs = tuple([*context, *targets][-limit - 1 : -1])
        rows.setdefault(inputs, []).append(index)
    ordered = sorted(rows, key=lambda inputs: (-len(inputs), inputs))
    graphdef, state = nnx.split(model)
    state = sharding.as_kernels_read(state)
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    bar = tqdm(total=len(rows), desc="scoring", unit="row", disable=not show_progress,
               file=sys.stderr)  # fmt: skip
    with bar:
        for batch, ids, mask in _batches(ordered, limit, batch_tokens, model.placement.mesh):
            hidden = _hidden(graphdef, state, ids, mask)
            places, wanted, owners = _scored(batch, rows, requests, ids.shape[1])
            log_p, likeliest = _log_likelihoods(model, hidden, places, wanted)
            np.add.at(sums, owners, log_p.astype(np.float64))
            np.logical_and.at(greedy, owners, likeliest)
            bar.update(len(batch))
    if not np.isfinite(sums).all():
        raise InputError(
            "the model's log-likelihoods are not finite: its weights are damaged or overflow"
        )
    return [Score(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]


def _batches(
    ordered: list[tuple[int, ...]], limit: int, batch_tokens: int, mesh: Any
) -> Iterator[tuple[list[tuple[int, ...]], Any, Any]]:
    """Yields rows, longest first, with ids and mask [B, T]; T is the longest row's bucket."""
    parts = sharding.batch_parts(mesh) if mesh else 1
    start = 0
    while start < len(ordered):
        length = min(limit, bucket(len(ordered[start])))
        size = max(1, batch_tokens // length)
        left = -(-(len(ordered) - start) // parts)
        size = parts * min(size, 1 << (left - 1).bit_length())
        batch = ordered[start : start + size]
        start += size
        ids, mask = np.zeros((2, size, length), np.int32)
        for row, inputs in enumerate(batch):
            ids[row, : len(inputs)] = inputs
            mask[row, : len(inputs)] = 1
        if mesh:
            yield batch, *jax.device_put((ids, mask), sharding.batch_sharding(mesh))
        else:
            yield batch, ids, mask


def _scored(
    batch: list[tuple[int, ...]],
    rows: dict[tuple[int, ...], list[int]],
    requests: Sequence[Continuation],
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each scored position's index in B·T, target and request, int64 [M]."""
    places, targets, owners = [], [], []
    for row, inputs in enumerate(batch):
        end = row * length + len(inputs)
        for index in rows[inputs]:
            count = len(requests[index].targets)
            places.append(np.arange(end - count, end))
            targets.append(np.asarray(requests[index].targets))
            owners.append(np.full(count, index))
    return np.concatenate(places), np.concatenate(targets), np.concatenate(owners)


@functools.partial(jax.jit, static_argnames="graphdef")
def _hidden(
    graphdef: Any, state: Any, ids: Int[Array | np.ndarray, "B T"], mask: Any
) -> Float[Array, "B T D"]:
    return nnx.merge(graphdef, state).features(ids, mask).hidden


def _log_likelihoods(
    model: Decoder, hidden: Float[Array, "B T D"], places: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p [M] of the targets, and bools [M]: True if the target is the most likely."""
    pad = -len(places) % _CHUNK
    chunks = [np.pad(x, (0, pad)).astype(np.int32).reshape(-1, _CHUNK) for x in (places, targets)]
    # Dispatch all chunks before blocking on the first.
    found = [_score_chunk(hidden, model.head[...], *chunk) for chunk in zip(*chunks, strict=True)]
    log_p, likeliest = (np.concatenate(x) for x in zip(*jax.device_get(found), strict=True))
    return log_p[: len(places)], likeliest[: len(places)]


@jax.jit
def _score_chunk(
    hidden: Float[Array, "B T D"],
    weight: Any,
    places: Int[Array | np.ndarray, " M"],
    targets: Int[Array | np.ndarray, " M"],
) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    h = hidden.reshape(-1, hidden.shape[-1])[places]
    logits = project("MD,VD->MV", h, weight, jnp.float32)
    log_p, _ = log_likelihood(logits, jnp.asarray(targets))
    return log_p, jnp.argmax(logits, axis=-1) == targets


def windows(
    tokens: Sequence[int] | np.ndarray, prefix: int, length: int, stride: int
) -> Iterator[Continuation]:
    """Splits a text into windows of at most `length` inputs; each token is scored exactly once.

    `prefix` is the context of the first token. The first window scores all its tokens, each later
    one the next `stride`, with at least length - stride tokens of context.
    """
    ids = np.concatenate([[prefix], np.asarray(tokens, np.int64)])  # ids[i] precedes tokens[i]
    done, last = 0, len(ids) - 1
    while done < last:
        end = min(last, done + (stride if done else length))
        context, targets = ids[max(0, end - length) : done + 1], ids[done + 1 : end + 1]
        yield Continuation(context.tolist(), targets.tolist())
        done = end
