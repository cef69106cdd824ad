"""The decoder: Qwen2, Llama or Qwen3, with dense or FineRMoE layers.

Axis letters: finermoe_jax/config.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax import sharding
from finermoe_jax.attention import Attention, CacheUse, KVCache, LayerCache
from finermoe_jax.config import LayerKind, ModelConfig
from finermoe_jax.flash import segments
from finermoe_jax.layers import MLP, Embedding, RMSNorm, project, rotary_angles
from finermoe_jax.moe import FineRMoE
from finermoe_jax.routing import Routing, expert_tokens
from finermoe_jax.sharding import ONE_DEVICE, Placement
from finermoe_jax.weights import Apart, OfLayer


class Features(NamedTuple):
    """The decoder's result before the vocabulary.

    routing, aux_loss and expert_tokens have one entry per MoE layer. aux_loss is Eq. 11, weight not
    applied; expert_tokens are how many real tokens selected each expert.
    """

    hidden: Float[Array, "B T D"]
    aux_loss: Float[Array, " L"]
    expert_tokens: Int[Array, "L E"]
    routing: tuple[Routing, ...]
    cache: KVCache | None


class Output(NamedTuple):
    """What `model(input_ids)` returns; see `Features`."""

    logits: Float[Array, "B T V"]
    aux_loss: Float[Array, " L"]
    routing: tuple[Routing, ...]


class Block(nnx.Module):
    """Pre-norm attention and FFN, each added to the residual stream."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: DTypeLike, rngs: nnx.Rngs):
        d, eps, std = config.hidden_size, config.rms_norm_eps, config.initializer_range
        self.input_norm = RMSNorm(d, eps, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.post_norm = RMSNorm(d, eps, dtype, rngs)
        if kind == "moe":
            self.moe = FineRMoE(config, dtype, rngs)
        else:
            self.mlp = MLP(d, config.intermediate_size, std, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        segment_ids: Array | None,
        real: Array,
        cache: CacheUse | None,
        placement: Placement,
    ) -> tuple[Array, LayerCache | None, tuple[Routing, tuple[Array, Array]] | None]:
        """Returns x, the written cache, and a MoE layer's routing with Eq. 11's loss and the tokens
        [B, E] of each expert."""
        attended, written = self.attention(
            self.input_norm(x), angles, segment_ids, placement, cache
        )
        x = x + attended
        normed = self.post_norm(x)
        if not hasattr(self, "moe"):
            return x + self.mlp(normed, placement), written, None
        y, routing, aux_loss = self.moe(normed, real, placement)
        # The loss counts the same: the compiler does it once.
        tokens = expert_tokens(routing.experts, real, routing.logits.shape[-1])
        return x + y, written, (routing, (aux_loss, tokens))


# What the backward pass finds stored; the rest of a layer it computes again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# Scores want the vocabulary split, lookups the width (finermoe_jax/sharding.py).
_HEAD_AXES = ("scored_vocab", "width")


class Decoder(nnx.Module):
    """Embedding, layers, final norm, lm_head (None where tied to the embedding).

    `runs[r][p]` holds the blocks at place p of run r's repeating pattern, stacked over the
    repeats and scanned, so that compile time does not grow with depth (ModelConfig.layer_runs).
    """

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """dtype is the activations', param_dtype the weights' own."""
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.placement = ONE_DEVICE
        std, d = config.initializer_range, config.hidden_size
        self.embed = Embedding(config.vocab_size, d, std, param_dtype, rngs)
        self.runs = nnx.List(
            nnx.List(_stacked_blocks(config, kind, repeats, param_dtype, rngs) for kind in pattern)
            for pattern, repeats in config.layer_runs
        )
        self.final_norm = RMSNorm(d, config.rms_norm_eps, param_dtype, rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, d, std, param_dtype, rngs, _HEAD_AXES)
        )

    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "B T"],
        attention_mask: Int[Array | np.ndarray, "B T"] | None = None,
        position_ids: Int[Array | np.ndarray, "B T"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> Output:
        """Float32 logits of every position, and what the routers did. See `features`.

        Compiled once per shape of its arguments.
        """
        masks = (attention_mask, position_ids, segment_ids)
        given = (None if x is None else jnp.asarray(x) for x in masks)
        return _output(*nnx.split(self), jnp.asarray(input_ids), *given)

    def features(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        remat: str = "none",
        unroll: int = 1,
    ) -> Features:
        """Final hidden states [B, T, D] in `dtype`.

        Args:
          input_ids: tokens.
          attention_mask: nonzero at real tokens, left- or right-padded; None: all are real.
          position_ids: rotary positions; None: the real tokens of a row count from 0.
          segment_ids: documents packed into a row; attention stays inside each. Positions run on
            unless position_ids restart them.
          cache: an empty one takes prompts, one that is filled a single token of every row.
          remat: a key of REMAT_POLICIES, or "none": what the backward pass recomputes.
          unroll: layers (or repeats of their pattern) written out per turn of the scan.
        """
        batch, tokens = input_ids.shape
        real = jnp.ones((batch, tokens), bool) if attention_mask is None else attention_mask != 0
        first = jnp.zeros(batch, jnp.int32) if cache is None else cache.positions
        if position_ids is None:
            counted = jnp.cumsum(real.astype(jnp.int32), axis=1) - 1
            position_ids = first[:, None] + jnp.maximum(counted, 0)
        segment_ids = segments(attention_mask, segment_ids)
        visible = real
        if cache is not None:
            visible = jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.length))
        config = self.config
        angles = rotary_angles(
            position_ids, config.attention_head_dim, config.rope_theta, config.rope_scaling
        )

        x = self.embed(input_ids, self.dtype, self.placement)
        routing: list[Routing] = []
        balance: list[tuple[Array, Array]] = []
        caches: list[Any] = []
        for index, run in enumerate(self.runs):
            run_cache = None
            if cache is not None:
                run_cache = _RunCache(cache.layers[index], cache.length, visible)
            x, written, run_routing, run_balance = _scan_run(
                run, x, angles, segment_ids, real, run_cache, remat, unroll, self.placement
            )
            caches.append(written)
            routing += run_routing
            balance += run_balance
        new_cache = None
        if cache is not None:
            advanced = first + real.sum(axis=1, dtype=jnp.int32)
            new_cache = KVCache(tuple(caches), visible, cache.length + tokens, advanced)
        aux_loss, per_expert = jnp.zeros(0), jnp.zeros((0, 0), jnp.int32)
        if balance:
            aux_loss = jnp.concatenate([losses for losses, _ in balance])
            of_rows = jnp.concatenate([counts for _, counts in balance])
            per_expert = of_rows.astype(jnp.int32).sum(axis=1)
        return Features(self.final_norm(x), aux_loss, per_expert, tuple(routing), new_cache)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the vocabulary, as float32."""
        return project("...D,VD->...V", hidden, self.head[...], jnp.float32)

    @property
    def head(self) -> nnx.Param:
        """The [V, D] weight that scores the vocabulary."""
        return (self.lm_head or self.embed).weight


def with_shapes(config: ModelConfig, dtype: DTypeLike = "float32") -> Decoder:
    """The decoder with shapes in place of arrays; nothing is allocated. dtype: activations'."""
    graphdef, state = _shapes(config, jnp.dtype(dtype))
    decoder = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # variables of its own
    decoder.config = config  # equal to the one it was traced with, but perhaps 1.0 where that had 1
    return decoder


