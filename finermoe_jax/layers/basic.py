"""Parts of every decoder: norm, rotary positions, embedding, gated MLP.

Matrices are stored [out, in] as in HF: the minor axis is the model width, a multiple of 128 in
every published size, and conversion is a copy. Axis letters: config/model.py.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax.config.model import ModelConfig, RopeScaling
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.parameters import kind_of
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.layers.stored import Quantized, Weight

_ACTIVATION = ("batch", "sequence", "width")


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    dtype: DTypeLike,
    init: Callable[..., Array],
) -> nnx.Param:
    """Creates a parameter from its shape, logical axis names, dtype and initializer.

    The axes determine its sharding (sharding.RULES) and how it is trained and stored
    (parameters.KINDS). Raises InputError for axes without a kind.
    """
    assert len(shape) == len(axes), (shape, axes)
    kind_of(axes)
    value = init(rngs.params(), tuple(shape), dtype)
    # The mesh is applied to whole states later, so a module can be built without one.
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def normal(std: float) -> Callable[..., Array]:
    """Returns an initializer: normal(0, std), drawn in float32 and cast."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def project(
    equation: str,
    x: Float[Array, "..."],
    weight: Weight,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns jnp.einsum(equation, x, weight) in x's dtype. Every product with a weight uses this.

    The summed axes are the last of both operands. Accumulates in float32 where the platform can;
    returns out_dtype (default: x's). On a CPU, few rows are computed in float32 for every dtype of
    the weight (layers/cpu.py).
    """
    out_dtype = out_dtype or x.dtype
    if isinstance(weight, Quantized):
        y = project(equation, x, weight.values, jnp.float32)
        scale = weight.scale[...].astype(jnp.float32)
        return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(out_dtype)
    of_x, of_weight = equation.partition("->")[0].replace("...", "").split(",")
    summed = len({*of_x} & {*of_weight})
    leading = x.shape[: x.ndim - summed]
    few = cpu.uses_few_rows(math.prod(leading))
    if not few and isinstance(weight, Array) and weight.dtype != jnp.int8:
        return _project(equation, x, weight, out_dtype)
    # As a matrix: a CPU would transpose a slice with several output or input axes.
    outputs = weight.shape[: weight.ndim - summed]
    matrix = weight.reshape(math.prod(outputs), -1)
    rows = x.reshape(-1, matrix.shape[1])
    if few:
        y = cpu.few_rows(rows.astype(jnp.float32), matrix)
    else:
        y = _project("MK,NK->MN", rows, matrix.astype(x.dtype), out_dtype)
    return y.reshape(*leading, *outputs).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."], out_dtype: DTypeLike
) -> Float[Array, "..."]:
    """`project`; its backward pass materializes x and the cotangent on a CPU."""
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=out_dtype)


def _project_backward(
    equation: str, _: DTypeLike, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, weight = saved
    x, dy = cpu.materialized((x, dy.astype(x.dtype)))
    _, vjp = jax.vjp(lambda x, w: jnp.einsum(equation, x, w.astype(x.dtype)), x, weight)
    return vjp(dy)


_project.defvjp(
    lambda equation, x, w, out: (_project(equation, x, w, out), (x, w)), _project_backward
)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, with float32 statistics."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (size,), ("norm",), dtype, nnx.initializers.ones)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis, in x's dtype."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)[(None,) * (x.ndim - 1)]


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns each pair's angle per position [head_dim / 2], and the factor on rotated pairs.

    Rounded to float32 where transformers rounds: at position 100,000 a difference in the last bit
    of a frequency turns a pair by up to 0.008.
    """
    dim, scaling = config.attention_head_dim, config.rope_scaling
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    with np.errstate(all="ignore"):  # absurd rope_theta
        powers = np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
        frequencies = 1 / powers
    if scaling is None:
        return frequencies, 1.0
    factor = np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return frequencies / factor, 1.0
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.rope_type == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        slow, fast = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
        turns = np.float32(original / (2 * math.pi)) * frequencies
        kept = np.clip((turns - slow) / (fast - slow), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    first, last = _yarn_range(scaling, dim, config.rope_theta, original)
    pairs = np.arange(dim // 2, dtype=np.float32)
    kept = 1 - np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    return 1 / (factor * powers) * (1 - kept) + frequencies * kept, _yarn_factor(scaling)


def _yarn_range(scaling: RopeScaling, dim: int, theta: float, original: int) -> tuple[float, float]:
    """Pairs with beta_fast and beta_slow turns; frequencies change between them."""

    def pair(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast or 32.0), pair(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = float(math.floor(first)), float(math.ceil(last))
    # dim, not dim / 2, as in transformers.
    first, last = max(first, 0.0), min(last, dim - 1.0)
    return first, last if last != first else last + 0.001


def _yarn_factor(scaling: RopeScaling) -> float:
    """Factor on rotated queries and keys; scores are scaled by its square."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = math.log(max(scaling.factor, 1.0))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * grown + 1) / (0.1 * scaling.mscale_all_dim * grown + 1)
    return 0.1 * grown + 1


def rotary_angles(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Returns float32 cosines and sines of each position's rotation of the head_dim / 2 pairs.

    With yarn scaling both include its factor.
    """
    frequencies, factor = rotary_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Applies rotary embeddings in float32, half-split form: pair i is (x[i], x[i + H/2])."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Embedding(nnx.Module):
    """[V, D] table: embeds tokens and, if tied or as lm_head, gives their logits."""

    def __init__(
        self,
        vocab: int,
        width: int,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        axes: Sequence[str] = ("vocab", "embed"),
    ):
        self.weight = param(rngs, (vocab, width), axes, dtype, normal(std))

    def __call__(
        self, ids: Int[Array, "B T"], dtype: DTypeLike, placement: Placement = ONE_DEVICE
    ) -> Float[Array, "B T D"]:
        """Returns each id's row, cast to dtype.

        On a mesh every device looks up its slice of the width, for the tokens of all devices with
        other slices of the same rows; an all-to-all then exchanges the slices. The table is not
        moved.
        """
        mesh, table = placement.mesh, self.weight[...]
        if mesh is None or mesh.size == 1:
            return table[ids].astype(dtype)
        stored, _ = sharding.spec(("vocab", "embed"), table.shape, mesh, "embedding")
        columns = sharding.mesh_axes(stored[1])
        tokens, _ = sharding.spec(("batch", "sequence"), ids.shape, mesh, "tokens")
        # The partitioner turns a vocabulary split over tensor into a per-device mask around a
        # scatter, which some versions of XLA for TPUs miscompiled inside a loop (openxla/xla issue
        # 49143). It is used only if fsdp does not divide the width.
        if not columns or not {*columns} <= {*sharding.mesh_axes(tokens[0])}:
            return sharding.constrain(
                table[ids].astype(dtype), _ACTIVATION, placement, "embedded tokens"
            )

        def local(table: Array, ids: Array) -> Array:
            rows = table[jax.lax.all_gather(ids, columns, axis=0, tiled=True)].astype(dtype)
            return jax.lax.all_to_all(rows, columns, split_axis=0, concat_axis=2, tiled=True)

        lookup = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(None, columns), tokens),
            out_specs=PartitionSpec(*tokens, None),
            check_vma=False,
        )
        return lookup(table, ids)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), as dense FFN and shared expert."""

    def __init__(
        self,
        width: int,
        hidden: int,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        hidden_axis: str = "mlp",
    ):
        self.gate = param(rngs, (hidden, width), (hidden_axis, "embed"), dtype, normal(std))
        self.up = param(rngs, (hidden, width), (hidden_axis, "embed"), dtype, normal(std))
        self.down = param(rngs, (width, hidden), ("embed", hidden_axis), dtype, normal(std))

    def __call__(
        self, x: Float[Array, "B T D"], placement: Placement = ONE_DEVICE
    ) -> Float[Array, "B T D"]:
        """Applies the layer in x's dtype."""
        gate = project("BTD,FD->BTF", x, self.gate[...])
        up = project("BTD,FD->BTF", x, self.up[...])
        hidden = sharding.constrain(
            jax.nn.silu(gate) * up, ("batch", "sequence", "mlp"), placement, "FFN hidden"
        )
        return project("BTF,DF->BTD", hidden, self.down[...])
