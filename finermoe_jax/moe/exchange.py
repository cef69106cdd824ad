"""Exchange of routed rows between tokens and experts, on one device or over a mesh.

**Sorting.** Each token's row is copied for each of its active experts, the copies are sorted by
expert, and the results return to token order. Both maps are permutations (one after a repeat), so
their transposes are gathers too. JAX's own transposes would be scatter-adds, which are slow
everywhere and were miscompiled inside scans (openxla/xla issue 49143).

**The exchange.** The mesh's expert axis may split the experts. Then everything below
`routed_experts` runs inside shard_map. Each device has R routed rows, sorted by expert, and E / P
of the experts, P the size of the axis. Devices are numbered along the axis; s is a source, p a
destination.

**Dropless in bounded memory.** A pair (s, p) exchanges at most `quota` rows at once, about twice
the balanced share, so a device never buffers more than twice its own rows. The rest goes through
the same buffer in further rounds. The fullest pair determines the number of rounds, 1 unless a pair
has more than twice its share. It is equal along the expert axis but not across other axes, so a
collective over another axis inside a round would deadlock.

**Bytes.** A row travels as D values and its weight and returns as W = D / G_O values; the backward
pass sends W and returns D and the weight's gradient. The rows received in the first round are
stored for it; later rounds are sent again.

**No deduplication** of a token's copies: the experts of one slot are neighbours, so with two
devices or more a token's slots are on different devices. (Several active experts per slot could
share a device if a group is not split.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import ExchangeKind, Placement
from finermoe_jax.moe.bank import ExpertBank, HostBank, Places
from pallas_kernels.expert_ffn import empty_like, expert_ffn_of_run, unread
from pallas_kernels.platform import Implementation, platform


def routed_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    bank: ExpertBank | HostBank,
    placement: Placement,
) -> Float[Array, "B T A W"]:
    """Applies each token's A active experts, weighted, on one device or over a mesh.

    Tokens are split over every mesh axis, tensor included. If an axis does not divide batch or
    sequence, its devices compute the same tokens. The bank's weights are not cast here, since only
    those of experts with rows are read. Its gradients are replaced.
    """
    bank, experts, x = bank.fetch(experts, x)
    if isinstance(bank, HostBank):
        return bank.on_host(x, experts, weights)
    mesh, kernel, exchange = placement.mesh, placement.kernel, placement.exchange
    if mesh is None or mesh.size == 1:
        y = _routed(x, experts, weights, bank, kernel, None, exchange)
        return bank.ends.end(y, bank.gradients) if bank.ends else y
    assert bank.scales is None, "int8 experts need one device"
    tokens, _ = sharding.spec(("batch", "routed_sequence", "width"), x.shape, mesh, "tokens")
    places = Places.of(bank.experts, placement)
    axis = "expert" if mesh.shape["expert"] > 1 else None

    def local(
        x: Array, experts: Array, weights: Array, layer: Array, gate_up: Array, down: Array,
        *gradients: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        if places.pieces:
            here = _gathered(gate_up, down, places, x.dtype)
            y = _routed(x, experts, weights, here, kernel, axis, exchange)
            return (unread(empty_like(here.gradients), y, here.gradients),)
        # Each copy of the experts has its own gradients.
        own = tuple(g[0] if places.copies else g for g in gradients)
        here = ExpertBank(gate_up, down, layer, None, own, bank.adds)
        y = _routed(x, experts, weights, here, kernel, axis, exchange)
        return y, *(g[None] if places.copies else g for g in here.gradients)

    handed_on = tuple(places.gradient for _ in bank.gradients)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, P(), places.stack, places.stack, *handed_on),
        out_specs=(P(*tokens, None), *handed_on),
        check_vma=False,
    )
    layer = jnp.asarray(bank.layer, jnp.int32)
    y, *gradients = mapped(x, experts, weights, layer, bank.gate_up, bank.down, *bank.gradients)
    bank.gradients = tuple(gradients)
    return bank.ends.end(y, bank.gradients) if bank.ends else y


def _gathered(gate_up: Array, down: Array, places: Places, dtype: DTypeLike) -> ExpertBank:
    """Gathers one layer's fsdp-sharded experts into a bank [1, E, ...], inside shard_map."""

    def whole(w: Array) -> Array:
        # Cast first: bfloat16 halves the traffic, gradients included.
        return sharding.gather_inside(w.astype(dtype), places.stack, ("expert",))

    gate_up, down = whole(gate_up), whole(down)
    return ExpertBank(
        lax.stop_gradient(gate_up), lax.stop_gradient(down), gradients=(gate_up, down)
    )


