"""Upcycling: dense FFNs to FineRMoE experts (paper Eq. 9-10), lazily, block by block.

Letters: config/model.py.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from finermoe_jax.config.arguments import check_key, check_type
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError, refuse_differences
from finermoe_jax.layers.basic import normal
from finermoe_jax.model.decoder import (
    LOAD_A_MODEL,
    Decoder,
    parameter_kinds,
    parameter_shapes,
    with_params,
)
from finermoe_jax.weights import lazy, upcycle_variants
from finermoe_jax.weights.hf_names import bank_layers, run_layers
from finermoe_jax.weights.lazy import Index, LazyArray, ParamPath, Weights

# Standard deviation of router, shared-expert gate and concat_proj (paper §3.3).
NEW_WEIGHT_STD = 0.02
# Makes the keys of router rows for other layers' experts differ from all others.
FOREIGN_KEY = 2**30


def slice_and_slot(moe: MoEConfig, expert: int) -> tuple[int, int]:
    """Returns an expert's slice of the intermediate width and its slot of the output, from 0.

    Expert numbers run over (slot, candidate, copy, slice), the slice fastest (Eq. 9-10).
    """
    return expert % moe.intermediate_granularity, expert // (moe.output_expansion * moe.group_size)


def expert_gate_up(
    gate: Float[np.ndarray, "H D"] | LazyArray,
    up: Float[np.ndarray, "H D"] | LazyArray,
    moe: MoEConfig,
    expert: int,
) -> Float[np.ndarray, "F2 D"]:
    """Returns one expert's rows of the dense gate, then of the dense up (Eq. 9), unchanged."""
    width = gate.shape[0] // moe.intermediate_granularity
    start = slice_and_slot(moe, expert)[0] * width
    return np.concatenate([gate[start : start + width], up[start : start + width]])


def expert_down(
    down: Float[np.ndarray, "D H"] | LazyArray, moe: MoEConfig, expert: int, shared_expert: bool
) -> Float[np.ndarray, "F W"]:
    """Returns the dense down from one expert's channels to its slot's outputs (Eq. 10), transposed.

    Without a shared expert it is multiplied by G_I: the dense FFN sums G_I slices, but only one of
    them is active.
    """
    place, slot = slice_and_slot(moe, expert)
    rows = down.shape[0] // moe.output_granularity
    width = down.shape[1] // moe.intermediate_granularity
    part = down[slot * rows : (slot + 1) * rows, place * width : (place + 1) * width].T
    return part if shared_expert else lazy.scaled(part, moe.intermediate_granularity)


