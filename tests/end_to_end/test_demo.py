"""The commands as a user types them, one after the other, on the demo's model."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.weights.source import open_model, read_model
from tests.support import ROOT, processes

DEMO = ROOT / "finermoe_jax" / "demo"

pytestmark = pytest.mark.nightly


def run(script, *arguments, cwd, new=False, **env):
    """Runs a script of the repository; its stdout, or a failed test with its stderr.

    new: by an interpreter that has imported nothing, as a user's.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | env
    command = [sys.executable, str(ROOT / script), *arguments]
    if new:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300
        )
    else:
        done = processes.run(command, cwd=cwd, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def workdir(place):
    text = place / "text.txt"
    text.write_text((DEMO / "pydoc_small.txt").read_text()[:120_000])
    run(
        "train.py", f"--config={ROOT}/configs/demo.py", "--workdir=run",
        f"--config.data.path={text}", "--config.train.steps=3", "--config.prompt_tokens=3",
        "--config.data.sequence_length=64", "--config.data.eval_windows=4",
        cwd=place, new=True,
    )  # fmt: skip
    return place / "run"


def test_training_reports_each_model(workdir):
    assert [e["name"] for e in read_lines(workdir / "evals.jsonl")] == [
        "dense base", "step 0", "step 3",
    ]  # fmt: skip
    samples = read_lines(workdir / "samples.jsonl")
    assert len(samples) == 3 * 3 and all(isinstance(s["text"], str) for s in samples)
    source = open_model(workdir)
    assert source.config.moe == fm.MoEConfig(8, 2, 1, 2, 1)
    assert (source.files / "tokenizer.json").is_file()


def test_generation_continues_the_prompt(workdir, place):
    arguments = ("--checkpoint=run", "--prompt=Return the", "--max_new_tokens=8")
    text = run("generate.py", *arguments, cwd=place)
    assert text.startswith("Return the") and len(text.strip()) > len("Return the")
    assert run("generate.py", *arguments, cwd=place) == text


def test_evaluation_equals_a_plain_forward_pass(workdir, place):
    """Of a text, each document from its first token; and a task of the harness beside it."""
    source = (DEMO / "pydoc_small.txt").read_text()
    texts = [source[-6000:-2000], source[-2000:-1950]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "short.jsonl").write_text(lines)
    rows = place / "rows" / "winogrande"
    rows.mkdir(parents=True)
    row = dict(sentence="A _ is it.", option1="list", option2="dict", answer="1")
    (rows / "validation.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ("--checkpoint=run", "--text=short.jsonl", "--sequence_length=32", "--stride=12",
                 "--tasks=winogrande", "--data_dir=rows", "--limit=5")  # fmt: skip
    stdout = run("eval.py", *arguments, "--output=result.json", cwd=place)
    result = json.loads((place / "result.json").read_text())
    assert json.loads(stdout) == result
    model, tokenizer = read_model(open_model(workdir), workdir), fm.load_tokenizer(workdir)
    total, count = 0.0, 0
    for text in texts:
        ids = np.asarray([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        done = 0
        for end in [*range(32, len(ids) - 1, 12), len(ids) - 1]:
            begin = max(0, end - 32)
            window = np.pad(ids[begin:end], (0, 32 - (end - begin)))  # one shape
            log_p = np.asarray(jax.nn.log_softmax(model(window[None]).logits))[0]
            scored = log_p[np.arange(done, end) - begin, ids[done + 1 : end + 1]]
            total -= scored.sum(dtype=np.float64)
            done = end
        count += done
    assert result["tokens"] == count == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert result["tasks"]["winogrande"]["rows"] == 1
    assert 0 <= result["tasks"]["winogrande"]["acc"] <= 1
    assert result["loss"] == pytest.approx(total / result["tokens"], abs=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]))


def test_there_and_back(workdir, place):
    """Workdir → HF directory → Orbax: every weight bit by bit, and a tokenizer that works."""
    run("convert_hf.py", "--source=run", "--target=hf", "--to=hf", cwd=place)
    run("convert_hf.py", "--source=hf", "--target=orbax", cwd=place)
    config = json.loads((place / "hf" / "config.json").read_text())
    assert config["architectures"] == ["FineRMoeForCausalLM"] and config["num_experts"] == 32
    trained = jax.tree.leaves(nnx.state(fm.load_checkpoint(workdir)))
    for path in ("hf", "orbax"):
        source = open_model(place / path)
        model = read_model(source, place / path)
        for a, b in zip(jax.tree.leaves(nnx.state(model)), trained, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (source.files / "tokenizer.json").is_file()


def test_hub_ids_come_from_the_cache_when_offline(place):
    revision = "abcd" * 10
    snapshot = place / "cache" / "models--someone--tiny" / "snapshots" / revision
    shutil.copytree(DEMO / "model", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(revision)
    offline = dict(HF_HUB_CACHE=str(place / "cache"), HF_HUB_OFFLINE="1")
    run(
        "convert_hf.py", "--source=someone/tiny", "--target=upcycled",
        f"--config={ROOT}/configs/demo.py", cwd=place, new=True, **offline,
    )  # fmt: skip
    moe = fm.load_checkpoint(place / "upcycled")
    dense = fm.load_hf(DEMO / "model")
    assert moe.config.moe.num_experts == 32 and not moe.config.tie_word_embeddings
    shared = nnx.to_pure_dict(nnx.state(moe))["runs"][0][0]["moe"]["shared"]["gate"]
    np.testing.assert_array_equal(
        shared, nnx.to_pure_dict(nnx.state(dense))["runs"][0][0]["mlp"]["gate"]
    )
