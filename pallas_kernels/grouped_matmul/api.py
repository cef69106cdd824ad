"""grouped_matmul: one weight matrix per expert over rows sorted by expert.

Letters: E experts, M rows, K contracted width, N output width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import cpu, reference
from pallas_kernels.platform import Implementation, choose

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    transpose_weights: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Array:
    """Multiplies every row by its expert's matrix; rows are sorted by expert.

    Row m of expert e is x_m W_e, or x_m W_e^T with transpose_weights. Dropless for every
    distribution of rows. Differentiable in rows and weights. Weights of experts without rows are
    not read, except by "reference".

    Args:
      rows: [M, K], sorted by expert; float32, bfloat16 or (not on TPU and GPU) float16.
      weights: [E, K, N], or [E, N, K] with transpose_weights; same dtypes as rows.
      group_sizes: int32 [E], rows of each expert; they sum to M.
      transpose_weights: contracts the last axis of `weights` instead of the middle one.
      implementation: "reference" (dense, for tests), "cpu" (blocks of rows in plain JAX), "tpu" or
        "gpu" (Pallas), or None: chosen by the platform compiled for.
      interpret: True, or parameters of Pallas's interpreter: runs "tpu" or "gpu" on any device.

    Returns:
      [M, N] in the dtype of rows, accumulated in float32.

    Raises:
      ValueError: shapes that contradict each other, dtypes that are not supported, group sizes (if
        concrete) that are negative or do not sum to M, an unknown implementation, or interpret
        without a Pallas kernel.
      NotImplementedError: the chosen implementation has no kernel for this device.

    Examples:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.grouped_matmul import grouped_matmul
      >>> rows = jnp.ones((3, 4))  # two rows of expert 0, one of expert 1
      >>> weights = jnp.array([1.0, 2.0])[:, None, None] * jnp.ones((2, 4, 2))
      >>> grouped_matmul(rows, weights, jnp.array([2, 1])).tolist()
      [[4.0, 4.0], [4.0, 4.0], [8.0, 8.0]]
    """
    chosen = choose(implementation, interpret)
    _check(rows, weights, group_sizes, transpose_weights, chosen)
    return _product(rows, weights, group_sizes, transpose_weights, chosen, interpret)


def weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    implementation: Implementation | None = None,
    interpret: Any = False,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Computes the gradient of grouped_matmul's weights: the sum of x_m^T dy_m by expert.

    Experts without rows get zeros. Swap rows and cotangent for the gradient of transposed weights.
    Not itself differentiable.

    Args:
      rows: [M, K], sorted by expert; dtypes as in grouped_matmul.
      cotangent: [M, N].
      group_sizes: int32 [E], rows of each expert; they sum to M.
      implementation: as in grouped_matmul.
      interpret: as in grouped_matmul.
      out_dtype: dtype of the result; None: that of rows.

    Returns:
      [E, K, N] in out_dtype, accumulated in float32.

    Raises:
      ValueError: as in grouped_matmul.
      NotImplementedError: as in grouped_matmul.

    Examples:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.grouped_matmul import weight_gradient
      >>> rows, cotangent = jnp.ones((3, 4)), jnp.ones((3, 2))
      >>> weight_gradient(rows, cotangent, jnp.array([2, 1]))[:, 0, 0].tolist()
      [2.0, 1.0]
    """
    chosen = choose(implementation, interpret)
    _check_rank(rows=(rows, 2), cotangent=(cotangent, 2), group_sizes=(group_sizes, 1))
    if cotangent.shape[0] != rows.shape[0]:
        raise ValueError(
            f"cotangent must have as many rows as rows: {cotangent.shape[0]} != {rows.shape[0]}"
        )
    out_dtype = jnp.dtype(rows.dtype if out_dtype is None else out_dtype)
    _check_dtypes(chosen, rows=rows.dtype, cotangent=cotangent.dtype, out_dtype=out_dtype)
    _check_group_sizes(group_sizes, rows.shape[0])
    return _weight_gradient(rows, cotangent, group_sizes, chosen, interpret, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    transpose_weights: bool,
    implementation: Implementation,
    interpret: Any,
) -> Array:
    if 0 in rows.shape or 0 in weights.shape:
        width = weights.shape[1 if transpose_weights else 2]
        return jnp.zeros((rows.shape[0], width), rows.dtype)
    # Imported here because another platform's Pallas may lack what it needs.
    match implementation:
        case "reference":
            return reference.grouped_matmul(
                rows, weights, group_sizes, transpose_weights=transpose_weights
            )
        case "cpu":
            return cpu.grouped_matmul(
                rows, weights, group_sizes, transpose_weights=transpose_weights
            )
        case "tpu":
            from pallas_kernels.grouped_matmul import mosaic_tpu

            return mosaic_tpu.grouped_matmul(
                rows,
                weights,
                group_sizes,
                transpose_weights=transpose_weights,
                interpret=interpret,
            )
        case "gpu":
            from pallas_kernels.grouped_matmul import mosaic_gpu

            return mosaic_gpu.grouped_matmul(
                rows,
                weights,
                group_sizes,
                transpose_weights=transpose_weights,
                interpret=interpret,
            )


