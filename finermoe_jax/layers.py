"""The parts every decoder has: norm, rotary positions, embedding, gated MLP.

Matrices are stored [out, in] as in HF: the model width is the minor axis, a multiple of 128 in
every published size, and conversion is a copy. Axis letters: finermoe_jax/config.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    dtype: DTypeLike,
    init: Callable[..., Array],
) -> nnx.Param:
    """A parameter: its shape, logical axis names (finermoe_jax/sharding.py), dtype and start."""
    assert len(shape) == len(axes), (shape, axes)
    value = init(rngs.params(), tuple(shape), dtype)
    # The mesh is applied to whole states, outside; a module can be built without one.
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def normal(std: float) -> Callable[..., Array]:
    """normal(0, std), drawn in float32 and cast."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(
    equation: str,
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """jnp.einsum(equation, x, weight) with operands in x's dtype: every product with a weight.

    Accumulated in float32 where the platform can, returned in out_dtype (default: x's). The
    backward pass holds x and the cotangent as arrays of their own: XLA on a CPU would otherwise
    fuse the element-wise work that made them into the transposes that the weight gradient needs,
    which is several times slower than either.
    """
    return jnp.einsum(
        equation, x, weight.astype(x.dtype), preferred_element_type=out_dtype or x.dtype
    )


def _project_backward(
    equation: str, _: DTypeLike | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, weight = saved
    x, dy = _materialized((x, dy.astype(x.dtype)))
    _, vjp = jax.vjp(lambda x, w: jnp.einsum(equation, x, w.astype(x.dtype)), x, weight)
    return vjp(dy)


project.defvjp(
    lambda equation, x, w, out: (project(equation, x, w, out), (x, w)), _project_backward
)


def _materialized(arrays: Any) -> Any:
    return jax.lax.platform_dependent(
        arrays, cpu=jax.lax.optimization_barrier, default=lambda arrays: arrays
    )


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, statistics in float32 whatever x's dtype."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (size,), ("embed",), dtype, nnx.initializers.ones)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalizes each position, in x's dtype."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)[None, None]


def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosines and sines, float32, of each position's rotation of the head_dim / 2 pairs."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * (theta**-exponents)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotary embedding, half-split form: pair i is (x[i], x[i + H/2]). Computed in float32."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Embedding(nnx.Module):
    """[V, D] table, used to look tokens up and, where tied or as lm_head, to score them."""

    def __init__(self, vocab: int, width: int, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = param(rngs, (vocab, width), ("vocab", "embed"), dtype, normal(std))

    def __call__(self, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """Each id's row, cast to dtype."""
        return self.weight[...][ids].astype(dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense FFN and the shared expert."""

    def __init__(self, width: int, hidden: int, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = param(rngs, (hidden, width), ("mlp", "embed"), dtype, normal(std))
        self.up = param(rngs, (hidden, width), ("mlp", "embed"), dtype, normal(std))
        self.down = param(rngs, (width, hidden), ("embed", "mlp"), dtype, normal(std))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer, in x's dtype."""
        gate = project("BTD,FD->BTF", x, self.gate[...])
        up = project("BTD,FD->BTF", x, self.up[...])
        return project("BTF,DF->BTD", jax.nn.silu(gate) * up, self.down[...])
