"""Checks of the arguments that callers in Python give. Each raises InputError."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError

FLOATS = ("float32", "bfloat16", "float16")


def is_integer(value: Any) -> bool:
    """True for an integer of Python, NumPy or JAX; a bool is none."""
    return _is_scalar(value, int, jnp.integer)


def is_number(value: Any) -> bool:
    """True for an integer or a float of Python, NumPy or JAX; a bool is none."""
    return _is_scalar(value, (int, float), jnp.number)


def _is_scalar(value: Any, python: Any, kind: Any) -> bool:
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, kind)
    return isinstance(value, python) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuses what is no integer, or below `least`."""
    if not is_integer(value):
        raise InputError(f"{name}={value!r} must be an integer, at least {least}")
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}")


def check_type(name: str, value: Any, wanted: type, way_out: str) -> None:
    """Refuses what is not an instance of `wanted`; way_out says how to get one."""
    if not isinstance(value, wanted):
        raise InputError(
            f"{name} is of type {type(value).__name__}, not {wanted.__name__}: {way_out}"
        )


def check_path(name: str, value: Any) -> None:
    """Refuses what names no file or directory."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InputError(f"{name}={value!r} must be a path")


def check_key(key: Any) -> None:
    """Refuses what is no single key of JAX, of the typed or the older kind."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    older = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32
    if not (typed and key.ndim == 0) and not (older and key.ndim == 1):
        raise InputError(f"key={key!r} must be a key of JAX: jax.random.key(0)")


def rectangular(name: str, values: Any) -> np.ndarray:
    """Nested lists, or any array, as a NumPy array; refuses rows of different lengths."""
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths: pad them to one length, and give an "
            "attention_mask that is 0 at the padding"
        ) from None


def check_ids(config: ModelConfig, ids: np.ndarray) -> None:
    """Refuses what are not token ids [batch, tokens] of this model."""
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"input_ids has shape {ids.shape}; it must be [batch, tokens], not empty")
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"input_ids are {ids.dtype}; they must be integers, the ids of tokens")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(
            f"input_ids reach from {ids.min()} to {ids.max()}, outside the vocabulary of "
            f"{config.vocab_size}"
        )


def check_mask(name: str, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuses what are not numbers or bools in input_ids' shape."""
    if mask.shape != shape:
        raise InputError(f"{name} {mask.shape} must have input_ids' shape {shape}")
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.number):
        raise InputError(f"{name} is {mask.dtype}; it must hold numbers or bools")
