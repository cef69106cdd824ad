"""Text to token windows, through Grain: identical global batches for any number of processes."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from tqdm import tqdm

from finermoe_jax.config import DataConfig
from finermoe_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt file (one) or of a .jsonl file (its "text" fields); .gz, .xz too.

    Raises InputError for an unknown kind of file, text that is not UTF-8, a line that is not
    JSON with a text, or nothing but white space.
    """
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    suffixes = [s.lower() for s in path.suffixes]
    opener = _OPENERS.get(suffixes[-1] if suffixes else "", open)
    kind = next((s for s in reversed(suffixes) if s not in _OPENERS), "")
    if kind not in (".txt", ".jsonl"):
        raise InputError(f"{path} must end in .txt or .jsonl, plain or with .gz or .xz")
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    documents = [text] if kind == ".txt" else _json_texts(path, text)
    if not any(document.strip() for document in documents):
        raise InputError(f"{path} holds no text")
    return documents


def _json_texts(path: Path, text: str) -> list[str]:
    texts = []
    # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            texts.append(None)
        if not isinstance(texts[-1], str):
            raise InputError(f'{path}, line {number}: not a JSON object with a "text" string')
        if not texts[-1].isascii() and any("\ud800" <= c <= "\udfff" for c in texts[-1]):
            raise InputError(f"{path}, line {number}: half of a surrogate pair, which is no text")
    return texts


def tokenize(
    documents: list[str], tokenizer: "PreTrainedTokenizerBase", show_progress: bool = False
) -> np.ndarray:
    """One int32 stream of all documents, each followed by the tokenizer's end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Chunks keep the tokenizer's memory small and its threads busy.
    chunks = [chunk for document in documents for chunk in _chunks(document)]
    pieces = []
    bar = tqdm(
        total=sum(len(c) for c, _ in chunks),
        desc="tokenizing",
        unit="char",
        unit_scale=True,
        disable=not show_progress,
    )
    for start in range(0, len(chunks), 64):
        batch = chunks[start : start + 64]
        encoded = tokenizer([c for c, _ in batch], add_special_tokens=False, verbose=False)
        for ids, (chunk, ends_document) in zip(encoded["input_ids"], batch, strict=True):
            pieces.append(np.asarray(ids + (end if ends_document else []), np.int32))
            bar.update(len(chunk))
    bar.close()
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def _chunks(document: str, size: int = 1 << 16) -> list[tuple[str, bool]]:
    """The document cut after line ends into pieces of at least `size`, and whether each is last."""
    pieces, current, length = [], [], 0
    for line in document.splitlines(keepends=True):
        current.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(current))
            current, length = [], 0
    if current or not pieces:
        pieces.append("".join(current))
    return [(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]


class Windows(grain.sources.RandomAccessDataSource):
    """Windows of length + 1 tokens, `length` apart: inputs are [:-1], targets [1:]."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self.length
        return np.asarray(self.tokens[start : start + self.length + 1], np.int32)

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.length} tokens)"


def split_held_out(tokens: np.ndarray, config: DataConfig) -> tuple[Windows, Windows]:
    """Training windows and held-out windows; the latter come from the end of the stream.

    Raises InputError when a batch cannot be filled, or the held-out part holds no window.
    """
    length = config.sequence_length
    held_out = round(len(tokens) * config.eval_fraction)
    train = Windows(tokens[: len(tokens) - held_out], length)
    evaluation = Windows(tokens[len(tokens) - held_out :], length)
    if len(train) < config.global_batch_size:
        raise InputError(
            f"{config.path} gives {len(train)} training windows of {length} tokens, fewer than "
            f"one batch of data.global_batch_size={config.global_batch_size}; use more text, "
            "shorter sequences or a smaller batch"
        )
    if config.eval_fraction and not len(evaluation):
        raise InputError(
            f"the held-out {config.eval_fraction:.0%} of {config.path} is {held_out} tokens, less "
            f"than one window of {length}; raise data.eval_fraction, or set it to 0"
        )
    return train, evaluation


class _Batches(grain.sources.RandomAccessDataSource):
    """Some rows of every global batch, by step."""

    def __init__(self, order: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self.order, self.batch_size, self.rows = order, batch_size, rows

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([self.order[int(step) * self.batch_size + row] for row in self.rows])

    def __repr__(self) -> str:
        return f"_Batches({len(self.rows)} of {self.batch_size} rows)"


def train_batches(
    windows: Windows, config: DataConfig, start_step: int, rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """The given rows [R, T + 1] of every global batch from start_step on.

    The shuffled order depends on the seed and the epoch alone, and row r of step s is its entry
    s * global_batch_size + r: global batches are the same however many processes share them, and
    the position in the data is the step number.
    """
    order = grain.MapDataset.source(windows).seed(config.seed).shuffle().repeat()
    batches = grain.MapDataset.source(_Batches(order, config.global_batch_size, rows))
    return iter(batches.slice(slice(start_step, None)).to_iter_dataset())


def batch_identity(windows: Windows, config: DataConfig, step: int) -> list[dict]:
    """Which windows made up the global batch of a step, counted from 1 as in the log.

    One object per row: the text, the window's index in its training part, its first token's place.
    """
    order = grain.MapDataset.range(len(windows)).seed(config.seed).shuffle().repeat()
    first = (step - 1) * config.global_batch_size
    indices = [int(order[first + row]) for row in range(config.global_batch_size)]
    return [
        {"path": config.path, "window": index, "first_token": index * windows.length}
        for index in indices
    ]
