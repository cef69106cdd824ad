"""The whole model against vectors of the authors' own (tests/recorded/golden/README.md)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.model.decoder import with_params
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_config import model_config_to_hf
from finermoe_jax.weights.hf_names import parts
from finermoe_jax.weights.hf_weights import read_config
from tests.support import GOLDEN
from tests.support.models import CASES, compiled, run

UPCYCLED = json.loads((GOLDEN / "upcycle" / "cases.json").read_text())
UNTOUCHED = ("model.embed_tokens.", "model.norm.", "self_attn.", "layernorm.")


def relative(got, wanted):
    """Norm of the difference over the norm of what is wanted."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def by_hf_name(config, params):
    """Arrays of the decoder's layout (weights or their gradients) under their HF names: views."""
    flat = nnx.traversals.flatten_mapping(params)
    return {
        where.name(rule, place): rule.view(np.asarray(flat[path])[place])
        for path, where in parts(config, list(flat)).items()
        for place in np.ndindex(*where.leading)
        for rule in where.rules
    }


def replaced(model, tensors):
    """The model with the tensors of these HF names, and of no others, exchanged."""
    params = pure(model)
    flat = {k: np.array(v) for k, v in nnx.traversals.flatten_mapping(params).items()}
    views = by_hf_name(model.config, nnx.traversals.unflatten_mapping(flat))
    for name, tensor in tensors.items():
        views[name][...] = tensor
    params = nnx.traversals.unflatten_mapping({k: jnp.asarray(v) for k, v in flat.items()})
    return with_params(model.config, params, dtype=model.dtype)


def assert_same_weights(got, wanted):
    got, wanted = (nnx.traversals.flatten_mapping(pure(model)) for model in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        assert got[path].dtype == value.dtype, path
        assert np.asarray(got[path]).tobytes() == np.asarray(value).tobytes(), path


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """The golden tensors of a case, and the model in float32 (some weights are stored bf16)."""
    folder = GOLDEN / request.param
    return load_file(folder / "golden.safetensors"), fm.load_hf(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def output(case):
    data, model = case
    return run(model, data["input_ids"])


@pytest.mark.slow
def test_logits(case, output):
    data, _ = case
    assert output.logits.dtype == jnp.float32
    np.testing.assert_allclose(output.logits, data["logits"], rtol=0, atol=1e-4)


def test_routing(case, output):
    data, model = case
    assert len(output.routing) == model.config.num_hidden_layers
    for layer, routing in enumerate(output.routing):
        experts, wanted = np.asarray(routing.experts), data[f"selected_experts.{layer}"]
        np.testing.assert_array_equal(np.sort(experts, -1), np.sort(wanted, -1))
        chosen = np.take_along_axis(np.asarray(routing.logits), experts, -1)
        assert (np.diff(chosen, axis=-1) <= 0).all(), "experts are reported by falling logit"
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(routing.weights), np.argsort(experts, -1), -1),
            np.take_along_axis(data[f"routing_weights.{layer}"], np.argsort(wanted, -1), -1),
            rtol=1e-4,
        )
        assert relative(routing.logits, data[f"router_logits.{layer}"]) < 1e-4


