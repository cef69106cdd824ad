"""Routed rows on their way to their experts and back, on one device or over a mesh.

**Sorting.** Each token's row is copied for each of its active experts, the copies are sorted by
expert, and what the experts return is put back in the tokens' order. Both maps are permutations
(one after a repeat), so their transposes are gathers too. Left to JAX they would be scatter-adds,
which are slow everywhere and have been miscompiled inside scans (openxla/xla issue 49143).

**The exchange.** Experts may be spread over the mesh's expert axis. All but `routed_experts` then
runs inside shard_map. Each device holds R routed rows, sorted by expert, and E / P of the experts,
P the size of the axis. Devices are numbered along the axis; s is a source, p a destination.

**Dropless in bounded memory.** A pair (s, p) exchanges at most `quota` rows at once, about twice
the balanced share, so that a device never buffers more than twice its own rows. What is left goes
in further rounds through the same buffer; their number depends on the fullest pair alone and is 1
unless a pair holds more than twice its share. It is the same along the expert axis, not beyond: a
round may hold no collective over another axis, or devices would wait for each other for ever.

**Bytes.** A row travels as D values and its weight, and comes back as W = D / G_O values; the
backward pass sends W, and gets D and the weight's gradient. The rows that arrived in the first
round are kept for it, later rounds send them again.

**No second copy** of a token to a device is saved, because the published layout sends none: the
experts of one slot are neighbours, so a token's slots lie on different devices from two devices
on. (Several active experts per slot would share a device while a group is not split.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.layers.stored import Quantized, Weight, in_stack
from pallas_kernels.expert_ffn import expert_ffn, expert_ffn_of_stack
from pallas_kernels.platform import Implementation, platform


def routed_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    gate_up: Weight,
    down: Weight,
    placement: Placement,
) -> Float[Array, "B T A W"]:
    """Each token's A active experts, weighted; on one device, or over a mesh inside shard_map.

    Tokens are split over every mesh axis, tensor included: routed work is per token. An axis that
    does not divide batch or sequence leaves it whole, and its devices then compute the same.

    Args:
      x: tokens.
      experts: the active experts of each token.
      weights: their routing weights.
      gate_up: [E, 2F, D], all experts'; as down. Weights are not cast here: only those of an expert
        that owns a row are read, also where they lie in a stack of layers (stored.OfLayer).
      down: [E, F, W].
      placement: mesh and kernel.
    """
    mesh, kernel = placement
    if mesh is None or mesh.size == 1:
        return _routed(x, experts, weights, gate_up, down, kernel=kernel, axis=None)
    assert isinstance(gate_up, Array) and isinstance(down, Array), "a layer of its own on a mesh"
    tokens, _ = sharding.spec(("batch", "routed_sequence", "width"), x.shape, mesh, "tokens")
    stored, _ = sharding.spec(("expert",), gate_up.shape[:1], mesh, "experts")
    axis = "expert" if mesh.shape["expert"] > 1 else None

    def local(x: Array, experts: Array, weights: Array, gate_up: Array, down: Array) -> Array:
        # Cast first: half as much travels for bfloat16, gradients included.
        whole = (
            sharding.gather_inside(w.astype(x.dtype), stored, ("expert",)) for w in (gate_up, down)
        )
        return _routed(x, experts, weights, *whole, kernel=kernel, axis=axis)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, stored, stored),
        out_specs=P(*tokens, None),
        check_vma=False,
    )
    return mapped(x, experts, weights, gate_up, down)


def _routed(
    x: Array,
    experts: Array,
    weights: Array,
    gate_up: Weight,
    down: Weight,
    *,
    kernel: Implementation | None,
    axis: str | None,
) -> Array:
    batch, tokens, active = experts.shape
    total = gate_up.shape[0] * (lax.axis_size(axis) if axis else 1)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = inverse_of(order)
    sizes = jnp.bincount(flat, length=total).astype(jnp.int32)
    rows = dispatch(x.reshape(-1, x.shape[-1]), order, inverse, active)
    row_weights = permute(weights.reshape(-1), order, inverse)
    if axis is None:
        y = _local_ffn(rows, gate_up, down, sizes, row_weights, kernel)
    else:
        y = exchanged_ffn(rows, row_weights, gate_up, down, sizes, axis, kernel)
    return permute(y, inverse, order).reshape(batch, tokens, active, -1)


def _local_ffn(
    rows: Array,
    gate_up: Weight,
    down: Weight,
    sizes: Array,
    row_weights: Array,
    kernel: Implementation | None,
) -> Array:
    if isinstance(gate_up, Array) and isinstance(down, Array):
        return expert_ffn(rows, gate_up, down, sizes, row_weights, kernel)
    scales = None
    if isinstance(gate_up, Quantized) and isinstance(down, Quantized):
        scales = in_stack(gate_up.scale).stack, in_stack(down.scale).stack
    w_in, w_out = (in_stack(w.values if isinstance(w, Quantized) else w) for w in (gate_up, down))
    return expert_ffn_of_stack(
        rows, w_in.stack, w_out.stack, sizes, row_weights, w_in.layer, scales, kernel
    )


def inverse_of(order: Int[Array, " M"]) -> Int[Array, " M"]:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


@jax.custom_vjp
def permute(
    x: Float[Array, "M *C"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M *C"]:
    """x[order], for a permutation and its inverse."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(
    x: Float[Array, "T D"], order: Int[Array, " M"], inverse: Int[Array, " M"], active: int
) -> Float[Array, "M D"]:
    """Each token's row `active` times, in the given order of the M = T * active copies."""
    return x[order // active]


dispatch.defvjp(
    lambda x, order, inverse, active: (dispatch(x, order, inverse, active), inverse),
    lambda active, inverse, g: (
        g[inverse].reshape(-1, active, g.shape[-1]).sum(axis=1),
        None,
        None,
    ),
)


class Exchange(NamedTuple):
    """Who sends how much to whom; the same on all devices of the expert axis but for `device`."""

    sizes: Int[Array, "P E"]  # rows of each source for each expert
    device: Int[Array, ""]
    quota: int

    @property
    def counts(self) -> Int[Array, "P P"]:
        """Rows from s (first axis) to p."""
        devices, experts = self.sizes.shape
        return self.sizes.reshape(devices, devices, experts // devices).sum(axis=2)

    @property
    def rounds(self) -> Int[Array, ""]:
        """How often the buffer is filled: as often as the fullest pair needs."""
        return (self.counts.max() + self.quota - 1) // self.quota

    def moved(self, step: Int[Array, ""] | int) -> Int[Array, "P P"]:
        """Rows from s to p in one round."""
        return jnp.clip(self.counts - step * self.quota, 0, self.quota)

    def first(self, step: Int[Array, ""] | int) -> Int[Array, "P P"]:
        """Where the rows for p of that round begin among those of s."""
        counts = self.counts
        begin = jnp.cumsum(counts, axis=1) - counts + step * self.quota
        return jnp.minimum(begin, counts.sum(axis=1, keepdims=True))

    def experts(self, step: Int[Array, ""] | int) -> Int[Array, "P Q"]:
        """The local expert of each place of this device's buffer; E / P where nothing arrives."""
        devices, experts = self.sizes.shape
        local = experts // devices
        mine = lax.dynamic_slice_in_dim(self.sizes, self.device * local, local, axis=1)
        place = step * self.quota + jnp.arange(self.quota)
        return (place[None, :, None] >= jnp.cumsum(mine, axis=1)[:, None]).sum(axis=2)


def quota(rows: int, devices: int) -> int:
    """Rows that a pair of devices exchanges in a round: twice the balanced share."""
    return min(rows, -(-2 * rows // devices))


def _padded(rows: Array) -> bool:
    """Whether places that hold no row travel as well.

    They do where XLA has no ragged exchange: on a CPU, and on v5e slices of more than 16 chips
    ("limited ICI routing"). One number a row always travels so: a TPU's ragged exchange would fill
    it up to 256.
    """
    if rows.ndim == 1 or platform() == "cpu":
        return True
    mesh = jax.sharding.get_abstract_mesh()
    kind = mesh.abstract_device.device_kind if mesh.abstract_device else ""
    return kind == "TPU v5 lite" and mesh.size > 16


def _to_experts(
    plan: Exchange, rows: Float[Array, "R *C"], step: Int[Array, ""] | int, axis: str
) -> Float[Array, "M *C"]:
    """One round's rows where their experts are: `quota` places for each source in turn."""
    devices, me = plan.sizes.shape[0], plan.device
    first, sent = plan.first(step)[me], plan.moved(step)[me]
    if _padded(rows):
        place = jnp.minimum(first[:, None] + jnp.arange(plan.quota)[None], rows.shape[0] - 1)
        arrived = lax.all_to_all(rows[place], axis, 0, 0)
        return arrived.reshape(devices * plan.quota, *rows.shape[1:])
    buffer = jnp.zeros((devices * plan.quota, *rows.shape[1:]), rows.dtype)
    there = jnp.full(devices, me * plan.quota, jnp.int32)
    received = plan.moved(step)[:, me]
    return lax.ragged_all_to_all(rows, buffer, first, sent, there, received, axis_name=axis)


def _from_experts(
    plan: Exchange,
    buffer: Float[Array, "M *C"],
    out: Float[Array, "R *C"],
    step: Int[Array, ""] | int,
    axis: str,
) -> Float[Array, "R *C"]:
    """`out`, with one round's rows back in their places."""
    devices, me = plan.sizes.shape[0], plan.device
    first, moved = plan.first(step), plan.moved(step)
    if _padded(buffer):
        parts = buffer.reshape(devices, plan.quota, *buffer.shape[1:])
        parts = lax.all_to_all(parts, axis, 0, 0)
        row = jnp.arange(out.shape[0])
        source = (row[:, None] >= jnp.cumsum(plan.counts[me])[None]).sum(axis=1)
        source = jnp.minimum(source, devices - 1)
        place = row - first[me][source]
        back = parts[source, jnp.clip(place, 0, plan.quota - 1)]
        came = (place >= 0) & (place < moved[me][source])
        return jnp.where(came.reshape(-1, *(1,) * (out.ndim - 1)), back, out)
    here = jnp.arange(devices, dtype=jnp.int32) * plan.quota
    return lax.ragged_all_to_all(
        buffer, out, here, moved[:, me], first[:, me], moved[me], axis_name=axis
    )


def _compute(
    plan: Exchange,
    step: Int[Array, ""] | int,
    kernel: Implementation | None,
    rows: Float[Array, "M D"],
    weights: Float[Array, " M"],
    gate_up: Float[Array, "E F2 D"],
    down: Float[Array, "E F W"],
) -> Float[Array, "M W"]:
    """The local experts over one round's buffer; unspecified where nothing arrived."""
    local = gate_up.shape[0]
    experts = plan.experts(step).reshape(-1)
    order = jnp.argsort(experts, stable=True)
    inverse = inverse_of(order)
    sizes = jnp.bincount(experts, length=local + 1)[:local].astype(jnp.int32)
    y = expert_ffn(
        permute(rows, order, inverse),
        gate_up,
        down,
        sizes,
        permute(weights, order, inverse),
        kernel,
    )
    return permute(y, inverse, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def exchanged_ffn(
    rows: Float[Array, "R D"],
    weights: Float[Array, " R"],
    gate_up: Float[Array, "E F2 D"],
    down: Float[Array, "E F W"],
    sizes: Int[Array, " N"],
    axis: str,
    kernel: Implementation | None,
) -> Float[Array, "R W"]:
    """expert_ffn over all N = P * E experts of the mesh axis, of which this device holds E.

    Args:
      rows: this device's routed rows, sorted by expert.
      weights: their routing weights.
      gate_up: of the local experts, as down.
      down: [E, F, W].
      sizes: this device's rows for each of the N experts.
      axis: the mesh axis, manual (inside shard_map).
      kernel: implementation of expert_ffn.
    """
    return _exchanged(rows, weights, gate_up, down, sizes, axis, kernel)[0]


def _plan(rows: Array, sizes: Array, axis: str) -> Exchange:
    every = lax.all_gather(sizes, axis)
    return Exchange(every, lax.axis_index(axis), quota(rows.shape[0], every.shape[0]))


def _exchanged(
    rows: Array, weights: Array, gate_up: Array, down: Array, sizes: Array, axis: str, kernel: Any
) -> tuple[Array, tuple[Array, ...]]:
    plan = _plan(rows, sizes, axis)

    def arrive(step: Array | int) -> tuple[Array, Array]:
        return _to_experts(plan, rows, step, axis), _to_experts(plan, weights, step, axis)

    def round_of(step: Array | int, arrived: tuple[Array, Array], out: Array) -> Array:
        y = _compute(plan, step, kernel, *arrived, gate_up, down)
        return _from_experts(plan, y, out, step, axis)

    arrived = arrive(0)
    out = jnp.zeros((rows.shape[0], down.shape[2]), rows.dtype)
    out = round_of(0, arrived, out)
    out = lax.fori_loop(1, plan.rounds, lambda i, out: round_of(i, arrive(i), out), out)
    return out, (rows, weights, gate_up, down, sizes, *arrived)


def _exchanged_backward(
    axis: str, kernel: Any, saved: tuple[Array, ...], dy: Array
) -> tuple[Array | None, ...]:
    rows, weights, gate_up, down, sizes, *arrived = saved
    plan = _plan(rows, sizes, axis)

    def round_of(step: Array | int, arrived: Any, sums: Any) -> tuple[Array, ...]:
        drows, dweights, dgate_up, ddown = sums
        _, pull = jax.vjp(functools.partial(_compute, plan, step, kernel), *arrived, gate_up, down)
        dx, dw, more_gate_up, more_down = pull(_to_experts(plan, dy, step, axis))
        return (
            _from_experts(plan, dx, drows, step, axis),
            _from_experts(plan, dw, dweights, step, axis),
            dgate_up + more_gate_up,
            ddown + more_down,
        )

    def later(step: Array, sums: Any) -> tuple[Array, ...]:
        again = _to_experts(plan, rows, step, axis), _to_experts(plan, weights, step, axis)
        return round_of(step, again, sums)

    sums = round_of(0, arrived, jax.tree.map(jnp.zeros_like, (rows, weights, gate_up, down)))
    drows, dweights, dgate_up, ddown = lax.fori_loop(1, plan.rounds, later, sums)
    return drows, dweights, dgate_up, ddown, None


exchanged_ffn.defvjp(_exchanged, _exchanged_backward)
