"""The loop over layers: one for training, evaluation, prefill and decoding.

Layers that repeat a pattern are one run, their parameters stacked over the repeats, so that compile
time does not grow with depth (ModelConfig.layer_runs). Axis letters: config/model.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.model import LayerKind, ModelConfig
from finermoe_jax.layers import sharding
from finermoe_jax.layers.cpu import Apart
from finermoe_jax.layers.kv_cache import CacheUse, LayerCache
from finermoe_jax.layers.parameters import axes_of, kind_of
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.layers.stored import OfLayer
from finermoe_jax.model.block import Block
from finermoe_jax.moe.bank import CarriedBank, bank_of_run, check_used
from finermoe_jax.moe.routing import Routing

# What the backward pass finds stored; the rest of a layer it computes again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Pass(NamedTuple):
    """Everything of one pass through the decoder that is the same in all layers.

    With a cache, slot is its next free one and visible marks those that a single token sees. remat
    is a key of REMAT_POLICIES or "none"; unroll is the number of repeats written out in each turn
    of the loop. frozen_experts get no gradient.
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


class Traces(NamedTuple):
    """Records of a run's MoE layers, in order: routing, Eq. 11's losses, tokens of each expert."""

    routing: list[Routing]
    aux_loss: Float[Array, " L"]
    expert_tokens: Int[Array, "L B E"]


def stacked_blocks(
    config: ModelConfig, kind: LayerKind, repeats: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Block:
    """One Block whose parameters carry a leading axis "layer" of size repeats."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, kind, dtype, rngs)

    return build(rngs)


def run_layers(
    run: nnx.List,
    x: Float[Array, "B T D"],
    caches: tuple[LayerCache, ...] | None,
    shared: Pass,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...] | None, Traces | None]:
    """Applies a run of layers to the residual stream.

    Args:
      run: the pattern's blocks, each with parameters stacked over the repeats.
      x: the residual stream.
      caches: keys and values of each place of the pattern, stacked over the repeats, or None.
      shared: everything else.

    Returns:
      x, the caches with the new keys and values, and the MoE layers' records (None: there are no
      MoE layers).
    """
    banks = [_bank(block, caches is None, shared) for block in run]
    # A bank is read in place; the loop hands out a layer's other parameters.
    in_place = [bank is not None for bank in banks]
    graphdef, state = nnx.split(run)
    of_banks, stacked = nnx.split_state(state, functools.partial(_of_bank, in_place), ...)
    repeats = _repeats(stacked)

    def body(carry: tuple, here: tuple) -> tuple:
        (x, caches, gradients), (layer, state) = carry, here
        if state is None:
            state = _in_place(stacked, layer, shared.placement)
        state = sharding.gather_dense(state, x.dtype, shared.placement)
        blocks = nnx.merge(graphdef, _in_place(of_banks, layer, ONE_DEVICE), state)
        for block, carried, handed_on in zip(blocks, banks, gradients, strict=True):
            if carried is not None:
                block.moe.bank = carried.bank.at(layer, handed_on)
        (x, caches), traces = _apply(blocks, x, caches, layer, shared)
        return (x, caches, _handed_on(blocks, gradients)), traces

    if shared.remat != "none":
        # In a loop nothing can be shared between the two passes; written out it would be.
        written_out = shared.unroll >= repeats
        policy = REMAT_POLICIES[shared.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=written_out)
    carry = x, caches, tuple(() if bank is None else bank.carried for bank in banks)
    if _held_apart(stacked):
        (x, caches, gradients), traces = _written_out(body, carry, repeats)
    else:
        # With a cache few rows meet each weight. Handed out by the scan a layer would be a copy,
        # of the idle experts too.
        sliced = stacked if caches is None else None
        (x, caches, gradients), traces = jax.lax.scan(
            body, carry, (jnp.arange(repeats), sliced), unroll=min(shared.unroll, repeats)
        )
    for bank, handed_on in zip(banks, gradients, strict=True):
        if bank is not None:
            x = bank.end(x, handed_on)
    return x, caches, _in_order(traces, repeats)


def _bank(block: Block, differentiated: bool, shared: Pass) -> CarriedBank | None:
    """The bank of a place's MoE layers, if they have one that is read in place."""
    if not hasattr(block, "moe"):
        return None
    gate_up, down = block.moe.gate_up[...], block.moe.down[...]
    return bank_of_run(gate_up, down, shared.placement, shared.frozen_experts or not differentiated)


def _of_bank(in_place: list[bool], path: tuple, variable: nnx.Variable) -> bool:
    return in_place[path[0]] and kind_of(axes_of(variable, path)).bank


def _handed_on(blocks: Any, before: tuple) -> tuple:
    """The gradients that the blocks' banks hand on, of which they were given `before`."""
    after = []
    for block, given in zip(blocks, before, strict=True):
        if given:
            check_used(given, block.moe.bank)
            given = block.moe.bank.gradients
        after.append(given)
    return tuple(after)


def _apply(
    blocks: Any, x: Array, caches: tuple[LayerCache, ...] | None, layer: Array | int, shared: Pass
) -> tuple:
    """One repeat of the pattern: ((x, caches), the trace of each block)."""
    x = sharding.constrain(x, ("batch", "sequence", "width"), shared.placement, "residual stream")
    written, traces = [], []
    for place, block in enumerate(blocks):
        use = None
        if caches is not None:
            use = CacheUse(caches[place], jnp.int32(layer), shared.slot, shared.visible)
        x, cache, trace = block(
            x, shared.angles, shared.segment_ids, shared.real, use, shared.placement
        )
        written.append(cache)
        traces.append(trace)
    return (x, None if caches is None else tuple(written)), tuple(traces)


def _written_out(body: Callable[..., tuple], carry: tuple, repeats: int) -> tuple:
    """`lax.scan` without a loop, for layers that are arrays of their own."""
    each = []
    for layer in range(repeats):
        carry, traces = body(carry, (layer, None))
        each.append(traces)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, Apart)


def _held_apart(stacked: Any) -> bool:
    return _is_apart(jax.tree.leaves(stacked, is_leaf=_is_apart)[0])


def _repeats(stacked: Any) -> int:
    first = jax.tree.leaves(stacked, is_leaf=_is_apart)[0]
    return len(first.layers) if _is_apart(first) else first.shape[0]


def _in_place(stacked: Any, layer: Array | int, placement: Placement) -> Any:
    """One repeat's parameters, read where they are stored; on a mesh they are cut out."""
    one_device = placement.mesh is None or placement.mesh.size == 1

    def of_layer(leaf: Any) -> Any:
        if _is_apart(leaf):
            return leaf.layers[layer]
        return OfLayer(leaf, jnp.asarray(layer)) if one_device else leaf[layer]

    return jax.tree.map(of_layer, stacked, is_leaf=_is_apart)


def _in_order(stacked_traces: tuple, repeats: int) -> Traces | None:
    """Records [repeats, …] of each place of the pattern as records of layers in order."""
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

    aux_loss, expert_tokens = (layers(*each) for each in zip(*(of for _, of in moe), strict=True))
    return Traces(routing, aux_loss, expert_tokens)
