"""The tool: what it writes, whoever kills it, and what it refuses."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from finermoe_jax.data import prepare as prepare_data
from finermoe_jax.data import text
from finermoe_jax.data.prepare import expand, prepare
from finermoe_jax.data.token_files import open_prepared, read_manifest, tokenizer_hash, verify
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find
from tests.support import ROOT
from tests.support.hub import hub

MODEL = find("demo/model")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A long document of many pieces, and many short ones."""
    place = tmp_path_factory.mktemp("sources")
    book = find("demo/pydoc_small.txt").read_text()
    (place / "book.txt").write_text(book)
    lines = [json.dumps({"text": book[i : i + 100 + i % 997]}) for i in range(0, 200_000, 500)]
    (place / "lines.jsonl").write_text("\n".join(lines))
    return place


def _prepare(sources, target, **settings):
    said = []
    settings = dict(shard_tokens=20_000) | settings
    prepare([str(sources)], target, MODEL, say=said.append, **settings)
    return said


def _content(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "tokens"
    _prepare(sources, target)
    return target


@pytest.mark.slow
def test_what_is_written_is_the_text(sources, whole):
    from finermoe_jax.data.tokenizers import open_tokenizer

    tokenizer = open_tokenizer(MODEL, 2048)
    source = open_prepared(whole, tokenizer_hash(MODEL), tokenizer.eos_token_id)
    tokens = np.empty(len(source.tokens), np.int32)
    source.tokens.read(0, tokens)
    starts = source.documents()
    ends = [*starts[1:], len(tokens)]
    found = [tokenizer.decode(tokens[a : b - 1]) for a, b in zip(starts, ends, strict=True)]
    lines = (sources / "lines.jsonl").read_text().splitlines()
    assert found == [(sources / "book.txt").read_text(), *(json.loads(x)["text"] for x in lines)]
    assert (tokens[np.asarray(ends) - 1] == tokenizer.eos_token_id).all()
    manifest = verify(whole)
    assert len(manifest.shards) > 5 and manifest.shards[0].open
    assert manifest.shards[-1].sources == (str(sources / "lines.jsonl"),)
    assert set(_content(whole)) == {"manifest.json"} | {
        f"{s.name}.{kind}" for s in manifest.shards for kind in ("bin", "documents.npy")
    }


@pytest.mark.nightly
def test_a_run_that_breaks_off_goes_on(sources, whole, tmp_path, monkeypatch):
    """Broken off before every batch in turn, whatever is half written."""
    target = tmp_path / "tokens"
    monkeypatch.setattr(text, "BATCH_CHARS", 60_000)
    encode, calls = text.encode, itertools.count(1)

    def breaks(batch, tokenizer):
        if next(calls) % 4 == 0:
            raise RuntimeError("broken off")
        return encode(batch, tokenizer)

    monkeypatch.setattr(text, "encode", breaks)
    rounds = 0
    while not (target / "manifest.json").exists():
        rounds += 1
        assert rounds < 50
        try:
            said = _prepare(sources, target)
        except RuntimeError:
            (target / "00099.partial").write_bytes(b"left over")
            (target / ".manifest.json.partial").write_bytes(b"left over")
    assert rounds > 2 and any("resuming after" in line for line in said)
    assert _content(target) == _content(whole)
    before = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    assert "is complete" in _prepare(sources, target)[0]
    assert {p: p.stat().st_mtime_ns for p in target.iterdir()} == before


@pytest.mark.nightly
def test_a_killed_run_of_several_processes_goes_on(sources, whole, tmp_path):
    """SIGKILL at a random moment; the number of processes changes nothing; no worker stays."""
    command = [
        sys.executable, "-m", "finermoe_jax", "prepare", f"--source={sources}",
        f"--target={tmp_path / 'tokens'}", f"--tokenizer={MODEL}", "--shard_tokens=20000",
    ]  # fmt: skip
    settings = dict(cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = subprocess.Popen([*command, "--processes=2"], start_new_session=True, **settings)
    partial = tmp_path / "tokens" / "manifest.partial.json"
    deadline = time.monotonic() + 300
    while not (partial.exists() and read_manifest(partial).shards):
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.02)
    time.sleep(random.random() * 0.1)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()  # until its workers, too, have closed their ends
    again = subprocess.run([*command, "--processes=2"], **settings)
    assert again.returncode == 0, again.stderr
    if "is complete" not in again.stdout:  # the kill may have come too late
        assert "resuming after" in again.stdout and "tokens/s" in again.stderr
    assert _content(tmp_path / "tokens") == _content(whole)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(shard_tokens=500), r"settings.*\n +shard_tokens: 20000 there, 500 now"),
        (dict(text_field="body"), r"text_field: 'text' there, 'body' now"),
    ],
)
def test_other_settings_are_refused(sources, whole, changed, words):
    before = _content(whole)
    with pytest.raises(InputError, match=words):
        _prepare(sources, whole, **changed)
    assert _content(whole) == before


