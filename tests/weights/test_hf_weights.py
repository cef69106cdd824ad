"""HF directories: every form that is read, and what is refused with one clear message."""

import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import finermoe_jax as fm
from finermoe_jax.layers.stored import Quantized
from finermoe_jax.weights import safetensors_files as tensor_files
from finermoe_jax.weights.hf_weights import read_config, stored_dtypes
from finermoe_jax.weights.model_card import Origin
from finermoe_jax.weights.source import open_model
from tests.oracles import naive
from tests.support import GOLDEN
from tests.support.hub import hub
from tests.support.models import config_of, weights, write_tokenizer

TIED, UNTIED = GOLDEN / "upcycle" / "dense_tied", GOLDEN / "upcycle" / "dense_untied"
MIXTURE = GOLDEN / "e_conv_split"
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


def write(folder, config, tensors, shards=1):
    """A HF directory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n in places if places[n] == file}, folder / file)
    write_index(folder, places)
    return folder


def write_index(folder, places):
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(source):
    return load_file(source / "model.safetensors")


@pytest.fixture
def source(tmp_path):
    """A writable copy of a small dense source."""
    return shutil.copytree(UNTIED, tmp_path / "source")


def assert_same(got, wanted):
    got, wanted = weights(got), weights(wanted)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=str(path), strict=True)


def refuses(folder, *words):
    """load_hf ends with one InputError whose message holds all words."""
    with pytest.raises(fm.InputError) as error:
        fm.load_hf(folder)
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    return message


# --- what is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_hold_the_same_as_one_file(tmp_path, shards):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), shards)
    assert_same(fm.load_hf(folder), fm.load_hf(UNTIED))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes(tmp_path, dtype):
    tensors = {name: t.astype(dtype) for name, t in tensors_of(UNTIED).items()}
    folder = write(tmp_path / "s", config_of(UNTIED), tensors)
    model = fm.load_hf(folder)
    assert model.dtype == dtype
    assert {leaf.dtype for leaf in weights(model).values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(model.embed.weight[...], tensors[EMBEDDING])
    wide = fm.load_hf(folder, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert {leaf.dtype for leaf in weights(wide).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(wide.embed.weight[...], tensors[EMBEDDING].astype(np.float32))


def test_mixed_dtypes_take_the_embeddings(tmp_path):
    tensors = tensors_of(UNTIED)
    tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
    model = fm.load_hf(write(tmp_path / "s", config_of(UNTIED), tensors))
    assert {leaf.dtype for leaf in weights(model).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_tied_embeddings_with_and_without_a_redundant_head(tmp_path):
    tensors = tensors_of(TIED)
    assert "lm_head.weight" not in tensors
    plain = fm.load_hf(TIED)
    assert plain.lm_head is None and plain.config.tie_word_embeddings
    redundant = tensors | {"lm_head.weight": tensors[EMBEDDING]}
    assert_same(fm.load_hf(write(tmp_path / "s", config_of(TIED), redundant)), plain)


def test_untied_head(tmp_path):
    model = fm.load_hf(UNTIED)
    np.testing.assert_array_equal(model.lm_head.weight[...], tensors_of(UNTIED)["lm_head.weight"])
    assert not np.array_equal(model.lm_head.weight[...], model.embed.weight[...])


@pytest.mark.slow
def test_llama_style_source_is_qwen2_without_biases(tmp_path):
    tensors = tensors_of(UNTIED)
    bare = {name: t for name, t in tensors.items() if not name.endswith(".bias")}
    zeros = {name: np.zeros_like(t) if name.endswith(".bias") else t for name, t in tensors.items()}
    assert len(bare) == len(tensors) - 6
    config = config_of(UNTIED, model_type="llama", architectures=["LlamaForCausalLM"])
    llama = fm.load_hf(write(tmp_path / "llama", config, bare))
    qwen = fm.load_hf(write(tmp_path / "qwen", config_of(UNTIED), zeros))
    assert not llama.config.attention_bias
    ids = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(llama(ids).logits, qwen(ids).logits, atol=1e-6)
    refuses(write(tmp_path / "biased", config, tensors), "6 unexpected", "q_proj.bias")
    fm.save_hf(llama, tmp_path / "again")
    assert config_of(tmp_path / "again")["model_type"] == "llama"
    assert_same(fm.load_hf(tmp_path / "again"), llama)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        dict(rope_theta=None, rope_parameters={"rope_theta": 500000}),
        dict(rope_theta=5e5, rope_parameters={}),
    ],
)
def test_both_forms_of_the_rotary_base(tmp_path, changes):
    folder = write(tmp_path / "s", config_of(UNTIED, **changes), tensors_of(UNTIED))
    assert read_config(folder).rope_theta == fm.load_hf(folder).config.rope_theta == 5e5


def test_buffers_of_old_exports_are_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED) | extra)
    assert_same(fm.load_hf(folder), fm.load_hf(UNTIED))


def test_hub_id_from_the_cache(tmp_path, monkeypatch):
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(UNTIED, repository / "snapshots" / revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_same(fm.load_hf("someone/small"), fm.load_hf(UNTIED))
    assert open_model("someone/small").origin == Origin(("someone/small",))


@pytest.mark.nightly
@pytest.mark.parametrize("shards", [1, 2])
def test_from_the_hub_comes_what_belongs_to_the_model(tmp_path, shards):
    folder = write(tmp_path / "repository", config_of(UNTIED), tensors_of(UNTIED), shards)
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"the same in another form")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub(folder, tmp_path / "cache") as (environment, fetched):
        load = "import finermoe_jax as fm; fm.save_hf(fm.load_hf('someone/small'), 'copy')"
        done = subprocess.run(
            [sys.executable, "-c", load], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    belongs = ("model", "config", "README")
    wanted = {path.name for path in folder.iterdir() if path.name.startswith(belongs)}
    assert set(fetched) == wanted
    assert len(fetched) == len(wanted) == (3 if shards == 1 else shards + 3)
    assert_same(fm.load_hf(tmp_path / "copy"), fm.load_hf(UNTIED))


# --- what is written ------------------------------------------------------------------------


def names_in(folder):
    return {n for file in folder.glob("model*.safetensors") for n in load_file(file)}


def test_export_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_SHARD_BYTES", 10_000)
    model = fm.load_hf(MIXTURE)
    fm.save_hf(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(
        sum(t.nbytes for t in tensors.values()) <= 10_000 or len(tensors) == 1
        for tensors in (load_file(tmp_path / "out" / file) for file in files)
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_in(tmp_path / "out") == names_in(MIXTURE)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights(model).values())
    assert_same(fm.load_hf(tmp_path / "out"), model)


@pytest.mark.parametrize("save", [fm.save_hf, fm.save_checkpoint])
def test_int8_weights_are_not_saved(tmp_path, save):
    model = fm.load_hf(MIXTURE)
    table = model.embed.weight  # as int8_weights leaves it
    table.set_value(Quantized(np.zeros(table.shape, np.int8), np.zeros(len(table), np.float32)))
    with pytest.raises(fm.InputError, match="int8 weights, which cannot be saved: save it before"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [dict(decoder_sparse_step=2), dict(mlp_only_layers=(0,)), dict(mlp_only_layers=(1,))],
)
def test_dense_and_moe_layers_side_by_side(tmp_path, settings):
    moe = fm.MoEConfig(4, 2, 1, 2, 1, **settings)
    model = fm.upcycle_model(fm.load_hf(TIED), moe, jax.random.key(0))
    fm.save_hf(model, tmp_path / "out")
    again = fm.load_hf(tmp_path / "out")
    assert again.config.layer_kinds == model.config.layer_kinds
    assert sorted(model.config.layer_kinds) == ["dense", "moe"]
    assert_same(again, model)
    names = names_in(tmp_path / "out")
    for layer, kind in enumerate(model.config.layer_kinds):
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) == (kind == "dense")
        assert (f"model.layers.{layer}.mlp.experts.15.up_proj.weight" in names) == (kind == "moe")


@pytest.fixture(scope="module")
def biased():
    """A bfloat16 model with random selection biases."""
    moe = fm.MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(0,), selection_bias=True)
    model = fm.upcycle_model(fm.load_hf(TIED, dtype="bfloat16"), moe, jax.random.key(0))
    layer, rng = model.runs[1][0].moe, np.random.default_rng(0)
    for bias in (layer.expert_bias, layer.group_bias):
        assert bias[...].dtype == jnp.float32 and not bias[...].any()
        bias[...] = jnp.asarray(rng.standard_normal(bias.shape), jnp.float32)
    return model


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_selection_biases_there_and_back(tmp_path, biased, form):
    save, load = {
        "hf": (fm.save_hf, fm.load_hf),
        "orbax": (fm.save_checkpoint, fm.load_checkpoint),
    }[form]
    save(biased, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config.moe.selection_bias
    assert_same(again, biased)
    layer = again.runs[1][0].moe
    assert layer.expert_bias[...].dtype == layer.group_bias[...].dtype == jnp.float32
    assert layer.router[...].dtype == jnp.bfloat16
    if form == "hf":
        assert read_config(tmp_path / "out").moe.selection_bias
        assert json.loads((tmp_path / "out" / "config.json").read_text())["selection_bias"] is True
        stored = load_file(tmp_path / "out" / "model.safetensors")
        bias = stored["model.layers.1.mlp.gate.group_bias"]
        np.testing.assert_array_equal(bias, biased.runs[1][0].moe.group_bias[...][0])
        assert stored_dtypes(tmp_path / "out") == ["bfloat16"]
        assert load(tmp_path / "out", dtype="float16").runs[1][0].moe.expert_bias[...].dtype == (
            jnp.float32
        )


@pytest.mark.slow
def test_evaluation_and_generation_choose_with_the_biases(biased):
    ids = jnp.arange(1, 9, dtype=jnp.int32)[None]
    out = biased(ids)
    (routing,) = out.routing
    layer = biased.runs[1][0].moe
    biases = [
        np.asarray(bias[...][0], np.float64) for bias in (layer.expert_bias, layer.group_bias)
    ]
    s = naive.Settings(hidden_size=8, intermediate_size=8, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    logits = np.asarray(routing.logits[0], np.float64)
    chosen = [naive.route(token, s, None, biases)[0] for token in logits]
    assert routing.experts[0].tolist() == chosen
    assert chosen != [naive.route(token, s)[0] for token in logits]
    # Decoding, with its own form of the weights, gives the same tokens.
    made = fm.generate(biased, ids, max_new_tokens=3)
    for length in range(8, 11):
        row = jnp.pad(made[:, :length], ((0, 0), (0, 11 - length)))
        logits = biased(row).logits
        assert int(logits[0, length - 1].argmax()) == int(made[0, length])


def test_export_into_an_empty_directory_and_with_a_tokenizer(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer", 96)
    (tmp_path / "tokenizer" / "custom.py").write_text("raise SystemExit")
    fm.save_hf(fm.load_hf(TIED), tmp_path / "out", tmp_path / "tokenizer")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    copied = ["tokenizer.json", "tokenizer_config.json"]
    assert found == ["README.md", "config.json", "model.safetensors", *copied]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "config", "generation"),
    [
        # A tokenizer alone: Qwen2.5's names no bos.
        (dict(tokenizer=dict(eos_token="w7", pad_token=dict(content="w3", __type="AddedToken"))),
         (None, 7), dict(eos_token_id=7, pad_token_id=3)),
        (dict(tokenizer={}), (None, None), None),
        # As Qwen2.5-Instruct's files; the tokenizer is not asked.
        (dict(config=dict(bos_token_id=2, eos_token_id=4), tokenizer=dict(eos_token="w7"),
              generation=dict(eos_token_id=[4, 2], pad_token_id=2, temperature=0.7)),
         (2, [4, 2]), dict(bos_token_id=2, eos_token_id=[4, 2], pad_token_id=2, temperature=0.7)),
        (dict(config=dict(bos_token_id=1, eos_token_id=2, pad_token_id=-1)),
         (1, 2), dict(bos_token_id=1, eos_token_id=2)),
        (dict(generation=dict(eos_token_id=None, top_k=5), tokenizer=dict(eos_token="w7")),
         (None, 7), dict(eos_token_id=7, top_k=5)),
        (dict(generation=dict(eos_token_id=[96])), (None, None), None),
        (dict(), (None, None), None),
    ],
)  # fmt: skip
def test_where_text_ends(tmp_path, files, config, generation):
    folder = tmp_path / "files"
    folder.mkdir()
    if "tokenizer" in files:
        write_tokenizer(folder, 96, **files["tokenizer"])
    for name in files.keys() - {"tokenizer"}:
        name_of_file = "config.json" if name == "config" else "generation_config.json"
        (folder / name_of_file).write_text(json.dumps(files[name]))
    mixture = fm.upcycle_model(fm.load_hf(TIED), fm.MoEConfig(4), jax.random.key(0))
    for out, model in (("dense", fm.load_hf(TIED)), ("mixture", mixture)):
        fm.save_hf(model, tmp_path / out, folder)
        values = config_of(tmp_path / out)
        assert (values.get("bos_token_id"), values.get("eos_token_id")) == config
        assert "pad_token_id" not in values
        written = tmp_path / out / "generation_config.json"
        assert (json.loads(written.read_text()) if generation else None) == generation


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", '{"eos_token_id": "w7"}', ["eos_token_id='w7'", "integer"]),
        ("generation_config.json", '{"eos_token_id": [true]}', ["eos_token_id=[True]"]),
        ("config.json", '{"bos_token_id": 1.5}', ["bos_token_id=1.5"]),
        ("generation_config.json", "{", ["generation_config.json", "not readable as JSON"]),
        ("tokenizer.json", "{}", ["tokenizer", "cannot be read"]),
    ],
)
def test_files_of_the_tokenizer_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_text(content)
    with pytest.raises(fm.InputError) as error:
        fm.save_hf(fm.load_hf(TIED), tmp_path / "out", tmp_path / "files")
    assert [word for word in words if word not in str(error.value)] == [], error.value
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize("save", [fm.save_hf, fm.save_checkpoint])
def test_nothing_is_overwritten(tmp_path, save):
    model = fm.load_hf(TIED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("full", "not empty"), ("file", "is a file")):
        with pytest.raises(fm.InputError, match=words):
            save(model, tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text()


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (dict(output_granularity=1, plain_top_k=True), "plain_top_k=True"),
        (dict(pre_softmax=True), "pre_softmax=True"),
        (dict(separate_routers=True), "separate_routers=True"),
        (dict(concat_proj="all"), "concat_proj='all'"),
    ],
)
def test_variants_without_a_published_form_are_refused(tmp_path, variant, words):
    moe = fm.MoEConfig(intermediate_granularity=4, **variant)
    model = fm.upcycle_model(fm.load_hf(TIED), moe, jax.random.key(0))
    with pytest.raises(fm.InputError, match=words):
        fm.save_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        fm.save_hf(fm.load_hf(TIED), tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["deep"]


# --- config.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["config.json", "missing"]),
        ("", ["config.json", "not readable as JSON"]),
        ("{hidden_size: 4}", ["config.json", "not readable as JSON"]),
        (b"\xff\xfe{}", ["config.json", "not readable as JSON"]),
        ("[" * 100_000, ["config.json", "not readable as JSON"]),
        ("[]", ["config.json", "list", "not a JSON object"]),
        ('"qwen2"', ["config.json", "str", "not a JSON object"]),
        ("null", ["config.json", "not a JSON object"]),
        ("{}", ["config.json", "model_type=None", "qwen2"]),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_config_that_is_no_object(source, content, words):
    (source / "config.json").unlink()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (source / "config.json").write_bytes(data)
    refuses(source, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(model_type="gemma"),
            ["model_type='gemma'", "qwen2, llama, mistral, qwen3, finer_moe"],
        ),
        (dict(model_type=["qwen2"]), ["model_type=['qwen2']"]),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), ["rope_scaling", "dynamic"]),
        (dict(rope_parameters={"rope_type": "longrope"}), ["rope_parameters", "longrope"]),
        (dict(rope_parameters=[1e6]), ["rope_parameters"]),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
         ["rope_parameters", "full_attention"]),
        (dict(rope_scaling={"factor": 4.0}), ["rope_scaling", "factor", "rope_type='default'"]),
        (dict(rope_scaling={"type": "default", "rope_type": "llama3"}), ["default", "llama3"]),
        (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), ["10000.0", "500000.0"]),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "0.5"]),
        (dict(use_sliding_window=True, sliding_window=9, max_window_layers=1), ["=9", "=True"]),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'"]),
        (dict(hidden_size=None), ["hidden_size=None", "must be an integer"]),
        (dict(hidden_size="24"), ["hidden_size='24'", "must be an integer"]),
        (dict(hidden_size=24.0), ["hidden_size=24.0", "must be an integer"]),
        (dict(num_hidden_layers=True), ["num_hidden_layers=True", "must be an integer"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers=0", "at least 1"]),
        (dict(vocab_size=-96), ["vocab_size=-96", "at least 1"]),
        (dict(num_key_value_heads=3), ["num_attention_heads=4", "num_key_value_heads=3"]),
        (dict(num_attention_heads=5, num_key_value_heads=5), ["hidden_size=24", "heads=5"]),
        (dict(num_attention_heads=8), ["head_dim=3", "even"]),
        (dict(head_dim=0), ["head_dim=0"]),
        (dict(head_dim=-6), ["head_dim=-6"]),
        (dict(head_dim="6"), ["head_dim='6'", "must be an integer"]),
        (dict(rope_theta=0), ["rope_theta=0", "positive"]),
        (dict(rope_theta=float("nan")), ["rope_theta=nan"]),
        (dict(rms_norm_eps=float("inf")), ["rms_norm_eps=inf"]),
        (dict(rms_norm_eps="1e-6"), ["rms_norm_eps='1e-6'", "must be a number"]),
        (dict(tie_word_embeddings="false"), ["tie_word_embeddings='false'", "true or false"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_config_values(source, changes, words):
    (source / "config.json").write_text(json.dumps(config_of(source, **changes)))
    refuses(source, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_experts=17), ["num_experts=17", "G_O*R_O*R_I*G_I", "1*1*1*4 = 4"]),
        (dict(R_I=0), ["intermediate_expansion=0", "at least 1"]),
        (dict(R_O=0), ["output_expansion=0", "at least 1"]),
        (dict(G_I=0), ["intermediate_granularity=0", "at least 1"]),
        (dict(G_O=0), ["G_O=0"]),
        (dict(G_I=3, num_experts=3), ["intermediate_size=128", "intermediate_granularity=3"]),
        (dict(G_O=3, num_experts=12, num_experts_per_tok=3),
         ["hidden_size=64", "output_granularity=3"]),
        (dict(num_experts_per_tok=5), ["active_per_group=5", "4 experts"]),
        (dict(num_experts_per_tok=0), ["num_experts_per_tok=0", "G_O=1"]),
        (dict(G_O=2, num_experts=8, num_experts_per_tok=3), ["num_experts_per_tok=3", "G_O=2"]),
        (dict(moe_intermediate_size=33), ["moe_intermediate_size=33", "128", "= 32"]),
        (dict(mlp_only_layers=[2]), ["mlp_only_layers contains 2", "num_hidden_layers=2"]),
        (dict(mlp_only_layers="none"), ["mlp_only_layers='none'"]),
        (dict(decoder_sparse_step=0), ["decoder_sparse_step=0"]),
        (dict(norm_topk_prob=1), ["norm_topk_prob=1", "must be true or false"]),
        (dict(G_I=None), ["G_I=None", "must be an integer"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_mixture_config_values(tmp_path, changes, words):
    folder = shutil.copytree(MIXTURE, tmp_path / "s")
    (folder / "config.json").write_text(json.dumps(config_of(folder, **changes)))
    refuses(folder, *words)


def test_sizes_beyond_all_memory_are_compared_before_anything_is_allocated(source):
    config = config_of(source, vocab_size=2**40, intermediate_size=2**40)
    (source / "config.json").write_text(json.dumps(config))
    refuses(source, "(96, 24)", f"({2**40}, 24)")


# --- tensors --------------------------------------------------------------------------------


def test_every_mismatch_is_listed_at_once(tmp_path):
    tensors = tensors_of(UNTIED)
    missing = ["lm_head.weight", "model.layers.1.self_attn.v_proj.bias"]
    for name in missing:
        del tensors[name]
    extra = {"model.layers.2.mlp.up_proj.weight": (40, 24), "visual.patch_embed": (1,)}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    tensors[QUERY] = tensors[QUERY][:12]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(4, 6)
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(24, np.float64)
    message = refuses(
        write(tmp_path / "s", config_of(UNTIED), tensors),
        "2 missing", *missing, "2 unexpected", *extra, "2 of the wrong shape",
        QUERY, "(12, 24)", "(24, 24)", "model.norm.weight", "(4, 6)", "(24,)",
        "model.layers.0.input_layernorm.weight", "F64",
    )  # fmt: skip
    assert message.count(QUERY) == 1
    assert "model.layers.1.input_layernorm.weight" not in message


def test_a_missing_expert_is_named(tmp_path):
    folder = shutil.copytree(MIXTURE, tmp_path / "s")
    tensors = tensors_of(folder)
    names = [f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")]
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    refuses(folder, "3 missing", *names)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_, np.float64])
def test_tensors_of_other_dtypes(tmp_path, dtype):
    tensors = tensors_of(UNTIED)
    for name in (QUERY, EMBEDDING):
        tensors[name] = tensors[name].astype(dtype)
    refuses(write(tmp_path / "s", config_of(UNTIED), tensors), QUERY, EMBEDDING, "F32, BF16, F16")


def test_transposed_matrices_are_refused(tmp_path):
    tensors = tensors_of(UNTIED)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    refuses(write(tmp_path / "s", config_of(UNTIED), tensors), name, "(24, 40)", "(40, 24)")


def test_tied_embeddings_with_another_head(tmp_path):
    tensors = tensors_of(TIED)
    folder = write(
        tmp_path / "s", config_of(TIED), tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}
    )
    refuses(folder, "tie_word_embeddings", "lm_head.weight", EMBEDDING)


def test_tied_embeddings_with_a_head_alone(tmp_path):
    tensors = tensors_of(TIED)
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    refuses(write(tmp_path / "s", config_of(TIED), tensors), "missing", EMBEDDING)


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_files(source, kept):
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if kept >= 1 or kept == 0 else int(len(data) * kept)])
    refuses(source, "model.safetensors", "truncated or not a safetensors file")


def test_truncated_shard_is_named(tmp_path):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), 3)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(folder, path.name, "truncated")


def with_header(header, body=b"\0" * 64, length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start, end, shape=(2, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        with_header({"a": entry(0, 32), "b": entry(64, 96)}),
        with_header({"a": entry(0, 32), "b": entry(0, 32)}),
        with_header({"a": entry(0, 32), "b": entry(16, 48)}),
        with_header({"a": entry(0, 32), "b": entry(32, 10**15)}),
        with_header({"a": entry(0, 64)}),
        with_header({"a": entry(0, 32), "b": entry(32, 64, shape=(2, 2**62))}),
        with_header({"a": entry(32, 0), "b": entry(0, 64)}),
        with_header({"a": entry(-32, 0), "b": entry(0, 64)}),
        with_header({"a": entry(0, 32)}),
        with_header({"a": entry(0, 64, dtype="F31")}),
        with_header({"a": [0, 64]}),
        with_header([entry(0, 64)]),
        with_header(b"{not json"),
        with_header(b"\xff" * 20),
        with_header({}, length=2**63),
        with_header({}, length=10**9),
    ],
    ids=["hole", "same place", "overlap", "beyond the end", "shape too small", "shape overflows",
         "backwards", "negative", "rest unused", "unknown dtype", "no entry", "list", "no JSON",
         "no UTF-8", "length overflows", "length beyond the file"],
)  # fmt: skip
def test_headers_that_lie(source, data):
    (source / "model.safetensors").write_bytes(data)
    refuses(source, "model.safetensors", "truncated or not a safetensors file")


def test_a_tensor_moved_over_another_is_refused(source):
    """A header of the right form whose offsets point at a neighbour's bytes."""
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    other = "model.layers.1.self_attn.q_proj.weight"
    header[QUERY]["data_offsets"] = header[other]["data_offsets"]
    path.write_bytes(with_header(header, data[8 + length :]))
    refuses(source, "model.safetensors")


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "{absolute}", "sub/../../outside.safetensors", "..", ".", "",
     "sub/inside.safetensors"],
)  # fmt: skip
def test_index_that_leaves_its_directory(tmp_path, place):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), 2)
    outside = tmp_path / "outside.safetensors"
    save_file(tensors_of(UNTIED), outside)
    (folder / "sub").mkdir()
    save_file(tensors_of(UNTIED), folder / "sub" / "inside.safetensors")
    place = place.format(absolute=outside)
    write_index(folder, dict.fromkeys(tensors_of(UNTIED), place))
    refuses(folder, "index.json", "outside its directory", repr(place))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ["not readable as JSON"]),
        ("[]", ["not a JSON object"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": ["model-00001-of-00002.safetensors"]}', ["weight_map"]),
        ('{"weight_map": {"a": 1}}', ["weight_map"]),
        ('{"weight_map": {}}', []),
        ('{"weight_map": {"a": "model-00009-of-00002.safetensors"}}', ["00009", "missing"]),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', ["a (", "contradicts"]),
    ],
)
def test_damaged_index(tmp_path, index, words):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), 2)
    (folder / "model.safetensors.index.json").write_text(index)
    refuses(folder, *words)