def upcycled_config(dense: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """Returns the target's architecture: the dense one with `moe`, embeddings untied.

    Raises InputError if sizes do not divide or the shared expert's width is not the dense FFN's.
    """
    config = dataclasses.replace(dense, moe=moe, tie_word_embeddings=False)
    if config.shared_expert_size not in (0, dense.intermediate_size):
        raise InputError(
            f"moe.shared_expert_intermediate_size={config.shared_expert_size}, but the shared "
            f"expert copies the dense FFN of width {dense.intermediate_size}: set it to "
            f"{dense.intermediate_size}, 0 or None"
        )
    return config


def upcycle_weights(
    dense: ModelConfig,
    weights: Weights,
    moe: MoEConfig,
    key: Array,
    upcycling: UpcycleConfig = PUBLISHED_UPCYCLING,
) -> tuple[ModelConfig, Weights]:
    """Returns a FineRMoE's architecture and lazy weights, computed from a dense model's.

    Attention, norms and embedding are the dense ones. lm_head is the dense one or, if tied, the
    embedding. The shared expert is the whole dense FFN. Router, shared gate and concat_proj are
    drawn from normal(0, 0.02), layer by layer; nothing else is random (paper §3.3) unless
    `upcycling` says so (upcycle_variants.py). Every draw has its own key by layer, parameter and
    expert.

    Raises InputError if the source has experts already, if sizes do not divide, or if `upcycling`
    contradicts `moe` or is too little to have an effect.
    """
    if dense.moe is not None:
        raise InputError("the source has experts already; upcycling needs a dense model")
    upcycling.check(moe)
    config = upcycled_config(dense, moe)
    _check_drop(upcycling, config.expert_intermediate_size)
    shapes, kinds = parameter_shapes(config), parameter_kinds(config)
    rows = by_layer(dense, weights)
    moe_layers = [layer for layer, kind in enumerate(config.layer_kinds) if kind == "moe"]
    drawn = [name for name in DRAWN if any(path[-1] == name for path in shapes)]
    keys = jax.random.split(key, 4 * config.num_hidden_layers)

    def make(path: ParamPath, shape: tuple[int, ...]) -> LazyArray:
        if path[0] != "runs":
            return weights.get(path, weights["embed", "weight"])
        layers, name = run_layers(config, path[1], path[2]), path[3:]
        if name in rows:
            return _restacked(rows[name], layers)
        if name[:2] == ("moe", "shared"):
            whole = _restacked(rows["mlp", name[2]], layers)
            scales = upcycling.function_preserving and name[2] == "down"
            return _scaled(whole, upcycle_variants.SHARED_SCALE) if scales else whole
        dtype = weights["embed", "weight"].dtype
        if kinds[path].bank:
            if name[1] == "down" and upcycling.function_preserving:
                return _zeros(shape, rows["mlp", "down"][0].dtype)
            groups = bank_layers(config, path[1], path[2])
            return _experts(config, rows, groups, shape, name[1], upcycling, key)
        if name[1] == "depth_vector" or kinds[path].state:
            return _zeros(shape, kinds[path].stored_as(dtype))
        place = drawn.index(name[1])
        of_layers = [keys[moe_layers.index(layer) * len(drawn) + place] for layer in layers]
        std = upcycling.concat_proj_std if name[1] == "concat_proj" else NEW_WEIGHT_STD
        if not std or (name[1] == "shared_gate" and upcycling.function_preserving):
            return _zeros(shape, dtype)
        if name[1] in ROUTERS and (across := router_layers(moe, name[1])) > 1:
            own = (shape[0], shape[1] // across, shape[2])
            owned = _drawn(of_layers, own, dtype, std)
            return _with_foreign(owned, of_layers, _pool_place(config, path), across, upcycling)
        if upcycling.virtual_groups and name[1] == "router":
            return _drawn(of_layers, shape, dtype, std, upcycle_variants.virtual_group_rows(moe))
        return _drawn(of_layers, shape, dtype, std)

    return config, {path: make(path, shape) for path, shape in shapes.items()}


def _check_drop(upcycling: UpcycleConfig, width: int) -> None:
    """Raises InputError if upcycling would redraw some, but less than one, of `width` channels."""
    if 0 < upcycling.drop_ratio * width < 1:
        raise InputError(
            f"upcycle.drop_ratio={upcycling.drop_ratio} is less than one of an expert's {width} "
            f"channels: set at least {1 / width:.3g}, or 0"
        )


def _scaled(array: LazyArray, factor: int) -> LazyArray:
    return dataclasses.replace(array, read=lambda at: lazy.scaled(array[at], factor))


def pooled_weights(
    source: ModelConfig,
    weights: Weights,
    moe: MoEConfig,
    key: Array,
    upcycling: UpcycleConfig = PUBLISHED_UPCYCLING,
) -> tuple[ModelConfig, Weights]:
    """Returns a trained FineRMoE with its experts in pools of neighbouring layers.

    `moe` differs from the source's only in experts_across, pooled_as and depth_vector. All weights
    are the source's. Router rows of other layers' experts are drawn from normal(0, 0.02), or zero
    with upcycling.reuse_start=zero; the depth vectors are zero. While foreign experts are masked
    (train.psr_mask=foreign), the model computes what the source does.
    """
    upcycling.check(moe)
    config = dataclasses.replace(source, moe=moe)
    rows = by_layer(source, weights)
    keys = jax.random.split(key, config.num_hidden_layers)

    def make(path: ParamPath, shape: tuple[int, ...]) -> LazyArray:
        if path[0] != "runs":
            return weights[path]
        name, layers = path[3:], run_layers(config, path[1], path[2])
        if name[-1] == "depth_vector" and name not in rows:
            return _zeros(shape, weights["embed", "weight"].dtype)
        of_layers = rows[name]
        if parameter_kinds(config)[path].bank:
            groups = bank_layers(config, path[1], path[2])
            return lazy.stacked(
                shape, of_layers[layers[0]].dtype, 2,
                lambda i, p, rest: _of_pool(of_layers, groups[i], p)[rest],
            )  # fmt: skip
        owned = _restacked(of_layers, layers)
        if name[-1] in ROUTERS and (across := router_layers(moe, name[-1])) > 1:
            # Keys differ from those of a dense start, and between the two routers.
            own = [jax.random.fold_in(keys[layer], ROUTERS.index(name[-1])) for layer in layers]
            return _with_foreign(owned, own, _pool_place(config, path), across, upcycling)
        if name[-1] in ("expert_bias", "group_bias"):
            across = router_layers(moe, "group_router" if name[-1] == "group_bias" else "router")
            if across > 1:
                zero = UpcycleConfig(reuse_start="zero")
                return _with_foreign(owned, [], _pool_place(config, path), across, zero)
        return owned

    return config, {path: make(path, shape) for path, shape in parameter_shapes(config).items()}


def upcycled(
    source: str,
    config: ModelConfig,
    weights: Weights,
    moe: MoEConfig | None,
    key: Array,
    upcycling: UpcycleConfig,
    stated: bool = True,
) -> tuple[ModelConfig, Weights]:
    """Upcycles a dense model (`upcycle_weights`). Models with experts, or moe None, stay unchanged.

    A model whose layers have their own experts gets pools of them (`pooled_weights`) if `moe` sets
    experts_across and otherwise equals the model's. A model with experts gets the route_ahead of a
    `stated` `moe` (one that the user chose); its weights stay the same. In all other cases, if
    `stated`, a model with experts must have exactly these, and `upcycling` must be the default,
    since it would have no effect.

    Raises InputError otherwise, and as `upcycle_weights`.
    """
    if moe is not None and config.moe is None:
        return upcycle_weights(config, weights, moe, key, upcycling)
    if moe is not None and config.moe is not None and stated:
        config = routed_ahead(config, moe)
    if moe is not None and stated and adds_pools(config, moe):
        only = dataclasses.replace(PUBLISHED_UPCYCLING, reuse_start=upcycling.reuse_start)
        _refuse_without_effect(source, upcycling, only)
        assert config.moe is not None
        moe = dataclasses.replace(moe, selection_bias=config.moe.selection_bias)
        return pooled_weights(config, weights, moe, key, upcycling)
    if moe is not None and config.moe is not None and stated:
        # Biases belong to the weights: the source's are kept, missing ones are not an error.
        moe = dataclasses.replace(moe, selection_bias=config.moe.selection_bias)
        wanted = upcycled_config(config, moe)
        if wanted.shared_expert_size == config.shared_expert_size:  # None may stand for the width
            stands = config.moe.shared_expert_intermediate_size
            moe = dataclasses.replace(moe, shared_expert_intermediate_size=stands)
        refuse_differences(
            f"{source} already has experts, which differ from config.moe",
            dataclasses.asdict(config),
            dataclasses.asdict(dataclasses.replace(wanted, moe=moe)),
            "change config.moe, or start from a dense model",
        )
        _refuse_without_effect(source, upcycling, PUBLISHED_UPCYCLING)
    return config, weights


def routed_ahead(config: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """Returns the config of a model with experts, with the route_ahead of `moe`."""
    assert config.moe is not None
    ahead = dataclasses.replace(config.moe, route_ahead=moe.route_ahead)
    return dataclasses.replace(config, moe=ahead)


# Fields of MoEConfig that may differ when a trained model gets pools.
_NEW_IN_POOLS = ("pooled_as", "depth_vector", "selection_bias")


def adds_pools(config: ModelConfig, moe: MoEConfig) -> bool:
    """Returns True if `moe` adds pools to a FineRMoE without pools and changes nothing else."""
    if config.moe is None or config.moe.experts_across > 1 or moe.experts_across == 1:
        return False
    if config.moe.depth_vector and not moe.depth_vector:
        return False  # the source's would be lost
    own = {name: getattr(config.moe, name) for name in _NEW_IN_POOLS}
    alone = dataclasses.replace(moe, **own, experts_across=1)
    one, other = (
        dataclasses.replace(each, shared_expert_intermediate_size=None)
        for each in (alone, config.moe)
    )
    if one != other:
        return False
    return dataclasses.replace(config, moe=alone).shared_expert_size == config.shared_expert_size


def _refuse_without_effect(source: str, upcycling: UpcycleConfig, effective: UpcycleConfig) -> None:
    if upcycling != effective:
        raise InputError(
            f"{source} already has experts, so {upcycling} would have no effect: do not set "
            "config.upcycle, or start from a dense model"
        )


def with_selection_bias(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Returns a FineRMoE with selection biases: its own, or zeros if it has none."""
    assert config.moe is not None
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, selection_bias=True))
    kinds = parameter_kinds(config)
    return config, {
        path: weights[path] if path in weights else _zeros(shape, kinds[path].stored_as("float32"))
        for path, shape in parameter_shapes(config).items()
    }


# Randomly drawn parameters, in the order of a layer's keys.
DRAWN = ("router", "group_router", "shared_gate", "concat_proj")
# Routers with rows for other layers' experts.
ROUTERS = ("router", "group_router")


def router_layers(moe: MoEConfig, name: str) -> int:
    """Returns the number of layers for whose experts or candidate groups a router has rows."""
    groups = name == "group_router"
    return moe.pool_candidates // moe.output_expansion if groups else moe.experts_across


def _pool_place(config: ModelConfig, path: ParamPath) -> int:
    """Returns the place of the layers at `path` in their pools."""
    place = config.pool_places(config.layer_runs[path[1]][0])[path[2]]
    assert place is not None
    return place


type Rows = dict[ParamPath, dict[int, LazyArray]]


def by_layer(config: ModelConfig, weights: Weights) -> Rows:
    """Returns the arrays of every layer, by name in the layer and layer number."""
    rows: Rows = {}
    for path, array in weights.items():
        if path[0] == "runs":
            for place, layer in enumerate(run_layers(config, path[1], path[2])):
                rows.setdefault(path[3:], {})[layer] = array.row(place)
    return rows


def _restacked(rows: dict[int, LazyArray], layers: tuple[int, ...]) -> LazyArray:
    one = rows[layers[0]]
    return lazy.stacked(
        (len(layers), *one.shape), one.dtype, 1, lambda i, rest: rows[layers[i]][rest]
    )


def _of_pool(rows: dict[int, LazyArray], group: tuple[int, ...], expert: int) -> LazyArray:
    """Returns expert e * r + j of the pool of r layers: expert e of layer j."""
    own, place = divmod(expert, len(group))
    return rows[group[place]].row(own)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    return LazyArray(shape, dtype, lambda index: np.zeros([i.stop - i.start for i in index], dtype))


def _drawn(
    keys: list[Array],
    shape: tuple[int, ...],
    dtype: np.dtype,
    std: float,
    rows: Int[np.ndarray, " E"] | None = None,
) -> LazyArray:
    """Draws each layer with its key; with `rows`, row e is the draw for rows[e]."""
    draw = normal(std)

    def one(i: int, rest: Index) -> np.ndarray:
        drawn = np.asarray(draw(keys[i], shape[1:], dtype))
        return (drawn if rows is None else drawn[rows])[rest]

    return lazy.stacked(shape, dtype, 1, one)


def _with_foreign(
    owned: LazyArray, keys: list[Array], place: int, across: int, upcycling: UpcycleConfig
) -> LazyArray:
    """Returns routers [L, r * N, D] of layers at `place` of their groups, in the pool's order.

    `owned` [L, N, D] are the rows of their own experts ([L, N]: biases). The other layers' rows are
    drawn, each layer's with its own key, or zero (upcycling.reuse_start).
    """
    _, own, *width = owned.shape
    draw = normal(NEW_WEIGHT_STD)

    def one(i: int, rest: Index) -> np.ndarray:
        made = np.zeros((own, across, *width), owned.dtype)
        for other in range(across):
            if other == place:
                made[:, other] = owned[i : i + 1][0]
            elif upcycling.reuse_start == "random":
                key = jax.random.fold_in(keys[i], FOREIGN_KEY + other)
                made[:, other] = np.asarray(draw(key, (own, *width), owned.dtype))
        return made.reshape(own * across, *width)[rest]

    return lazy.stacked((owned.shape[0], own * across, *width), owned.dtype, 1, one)


def _experts(
    config: ModelConfig,
    rows: Rows,
    groups: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
    name: str,
    upcycling: UpcycleConfig,
    key: Array,
) -> LazyArray:
    moe, shared = config.moe, config.shared_expert_size > 0
    assert moe is not None
    gate, up, down = (rows["mlp", part] for part in ("gate", "up", "down"))

    def own_key(*numbers: int) -> Array:
        return functools.reduce(jax.random.fold_in, numbers, key)

    def make(layer: int, expert: int) -> np.ndarray:
        if name == "gate_up":
            made = expert_gate_up(gate[layer], up[layer], moe, expert)
        else:
            made = expert_down(down[layer], moe, expert, shared)
        if upcycling.drop_ratio:
            own = own_key(upcycle_variants.DROP_KEY, layer, expert)
            made = upcycle_variants.drop(name, made, upcycling.drop_ratio, own)
        if upcycling.copy_noise:
            own = own_key(upcycle_variants.NOISE_KEY, layer, expert)
            made = upcycle_variants.noise(name, made, upcycling.copy_noise, own)
        return made

    # Any block of an expert needs the whole expert computed.
    kept = lazy.cache_last(make)

    def read(i: int, pooled: int, rest: Index) -> np.ndarray:
        one = make if lazy.is_whole(rest, shape[2:]) else kept
        expert, place = divmod(pooled, len(groups[i]))
        return one(groups[i][place], expert)[rest]

    return lazy.stacked(shape, down[0].dtype, 2, read)


def upcycle_model(
    dense: Decoder, moe: MoEConfig, key: Array, start: UpcycleConfig = PUBLISHED_UPCYCLING
) -> Decoder:
    """Upcycles a dense decoder to a FineRMoE (paper Eq. 9-10).

    The published start does not preserve the dense model's outputs, since the shared expert's gate
    starts near 1/2. `UpcycleConfig(function_preserving=True)` does.

    Args:
      dense: a model without experts; it is not changed.
      moe: the layer's granularities and expansions.
      key: a key of `jax.random`, for the router and the other new weights.
      start: the initialisation of the experts; by default the published one.

    Returns:
      A new model with the dtypes of the dense one. Its lm_head is not tied to the embedding.

    Raises:
      InputError: `dense` has experts already, sizes do not divide, the shared expert's width is not
        the dense FFN's, or `start` contradicts `moe`.

    Examples:
      >>> import jax
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model")
      >>> moe = fm.MoEConfig(intermediate_granularity=8)
      >>> model = fm.upcycle_model(dense, moe, jax.random.key(0))
      >>> model.config.moe.num_experts
      32
    """
    check_type("the dense model", dense, Decoder, LOAD_A_MODEL)
    check_type("moe", moe, MoEConfig, "MoEConfig() is the published one")
    check_type("start", start, UpcycleConfig, "UpcycleConfig() is the published one")
    check_key(key)
    weights = lazy.of_params(nnx.to_pure_dict(nnx.state(dense)))
    config, made = upcycle_weights(dense.config, weights, moe, key, start)
    return with_params(config, lazy.in_memory(made), dtype=dense.dtype)


def upcycle(
    dense_model: Decoder,
    *,
    intermediate_granularity: int = 32,
    output_granularity: int = 2,
    intermediate_expansion: int = 1,
    output_expansion: int = 2,
    active_per_group: int = 1,
    shared_expert: bool = True,
    key: Array | None = None,
    start: UpcycleConfig = PUBLISHED_UPCYCLING,
) -> Decoder:
    """Upcycles a dense decoder by the paper's five numbers; the defaults are the published ones.

    Args:
      dense_model: a model without experts; it is not changed.
      intermediate_granularity: G_I, slices along the intermediate width.
      output_granularity: G_O, slots along the output width.
      intermediate_expansion: R_I, copies of each slice inside a group.
      output_expansion: R_O, candidate groups per slot.
      active_per_group: T_I, active experts in the chosen group.
      shared_expert: keeps the whole dense FFN as a shared expert.
      key: a key of `jax.random`; None: `jax.random.key(0)`.
      start: the initialisation of the experts; by default the published one.

    Returns:
      A new model with the dtypes of the dense one.

    Raises:
      InputError: as `upcycle_model`.

    Examples:
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model")
      >>> model = fm.upcycle(dense)
      >>> model.config.moe.num_experts, model.config.moe.num_active
      (128, 2)
      >>> model = fm.upcycle(dense, intermediate_granularity=8)
      >>> model.config.moe.num_experts, model.config.moe.num_active
      (32, 2)
    """
    check_type("shared_expert", shared_expert, bool, "give True or False")
    moe = MoEConfig(
        intermediate_granularity=intermediate_granularity,
        output_granularity=output_granularity,
        intermediate_expansion=intermediate_expansion,
        output_expansion=output_expansion,
        active_per_group=active_per_group,
        shared_expert_intermediate_size=None if shared_expert else 0,
    )
    return upcycle_model(dense_model, moe, jax.random.key(0) if key is None else key, start)
