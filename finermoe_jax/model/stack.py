"""The loop over layers, for training, evaluation, prefill and decoding.

Layers that repeat a pattern form a run. Their parameters are stacked over the repeats, so compile
time does not grow with depth (ModelConfig.layer_runs). The MoE layers of a pool are in one
pattern; the first of them has the bank. Axis letters: config/model.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import LayerKind, ModelConfig
from finermoe_jax.config.run import PUBLISHED_BALANCE, BalanceConfig
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.cpu import SeparateLayers
from finermoe_jax.layers.kv_cache import CacheUse, LayerCache
from finermoe_jax.layers.parameters import axes_of, kind_of
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.layers.stored import LayerView
from finermoe_jax.model.block import Block, EarlierInputs
from finermoe_jax.moe.balance import pool_balancing_loss
from finermoe_jax.moe.bank import CarriedBank, HostBank, bank_of_run, check_used
from finermoe_jax.moe.psr import Reuse
from finermoe_jax.moe.routing import Routing

# Values stored for the backward pass, which recomputes the rest of a layer.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Pass(NamedTuple):
    """The inputs of one forward pass that all layers share.

    With a cache, slot is the next free slot and visible marks the slots that a single token sees.
    remat is a key of REMAT_POLICIES or "none"; unroll is the number of repeats per loop iteration.
    frozen_experts get no gradient. balance chooses the MoE layers' losses. psr masks experts of the
    pools. route_ahead is MoEConfig's. tokens_before as in `Decoder.features`.
    """

    angles: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]
    segment_ids: Int[Array, "B T"] | None
    real: Bool[Array, "B T"]
    placement: Placement
    slot: Int[Array, ""]
    visible: Bool[Array, "B S"]
    remat: str = "none"
    unroll: int = 1
    frozen_experts: bool = False
    balance: BalanceConfig = PUBLISHED_BALANCE
    psr: Reuse | None = None
    route_ahead: int = 0
    tokens_before: Float[Array, "L E"] | None = None


class Traces(NamedTuple):
    """Records of a run's MoE layers in order: routing, and the fields of moe.balance.Balance."""

    routing: list[Routing]
    aux_loss: Float[Array, " L"]
    expert_tokens: Float[Array, "L B E"]
    z_loss: Float[Array, " L"] | None


