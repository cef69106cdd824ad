"""Wrong arguments from Python get one message, in a process without the tests' type checks."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import finermoe_jax as fm
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.generation.text import stream_text
from tests.support import GOLDEN, ROOT

TIED = GOLDEN / "upcycle" / "dense_tied"
MIXTURE = GOLDEN / "e_conv_split"
DEMO = ROOT / "finermoe_jax" / "demo" / "model"
NUMBERS = dict(intermediate_granularity=4, output_granularity=2, intermediate_expansion=1,
               output_expansion=2, active_per_group=1)  # fmt: skip

# Python code, and words of the message that it gets.
WRONG = [
    ("generate(dense, [[1, 2]], max_new_tokens=2.0)", "max_new_tokens=2.0 must be an integer"),
    ("generate(dense, [[1, 2]], max_new_tokens=True)", "max_new_tokens=True must be an integer"),
    ("generate(dense, [[1, 2]], max_new_tokens='2')", "max_new_tokens='2' must be an integer"),
    ("generate(dense, [[1, 2]], max_new_tokens=0)", "max_new_tokens=0 must be at least 1"),
    ("generate(dense, [[1, 2], [3]])", "rows of different lengths"),
    ("generate(dense, [[1, 2]], [[1], [1, 1]])", "attention_mask has rows of different lengths"),
    ("generate(dense, [[1, 2]], [['a', 'b']])", "must contain numbers or bools"),
    ("generate(dense, [1, 2])", "must be [batch, tokens]"),
    ("generate(dense, [[1.0, 2.0]])", "must be integers"),
    ("generate(dense, [[True, False]])", "must be integers"),
    ("generate(dense, [['a', 'b']])", "must be integers"),
    ("generate(dense, [[1, 96]])", "must be in 0 … 95, the vocabulary"),
    ("generate(dense, [[1, -1]])", "must be in 0 … 95, the vocabulary"),
    ("generate('model', [[1, 2]])", "model is of type str, not Decoder"),
    ("generate(dense, [[1, 2]], temperature='hot')", "temperature='hot' must be a number"),
    ("generate(dense, [[1, 2]], temperature=True)", "temperature=True must be a number"),
    ("generate(dense, [[1, 2]], temperature=float('nan'))", "temperature=nan must be"),
    ("generate(dense, [[1, 2]], temperature=-1)", "temperature=-1 must be"),
    ("generate(dense, [[1, 2]], seed=1.5)", "seed=1.5 must be an integer"),
    ("generate(dense, [[1, 2]], seed=-1)", "seed=-1 must be"),
    ("generate(dense, [[1, 2]], sampling={})", "sampling is of type dict, not Sampling"),
    ("sample(top_k=2.5)", "top_k=2.5 must be an integer"),
    ("sample(top_k=True)", "top_k=True must be an integer"),
    ("sample(top_k=None)", "top_k=None must be an integer"),
    ("sample(top_k=-1)", "top_k=-1 must be"),
    ("sample(top_p='all')", "top_p='all' must be a number"),
    ("sample(top_p=float('nan'))", "top_p=nan must be"),
    ("sample(top_p=1.5)", "top_p=1.5 must be"),
    ("sample(repetition_penalty=True)", "repetition_penalty=True must be a number"),
    ("sample(repetition_penalty=-1.0)", "repetition_penalty=-1.0 must be"),
    ("dense([[1, 2], [3]])", "rows of different lengths"),
    ("dense([1, 2])", "must be [batch, tokens]"),
    ("dense([[1.5, 2]])", "must be integers"),
    ("dense([[1, 96]])", "must be in 0 … 95, the vocabulary"),
    ("dense([[1, 2]], attention_mask=[[1]])",
     "attention_mask has shape (1, 1); it must have input_ids' shape (1, 2)"),
    ("dense([[1, 2]], position_ids=[[0, 1, 2]])",
     "position_ids has shape (1, 3); it must have input_ids' shape (1, 2)"),
    ("fm.complete(dense, words, '')", "prompt is empty"),
    ("fm.complete(dense, words, 'a', temperature=-1)", "temperature=-1 must be"),
    ("fm.complete(dense, words, ['a', 5])", "a prompt"),
    ("fm.load_tokenizer(5)", "path=5 must be a path"),
    ("fm.load_tokenizer('no/such/place')", "no/such/place"),
    ("stream_text(dense, words, [1.5], 4)", "a prompt contains 1.5; token ids"),
    ("stream_text(dense, words, [True], 4)", "a prompt contains True; token ids"),
    ("stream_text(dense, words, [[1, 2]], 4)", "a prompt contains [1, 2]; token ids"),
    ("stream_text(dense, words, b'ab', 4)", "a prompt contains b'ab'; token ids"),
    ("stream_text(dense, words, None, 4)", "a prompt contains None; token ids"),
    ("stream_text(dense, words, [1], 4.0)", "max_new_tokens=4.0 must be an integer"),
    ("stream_text(dense, words, [1], 4, stop=[5])", "stop contains 5; it must be a string"),
    ("stream_text(dense, words, [1], 4, stop='')", "a stop string is empty"),
    ("stream_text(dense, words, [1], 4, ends=['a'])", "ends contains 'a'; token ids"),
    ("continue_all(dense, words, 'ab', max_new_tokens=4)", "give a list of strings"),
    ("continue_all(dense, words, [[1]], max_new_tokens=4, batch_size=2.0)", "batch_size=2.0 must"),
    ("with_layer(dense, Mine)", "no MoE layer to replace by Mine: upcycle it first"),
    ("with_layer(moe, dict)", "must be a subclass of FineRMoE"),
    ("with_layer(moe, Mine(moe.config, dtype='float32', rngs=rngs))", "must be a subclass"),
    ("with_layer('moe', Mine)", "model is of type str, not Decoder"),
    ("upcycle(dense, intermediate_granularity=4.0)", "granularity=4.0 must be an integer"),
    ("upcycle(dense, output_granularity=True)", "output_granularity=True must be an integer"),
    ("upcycle(dense, active_per_group='1')", "active_per_group='1' must be an integer"),
    ("upcycle(dense, output_expansion=0)", "output_expansion=0 must be at least 1"),
    ("upcycle(dense, shared_expert='no')", "shared_expert is of type str, not bool"),
    ("upcycle(dense, key=0)", "key=0 must be a JAX PRNG key"),
    ("upcycle(dense, start=dict(drop_ratio=0.5))", "start is of type dict, not UpcycleConfig"),
    ("upcycle('dense')", "the dense model is of type str, not Decoder"),
    ("upcycle(moe)", "has experts already"),
    ("fm.upcycle_model(dense, dict(), jax.random.key(0))", "moe is of type dict, not MoEConfig"),
    ("fm.MoEConfig(router_dtype='float8')", "router_dtype='float8' must be 'float32', 'bfloat16'"),
    ("fm.home(-1)", "expert=-1 must be at least 0"),
    ("fm.home('3')", "expert='3' must be an integer"),
    ("fm.home(jax.numpy.ones(2))", "expert is an array of float32"),
    ("fm.home(1, experts_across=0)", "experts_across=0 must be at least 1"),
    ("fm.home(1, experts_across=2, layer=-1)", "layer=-1 must be at least 0"),
    ("fm.MoEConfig(mlp_only_layers=[0])", "mlp_only_layers=[0] must be a tuple"),
    ("fm.MoEConfig(shared_expert_intermediate_size=1.5)", "=1.5 must be an integer or None"),
    ("fm.UpcycleConfig(drop_ratio=True)", "drop_ratio=True must be a number"),
    ("dataclasses.replace(dense.config, rope_theta='big')", "rope_theta='big' must be a number"),
    ("dataclasses.replace(dense.config, moe=dict())", "moe={} must be MoEConfig or None"),
    ("fm.RunConfig(init_from='x', train=TrainConfig(steps=2.5))", "steps=2.5 must be an integer"),
    ("fm.RunConfig(init_from='x', prompts=['ab'])", "prompts=['ab'] must be a tuple"),
    ("fm.run_config(None)", "config is of type NoneType"),
    ("fm.load_hf(None)", "source=None must be a path"),
    ("fm.load_hf(5)", "source=5 must be a path"),
    ("fm.load_hf(TIED, dtype='int8')", "dtype='int8' must be float32, bfloat16, float16"),
    ("fm.load_hf(TIED, dtype='floaty')", "dtype='floaty' must be float32, bfloat16, float16"),
    ("fm.load_checkpoint(None)", "path=None must be a path"),
    ("fm.save_hf('dense', 'out')", "model is of type str, not Decoder"),
    ("fm.save_hf(dense, None)", "path=None must be a path"),
    ("fm.save_hf(dense, 'out', tokenizer='nowhere')", "tokenizer='nowhere' is not a directory"),
    ("fm.save_checkpoint(dense, 5)", "path=5 must be a path"),
    ("fm.save_checkpoint(dense, 'out', tokenizer=7)", "tokenizer=7 must be a path"),
    ("fm.save_checkpoint(dense, 'out', tokenizer='no')", "tokenizer='no' is not a directory"),
]  # fmt: skip

SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
import jax
from flax import nnx
import finermoe_jax as fm
from finermoe_jax import generate, with_layer
from finermoe_jax.generation.text import stream_text, continue_all
from finermoe_jax.config.run import TrainConfig
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.data.tokenizers import open_tokenizer

class Mine(fm.FineRMoE):
    pass

TIED, mixture, demo, codes, numbers = sys.argv[1:4] + [json.loads(a) for a in sys.argv[4:]]
dense, words, rngs = fm.load_hf(TIED), open_tokenizer(Path(demo), 2048), nnx.Rngs(0)
moe = fm.load_hf(mixture)
sample = lambda **settings: generate(dense, [[1, 2]], sampling=Sampling(**settings))
upcycle = lambda model, **changes: fm.upcycle(model, **(numbers | changes))
for code in codes:
    try:
        eval(code)
        print(json.dumps("no error"))
    except fm.InputError as error:
        print(json.dumps(str(error)))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.mark.nightly  # a process of its own
def test_wrong_arguments_get_one_message(tmp_path):
    given = json.dumps([code for code, _ in WRONG]), json.dumps(NUMBERS)
    command = [sys.executable, "-c", SCRIPT, str(TIED), str(MIXTURE), str(DEMO), *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [
        (code, message)
        for (code, words), message in zip(WRONG, got, strict=True)
        if words not in message or message.startswith(("TypeError", "ValueError"))
    ]
    assert wrong == []
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def writer():
    return fm.load_hf(DEMO)


@pytest.mark.slow
def test_one_string_is_one_stop_string(writer):
    """Not its characters, the first of which comes up earlier."""
    tokenizer = open_tokenizer(DEMO, 2048)
    whole = "".join(stream_text(writer, tokenizer, "def f(self, a):", 24))
    stop = next(
        whole[i : i + 2]
        for i in range(1, len(whole))
        if whole.index(whole[i]) < whole.index(whole[i : i + 2])
    )
    given = "".join(stream_text(writer, tokenizer, "def f(self, a):", 24, stop=stop))
    assert given == whole[: whole.index(stop)]


@pytest.mark.slow
def test_numbers_of_other_libraries_serve(writer):
    ids = np.array([[5, 6, 7]], np.int64)
    wanted = np.asarray(fm.generate(writer, ids, max_new_tokens=3))
    settings = Sampling(temperature=np.float32(0), top_k=np.int64(3), top_p=jax.numpy.float32(1))
    got = fm.generate(writer, ids.tolist(), max_new_tokens=3, sampling=settings)
    np.testing.assert_array_equal(got, wanted)


def test_a_preset_is_a_config():
    assert fm.run_config(fm.preset("configs/demo.py")) == fm.run_config(
        fm.preset("configs/demo.py").to_dict()
    )
