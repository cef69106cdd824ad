"""The decoder: Qwen2, Qwen3 or Llama, with dense or FineRMoE layers.

Axis letters: config/model.py.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from finermoe_jax.config.arguments import check_ids, check_mask, check_type, rectangular
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import PUBLISHED_BALANCE, BalanceConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers.basic import Embedding, RMSNorm, project, rotary_angles
from finermoe_jax.layers.causal import segments
from finermoe_jax.layers.kv_cache import KVCache
from finermoe_jax.layers.parameters import Kind, Path, kinds
from finermoe_jax.layers.sharding import ONE_DEVICE
from finermoe_jax.model.stack import Pass, Traces, run_layers, stacked_blocks
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.moe.psr import Reuse
from finermoe_jax.moe.routing import Routing


class Features(NamedTuple):
    """The decoder's result before lm_head.

    routing, aux_loss, expert_tokens and z_loss have one entry per MoE layer. aux_loss is Eq. 11
    without its weight. expert_tokens counts the real tokens that selected each expert.
    """

    hidden: Float[Array, "B T D"]  # after the final norm
    aux_loss: Float[Array, " L"]  # Eq. 11
    expert_tokens: Int[Array, "L E"]
    routing: tuple[Routing, ...]  # logits, experts and weights of each MoE layer
    cache: KVCache | None  # the cache with these tokens; None without one
    z_loss: Float[Array, " L"] | None  # router z-loss; None unless asked for


class Output(NamedTuple):
    """The result of `model(input_ids)`; see `Features`.

    `aux_loss` has one value per MoE layer, without its weight. In your own training loop, add its
    sum to the cross-entropy, times a weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import finermoe_jax as fm
      >>> model = fm.upcycle(fm.load_hf("demo/model"))
      >>> tokens = jnp.ones((1, 9), jnp.int32)
      >>> out = model(tokens[:, :-1])
      >>> out.logits.shape, out.aux_loss.shape, len(out.routing)
      ((1, 8, 2048), (4,), 4)
      >>> losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:])
      >>> loss = losses.mean() + 0.001 * out.aux_loss.sum()
    """

    # float32.
    logits: Float[Array, "B T V"]
    # Eq. 11 of each MoE layer, 1 if the load is even; padding excluded.
    aux_loss: Float[Array, " L"]
    # Logits, experts and weights of each MoE layer.
    routing: tuple[Routing, ...]


LOAD_A_MODEL = "load_hf(PATH) or load_checkpoint(PATH) returns one"


def _is_concrete(array: Any) -> bool:
    """True for values that this process can read: not traced, nor on other processes."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


# Logits need the vocabulary split, lookups the width (layers/sharding.py).
_HEAD_AXES = ("scored_vocab", "width")


