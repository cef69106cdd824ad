"""Adafactor and Muon beside AdamW: their states, shardings and arithmetic; schedules."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from finermoe_jax.analysis.hlo import parse
from finermoe_jax.analysis.hlo_costs import COLLECTIVES, analyse
from finermoe_jax.analysis.params import run_model
from finermoe_jax.config.flops import newton_schulz_flops
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import MeshConfig, OptimizerConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kind_of, kinds, trained_kinds
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.optimizer import (
    apply_updates,
    in_float32,
    learning_rate,
    optimizer,
    stochastic_round,
)
from finermoe_jax.training.run import train
from finermoe_jax.training.step import abstract_optimizer
from finermoe_jax.weights.checkpoint import abstract_params, load_checkpoint
from tests.support import load_preset
from tests.support.training import (
    TINY,
    assert_same_steps,
    mixture_model,
    relative_distances,
    silent,
    small_run,
    take_steps,
    tiny_run,
)

ADAFACTOR = OptimizerConfig(name="adafactor", learning_rate=1e-2, warmup_fraction=0.0)
KINDS = {("weight",): kind_of(("vocab", "embed")), ("scale",): kind_of(("norm",))}


def test_rows_and_columns_are_split_as_their_parameter():
    mesh = sharding.make_mesh(MeshConfig(1, 2, 4, 1))
    config = load_preset("qwen0p5b", "lean")
    model = with_shapes(run_model(config))
    shardings, _ = sharding.param_shardings(model, mesh)
    params = abstract_params(model.config, "bfloat16", shardings)
    state = abstract_optimizer(optimizer(ADAFACTOR, 10, kinds(model)), params, shardings, mesh)
    factored = next(
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "v_row"))
        if hasattr(leaf, "v_row")
    )
    for name, entries in (("gate_up", (0, 1, 2, 3)), ("down", (0, 1, 2, 3))):
        place = shardings["runs"][0][0]["moe"][name].spec
        place = (*place, *(None for _ in entries[len(place) :]))
        moe = (s["runs"][0][0]["moe"][name] for s in (factored.v_row, factored.v_col, factored.v))
        row, col, unused = moe
        shape = params["runs"][0][0]["moe"][name].shape
        small, large = np.argsort(shape)[-2:]
        for leaf, dropped in ((row, large), (col, small)):
            assert leaf.shape == tuple(np.delete(shape, dropped))
            kept = [entry for axis, entry in enumerate(place) if axis != dropped]
            assert leaf.sharding.spec == P(*kept)
            assert leaf.dtype == jnp.float32
        assert unused.shape == (1,) and unused.sharding.is_fully_replicated
    # The unfactored: the whole second moment, split as the parameter.
    query = factored.v["runs"][0][0]["attention"]["query"]
    assert query.sharding.spec == shardings["runs"][0][0]["attention"]["query"].spec


@pytest.mark.nightly
def test_every_mesh_gives_one_devices_result():
    config = dataclasses.replace(small_run(8), optimizer=ADAFACTOR)
    reference = take_steps(config, MeshConfig(1, 1, 1, 1))
    assert reference[0][-1, 0] < reference[0][0, 0]
    for mesh in (MeshConfig(1, 2, 2, 2), MeshConfig(1, 1, 4, 1)):
        assert_same_steps(take_steps(config, mesh), reference)


@pytest.mark.slow
def test_the_step_is_adafactors():
    """One step by hand: the gradient over its factored root mean square, then rate and decay."""
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal((200, 300)).astype(np.float32) for _ in range(2))
    g *= 1e-3
    config = dataclasses.replace(ADAFACTOR, clip_norm=1e6, weight_decay=0.1)
    tx = optimizer(config, 10, KINDS)
    params = {"weight": jnp.asarray(w)}
    updates, _ = tx.update({"weight": jnp.asarray(g)}, tx.init(params), params)
    square = g.astype(np.float64) ** 2
    row, col = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    step = g / np.sqrt(row * col / row.mean())
    step /= max(1.0, np.sqrt((step**2).mean()))
    np.testing.assert_allclose(updates["weight"], -1e-2 * (step + 0.1 * w), rtol=1e-4, atol=1e-6)


def test_the_step_is_adamws():
    """Three steps by hand: clipping, both means and their corrections, decay, and the rate."""
    config = OptimizerConfig(
        learning_rate=1e-2, final_learning_rate=1e-3, warmup_fraction=0.0, beta1=0.8, beta2=0.9,
        weight_decay=0.1, clip_norm=2.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    exact = {"weight": rng.standard_normal((5, 7)), "scale": rng.standard_normal(7)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in exact.items()}
    tx = optimizer(config, 3, KINDS)
    state = tx.init(params)
    means = {name: (0.0, 0.0) for name in exact}
    for step, size in enumerate((0.01, 1.0, 30.0)):  # the last two are clipped
        grads = {name: size * rng.standard_normal(value.shape) for name, value in exact.items()}
        given = {name: jnp.asarray(grad, jnp.float32) for name, grad in grads.items()}
        updates, state = tx.update(given, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        assert (norm > 2.0) == (step > 0)
        rate = 1e-3 + (1e-2 - 1e-3) * (1 + np.cos(np.pi * step / 3)) / 2
        for name, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            first, second = means[name]
            means[name] = first, second = 0.8 * first + 0.2 * grad, 0.9 * second + 0.1 * grad**2
            move = first / (1 - 0.8 ** (step + 1))
            move /= np.sqrt(second / (1 - 0.9 ** (step + 1))) + 1e-8
            exact[name] = exact[name] - rate * (move + 0.1 * exact[name] * (name == "weight"))
            np.testing.assert_allclose(params[name], exact[name], rtol=1e-5, atol=1e-6)


def test_state_in_float32_whatever_the_weights():
    tx = in_float32(optax.scale_by_factored_rms())
    params = {"a": jnp.ones((256, 256), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32"), jnp.dtype("int32"),
    }  # fmt: skip


@pytest.mark.slow
def test_small_updates_of_bfloat16_weights_arrive_on_average():
    x = jnp.full(200_000, 0.02, jnp.bfloat16)
    update = jnp.full(200_000, -1e-5, jnp.float32)
    moved = apply_updates({"w": x}, {"w": update}, jax.random.key(0))["w"]
    assert moved.dtype == jnp.bfloat16 and (x + update.astype(jnp.bfloat16) == x).all()
    mean = float((moved.astype(jnp.float32) - x.astype(jnp.float32)).mean())
    assert mean == pytest.approx(-1e-5, rel=0.05)
    for exact in (0.0, -1.5, jnp.inf, -jnp.inf):
        assert stochastic_round(jnp.float32(exact), jax.random.key(1)) == exact
    assert jnp.isnan(stochastic_round(jnp.float32(jnp.nan), jax.random.key(1)))


def test_float32_weights_are_updated_as_by_optax():
    rng = np.random.default_rng(0)
    w, u = ({"w": jnp.asarray(rng.standard_normal(50), jnp.float32)} for _ in range(2))
    found = apply_updates(w, u, jax.random.key(0))
    np.testing.assert_array_equal(found["w"], optax.apply_updates(w, u)["w"])


def test_the_first_moment_in_bfloat16():
    config = OptimizerConfig(moment_dtype="bfloat16")
    params = {"weight": jnp.ones(3)}
    (adam, *_), *_ = optimizer(config, 10, KINDS).init(params)[1:]
    assert (adam.mu["weight"].dtype, adam.nu["weight"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("chosen", "freeze"),
    [
        ({"name": "adafactor"}, ()),
        ({"name": "muon", "moment_dtype": "bfloat16"}, ("attention", "shared_expert")),
    ],
    ids=["adafactor", "muon"],
)
def test_a_lean_run_resumes(tmp_path, chosen, freeze):
    """bfloat16 weights, the optimizer's state and the rounding's keys go on where they were."""

    values = TINY | {
        "moe": dataclasses.asdict(MoEConfig(4, 2, 1, 2, 1)),
        "optimizer": TINY["optimizer"] | chosen,
    }
    config = tiny_run(values, param_dtype="bfloat16", freeze=freeze)
    train(config, tmp_path / "straight", silent)
    # As if it had been broken off after step 2.
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    said = []
    train(config, tmp_path / "resumed", say=said.append)
    assert any("resumed from step 2 of 4" in message for message in said)
    ours, theirs = (read_lines(tmp_path / n / "metrics.jsonl") for n in ("resumed", "straight"))
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    ours, theirs = (
        jax.tree.leaves(nnx.state(load_checkpoint(tmp_path / name)))
        for name in ("resumed", "straight")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- Muon -----------------------------------------------------------------------------------

MUON = OptimizerConfig(
    name="muon", learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.1, clip_norm=1e12
)
# Axes and shape of each parameter, stacked over two layers except for the table.
STACKED = {
    "gate_up": (("expert", "expert_mlp", "expert_in"), (3, 8, 6)),
    "down": (("expert", "expert_mlp", "expert_out"), (3, 4, 5)),
    "query": (("heads", "head_dim", "embed"), (3, 2, 6)),
    "out": (("embed", "heads", "head_dim"), (6, 3, 2)),
    "ffn": (("mlp", "embed"), (8, 6)),
    "bias": (("heads", "head_dim"), (3, 2)),
    "router": (("router", "embed"), (3, 6)),
}
MUON_KINDS = {(name,): kind_of(axes) for name, (axes, _) in STACKED.items()} | KINDS


def _arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = {name: (2, *shape) for name, (_, shape) in STACKED.items()}
    shapes |= {"weight": (9, 6), "scale": (6,)}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


@functools.cache
def _muon():
    """Muon's initial state on _arrays, and its compiled update."""
    tx = optimizer(MUON, 10, MUON_KINDS)
    return tx.init(_arrays(0)), jax.jit(tx.update)


