"""Exported directories in current transformers, beside our logits and tokens and the authors'.

torch and transformers' models run in a Python of their own, or in several with other versions:
TRANSFORMERS_TEST_PYTHON names them, with colons between, and .ci/nightly makes them. All cases go
through one process of tests/end_to_end/transformers_check.py for each.
"""

import dataclasses
import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import finermoe_jax as fm
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.weights.hf_weights import read_config
from tests.support import DATA, GOLDEN, ROOT
from tests.support.models import CASES, config_of, run, weights, write_tokenizer

DEMO = ROOT / "finermoe_jax" / "demo" / "model"
DENSE = DATA / "dense"
NEW_TOKENS = 6
# Exported as they are: transformers' logits and tokens of the source are those of the export.
AS_THEY_ARE = ["mistral", "qwen3", "qwen2_yarn", "llama_linear"]
PYTHONS = os.environ.get("TRANSFORMERS_TEST_PYTHON", "").split(os.pathsep)
# Llama-style, with heads that do not make up the width.
LLAMA = fm.ModelConfig(
    vocab_size=80, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10, attention_bias=False,
    rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False,
    initializer_range=0.2,
)  # fmt: skip


def models():
    """Name to model: dense ones, and the settings that the authors' golden cases leave out."""
    key = jax.random.key(1)
    qwen = fm.load_hf(GOLDEN / "upcycle" / "dense_tied")
    llama = fm.Decoder(LLAMA, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    demo = fm.load_hf(DEMO, dtype=jnp.float32)
    every_other = fm.MoEConfig(4, 2, 2, 2, 2, norm_topk_prob=True, decoder_sparse_step=2)
    projected = fm.MoEConfig(8, 4, concat_proj="routed", mlp_only_layers=(0,))
    return {
        "qwen": qwen,
        "llama": llama,
        "qwen_experts": fm.upcycle_model(qwen, every_other, key),
        "llama_experts": fm.upcycle_model(llama, projected, key),
        "demo": fm.upcycle_model(demo, fm.MoEConfig(intermediate_granularity=8), key),
        "qwen3_experts": fm.upcycle_model(
            fm.load_hf(DENSE / "qwen3_tied"), fm.MoEConfig(4, 2, 1, 2, 1), key
        ),
        "llama3_experts": fm.upcycle_model(
            fm.load_hf(DENSE / "llama3_tied"), fm.MoEConfig(4, 2, 1, 2, 1), key
        ),
        "yarn_experts": fm.upcycle_model(
            fm.load_hf(DENSE / "qwen2_yarn"), fm.MoEConfig(4, 2, 1, 2, 1), key
        ),
        "linear_experts": fm.upcycle_model(
            fm.load_hf(DENSE / "llama_linear"), fm.MoEConfig(4, 2, 1, 2, 1), key
        ),
        # Experts shared by two layers, in both ways.
        "qwen_pool": fm.upcycle_model(qwen, fm.MoEConfig(4, 2, 1, 2, 2, experts_across=2), key),
        "llama_pool": fm.Decoder(
            dataclasses.replace(
                LLAMA,
                moe=fm.MoEConfig(4, 2, 1, 2, 1, experts_across=2, pooled_as="candidates"),
            ),
            dtype="float32",
            param_dtype="float32",
            rngs=nnx.Rngs(0),
        ),
        # Routers that read the layer before; two layers before, where the first is dense.
        "qwen_ahead": fm.upcycle_model(qwen, fm.MoEConfig(4, 2, 1, 2, 1, route_ahead=1), key),
        "llama_ahead": fm.Decoder(
            dataclasses.replace(
                LLAMA,
                num_hidden_layers=5,
                moe=fm.MoEConfig(
                    4, 2, 1, 2, 2, mlp_only_layers=(0,), experts_across=2, route_ahead=2
                ),
            ),
            dtype="float32",
            param_dtype="float32",
            rngs=nnx.Rngs(0),
        ),
        "biased_pool": biased(
            fm.upcycle_model(
                qwen,
                fm.MoEConfig(
                    4, 2, 1, 2, 1, experts_across=2, pooled_as="candidates", selection_bias=True
                ),
                key,
            )
        ),
        "biased_experts": biased(
            fm.upcycle_model(
                qwen, fm.MoEConfig(4, 2, 2, 2, 2, decoder_sparse_step=2, selection_bias=True), key
            )
        ),
        # As a run from scratch with the shape of a tied model.
        "tied_experts": fm.Decoder(
            dataclasses.replace(LLAMA, moe=projected, tie_word_embeddings=True),
            dtype="float32",
            param_dtype="float32",
            rngs=nnx.Rngs(0),
        ),
    }


def biased(model):
    """The model with random selection biases."""
    rng = np.random.default_rng(0)
    for run_ in model.runs:
        for block in run_:
            if hasattr(block, "moe"):
                for bias in (block.moe.expert_bias, block.moe.group_bias):
                    bias[...] = jnp.asarray(rng.standard_normal(bias.shape), jnp.float32)
    return model


def ours(model):
    """Our logits of rows without padding, padded left, padded right; greedy tokens of two."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, model.config.vocab_size, (3, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5] = mask[2, 7:] = 0
    return {
        "ours.input_ids": ids,
        "ours.attention_mask": mask,
        "ours.logits": np.asarray(run(model, ids, mask).logits),
        "greedy.input_ids": ids[:2],
        "greedy.attention_mask": mask[:2],
        "greedy.sequences": np.asarray(fm.generate(model, ids[:2], mask[:2], NEW_TOKENS)),
    }


def theirs(data):
    """The authors' logits, padded and not, greedy tokens, losses and gradients."""
    wanted = {
        "plain.input_ids": data["input_ids"],
        "plain.logits": data["logits"],
        "gen.input_ids": data["gen.prompt_ids"],
        "gen.sequences": data["gen.sequences"],
    }
    if "lm_loss" not in data:
        return wanted
    wanted |= {
        "losses.input_ids": data["input_ids"],
        "losses.loss": data["lm_loss"],
        "losses.aux_loss": data["aux_loss"].sum(keepdims=True),
        **{f"losses.{k}": v for k, v in data.items() if k.startswith("grad.")},
        "gen_left.input_ids": data["gen_left_pad.prompt_ids"],
        "gen_left.attention_mask": data["gen_left_pad.attention_mask"],
        "gen_left.sequences": data["gen_left_pad.sequences"],
    }
    for side in ("left_pad", "right_pad"):  # the vectors hold row 1 alone
        for kind in ("input_ids", "attention_mask"):
            wanted[f"{side}.{kind}"] = data[f"{side}.{kind}"][1:]
        wanted[f"{side}.logits"] = data[f"{side}.logits_row1"][None]
    return {name: np.ascontiguousarray(array) for name, array in wanted.items()}


def ending(folder, name, wanted):
    """Files that make text end within the greedy tokens of row 0, which are cut there."""
    sequence, length = wanted["greedy.sequences"][0], wanted["greedy.input_ids"].shape[1]
    made = sequence[length:].tolist()
    last = max(made.index(token) for token in made)  # the first of its kind, so nothing ends before
    wanted["ends.input_ids"] = wanted["greedy.input_ids"][:1]
    wanted["ends.stopped"] = np.ascontiguousarray(sequence[None, : length + last + 1])
    folder.mkdir()
    if name == "qwen3_experts":
        write_tokenizer(folder, 61, eos_token=f"w{made[last]}")
    else:  # two, as Qwen2.5-Instruct's file says; the other one does not come up
        other = next(token for token in range(61) if token not in made)
        ids = {"eos_token_id": [other, made[last]], "pad_token_id": other}
        (folder / "generation_config.json").write_text(json.dumps(ids))
    return folder


def transformers_own(data):
    """The logits and tokens that transformers' model of a dense source has made."""
    wanted = {
        "plain.input_ids": data["input_ids"],
        "plain.logits": data["logits"],
        "left_pad.input_ids": data["input_ids"],
        "left_pad.attention_mask": data["left_pad.mask"],
        "left_pad.logits": data["left_pad.logits"],
        "gen.input_ids": data["input_ids"],
        "gen.sequences": data["sequences"],
    }
    return {name: np.ascontiguousarray(array) for name, array in wanted.items()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The directories of all cases."""
    place = tmp_path_factory.mktemp("transformers")
    for name, model in models().items():
        wanted, files = ours(model), DEMO if name == "demo" else None
        if name in ("qwen3_experts", "llama3_experts"):
            files = ending(place / f"{name}_ends", name, wanted)
        fm.save_hf(model, place / name / "model", files)
        save_file(wanted, place / name / "wanted.safetensors")
    for name in AS_THEY_ARE:
        fm.save_hf(fm.load_hf(DENSE / name), place / name / "model")
        wanted = transformers_own(load_file(DENSE / name / "golden.safetensors"))
        save_file(wanted, place / name / "wanted.safetensors")
    for name in (*CASES, "g_tied"):
        fm.save_hf(fm.load_hf(GOLDEN / name), place / name / "model")
        data = load_file(GOLDEN / name / "golden.safetensors")
        wide = fm.load_hf(place / name / "model", dtype=jnp.float32)
        logits = np.asarray(run(wide, data["input_ids"]).logits)
        wanted = {"ours.input_ids": data["input_ids"], "ours.logits": logits}
        save_file(theirs(data) | wanted, place / name / "wanted.safetensors")
    return place


@pytest.fixture(scope="module", params=PYTHONS, ids=range(len(PYTHONS)))
def found(request, tmp_path_factory):
    """The directories of all cases, and what one version of transformers made of each."""
    if not request.param:
        pytest.skip(
            "needs torch and transformers in an environment of their own: name its python in "
            "TRANSFORMERS_TEST_PYTHON, as .ci/nightly does (docs/huggingface.md)"
        )
    place = request.getfixturevalue("exports")
    modules = tmp_path_factory.mktemp("modules")
    names = sorted(path.parent.name for path in place.glob("*/wanted.safetensors"))
    for name in names:
        shutil.rmtree(place / name / "again", ignore_errors=True)
    done = subprocess.run(
        [request.param, "-W", "error", str(ROOT / "tests" / "end_to_end" / "transformers_check.py"),
         *(str(place / name) for name in names)],
        env=os.environ | {"HF_MODULES_CACHE": str(modules), "PYTHONPATH": ""},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if result["version"].startswith("4."):
        # This version divides by max_position_embeddings / original_max_position_embeddings.
        del result["found"]["qwen2_yarn"]
    return place, result["found"]


@pytest.mark.nightly
def test_logits_tokens_losses_and_gradients(found):
    _, reports = found
    assert {*reports, "qwen2_yarn"} == {*models(), *AS_THEY_ARE, *CASES, "g_tied"}
    for name, report in reports.items():
        assert report["logits"] < 1e-4 and report["cached"] < 1e-4, (name, report)
        assert report["other tokens"] == 0, (name, report)
        assert report["bfloat16"] < 0.1, (name, report)
    for name in CASES:
        for kind in ("loss", "aux_loss", "gradients"):
            assert reports[name][kind] < 1e-4, (name, reports[name])


@pytest.mark.nightly
def test_models_with_experts_run_the_exported_code(found):
    place, reports = found
    for name, report in reports.items():
        code = sorted(path.name for path in (place / name / "model").glob("*.py"))
        experts = read_config(place / name / "model").moe is not None
        assert report["remote"] == experts == bool(code)
        assert ("auto_map" in config_of(place / name / "model")) == experts
        again = {path.name for path in (place / name / "again").iterdir()}
        assert again.issuperset(code), "save_pretrained takes the code along"
    classes = {name: r["class"] for name, r in reports.items() if not r["remote"]}
    assert classes.pop("qwen2_yarn", "Qwen2ForCausalLM") == "Qwen2ForCausalLM"
    assert classes == {
        "qwen": "Qwen2ForCausalLM",
        "llama_linear": "LlamaForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }


def test_without_experts_it_is_qwen2_and_with_head_norms_qwen3(found):
    _, reports = found
    for report in reports.values():
        if report["remote"]:
            assert report["Qwen2"] < 1e-4 and report["Qwen3"] < 1e-4


def with_experts(reports):
    return {name: report for name, report in reports.items() if report["remote"]}


def test_packed_texts_are_kept_apart(found):
    """Those that position_ids show; an explicit mask of ones says that they see each other."""
    for name, report in with_experts(found[1]).items():
        assert report["packed"] < 1e-4 < report["across"], (name, report)
        assert not report["packed is cached"] and report["cached packing refused"], name


def test_what_other_programs_ask_for(found):
    for name, report in with_experts(found[1]).items():
        for kind in (
            "4-D mask", "logits_to_keep", "return_dict", "AutoModel", "every expert", "compiled",
        ):  # fmt: skip
            assert report[kind] < 1e-4, (name, kind, report)
        assert report["static cache"] == 0, name
        # Once without checkpointing, then forward and backward.
        assert report["checkpointing"] < 1e-5 and report["runs"] == 3, (name, report)


def test_trainer_with_activation_checkpointing(found):
    report = found[1]["qwen_experts"]
    if "trainer" not in report:
        pytest.skip("Trainer needs accelerate in that environment: pip install accelerate")
    plain, runs, checkpointed, runs_again = report["trainer"]
    assert len(plain) == 4 and plain[3] < plain[0] - 1 and (runs, runs_again) == (4, 8), report
    np.testing.assert_allclose(checkpointed, plain, rtol=1e-3)  # 4.51 logs four digits


def test_heads_are_tied_where_the_config_says_so(found):
    place, reports = found
    for name, report in with_experts(reports).items():
        assert report["tied"] == config_of(place / name / "model")["tie_word_embeddings"]
    assert {name for name, r in reports.items() if r.get("tied")} == {"g_tied", "tied_experts"}


def test_random_weights(found):
    _, reports = found
    deviations = [report["drawn"] for report in reports.values() if report["remote"]]
    np.testing.assert_allclose(deviations, 0.02, rtol=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen_experts",
        "llama3_experts",
        "yarn_experts",
        "linear_experts",
        "tied_experts",
        "g_tied",
        "c_go4_concatproj",
    ],
)
def test_what_transformers_saves_loads_here(found, name):
    place, _ = found
    got, wanted = (read_config(place / name / folder) for folder in ("again", "model"))
    assert (got.rope_theta, got.rope_scaling) == (wanted.rope_theta, wanted.rope_scaling)
    scaled = ("llama3_experts", "yarn_experts", "linear_experts")
    assert (wanted.rope_scaling is not None) == (name in scaled)
    wanted = weights(fm.load_hf(place / name / "model", jnp.float32))
    got = weights(fm.load_hf(place / name / "again", jnp.float32))
    assert wanted.keys() == got.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(got[path], array, err_msg=str(path), strict=True)


def test_text_ends_where_the_files_say(found):
    _, reports = found
    assert {name: r["stopped"] for name, r in reports.items() if "stopped" in r} == {
        "qwen3_experts": 0,
        "llama3_experts": 0,
    }


def test_the_tokenizer_comes_along(found):
    _, reports = found
    assert reports["demo"]["text"] == open_tokenizer(DEMO, 2048)("Return the")["input_ids"]


def test_exported_code_is_not_run_here(tmp_path, monkeypatch):
    model = fm.load_hf(GOLDEN / "a_base")
    fm.save_hf(model, tmp_path / "out")
    code = [tmp_path / "out" / f"{name}_finer_moe.py" for name in ("configuration", "modeling")]
    assert all("FineRMoe" in path.read_text() for path in code)
    for path in code:
        path.write_text("raise SystemExit('executed')")
    bpe = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "out" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (tmp_path / "out" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    # transformers would ask whether to run it, and wait.
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    assert open_tokenizer(tmp_path / "out", 4096)("Return the")["input_ids"]
    again = fm.load_hf(tmp_path / "out")
    assert again.config == model.config