@functools.lru_cache(maxsize=8)  # tracing takes longer than reading a small checkpoint
def _shapes(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(
        nnx.eval_shape(
            lambda: Decoder(config, dtype=dtype, param_dtype="float32", rngs=nnx.Rngs(0))
        )
    )


def parameter_shapes(config: ModelConfig) -> dict[tuple, tuple[int, ...]]:
    """Every parameter's path and shape, stacked over its run's layers."""
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=8)  # a conversion asks several times
def _parameter_shapes(config: ModelConfig) -> dict[tuple, tuple[int, ...]]:
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(with_shapes(config))))
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def with_params(config: ModelConfig, params: dict, *, dtype: DTypeLike) -> Decoder:
    """The decoder of `config` around existing arrays (or their shapes), which are not copied."""
    graphdef, state = nnx.split(with_shapes(config, dtype))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def with_layer(model: Decoder, layer: type[FineRMoE]) -> Decoder:
    """The same weights, not copied, their MoE layers computed by a subclass of FineRMoE.

    The subclass changes methods (`route`, `__call__`), not parameters. Checkpoints hold weights
    alone: give the layer again after loading.
    """
    changed = nnx.merge(*nnx.split(model))
    for run in changed.runs:
        for block in run:
            if hasattr(block, "moe"):
                block.moe.__class__ = layer
    return changed


