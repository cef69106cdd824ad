"""The training step, the loss, sharding, and a run that stops and goes on."""

import dataclasses
import functools
import json
import math
import re
import shutil
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.data.rows import Mixture, Packed
from finermoe_jax.data.token_files import TokenStream
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation.evaluate import held_out_loss
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.model.decoder import Decoder, with_shapes
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.moe.balance import load_balancing_loss
from finermoe_jax.moe.psr import reuse_at
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.initial import initial_model
from finermoe_jax.training.monitor import MEASURED
from finermoe_jax.training.optimizer import decayed, learning_rate
from finermoe_jax.training.run import check_run, train
from finermoe_jax.training.step import batch_loss, rebuild, train_step
from finermoe_jax.weights.checkpoint import load_checkpoint, read_stored_origin, save_checkpoint
from finermoe_jax.weights.model_card import Origin
from tests.support import SMALL, load_preset
from tests.support.training import (
    MOE,
    TINY,
    assert_same_steps,
    demo_run,
    mixture_model,
    random_tokens,
    relative_distances,
    silent,
    small_run,
    take_steps,
    tiny_run,
)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["batch", "bias"])
def test_balancing_is_the_same_on_a_mesh(kind):
    """The load is that of the global batch, also with accumulation."""
    balance = dict(kind=kind, weight=0.5, z_loss=0.01, bias_rate=0.1)
    moe = dataclasses.replace(MOE.moe, selection_bias=kind == "bias")
    model = dataclasses.replace(MOE, num_hidden_layers=1, moe=moe)
    config = small_run(8, balance=balance, grad_accumulation=2 if kind == "batch" else 1)
    meshes = MeshConfig(1, 1, 1, 1), MeshConfig(2, 2, 2, 1)
    one, eight = (take_steps(config, mesh, 2, model) for mesh in meshes)
    assert_same_steps(eight, one)
    flat = nnx.traversals.flatten_mapping
    names = "expert_bias", "group_bias"
    biases = {path: leaf for path, leaf in flat(one[2]).items() if path[-1] in names}
    assert len(biases) == (2 if kind == "bias" else 0)
    for path, leaf in biases.items():
        assert np.abs(leaf).max() > 0.05
        np.testing.assert_allclose(flat(eight[2])[path], leaf, atol=1e-7)


@pytest.fixture(scope="module")
def one_device():
    return take_steps(small_run(8), MeshConfig(1, 1, 1, 1), 20)


@pytest.mark.nightly
def test_loss_falls(one_device):
    assert one_device[0][-1, 0] < one_device[0][0, 0]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(8, 1, 1, 1),
        MeshConfig(1, 8, 1, 1),
        MeshConfig(1, 1, 8, 1),
        MeshConfig(1, 1, 1, 8),  # 4 query and 2 kv heads: both stay whole
        MeshConfig(2, 2, 2, 1),  # with the next two, every pair of axes
        MeshConfig(2, 1, 2, 2),
        MeshConfig(1, 2, 2, 2),
    ],
)
def test_every_mesh_gives_one_devices_result(mesh, one_device):
    assert_same_steps(take_steps(small_run(8), mesh, 20), one_device)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("parts", "mesh", "remat"),
    [(4, MeshConfig(1, 1, 1, 1), "none"), (2, MeshConfig(1, 2, 2, 2), "full")],
)
def test_accumulation_equals_the_large_batch(parts, mesh, remat, one_device):
    assert_same_steps(
        take_steps(small_run(8, grad_accumulation=parts, remat=remat), mesh), one_device
    )


@pytest.mark.nightly
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_nothing(remat, one_device):
    assert_same_steps(take_steps(small_run(8, remat=remat), MeshConfig(1, 1, 1, 1)), one_device)


@pytest.mark.nightly
def test_chunked_loss_is_the_plain_cross_entropy():
    model, batch = mixture_model(), random_tokens(3)
    out = model(batch[:, :-1])
    nll = -jnp.take_along_axis(
        jax.nn.log_softmax(out.logits), batch[:, 1:, None], axis=-1
    )[..., 0]  # fmt: skip
    mask = jnp.asarray(np.random.default_rng(1).random(nll.shape) < 0.7)
    hidden = model.features(batch[:, :-1]).hidden
    for chunk in (1, 15, 21, 1000):
        total = cross_entropy_sum(model, hidden, batch[:, 1:], mask, chunk)
        np.testing.assert_allclose(total, jnp.where(mask, nll, 0).sum(), rtol=1e-5)