def _matrices(name, x):
    """The matrices [out, in] of a stack, as views that write to it."""
    for layer in x:
        if name == "gate_up":
            yield from (expert[rows] for expert in layer for rows in (slice(4), slice(4, 8)))
        elif name == "down":
            yield from (expert.T for expert in layer)
        else:
            yield layer.reshape({"query": (6, 6), "out": (6, 6), "ffn": (8, 6)}[name])


def _newton_schulz(x):
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.slow
def test_each_matrix_is_orthogonalized_by_itself():
    """Two steps against NumPy: momentum, Newton-Schulz, scale, rate and decay."""
    state, update = _muon()
    params, momentum = _arrays(0), {}
    for step in (1, 2):
        grads = _arrays(step)
        updates, state = update(grads, state, params)
        rate = learning_rate(MUON, 10)(step - 1)
        for name in ("gate_up", "down", "query", "out", "ffn"):
            grad = grads[name].astype(np.float64)
            momentum[name] = 0.95 * momentum.get(name, 0.0) + 0.05 * grad
            ahead = 0.95 * momentum[name] / (1 - 0.95 ** (step + 1))
            ahead = ahead + 0.05 * grad / (1 - 0.95**step)
            for x in _matrices(name, ahead):
                x[:] = 0.2 * np.sqrt(max(x.shape)) * _newton_schulz(x.copy())
            wanted = -rate * (ahead + 0.1 * params[name])
            np.testing.assert_allclose(updates[name], wanted, rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_all_other_parameters_get_adamws_update():
    state, update = _muon()
    adamw = optimizer(dataclasses.replace(MUON, name="adamw"), 10, MUON_KINDS)
    theirs = adamw.init(_arrays(0))
    for step in (1, 2):
        ours, state = update(_arrays(step), state, _arrays(0))
        wanted, theirs = jax.jit(adamw.update)(_arrays(step), theirs, _arrays(0))
        for name in ("bias", "router", "weight", "scale"):
            np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)
        assert not np.allclose(ours["ffn"], wanted["ffn"], rtol=0.1)


