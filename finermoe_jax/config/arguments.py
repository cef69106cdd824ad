"""Checks of arguments of the Python API. Each raises InputError."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError

FLOATS = ("float32", "bfloat16", "float16")


def is_integer(value: Any) -> bool:
    """Returns True for an integer of Python, NumPy or JAX, but not for a bool."""
    return _is_scalar(value, int, jnp.integer)


def is_number(value: Any) -> bool:
    """Returns True for an integer or float of Python, NumPy or JAX, but not for a bool."""
    return _is_scalar(value, (int, float), jnp.number)


def _is_scalar(value: Any, python: Any, kind: Any) -> bool:
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, kind)
    return isinstance(value, python) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises InputError unless `value` is an integer of at least `least`."""
    if not is_integer(value):
        raise InputError(f"{name}={value!r} must be an integer, at least {least}")
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}")


def check_type(name: str, value: Any, wanted: type, fix: str) -> None:
    """Raises InputError, ending with `fix`, unless `value` is an instance of `wanted`."""
    if not isinstance(value, wanted):
        raise InputError(f"{name} is of type {type(value).__name__}, not {wanted.__name__}: {fix}")


def check_path(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a non-empty path."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InputError(f"{name}={value!r} must be a path")


def check_key(key: Any) -> None:
    """Raises InputError unless `key` is a single JAX PRNG key, typed or legacy (uint32)."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    older = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32
    if not (typed and key.ndim == 0) and not (older and key.ndim == 1):
        raise InputError(f"key={key!r} must be a JAX PRNG key, such as jax.random.key(0)")


def rectangular(name: str, values: Any) -> np.ndarray:
    """Converts nested lists or any array to NumPy. Raises InputError for ragged rows."""
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths: pad them to one length, and give an "
            "attention_mask that is 0 at the padding"
        ) from None


def check_ids(config: ModelConfig, ids: np.ndarray) -> None:
    """Raises InputError unless `ids` are token ids [batch, tokens] of this model."""
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"input_ids has shape {ids.shape}; it must be [batch, tokens], not empty")
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids is {ids.dtype}; token ids must be integers")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(
            f"input_ids range from {ids.min()} to {ids.max()}; they must be in "
            f"0 … {config.vocab_size - 1}, the vocabulary"
        )


def check_mask(name: str, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises InputError unless `mask` contains numbers or bools and has input_ids' shape."""
    if mask.shape != shape:
        raise InputError(f"{name} has shape {mask.shape}; it must have input_ids' shape {shape}")
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.number):
        raise InputError(f"{name} is {mask.dtype}; it must contain numbers or bools")
