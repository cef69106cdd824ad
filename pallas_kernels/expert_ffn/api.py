"""expert_ffn: SwiGLU experts over rows sorted by expert."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.expert_ffn import cpu, reference
from pallas_kernels.expert_ffn.window import of_window, put
from pallas_kernels.platform import Implementation, choose

type Index = Array | int


def expert_ffn(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    implementation: Implementation | None = None,
    interpret: Any = False,
    first_expert: Index | None = None,
    scales: tuple[Array, Array] | None = None,
    window_of: tuple[int, int] | None = None,
) -> Array:
    """Computes a weighted SwiGLU expert for every row; rows are sorted by expert.

    Row m of expert e is row_weights_m * (silu(x_m Wg_e^T) * (x_m Wu_e^T)) Wd_e. Dropless for every
    distribution of rows. Differentiable in every array but group_sizes.

    Args:
      rows: [M, D], sorted by expert; float32, bfloat16 or (not on TPU) float16, like the weights.
      gate_up: [N, 2F, D], the F gate rows first, then the F up rows.
      down: [N, F, W].
      group_sizes: int32 [E], rows of each expert; they sum to M. Weights of experts without rows
        are not read, except by "reference". Under jit the sum is not checked, and rows past it get
        unspecified values.
      row_weights: [M].
      implementation: "reference" (dense, for tests), "cpu" (blocks of rows in plain JAX, work
        proportional to the rows), "tpu" (Pallas), "gpu" (Pallas on Mosaic GPU), or None: chosen by
        the platform compiled for (`pallas_kernels.platform`).
      interpret: True, or parameters of Pallas's interpreter: runs "tpu" or "gpu" on any device.
      first_expert: int32 in 0 ... N - E, the expert of the first group. None: E must equal N.
      scales: float32 [N, 2F] and [N, W], one scale per output of int8 weights. These always run as
        "cpu", forward only.
      window_of: (E', N') if these are copies from a layer of E' experts in a stack of N'. The
        results of "cpu" then equal that layer's bit by bit. Forward only.

    Returns:
      [M, W] in the dtype of rows, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that contradict each other, group sizes (if concrete) that are
        negative or do not sum to M, an unknown implementation, interpret without a Pallas kernel,
        or int8 weights without scales.
      NotImplementedError: the chosen implementation has no kernel for this device.

    Examples:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels.expert_ffn import expert_ffn
      >>> rows = jnp.ones((3, 8))  # two rows of expert 0, one of expert 1
      >>> gate_up, down = jnp.ones((2, 2 * 4, 8)), jnp.ones((2, 4, 6))
      >>> y = expert_ffn(rows, gate_up, down, jnp.array([2, 1]), jnp.array([1.0, 1.0, 0.5]))
      >>> y.shape
      (3, 6)
    """
    _check(rows, gate_up, down, group_sizes, row_weights, first_expert, scales is not None)
    first = 0 if first_expert is None else first_expert
    if scales is not None:
        return cpu.forward(rows, gate_up, down, group_sizes, row_weights, first, scales, window_of)
    how = _how(rows, implementation, interpret, window_of=window_of)
    run = tuple(w[None] for w in of_window(gate_up, down, first, len(group_sizes)))
    y, run = _ffn(how, rows, row_weights, run, gate_up, down, group_sizes, first, 0)
    return unread(empty_like(run), y, run)


def expert_ffn_of_run(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    layer: Index,
    gradients: tuple[Array, ...],
    implementation: Implementation | None = None,
    interpret: Any = False,
    adds: bool = False,
    window_of: tuple[int, int] | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """Computes `expert_ffn` for one layer of a stack of layers (a run), without copies.

    Weights are read inside the stack, and their gradients are written into a stack. For this, a
    loop over layers passes `gradients` from call to call. Only the cotangents of `gradients` are
    used, never their values. In the backward pass, each call receives a cotangent of the stack's
    shape, writes its layer's gradients into it, and passes it on to the layer below. At the end the
    cotangent is the gradient of the whole stack. `unread` must follow the last call. The weights
    must be constants (stop_gradient).

    Args and errors are those of expert_ffn, except:
      gate_up: [L, E, 2F, D], of L layers.
      down: [L, E, F, W].
      layer: int32, 0 ... L - 1.
      gradients: arrays of the weights' shapes, in the dtypes of their gradients; empty: the weights
        get no gradient.
      adds: adds this layer's gradients to the stored values instead of overwriting them.

    Returns:
      [M, W] as expert_ffn, and `gradients`, to pass to the next call.
    """
    one: list[Any] = [jax.eval_shape(lambda w: w[0], w) for w in (gate_up, down)]
    _check(rows, one[0], one[1], group_sizes, row_weights)
    how = _how(rows, implementation, interpret, adds, window_of)
    flat = (w.reshape(-1, *w.shape[2:]) for w in (gate_up, down))
    first = jnp.asarray(layer * len(group_sizes), jnp.int32)
    return _ffn(how, rows, row_weights, gradients, *flat, group_sizes, first, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unread(empty: Callable[[], tuple[Array, ...]], x: Any, gradients: tuple[Array, ...]) -> Any:
    """Returns x, and ends a chain of `expert_ffn_of_run` calls: no later code reads `gradients`.

    In the backward pass, the cotangents of `gradients` start as `empty()`, with arbitrary values,
    because writing zeros would cost a write of all experts. The calls must therefore overwrite
    every expert of every layer, as they do without `adds`. x must depend on all of the calls.
    """
    return x


unread.defvjp(
    lambda empty, x, gradients: (x, None),
    lambda empty, _, dx: (dx, empty()),
)


def empty_like(arrays: tuple[Array, ...]) -> Callable[[], tuple[Array, ...]]:
    """Returns a function that makes uninitialised arrays of these shapes and dtypes."""
    shapes = [(array.shape, array.dtype) for array in arrays]
    return lambda: tuple(lax.empty(*shape) for shape in shapes)


class _How(NamedTuple):
    implementation: Implementation
    interpret: Any
    adds: bool
    window_of: tuple[int, int] | None


def _how(
    rows: Array,
    implementation: Implementation | None,
    interpret: Any,
    adds: bool = False,
    window_of: tuple[int, int] | None = None,
) -> _How:
    chosen = choose(implementation, interpret)
    # No rows: no kernel launch.
    return _How(chosen if len(rows) else "cpu", interpret, adds, window_of)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(
    how: _How,
    rows: Array,
    row_weights: Array,
    gradients: tuple[Array, ...],
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    first_expert: Index,
    layer: Index,
) -> tuple[Array, tuple[Array, ...]]:
    arguments = (rows, gate_up, down, group_sizes, row_weights, first_expert)
    # Imported here because another platform's Pallas may lack what it needs.
    match how.implementation:
        case "reference":
            y = reference.forward(*arguments)
        case "cpu":
            y = cpu.forward(*arguments, window_of=how.window_of)
        case "tpu":
            from pallas_kernels.expert_ffn import mosaic_tpu

            y = mosaic_tpu.forward(*arguments, how.interpret)
        case "gpu":
            from pallas_kernels.expert_ffn import mosaic_gpu

            y = mosaic_gpu.forward(*arguments, how.interpret)
        case _:
            assert_never(how.implementation)
    return y, gradients


def _forward(how: _How, rows: Array, row_weights: Array, gradients: Any, *rest: Any) -> Any:
    # Gradients are not residuals: a loop would store them for each layer.
    return _ffn(how, rows, row_weights, gradients, *rest), (rows, row_weights, *rest)


def _backward(how: _How, saved: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    rows, row_weights, gate_up, down, group_sizes, first_expert, layer = saved
    dy, into = cotangents
    arguments = (rows, gate_up, down, group_sizes, row_weights, first_expert, dy)
    if how.implementation == "tpu":
        from pallas_kernels.expert_ffn import mosaic_tpu

        drows, dweights, into = mosaic_tpu.backward(
            *arguments, into, layer, how.adds, how.interpret
        )
    else:
        if how.implementation == "reference":
            drows, dweights, *grads = reference.backward(*arguments)
        elif how.implementation == "cpu":
            drows, dweights, *grads = cpu.backward(*arguments)
        else:
            from pallas_kernels.expert_ffn import mosaic_gpu

            drows, dweights, *grads = mosaic_gpu.backward(*arguments, how.interpret)
        into = put(into, layer, grads, how.adds)
    return (
        drows.astype(rows.dtype),
        dweights.astype(row_weights.dtype),
        into,
        None,
        None,
        None,
        None,
        None,
    )


_ffn.defvjp(_forward, _backward)


def _check(
    rows: Array,
    gate_up: Array,
    down: Array,
    group_sizes: Array,
    row_weights: Array,
    first_expert: Index | None = None,
    quantized: bool = False,
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
    (experts, double_f, width), groups = gate_up.shape, len(group_sizes)
    if 0 in (experts, groups):
        raise ValueError(
            f"gate_up has shape {gate_up.shape} and group_sizes {group_sizes.shape}; there must be "
            "at least one expert"
        )
    window = first_expert is not None and groups <= experts
    for what, got, wanted in (
        ("gate_up's last axis must be rows' width D", width, rows.shape[1]),
        ("gate_up's middle axis must be twice down's F", double_f, 2 * down.shape[1]),
        ("down must have as many experts as gate_up", down.shape[0], experts),
        ("group_sizes must have one entry per expert", groups, groups if window else experts),
        ("row_weights must have one entry per row", row_weights.shape[0], rows.shape[0]),
    ):
        if got != wanted:
            raise ValueError(f"{what}: {got} != {wanted}")
    _check_dtypes(rows, gate_up, down, group_sizes, quantized)
    if not isinstance(group_sizes, jax.core.Tracer):
        sizes = np.asarray(group_sizes)  # concrete even if other arguments are traced
        if (sizes < 0).any() or sizes.sum() != rows.shape[0]:
            raise ValueError(
                f"group_sizes must be non-negative and sum to the {rows.shape[0]} rows, but they "
                f"sum to {sizes.sum()} and the smallest is {sizes.min()}"
            )


def _check_dtypes(
    rows: Array, gate_up: Array, down: Array, group_sizes: Array, quantized: bool
) -> None:
    for name, array in (("rows", rows), ("gate_up", gate_up), ("down", down)):
        if quantized and name != "rows":
            if array.dtype != jnp.int8:
                raise ValueError(f"{name} is {array.dtype}; weights with scales are int8")
        elif array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} is {array.dtype}; float32, bfloat16 and float16 are supported"
            )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}; it must be an integer type")