def test_an_experts_gradient_moves_no_other_matrix():
    state, update = _muon()
    grads = _arrays(1)
    before, _ = update(grads, state, _arrays(0))
    grads = _arrays(1)  # a new array: JAX may still be reading the other one
    grads["gate_up"][1, 2, :4] *= -3.0  # the gate of one expert
    after, _ = update(grads, state, _arrays(0))
    for name in before:
        same = np.asarray(before[name]) == np.asarray(after[name])
        if name == "gate_up":
            assert not same[1, 2, :4].any()
            same[1, 2, :4] = True
        assert same.all(), name


@pytest.mark.slow
def test_experts_are_orthogonalized_where_they_are():
    """The program of eight devices moves no expert, and gives one device's update."""
    model = mixture_model()
    freeze = ("embedding", "attention", "shared_expert", "lm_head")
    trained = trained_kinds(model, freeze)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    rng = np.random.default_rng(0)
    flat = {p: rng.standard_normal(np.shape(x)).astype(np.float32) for p, x in _flat(params)}
    grads = nnx.traversals.unflatten_mapping({path: flat[path] for path in trained})
    tx = optimizer(MUON, 10, trained)
    results, programs = [], []
    for mesh_config in (MeshConfig(1, 1, 1, 1), MeshConfig(1, 2, 4, 1)):
        size = np.prod(dataclasses.astuple(mesh_config))
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
        places, _ = sharding.param_shardings(model, mesh)
        of_state = sharding.like_params(tx.init(params), params, places, mesh)
        of_grads = nnx.traversals.unflatten_mapping(
            {path: place for path, place in _flat(places) if path in trained}
        )
        compiled = (
            jax.jit(tx.update, in_shardings=(of_grads, of_state, places))
            .lower(grads, tx.init(params), params)
            .compile()
        )
        programs.append(compiled.as_text())
        results.append(compiled(*jax.device_put(
            (grads, tx.init(params), params), (of_grads, of_state, places)
        ))[0])  # fmt: skip
    assert results[1]["runs"][0][0]["moe"]["down"].sharding.spec[1] == ("expert", "fsdp")
    distances = relative_distances(jax.device_get(results[1]), jax.device_get(results[0]))
    assert max(distances.values()) < 1e-5, distances
    sent = _collectives(programs[1])
    assert all(leaf.dims == () for leaf in sent), sent  # sums of the gradient's norm
    one, eight = (analyse(program).flops for program in programs)
    assert one == 8 * eight == newton_schulz_flops(model.config, freeze)


