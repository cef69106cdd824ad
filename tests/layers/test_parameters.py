"""The logical axes of a parameter, against the rules by name that they replace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import PARTS, MeshConfig, OptimizerConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.basic import param
from finermoe_jax.layers.parameters import KINDS, LAYER, kind_of, kinds, trained_kinds
from finermoe_jax.layers.sharding import RULES
from finermoe_jax.layers.stored import Quantized
from finermoe_jax.model.decoder import Decoder, parameter_kinds, parameter_shapes
from finermoe_jax.model.quantize import int8_weights
from finermoe_jax.training.optimizer import decayed, optimizer, trained
from tests.support import SMALL

BASE = dataclasses.replace(SMALL, num_hidden_layers=2, qk_norm=True)
MOE = MoEConfig(4, 2, 1, 2, 1)
MODELS = {
    "dense": BASE,
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "FineRMoE": dataclasses.replace(BASE, moe=MOE),
    "beside dense layers": dataclasses.replace(
        BASE, moe=dataclasses.replace(MOE, decoder_sparse_step=2)
    ),
    "separate routers": dataclasses.replace(
        BASE, moe=dataclasses.replace(MOE, separate_routers=True)
    ),
    "concat_proj": dataclasses.replace(BASE, moe=dataclasses.replace(MOE, concat_proj="all")),
    "selection biases": dataclasses.replace(
        BASE, moe=dataclasses.replace(MOE, selection_bias=True)
    ),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)

# The last axes that int8 weights are summed over, by name; the experts' `down` is apart.
SUMMED = {
    "query": (-1,), "key": (-1,), "value": (-1,), "out": (-2, -1), "gate": (-1,), "up": (-1,),
    "down": (-1,), "concat_proj": (-1,), "weight": (-1,), "gate_up": (-1,),
}  # fmt: skip


def _params(config):
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    return model, nnx.to_pure_dict(nnx.state(model))


def _flat(tree):
    return nnx.traversals.flatten_mapping(tree)


# What each part of the model is called in a parameter's path.
PART_NAMES = {
    "embedding": ("embed",), "attention": ("attention",), "norms": ("scale",),
    "dense_ffn": ("mlp",), "experts": ("gate_up",),
    "router": ("router", "group_router", "expert_bias", "group_bias"),
    "shared_expert": ("shared",), "shared_gate": ("shared_gate",),
    "concat_proj": ("concat_proj",), "lm_head": ("lm_head",),
}  # fmt: skip


def _bank(path, leaf):
    return "moe" in path and leaf.ndim == 4


@pytest.mark.slow
@every_model
def test_the_same_parameters_are_decayed_frozen_quantized_and_row_major_as_by_name(config):
    model, params = _params(config)
    found, flat = kinds(model), _flat(params)
    assert found.keys() == flat.keys()
    flags = _flat(decayed(params, found))
    state = {path for path in flat if path[-1] in ("expert_bias", "group_bias")}
    assert bool(state) == bool(config.moe and config.moe.selection_bias)
    biases = ("scale", "query_bias", "key_bias", "value_bias", "expert_bias", "group_bias")
    assert flags == {path: path[-1] not in biases for path in flat}
    backbone = trained_kinds(model, ("attention", "dense_ffn", "lm_head"))
    free = _flat(trained(params, backbone))
    by_name = {"attention", "mlp", "lm_head"}
    kept = {p for p in flat if p[-1] == "scale" or not {*p} & by_name}
    assert free.keys() == kept - state
    assert _flat(trained(params, trained_kinds(model))).keys() == flat.keys() - state
    for path, leaf in flat.items():
        of_experts = path[-2:] == ("moe", "down")
        summed = (-2,) if of_experts else SUMMED.get(path[-1], ())
        assert found[path].summed == summed, path
        assert found[path].bank == _bank(path, leaf), path
        assert found[path].state == (path in state), path
        of_state = jnp.float32 if path in state else jnp.bfloat16
        assert found[path].stored_as("bfloat16") == of_state, path


@pytest.mark.slow
@every_model
def test_parts_are_those_of_the_paths(config):
    model, params = _params(config)
    for path in _flat(params):
        named = [part for part, names in PART_NAMES.items() if {*path} & {*names}]
        if path[-1] == "scale":
            named = ["norms"]
        elif path[-2:] == ("moe", "down"):
            named = ["experts"]
        assert [kinds(model)[path].part] == named, path


@pytest.mark.slow
@every_model
def test_int8_weights_are_those_of_before(config):
    model, _ = _params(config)
    for path, variable in nnx.to_flat_state(nnx.state(int8_weights(model))):
        assert isinstance(variable.get_value(), Quantized) == (path[-1] in SUMMED), path


@pytest.mark.slow
@every_model
def test_formats_of_weights_and_of_optimizer_states(config):
    model, params = _params(config)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    shardings, _ = sharding.param_shardings(model, mesh)

    def check(tree, placed):
        formats = sharding.row_major(tree, placed, model)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), made in zip(leaves, jax.tree.leaves(formats), strict=True):
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            order = made.layout and made.layout.major_to_minor
            assert order == (tuple(range(leaf.ndim)) if _bank(keys, leaf) else None), path

    check(params, shardings)
    for name in ("adamw", "adafactor", "muon"):
        state = optimizer(OptimizerConfig(name=name), 10, kinds(model)).init(params)
        check(state, sharding.like_params(state, params, shardings, mesh))


@pytest.mark.slow
@every_model
def test_weights_known_by_name_have_the_same_kinds(config):
    model, _ = _params(config)
    found = parameter_kinds(config)
    assert found == kinds(model) and found.keys() == parameter_shapes(config).keys()


class Made(nnx.Module):
    """A parameter of any axes under a name, and in a place, that no model has."""

    def __init__(self, axes):
        self.inner = nnx.List([nnx.Dict()])
        shape = tuple(range(2, 2 + len(axes)))
        self.inner[0]["anything"] = param(
            nnx.Rngs(0), shape, axes, jnp.float32, nnx.initializers.ones
        )


@pytest.mark.parametrize("axes", KINDS, ids=" ".join)
def test_a_parameters_kind_comes_from_its_axes_alone(axes):
    path = ("inner", 0, "anything")
    assert kinds(Made(axes)) == {path: KINDS[axes]} == {path: kind_of((LAYER, *axes))}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Made(axes)))
    assert kinds(nnx.merge(graphdef, nnx.State(nnx.to_pure_dict(state)))) == {path: KINDS[axes]}
    params = nnx.to_pure_dict(nnx.state(Made(axes)))
    assert _flat(decayed(params, kinds(Made(axes)))) == {path: KINDS[axes].decayed}
    assert KINDS[axes].part in PARTS
    others = tuple(part for part in PARTS if part != KINDS[axes].part)
    if KINDS[axes].state:
        with pytest.raises(InputError, match="leaves nothing"):
            trained_kinds(Made(axes), others)
    else:
        assert _flat(trained(params, trained_kinds(Made(axes), others))).keys() == {path}
    with pytest.raises(InputError, match=f"leaves nothing .* its parts are {KINDS[axes].part}"):
        trained_kinds(Made(axes), (KINDS[axes].part,))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    placed, _ = sharding.param_shardings(Made(axes), mesh)
    (made,) = jax.tree.leaves(sharding.row_major(params, placed, Made(axes)))
    assert (made.layout is not None) == KINDS[axes].bank == ("expert" in axes)


def test_every_kinds_axes_have_a_place_on_the_mesh():
    assert {axis for axes in KINDS for axis in axes} <= RULES.keys()


def test_axes_that_are_of_no_kind_are_refused_where_the_parameter_is_made():
    with pytest.raises(InputError, match=r"'mlp', 'expert'\) have no kind"):
        Made(("mlp", "expert"))
    bare = nnx.Dict(w=nnx.Param(np.ones(3)))
    with pytest.raises(InputError, match="parameter w declares no logical axes"):
        kinds(bare)