class Decoder(nnx.Module):
    """A Qwen2, Qwen3 or Llama decoder with dense or FineRMoE layers.

    `load_hf`, `load_checkpoint` and `upcycle` return one. Layers are stacked and scanned, so that
    compile time does not grow with depth. A run is a series of layers in which a pattern repeats,
    such as (dense, MoE); `ModelConfig.layer_runs` lists the runs. `runs[r][p]` has the layers at
    position p of run r's pattern, stacked over the repeats. Of the layers of a pool
    (experts_across), the first has the parameters of the experts, [repeats, r * N, ...]. `lm_head`
    is None if it is tied to the embedding.

    Examples:
      >>> import jax.numpy as jnp
      >>> import finermoe_jax as fm
      >>> model = fm.load_hf("finermoe_jax/demo/model")
      >>> out = model(jnp.array([[5, 6, 7, 0]]), attention_mask=jnp.array([[1, 1, 1, 0]]))
      >>> out.logits.shape, out.logits.dtype
      ((1, 4, 2048), dtype('float32'))
    """

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """Draws random weights.

        Args:
          config: the architecture.
          dtype: float dtype of the activations.
          param_dtype: float dtype of the weights.
          rngs: source of the random keys.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.placement = ONE_DEVICE
        std, d = config.initializer_range, config.hidden_size
        self.embed = Embedding(config.vocab_size, d, std, param_dtype, rngs)
        self.runs = nnx.List(
            nnx.List(
                stacked_blocks(config, kind, repeats, param_dtype, rngs, place)
                for kind, place in zip(pattern, config.pool_places(pattern), strict=True)
            )
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
        """Returns logits, load-balancing losses and routing. Compiles once per argument shape.

        Args:
          input_ids: int32 [B, T].
          attention_mask: [B, T], nonzero at real tokens, padded left or right; None: no padding.
          position_ids: int32 [B, T], rotary positions; None: the real tokens of each row count
            from 0.
          segment_ids: int32 [B, T], the documents packed into a row; attention stays inside each.

        Returns:
          An `Output`: logits, float32 [B, T, V]; aux_loss, float32 [number of MoE layers], Eq. 11
          without its weight and without padding; routing, a tuple with one `Routing` per MoE layer
          (logits [B, T, E], experts int32 [B, T, A] and weights [B, T, A], by decreasing logit).

        Raises:
          InputError: ids that are not integers or not in the vocabulary, or shapes that differ.
            Not checked under jit.
        """
        masks = dict(
            attention_mask=attention_mask, position_ids=position_ids, segment_ids=segment_ids
        )
        if _is_concrete(input_ids):
            check_ids(self.config, rectangular("input_ids", input_ids))
        for name, mask in masks.items():
            if mask is not None and _is_concrete(mask):
                check_mask(name, rectangular(name, mask), np.shape(input_ids))
        given = (None if x is None else jnp.asarray(x) for x in masks.values())
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
        frozen_experts: bool = False,
        balance: BalanceConfig = PUBLISHED_BALANCE,
        psr: Reuse | None = None,
        tokens_before: Float[Array, "L E"] | None = None,
    ) -> Features:
        """Returns the final hidden states, [B, T, D] in `dtype`, and the routing of each MoE layer.

        The first four arguments are those of `__call__`.

        Args:
          cache: an empty cache takes whole prompts, a filled one takes one token of every row.
          remat: "none" or a key of REMAT_POLICIES: what the backward pass recomputes.
          unroll: layers (or repeats of their pattern) per iteration of the scan.
          frozen_experts: omits the gradient of the routed experts' weights.
          balance: chooses Eq. 11 per sequence or per batch, and the z-loss. No weight is applied.
          psr: masks experts of the pools, in training only.
          tokens_before: tokens of a step's earlier microbatches that selected each expert, for
            balance.kind="batch" (moe/balance.py).
        """
        batch, tokens = input_ids.shape
        real = jnp.ones((batch, tokens), bool) if attention_mask is None else attention_mask != 0
        if position_ids is None:
            start = jnp.zeros(batch, jnp.int32) if cache is None else cache.positions
            place = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
            position_ids = start[:, None] + jnp.maximum(place, 0)
        segment_ids = segments(attention_mask, segment_ids)
        slot, visible = jnp.int32(0), real
        if cache is not None:
            slot, visible = cache.length, cache.visible(real)
        angles = rotary_angles(position_ids, self.config)

        shared = Pass(
            angles, segment_ids, real, self.placement, slot, visible, remat, unroll,
            frozen_experts, balance, psr, self.config.moe.route_ahead if self.config.moe else 0,
            tokens_before,
        )  # fmt: skip
        with jax.named_scope("embedding"):
            x = self.embed(input_ids, self.dtype, self.placement)
        traces: list[Traces] = []
        caches: list[Any] = []
        earlier = None
        for index, run in enumerate(self.runs):
            of_run = None if cache is None else cache.layers[index]
            before = sum(len(each.routing) for each in traces)
            x, written, of_moe, earlier = run_layers(run, x, of_run, shared, before, earlier)
            caches.append(written)
            traces += [] if of_moe is None else [of_moe]
        new_cache = None if cache is None else cache.advanced(tuple(caches), real)
        with jax.named_scope("norms"):
            normed = self.final_norm(x)
        aux_loss, counts, routing, z_loss = _records(traces)
        return Features(normed, aux_loss, counts, routing, new_cache, z_loss)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns float32 logits over the vocabulary."""
        return project("...D,VD->...V", hidden, self.head[...], jnp.float32)

    @property
    def head(self) -> nnx.Param:
        """The [V, D] weight of the logits."""
        return (self.lm_head or self.embed).weight