def test_index_that_misplaces_a_tensor(tmp_path):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), 2)
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    places[QUERY] = next(file for file in places.values() if file != places[QUERY])
    write_index(folder, places)
    refuses(folder, "contradicts", QUERY)


def test_a_tensor_in_two_shards(tmp_path):
    folder = write(tmp_path / "s", config_of(UNTIED), tensors_of(UNTIED), 2)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        save_file(load_file(file) | {QUERY: tensors_of(UNTIED)[QUERY] + 1}, file)
    refuses(folder, QUERY, *(file.name for file in files))


def test_a_name_twice_in_one_header(source):
    """JSON allows it; which of the two a reader takes is anyone's guess."""
    text = json.dumps({"a": entry(0, 32)})[:-1] + ', "a": ' + json.dumps(entry(32, 64)) + "}"
    (source / "model.safetensors").write_bytes(with_header(text.encode()))
    refuses(source, "model.safetensors")


class Trap:
    """An object whose unpickling leaves a mark."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def zipped(data):
    """As torch.save writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["0", "1", "2", "3", "4", "5", "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_pickles_are_never_loaded(source, tmp_path, kind, name):
    marker = tmp_path / "marker"
    data = pickle.dumps({"w": Trap(marker)}, protocol=2 if kind == "zip" else int(kind))
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(zipped(data) if kind == "zip" else data)
    words = ["pickle", name] if kind not in "01" or name != "model.safetensors" else [name]
    refuses(source, "safetensors", *words)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the trap does not work"


def test_weights_that_are_no_file(source):
    (source / "model.safetensors").unlink()
    refuses(source, "neither model.safetensors nor model.safetensors.index.json")
    (source / "model.safetensors").mkdir()
    refuses(source, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("{tmp}/nowhere", ["nowhere", "neither a directory nor a Hub id"]),
        ("nobody/has-this-model-cached", ["nobody/has-this-model-cached", "Hub download failed"]),
        ("a/b/c", ["a/b/c", "Hub id"]),
        ("{tmp}/file", ["file", "directory that contains config.json"]),
    ],
)
def test_sources_that_are_no_directory(tmp_path, monkeypatch, place, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(save(tensors_of(UNTIED)))
    refuses(place.format(tmp=tmp_path), *words)