def test_what_the_target_holds_already_is_kept(sources, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"contains thesis\.tex and no prepared data"):
        _prepare(sources, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        _prepare(sources, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.nightly
def test_a_run_killed_at_its_beginning_goes_on_and_removes_its_own_alone(sources, whole, tmp_path):
    target = tmp_path / "tokens"
    target.mkdir()
    (target / ".manifest.partial.json.partial").write_text('{"format": ')

    class Killed(Exception):
        pass

    def say(line):
        raise Killed

    with pytest.raises(Killed):
        prepare([str(sources)], target, MODEL, shard_tokens=20_000, say=say)
    (target / "manifest.json").rename(target / "manifest.partial.json")
    for name in ("notes.txt", "README.partial"):
        (target / name).write_text("of somebody")
    (target / "00000.documents.npy").unlink()
    _prepare(sources, target)
    content = _content(target)
    assert content.pop("notes.txt") == content.pop("README.partial") == b"of somebody"
    assert content == _content(whole)


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_and_the_same_command_goes_on(sources, whole, tmp_path, monkeypatch):
    target, encode = tmp_path / "tokens", text.encode

    def full(batch, tokenizer):
        if not (target / "00001.partial").exists():
            (target / "00001.partial").symlink_to("/dev/full")
        return encode(batch, tokenizer)

    monkeypatch.setattr(text, "encode", full)
    with pytest.raises(
        InputError, match=r"tokens cannot be written: No space.*same command to resume"
    ):
        _prepare(sources, target)
    monkeypatch.setattr(text, "encode", encode)
    assert "resuming after 1 complete" in _prepare(sources, target)[0]
    assert _content(target) == _content(whole)


def test_blank_files_are_left_out_and_empty_ones_refused(tmp_path):
    for name, content in (("a.txt", " \n" * 99), ("b.txt", "\n\nText."), ("c.jsonl", "\n\n")):
        (tmp_path / name).write_text(content)
    said = _prepare(tmp_path, tmp_path / "tokens")
    assert [line.partition(" contains")[0] for line in said[:2]] == [
        f"WARNING: {tmp_path / name}" for name in ("a.txt", "c.jsonl")
    ]
    _prepare(tmp_path / "b.txt", tmp_path / "alone")
    assert (tmp_path / "tokens/00000.bin").read_bytes() == (
        tmp_path / "alone/00000.bin"
    ).read_bytes()
    with pytest.raises(InputError, match="has no tokens"):
        _prepare(tmp_path / "a.txt", tmp_path / "nothing")
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(InputError, match=r"empty files, remove them: .*d\.txt"):
        _prepare(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_two_at_once_are_refused(sources, tmp_path):
    refused = pytest.raises(InputError, match=r"in use by process \d+ on .*, since .*--target")
    with prepare_data._locked(tmp_path / "tokens"), refused:
        _prepare(sources, tmp_path / "tokens")


def test_sources_are_found_in_order(sources, tmp_path):
    both = [str(sources / name) for name in ("book.txt", "lines.jsonl")]
    for given in ([str(sources)], [f"{sources}/*"], both):
        assert [s.name for s in expand(given, "train", "text")] == both
    with pytest.raises(InputError, match=r"names .*book\.txt more than once"):
        expand([str(sources), both[0]], "train", "text")
    with pytest.raises(InputError, match=r"names .*book\.txt more than once"):
        expand([f"{sources}/../{sources.name}/book.txt", both[0]], "train", "text")
    with pytest.raises(InputError, match="contains no text"):
        expand([str(tmp_path)], "train", "text")
    with pytest.raises(InputError, match="no file matches"):
        expand([f"{tmp_path}/*.txt"], "train", "text")
    with pytest.raises(InputError, match=r"none\.txt does not exist"):
        expand(["data/none.txt"], "train", "text")


@pytest.mark.nightly
def test_a_tokenizer_by_hub_id(tmp_path, sources):
    """Its files alone are downloaded, and it makes what the directory makes."""
    repository = tmp_path / "repository"
    shutil.copytree(MODEL, repository)
    (repository / "pytorch_model.bin").write_bytes(b"weights")
    command = [
        sys.executable, "-m", "finermoe_jax", "prepare", f"--source={sources / 'book.txt'}",
        f"--target={tmp_path / 'tokens'}", "--tokenizer=someone/small", "--processes=1",
    ]  # fmt: skip
    with hub(repository, tmp_path / "cache") as (environment, fetched):
        environment = environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 0, done.stderr
    wanted = {path.name for path in MODEL.iterdir() if "safetensors" not in path.name}
    assert set(fetched) == wanted and {"tokenizer.json", "config.json"} <= wanted
    _prepare(sources / "book.txt", tmp_path / "local", shard_tokens=1 << 27)
    assert _content(tmp_path / "local") == _content(tmp_path / "tokens")

    # Without the Hub the copy in the cache serves.
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    command[5] = f"--target={tmp_path / 'again'}"
    done = subprocess.run(
        command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    offline["HF_HOME"] = str(tmp_path / "empty")
    done = subprocess.run(
        command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "someone/small is not a directory here, and the Hub download failed" in done.stderr


def test_a_dataset_without_the_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"pip install 'finermoe-jax\[data\]'"):
        expand(["someone/some-dataset:config"], "train", "text")


def test_bad_text_is_named_and_nothing_is_complete(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
        _prepare(tmp_path / "a.jsonl", tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "manifest.json").exists()