def stacked_blocks(
    config: ModelConfig,
    kind: LayerKind,
    repeats: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    place: int | None = None,
) -> Block:
    """Returns one Block whose parameters have a leading axis "layer" of size repeats."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, kind, dtype, rngs, place)

    return build(rngs)


def run_layers(
    run: nnx.List,
    x: Float[Array, "B T D"],
    caches: tuple[LayerCache, ...] | None,
    shared: Pass,
    first: int = 0,
    earlier: tuple[Float[Array, "B T D"], ...] | None = None,
) -> tuple[
    Float[Array, "B T D"],
    tuple[LayerCache, ...] | None,
    Traces | None,
    tuple[Float[Array, "B T D"], ...],
]:
    """Applies a run of layers to the residual stream.

    Args:
      run: the pattern's blocks, each with parameters stacked over the repeats.
      x: the residual stream.
      caches: keys and values of each position of the pattern, stacked over the repeats, or None.
      shared: all other inputs.
      first: MoE layers before the run.
      earlier: FFN inputs of the layers before the run (`EarlierInputs`); None: it is the first.

    Returns:
      x, the caches with the new keys and values, the MoE layers' records (None without MoE layers),
      and `earlier` for the next run.
    """
    parts = _Parts.of(run, shared, caches is None, first, earlier is None)
    # Layer 0 puts its own input in place of these; x has the same shape and sharding.
    inputs = (x,) * shared.route_ahead if earlier is None else earlier
    banks, repeats = parts.banks, _repeats(parts.stacked)
    carry = x, inputs, caches, tuple(() if bank is None else bank.carried for bank in banks)
    separate = _all_separate(parts.stacked)
    if separate or parts.on_host:
        loop = functools.partial(_unrolled, repeats=repeats, apart=not separate)
    else:
        # Decoding has few rows per weight: slicing a layer would copy it, idle experts included.
        each = jnp.arange(repeats), parts.stacked if caches is None else None
        loop = functools.partial(jax.lax.scan, xs=each, unroll=min(shared.unroll, repeats))
    (x, inputs, caches, gradients), traces = loop(_recomputed(parts.body, repeats, shared), carry)
    for bank, handed_on in zip(banks, gradients, strict=True):
        if bank is not None:
            x = bank.end(x, handed_on)
    return x, caches, _in_order(traces, repeats), inputs


@dataclasses.dataclass
class _Parts:
    """A run taken apart: its blocks' structure, banks, and other parameters.

    `ready` has the blocks of the next repeat while one with experts in host memory is computed.
    """

    graphdef: Any
    of_banks: Any  # read in place
    stacked: Any  # the loop slices a layer out of these
    pools: list[int | None]
    banks: list[CarriedBank | None]
    shared: Pass
    first: int
    begins: bool  # the first layer has no earlier inputs
    ready: dict[int, Any]

    @staticmethod
    def of(run: nnx.List, shared: Pass, trains: bool, first: int, begins: bool) -> "_Parts":
        pools = _pools(run)
        banks = [
            _bank(block, trains, shared) if pool == place else None
            for place, (block, pool) in enumerate(zip(run, pools, strict=True))
        ]
        in_place = [bank is not None for bank in banks]
        graphdef, state = nnx.split(run)
        of_banks, stacked = nnx.split_state(state, functools.partial(_of_bank, in_place), ...)
        begins = begins and shared.route_ahead > 0
        return _Parts(graphdef, of_banks, stacked, pools, banks, shared, first, begins, {})

    @property
    def on_host(self) -> bool:
        """True if experts are in host memory."""
        return any(bank is not None and isinstance(bank.bank, HostBank) for bank in self.banks)

    def blocks(self, layer: Array | int, state: Any, x: Array) -> tuple[Any, Array]:
        """Returns the blocks of one repeat, and x for the caller to go on with.

        `state`: the repeat's parameters, if the loop sliced them.
        """
        shared = self.shared
        if state is None:
            number = layer
            if self.on_host and not _all_separate(self.stacked):
                x, number = cpu.after(x, layer)
            state = _in_place(self.stacked, number, shared.placement)
        with jax.named_scope("weights"):
            state = sharding.gather_dense(state, x.dtype, shared.placement)
        blocks = nnx.merge(self.graphdef, _in_place(self.of_banks, layer, ONE_DEVICE), state)
        layers = [block.moe for block in blocks if hasattr(block, "moe")]
        for place, moe in enumerate(layers):
            index = self.first + layer * len(layers) + place
            if shared.psr is not None:
                moe.allowed = shared.psr.allowed(moe.moe, index, moe.place)
            if shared.tokens_before is not None:
                moe.tokens_before = shared.tokens_before[index]
        return blocks, x

    def body(self, carry: tuple, here: tuple) -> tuple:
        """Applies one repeat: the body of the loop."""
        (x, inputs, caches, gradients), (layer, state) = carry, here
        following = None
        if not self.on_host:
            blocks, x = self.blocks(layer, state, x)
        else:
            blocks = self.ready.pop(layer, None)
            if blocks is None:
                blocks, x = self.blocks(layer, None, x)
            if layer + 1 < _repeats(self.stacked):
                following, x = self.blocks(layer + 1, None, x)
                self.ready[layer + 1] = following
        carry = x, EarlierInputs(inputs, layer == 0 if self.begins else False), caches, gradients
        return _apply(blocks, self.pools, self.banks, carry, layer, self.shared, following)


def _pools(run: Any) -> list[int | None]:
    """Returns, for each block, the position of the block with its experts; dense: None."""
    pools: list[int | None] = []
    for position, block in enumerate(run):
        place = block.moe.place if hasattr(block, "moe") else None
        pools.append(position if place == 0 else None if place is None else _last(pools))
    return pools


def _last(pools: list[int | None]) -> int:
    return next(pool for pool in reversed(pools) if pool is not None)


def _bank(block: Block, differentiated: bool, shared: Pass) -> CarriedBank | None:
    gate_up, down = block.moe.gate_up[...], block.moe.down[...]
    return bank_of_run(gate_up, down, shared.placement, shared.frozen_experts or not differentiated)


def _of_bank(in_place: list[bool], path: tuple, variable: nnx.Variable) -> bool:
    return in_place[path[0]] and kind_of(axes_of(variable, path)).bank


def _apply(
    blocks: Any,
    pools: list[int | None],
    banks: list[CarriedBank | None],
    carry: tuple,
    layer: Array | int,
    shared: Pass,
    following: Any,
) -> tuple[tuple, tuple]:
    """Applies one repeat of the pattern: run_layers' next carry, and each block's trace.

    `following`: the next repeat's blocks, if their experts are in host memory; else None.
    """
    x, earlier, caches, gradients = carry
    gradients = list(gradients)
    x, inputs = _constrained((x, earlier.inputs), shared.placement)
    earlier = earlier._replace(inputs=inputs)
    written, traces = [], []
    for place, (block, pool) in enumerate(zip(blocks, pools, strict=True)):
        use = None
        if caches is not None:
            use = CacheUse(caches[place], jnp.int32(layer), shared.slot, shared.visible)
        carried = None if pool is None else banks[pool]
        if pool is not None and carried is not None:
            # The last use is the first on the way back: it writes the gradients, the others add.
            adds = pool in pools[place + 1 :]
            block.moe.bank = carried.bank.at(layer, gradients[pool], adds)
        elif pool is not None and pool != place:
            block.moe.bank = blocks[pool].moe.experts(shared.placement)
        if shared.route_ahead and x.shape[1] == 1:
            after = [(layer, *each) for each in enumerate(blocks)][place + 1 :]
            after += [(layer + 1, *each) for each in enumerate(following or ())]
            if after:
                earlier = earlier._replace(choose=_choice(*after[0], pools, banks, shared))
        x, cache, trace, inputs = block(
            x, shared.angles, shared.segment_ids, shared.real, use, shared.placement,
            shared.balance, earlier,
        )  # fmt: skip
        earlier = EarlierInputs(inputs)
        if pool is not None and carried is not None:
            check_used(gradients[pool], block.moe.bank)
            gradients[pool] = block.moe.bank.gradients
        written.append(cache)
        traces.append(trace)
    if shared.balance.over == "pool":
        traces = _balanced_over_pools(blocks, pools, traces, shared)
    caches = None if caches is None else tuple(written)
    return (x, earlier.inputs, caches, tuple(gradients)), tuple(traces)


def _choice(
    layer: Array | int,
    place: int,
    block: Block,
    pools: list[int | None],
    banks: list[CarriedBank | None],
    shared: Pass,
) -> Callable[[Array, Array], Array] | None:
    """Returns EarlierInputs.choose for the next block, if its experts are in host memory."""
    pool = pools[place]
    carried = None if pool is None else banks[pool]
    if carried is None or not isinstance(carried.bank, HostBank):
        return None
    bank = carried.bank.at(layer, ())

    def choose(x: Array, router_input: Array) -> Array:
        block.moe.bank = bank
        with jax.named_scope("router"):
            block.moe.chosen, x = block.moe.choose(router_input, x, shared.placement)
        return x

    return choose


def _constrained(streams: Any, placement: Placement) -> Any:
    axes, name = ("batch", "sequence", "width"), "residual stream"
    return jax.tree.map(lambda x: sharding.constrain(x, axes, placement, name), streams)


def _balanced_over_pools(blocks: Any, pools: list[int | None], traces: list, shared: Pass) -> list:
    """Replaces each MoE layer's balancing loss by that of its pool."""
    losses = {}
    for pool in {*pools} - {None}:
        members = [place for place, of in enumerate(pools) if of == pool]
        layers = [
            (traces[place][0], blocks[place].moe.allowed, blocks[place].moe.tokens_before)
            for place in members
        ]
        losses[pool] = pool_balancing_loss(layers, shared.real, shared.balance.kind)
    return [
        trace if pool is None else (trace[0], trace[1]._replace(aux_loss=losses[pool]))
        for pool, trace in zip(pools, traces, strict=True)
    ]