def _weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    implementation: Implementation,
    interpret: Any,
    out_dtype: DTypeLike,
) -> Array:
    shape = (group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    if rows.shape[0] == 0 or 0 in shape:
        return jnp.zeros(shape, out_dtype)
    match implementation:
        case "reference":
            return reference.weight_gradient(rows, cotangent, group_sizes, out_dtype=out_dtype)
        case "cpu":
            return cpu.weight_gradient(rows, cotangent, group_sizes, out_dtype=out_dtype)
        case "tpu":
            from pallas_kernels.grouped_matmul import mosaic_tpu

            return mosaic_tpu.weight_gradient(
                rows, cotangent, group_sizes, interpret=interpret, out_dtype=out_dtype
            )
        case "gpu":
            from pallas_kernels.grouped_matmul import mosaic_gpu

            return mosaic_gpu.weight_gradient(
                rows, cotangent, group_sizes, interpret=interpret, out_dtype=out_dtype
            )


def _forward(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    transpose_weights: bool,
    implementation: Implementation,
    interpret: Any,
) -> tuple[Array, tuple[Array, ...]]:
    y = _product(rows, weights, group_sizes, transpose_weights, implementation, interpret)
    return y, (rows, weights, group_sizes)


def _backward(
    transpose_weights: bool,
    implementation: Implementation,
    interpret: Any,
    saved: tuple[Array, ...],
    dy: Array,
) -> tuple[Array | None, ...]:
    rows, weights, group_sizes = saved
    drows = _product(dy, weights, group_sizes, not transpose_weights, implementation, interpret)
    left, right = (dy, rows) if transpose_weights else (rows, dy)
    dweights = _weight_gradient(left, right, group_sizes, implementation, interpret, weights.dtype)
    return drows, dweights, None


_product.defvjp(_forward, _backward)


def _check(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    transpose_weights: bool,
    implementation: Implementation,
) -> None:
    _check_rank(rows=(rows, 2), weights=(weights, 3), group_sizes=(group_sizes, 1))
    contracted = weights.shape[2 if transpose_weights else 1]
    for what, got, wanted in (
        (
            f"K of weights {weights.shape} with transpose_weights={transpose_weights} "
            f"must be K of rows {rows.shape}",
            contracted,
            rows.shape[1],
        ),
        ("group_sizes must have one entry per expert", group_sizes.shape[0], weights.shape[0]),
    ):
        if got != wanted:
            raise ValueError(f"{what}: {got} != {wanted}")
    _check_dtypes(implementation, rows=rows.dtype, weights=weights.dtype)
    _check_group_sizes(group_sizes, rows.shape[0])


def _check_rank(**arrays: tuple[Array, int]) -> None:
    for name, (array, rank) in arrays.items():
        if array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}; it must have {rank} axes")


def _check_dtypes(implementation: Implementation, **dtypes: DTypeLike) -> None:
    supported = _DTYPES if implementation in ("reference", "cpu") else _DTYPES[:2]
    for name, dtype in dtypes.items():
        if dtype not in supported:
            names = ", ".join(jnp.dtype(each).name for each in supported)
            raise ValueError(
                f"{name} is {dtype}; implementation={implementation!r} supports {names}"
            )


def _check_group_sizes(group_sizes: Array, rows: int) -> None:
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}; it must be an integer type")
    if group_sizes.shape[0] == 0:
        raise ValueError("group_sizes is empty; there must be at least one expert")
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes)  # concrete even if other arguments are traced
        if (sizes < 0).any() or sizes.sum() != rows:
            raise ValueError(
                f"group_sizes must be non-negative and sum to the {rows} rows, but they sum to "
                f"{sizes.sum()} and the smallest is {sizes.min()}"
            )