def test_losses(case, output):
    data, _ = case
    np.testing.assert_allclose(output.aux_loss, data["aux_loss"], rtol=1e-4)
    ids = data["input_ids"]
    logits = np.asarray(output.logits, np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    loss = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    np.testing.assert_allclose(loss, data["lm_loss"][0], rtol=1e-4)


def lm_loss(graphdef, state, ids):
    """Mean cross-entropy, as training computes it: from hidden states, in chunks."""
    model = nnx.merge(graphdef, state)
    hidden = model.features(ids).hidden
    targets = jnp.roll(ids, -1, axis=1)
    real = jnp.ones(ids.shape, bool).at[:, -1].set(False)
    return cross_entropy_sum(model, hidden, targets, real, chunk_tokens=20) / real.sum()


def aux_sum(graphdef, state, ids):
    return nnx.merge(graphdef, state).features(ids).aux_loss.sum()


# Compiling takes all the time: one forward and one backward pass for both losses.
@functools.partial(jax.jit, static_argnums=0)
def _losses_and_gradient(graphdef, state, ids, cotangents):
    """Both losses, and the gradient of their sum as weighted by the cotangents."""

    def losses(state):
        return lm_loss(graphdef, state, ids), aux_sum(graphdef, state, ids)

    values, pull = jax.vjp(losses, state)
    return values, pull(cotangents)[0]


@pytest.fixture(scope="module")
def trained(case):
    """The losses (the language model's, the summed load-balancing ones) and each one's gradient."""
    data, model = case
    arguments = (*nnx.split(model), jnp.asarray(data["input_ids"]))
    losses, first = _losses_and_gradient(*arguments, (1.0, 0.0))
    _, second = _losses_and_gradient(*arguments, (0.0, 1.0))
    return losses, [by_hf_name(model.config, nnx.to_pure_dict(s)) for s in (first, second)]


@pytest.mark.nightly
def test_loss_in_chunks(case, trained):
    data, _ = case
    (loss, _), _ = trained
    np.testing.assert_allclose(loss, data["lm_loss"][0], rtol=1e-4)


@pytest.mark.nightly
def test_gradients_of_the_language_model_loss(case, trained):
    data, _ = case
    _, (grads, _) = trained
    given = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    assert len(given) >= 6
    errors = {name: relative(grads[name], wanted) for name, wanted in given.items()}
    assert max(errors.values()) < 1e-4, errors

    embedding = grads["model.embed_tokens.weight"]
    rows = data["grad_row_ids.model.embed_tokens.weight"]
    assert relative(embedding[rows], data["grad_rows.model.embed_tokens.weight"]) < 1e-4
    others = np.setdiff1d(np.arange(len(embedding)), rows)
    assert len(others) and not embedding[others].any()


@pytest.mark.nightly
def test_gradients_of_the_load_balancing_loss(case, trained):
    data, model = case
    _, (_, grads) = trained
    given = {k.removeprefix("grad_aux."): v for k, v in data.items() if k.startswith("grad_aux.")}
    assert len(given) == model.config.num_hidden_layers
    errors = {name: relative(grads[name], wanted) for name, wanted in given.items()}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.slow
def test_moe_layers(case):
    data, model = case
    ((stack,),) = model.runs
    graphdef, state = nnx.split(stack.moe)
    for layer in range(model.config.num_hidden_layers):
        x = data[f"moe_in.{layer}"]
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], state)
        y, routing, aux_loss = compiled(graphdef, one, jnp.asarray(x), jnp.ones(x.shape[:2], bool))
        assert relative(y, data[f"moe_out.{layer}"]) < 1e-4
        assert relative(routing.logits, data[f"router_logits.{layer}"]) < 1e-4
        np.testing.assert_allclose(aux_loss, data["aux_loss"][layer], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left_pad", "right_pad"])
@pytest.mark.parametrize("given_positions", [True, False])
def test_padding(case, side, given_positions):
    data, model = case
    mask = data[f"{side}.attention_mask"]
    assert mask[0].all() and not mask[1].all()
    positions = data[f"{side}.position_ids"] if given_positions else None
    logits = np.asarray(run(model, data[f"{side}.input_ids"], mask, positions).logits)
    assert np.isfinite(logits).all()
    real = mask[1] == 1
    wanted = data[f"{side}.logits_row1"]
    np.testing.assert_allclose(logits[1][real], wanted[real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[0], data["logits"][0], rtol=0, atol=1e-4)


@pytest.mark.nightly
def test_generation(case):
    data, model = case
    got = fm.generate(model, data["gen.prompt_ids"], max_new_tokens=16)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, data["gen.sequences"])


@pytest.mark.nightly
def test_generation_from_padded_prompts(case):
    data, model = case
    ids, mask = data["gen_left_pad.prompt_ids"], data["gen_left_pad.attention_mask"]
    wanted = data["gen_left_pad.sequences"]
    got = fm.generate(model, ids, mask, max_new_tokens=16)
    np.testing.assert_array_equal(got, wanted)

    pad = int((mask[1] == 0).sum())
    assert pad == 3 and mask[0].all()
    shift = np.array([0, -pad])
    right_ids, right_mask = (
        np.stack([np.roll(row, s) for row, s in zip(rows, shift, strict=True)])
        for rows in (ids, mask)
    )
    assert right_mask[1].tolist() == [1] * 5 + [0] * 3
    right = fm.generate(model, right_ids, right_mask, max_new_tokens=16)
    np.testing.assert_array_equal(right[:, :8], right_ids)
    np.testing.assert_array_equal(right[:, 8:], wanted[:, 8:])


# --- files ----------------------------------------------------------------------------------


def stored(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_export_holds_the_original_tensors(name, tmp_path):
    model = fm.load_hf(GOLDEN / name)
    fm.save_hf(model, tmp_path / "out")
    assert_same_weights(fm.load_hf(tmp_path / "out"), model)
    got, wanted = stored(tmp_path / "out"), stored(GOLDEN / name)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].tobytes() == tensor.tobytes(), key
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((GOLDEN / name / "config.json").read_text())
    for key, value in values.items():
        if key not in ("initializer_range", "auto_map"):
            assert value == original[key], key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "g_tied", "upcycle/dense_tied", "upcycle/dense_untied"])