def with_shapes(config: ModelConfig, dtype: DTypeLike = "float32") -> Decoder:
    """Returns a decoder with shapes in place of arrays. dtype is that of the activations."""
    graphdef, state = _shapes(config, jnp.dtype(dtype))
    decoder = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # new variables
    decoder.config = config  # the cached one is equal but may have 1.0 for 1
    return decoder


@functools.lru_cache(maxsize=8)  # tracing takes longer than reading a small checkpoint
def _shapes(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(
        nnx.eval_shape(
            lambda: Decoder(config, dtype=dtype, param_dtype="float32", rngs=nnx.Rngs(0))
        )
    )


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Mapping[Path, tuple[int, ...]]:
    """Returns every parameter's path and shape, stacked over its run's layers."""
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(with_shapes(config))))
    return types.MappingProxyType({path: tuple(leaf.shape) for path, leaf in flat.items()})


@functools.lru_cache(maxsize=8)
def parameter_kinds(config: ModelConfig) -> Mapping[Path, Kind]:
    """Returns every parameter's path and kind."""
    return types.MappingProxyType(kinds(with_shapes(config)))


def with_params(config: ModelConfig, params: dict, *, dtype: DTypeLike) -> Decoder:
    """Returns a decoder around existing arrays (or their shapes), which are not copied."""
    graphdef, state = nnx.split(with_shapes(config, dtype))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def with_layer(model: Decoder, layer: type[FineRMoE]) -> Decoder:
    """Returns a model whose MoE layers are of your subclass of FineRMoE; weights are shared.

    Checkpoints hold weights only: call this again after loading one.

    Args:
      model: a decoder with MoE layers.
      layer: a subclass of FineRMoE that overrides methods (`route`, `__call__`) and keeps the
        parameters.

    Returns:
      A new decoder around the same arrays.

    Raises:
      InputError: the model has no MoE layer, or `layer` is not a subclass of FineRMoE.

    Examples:
      >>> import jax
      >>> import finermoe_jax as fm
      >>> class Softer(fm.FineRMoE):
      ...     def route(self, x):
      ...         return super().route(x / 2)  # halves the router's logits
      >>> dense = fm.load_hf("finermoe_jax/demo/model")
      >>> moe = fm.MoEConfig(intermediate_granularity=8)
      >>> model = fm.with_layer(fm.upcycle_model(dense, moe, jax.random.key(0)), Softer)
      >>> type(model.runs[0][0].moe).__name__
      'Softer'
    """
    check_type("model", model, Decoder, LOAD_A_MODEL)
    if not (isinstance(layer, type) and issubclass(layer, FineRMoE)):
        raise InputError(f"layer={layer!r} must be a subclass of FineRMoE: class Mine(FineRMoE)")
    changed = nnx.merge(*nnx.split(model))
    layers = [block.moe for run in changed.runs for block in run if hasattr(block, "moe")]
    if not layers:
        raise InputError(
            f"the model has no MoE layer to replace by {layer.__name__}: upcycle it first"
        )
    for moe in layers:
        moe.__class__ = layer
    return changed


@functools.partial(jax.jit, static_argnames="graphdef")
def _output(graphdef: Any, state: Any, *arguments: Array | None) -> Output:
    model = nnx.merge(graphdef, state)
    features = model.features(*arguments)
    return Output(model.logits(features.hidden), features.aux_loss, features.routing)


def _records(traces: list[Traces]) -> tuple[Array, Array, tuple[Routing, ...], Array | None]:
    """Concatenates all runs' Eq. 11 [L], tokens per expert [L, E], routing and z-losses [L]."""
    if not traces:
        return jnp.zeros(0), jnp.zeros((0, 0), jnp.int32), (), None
    aux_loss = jnp.concatenate([each.aux_loss for each in traces])
    of_rows = jnp.concatenate([each.expert_tokens for each in traces])
    routing = tuple(layer for each in traces for layer in each.routing)
    z_losses = [each.z_loss for each in traces if each.z_loss is not None]
    z_loss = jnp.concatenate(z_losses) if z_losses else None
    return aux_loss, of_rows.astype(jnp.int32).sum(axis=1), routing, z_loss
