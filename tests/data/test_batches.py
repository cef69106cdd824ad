"""Text, rows, mixtures and batches."""

import dataclasses
import gzip
import itertools
import json
import lzma
import shutil
from fractions import Fraction

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from finermoe_jax.config.run import DataConfig, RunConfig
from finermoe_jax.data.batches import Order, batch_identity, open_data, parse_mixture, train_batches
from finermoe_jax.data.compressed import zstd_module
from finermoe_jax.data.packing import counted, masks, pack
from finermoe_jax.data.rows import Mixture, Packed, Windows
from finermoe_jax.data.text import Piece, TextFile, cut_document, tokenize
from finermoe_jax.data.token_files import TokenStream
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.workdir import claim, claim_data, fill_workdir, record_data

CONFIG = DataConfig(path="x.txt", sequence_length=8, global_batch_size=6, eval_fraction=0.1)
MODEL = find("demo/model")


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(MODEL, 2048)


def _stream(*sizes):
    """Tokens that count on from 0, in files of these sizes and of various types."""
    arrays = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    types = (np.uint16, np.int32, np.int64, np.uint32)
    return TokenStream([a.astype(types[i % 4]) for i, a in enumerate(arrays)])


def _mixture(weights=(1,), packed=False):
    """As many sources as weights: source s has tokens 10000 s …, 50 + 10 s windows of 8."""
    parts = []
    for source in range(len(weights)):
        count = 8 * (50 + 10 * source) + 1
        tokens = TokenStream([np.arange(count, dtype=np.int32) + 10_000 * source])
        starts = np.arange(0, count, 3)
        rows = Packed(tokens, starts, 8, 0, count) if packed else Windows(tokens, 8)
        parts.append(rows)
    names = [f"source{source}" for source in range(len(weights))]
    return Mixture(parts, names, [Fraction(w) for w in weights])


def _batches(start, count, wanted=range(6), rows=None):
    batches = train_batches(rows or _mixture(), CONFIG, start, wanted)
    return [next(batches).tokens for _ in range(count)]


# --- windows and batches --------------------------------------------------------------------


def test_windows_overlap_by_the_target_and_cross_files():
    rows = Mixture([Windows(_stream(3, 7, 1, 9), 8)], ["x"], [Fraction(1)])
    assert len(rows) == 2
    np.testing.assert_array_equal(rows.read([1, 0]).tokens, [np.arange(8, 17), np.arange(9)])
    with pytest.raises(IndexError):
        rows.read([2])