def test_checkpoint_is_bit_identical(name, tmp_path):
    model = fm.load_hf(GOLDEN / name)
    fm.save_checkpoint(model, tmp_path / "checkpoint")
    again = fm.load_checkpoint(tmp_path / "checkpoint")
    assert again.config == model.config
    assert again.dtype == model.dtype
    assert_same_weights(again, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "g_tied", "upcycle/dense_tied", "upcycle/dense_untied"])
def test_converted_there_and_back_every_tensor_is_bit_identical(name, tmp_path):
    source = GOLDEN / name
    convert(str(source), tmp_path / "orbax", "orbax", None, seed=0)
    convert(str(tmp_path / "orbax"), tmp_path / "hf", "hf", None, seed=0)
    got, wanted = stored(tmp_path / "hf"), stored(source)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].tobytes() == tensor.tobytes(), key
    read = read_config(source)
    assert read_config(tmp_path / "hf") == read
    assert read.tie_word_embeddings == name.endswith("_tied")


@pytest.mark.nightly
def test_tied_embeddings_as_the_authors_class_ties_them():
    data = load_file(GOLDEN / "g_tied" / "golden.safetensors")
    model = fm.load_hf(GOLDEN / "g_tied")
    assert model.lm_head is None and model.config.moe is not None
    out = run(model, data["input_ids"])
    np.testing.assert_allclose(out.logits, data["logits"], rtol=0, atol=1e-4)
    for layer, routing in enumerate(out.routing):
        assert relative(routing.logits, data[f"router_logits.{layer}"]) < 1e-4
    made = fm.generate(model, data["gen.prompt_ids"], max_new_tokens=16)
    np.testing.assert_array_equal(made, data["gen.sequences"])


# --- upcycling ------------------------------------------------------------------------------


@functools.cache
def dense_source(name):
    return fm.load_hf(GOLDEN / "upcycle" / name)


def upcycle(facts):
    return fm.upcycle(
        dense_source(facts["source"]),
        intermediate_granularity=facts["G_I"],
        output_granularity=facts["G_O"],
        intermediate_expansion=facts["R_I"],
        output_expansion=facts["R_O"],
        active_per_group=facts["T_I"],
        shared_expert=facts["shared"],
        key=jax.random.key(3),
    )


