"""Experts in host memory: the same bits as on the device, and only the chosen ones travel."""

import dataclasses
import functools

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
from finermoe_jax.weights import lazy
from finermoe_jax.weights.source import open_model, read_model
from tests.support import assert_refused, command, load_preset
from tests.support.models import weights, write_tokenizer
from tests.support.training import MOE, mixture_model, random_tokens

# 64 experts: the 16 choices of 8 rows are no reason to copy a whole layer.
WIDE = dataclasses.replace(MOE, moe=fm.MoEConfig(16, 2, 1, 2, 1))
AHEAD = dataclasses.replace(
    MOE,
    num_hidden_layers=4,
    moe=fm.MoEConfig(8, 2, 1, 2, 2, mlp_only_layers=(0,), route_ahead=1),
)
POOLED = dataclasses.replace(MOE, moe=fm.MoEConfig(8, 2, 1, 2, 1, experts_across=2, route_ahead=1))


@functools.cache
def model_of(config):
    return mixture_model(config)


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


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("config", "rows", "int8"),
    [
        (WIDE, 1, False), (WIDE, 8, False), (WIDE, 8, True), (AHEAD, 1, True), (AHEAD, 2, False),
        (AHEAD, 8, False), (POOLED, 1, False),
    ],
    ids=[
        "one row", "many rows", "int8", "ahead, int8", "ahead, two rows", "ahead, whole layers",
        "pool",
    ],
)  # fmt: skip
def test_the_same_bits_as_on_the_device(config, rows, int8, monkeypatch):
    model = model_of(config)
    model = int8_weights(model) if int8 else model
    tokens, logits = generated(model, rows, monkeypatch)
    assert len(logits) == 3 and np.isfinite(logits).all()
    again, same = generated(model, rows, monkeypatch, experts="host")
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(same, logits)
    if rows == 8 and not int8:
        return  # compiles long, and int8 has as many rows
    again, close = generated(model, rows, monkeypatch, experts="host_compute")
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_allclose(close, logits, rtol=1e-4, atol=1e-5)


def decoding_step(model, rows):
    """The operations of a decoding step in order, each with its named scopes."""
    graphdef, state = nnx.split(model)
    cache = init_cache(model.config, rows, 32, model.dtype)
    scalars = jax.tree.map(jnp.asarray, Sampling().scalars())
    seen = jnp.zeros((rows, model.config.vocab_size), bool)
    running = generation._Running(cache, seen, jnp.int32(0))

    def step(state):
        decode = generation.decode.__wrapped__  # not jitted: a trace would be cached
        return decode(graphdef, state, jnp.zeros(rows, jnp.int32), running, scalars)

    def walk(jaxpr, scopes=""):
        for eqn in jaxpr.eqns:
            here = f"{scopes}/{eqn.source_info.name_stack}"
            yield eqn, here
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from walk(inner, here)

    return list(walk(jax.make_jaxpr(step)(generation.layers_apart(state)).jaxpr))


def from_host(eqn):
    """Bytes that an operation copies from host memory."""
    if eqn.primitive.name != "device_put":
        return 0
    read = [each.aval for each in eqn.invars if each.aval.memory_space == jax.memory.Space.Host]
    return sum(aval.size * aval.dtype.itemsize for aval in read)


def moved_bytes(model, rows):
    return sum(from_host(eqn) for eqn, _ in decoding_step(model, rows))


@pytest.mark.slow
@pytest.mark.parametrize("config", [WIDE, AHEAD], ids=["0", "1"])
def test_only_chosen_experts_travel(config):
    model = with_experts(model_of(config), "host")
    moe = next(block.moe for run in model.runs for block in run if hasattr(block, "moe"))
    stacks = moe.gate_up[...], moe.down[...]
    expert = sum(4 * int(np.prod(stack.shape[2:])) for stack in stacks)
    layers = config.layer_kinds.count("moe")
    active, total = config.moe.num_active, config.moe.num_experts
    assert moved_bytes(model, 1) == layers * active * expert
    assert moved_bytes(model, 4) == layers * 4 * active * expert
    assert moved_bytes(model, total) == layers * total * expert  # whole layers, once
    assert moved_bytes(with_experts(model, "host_compute"), 1) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("config", "ahead"), [(WIDE, 0), (AHEAD, 1)], ids=["0", "1"])
