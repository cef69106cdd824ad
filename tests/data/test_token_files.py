"""Prepared directories and Megatron pairs: what is read, and every way in which they may be bad."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from finermoe_jax.config.run import DataConfig
from finermoe_jax.data.batches import open_data
from finermoe_jax.data.megatron import megatron_prefix, open_megatron
from finermoe_jax.data.prepare import prepare
from finermoe_jax.data.token_files import TokenStream, id_range, scan_bar, tokenizer_hash, verify
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find

MODEL = find("demo/model")
SETTINGS = dict(sequence_length=8, global_batch_size=2, eval_fraction=0.0)
DOCUMENTS = [[5, 6, 0], [7, 0], [300] * 30 + [0], [8, 9, 10, 0]]


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(MODEL, 2048)


@pytest.fixture
def prepared(tmp_path):
    lines = [json.dumps({"text": f"document {i} " * 30}) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "tokens", MODEL, shard_tokens=300,
        say=lambda _: None,
    )  # fmt: skip
    return tmp_path / "tokens"


def _open(tokenizer, path, vocab_size=2048, files=MODEL, **settings):
    config = DataConfig(path=str(path), **SETTINGS | settings)
    return open_data(config, tokenizer, files, vocab_size)


def _megatron(prefix, documents=DOCUMENTS, code=8, version=1, modes=False):
    """As megatron.core.datasets.indexed_dataset lays it out: one sequence a document."""
    dtype = {1: "u1", 4: "<i4", 5: "<i8", 6: "<f8", 8: "<u2"}[code]
    tokens = np.concatenate([np.asarray(d, dtype) for d in documents])
    lengths = np.asarray([len(d) for d in documents], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    marks = np.arange(len(documents) + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", version) + struct.pack("<B", code)
    counts = struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(marks))
    extra = np.zeros(len(lengths), "i1").tobytes() if modes else b""
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    prefix.with_suffix(".idx").write_bytes(
        header + counts + lengths.tobytes() + pointers.tobytes() + marks.tobytes() + extra
    )
    return prefix


# --- prepared directories -------------------------------------------------------------------


def test_prepared_tokens_are_the_texts(prepared, tokenizer):
    """The same rows as from the text itself, whichever way rows are made."""
    for packing in ("stream", "documents"):
        ours = _open(tokenizer, prepared, packing=packing).train
        theirs = _open(tokenizer, prepared.parent / "a.jsonl", packing=packing).train
        assert len(ours) == len(theirs) > 10 and len(ours.parts[0].tokens.arrays) > 2
        for a, b in zip(ours.read(range(len(ours))), theirs.read(range(len(ours))), strict=True):
            np.testing.assert_array_equal(a, b)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def _edit(manifest, **changes):
    values = json.loads(manifest.read_text())
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = values
        for group in groups:
            place = place[int(group) if group.isdigit() else group]
        place[last] = value
    manifest.write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: _cut(d / "00001.bin"), r"00001\.bin has \d+ bytes, but the manifest says \d+"),
        (lambda d: (d / "00001.bin").unlink(), r"00001\.bin cannot be read: .*No such file"),
        (lambda d: (d / "00000.documents.npy").unlink(), r"00000\.documents\.npy cannot be read"),
        (
            lambda d: np.save(d / "00000.documents.npy", np.asarray([{}] * 99, object)),
            r"00000\.documents\.npy is damaged: it is not a \.npy file of int64",
        ),
        *(
            (
                lambda d, at=at: _overwrite(d / "00000.documents.npy", at, b"\x00("),
                r"00000\.documents\.npy is damaged: it is not a \.npy file of int64",
            )
            for at in (0, 6, 8, 10, 22)
        ),
        (
            lambda d: np.save(d / "00000.documents.npy", np.zeros(99)),
            r"00000\.documents\.npy contains float64",
        ),
        (
            lambda d: np.save(d / "00000.documents.npy", np.zeros(99, np.int64)),
            r"00000\.documents\.npy has shape \(99,\), but the manifest says \d documents",
        ),
        (
            lambda d: (d / "manifest.json").write_text("{"),
            r"manifest\.json is not .* JSON",
        ),
        (lambda d: (d / "manifest.json").write_text("[]"), r"manifest\.json contains a list, not"),
        (lambda d: _edit(d / "manifest.json", format="x 9"), "has format 'x 9'; this version"),
        (lambda d: _edit(d / "manifest.json", shards=[]), "the list of shards is empty"),
        (lambda d: _edit(d / "manifest.json", tokens=1), "states 1 tokens in 12 documents"),
        (lambda d: _edit(d / "manifest.json", shards__1__tokens=0), "shard 00001 is empty"),
        (lambda d: _edit(d / "manifest.json", shards__1__tokens="1"), "must be an integer"),
        (lambda d: _edit(d / "manifest.json", shards__1__name="../x"), "00001.*'../x'"),
        (lambda d: _edit(d / "manifest.json", shards__1__more=1), "has no field 'more'"),
        (lambda d: _edit(d / "manifest.json", settings__dtype="float32"), "dtype 'float32'"),
        (
            lambda d: _edit(d / "manifest.json", settings__tokenizer="abc"),
            "prepared with tokenizer abc, but the run's is [0-9a-f]{64}",
        ),
        (
            lambda d: _edit(d / "manifest.json", settings__eos_id=None),
            "prepared with end-of-text token None, but the run's is 0",
        ),
        (
            lambda d: _edit(d / "manifest.json", shards__2__max_id=70_000),
            r"00002\.bin: its largest token is \d+, but the manifest says 70000; .*--verify=",
        ),
        (
            lambda d: _overwrite(d / "00001.bin", 40, b"\x00\x08"),
            r"00001\.bin: its largest token is 2048, but the manifest says \d+; .*--verify=",
        ),
        (
            lambda d: (d / "manifest.json").rename(d / "manifest.partial.json"),
            "is not fully prepared: rerun",
        ),
    ],
)
def test_a_damaged_directory_is_named(prepared, tokenizer, damage, words):
    damage(prepared)
    with pytest.raises(InputError, match=words):
        _open(tokenizer, prepared)


def test_an_unreadable_shard_is_named(prepared, tokenizer):
    _open(tokenizer, prepared)
    with tempfile.TemporaryDirectory() as place:  # which others may enter, unlike tmp_path
        shutil.copytree(prepared, directory := Path(place) / "tokens")
        shutil.copytree(MODEL, files := Path(place) / "model")
        for path in (place, directory, files):
            Path(path).chmod(0o755)
        (directory / "00001.bin").chmod(0)
        superuser = os.geteuid() == 0  # who may read everything: as somebody else, then
        os.seteuid(65534 if superuser else os.geteuid())
        try:
            with pytest.raises(InputError, match=r"00001\.bin cannot be read: .*Permission denied"):
                _open(tokenizer, directory, files=files)
        finally:
            os.seteuid(0 if superuser else os.geteuid())


def test_a_shard_that_is_a_directory_is_named(prepared, tokenizer):
    (prepared / "00001.bin").unlink()
    (prepared / "00001.bin").mkdir()
    with pytest.raises(InputError, match=r"00001\.bin"):
        _open(tokenizer, prepared)


def test_documents_must_rise(prepared, tokenizer):
    path = prepared / "00001.documents.npy"
    starts = np.load(path)
    np.save(path, starts[::-1])
    with pytest.raises(InputError, match="its documents overlap"):
        _open(tokenizer, prepared, packing="documents")


def test_another_tokenizer_is_refused(prepared, tokenizer, tmp_path):
    """A tokenizer is what it does, not how its file is laid out."""
    content = json.loads((MODEL / "tokenizer.json").read_text())
    content |= {"truncation": None, "padding": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert tokenizer_hash(tmp_path) == tokenizer_hash(MODEL)
    vocab = content["model"]["vocab"]
    first, second, *_ = vocab
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="prepared with tokenizer") as error:
        _open(tokenizer, prepared, files=tmp_path)
    for directory in (MODEL, tmp_path):
        assert tokenizer_hash(directory) in str(error.value)


def test_verify_finds_a_flipped_bit(prepared):
    assert verify(prepared).tokens == sum(s.tokens for s in verify(prepared).shards)
    content = bytearray((prepared / "00001.bin").read_bytes())
    content[17] ^= 1
    (prepared / "00001.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged files:\n  .*00001\.bin: [0-9a-f]{64}, but"):
        verify(prepared)


# --- Megatron -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [4, 5, 8])
@pytest.mark.parametrize("modes", [False, True])
def test_megatron_pairs_are_read(tmp_path, tokenizer, code, modes):
    prefix = _megatron(tmp_path / "x_text_document", code=code, modes=modes)
    plain = np.concatenate(DOCUMENTS)
    for path in (prefix, f"{prefix}.idx", f"{prefix}.bin"):
        found = _open(tokenizer, path)
        np.testing.assert_array_equal(found.train.read([0]).tokens[0], plain[:9])
        source = open_megatron(megatron_prefix(prefix))
        np.testing.assert_array_equal(source.documents(), [0, 3, 5, 36])
        assert found.identity["sources"][0]["max_id"] == 300
    packed = _open(tokenizer, prefix, packing="documents").train.read([0])
    np.testing.assert_array_equal(packed.segment_ids[0], [1, 1, 1, 2, 2, 0, 0, 0, 0])


def _overwrite(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda p: _megatron(p, version=2),
            "has version 2 and dtype code 8; supported are version 1",
        ),
        (lambda p: _megatron(p, code=6), "dtype code 6"),
        (
            lambda p: _overwrite(p.with_suffix(".idx"), 0, b"X"),
            "does not begin with MMIDIDX, as an index",
        ),
        (lambda p: p.with_suffix(".idx").write_bytes(b""), r"x\.idx cannot be read"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(b"MMIDIDX"),
            "does not begin with MMIDIDX, as an index",
        ),
        (lambda p: _cut(p.with_suffix(".idx")), "bytes; its 4 sequences and 5 document marks"),
        (lambda p: _cut(p.with_suffix(".bin")), r"has 78 bytes, but .* states 40 tokens of 2"),
        (lambda p: p.with_suffix(".bin").unlink(), "has 0 bytes, but"),
        (lambda p: _overwrite(p.with_suffix(".idx"), 34, b"\4"), "are not contiguous in"),
        (lambda p: _overwrite(p.with_suffix(".idx"), 34 + 48, b"\1"), "marks do not ascend from 0"),
        (lambda p: _overwrite(p.with_suffix(".idx"), 34 + 48 + 9, b"\1"), "marks do not ascend"),
        (lambda p: _megatron(p, [[]]), "is empty"),
        (lambda p: _megatron(p, [[-1, 2, 3]], code=4), "contains the negative token -1"),
        (
            lambda p: _megatron(p, [[1, 2048, 3]], code=4),
            "contains token 2048, but the model's vocab_size is 2048",
        ),
        (
            lambda p: p.with_suffix(".idx").unlink(),
            r"x\.bin has no index: .*x\.idx does not exist",
        ),
    ],
)
def test_a_bad_pair_is_named(tmp_path, tokenizer, damage, words):
    prefix = _megatron(tmp_path / "x")
    damage(prefix)
    with pytest.raises(InputError, match=words):
        _open(tokenizer, prefix)


def test_streams_are_read_across_arrays():
    arrays = [np.arange(3, dtype=np.uint16), np.zeros(0, np.int32), np.arange(3, 9)]
    stream = TokenStream(arrays)
    out = np.empty(7, np.int32)
    stream.read(2, out)
    np.testing.assert_array_equal(out, np.arange(2, 9))
    assert len(stream) == 9
    assert id_range(np.asarray([3, -2, 9]), scan_bar(3, "")) == (-2, 9)


def test_a_pairs_fingerprint_is_of_its_tokens(tmp_path, tokenizer):
    before, after = (
        _open(tokenizer, _megatron(tmp_path / "x", [[5, middle, 0, 300] * 5])).identity["sources"]
        for middle in (6, 7)
    )
    assert {k for k in before[0] if before[0][k] != after[0][k]} == {"tokens_xxh3_128"}


@pytest.mark.slow
def test_many_shards_need_few_open_files(tmp_path):
    """One a shard, and more than the soft limit where the system lets."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc def"}\n' * 200)
    prepare([str(tmp_path)], tmp_path / "tokens", MODEL, shard_tokens=1, say=lambda _: None)
    program = f"""
import os, resource
from pathlib import Path
from finermoe_jax.data.token_files import open_prepared, tokenizer_hash
before = len(os.listdir("/dev/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (before + 50, before + 250))
source = open_prepared(Path({str(tmp_path / "tokens")!r}), tokenizer_hash(Path({str(MODEL)!r})), 0)
assert len(source.tokens.arrays) == 200 and len(source.documents()) == 200
assert len(os.listdir("/dev/fd")) <= before + 201
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_fingerprint_goes_with_the_content(prepared, tokenizer):
    def identity(path):
        return _open(tokenizer, path).identity["sources"][0]

    before = identity(prepared)
    moved = prepared.rename(prepared.parent / "elsewhere")
    assert identity(moved) | {"path": before["path"]} == before
    shard = dataclasses.asdict(verify(moved))["shards"][0]
    _edit(moved / "manifest.json", shards__0__sha256="0" + shard["sha256"][1:] + "1")
    assert identity(moved)["manifest_sha256"] != before["manifest_sha256"]
