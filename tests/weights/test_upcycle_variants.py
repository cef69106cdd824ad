"""Starts of experts: drop-upcycling, noise, virtual groups, the function-preserving start."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.presets import ARCHITECTURES
from finermoe_jax.config.run import DataConfig, MeshConfig
from finermoe_jax.config.upcycle import UpcycleConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.model.decoder import Decoder, parameter_shapes
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.runtime.files import find
from finermoe_jax.training.initial import initial_model
from finermoe_jax.training.step import rebuild
from finermoe_jax.weights import lazy
from finermoe_jax.weights import upcycle_variants as starts
from finermoe_jax.weights.hf_names import run_layers
from finermoe_jax.weights.upcycle import upcycle_weights
from tests.support import SMALL, load_preset

DENSE = dataclasses.replace(SMALL, num_hidden_layers=2, initializer_range=0.3)
DU = ARCHITECTURES["du"]
PRESERVING = UpcycleConfig(function_preserving=True)


def _dense(dtype="float32"):
    return Decoder(DENSE, dtype="float32", param_dtype=dtype, rngs=nnx.Rngs(0))


def _params(model):
    return nnx.to_pure_dict(nnx.state(model))["runs"][0][0]


def _tokens(rows=4, length=16):
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (rows, length)), jnp.int32)


@pytest.mark.slow
def test_selection_biases_start_at_zero_and_change_nothing_else():
    dense, key = _dense("bfloat16"), jax.random.key(0)
    plain = MoEConfig(4, 2, 1, 2, 1)
    with_biases = dataclasses.replace(plain, selection_bias=True)
    ours, theirs = (
        nnx.traversals.flatten_mapping(_params(fm.upcycle_model(dense, moe, key)))
        for moe in (with_biases, plain)
    )
    names = {("moe", "expert_bias"): (2, 16), ("moe", "group_bias"): (2, 4)}
    assert ours.keys() - theirs.keys() == names.keys()
    for path, shape in names.items():
        assert ours[path].shape == shape and ours[path].dtype == jnp.float32
        assert not ours[path].any()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_drop_upcycling_redraws_one_set_of_channels_per_expert(dtype):
    rng = np.random.default_rng(0)
    width, size = 64, 32
    # Gate, up and down of different means and spreads: statistics are each matrix's own.
    gate, up = (rng.normal(m, s, (width, size)).astype(dtype) for m, s in ((1, 0.1), (-2, 0.3)))
    down = rng.normal(0.5, 0.05, (width, size)).astype(dtype)
    sets = []
    for expert in range(3):
        key = jax.random.fold_in(jax.random.key(1), expert)
        fused = starts.drop("gate_up", np.concatenate([gate, up]), 0.4, key)
        pairs = [
            (gate, fused[:width]),
            (up, fused[width:]),
            (down, starts.drop("down", down, 0.4, key)),
        ]
        changed = [(old != new).any(axis=1) for old, new in pairs]
        for (old, new), rows in zip(pairs, changed, strict=True):
            np.testing.assert_array_equal(rows, changed[0])
            assert new.dtype == dtype and rows.sum() == int(0.4 * width)
            was, drawn = old[rows].astype(np.float64), new[rows].astype(np.float64)
            # 25 * 32 draws: five standard errors of the mean and of the deviation.
            assert abs(drawn.mean() - was.mean()) < 5 * was.std() / np.sqrt(was.size)
            assert abs(drawn.std() / was.std() - 1) < 5 / np.sqrt(2 * was.size)
            assert abs(np.corrcoef(drawn.ravel(), was.ravel())[0, 1]) < 5 / np.sqrt(was.size)
        sets.append(tuple(np.flatnonzero(changed[0])))
    assert len(set(sets)) == 3
    np.testing.assert_array_equal(starts.drop("down", down, 0.01, key), down)


def test_drop_upcycling_draws_the_same_in_parts(monkeypatch):
    expert = np.random.default_rng(3).normal(size=(40, 7)).astype(np.float32)
    whole = starts.drop("down", expert, 0.5, jax.random.key(2))
    monkeypatch.setattr(starts, "_CHANNELS", 3)
    parts = starts.drop("down", expert, 0.5, jax.random.key(2))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)  # sums are of parts, too
    assert np.count_nonzero((whole != expert).any(1)) == 20


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", 3e38), ("bfloat16", 3e38), ("float32", np.nan)]
)
def test_drop_upcycling_draws_nothing_that_is_not_finite(dtype, value):
    expert = np.full((40, 7), 0.02, dtype)
    expert[:, ::2] = value
    with pytest.raises(fm.InputError, match="drop-upcycling draws"):
        starts.drop("down", expert, 0.9, jax.random.key(2))
    expert[:, ::2] = 1e25  # its square would not fit
    assert np.isfinite(starts.drop("down", expert, 0.9, jax.random.key(2)).astype(float)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_noise_is_a_share_of_each_matrix(dtype):
    rng = np.random.default_rng(0)
    width, size = 64, 32
    gate, up = (rng.normal(m, s, (width, size)).astype(dtype) for m, s in ((1, 0.1), (-2, 0.3)))
    key = jax.random.key(1)
    fused = starts.noise("gate_up", np.concatenate([gate, up]), 0.5, key)
    down = rng.normal(0.5, 0.05, (width, size)).astype(dtype)
    drawn = []
    for old, new in (
        (gate, fused[:width]),
        (up, fused[width:]),
        (down, starts.noise("down", down, 0.5, key)),
    ):
        assert new.dtype == dtype
        added = new.astype(np.float64) - old.astype(np.float64)
        unit = added / old.astype(np.float64).std() / 0.5
        # 64 * 32 draws: five standard errors.
        assert abs(unit.mean()) < 5 / np.sqrt(unit.size)
        assert abs(unit.std() - 1) < 5 / np.sqrt(2 * unit.size)
        drawn.append(unit.ravel())
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 5 / np.sqrt(width * size)


def test_noise_draws_nothing_that_is_not_finite():
    with pytest.raises(fm.InputError, match=r"upcycle\.copy_noise draws"):
        starts.noise("down", np.full((4, 7), np.inf, np.float32), 0.1, jax.random.key(2))


@pytest.mark.slow
def test_copies_of_one_slice_start_different_with_noise():
    dense, moe = _dense(), MoEConfig(4, 2, 1, 2, 1)
    tokens = _tokens()
    for start in (UpcycleConfig(copy_noise=0.01), dataclasses.replace(PRESERVING, copy_noise=0.01)):
        model = fm.upcycle_model(dense, moe, jax.random.key(0), start)
        gate_up = np.asarray(_params(model)["moe"]["gate_up"])  # [L, E, 2F, D]
        # Candidate groups of a slot: experts 0 to 3 and 4 to 7 are copies.
        same = [
            np.corrcoef(gate_up[0, e].ravel(), gate_up[0, e + 4].ravel())[0, 1] for e in range(4)
        ]
        assert all(0.999 < each < 1 - 1e-6 for each in same)
    # The second start preserves the dense model's outputs.
    np.testing.assert_allclose(model(tokens).logits, dense(tokens).logits, rtol=0, atol=1e-4)


def test_any_block_of_a_start_equals_the_whole():
    weights = lazy.of_params(nnx.to_pure_dict(nnx.state(_dense())))
    noisy = dataclasses.replace(DU, upcycle=UpcycleConfig(copy_noise=0.1))
    for one in (DU, ARCHITECTURES["nvshard"], noisy):
        made = [
            upcycle_weights(DENSE, weights, one.moe, jax.random.key(3), one.upcycle)[1]
            for _ in range(2)
        ]
        for name in ("gate_up", "down", "router"):
            whole = made[0]["runs", 0, 0, "moe", name][:]
            parts = made[1]["runs", 0, 0, "moe", name]
            # Backwards, and cut along every axis.
            for layer in (1, 0):
                for expert in reversed(range(one.moe.num_experts)):
                    place = (slice(layer, layer + 1), slice(expert, expert + 1), slice(5, 30))
                    np.testing.assert_array_equal(parts[place], whole[place])


def test_every_layer_and_parameter_is_drawn_with_a_key_of_its_own():
    """Of all that is drawn no two share a beginning, nor does another seed draw any of it."""
    dense = dataclasses.replace(DENSE, num_hidden_layers=4)
    moe = MoEConfig(
        4, 2, 1, 2, 1, concat_proj="routed", separate_routers=True, mlp_only_layers=(1,)
    )
    zeros = jax.tree.map(lambda shape: np.zeros(shape, np.float32), dict(parameter_shapes(dense)),
                         is_leaf=lambda leaf: isinstance(leaf, tuple))  # fmt: skip
    weights = lazy.of_params(nnx.traversals.unflatten_mapping(zeros))
    beginnings = []
    for seed in (0, 1):
        _, made = upcycle_weights(dense, weights, moe, jax.random.key(seed))
        for path, array in made.items():
            if path[-1] in ("router", "group_router", "shared_gate", "concat_proj"):
                # One key draws the same beginning for every shape.
                beginnings += [layer.ravel()[:32] for layer in array[:]]
    assert len(beginnings) == 2 * 3 * 4  # seeds, MoE layers, parameters
    alike = np.corrcoef(np.stack(beginnings).astype(float)) - np.eye(len(beginnings))
    assert np.abs(alike).max() < 0.9


def test_some_layers_of_a_mixture_are_those_layers_of_the_dense_model():
    """Copied weights land in their own layer, however the layers fall into runs."""
    dense = dataclasses.replace(DENSE, num_hidden_layers=5)
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.standard_normal(shape, np.float32)
        for path, shape in parameter_shapes(dense).items()
    }
    moe = MoEConfig(1, 1, 1, 2, 1, mlp_only_layers=(0, 3))
    weights = lazy.of_params(nnx.traversals.unflatten_mapping(arrays))
    config, made = upcycle_weights(dense, weights, moe, jax.random.key(0))
    assert len(config.layer_runs) > 1
    for path, array in made.items():
        if path[0] != "runs":
            continue
        for got, layer in zip(array[:], run_layers(config, *path[1:3]), strict=True):
            ffn = {n: arrays["runs", 0, 0, "mlp", n][layer] for n in ("gate", "up", "down")}
            if path[3:] == ("moe", "gate_up"):
                wanted = np.stack([np.concatenate([ffn["gate"], ffn["up"]])] * 2)
            elif path[3:] == ("moe", "down"):
                wanted = np.stack([ffn["down"].T] * 2)
            elif path[3:5] == ("moe", "shared"):
                wanted = ffn[path[5]]
            elif path[3] == "moe":
                continue  # drawn
            else:
                wanted = arrays["runs", 0, 0, *path[3:]][layer]
            np.testing.assert_array_equal(got, wanted, err_msg=str((layer, path)))


@pytest.mark.slow
def test_a_runs_seed_draws_what_is_new_and_nothing_else():
    def placed(seed, **changes):
        config = dataclasses.replace(load_preset("demo"), **changes)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        start = initial_model(config)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        params = start.place(sharding.param_shardings(start.model, mesh)[0])
        return nnx.traversals.flatten_mapping(jax.device_get(params))

    def changed(**changes):
        first, other = (placed(seed, **changes) for seed in (1, 2))
        return {path[-1] for path in first if not np.array_equal(first[path], other[path])}

    assert changed() == {"router", "shared_gate"}
    model = dataclasses.replace(SMALL, vocab_size=2048, num_hidden_layers=1)
    scratch = dict(init_from="", moe=None, dense=model)
    scratch["data"] = DataConfig(path="x", tokenizer="demo/model", global_batch_size=1)
    assert {"weight", "query", "gate", "down"} <= changed(**scratch)


@pytest.mark.slow
def test_a_model_drawn_from_scratch_repeats_no_layer():
    config = dataclasses.replace(DENSE, num_hidden_layers=3, moe=MoEConfig(4, 2, 1, 2, 1))
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    for path, stack in nnx.traversals.flatten_mapping(_params(model)).items():
        if path[-1] != "scale" and not path[-1].endswith("_bias"):  # ones, and zeros
            assert len({layer.tobytes() for layer in np.asarray(stack)}) == 3, path


def test_drop_upcycled_layers_and_experts_differ():
    params = _params(fm.upcycle_model(_dense(), DU.moe, jax.random.key(0), DU.upcycle))
    dense = _params(_dense())["mlp"]
    kept = np.asarray(params["moe"]["down"]) == np.swapaxes(dense["down"], 1, 2)[:, None]
    sets = {tuple(np.flatnonzero(~rows.all(axis=1))) for rows in kept.reshape(16, 64, 32)}
    assert len(sets) == 16 and {len(s) for s in sets} == {32}


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
def test_virtual_groups_choose_one_copy_of_every_slice(copies):
    # With copies=2 the tokens choose the best two of the eight.
    one = ARCHITECTURES["nvshard"]
    moe = dataclasses.replace(one.moe, active_per_group=8 * copies)
    dense = _dense()
    model = fm.upcycle_model(dense, moe, jax.random.key(0), one.upcycle)
    ids = _tokens(8, 32)
    out, wanted = model(ids), dense(ids)
    np.testing.assert_allclose(out.logits, wanted.logits, rtol=0, atol=1e-4)
    chosen_copies = set()
    for routing in out.routing:
        experts = np.asarray(routing.experts)
        slices = np.sort(experts % 8, axis=-1)
        assert (slices == np.repeat(np.arange(8), copies)).all()
        whole = np.sort(experts // 8, axis=-1)
        assert (whole == np.repeat(whole[..., ::8], 8, axis=-1)).all()
        chosen_copies |= set(whole.ravel())
    assert len(chosen_copies) > 4
    if copies == 1:
        np.testing.assert_allclose(out.routing[0].weights, 1 / 8, rtol=1e-6)


@pytest.mark.slow
def test_one_layer_of_virtual_groups_is_the_dense_ffn():
    one = ARCHITECTURES["nvshard"]
    model = fm.upcycle_model(_dense(), one.moe, jax.random.key(0), one.upcycle)
    layer = FineRMoE(model.config, "float32", nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda p: p[0], _params(model)["moe"]))
    x = np.random.default_rng(1).normal(size=(2, 16, 32)).astype(np.float32)
    y, _, _ = jax.jit(nnx.merge(graphdef, state))(jnp.asarray(x), jnp.ones((2, 16), bool))
    ffn = {k: np.asarray(p[0], np.float64) for k, p in _params(_dense())["mlp"].items()}
    gate, up = x @ ffn["gate"].T, x @ ffn["up"].T
    wanted = (gate / (1 + np.exp(-gate)) * up) @ ffn["down"].T
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_function_preserving_start_has_the_dense_logits():
    # The demo's base: trained weights, whose logits the published start moves.
    dense = fm.load_hf(find("demo/model"), dtype="float32")
    moe = MoEConfig(8, 2, 1, 2, 1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2048, (2, 32)), jnp.int32)
    wanted = dense(ids).logits

    def away(start):
        model = fm.upcycle_model(dense, moe, jax.random.key(0), start)
        return float(jnp.abs(model(ids).logits - wanted).max())

    assert away(PRESERVING) < 1e-4 and away(UpcycleConfig()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("across", [1, 2])
def test_function_preserving_start_holds_in_bfloat16_and_beside_ablations(across):
    """With pools, too."""
    dense = _dense("bfloat16")
    ablations = dict(concat_proj="routed", separate_routers=True)
    moe = MoEConfig(4, 2, 1, 2, 1, experts_across=across, **ablations)
    model = fm.upcycle_model(dense, moe, jax.random.key(0), PRESERVING)
    np.testing.assert_allclose(model(_tokens()).logits, dense(_tokens()).logits, rtol=0, atol=1e-4)


@pytest.mark.nightly
def test_every_expert_of_the_function_preserving_start_learns_within_two_steps():
    moe = MoEConfig(4, 2, 1, 2, 1)
    model = fm.upcycle_model(_dense(), moe, jax.random.key(0), PRESERVING)
    graphdef, state = nnx.split(model)
    ids = _tokens(8, 33)

    def loss(params):
        out = rebuild(graphdef, params)(ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, ids[:, 1:])
        chosen = jnp.stack([r.experts.reshape(-1) for r in out.routing])
        return losses.mean(), chosen

    params, learned = nnx.to_pure_dict(state), {}
    tokens = np.zeros((2, 16), bool)
    for step in range(2):
        (_, chosen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        for layer, experts in enumerate(np.asarray(chosen)):
            tokens[layer, experts] = True
        grads_of = grads["runs"][0][0]["moe"]
        for name in ("gate_up", "down", "router"):
            moved = np.abs(np.asarray(grads_of[name])).reshape(2, 16, -1).max(axis=-1) > 0
            learned[name] = learned.get(name, False) | moved
        if step == 0:  # the down-projections alone, which are what is zero
            assert not learned["gate_up"].any() and learned["down"].any()
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert tokens.sum() > 20
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(learned[name], tokens, err_msg=name)
    assert learned["router"].all()


def test_a_drop_ratio_below_one_channel_is_refused():
    start = UpcycleConfig(drop_ratio=0.01)
    words = r"drop_ratio=0\.01 is less than one of an expert's 8 channels: set at least 0\.125"
    with pytest.raises(InputError, match=words):
        fm.upcycle_model(_dense(), MoEConfig(8), jax.random.key(0), start)


def test_starts_that_cannot_hold_are_refused():
    moe = MoEConfig(4, 2, 1, 2, 1, concat_proj="all")
    with pytest.raises(InputError, match="concat_proj=all"):
        fm.upcycle_model(_dense(), moe, jax.random.key(0), PRESERVING)


def test_concat_proj_may_start_at_zero():
    moe = MoEConfig(4, 2, 1, 2, 1, concat_proj="routed")
    for std in (0.0, 0.5):
        start = UpcycleConfig(concat_proj_std=std)
        model = fm.upcycle_model(_dense(), moe, jax.random.key(0), start)
        drawn = np.asarray(_params(model)["moe"]["concat_proj"])
        assert abs(drawn.std() - std) <= 0.05 * std
