"""Llama, Mistral and Qwen3: against NumPy and transformers' models (recorded/dense/make.py)."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.analysis.params import sharding_table
from finermoe_jax.config.model import RopeScaling
from finermoe_jax.config.presets import QWEN3
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.model.counts import true_counts
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_config import model_config_from_hf, model_config_to_hf
from tests.oracles import naive, naive_decoder
from tests.support import DATA, SMALL, load_preset
from tests.support.models import config_of

DENSE = DATA / "dense"
CASES = ["llama", "llama3_tied", "mistral", "qwen3", "qwen3_tied", "qwen2_yarn", "llama_linear"]
GRANULARITIES = dict(
    intermediate_granularity=4,
    output_granularity=2,
    intermediate_expansion=1,
    output_expansion=2,
    active_per_group=1,
)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def logits(model, ids, mask=None):
    return np.asarray(model(jnp.asarray(ids), mask).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name):
    folder, golden = DENSE / name, load_file(DENSE / name / "golden.safetensors")
    model, ids = fm.load_hf(folder), golden["input_ids"]
    whole = np.ones_like(ids)
    got = logits(model, ids, whole)
    tensors, config = tensors_of(folder), config_of(folder)
    for row in range(2):
        wanted = naive_decoder.decoder(ids[row], tensors, config)
        np.testing.assert_allclose(got[row], wanted, atol=2e-5)
    np.testing.assert_allclose(got, golden["logits"], atol=2e-5)
    mask = golden["left_pad.mask"]
    padded = logits(model, ids, mask)
    real = mask == 1
    np.testing.assert_allclose(padded[real], golden["left_pad.logits"][real], atol=2e-5)
    # With the cache; transformers' tokens are those of its own cache.
    made = fm.generate(model, jnp.asarray(ids), max_new_tokens=16)
    np.testing.assert_array_equal(made, golden["sequences"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_identical(tmp_path, name):
    source = DENSE / name
    convert(str(source), tmp_path / "orbax", "orbax", None, seed=0)
    convert(str(tmp_path / "orbax"), tmp_path / "hf", "hf", None, seed=0)
    wanted, got = tensors_of(source), tensors_of(tmp_path / "hf")
    assert got.keys() == wanted.keys()
    for tensor, values in wanted.items():
        assert got[tensor].dtype == values.dtype and got[tensor].shape == values.shape
        assert got[tensor].tobytes() == values.tobytes(), tensor
    was, now = config_of(source), config_of(tmp_path / "hf")
    assert (now["model_type"], now["architectures"]) == (was["model_type"], was["architectures"])
    same = ("head_dim", "num_attention_heads", "rms_norm_eps", "tie_word_embeddings")
    assert [now[key] for key in same] == [was[key] for key in same]
    for of_rotary in (lambda c: naive_decoder.frequencies(10, c), naive_decoder.length_scale):
        assert of_rotary(now) == of_rotary(was)
    stated = model_config_from_hf(was, "source")
    assert model_config_from_hf(now, "export") == stated == fm.load_hf(tmp_path / "hf").config


@pytest.mark.nightly
def test_upcycled_qwen3(tmp_path):
    source = DENSE / "qwen3_tied"
    dense = fm.load_hf(source)
    moe = fm.upcycle(dense, **GRANULARITIES, key=jax.random.key(0))
    ids = load_file(source / "golden.safetensors")["input_ids"]
    fm.save_hf(moe, tmp_path / "out")
    config = config_of(tmp_path / "out")
    stated = ("model_type", "architectures", "qk_norm", "qkv_bias", "head_dim")
    wanted = ["finer_moe", ["FineRMoeForCausalLM"], True, False, 10]
    assert [config[key] for key in stated] == wanted
    settings = naive.Settings(24, 40, G_I=4, G_O=2, R_I=1, R_O=2, T_I=1)
    tensors = tensors_of(tmp_path / "out")
    # Attention, norms and embedding are the source's own.
    kept = {n: t for n, t in tensors_of(source).items() if ".mlp." not in n}
    assert all(tensors[n].tobytes() == t.tobytes() for n, t in kept.items())
    again = fm.load_hf(tmp_path / "out")
    assert dataclasses.replace(again.config, moe=moe.config.moe) == moe.config
    got = logits(again, ids)
    for row in range(2):
        wanted = naive_decoder.decoder(ids[row], tensors, config, settings)
        np.testing.assert_allclose(got[row], wanted, atol=2e-5)
    # The cache gives what whole sequences give, padded or not.
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    made = np.asarray(fm.generate(again, jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=8))
    seen = np.concatenate([mask, np.ones((2, 8), mask.dtype)], axis=1)
    uncached = logits(again, made, seen)[:, 23:-1].argmax(-1)
    np.testing.assert_array_equal(made[:, 24:], uncached)


def test_qwen3_0p6b():
    # The published file of weights states 596,049,920 parameters.
    assert true_counts(QWEN3["0.6B"]).total == 596_049_920
    config = load_preset("qwen3_0p6b")
    assert config.dense == QWEN3["0.6B"] and config.moe == fm.MoEConfig(32, 2, 1, 2, 1)
    assert load_preset("qwen3_0p6b", "ct").moe is None
    model = dataclasses.replace(QWEN3["0.6B"], moe=config.moe, tie_word_embeddings=False)
    mesh = dataclasses.replace(config, mesh=MeshConfig(1, 2, 2, 2))
    rows = [line for line in sharding_table(mesh, model).splitlines() if "query_norm" in line]
    assert "28x128 " in rows[0] and "layer norm" in rows[0] and "(-, -)" in rows[0]


# --- config.json ----------------------------------------------------------------------------

# As published, but for keys that say nothing about the computation.
SMOLLM2 = dict(
    model_type="llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu",
    hidden_size=576, intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192,
    mlp_bias=False, num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
    pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
    rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
)  # fmt: skip
LLAMA32 = dict(
    model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048,
    intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
    rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3",
    ), tie_word_embeddings=True, vocab_size=128256,
)  # fmt: skip
MISTRAL = dict(
    model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
    max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
    tie_word_embeddings=False, vocab_size=32768,
)  # fmt: skip
QWEN3_FILE = dict(
    model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024,
    intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip


def test_published_files():
    smollm2 = model_config_from_hf(SMOLLM2, "SmolLM2-135M")
    assert load_preset("smollm2_135m").dense == smollm2
    assert not smollm2.attention_bias and not smollm2.qk_norm and smollm2.attention_head_dim == 64
    assert true_counts(smollm2).total == 134_515_008
    llama = model_config_from_hf(LLAMA32, "Llama-3.2-1B")
    assert llama.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert true_counts(llama).total == 1_235_814_400
    assert true_counts(model_config_from_hf(MISTRAL, "Mistral-7B-v0.3")).total == 7_248_023_552
    assert model_config_from_hf(QWEN3_FILE, "Qwen3-0.6B") == QWEN3["0.6B"]
    silent = {key: value for key, value in QWEN3_FILE.items() if key != "head_dim"}
    assert model_config_from_hf(silent, "Qwen3-0.6B") == QWEN3["0.6B"]


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        (QWEN3_FILE, dict(attention_bias=True), ["attention_bias=True", "o_proj"]),
        (SMOLLM2, dict(attention_bias=True), ["attention_bias=True", "o_proj"]),
        (SMOLLM2, dict(mlp_bias=True), ["mlp_bias=True"]),
        (MISTRAL, dict(sliding_window=4096), ["sliding_window=4096"]),
        (MISTRAL, dict(sliding_window=...), ["sliding_window=4096"]),
        (QWEN3_FILE, dict(use_sliding_window=True, sliding_window=99, max_window_layers=27),
         ["sliding_window=99", "use_sliding_window=True", "max_window_layers=27"]),
        (MISTRAL, dict(num_key_value_heads=..., num_attention_heads=12),
         ["num_attention_heads=12", "num_key_value_heads=8"]),
        (QWEN3_FILE, dict(layer_types=["full_attention", "sliding_attention"]),
         ["layer_types", "sliding_attention"]),
        (QWEN3_FILE, dict(layer_types=28), ["layer_types=28"]),
        (QWEN3_FILE, dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
        (LLAMA32, dict(rope_scaling=LLAMA32["rope_scaling"] | dict(rope_type="yarn")),
         ["rope_scaling", "yarn", "low_freq_factor"]),
        (LLAMA32, dict(rope_scaling=dict(type="dynamic", factor=4.0)), ["rope_type='dynamic'"]),
        (LLAMA32, dict(rope_scaling=dict(type="longrope", factor=4.0)), ["rope_type='longrope'"]),
        (LLAMA32, dict(rope_scaling=dict(rope_type="llama3", factor=8.0)),
         ["needs low_freq_factor"]),
        (LLAMA32, dict(rope_scaling=LLAMA32["rope_scaling"] | dict(high_freq_factor=1.0)),
         ["high_freq_factor=1.0", "low_freq_factor=1.0"]),
        (LLAMA32, dict(rope_scaling=LLAMA32["rope_scaling"] | dict(factor=0)), ["factor=0"]),
        (LLAMA32, dict(rope_scaling=LLAMA32["rope_scaling"]
                       | dict(original_max_position_embeddings=-1)), ["=-1", "positive"]),
        (LLAMA32, dict(rope_scaling="llama3"), ["rope_scaling='llama3'"]),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(values, changes, words):
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    with pytest.raises(fm.InputError) as error:
        model_config_from_hf(values, "config.json")
    assert [word for word in words if word not in str(error.value)] == [], error.value


def test_biases_with_norms_have_no_dense_form_and_missing_norms_are_named(tmp_path):
    both = dataclasses.replace(SMALL, attention_bias=True, qk_norm=True)
    with pytest.raises(fm.InputError, match="attention_bias=True together with qk_norm=True"):
        model_config_to_hf(both, "float32")
    folder = shutil.copytree(DENSE / "llama", tmp_path / "s")
    values = config_of(folder) | {"model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(fm.InputError, match=r"4 missing:[^4]*layers.0.self_attn.k_norm.weight"):
        fm.load_hf(folder)
