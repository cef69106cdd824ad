"""Generation: prefills the prompts, then decodes one token at a time with a preallocated KV cache.

Each is compiled once per batch size and length bucket, independent of the prompts, the number of
new tokens and the sampling settings.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from finermoe_jax.config.arguments import (
    check_ids,
    check_integer,
    check_mask,
    check_type,
    rectangular,
)
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError
from finermoe_jax.generation.sampling import NO_TOKEN, Sampling, choose
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.kv_cache import KVCache, init_cache
from finermoe_jax.layers.parameters import LAYER, axes_of, kind_of
from finermoe_jax.model.decoder import LOAD_A_MODEL, Decoder
from finermoe_jax.model.offload import with_experts

SMALLEST_BUCKET = 32


def generate(
    model: Decoder,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    sampling: Sampling | None = None,
    experts: str | None = None,
) -> Int[Array, "B TN"]:
    """Generates tokens after every row of a batch.

    Args:
      model: any decoder.
      input_ids: int [B, T], array or nested list, padded left or right where attention_mask is 0.
      attention_mask: [B, T], nonzero at real tokens; None: no padding.
      max_new_tokens: tokens to add to each row.
      temperature: 0 takes the most likely token; otherwise samples from
        softmax(logits / temperature).
      seed: seed of the sampling.
      sampling: all sampling settings; replaces temperature and seed.
      experts: "device", "host" (experts stay in host memory and are copied to the device when
        chosen) or "host_compute" (the host multiplies with them). None: as the model was loaded.
        A change copies the experts at every call: better load the model with it.

    Returns:
      int32 [B, T + max_new_tokens]: the input, then the new tokens.

    Raises:
      InputError: an argument of the wrong type, an empty prompt, rows of different lengths, ids
        outside the vocabulary, more positions than the model has, logits that are not finite, or
        experts that cannot be placed so.

    Examples:
      >>> import finermoe_jax as fm
      >>> model = fm.load_hf("finermoe_jax/demo/model")
      >>> fm.generate(model, [[5, 6, 7]], max_new_tokens=2).shape
      (1, 5)
    """
    prompt = rectangular("input_ids", input_ids)
    if sampling is None:
        sampling = Sampling(temperature=temperature, seed=seed)
    if experts is not None:
        check_type("model", model, Decoder, LOAD_A_MODEL)
        model = with_experts(model, experts)
    new = np.stack(list(stream(model, prompt, attention_mask, max_new_tokens, sampling)), axis=1)
    return jnp.asarray(np.concatenate([prompt, new], axis=1), jnp.int32)


def stream(
    model: Decoder,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields one new token of every row, int32 [B], at a time; arguments as in `generate`.

    Raises InputError at the call for invalid input, and later for logits that are not finite.
    """
    check_type("model", model, Decoder, LOAD_A_MODEL)
    ids = rectangular("input_ids", input_ids)
    mask = np.ones(ids.shape, bool)
    if attention_mask is not None:
        mask = rectangular("attention_mask", attention_mask)
    check(model.config, ids, mask, max_new_tokens)
    check_type("sampling", sampling, Sampling, "give, for example, Sampling(temperature=0.8)")
    sampling.check()
    return _tokens(model, ids, mask != 0, int(max_new_tokens), sampling)


def bucket(tokens: int) -> int:
    """Returns the padded length of `tokens`: 32, 48, 64, 96, 128 … (2^n and 3 * 2^(n-1))."""
    size = max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())
    return size * 3 // 4 if size > SMALLEST_BUCKET and tokens <= size * 3 // 4 else size


class _Running(NamedTuple):
    """State passed between steps. It is donated, so that the cache is updated in place."""

    cache: KVCache
    seen: Bool[Array, "B V"]
    step: Int[Array, ""]


