"""Text, windows and batches."""

import gzip
import json

import numpy as np
import pytest

from finermoe_jax.config import DataConfig
from finermoe_jax.data import Windows, read_documents, split_held_out, tokenize, train_batches
from finermoe_jax.errors import InputError
from finermoe_jax.files import find
from finermoe_jax.tokenizers import load_tokenizer

CONFIG = DataConfig(path="x.txt", sequence_length=8, global_batch_size=6, eval_fraction=0.1)


def _batches(start, count, rows=range(6)):
    windows = Windows(np.arange(401, dtype=np.int32), 8)
    batches = train_batches(windows, CONFIG, start, rows)
    return [next(batches) for _ in range(count)]


def test_windows_overlap_by_the_target():
    windows = Windows(np.arange(20, dtype=np.int32), 8)
    assert len(windows) == 2
    np.testing.assert_array_equal(windows[1], np.arange(8, 17))


@pytest.mark.parametrize("rows", [(0, 1, 2), (3, 4, 5), (1, 4)])
def test_any_rows_of_the_same_global_batches(rows):
    whole = _batches(0, 20)
    for batch, part in zip(whole, _batches(0, 20, rows), strict=True):
        np.testing.assert_array_equal(part, batch[list(rows)])


def test_the_step_number_is_the_position():
    np.testing.assert_array_equal(_batches(0, 12)[9:], _batches(9, 3))


def test_every_window_comes_once_per_epoch_in_a_new_order():
    rows = np.concatenate(_batches(0, 50))[:, 0]
    first, second = rows[:50], rows[50:100]
    np.testing.assert_array_equal(np.sort(first), np.arange(50) * 8)
    np.testing.assert_array_equal(np.sort(second), np.arange(50) * 8)
    assert (first != second).any()


def test_held_out_text_is_the_end():
    train, held_out = split_held_out(np.arange(1000, dtype=np.int32), CONFIG)
    assert max(w.max() for w in train) < 900 <= min(w.min() for w in held_out)


def test_tokens_decode_to_the_documents():
    tokenizer = load_tokenizer(find("demo/model"), 2048)
    documents = ["one ünï\n" * 30_000, "two 你好\n"]
    tokens = tokenize(documents, tokenizer)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert len(ends) == 2 and ends[-1] == len(tokens) - 1
    assert tokenizer.decode(tokens[: ends[0]]) == documents[0]
    assert tokenizer.decode(tokens[ends[0] + 1 : ends[1]]) == documents[1]


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "text.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write(json.dumps({"text": "a"}) + "\n\n" + json.dumps({"text": "b"}) + "\n")
    assert read_documents(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["holds no text"]),
        ("a.txt", b" \n\n", ["holds no text"]),
        ("a.txt", b"\xff\xfe\x00", ["not UTF-8"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["line 2", '"text"']),
        ("a.jsonl", b"[1, 2]\n", ["line 1"]),
        ("a.txt.gz", b"plain", ["cannot be read"]),
        ("a.pdf", b"x", [".txt or .jsonl"]),
        (None, b"", ["does not exist"]),
    ],
)
def test_bad_text(tmp_path, name, content, words):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_documents(path)
    assert all(word in str(error.value) for word in words), error.value


def test_too_little_text_names_both_sizes():
    with pytest.raises(InputError, match=r"gives 5 training windows.*global_batch_size=6"):
        split_held_out(np.arange(50, dtype=np.int32), CONFIG)