@functools.partial(jax.jit, static_argnames="graphdef")
def _output(graphdef: Any, state: Any, *arguments: Array | None) -> Output:
    model = nnx.merge(graphdef, state)
    features = model.features(*arguments)
    return Output(model.logits(features.hidden), features.aux_loss, features.routing)


def _stacked_blocks(
    config: ModelConfig, kind: LayerKind, repeats: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Block:
    """One Block whose parameters carry a leading axis "layer" of size repeats."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, kind, dtype, rngs)

    return build(rngs)


class _RunCache(NamedTuple):
    places: tuple[LayerCache, ...]  # of the pattern, each a stack of the repeats
    slot: Array
    visible: Array


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, Apart)


def _scan_run(
    run: nnx.List,
    x: Array,
    angles: tuple[Array, Array],
    segment_ids: Array | None,
    real: Array,
    cache: _RunCache | None,
    remat: str,
    unroll: int,
    placement: Placement,
) -> tuple[Array, tuple[LayerCache, ...] | None, list[Routing], list[tuple[Array, Array]]]:
    """Scans the repeats. Returns x, the written caches, and of the MoE layers, in order, the
    routing and, stacked, Eq. 11's losses [L] and the experts' tokens [L, B, E] (one pair or none).
    """
    graphdef: Any
    graphdef, stacked = nnx.split(run)
    first = jax.tree.leaves(stacked, is_leaf=_is_apart)[0]
    repeats = len(first.layers) if _is_apart(first) else first.shape[0]

    def layers(x: Array, state: Any, caches: Sequence[CacheUse | None]) -> tuple:
        written: list[Any] = []
        traces: list[Any] = []
        x = sharding.constrain(x, ("batch", "sequence", "width"), placement, "residual stream")
        state = sharding.gather_dense(state, x.dtype, placement)
        for block, use in zip(nnx.merge(graphdef, state), caches, strict=True):
            x, cache, trace = block(x, angles, segment_ids, real, use, placement)
            written.append(cache)
            traces.append(trace)
        return x, tuple(written), tuple(traces)

    def body(x: Array, state: Any) -> tuple:
        x, _, traces = layers(x, state, (None,) * len(run))
        return x, traces

    def cached_body(carry: tuple, layer: Array | int) -> tuple:
        x, places = carry
        assert cache is not None
        alone = placement.mesh is None or placement.mesh.size == 1

        def of_layer(leaf: Any) -> Any:
            if _is_apart(leaf):
                return leaf.layers[layer]
            # Handed out by the scan it would be a copy, of the idle experts too.
            return OfLayer(leaf, jnp.asarray(layer)) if alone else leaf[layer]

        state = jax.tree.map(of_layer, stacked, is_leaf=_is_apart)
        uses = [CacheUse(place, jnp.int32(layer), cache.slot, cache.visible) for place in places]
        x, places, traces = layers(x, state, uses)
        return (x, places), traces

    if remat != "none":
        # In a loop nothing can be shared between the two passes; written out it would be.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=unroll >= repeats)
    places: Any = None
    stacked_traces: Any
    if cache is None:
        x, stacked_traces = jax.lax.scan(body, x, stacked, unroll=min(unroll, repeats))
    elif _is_apart(first):
        places, each = cache.places, []
        for layer in range(repeats):
            (x, places), traces = cached_body((x, places), layer)
            each.append(traces)
        stacked_traces = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    else:
        (x, places), stacked_traces = jax.lax.scan(
            cached_body, (x, cache.places), jnp.arange(repeats)
        )
    traces = [trace for trace in stacked_traces if trace is not None]
    routing = [
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stacked_routing)
        for repeat in range(repeats)
        for stacked_routing, _ in traces
    ]

    def in_order(*places: Array) -> Array:
        """[repeats, …] of each place of the pattern as [L, …]."""
        return jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:])

    balance = [jax.tree.map(in_order, *(pair for _, pair in traces))] if traces else []
    return x, places, routing, balance
