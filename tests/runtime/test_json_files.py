"""JSON from users, from crashes and from strangers; JSON that we write."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import finermoe_jax
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.prepare import prepare
from finermoe_jax.data.text import Piece, TextFile
from finermoe_jax.data.token_files import read_manifest, shard_damage, tokenizer_hash
from finermoe_jax.data.tokenizers import generation_settings, open_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation.evaluate import warn_non_finite
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import parse_json, read_json, to_json
from finermoe_jax.training import plot
from finermoe_jax.training.workdir import Log, claim, claim_data
from finermoe_jax.weights.checkpoint import read_description
from finermoe_jax.weights.hf_weights import TensorFiles, read_config
from finermoe_jax.weights.safetensors_files import indexed_files
from finermoe_jax.weights.source import open_model
from tests.support import invoke

MODEL = find("demo/model")
BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LONG = b'{"text": "good", "id": ' + b"1" * 5000 + b"}"
# Python's own functions would end at a few hundred levels, its parser only later.
DEEP, DEEPER = (b'{"text": "good", "id": ' + b"[" * n + b"]" * n + b"}" for n in (400, 100_000))


def test_one_module_reads_and_writes_json():
    package = Path(finermoe_jax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.name == "json_files.py" or path.parent.name == "hf_export":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            assert "json" not in names and getattr(node, "module", None) != "json", path


# --- reading --------------------------------------------------------------------------------


def _index(path):
    return indexed_files(path.parent)


def _workdir(path):
    (path.parent / "checkpoints" / "damaged-1").mkdir(parents=True)
    return claim(path.parent, RunConfig(init_from="x"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("any.json", read_json),
        ("config.json", lambda path: read_config(path.parent)),
        ("config.json", _workdir),
        ("generation_config.json", lambda path: generation_settings(path.parent, 9)),
        ("model.safetensors.index.json", _index),
        ("manifest.json", read_manifest),
        ("tokenizer.json", lambda path: tokenizer_hash(path.parent)),
        ("data.json", lambda path: claim_data(path.parent, {})),
        ("config/metadata", lambda path: read_description(path.parent.parent)),
        ("rows.jsonl", lambda path: list(TextFile(path).pieces())),
    ],
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LONG, "it contains an integer of more than 4300 digits"),
        (DEEP, "nested more than 64 levels"),
        (DEEPER, "nested more than 64 levels"),
        (b'{"text": "\xff"}', "it is not UTF-8 text"),
        (b'{"text": "good"', "Expecting ',' delimiter at column 16"),
    ],
)
def test_every_reader_names_the_file_and_what_is_wrong(tmp_path, name, read, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value) and words in str(error.value)


def test_a_text_of_many_brackets_is_not_deep():
    value = {"text": "[[[{" * 99, "lists": [[i, [i]] for i in range(99)]}
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json("[" * 64 + "]" * 64, "x")
    with pytest.raises(InputError, match="nested more than 64 levels"):
        parse_json("[" * 65 + "]" * 65, "x")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_integers_whose_products_python_would_not_print(tmp_path, key):
    shutil.copytree(MODEL, tmp_path / "m")
    values = read_json(MODEL / "config.json") | {key: int("9" * 4000)}
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{key} has 4000 digits"):
        read_config(tmp_path / "m")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    for name, content, wanted in (
        ("a.jsonl", BOM + b'{"text":"good"}\n' + BOM + b'{"text":"two"}\n' + BOM + b"\n",
         [Piece("good", True), Piece("two", True)]),
        ("a.txt", BOM + "Hello \ufeffthere\n".encode(), [Piece("Hello \ufeffthere\n", True)]),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert list(TextFile(tmp_path / name).pieces()) == wanted
    (tmp_path / "a.json").write_bytes(BOM + b'{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda path: read_config(path.parent)),
        ("model.safetensors", lambda path: TensorFiles(path.parent)),
        ("tokenizer.json", lambda path: open_tokenizer(path.parent, 2048)),
        ("merges.txt", lambda path: open_tokenizer(path.parent, 2048)),
        ("chat_template.jinja", lambda path: open_tokenizer(path.parent, 2048)),
        ("a.txt", TextFile),
        ("a.jsonl.gz", TextFile),
        ("a.parquet", TextFile),
    ],
)
def test_a_git_lfs_pointer_is_named(tmp_path, name, read):
    directory = shutil.copytree(MODEL, tmp_path / "m")
    (directory / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        read(directory / name)


def test_a_hugging_face_directory_may_hold_checkpoints(tmp_path):
    """A trainer's. What is a workdir is told by its config.json, which names no model_type."""
    directory = shutil.copytree(MODEL, tmp_path / "m")
    (directory / "checkpoints" / "checkpoint-500").mkdir(parents=True)
    assert open_model(directory).config == open_model(MODEL).config
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither model\.safetensors"):
        open_model(directory)
    for config in ('{"model": {}}', "{"):
        (directory / "config.json").write_text(config)
        with pytest.raises(InputError, match="is neither a checkpoint"):
            open_model(directory)


