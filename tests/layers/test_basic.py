"""Frequencies of rotary embeddings beside NumPy's float64 and transformers' own."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import finermoe_jax as fm
from finermoe_jax.layers.basic import rotary_angles, rotary_frequencies
from finermoe_jax.weights.hf_config import model_config_from_hf, model_config_to_hf
from tests.oracles import naive_decoder
from tests.support import DATA

# Frequencies and factors of transformers 5.23.0: ROPE_INIT_FUNCTIONS of Qwen2Config, on a CPU.
RECORDED = json.loads((DATA / "rotary.json").read_text())


def of_recorded(case, **changes):
    """config.json of a recorded case."""
    sizes = dict(
        model_type="qwen2", vocab_size=16, hidden_size=24, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return sizes | RECORDED[case]["config"] | changes


@pytest.mark.parametrize("case", RECORDED)
def test_frequencies(case):
    values = of_recorded(case)
    config = model_config_from_hf(values, "config.json")
    frequencies, factor = rotary_frequencies(config)
    assert frequencies.dtype == np.float32
    wanted = np.asarray(RECORDED[case]["frequencies"])
    np.testing.assert_allclose(frequencies, wanted, rtol=3e-7)
    np.testing.assert_allclose(factor, RECORDED[case]["factor"], rtol=1e-12)
    wanted = naive_decoder.frequencies(values["head_dim"], values)
    np.testing.assert_allclose(frequencies, wanted, rtol=2e-6)
    np.testing.assert_allclose(factor, naive_decoder.length_scale(values), rtol=1e-12)
    cos, sin = rotary_angles(jnp.asarray([[0, 1]]), config)
    np.testing.assert_allclose(cos[0, 0], factor, rtol=1e-6)
    np.testing.assert_allclose(sin[0, 1], factor * np.sin(wanted), rtol=1e-5)
    assert cos.dtype == sin.dtype == jnp.float32


@pytest.mark.parametrize("case", RECORDED)
def test_config_files_keep_what_is_stated(case):
    values = of_recorded(case)
    config = model_config_from_hf(values, "config.json")
    written = model_config_to_hf(config, "float32")
    stated = {("rope_type" if k == "type" else k): v for k, v in values["rope_scaling"].items()}
    assert written["rope_scaling"] == stated
    assert written["max_position_embeddings"] == values["max_position_embeddings"]
    assert model_config_from_hf(written, "export") == config
    # As transformers 5 writes it.
    theta = values["rope_theta"]
    moved = values | {"rope_theta": None, "rope_scaling": None}
    moved["rope_parameters"] = values["rope_scaling"] | {"rope_theta": theta}
    assert model_config_from_hf(moved, "config.json") == config


def test_the_context_that_scaling_gives():
    found = {case: model_config_from_hf(of_recorded(case), "c").context_length for case in RECORDED}
    assert found == {
        "linear": 16384,
        "Qwen2.5 by its documentation": 131072,
        "yarn, silent about the context": 131072,
        "yarn, other turns, not rounded": 131072,
        "yarn with mscale": 163840,
        "yarn with attention_factor": 8192,
        "yarn, one turn for both": 256,
        "llama3, silent about the context": 8192,
        "Llama 3.2": 131072,
    }


def test_the_context_may_stand_beside_the_scaling():
    """As in Phi-3's files, and as transformers 5 reads it of every model."""
    scaling = {"type": "yarn", "factor": 4.0}
    inside = dict(rope_scaling=scaling | {"original_max_position_embeddings": 4096})
    case = "yarn, silent about the context"
    beside = of_recorded(case, rope_scaling=scaling, original_max_position_embeddings=4096)
    wanted = model_config_from_hf(of_recorded(case, **inside), "config.json")
    assert model_config_from_hf(beside, "config.json") == wanted
    with pytest.raises(fm.InputError, match=r"=2048 and .*4096.* contradict"):
        model_config_from_hf(beside | inside | {"original_max_position_embeddings": 2048}, "c")


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (dict(type="yarn"), ["lacks factor"]),
        (dict(type="yarn", factor=math.nan), ["factor=nan"]),
        (dict(type="yarn", factor=4.0, beta_fast=-1), ["beta_fast=-1"]),
        (dict(type="yarn", factor=4.0, truncate="no"), ["truncate='no'"]),
        (dict(type="yarn", factor=4.0, original_max_position_embeddings=10**16), ["below 1e+15"]),
        (dict(type="yarn", factor=4.0, original_max_position_embeddings=10**400), ["64 bits"]),
        (dict(type="yarn", factor=4.0, original_max_position_embeddings=32.5), ["32.5", "integer"]),
        (dict(type="yarn", factor=4.0, low_freq_factor=1.0), ["low_freq_factor", "yarn"]),
        (dict(type="linear", factor=4.0, beta_fast=32), ["beta_fast", "linear"]),
        (dict(type="linear", factor=0), ["factor=0"]),
        (dict(type="yarn", factor=4.0, rope_theta=1), ["rope_theta=1.0", "above 1"]),
    ],
    ids=lambda value: "",
)
def test_refused(scaling, words):
    values = of_recorded("linear", rope_scaling=scaling, rope_theta=None)
    with pytest.raises(fm.InputError) as error:
        model_config_from_hf(values, "config.json")
    assert [word for word in words if word not in str(error.value)] == [], error.value
