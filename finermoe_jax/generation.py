"""Generation: one prefill, then a token at a time with a KV cache."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from finermoe_jax.attention import KVCache, init_cache
from finermoe_jax.errors import InputError
from finermoe_jax.model import Decoder


def generate(
    model: Decoder,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Int[Array, "B TN"]:
    """Continues every row of a batch.

    Args:
      model: any decoder.
      input_ids: int [B, T], padded left or right where attention_mask is 0.
      attention_mask: [B, T] or None (no padding).
      max_new_tokens: tokens to add to each row.
      temperature: 0 takes the most likely token, else samples from softmax(logits / temperature).
      seed: of the sampling.

    Returns:
      int32 [B, T + max_new_tokens]: the input as given, then the new tokens.

    Raises:
      InputError: empty prompts, ids outside the vocabulary, more positions than the model has.
    """
    prompt = np.asarray(input_ids)
    new = np.stack(
        list(stream(model, prompt, attention_mask, max_new_tokens, temperature, seed)), axis=1
    )
    return jnp.asarray(np.concatenate([prompt, new], axis=1), jnp.int32)


def stream(
    model: Decoder,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """`generate`, one new token of every row at a time."""
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
    _check(model, ids, mask, max_new_tokens, temperature)
    key = jax.random.key(seed)
    graphdef, state = nnx.split(model)
    batch, tokens = ids.shape
    cache = init_cache(model.config, batch, tokens + max_new_tokens, model.dtype)
    last = tokens - 1 - np.argmax(mask[:, ::-1] != 0, axis=1)
    token, cache = _step(
        graphdef, state, jnp.asarray(ids, jnp.int32), jnp.asarray(mask), jnp.asarray(last),
        cache, temperature, jax.random.fold_in(key, 0),
    )  # fmt: skip
    yield np.asarray(token)
    ones, zeros = jnp.ones((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32)
    for i in range(1, max_new_tokens):
        token, cache = _step(
            graphdef, state, token[:, None], ones, zeros, cache, temperature,
            jax.random.fold_in(key, i),
        )  # fmt: skip
        yield np.asarray(token)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _step(
    graphdef: Any,
    state: Any,
    ids: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    last: Int[Array, " B"],
    cache: KVCache,
    temperature: Float[Array, ""],
    key: Array,
) -> tuple[Int[Array, " B"], KVCache]:
    """Runs ids through the model and chooses each row's next token after position `last`."""
    model = nnx.merge(graphdef, state)
    features = model.features(ids, mask, cache=cache)
    hidden = jnp.take_along_axis(features.hidden, last[:, None, None], axis=1)[:, 0]
    logits = model.logits(hidden)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6), axis=-1)
    token = jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1))
    return token.astype(jnp.int32), features.cache


def _check(model: Decoder, ids: np.ndarray, mask: np.ndarray, new: int, temperature: float) -> None:
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"input_ids has shape {ids.shape}; it must be [batch, tokens], not empty")
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask {mask.shape} must have input_ids' shape {ids.shape}")
    if not (mask != 0).any(axis=1).all():
        raise InputError("a prompt holds no token: its attention_mask is 0 everywhere")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise InputError(
            f"input_ids reach from {ids.min()} to {ids.max()}, outside the vocabulary of "
            f"{model.config.vocab_size}"
        )
    if new < 1:
        raise InputError(f"max_new_tokens={new} must be at least 1")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature} must be 0 (greedy) or positive")
    limit = model.config.max_position_embeddings
    if ids.shape[1] + new > limit:
        raise InputError(
            f"{ids.shape[1]} prompt tokens and max_new_tokens={new} exceed the model's "
            f"max_position_embeddings={limit}"
        )


def complete(
    model: Decoder, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The continuation of one text prompt, piece by piece, until the end-of-text token.

    Raises InputError, at the call, when the prompt has no token or does not fit (`generate`).
    """
    ids = np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)[None]
    if not ids.size:
        raise InputError("a prompt is empty; give at least one character")
    _check(model, ids, np.ones_like(ids), max_new_tokens, temperature)
    return _pieces(tokenizer, stream(model, ids, None, max_new_tokens, temperature, seed))


def _pieces(tokenizer: Any, tokens: Iterator[np.ndarray]) -> Iterator[str]:
    """The text that each new token adds."""
    so_far: list[int] = []
    shown = ""
    for token in tokens:
        if int(token[0]) == tokenizer.eos_token_id:
            break
        so_far.append(int(token[0]))
        text = tokenizer.decode(so_far)
        # An incomplete UTF-8 sequence decodes to the replacement character: wait for the rest.
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text