@pytest.mark.nightly
def test_logits_exist_for_one_chunk_only():
    """Forward and backward: no buffer of the program pairs more tokens with the vocabulary."""
    vocab, chunk = 997, 8
    model = mixture_model(dataclasses.replace(MOE, vocab_size=vocab))
    graphdef, state = nnx.split(model)
    config = small_run(8, loss_chunk_tokens=chunk)
    grad = jax.jit(
        lambda p, b: jax.grad(batch_loss, argnums=2, has_aux=True)(graphdef, config, p, b)
    )
    text = grad.lower(nnx.to_pure_dict(state), Batch(random_tokens(8))).compile().as_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    others = [math.prod(dims) // vocab for dims in shapes if vocab in dims]
    # The weights of embedding and head, stacked layers of none; 8 x 16 tokens would be 128.
    assert max(others) == max(chunk, MOE.hidden_size) < 128


def _documents(lengths, order):
    """Packed rows of 17, in the given order of documents; each document's tokens are its own."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(1, 64, n) for n in lengths]
    stream = TokenStream([documents[i] for i in order])
    starts = np.asarray(stream.starts[:-1])
    return Mixture([Packed(stream, starts, 16, 0, len(stream))], ["x"], [Fraction(1)])


def _eight(batch):
    """With empty rows behind: one program for all batches."""
    return jax.tree.map(lambda x: jnp.asarray(np.pad(x, ((0, 8 - len(x)), (0, 0)))), batch)


@functools.partial(jax.jit, static_argnames="parts")
def _packed_gradient(params, batch, parts=1):
    """Loss and gradient as train_step takes them."""
    graphdef = nnx.split(mixture_model())[0]
    config = small_run(len(batch.tokens), balance=dict(weight=0.0), grad_accumulation=parts)
    take = optax.GradientTransformation(
        lambda params: (optax.ScaleByScheduleState(jnp.int32(0)), None),
        lambda grads, state, params: (jax.tree.map(lambda g: -g, grads), state),
    )
    after, _, metrics = train_step(graphdef, config, take, params, take.init(params), batch)
    return metrics["loss"], jax.tree.map(lambda a, b: b - a, after, params), metrics["aux_loss"]


@pytest.mark.nightly
def test_packed_documents_do_not_see_each_other():
    """Loss and gradient of packed rows are those of the documents, each alone in a row."""
    lengths = (5, 9, 2, 17, 3, 11, 1, 6, 30, 4)
    params = nnx.to_pure_dict(nnx.state(mixture_model()))
    packed = _documents(lengths, range(10))
    rows = _eight(packed.read(range(len(packed))))
    loss, grads, _ = _packed_gradient(params, rows)
    total, count, sums = 0.0, 0, None
    for document in range(len(lengths)):
        if lengths[document] == 1:
            continue
        stream = packed.parts[0].tokens.arrays[document]
        alone = np.zeros((8, 17), np.int32), np.zeros((8, 17), np.int32)
        pieces = [stream[:17], stream[16:]]
        for row, piece in enumerate(pieces):
            alone[0][row, : len(piece)], alone[1][row, : len(piece)] = piece, 1
        one, grad, _ = _packed_gradient(params, Batch(*map(jnp.asarray, alone)))
        n = lengths[document] - 1
        total, count = total + float(one) * n, count + n
        grad = jax.tree.map(lambda g, n=n: g * n, grad)
        sums = grad if sums is None else jax.tree.map(jnp.add, sums, grad)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    distances = relative_distances(grads, jax.tree.map(lambda g: g / count, sums))
    assert max(distances.values()) < 1e-5, distances
    # However they are packed, and however the batch is cut into microbatches.
    other = _documents(lengths, np.random.default_rng(0).permutation(10))
    other_rows = _eight(other.read(range(len(other))))
    other_loss, other_grads, _ = _packed_gradient(params, other_rows)
    assert (other_rows.segment_ids != rows.segment_ids).any()
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    assert max(relative_distances(other_grads, grads).values()) < 1e-5
    parts_loss, parts_grads, _ = _packed_gradient(params, rows, parts=4)
    np.testing.assert_allclose(parts_loss, loss, rtol=1e-5)
    assert max(relative_distances(parts_grads, grads).values()) < 1e-5


@pytest.mark.nightly
def test_padding_balances_no_experts():
    """Neither padding's tokens nor its place touch the load-balancing loss."""
    batch = _eight(_documents((9, 7, 4), range(3)).read([0, 1]))
    params = nnx.to_pure_dict(nnx.state(mixture_model()))
    aux = [
        _packed_gradient(
            params, Batch(jnp.where(batch.segment_ids == 0, filler, batch.tokens),
                          batch.segment_ids),
        )[2]
        for filler in (0, 63)
    ]  # fmt: skip
    assert float(aux[0]) == float(aux[1]) > 0


@pytest.mark.slow
def test_windows_need_no_masks():
    """The program of whole windows is the one without segments: no mask reaches attention."""
    graphdef, state = nnx.split(mixture_model())
    config = small_run(4)
    tokens = random_tokens(4)

    def program(batch):
        loss = lambda p: batch_loss(graphdef, config, p, batch)[0]  # noqa: E731
        return str(jax.make_jaxpr(loss)(nnx.to_pure_dict(state)))

    def plain(p):
        model = rebuild(graphdef, p)
        features = model.features(tokens[:, :-1])
        mask = jnp.ones(tokens[:, 1:].shape, bool)
        total = cross_entropy_sum(model, features.hidden, tokens[:, 1:], mask, 16)
        return total / tokens[:, 1:].size + 0.001 * features.aux_loss.sum()

    plain_program = str(jax.make_jaxpr(plain)(nnx.to_pure_dict(state)))
    assert program(Batch(tokens)).count("\n") <= plain_program.count("\n")
    assert program(Batch(tokens, jnp.ones_like(tokens))).count("\n") > plain_program.count("\n")


@pytest.mark.nightly
def test_the_program_does_not_grow_with_depth():
    def size(layers):
        config = dataclasses.replace(MOE, num_hidden_layers=layers)
        graphdef, state = nnx.split(with_shapes(config))

        def loss(state):
            features = nnx.merge(graphdef, state).features(random_tokens(1))
            return features.hidden.sum() + features.aux_loss.sum()

        return jax.jit(jax.grad(loss)).lower(state).as_text().count("\n")

    # Each MoE layer's aux loss is unstacked for the caller; nothing else may grow.
    assert size(8) - size(4) < 0.02 * size(4)


@pytest.mark.nightly
def test_each_layers_tokens_come_in_order_and_padding_is_not_counted():
    moe = MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(2, 5))  # runs of (moe, moe, dense)
    model = mixture_model(dataclasses.replace(SMALL, num_hidden_layers=6, moe=moe))
    ids, mask = random_tokens(3), np.ones((3, 17), bool)
    mask[0, :5] = mask[2, 9:] = False
    features = nnx.jit(lambda model, *batch: model.features(*batch))(
        model, ids, mask.astype(np.int32)
    )
    assert len(features.routing) == len(features.expert_tokens) == 4
    for layer, (logits, experts, _) in enumerate(features.routing):
        counted = np.bincount(np.asarray(experts)[mask].ravel(), minlength=16)
        np.testing.assert_array_equal(features.expert_tokens[layer], counted)
        loss = load_balancing_loss(logits, experts, jnp.asarray(mask))
        np.testing.assert_allclose(features.aux_loss[layer], loss, rtol=1e-5)