@pytest.fixture(scope="module", params=UPCYCLED, ids=lambda facts: facts["case"])
def upcycled(request):
    """Facts, golden tensors and the upcycled model of a case."""
    facts = request.param
    data = load_file(GOLDEN / "upcycle" / facts["case"] / "golden.safetensors")
    return facts, data, upcycle(facts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense_tied", "dense_untied"])
def test_dense_model(name):
    data = load_file(GOLDEN / "upcycle" / name / "golden.safetensors")
    out = run(dense_source(name), data["input_ids"])
    np.testing.assert_allclose(out.logits, data["logits"], rtol=0, atol=1e-4)
    assert out.aux_loss.shape == (0,) and out.routing == ()


@pytest.mark.slow
def test_upcycled_config(upcycled):
    facts, _, model = upcycled
    wanted = read_config(GOLDEN / "upcycle" / facts["case"])
    assert model_config_to_hf(model.config, "float32") == model_config_to_hf(wanted, "float32")
    assert not model.config.tie_word_embeddings


def test_upcycled_weights(upcycled):
    facts, data, model = upcycled
    got = by_hf_name(model.config, pure(model))
    dense = by_hf_name(dense_source(facts["source"]).config, pure(dense_source(facts["source"])))
    experts = {name: tensor for name, tensor in data.items() if ".experts." in name}
    count = facts["G_I"] * facts["G_O"] * facts["R_I"] * facts["R_O"]
    assert len(experts) == 3 * count * model.config.num_hidden_layers
    copies = {name: dense[name] for name in got if any(part in name for part in UNTOUCHED)}
    assert copies.keys() == {name for name in dense if ".mlp." not in name} - {"lm_head.weight"}
    copies["lm_head.weight"] = dense.get("lm_head.weight", dense["model.embed_tokens.weight"])
    shared = {
        name: name.replace(".shared_expert.", ".") for name in got if "shared_expert." in name
    }
    assert len(shared) == 3 * model.config.num_hidden_layers * facts["shared"]
    copies |= {name: dense[source] for name, source in shared.items()}
    for name, wanted in (experts | copies).items():
        np.testing.assert_array_equal(got[name], wanted, err_msg=name, strict=True)
    drawn = got.keys() - experts.keys() - copies.keys()
    assert drawn == {name for name in data if "mlp.gate." in name or "shared_expert_gate" in name}


def test_drawn_weights_have_the_published_deviation(upcycled):
    _, _, model = upcycled
    got = by_hf_name(model.config, pure(model))
    routers = np.concatenate([got[name].ravel() for name in got if "mlp.gate." in name])
    error = 0.02 / np.sqrt(routers.size)  # standard error of the mean
    assert abs(routers.mean()) < 4 * error
    assert abs(routers.std() - 0.02) < 4 * error / np.sqrt(2)


@pytest.mark.nightly
def test_upcycled_logits(upcycled):
    _, data, model = upcycled
    drawn = {
        name: tensor
        for name, tensor in data.items()
        if "mlp.gate." in name or "shared_expert_gate" in name
    }
    out = run(replaced(model, drawn), data["input_ids"])
    np.testing.assert_allclose(out.logits, data["upcycled_logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_copies_without_a_shared_expert_preserve_the_function():
    (facts,) = (f for f in UPCYCLED if f["case"] == "tied_GI1_GO1_RI4_RO1_TI2_noshare")
    data = load_file(GOLDEN / "upcycle" / "dense_tied" / "golden.safetensors")
    out = run(upcycle(facts), data["input_ids"])  # with routers of our own draw
    dense = run(dense_source("dense_tied"), data["input_ids"])
    np.testing.assert_allclose(out.logits, dense.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.logits, data["logits"], rtol=0, atol=1e-5)
    assert len(np.unique(out.routing[0].experts)) == 4, "the copies share the tokens"


def test_upcycling_keeps_the_source_whole():
    before = {k: np.array(v) for k, v in by_hf_name(
        dense_source("dense_tied").config, pure(dense_source("dense_tied"))).items()}  # fmt: skip
    upcycle(next(f for f in UPCYCLED if f["source"] == "dense_tied"))
    after = by_hf_name(dense_source("dense_tied").config, pure(dense_source("dense_tied")))
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], value) for name, value in before.items())