def test_a_shard_that_is_a_git_lfs_pointer(tmp_path):
    (tmp_path / "a.txt").write_text("A text of some words.\n" * 9)
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "t", MODEL, say=lambda _: None)
    (tmp_path / "t" / "00000.bin").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"00000\.bin is a git-lfs pointer"):
        shard_damage(tmp_path / "t", manifest.shards[0], np.dtype("<u2"))


@pytest.mark.parametrize("end", [[], [0], [0, 1, 2], [0, -1], [-1, 0], [0, 10**30]])
def test_a_manifest_whose_shard_ends_nowhere(tmp_path, end):
    (tmp_path / "a.txt").write_text("A text of some words.\n" * 9)
    prepare([str(tmp_path / "a.txt")], tmp_path / "t", MODEL, say=lambda _: None)
    path = tmp_path / "t" / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["end"] = end
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"manifest\.json.*(end=|digits)"):
        read_manifest(path)


SOURCE = {"kind": "text", "path": "a.txt", "weight": "1"}
DATA = {"sources": [SOURCE], "eval": None, "tokenizer_sha256": "x"}


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        DATA | {"sources": None},
        DATA | {"sources": ["a.txt"]},
        DATA | {"sources": [{"path": "a.txt"}]},
        *(DATA | {"sources": [SOURCE | {"weight": w}]} for w in ("0", "1/0", "x", None, [1])),
        DATA | {"eval": "b.txt"},
        {name: value for name, value in DATA.items() if name != "tokenizer_sha256"},
    ],
)
def test_a_record_of_data_that_is_none(tmp_path, recorded):
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    claim_data(tmp_path, DATA)
    (tmp_path / "data.json").write_text(json.dumps(recorded))
    with pytest.raises(InputError, match=r"data\.json is damaged .*remove it"):
        claim_data(tmp_path, DATA)


# --- logs -----------------------------------------------------------------------------------

SPOILT = (
    b'{"step": 2, "lo\0\0\0\0', b'{"step": 2, "lo\xff\xfe', b"[1,2]", b"3", b"null", b"{}",
    b'{"step": "2"}', b'{"step": null}', b'{"step": true}', LONG, DEEPER, b"\0" * 4096,
)  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_line_of_a_log_is_passed_over(tmp_path, spoilt):
    first, last = b'{"step": 1, "loss": 3.0}\n', b'{"step": 3, "loss": 2.5}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(first + spoilt + b"\n" + last)
    assert [line["step"] for line in plot.read_lines(path)] == [1, 3]
    (tmp_path / "evals.jsonl").write_bytes(spoilt + b"\n")
    assert not Log(tmp_path).has_evaluation(1)
    Log(tmp_path).cut(3)
    assert path.read_bytes() == first + last
    path.write_bytes(first + spoilt + b"\n" + last + spoilt)
    Log(tmp_path).cut(2)
    assert path.read_bytes() == first


@pytest.mark.slow
def test_spoilt_logs_are_drawn(tmp_path):
    for file in ("metrics.jsonl", "evals.jsonl", "expert_load.jsonl"):
        (tmp_path / file).write_bytes(b"\n".join([b'{"step": 1, "loss": 3.0}', *SPOILT, b""]))
    (tmp_path / "expert_load.jsonl").unlink()
    assert invoke("plot", tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("content", [{}, {"tokens": 1, "candidates": 2}, {"tokens": "x"}])
def test_a_record_that_is_none_of_a_run(tmp_path, content, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    (tmp_path / "expert_load.jsonl").write_text(json.dumps({"step": 1} | content) + "\n")
    assert invoke("plot", tmp_path) == 2
    assert "holds a record that is not a training run's" in capsys.readouterr().err


# --- writing --------------------------------------------------------------------------------


def _strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_written_as_null():
    nan, infinity = float("nan"), float("inf")
    value = {"a": [1, nan, (infinity, "x")], "b": {"c": -infinity, "d": np.float64("nan")}}
    assert _strict(to_json(value)) == {"a": [1, None, [None, "x"]], "b": {"c": None, "d": None}}
    assert to_json({"b": 1, "a": (2,)}, sort_keys=True, indent=1) == json.dumps(
        {"b": 1, "a": [2]}, sort_keys=True, indent=1
    )


def test_a_metric_that_is_no_number_is_said(capsys):
    warn_non_finite({"arc_easy": {"acc": 0.5, "rows": 3}})
    assert capsys.readouterr().err == ""
    warn_non_finite({"truthfulqa_mc2": {"acc": float("nan"), "rows": 2}})
    assert "truthfulqa_mc2: acc is not finite (nan)" in capsys.readouterr().err