def _tokens(
    model: Decoder, ids: np.ndarray, mask: np.ndarray, max_new_tokens: int, sampling: Sampling
) -> Iterator[Int[np.ndarray, " B"]]:
    graphdef, state = nnx.split(model)
    state = sharding.as_kernels_read(state)
    lengths = mask.sum(axis=1)
    padded = np.zeros((len(ids), bucket(int(lengths.max()))), np.int32)
    for row, length in enumerate(lengths):
        padded[row, :length] = ids[row, mask[row]]
    slots = bucket(padded.shape[1] + max_new_tokens)
    cache = init_cache(model.config, len(ids), slots, model.dtype)
    arguments = padded, lengths.astype(np.int32), cache, sampling.scalars()
    token, running = prefill(graphdef, state, *arguments)
    if max_new_tokens > 1:
        state = layers_apart(state)
    for _ in range(1, max_new_tokens):
        # Dispatch the next step before fetching this token.
        following, running = decode(graphdef, state, token, running, sampling.scalars())
        yield _fetched(token)
        token = following
    yield _fetched(token)


def _fetched(token: Int[Array, " B"]) -> Int[np.ndarray, " B"]:
    tokens = np.asarray(token)
    if (tokens == NO_TOKEN).any():
        raise InputError(
            "the model's logits are not finite: its weights are damaged or overflow; use another "
            "checkpoint"
        )
    return tokens


def layers_apart(state: nnx.State) -> nnx.State:
    """Returns the state with layers stored as decoding reads them (cpu.separate_layers)."""

    def cut(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        axes = axes_of(variable, path)
        if LAYER not in axes or kind_of(axes).bank:  # expert banks are read in place
            return variable
        return variable.replace(jax.tree.map(cpu.separate_layers, variable.get_value()))

    return nnx.map_state(cut, state)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill(
    graphdef: Any,
    state: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    sampling: Sampling,
) -> tuple[Int[Array, " B"], _Running]:
    """Runs the prompts [B, T], padded on the right, and selects each row's first token."""
    model = nnx.merge(graphdef, state)
    batch, tokens = ids.shape
    real = jnp.arange(tokens)[None] < lengths[:, None]
    features = model.features(ids, real.astype(jnp.int32), cache=cache)
    hidden = jnp.take_along_axis(features.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    vocab = model.config.vocab_size
    # Padding goes to an extra column, which is dropped.
    seen = jnp.zeros((batch, vocab + 1), bool)
    seen = seen.at[jnp.arange(batch)[:, None], jnp.where(real, ids, vocab)].set(True)[:, :-1]
    return _next(model, hidden, features.cache, seen, sampling, jnp.int32(0))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="running")
def decode(
    graphdef: Any, state: Any, token: Int[Array, " B"], running: _Running, sampling: Sampling
) -> tuple[Int[Array, " B"], _Running]:
    """Runs the last token of every row and selects the next."""
    model = nnx.merge(graphdef, state)
    features = model.features(token[:, None], cache=running.cache)
    hidden = features.hidden[:, 0]
    return _next(model, hidden, features.cache, running.seen, sampling, running.step)


def _next(
    model: Decoder,
    hidden: Array,
    cache: KVCache | None,
    seen: Array,
    sampling: Sampling,
    step: Array,
) -> tuple[Int[Array, " B"], _Running]:
    assert cache is not None
    token = choose(model.logits(hidden), sampling, seen, step)
    seen = seen.at[jnp.arange(len(token)), token].set(True)
    return token, _Running(cache, seen, step + 1)


def check(config: ModelConfig, ids: np.ndarray, mask: np.ndarray, new: int) -> None:
    """Raises InputError if prompts [B, T] cannot be continued by `new` tokens."""
    check_ids(config, ids)
    check_mask("attention_mask", mask, ids.shape)
    if not (mask != 0).any(axis=1).all():
        raise InputError("a prompt has no token: its attention_mask is 0 everywhere")
    check_integer("max_new_tokens", new, 1)
    limit, longest = config.context_length, (mask != 0).sum(axis=1).max()
    if longest + new > limit:
        raise InputError(
            f"{longest} prompt tokens and max_new_tokens={new} exceed the model's "
            f"context of {limit} tokens: shorten the prompt or ask for fewer tokens"
        )