def _flat(tree):
    return nnx.traversals.flatten_mapping(tree).items()


def _collectives(text):
    """The results of all collectives of a program."""
    return [
        leaf
        for computation in parse(text).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
        for leaf in instruction.leaves
    ]


def test_muon_without_a_matrix_is_refused(tmp_path):
    values = TINY | {"optimizer": {"name": "muon"}}
    run = tiny_run(values, freeze=("norms", "dense_ffn", "attention", "experts"))
    words = (
        r"optimizer\.name=muon, but train\.freeze=attention,norms,dense_ffn,experts leaves no "
        r"matrix to Muon: remove attention or dense_ffn from train\.freeze, or set optimizer\.name "
        "to adamw"
    )
    with pytest.raises(InputError, match=words):
        train(run, tmp_path / "run", say=silent)
    assert not (tmp_path / "run").exists()


# --- schedules ------------------------------------------------------------------------------


def test_warmup_stable_decay():
    config = OptimizerConfig(
        learning_rate=8.0, final_learning_rate=2.0, schedule="wsd", warmup_fraction=0.2,
        decay_fraction=0.3,
    )  # fmt: skip
    rates = [float(learning_rate(config, 10)(step)) for step in range(12)]
    assert rates == [0.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0, 2.0]
    # A longer run has the same rates until its own decay.
    longer = [float(learning_rate(config, 20)(step)) for step in (4, 5, 13, 14, 17, 20)]
    assert longer == [8.0, 8.0, 8.0, 8.0, 5.0, 2.0]
    flat = dataclasses.replace(config, warmup_fraction=0.0, decay_fraction=0.0)
    assert [float(learning_rate(flat, 5)(step)) for step in (0, 1, 4)] == [8.0] * 3
    whole = dataclasses.replace(config, warmup_fraction=0.0, decay_fraction=1.0)
    assert [float(learning_rate(whole, 3)(step)) for step in range(4)] == [8.0, 6.0, 4.0, 2.0]


def test_unknown_optimizers_are_refused():
    from finermoe_jax.config.parse import default_config, run_config

    values = default_config().to_dict() | {"init_from": "somewhere"}
    values["optimizer"]["name"] = "sgd"
    with pytest.raises(InputError, match="'adamw', 'adafactor', 'muon'"):
        run_config(values)