def _routed(
    x: Array,
    experts: Array,
    weights: Array,
    bank: ExpertBank,
    kernel: Implementation | None,
    axis: str | None,
    exchange: ExchangeKind,
) -> Array:
    batch, tokens, active = experts.shape
    total = bank.experts * (lax.axis_size(axis) if axis else 1)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = inverse_of(order)
    sizes = jnp.bincount(flat, length=total).astype(jnp.int32)
    x = x.reshape(-1, x.shape[-1])
    row_weights = permute(weights.reshape(-1), order, inverse)
    if axis is None:
        rows = dispatch(x, order, inverse, active)
        y = permute(bank.ffn(rows, sizes, row_weights, kernel), inverse, order)
        return y.reshape(batch, tokens, active, -1)
    # Tokens are packed before their copies are made. In the backward pass, the gradients of the
    # copies are summed before they are unpacked. So fewer rows change their form.
    rows = dispatch(_packed(x, is_padded(exchange)), order, inverse, active)
    y, bank.gradients = exchanged_ffn(
        rows, row_weights, bank.gradients, bank.gate_up, bank.down, bank.layer, sizes,
        axis, kernel, bank.adds, exchange,
    )  # fmt: skip
    y = _unpacked(permute(y, inverse, order), bank.down.shape[3])
    return y.reshape(batch, tokens, active, -1)


