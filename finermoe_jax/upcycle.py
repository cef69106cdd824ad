"""Dense FFN to FineRMoE experts (paper Eq. 9-10): array functions, then whole models.

Letters: finermoe_jax/config.py. L is a leading axis of stacked layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from finermoe_jax.config import ModelConfig, MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import normal
from finermoe_jax.model import Decoder

# Standard deviation of the router, of the shared expert's gate and of concat_proj (paper §3.3).
NEW_WEIGHT_STD = 0.02


def split_gate_up(
    gate: Float[Array | np.ndarray, "*L H D"],
    up: Float[Array | np.ndarray, "*L H D"],
    moe: MoEConfig,
) -> Float[Array | np.ndarray, "*L E F2 D"]:
    """Each expert's slice of the intermediate channels, gate rows first (Eq. 9).

    Expert e takes slice e mod G_I: the numbering runs over (slot, candidate, copy, slice).
    Works on NumPy and JAX arrays, bit by bit, in any dtype.
    """
    xp = np if isinstance(gate, np.ndarray) else jnp
    *layers, wide, width = gate.shape
    slices = moe.intermediate_granularity
    shape = (*layers, slices, wide // slices, width)
    fused = xp.concatenate([gate.reshape(shape), up.reshape(shape)], axis=-2)
    copies = (*layers, moe.num_groups * moe.intermediate_expansion, *fused.shape[-3:])
    repeated = xp.broadcast_to(fused[..., None, :, :, :], copies)
    return repeated.reshape(*layers, moe.num_experts, *fused.shape[-2:])


def split_down(
    down: Float[Array | np.ndarray, "*L D H"], moe: MoEConfig, shared_expert: bool
) -> Float[Array | np.ndarray, "*L E F W"]:
    """Each expert's slice of the intermediate channels and of its slot's outputs (Eq. 10).

    Stored [F, W], transposed from HF's. Without a shared expert the slices are multiplied by G_I,
    since only one of the G_I slices that the dense FFN sums fires.
    """
    xp = np if isinstance(down, np.ndarray) else jnp
    *layers, width, wide = down.shape
    slices, slots = moe.intermediate_granularity, moe.output_granularity
    parts = down.reshape(*layers, slots, width // slots, slices, wide // slices)
    parts = xp.moveaxis(parts, (-2, -1, -3), (-3, -2, -1))  # [*L, O, slice, F, W]
    copies = moe.output_expansion * moe.intermediate_expansion
    shape = (*layers, slots, copies, *parts.shape[-3:])
    repeated = xp.broadcast_to(parts[..., None, :, :, :], shape)
    experts = repeated.reshape(*layers, moe.num_experts, *parts.shape[-2:])
    return experts if shared_expert else experts * np.asarray(slices, down.dtype)


def upcycled_config(dense: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """The target's architecture: the dense one with `moe`, embeddings untied.

    Raises InputError where sizes do not divide or the shared expert is not the dense FFN's width.
    """
    config = dataclasses.replace(dense, moe=moe, tie_word_embeddings=False)
    if config.shared_expert_size not in (0, dense.intermediate_size):
        raise InputError(
            f"moe.shared_expert_intermediate_size={config.shared_expert_size}, but the shared "
            f"expert is the dense FFN of width {dense.intermediate_size}: give that, 0 or None"
        )
    return config


def upcycle_model(dense: Decoder, moe: MoEConfig, key: Array) -> Decoder:
    """A FineRMoE decoder from a dense one (paper §3.3), in the dense weights' dtype.

    Attention, norms and embedding are copied; lm_head is the dense one or, where tied, the
    embedding; the shared expert is the whole dense FFN. Router, shared gate and concat_proj are
    drawn from normal(0, 0.02); nothing else is random. Not function-preserving: with the
    published settings the shared gate starts near 1/2.

    Raises InputError: the source has experts already, or sizes that do not divide.
    """
    if dense.config.moe is not None:
        raise InputError("the source is a mixture of experts already; upcycling needs a dense one")
    config = upcycled_config(dense.config, moe)
    param_dtype = dense.embed.weight.dtype
    source = nnx.to_pure_dict(nnx.state(dense))
    blocks = _layers(source["runs"], dense.config)
    draw = normal(NEW_WEIGHT_STD)
    keys = iter(jax.random.split(key, 4 * config.num_hidden_layers))

    def ffn(layer: int) -> dict[str, Any]:
        block = blocks(layer)
        mlp = block.pop("mlp")
        if config.layer_kinds[layer] == "dense":
            return block | {"mlp": mlp}
        d = config.hidden_size
        shared = config.shared_expert_size > 0
        new: dict[str, Any] = {
            "router": draw(next(keys), (moe.num_experts, d), param_dtype),
            "gate_up": split_gate_up(mlp["gate"], mlp["up"], moe),
            "down": split_down(mlp["down"], moe, shared),
        }
        if moe.separate_routers:
            new["group_router"] = draw(next(keys), (moe.num_groups, d), param_dtype)
        if shared:
            new["shared"] = mlp
            new["shared_gate"] = draw(next(keys), (d,), param_dtype)
        if moe.concat_proj != "none":
            new["concat_proj"] = draw(next(keys), (d, d), param_dtype)
        return block | {"moe": new}

    target = dict(source)
    target["runs"], start = {}, 0
    for r, (pattern, repeats) in enumerate(config.layer_runs):
        target["runs"][r] = {}
        for place in range(len(pattern)):
            layers = [ffn(start + place + i * len(pattern)) for i in range(repeats)]
            target["runs"][r][place] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        start += len(pattern) * repeats
    if dense.config.tie_word_embeddings:
        # A copy: an optimizer step that donates its input must not see one buffer twice.
        target["lm_head"] = {"weight": jnp.array(source["embed"]["weight"], copy=True)}
    return with_params(config, target, dtype=dense.dtype)


def _layers(runs: dict, config: ModelConfig) -> Any:
    """A function from the layer's index to its unstacked parameters."""
    places = []
    for r, (pattern, repeats) in enumerate(config.layer_runs):
        places += [(r, p, i) for i in range(repeats) for p in range(len(pattern))]

    def layer(index: int) -> dict[str, Any]:
        r, p, i = places[index]
        return jax.tree.map(lambda leaf: leaf[i], runs[r][p])

    return layer


def with_params(config: ModelConfig, params: dict, *, dtype: Any) -> Decoder:
    """The decoder of `config` around existing arrays (or their shapes), which are not copied."""
    abstract = nnx.eval_shape(
        lambda: Decoder(config, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def cast(model: Decoder, param_dtype: Any, dtype: Any = None) -> Decoder:
    """The same model with weights of another dtype; dtype is the activations', None keeps it."""
    params = jax.tree.map(lambda p: p.astype(param_dtype), nnx.to_pure_dict(nnx.state(model)))
    return with_params(model.config, params, dtype=dtype or model.dtype)


def upcycle(
    dense_model: Decoder,
    *,
    intermediate_granularity: int,
    output_granularity: int,
    intermediate_expansion: int,
    output_expansion: int,
    active_per_group: int,
    shared_expert: bool = True,
    key: Array | None = None,
) -> Decoder:
    """`upcycle_model` with the paper's five numbers spelled out; key defaults to seed 0."""
    moe = MoEConfig(
        intermediate_granularity=intermediate_granularity,
        output_granularity=output_granularity,
        intermediate_expansion=intermediate_expansion,
        output_expansion=output_expansion,
        active_per_group=active_per_group,
        shared_expert_intermediate_size=None if shared_expert else 0,
    )
    return upcycle_model(dense_model, moe, jax.random.key(0) if key is None else key)
