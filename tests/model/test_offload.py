"""Experts in host memory: the same bits as on the device, and only the chosen ones travel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.analysis import programs, topology
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError
from finermoe_jax.generation import decode as generation
from finermoe_jax.generation.sampling import Sampling, choose
from finermoe_jax.layers import sharding
from finermoe_jax.layers.kv_cache import init_cache
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.layers.stored import HostLayers
from finermoe_jax.model.offload import with_experts
from finermoe_jax.model.quantize import int8_weights
from finermoe_jax.runtime import disk, host_memory
from finermoe_jax.weights.source import open_model, read_model
from tests.support import assert_refused, command, load_preset
from tests.support.models import weights
from tests.support.training import MOE, mixture_model

# 64 experts: the 16 choices of 8 rows are no reason to copy a whole layer.
WIDE = dataclasses.replace(MOE, moe=fm.MoEConfig(16, 2, 1, 2, 1))
AHEAD = dataclasses.replace(
    MOE,
    num_hidden_layers=4,
    moe=fm.MoEConfig(8, 2, 1, 2, 2, mlp_only_layers=(0,), route_ahead=1),
)
POOLED = dataclasses.replace(MOE, moe=fm.MoEConfig(8, 2, 1, 2, 1, experts_across=2, route_ahead=1))


def generated(model, rows, monkeypatch, **settings):
    """Tokens of left-padded prompts, and the logits that chose them."""
    logits = []

    def watched(of_step, *rest):
        jax.debug.callback(lambda x: logits.append(np.asarray(x)), of_step)
        return choose(of_step, *rest)

    monkeypatch.setattr(generation, "choose", watched)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (rows, 7)).astype(np.int32)
    mask = np.arange(7)[None] >= rng.integers(0, 6, (rows, 1))
    made = np.asarray(fm.generate(model, ids, mask, max_new_tokens=3, **settings))
    jax.effects_barrier()
    return made, np.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rows", "int8"),
    [(WIDE, 1, False), (WIDE, 8, True), (AHEAD, 1, True), (AHEAD, 2, False), (POOLED, 1, False)],
    ids=["one row", "int8", "ahead, int8", "ahead, two rows", "pool"],
)
def test_the_same_bits_as_on_the_device(config, rows, int8, monkeypatch):
    model = mixture_model(config)
    model = int8_weights(model) if int8 else model
    tokens, logits = generated(model, rows, monkeypatch)
    assert len(logits) == 3 and np.isfinite(logits).all()
    again, same = generated(model, rows, monkeypatch, experts="host")
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(same, logits)
    if not int8 and rows == 1:
        again, close = generated(model, rows, monkeypatch, experts="host_compute")
        np.testing.assert_array_equal(again, tokens)
        np.testing.assert_allclose(close, logits, rtol=1e-4, atol=1e-5)


def moved_bytes(model, rows):
    """Bytes that a decoding step copies from host memory, counted in its program."""
    graphdef, state = nnx.split(model)
    cache = init_cache(model.config, rows, 32, model.dtype)
    scalars = jax.tree.map(jnp.asarray, Sampling().scalars())
    seen = jnp.zeros((rows, model.config.vocab_size), bool)
    running = generation._Running(cache, seen, jnp.int32(0))

    def step(state):
        return generation.decode(graphdef, state, jnp.zeros(rows, jnp.int32), running, scalars)

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    total += count(inner) if hasattr(inner, "eqns") else 0
            if eqn.primitive.name == "device_put":
                for source in eqn.invars:
                    if source.aval.memory_space == jax.memory.Space.Host:
                        total += source.aval.size * source.aval.dtype.itemsize
        return total

    return count(jax.make_jaxpr(step)(generation.layers_apart(state)).jaxpr)


@pytest.mark.parametrize("config", [WIDE, AHEAD], ids=["0", "1"])
def test_only_chosen_experts_travel(config):
    model = with_experts(mixture_model(config), "host")
    moe = next(block.moe for run in model.runs for block in run if hasattr(block, "moe"))
    stacks = moe.gate_up[...], moe.down[...]
    expert = sum(4 * int(np.prod(stack.shape[2:])) for stack in stacks)
    layers = config.layer_kinds.count("moe")
    active, total = config.moe.num_active, config.moe.num_experts
    assert moved_bytes(model, 1) == layers * active * expert
    assert moved_bytes(model, 4) == layers * 4 * active * expert
    assert moved_bytes(model, total) == layers * total * expert  # whole layers, once
    assert moved_bytes(with_experts(model, "host_compute"), 1) == 0


def test_loading_and_saving(tmp_path):
    model = mixture_model(MOE)
    fm.save_checkpoint(model, tmp_path / "orbax")
    fm.save_hf(model, tmp_path / "hf")
    sources = {"orbax": fm.load_checkpoint, "hf": fm.load_hf}
    for name, load in sources.items():
        loaded = load(tmp_path / name, experts="host")
        stack = loaded.runs[0][0].moe.gate_up.get_value()
        assert isinstance(stack, HostLayers) and len(stack.layers) == 2
        assert {layer.sharding.memory_kind for layer in stack.layers} == {"pinned_host"}
        fm.save_checkpoint(loaded, tmp_path / f"{name}-again")
        saved = weights(fm.load_checkpoint(tmp_path / f"{name}-again"))
        back = weights(with_experts(loaded, "device"))
        for path, value in weights(model).items():
            np.testing.assert_array_equal(saved[path], value)
            np.testing.assert_array_equal(back[path], value)
    source = open_model(tmp_path / "hf")
    moe = read_model(source, tmp_path / "hf", experts="host_compute").runs[0][0].moe
    assert moe.down.get_value().computed


def test_refusals(tmp_path, monkeypatch):
    model, dense = mixture_model(MOE), mixture_model(dataclasses.replace(MOE, moe=None))
    fm.save_checkpoint(model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"experts='hots' is unknown\. Did you mean host"):
        fm.generate(model, [[1]], experts="hots")
    with pytest.raises(InputError, match="needs a model with experts, but this one is dense"):
        fm.generate(dense, [[1]], experts="host")
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    banks = [
        v for p, v in weights(model).items() if p[-2:] in (("moe", "gate_up"), ("moe", "down"))
    ]
    size = sum(bank.nbytes for bank in banks)
    wanted = rf"the experts need {disk.format_bytes(size)} of host memory, but 1.00kB are available"
    for attempt in (
        lambda: fm.load_checkpoint(tmp_path / "saved", experts="host"),
        lambda: fm.generate(model, [[1]], experts="host"),
    ):
        with pytest.raises(InputError, match=wanted):
            attempt()
    model.placement = Placement(sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    with pytest.raises(InputError, match="needs one device, but the model is on a mesh of 2"):
        with_experts(model, "host")


def test_programs_without_experts_in_host_memory():
    target = topology.Target("v5e:1x1", topology.CHIPS["v5e"], "tpu", (jax.devices()[0],), 1, 1)
    config = load_preset("demo")
    for name, changes, message in (
        ("train", {}, "--experts=host needs --program=decode or prefill, but the program is train"),
        ("decode", {"platform": "cuda"}, "--experts=host needs a TPU, but v5e:1x1 is cuda"),
    ):
        with pytest.raises(InputError, match=message):
            programs.abstract_program(config, target._replace(**changes), name, "host")
    resident = programs.abstract_program(config, target, "decode")
    program = programs.abstract_program(config, target, "decode", "host")
    assert program.host_bytes > 0
    assert program.parameter_bytes + program.host_bytes == resident.parameter_bytes


def test_the_command_refuses_a_dense_model():
    done = command(
        "generate", "--checkpoint=finermoe_jax/demo/model", "--prompt=x", "--experts=host"
    )
    assert_refused(done, "experts='host'", "dense")
