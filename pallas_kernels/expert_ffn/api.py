"""expert_ffn: SwiGLU experts over rows sorted by expert."""

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.expert_ffn import cpu, reference
from pallas_kernels.platform import Implementation, choose


def expert_ffn(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Array:
    """Row m of expert e: weight_m * (silu(x_m Wg_e^T) * (x_m Wu_e^T)) Wd_e.

    Dropless for every distribution of rows; differentiable in every array but group_sizes.

    Args:
      rows: [M, D], sorted by expert; float32, bfloat16 or (not on TPU) float16, as the weights.
      gate_up: [E, 2F, D], the F gate rows first, then the F up rows.
      down: [E, F, W].
      group_sizes: int32 [E], rows of each expert; they sum to M.
      row_weights: [M].
      implementation: "reference" (dense, for tests), "cpu" (blocks of rows in plain JAX, work
        proportional to the rows), "tpu" (Pallas), "gpu" (Pallas on Mosaic GPU), or None: by the
        platform compiled for (pallas_kernels.platform).
      interpret: True, or Pallas' own parameters: run "tpu" or "gpu" interpreted, on any device.

    Returns:
      [M, W] in the dtype of rows, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that contradict each other, group sizes (where concrete) that
        are negative or do not sum to M, an unknown implementation, interpret without a kernel.
      NotImplementedError: a device that the chosen implementation has no kernel for.

    Under a trace group sizes are not checked; rows past their sum get unspecified values.
    """
    _check(rows, gate_up, down, group_sizes, row_weights)
    arguments = (rows, gate_up, down, group_sizes, row_weights)
    chosen = choose(implementation, interpret)
    if rows.shape[0] == 0:
        chosen = "cpu"  # nothing to launch
    match chosen:
        case "reference":
            return reference.expert_ffn(*arguments)
        case "cpu":
            return cpu.expert_ffn(*arguments)
        case "tpu":
            from pallas_kernels.expert_ffn import mosaic_tpu

            return mosaic_tpu.expert_ffn(*arguments, interpret)
        case "gpu":
            from pallas_kernels.expert_ffn import mosaic_gpu

            return mosaic_gpu.expert_ffn(*arguments, interpret=interpret)
    assert_never(chosen)


def expert_ffn_of_stack(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    layer: Array | int,
    scales: tuple[Array, Array] | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Array:
    """`expert_ffn` with the experts of one layer of a stack, which is not copied; forward only.

    Args:
      rows: [M, D], sorted by expert.
      gate_up: [L, E, 2F, D]. Of the stack only experts of this layer that own a row are read.
      down: [L, E, F, W].
      group_sizes: int32 [E].
      row_weights: [M].
      layer: int32, 0 … L - 1.
      scales: float32 [L, E, 2F] and [L, E, W] of int8 weights, one for each output. "cpu" computes
        these on every platform.
      implementation: as in expert_ffn; "reference" and "gpu" copy the layer's experts.
      interpret: as in expert_ffn.

    Returns:
      [M, W] in the dtype of rows, accumulated in float32.

    Raises:
      ValueError: as expert_ffn; int8 weights without scales.
      NotImplementedError: as expert_ffn.
    """
    if scales is None:
        one: list[Any] = [jax.eval_shape(lambda w: w[0], w) for w in (gate_up, down)]
        _check(rows, one[0], one[1], group_sizes, row_weights)
    chosen = "cpu" if scales is not None or not len(rows) else choose(implementation, interpret)
    if chosen in ("reference", "gpu"):
        w_in, w_out = (lax.dynamic_index_in_dim(w, layer, keepdims=False) for w in (gate_up, down))
        return expert_ffn(rows, w_in, w_out, group_sizes, row_weights, chosen, interpret)
    w_in, w_out = (w.reshape(-1, *w.shape[2:]) for w in (gate_up, down))
    start = jnp.asarray(layer * len(group_sizes), jnp.int32)
    if chosen == "tpu":
        from pallas_kernels.expert_ffn import mosaic_tpu

        return mosaic_tpu.forward(rows, w_in, w_out, group_sizes, row_weights, start, interpret)
    if scales is not None:
        scales = scales[0].reshape(-1, w_in.shape[1]), scales[1].reshape(-1, w_out.shape[2])
    return cpu.forward(rows, w_in, w_out, group_sizes, row_weights, start, scales)


def _check(
    rows: Array, gate_up: Array, down: Array, group_sizes: Array, row_weights: Array
) -> None:
    for name, array, rank in (
        ("rows", rows, 2),
        ("gate_up", gate_up, 3),
        ("down", down, 3),
        ("group_sizes", group_sizes, 1),
        ("row_weights", row_weights, 1),
    ):
        if array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}; it must have {rank} axes")
    experts, double_f, width = gate_up.shape
    if experts == 0:
        raise ValueError(f"gate_up has shape {gate_up.shape}: there must be at least one expert")
    for what, got, wanted in (
        ("gate_up's last axis against rows' width D", width, rows.shape[1]),
        ("gate_up's middle axis 2F against twice down's F", double_f, 2 * down.shape[1]),
        ("down's experts against gate_up's", down.shape[0], experts),
        ("group_sizes' length against the experts", group_sizes.shape[0], experts),
        ("row_weights' length against the rows", row_weights.shape[0], rows.shape[0]),
    ):
        if got != wanted:
            raise ValueError(f"{what}: {got} != {wanted}")
    for name, array in (("rows", rows), ("gate_up", gate_up), ("down", down)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} is {array.dtype}; float32, bfloat16 and float16 are supported"
            )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}; it must be an integer type")
    if not isinstance(group_sizes, jax.core.Tracer):
        if (group_sizes < 0).any() or group_sizes.sum() != rows.shape[0]:
            raise ValueError(
                f"group_sizes must be non-negative and sum to the {rows.shape[0]} rows; they sum "
                f"to {group_sizes.sum()}, the smallest is {group_sizes.min()}"
            )