def test_schedule_warms_up_and_ends_at_the_final_rate():
    config = load_preset("qwen0p5b").optimizer
    rate = learning_rate(config, 3000)
    assert float(rate(0)) == 0 and float(rate(15)) == pytest.approx(5e-6)
    assert float(rate(30)) == pytest.approx(1e-5) and float(rate(3000)) == pytest.approx(1e-7)


@pytest.mark.slow
def test_norms_and_biases_are_not_decayed():
    model = mixture_model()
    flags = decayed(nnx.to_pure_dict(nnx.state(model)), kinds(model))
    flags = nnx.traversals.flatten_mapping(flags)
    kept = {"/".join(map(str, path[3:])) for path, flag in flags.items() if not flag}
    kept.discard("")
    assert kept == {
        "input_norm/scale", "post_norm/scale", "attention/query_bias", "attention/key_bias",
        "attention/value_bias", "attention/query_norm/scale", "attention/key_norm/scale",
    }  # fmt: skip
    assert not flags[("final_norm", "scale")] and flags[("embed", "weight")]


def test_axes_that_do_not_divide_stay_whole_and_are_named():
    model = mixture_model()
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 4), jax.devices()[:4])
    _, notes = sharding.param_shardings(model, mesh)
    assert any("kv_heads of size 2" in note and "tensor=4" in note for note in notes)
    assert not any("/query:" in note for note in notes)