def test_transfers_start_before_the_products_beside_them(config, ahead, monkeypatch):
    """In program order: a layer's experts, then its shared expert, or that of the layer before."""
    monkeypatch.setattr("finermoe_jax.moe.bank.platform", lambda: "tpu")
    layers = config.layer_kinds.count("moe")
    each = 2 * config.moe.num_active  # gate and up together, and down
    chosen = (config.moe.num_active,)
    moves, barriers, before_products = 0, 0, []
    step = decoding_step(with_experts(model_of(config), "host"), 1)
    read = [var for eqn, _ in step for var in eqn.invars]
    for eqn, scopes in step:
        moves += from_host(eqn) > 0
        if eqn.primitive.name == "dot_general" and "shared_expert" in scopes:
            before_products.append(moves)
        of = [each.aval for each in eqn.outvars]
        if eqn.primitive.name == "optimization_barrier" and of[-1].shape == chosen:
            assert of[0].shape == (1, 1, config.hidden_size)
            assert any(var is eqn.outvars[0] for var in read)  # the products do
            barriers += 1
            assert moves == (barriers - 1) * each  # the choice comes first
    assert barriers == layers and moves == layers * each
    first = before_products[:: len(before_products) // layers]
    assert first == [min(layer + 1 + ahead, layers) * each for layer in range(layers)]


class Loading:
    """Records the arrays that are made while a model is loaded."""

    def __init__(self, monkeypatch, layer_shapes):
        self.on_host, self.on_device, self.read = [], [], []
        put, array, getitem = jax.device_put, jnp.array, lazy.LazyArray.__getitem__

        def device_put(values, place=None, **rest):
            host = getattr(place, "memory_kind", None) == "pinned_host"
            (self.on_host if host else self.on_device).extend(
                map(np.shape, jax.tree.leaves(values))
            )
            return put(values, place, **rest)

        def new_array(values, *rest, **settings):
            self.on_device.append(np.shape(values))
            return array(values, *rest, **settings)

        def read(lazy_array, index):
            values = getitem(lazy_array, index)
            if lazy_array.shape in layer_shapes:
                self.read.append(values.nbytes)
            return values

        monkeypatch.setattr(jax, "device_put", device_put)
        monkeypatch.setattr(jnp, "array", new_array)
        monkeypatch.setattr(lazy.LazyArray, "__getitem__", read)


def test_loading_takes_a_layer_at_a_time_and_spares_the_device(tmp_path, monkeypatch):
    model = model_of(MOE)
    fm.save_checkpoint(model, tmp_path / "orbax")
    fm.save_hf(model, tmp_path / "hf")
    moe = model.runs[0][0].moe
    shapes = [stack.get_value().shape[1:] for stack in (moe.gate_up, moe.down)]
    block = 4 * 4 * int(np.prod(shapes[0][1:]))  # four experts
    monkeypatch.setattr(lazy, "BLOCK_BYTES", block)
    for name, load in {"orbax": fm.load_checkpoint, "hf": fm.load_hf}.items():
        with monkeypatch.context() as patch:
            seen = Loading(patch, shapes)
            load(tmp_path / name, experts="host")
        assert sorted(seen.on_host) == sorted(2 * shapes)  # each layer by itself
        assert seen.on_device and not any(shape[-3:] in shapes for shape in seen.on_device)
        assert max(seen.read) <= block
        assert sum(seen.read) == 2 * 4 * sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.nightly  # compiles two models
def test_a_prompt_needs_room_for_one_layer():
    """Layers are written out. Without an order, all of them would be sliced and cast at first."""

    def room(layers):
        config = dataclasses.replace(WIDE, num_hidden_layers=layers, intermediate_size=2048)
        model = fm.Decoder(config, dtype="float32", param_dtype="bfloat16", rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(with_experts(model, "host"))
        cache = init_cache(config, 1, 64, model.dtype)
        prompt = np.zeros((1, 32), np.int32), np.array([32], np.int32)
        lowered = generation.prefill.lower(graphdef, state, *prompt, cache, Sampling().scalars())
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert room(6) < 1.1 * room(2)


def test_loading_and_saving(tmp_path):
    model = model_of(MOE)
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
    model, dense = model_of(MOE), model_of(dataclasses.replace(MOE, moe=None))
    fm.save_checkpoint(model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"experts='hots' is unknown\. Did you mean host"):
        fm.generate(model, [[1]], experts="hots")
    with pytest.raises(InputError, match="needs a model with experts, but this one is dense"):
        fm.generate(dense, [[1]], experts="host")
    in_host_memory = with_experts(model, "host")
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
    with pytest.raises(InputError, match="the experts' int8 copies need"):
        int8_weights(in_host_memory)
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    monkeypatch.setattr(model, "placement", Placement(mesh))
    with pytest.raises(InputError, match="needs one device, but the model is on a mesh of 2"):
        with_experts(model, "host")


def test_int8_copies_need_room_beside_the_experts(tmp_path, monkeypatch):
    """Refused before any weight is read."""
    model = model_of(MOE)
    moe = model.runs[0][0].moe
    stacks = [moe.gate_up.get_value(), moe.down.get_value()]
    outputs = stacks[0].size // stacks[0].shape[3] + stacks[1].size // stacks[1].shape[2]
    original = sum(stack.nbytes for stack in stacks)
    needed = original + original // 4 + 4 * outputs
    fm.save_hf(model, tmp_path)
    write_tokenizer(tmp_path, 64)
    arguments = f"--checkpoint={tmp_path}", "--prompt=w1", "--experts=host", "--int8"
    monkeypatch.setattr(host_memory, "available", lambda: needed - 1)
    done = command("generate", *arguments)
    assert_refused(
        done,
        f"the experts and their int8 copies need {disk.format_bytes(needed)} of host memory",
        f"but {disk.format_bytes(needed - 1)} are available",
    )
    assert "reading" not in done.stderr


def test_experts_in_host_memory_cannot_be_trained():
    model = with_experts(model_of(MOE), "host")
    ids = random_tokens(1)

    def loss(model):
        return model(ids).logits.sum()

    with pytest.raises(InputError, match="experts in host memory have no gradients: load"):
        jax.eval_shape(nnx.grad(loss), model)
    alone = nnx.All(nnx.Param, lambda path, _: path[-1] == "router")
    jax.eval_shape(nnx.grad(loss, argnums=nnx.DiffState(0, alone)), model)
    with_computed = with_experts(model, "host_compute")
    with pytest.raises(InputError, match="experts in host memory have no gradients: load"):
        jax.eval_shape(nnx.grad(lambda model: model(ids[:, :1]).logits.sum()), with_computed)


@pytest.mark.slow
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