@pytest.mark.parametrize("rows", [(0, 1, 2), (3, 4, 5), (1, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_any_rows_of_the_same_global_batches(rows, packed):
    mixture = _mixture(("2", "0.7", "1e-1"), packed)
    whole = _batches(0, 20, rows=mixture)
    for batch, part in zip(whole, _batches(0, 20, rows, mixture), strict=True):
        np.testing.assert_array_equal(part, batch[list(rows)])


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_number_is_the_position(packed):
    rows = _mixture((1, 2), packed)
    np.testing.assert_array_equal(_batches(0, 12, rows=rows)[9:], _batches(9, 3, rows=rows))


def test_every_window_comes_once_per_epoch_in_a_new_order():
    rows = np.concatenate(_batches(0, 50))[:, 0]
    first, second = rows[:50], rows[50:100]
    np.testing.assert_array_equal(np.sort(first), np.arange(50) * 8)
    np.testing.assert_array_equal(np.sort(second), np.arange(50) * 8)
    assert (first != second).any()


def test_the_order_of_earlier_versions():
    """A run that goes on after an update must see the same rows."""
    firsts = np.concatenate(_batches(0, 2))[:, 0] // 8
    np.testing.assert_array_equal(firsts, [21, 37, 31, 14, 9, 46, 28, 6, 24, 41, 36, 15])


@pytest.mark.slow
def test_mixtures_keep_their_shares_and_shuffle_each_source_anew():
    weights = [0.5, 0.3, 0.15, 0.05]
    rows = _mixture([str(w) for w in weights])
    firsts = np.concatenate(_batches(0, 500, rows=rows))[:, 0]
    source = firsts // 10_000
    for n in (7, 100, 999, 3000):
        counts = np.bincount(source[:n], minlength=4)
        np.testing.assert_allclose(counts, np.multiply(weights, n), atol=4, rtol=0)
    for part, size in enumerate((50, 60, 70, 80)):
        mine = firsts[source == part] % 10_000 // 8
        epochs = [mine[i * size : (i + 1) * size] for i in range(len(mine) // size)]
        assert epochs
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
        assert all((a != b).any() for a, b in itertools.pairwise(epochs))


def test_sources_of_one_size_come_in_orders_of_their_own():
    parts = [Windows(TokenStream([np.arange(8 * 50 + 1)]), 8) for _ in range(3)]
    rows = Mixture(parts, ["a", "b", "c"], [Fraction(1)] * 3)

    def orders(seed):
        """The first 40 windows of each source."""
        order = Order(rows, seed)
        found = [rows.locate(order[place]) for place in range(120)]
        return [tuple(i for part, i in found if part == wanted) for wanted in range(3)]

    first, other = orders(0), orders(1)
    assert first == orders(0) and len({*first, *other}) == 6


def test_a_batch_is_known_by_its_step():
    for rows in (_mixture((3, 1)), _mixture((3, 1), packed=True)):
        seen = [0, 0]
        for step, batch in enumerate(_batches(0, 30, rows=rows), 1):
            identity = batch_identity(rows, CONFIG, step)
            assert [r["row"] for r in identity] == list(range(6))
            sources = [int(r["source"].removeprefix("source")) for r in identity]
            firsts = [10_000 * s + r["first_token"] for s, r in zip(sources, identity, strict=True)]
            np.testing.assert_array_equal(batch[:, 0], firsts)
            read = [rows.starts[s] + r["index"] for s, r in zip(sources, identity, strict=True)]
            np.testing.assert_array_equal(rows.read(read).tokens, batch)
            for source, row in zip(sources, identity, strict=True):
                assert row["epoch"] == seen[source] // len(rows.parts[source])
                seen[source] += 1
        # Of 180 rows 135 are the first source's, which begins its epochs inside of batches.
        assert seen == [135, 45] and (rows.packed or len(rows.parts[0]) == 50)


# --- packing --------------------------------------------------------------------------------


def _plain_pack(lengths, size):
    """Next fit, written down plainly."""
    rows, place = [], 0
    for length in lengths:
        pieces, begin = [], place
        while length > size:
            pieces.append((begin, begin + size))
            begin, length = begin + size - 1, length - size + 1
        pieces.append((begin, begin + length))
        place = begin + length
        for number, (first, last) in enumerate(pieces):
            if number == 0 and rows and last - rows[-1][0] <= size and rows[-1][1] == first:
                rows[-1] = (rows[-1][0], last)
            else:
                rows.append((first, last))
    return rows


@pytest.mark.parametrize("longest", [3, 9, 40])
def test_documents_are_packed_whole_in_stored_order(longest, monkeypatch):
    monkeypatch.setattr("finermoe_jax.data.packing._BLOCK", 7)
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, longest + 1, 50)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        found = pack(starts, 0, int(lengths.sum()), 9)
        assert [tuple(row) for row in found.tolist()] == _plain_pack(lengths.tolist(), 9)


@pytest.mark.slow
def test_packed_rows_hold_every_target_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    total = int(lengths.sum())
    stream = TokenStream(np.split(np.arange(total), [100, 101, 900]))
    rows = Mixture([Packed(stream, starts, 8, 0, total)], ["x"], [Fraction(1)])
    batch = rows.read(range(len(rows)))
    targets = batch.tokens[:, 1:][counted(batch)]
    # Every token but the first of each document.
    np.testing.assert_array_equal(np.sort(targets), np.setdiff1d(np.arange(total), starts))
    given = masks(batch)
    document = np.searchsorted(starts, batch.tokens, side="right")
    for row in range(len(rows)):
        real = batch.segment_ids[row] > 0
        segments = batch.segment_ids[row][real]
        np.testing.assert_array_equal(np.diff(segments), np.diff(document[row][real]))
        assert segments[0] == 1 and not batch.tokens[row][~real].any()
        inputs = real[:-1]
        np.testing.assert_array_equal(given["attention_mask"][row] != 0, inputs)
        for segment in set(segments):
            positions = given["position_ids"][row][batch.segment_ids[row, :-1] == segment]
            np.testing.assert_array_equal(positions, np.arange(len(positions)))


# --- text -----------------------------------------------------------------------------------


def test_tokens_decode_to_the_documents(tokenizer):
    documents = ["one ünï\n" * 30_000, "two 你好\n"]
    pieces = [piece for document in documents for piece in cut_document(document)]
    assert len(pieces) > 3
    tokens, starts = tokenize(pieces, tokenizer)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert len(ends) == 2 and ends[-1] == len(tokens) - 1
    np.testing.assert_array_equal(starts, [0, ends[0] + 1])
    assert tokenizer.decode(tokens[: ends[0]]) == documents[0]
    assert tokenizer.decode(tokens[ends[0] + 1 : ends[1]]) == documents[1]


def _zstd(path, mode):
    return zstd_module(path).open(path, mode)


@pytest.mark.parametrize("opener", [open, gzip.open, lzma.open, _zstd])
def test_compressed_text(tmp_path, opener):
    suffix = {open: "", gzip.open: ".gz", lzma.open: ".xz", _zstd: ".zst"}[opener]
    lines, whole = tmp_path / f"a.jsonl{suffix}", tmp_path / f"a.txt{suffix}"
    with opener(lines, "wb") as stream:
        stream.write(b'{"text": "a"}\n\n{"text": "b"}\n')
    with opener(whole, "wb") as stream:
        stream.write("é\r\n".encode() * 70_000)
    assert list(TextFile(lines).pieces()) == [Piece("a", True), Piece("b", True)]
    source = TextFile(whole)
    pieces = list(source.pieces())
    assert "".join(piece.text for piece in pieces) == "é\r\n" * 70_000
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert 0 < source.position <= source.size
    if suffix:
        whole.write_bytes(whole.read_bytes()[:-9])
        with pytest.raises(InputError, match="cannot be read"):
            list(TextFile(whole).pieces())


def test_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", "b\n" * 80_000], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    pieces = list(TextFile(tmp_path / "a.parquet").pieces())
    assert pieces[0] == Piece("a", True) and len(pieces) > 2
    assert "".join(piece.text for piece in pieces[1:]) == "b\n" * 80_000
    with pytest.raises(InputError, match=r"no column 'body'.*text, other"):
        list(TextFile(tmp_path / "a.parquet", "body").pieces())
    with pytest.raises(InputError, match="row 0: 'other' is not text"):
        list(TextFile(tmp_path / "a.parquet", "other").pieces())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="cannot be read"):
        list(TextFile(tmp_path / "a.parquet").pieces())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["contains no text"]),
        ("a.txt", b" \n\n", ["contains no text"]),
        ("a.txt", b"\xff\xfe\x00", ["not UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["line 2", '"text"']),
        ("a.jsonl", b"[1, 2]\n", ["line 1"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b"[" * 100_000, ["line 1"]),
        ("a.txt.gz", b"plain", ["cannot be read"]),
        ("a.pdf", b"x", [".txt or .jsonl"]),
        ("a.parquet.gz", b"x", [".parquet"]),
        (None, b"", ["does not exist"]),
    ],
)
def test_bad_text(tmp_path, name, content, words):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(TextFile(path).pieces())
    assert all(word in str(error.value) for word in words), error.value


# --- what data.path says --------------------------------------------------------------------


def test_weights_are_exact():
    assert parse_mixture("a:0.1, b:2,c:0,d/e:x:1e-3") == [
        ("a", Fraction(1, 10)),
        ("b", Fraction(2)),
        ("d/e:x", Fraction(1, 1000)),
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a:1,b:-2", "'b:-2' must be a path and a weight of at least 0"),
        ("a:0,b:0", "all weights are 0"),
        ("a:1,b:much", "weight 'much' of b is not a number"),
        ("a:nan,b:1", "weight 'nan' of a is not a number"),
        ("a:1,b", "weight '' of b is not a number"),
        ("a:1/0,b:1", "'1/0'"),
        ("a:1,a:2", "names a twice, with weights 1.0 and 2.0"),
        ("a:1,", "''"),
        (":1", "must be a path"),
    ],
)
def test_bad_mixtures(path, words):
    with pytest.raises(InputError) as error:
        parse_mixture(path)
    assert words in str(error.value), error.value


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources of text: 40 short documents, and 4 long ones."""
    place = tmp_path_factory.mktemp("texts")
    for name, count, words in (("short", 40, 8), ("long", 4, 200)):
        lines = [json.dumps({"text": f"{name} {i} " * words}) for i in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


def _open(tokenizer, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    return open_data(config, tokenizer, MODEL, 2048)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_held_out_text_is_each_sources_end(texts, tokenizer, packing):
    path = f"{texts}/short.jsonl:3,{texts}/long.jsonl:1"
    found = _open(tokenizer, path=path, packing=packing, eval_fraction=0.25)
    for part, (kept, held_out) in enumerate(
        zip(found.train.parts, found.held_out.parts, strict=True)
    ):
        stream = kept.tokens
        last = kept.first_token(len(kept) - 1)
        cut = held_out.first_token(0)
        assert cut < len(stream) and abs(cut / len(stream) - 0.75) < 0.05, part
        assert held_out.first_token(len(held_out) - 1) > len(stream) - 20
        if packing == "stream":  # nor is the last window's last target held out
            assert last + CONFIG.sequence_length < cut
        else:
            assert cut in kept.starts and cut == kept.ranges[-1, 1]
    order = found.held_out.in_order(8)
    assert [found.held_out.locate(i)[0] for i in order] == [0, 0, 0, 1] * 2


def test_held_out_text_of_its_own(texts, tokenizer):
    found = _open(tokenizer, path=f"{texts}/short.jsonl", eval_path=f"{texts}/long.jsonl")
    assert found.held_out.names == [f"{texts}/long.jsonl"]
    stream = found.train.parts[0].tokens
    assert len(found.train) == (len(stream) - 1) // 8
    with pytest.raises(InputError, match=r"data\.eval_path=.*too few for a row"):
        _open(
            tokenizer, path=f"{texts}/long.jsonl", eval_path=f"{texts}/short.jsonl",
            sequence_length=1500, global_batch_size=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(sequence_length=500), r"gives 2 training windows.*global_batch_size=6"),
        (dict(eval_fraction=0.001), "held-out 0% of the .* less than one window of 8"),
        (dict(path="{0}/short.jsonl:1,{0}/none.jsonl:1"), r"none\.jsonl does not exist"),
        (dict(path="{0}"), "has no training data"),
        (dict(path=""), r"data\.path is empty"),
        (
            dict(path="{0}/short.jsonl:1,{0}/../{0.name}/short.jsonl:2"),
            r"short\.jsonl twice \(as .*short\.jsonl\), with weights 1\.0 and 2\.0",
        ),
        (dict(path=f"{'x' * 5000}:1,none:1"), "x cannot be read: File name too long"),
        (dict(path="x" * 5000), "x cannot be read: File name too long"),
        (dict(eval_path="a:1,b:1"), r"data\.eval_path=a:1,b:1 must name one source"),
        (
            dict(path="{0}/short.jsonl:1,{0}/long.jsonl:1", sequence_length=1300,
                 global_batch_size=1, eval_fraction=0.0),
            r"short\.jsonl gives no training window of 1300 tokens",
        ),
    ],
)  # fmt: skip
def test_bad_data_is_named(texts, tokenizer, settings, words):
    path = settings.get("path", "{0}/short.jsonl").format(texts)
    with pytest.raises(InputError, match=words):
        _open(tokenizer, **settings | {"path": path})


def test_token_ids_must_fit_the_model(texts, tokenizer):
    config = dataclasses.replace(CONFIG, path=f"{texts}/short.jsonl")
    with pytest.raises(InputError, match=r"contains token \d+, but the model's vocab_size is 100"):
        open_data(config, tokenizer, MODEL, 100)


@pytest.mark.slow
def test_a_run_keeps_its_data_and_not_its_place(texts, tokenizer, tmp_path):
    moved = shutil.copytree(texts, tmp_path / "moved")

    def run(path, eval_path="", place=texts):
        data = dataclasses.replace(
            CONFIG, path=path.format(place), eval_path=eval_path.format(place)
        )
        return RunConfig(init_from="x", data=data)

    def identity(config):
        return open_data(config.data, tokenizer, MODEL, 2048).identity

    mixed = "{0}/short.jsonl:3,{0}/long.jsonl:1"
    began = run(mixed, "{0}/long.jsonl")
    workdir = tmp_path / "run"
    workdir.mkdir()
    fill_workdir(workdir, began, MODEL)
    (workdir / "checkpoints" / "damaged-1").mkdir()  # it had one
    refused = pytest.raises(InputError, match=r"data\.path: .*in the run")
    with refused:  # nothing is recorded that its content could be compared with
        claim(workdir, run(mixed, "{0}/long.jsonl", moved))
    record_data(workdir, identity(began))
    same = run("{0}/short.jsonl:0.75,{0}/long.jsonl:0.25", "{0}/long.jsonl", moved)
    assert set(claim(workdir, same)) == {"data.path", "data.eval_path"}
    claim_data(workdir, identity(same))
    for other, words, flag in (
        (run("{0}/short.jsonl:2,{0}/long.jsonl:1", "{0}/long.jsonl"),
         "source 1.weight: '3/4' in the run, '2/3' now", "data.path"),
        (run("{0}/long.jsonl", "{0}/long.jsonl"), "source 2.kind: 'text' in the run, None",
         "data.path"),
        (run(mixed, "{0}/short.jsonl"), "eval.tokens: ", "data.eval_path"),
        (run(mixed), "eval.tokens: ", "data.eval_path"),
        (run("{0}/long.jsonl"), "eval.tokens: ", "data.path,data.eval_path"),
    ):  # fmt: skip
        claim(workdir, other)
        with pytest.raises(InputError) as error:
            claim_data(workdir, identity(other))
        message = str(error.value)
        assert words in message, message
        assert set(message.rpartition("--allow_changes=")[2].split(",")) == set(flag.split(","))
        claim_data(workdir, identity(other), flag.split(","))
        claim_data(workdir, identity(other), ["data"])
    (workdir / "checkpoints" / "7").mkdir()
    (workdir / "checkpoints" / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    record_data(workdir, identity(run(mixed)))
    (kept,) = read_lines(workdir / "config_changes.jsonl")
    assert kept["step"] == 7 and kept["changes"]["data.eval.kind"] == ["text", None]
    claim_data(workdir, identity(run(mixed)))