def inverse_of(order: Int[Array, " M"]) -> Int[Array, " M"]:
    """Returns the inverse permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


@jax.custom_vjp
def permute(
    x: Float[Array, "M *C"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M *C"]:
    """Returns x[order], given a permutation and its inverse."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(
    x: Float[Array, "T *D"], order: Int[Array, " M"], inverse: Int[Array, " M"], active: int
) -> Float[Array, "M *D"]:
    """Repeats each token's row `active` times, in the given order of the M = T * active copies."""
    return x[order // active]


dispatch.defvjp(
    lambda x, order, inverse, active: (dispatch(x, order, inverse, active), inverse),
    lambda active, inverse, g: (
        g[inverse].reshape(-1, active, *g.shape[1:]).sum(axis=1),
        None,
        None,
    ),
)


class Exchange(NamedTuple):
    """Numbers of rows between all pairs; only `device` differs along the expert axis."""

    sizes: Int[Array, "P N"]  # rows of each source for each expert
    device: Int[Array, ""]
    quota: int
    padded: bool  # rows travel with the empty places of a round

    @property
    def counts(self) -> Int[Array, "P P"]:
        """Rows from s (first axis) to p."""
        devices, experts = self.sizes.shape
        return self.sizes.reshape(devices, devices, experts // devices).sum(axis=2)

    @property
    def rounds(self) -> Int[Array, ""]:
        """Number of rounds that the fullest pair needs."""
        return (self.counts.max() + self.quota - 1) // self.quota

    def moved(self, step: Int[Array, ""] | int) -> Int[Array, "P P E"]:
        """Rows from s to p in one round, for each expert of p."""
        begin, rows = self._in_pairs()
        low = step * self.quota
        end = jnp.minimum(begin + rows, low + self.quota)
        return jnp.maximum(end - jnp.maximum(begin, low), 0)

    def first(self, step: Int[Array, ""] | int) -> Int[Array, "P P E"]:
        """Index of the first of these rows among the rows of s."""
        counts = self.counts
        begin, _ = self._in_pairs()
        of_pair = (jnp.cumsum(counts, axis=1) - counts)[:, :, None]
        index = of_pair + jnp.maximum(begin, step * self.quota)
        return jnp.minimum(index, counts.sum(axis=1)[:, None, None])

    def place(self, step: Int[Array, ""] | int) -> Int[Array, "P P E"]:
        """Place of the first of these rows in the buffer of p, sorted by expert, then by source."""
        by_expert = self.moved(step).transpose(1, 2, 0)
        rows = by_expert.reshape(len(by_expert), -1)
        begin = jnp.cumsum(rows, axis=1) - rows
        return begin.reshape(by_expert.shape).transpose(2, 0, 1)

    def _in_pairs(self) -> tuple[Int[Array, "P P E"], Int[Array, "P P E"]]:
        """First row and number of rows of each expert among the rows from s to p."""
        devices = self.sizes.shape[0]
        rows = self.sizes.reshape(devices, devices, -1)
        return jnp.cumsum(rows, axis=2) - rows, rows

    def experts(self, step: Int[Array, ""] | int) -> Int[Array, "P Q"]:
        """Local expert of each place of a padded buffer on this device; E at empty places."""
        devices, experts = self.sizes.shape
        local = experts // devices
        mine = lax.dynamic_slice_in_dim(self.sizes, self.device * local, local, axis=1)
        place = step * self.quota + jnp.arange(self.quota)
        return (place[None, :, None] >= jnp.cumsum(mine, axis=1)[:, None]).sum(axis=2)


def quota(rows: int, devices: int) -> int:
    """Most rows that a pair of devices exchanges per round: twice the balanced share."""
    return min(rows, -(-2 * rows // devices))


def _packs(dtype: DTypeLike) -> bool:
    """Returns True for the dtypes that `_packed` changes."""
    return jnp.dtype(dtype).itemsize == 2


def _packed(rows: Float[Array, "M C"], padded: bool) -> Float[Array, "M *P"]:
    """Returns rows as they travel: unless the exchange is `padded`, 16-bit ones as [M, 2, P].

    They are padded to a multiple of 256 values. A TPU's ragged exchange moves them in this form.
    XLA would convert 2-D arrays to it, the uninitialised ones of `_room` included.
    """
    if padded or not _packs(rows.dtype):
        return rows
    filled = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 256)))
    return filled.reshape(rows.shape[0], 2, -1)


def _unpacked(packed: Float[Array, "M *P"], width: int) -> Float[Array, "M C"]:
    """Inverse of `_packed`."""
    return packed.reshape(packed.shape[0], -1)[:, :width]


def _room(count: int, like: Any) -> Float[Array, "N *P"]:
    """Returns room for `count` rows like those of `like` to arrive; uninitialised if packed.

    In a buffer, the kernels ignore empty places, NaN included. In a result, every row arrives in
    one of the rounds.
    """
    shape = (count, *like.shape[1:])
    return uninitialised(shape, like.dtype) if like.ndim == 3 else jnp.zeros(shape, like.dtype)


def uninitialised(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns an array of any values."""
    return lax.empty(shape, dtype)


def is_padded(exchange: ExchangeKind) -> bool:
    """True if a round's empty places are sent as well.

    "auto" pads where XLA has no ragged exchange: on a CPU, and on v5e slices of more than 16 chips
    ("limited ICI routing"). It pads on GPUs, too, where XLA's ragged exchange is slow and fails for
    many devices.
    """
    if exchange != "auto":
        return exchange == "padded"
    if platform() != "tpu":
        return True
    mesh = jax.sharding.get_abstract_mesh()
    kind = mesh.abstract_device.device_kind if mesh.abstract_device else ""
    return kind == "TPU v5 lite" and mesh.size > 16


def _to_experts(
    plan: Exchange, rows: Float[Array, "R *P"], step: Int[Array, ""] | int, axis: str
) -> Float[Array, "M *P"]:
    """Sends one round's rows to their experts, sorted by expert unless `_is_padded`.

    A padded buffer has `quota` places for each source in turn.
    """
    devices, me = plan.sizes.shape[0], plan.device
    first, moved = plan.first(step), plan.moved(step)
    if _is_padded(plan, rows):
        begin = first[me, :, :1]  # of a pair's rows
        place = jnp.minimum(begin + jnp.arange(plan.quota)[None], rows.shape[0] - 1)
        arrived = lax.all_to_all(rows[place], axis, 0, 0)
        return arrived.reshape(devices * plan.quota, *rows.shape[1:])
    buffer = _room(devices * plan.quota, rows)
    # One transfer for each expert, so that rows arrive sorted: to sort them here would read and
    # write a buffer of twice the balanced share.
    sent = first[me], moved[me], plan.place(step)[me], moved[:, me]
    return lax.ragged_all_to_all(rows, buffer, *(x.reshape(-1) for x in sent), axis_name=axis)


def _is_padded(plan: Exchange, rows: Any) -> bool:
    """Returns True if empty places of rows [M, C] or numbers [M] travel, too.

    A TPU's ragged exchange would pad one number to 256.
    """
    return plan.padded or rows.ndim == 1


def _from_experts(
    plan: Exchange,
    buffer: Float[Array, "M *P"],
    out: Float[Array, "R *P"],
    step: Int[Array, ""] | int,
    axis: str,
) -> Float[Array, "R *P"]:
    """Returns `out`, a `_room`, with one round's rows back in their places."""
    devices, me = plan.sizes.shape[0], plan.device
    first, moved = plan.first(step), plan.moved(step)
    if _is_padded(plan, buffer):
        parts = buffer.reshape(devices, plan.quota, *buffer.shape[1:])
        parts = lax.all_to_all(parts, axis, 0, 0)
        row = jnp.arange(out.shape[0])
        source = (row[:, None] >= jnp.cumsum(plan.counts[me])[None]).sum(axis=1)
        source = jnp.minimum(source, devices - 1)
        place = row - first[me, :, 0][source]
        back = parts[source, jnp.clip(place, 0, plan.quota - 1)]
        came = (place >= 0) & (place < moved[me].sum(axis=1)[source])
        return jnp.where(came.reshape(-1, *(1,) * (out.ndim - 1)), back, out)
    sent = plan.place(step)[:, me], moved[:, me], first[:, me], moved[me]
    return lax.ragged_all_to_all(buffer, out, *(x.reshape(-1) for x in sent), axis_name=axis)


def _compute(
    plan: Exchange,
    step: Int[Array, ""] | int,
    kernel: Implementation | None,
    adds: bool,
    rows: Float[Array, "M *P"],
    weights: Float[Array, " M"],
    gradients: tuple[Array, ...],
    gate_up: Float[Array, "L E F2 D"],
    down: Float[Array, "L E F W"],
    layer: Int[Array, ""] | int,
) -> tuple[Float[Array, "M *Y"], tuple[Array, ...]]:
    """Applies the local experts to one round's buffer; empty places are unspecified.

    Rows come and go as they travel.
    """
    order = jnp.argsort(plan.experts(step).reshape(-1), stable=True)
    inverse = inverse_of(order)
    sizes = plan.moved(step)[:, plan.device].sum(axis=0)
    padded = _is_padded(plan, rows)
    rows = _unpacked(rows, gate_up.shape[3])
    if padded:
        rows = permute(rows, order, inverse)
    weights = permute(weights, order, inverse)
    with jax.named_scope("routed_experts"):
        y, gradients = expert_ffn_of_run(
            rows, gate_up, down, sizes, weights, layer, gradients, kernel, adds=adds
        )
    return _packed(permute(y, inverse, order) if padded else y, padded), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def exchanged_ffn(
    rows: Float[Array, "R *P"],
    weights: Float[Array, " R"],
    gradients: tuple[Array, ...],
    gate_up: Float[Array, "L E F2 D"],
    down: Float[Array, "L E F W"],
    layer: Int[Array, ""] | int,
    sizes: Int[Array, " N"],
    axis: str,
    kernel: Implementation | None,
    adds: bool,
    exchange: ExchangeKind = "auto",
) -> tuple[Float[Array, "R *Y"], tuple[Array, ...]]:
    """expert_ffn over all N = P * E experts of the mesh axis; this device has E of them.

    Args:
      rows: this device's routed rows, sorted by expert, as they travel (`_packed`).
      weights: their routing weights.
      gradients: of the local experts, as in expert_ffn_of_run, like layer and adds.
      gate_up: of the local experts, like down.
      sizes: this device's rows for each of the N experts.
      axis: the mesh axis, manual (inside shard_map).
      exchange: how rows travel (`is_padded`).

    Returns:
      The experts' outputs in the rows' places, as they travel, and `gradients`.
    """
    return _exchanged(
        rows, weights, gradients, gate_up, down, layer, sizes, axis, kernel, adds, exchange
    )[0]


def _plan(rows: Array, sizes: Array, axis: str, exchange: ExchangeKind) -> Exchange:
    every = lax.all_gather(sizes, axis)
    most = quota(rows.shape[0], every.shape[0])
    return Exchange(every, lax.axis_index(axis), most, is_padded(exchange))


def _exchanged(
    rows: Array,
    weights: Array,
    gradients: tuple[Array, ...],
    gate_up: Array,
    down: Array,
    layer: Array | int,
    sizes: Array,
    axis: str,
    kernel: Any,
    adds: bool,
    exchange: ExchangeKind,
) -> tuple[tuple[Array, tuple[Array, ...]], tuple[Any, ...]]:
    plan = _plan(rows, sizes, axis, exchange)

    def arrive(step: Array | int) -> tuple[Array, Array]:
        return _to_experts(plan, rows, step, axis), _to_experts(plan, weights, step, axis)

    def round_of(step: Array | int, arrived: tuple[Array, Array], out: Array) -> Array:
        y, _ = _compute(plan, step, kernel, False, *arrived, (), gate_up, down, layer)
        return _from_experts(plan, y, out, step, axis)

    arrived = arrive(0)
    one = jax.ShapeDtypeStruct((1, down.shape[3]), rows.dtype)
    out = _room(rows.shape[0], jax.eval_shape(lambda y: _packed(y, plan.padded), one))
    out = round_of(0, arrived, out)
    out = lax.fori_loop(1, plan.rounds, lambda i, out: round_of(i, arrive(i), out), out)
    return (out, gradients), (rows, weights, gate_up, down, layer, sizes, *arrived)


def _exchanged_backward(
    axis: str,
    kernel: Any,
    adds: bool,
    exchange: ExchangeKind,
    saved: tuple[Any, ...],
    cotangents: tuple[Array, tuple[Array, ...]],
) -> tuple[Any, ...]:
    rows, weights, gate_up, down, layer, sizes, *arrived = saved
    dy, into = cotangents
    plan = _plan(rows, sizes, axis, exchange)

    def round_of(step: Array | int, arrived: Any, sums: Any, adds: bool) -> tuple[Any, ...]:
        drows, dweights, into = sums

        def compute(rows: Array, weights: Array, into: tuple[Array, ...]) -> Any:
            return _compute(plan, step, kernel, adds, rows, weights, into, gate_up, down, layer)

        # `into` stands in for the gradients argument, whose values are not read.
        _, pull = jax.vjp(compute, *arrived, into)
        dx, dw, into = pull((_to_experts(plan, dy, step, axis), into))
        return (
            _from_experts(plan, dx, drows, step, axis),
            _from_experts(plan, dw, dweights, step, axis),
            into,
        )

    def later(step: Array, sums: Any) -> tuple[Any, ...]:
        again = _to_experts(plan, rows, step, axis), _to_experts(plan, weights, step, axis)
        return round_of(step, again, sums, adds=True)

    rooms = (_room(x.shape[0], x) for x in (rows, weights))
    # The first round writes all of the layer's gradients, later rounds add.
    sums = round_of(0, arrived, (*rooms, into), adds)
    drows, dweights, into = lax.fori_loop(1, plan.rounds, later, sums)
    return drows, dweights, into, None, None, None, None


exchanged_ffn.defvjp(_exchanged, _exchanged_backward)