def test_axes_without_a_rule_and_axes_that_collide_are_refused():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])
    with pytest.raises(InputError, match="w: logical axis 'nowhere' has no rule"):
        sharding.spec(("nowhere",), (4,), mesh, "w")
    with pytest.raises(InputError, match=r"'heads' and 'mlp' both claim mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"), (4, 4), mesh, "w")
    with pytest.raises(InputError, match="needs 3 devices, but 8 devices are available"):
        sharding.make_mesh(MeshConfig(3, 1, 1, 1))


# --- whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "straight"
    train(demo_run(4), workdir, say=lambda _: None)
    return workdir


@pytest.mark.nightly
def test_a_run_leaves_what_the_readme_names(straight):
    for name in ("config.json", "metrics.jsonl", "evals.jsonl", "samples.jsonl", "loss.png"):
        assert (straight / name).stat().st_size > 0, name
    lines = read_lines(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    needed = {"loss", "aux_loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert all(needed <= line.keys() for line in lines)
    names = [e["name"] for e in read_lines(straight / "evals.jsonl")]
    assert names == ["dense base", "step 0", "step 4"]
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["0", "2", "4"]
    files = {p.name for p in (straight / "checkpoints" / "4" / "tokenizer").iterdir()}
    assert "tokenizer.json" in files


@pytest.mark.nightly
def test_resuming_gives_the_same_run(straight, tmp_path):
    workdir = tmp_path / "resumed"

    class Stop(Exception):
        pass

    def stop_at_three(message):
        if message.startswith("held-out loss  step 3"):
            raise Stop

    # The first part is the same run, broken off by an exception while scoring step 3. What it
    # began from is gone when it goes on: the workdir is enough.
    source = tmp_path / "source"
    shutil.copytree(find("demo/model"), source)
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    (source / "README.md").write_text("---\nbase_model: someone/base\nlicense: mit\n---\n")
    config = dataclasses.replace(demo_run(4), init_from=str(source))
    part = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=1))
    with pytest.raises(Stop):
        train(part, workdir, say=stop_at_three)
    shutil.rmtree(source)
    said = []
    train(part, workdir, say=said.append)
    assert any("resumed from step 2 of 4" in message for message in said)
    kept = workdir / "checkpoints" / "4" / "tokenizer" / "generation_config.json"
    assert json.loads(kept.read_text()) == {"eos_token_id": [0, 1]}
    for step in ("2", "4"):  # before and after
        origin = read_stored_origin(workdir / "checkpoints" / step)
        assert origin == Origin(("someone/base",), "mit", upcycling=config.upcycle)
    ours, theirs = (read_lines(d / "metrics.jsonl") for d in (workdir, straight))
    for line in ours + theirs:
        for name in MEASURED:
            del line[name]
    assert ours == theirs
    # Step 3, the first one after, masks a quarter of a group's experts as the other run does.
    loads = read_lines(workdir / "expert_load.jsonl")
    assert loads == read_lines(straight / "expert_load.jsonl")
    assert [min(load["dead"]) >= 32 for load in loads] == [True, False]  # half of them at step 1
    for a, b in zip(
        jax.tree.leaves(nnx.state(load_checkpoint(workdir))),
        jax.tree.leaves(nnx.state(load_checkpoint(straight))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.nightly
def test_evaluation_never_masks(straight, tmp_path, monkeypatch):
    """The run's own held-out loss, in the middle of its masks, is that of the model without any."""
    setup = check_run(demo_run(4), tmp_path / "none", silent)
    recorded = {e["name"]: e["loss"] for e in read_lines(straight / "evals.jsonl")}["step 0"]
    model, rows = load_checkpoint(straight / "checkpoints" / "0"), setup.data.held_out
    assert held_out_loss(model, rows, 4, 1024) == pytest.approx(recorded, abs=1e-5)
    psr = reuse_at(jnp.int32(0), setup.config.train, model.config.moe)
    features = Decoder.features
    monkeypatch.setattr(Decoder, "features", lambda *a, **k: features(*a, **k | {"psr": psr}))
    masked = held_out_loss(model, rows, 4, 1023)  # another size: compiled anew
    assert abs(masked - recorded) > 1e-3


BIASED = TINY | {
    "moe": dict(intermediate_granularity=4),
    "balance": dict(kind="bias", bias_rate=0.01),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "biased"
    train(tiny_run(BIASED), workdir, say=silent)
    return workdir


def _flat_state(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


@pytest.mark.nightly
def test_selection_biases_resume_to_the_bit(biased, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(biased, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    train(tiny_run(BIASED), workdir, say=silent)
    ours, theirs = (_flat_state(load_checkpoint(each)) for each in (workdir, biased))
    assert ours.keys() == theirs.keys()
    for path, variable in ours.items():
        np.testing.assert_array_equal(variable[...], theirs[path][...], err_msg=str(path))
    moved = theirs["runs", 0, 0, "moe", "expert_bias"][...]
    # Four steps of 0.01, with each group's mean taken off.
    assert 0.01 < np.abs(moved).max() < 0.08
    lines = [read_lines(each / "metrics.jsonl") for each in (workdir, biased)]
    for line in [*lines[0], *lines[1]]:
        for name in MEASURED:
            del line[name]
    assert lines[0] == lines[1]


@pytest.mark.nightly
def test_runs_from_a_checkpoint_with_and_without_selection_biases(biased, tmp_path):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def started(source, balance):
        # Weights of another dtype than the checkpoint's, to see that the biases keep theirs.
        values = {"init_from": str(source), "moe": None, "balance": balance}
        initial = initial_model(tiny_run(TINY | values | {"dense": None}, param_dtype="bfloat16"))
        shapes = nnx.to_pure_dict(nnx.state(initial.model))
        params = initial.place(jax.tree.map(lambda _: place, shapes))
        flat = nnx.traversals.flatten_mapping(params)
        assert initial.dense is None
        return initial.model.config.moe, {path[-1]: leaf for path, leaf in flat.items()}

    moe, kept = started(biased, dict(kind="sequence"))
    trained = {path[-1]: leaf[...] for path, leaf in _flat_state(load_checkpoint(biased)).items()}
    for name in ("expert_bias", "group_bias"):
        assert moe.selection_bias and kept[name].dtype == jnp.float32
        np.testing.assert_array_equal(kept[name], trained[name])
    assert kept["router"].dtype == jnp.bfloat16

    plain = dataclasses.replace(MOE, num_hidden_layers=1)
    save_checkpoint(mixture_model(plain), tmp_path / "plain")
    moe, made = started(tmp_path / "plain", dict(kind="bias"))
    assert moe.selection_bias and made["expert_bias"].dtype == jnp.float32
    assert not made["expert_bias"].any() and not made["group_bias"].any()
    assert not started(tmp_path / "plain", dict(kind="batch"))[0].selection_bias


@pytest.mark.nightly
def test_a_run_without_selection_biases_cannot_resume_with_them(biased, tmp_path):
    dense = tiny_run(TINY | {"balance": dict(kind="bias")})
    with pytest.raises(InputError, match=r"balance\.kind=bias .* the model has none: set moe"):
        train(dense, tmp_path / "dense", say=silent)
    words = (
        r"moe\.selection_bias: True in the run, False in the.*start a new --workdir with init_from"
    )
    with pytest.raises(InputError, match=words):
        changed = BIASED | {"balance": dict(kind="none")}
        train(tiny_run(changed), biased, say=silent, allow_changes=["balance"])


def test_balancing_over_pools_needs_pools(tmp_path):
    for moe, found in ((dict(intermediate_granularity=4), "experts_across=1"), (None, "no expert")):
        values = TINY | {"moe": moe, "balance": dict(over="pool")}
        with pytest.raises(InputError, match=rf"balance\.over=pool is .*the model has .*{found}"):
            train(tiny_run(values), tmp_path / "run", say=silent)


@pytest.mark.parametrize(
    ("settings", "moe", "words"),
    [
        (dict(psr_mask="foreign"), {}, r"psr_mask=foreign has no effect with train\.psr=none"),
        (dict(psr="linear", force_balance=True), {}, r"force_balance=true .* train\.psr=linear"),
        ({}, dict(pooled_as="candidates"), r"pooled_as=candidates .* moe\.experts_across=1"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings, moe, words):
    """By a new run. A config.json with them is still read."""
    config = tiny_run(TINY | {"moe": dict(intermediate_granularity=4) | moe}, **settings)
    with pytest.raises(InputError, match=words):
        train(config, tmp_path / "run", say=silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_workdir_keeps_its_config(straight):
    before = sorted((p, p.stat().st_mtime_ns) for p in straight.rglob("*"))
    with pytest.raises(InputError, match=r"train.seed: 0 in the run, 7 in the config"):
        train(demo_run(4, seed=7), straight, say=lambda _: None)
    assert sorted((p, p.stat().st_mtime_ns) for p in straight.rglob("*")) == before


@pytest.mark.nightly
def test_a_workdir_keeps_its_data(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run" / "data.json"
    found = json.loads(path.read_text())
    assert found["sources"][0]["tokens"] > 100_000 and found["sources"][0]["weight"] == "1"
    found["sources"][0] |= {"tokens": 12, "path": "elsewhere"}
    path.write_text(json.dumps(found))
    with pytest.raises(InputError) as error:
        train(demo_run(4), tmp_path / "run", say=lambda _: None)
    assert "with other data:\n  source 1.tokens: 12 in the run, 378304 now" in str(error.value)
    assert "elsewhere" not in str(error.value)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and contains no run"):
        train(demo_run(4), tmp_path, say=lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            dict(balance=dict(kind="bias", weight=0.5)),
            r"balance\.weight=0\.5 .* balance\.kind=bias: set .*sequence",
        ),
        (
            dict(balance=dict(kind="none", weight=0.5)),
            r"balance\.weight=0\.5 has no effect with .*kind=none",
        ),
        (
            dict(balance=dict(bias_rate=0.5)),
            r"bias_rate=0\.5 .*=sequence: set balance\.kind=bias, or remove",
        ),
        (
            dict(optimizer=dict(name="adafactor", beta2=0.99)),
            r"beta2=0\.99 .* optimizer\.name=adafactor: set optimizer\.name=adamw or muon, or rem",
        ),
        (dict(train=dict(psr_end=0.5)), r"psr_end=0\.5 .* train\.psr=none: set .*psr=linear or st"),
    ],
)
def test_fields_that_another_field_makes_the_run_ignore(tmp_path, values, words):
    moe = dict(intermediate_granularity=4)
    values = values | {"train": TINY.get("train", {}) | values.get("train", {})}
    with pytest.raises(InputError, match=words):
        check_run(tiny_run(TINY | {"moe": moe} | values), tmp_path, silent)


@pytest.mark.slow
def test_frozen_parts_that_the_model_lacks(tmp_path):
    said = []
    config = tiny_run(freeze=("norms", "shared_gate", "router"))
    check_run(config, tmp_path, said.append)
    assert "train.freeze: this model has no router and no shared_gate" in said


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("freeze", "parts", "mesh"),
    [
        (("attention", "dense_ffn", "lm_head"), 1, MeshConfig(1, 1, 1, 1)),
        (("norms", "router", "experts"), 2, MeshConfig(1, 2, 2, 1)),
    ],
)
def test_frozen_parts(one_device, freeze, parts, mesh):
    """Trained parameters keep their gradients; the rest stands still, without moments."""
    flat = nnx.traversals.flatten_mapping
    before = flat(nnx.to_pure_dict(nnx.state(mixture_model())))
    config = small_run(8, freeze=freeze, grad_accumulation=parts)
    losses, grads, after, _ = take_steps(config, mesh, 1)
    after, grads, expected = flat(after), flat(grads), flat(one_device[1])
    still = {path for path, leaf in after.items() if np.array_equal(leaf, before[path])}
    assert still == {p for p, kind in kinds(mixture_model()).items() if kind.part in freeze}
    assert grads.keys() == after.keys() - still
    clipped, of_all = (max(1.0, norm) for norm in (losses[0, 2], one_device[0][0, 2]))
    for path, grad in grads.items():
        error = np.linalg.norm(grad * clipped - expected[path] * of_all)
        assert error <= 1e-5 * np.linalg.norm(expected[path] * of_all), path


@pytest.mark.nightly
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_written_out(one_device, remat):
    losses, *_ = take_steps(small_run(8, scan_unroll=2, remat=remat), MeshConfig(1, 1, 1, 1))
    np.testing.assert_allclose(losses, one_device[0][:3], rtol=1e-5)