def _recomputed(body: Callable[..., tuple], repeats: int, shared: Pass) -> Callable[..., tuple]:
    """Wraps the loop's body so that the backward pass recomputes what shared.remat says."""
    if shared.remat == "none":
        return body
    # A loop cannot share results between the two passes; unrolled code would.
    unrolled = shared.unroll >= repeats
    return jax.checkpoint(body, policy=REMAT_POLICIES[shared.remat], prevent_cse=unrolled)


def _unrolled(body: Callable[..., tuple], carry: tuple, repeats: int, apart: bool) -> tuple:
    """`lax.scan` without a loop, for layers that are separate arrays.

    `apart`: a CPU fuses nothing across layers, so that results equal a scan's bit by bit.
    """
    each = []
    for layer in range(repeats):
        carry = cpu.materialized(carry) if apart else carry
        carry, traces = body(carry, (layer, None))
        each.append(traces)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _is_separate(leaf: Any) -> bool:
    return isinstance(leaf, SeparateLayers)


def _all_separate(stacked: Any) -> bool:
    return _is_separate(jax.tree.leaves(stacked, is_leaf=_is_separate)[0])


def _repeats(stacked: Any) -> int:
    first = jax.tree.leaves(stacked, is_leaf=_is_separate)[0]
    return len(first.layers) if _is_separate(first) else first.shape[0]


def _in_place(stacked: Any, layer: Array | int, placement: Placement) -> Any:
    """Returns one repeat's parameters, read in place on one device, sliced on a mesh."""
    one_device = placement.mesh is None or placement.mesh.size == 1

    def of_layer(leaf: Any) -> Any:
        if _is_separate(leaf):
            return leaf.layers[layer]
        return LayerView(leaf, jnp.asarray(layer)) if one_device else leaf[layer]

    return jax.tree.map(of_layer, stacked, is_leaf=_is_separate)


def _in_order(stacked_traces: tuple, repeats: int) -> Traces | None:
    """Reorders records [repeats, …] by position of the pattern into records by layer."""
    moe = [trace for trace in stacked_traces if trace is not None]
    if not moe:
        return None
    routing = [
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stacked)
        for repeat in range(repeats)
        for stacked, _ in moe
    ]

    def layers(*places: Array) -> Array:
        return jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:])

    return Traces(routing, *jax.tree.map(layers, *(balance for _, balance in moe)))
