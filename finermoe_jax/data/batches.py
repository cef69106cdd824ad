"""Sources of tokens to rows, and rows to global batches, for any number of processes.

A source is a text file, a prepared directory or a Megatron pair; several are mixed by weight. The
step number alone determines the position in the data.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from finermoe_jax.config.run import DataConfig
from finermoe_jax.data.bucket_tokens import download_prepared
from finermoe_jax.data.megatron import megatron_prefix, open_megatron
from finermoe_jax.data.packing import Batch
from finermoe_jax.data.rows import Mixture, Packed, Rows, Windows
from finermoe_jax.data.text import KNOWN, TextFile, text_kind, tokenize
from finermoe_jax.data.token_files import (
    MANIFEST,
    PARTIAL,
    Corpus,
    TokenStream,
    open_prepared,
    tokenizer_hash,
)
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import BucketPath, Place, is_url, place
from finermoe_jax.runtime.downloads import named_after
from finermoe_jax.runtime.files import find

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Global batches to prefetch, and threads that copy them from memory-mapped files.
_AHEAD, _THREADS = 4, 2


# --- sources --------------------------------------------------------------------------------


def parse_mixture(text: str) -> list[tuple[str, Fraction]]:
    """Parses `path` or `path:weight,path:weight` into paths and exact weights; omits weight 0.

    Raises InputError for a weight that is missing, negative or not a number, for weights that are
    all 0, and for a repeated path.
    """
    if _exists(text):
        return [(text, Fraction(1))]
    found: dict[str, Fraction] = {}
    places: dict[Place, str] = {}
    items = [item.strip() for item in text.split(",")]
    for item in items:
        path, colon, weight = item.rpartition(":")
        if not colon or weight.startswith("//"):  # the colon of a URL
            path, weight = item, "1" if len(items) == 1 else ""
        try:
            share = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            raise InputError(
                f"data.path: the weight {weight!r} of {path or item} is not a number; write a "
                "mixture as path:weight,path:weight"
            ) from None
        if not path or share < 0:
            raise InputError(
                f"data.path: {item!r} must be a path and a weight of at least 0, path:weight"
            )
        where = _canonical(path)
        if where in places:
            first = places[where]
            spelt = "" if first == path else f" (as {first})"
            raise InputError(
                f"data.path names {path} twice{spelt}, with weights {float(found[first])} and "
                f"{float(share)}: name it once, with their sum"
            )
        places[where], found[path] = path, share
    if not any(found.values()):
        raise InputError(f"data.path={text!r}: all weights are 0; at least one must be above")
    return [(path, share) for path, share in found.items() if share]


def _exists(name: str) -> bool:
    """True if the path names something to read here."""
    if is_url(name):
        return False
    try:
        return find(name).exists() or megatron_prefix(find(name)) is not None
    except OSError:  # not a valid file name, e.g. too long
        return False


def _canonical(name: str) -> Place:
    """Returns the same path for all spellings of a source."""
    if is_url(name):
        return place(name, "data.path")
    if not _exists(name):
        return Path(name)
    path = find(name)
    return (megatron_prefix(path) or path).resolve()


def open_source(
    name: str, tokenizer: "PreTrainedTokenizerBase", files: Path, show_progress: bool
) -> Corpus:
    """Opens a path of data.path or data.eval_path by the kind of data found there.

    Raises InputError if the data is of no known kind or damaged.
    """
    try:
        url = place(name) if is_url(name) else None
        path = download_prepared(url) if isinstance(url, BucketPath) else find(name)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if (path / MANIFEST).is_file():
        with named_after(url or path, path):
            return open_prepared(path, tokenizer_hash(files), tokenizer.eos_token_id, show_progress)
    if (path / PARTIAL).is_file():
        raise InputError(
            f"{path} is not fully prepared: rerun finermoe prepare "
            "with the same arguments to resume it"
        )
    if prefix := megatron_prefix(path):
        return open_megatron(prefix, show_progress)
    tokens_file = path if path.suffix == ".bin" else Path(f"{path}.bin")
    if tokens_file.is_file() and (path == tokens_file or not path.exists()):
        raise InputError(
            f"{tokens_file} has no index: {tokens_file.with_suffix('.idx')} does not exist, and a "
            "Megatron pair needs both"
        )
    if path.is_dir() or (path.is_file() and not text_kind(path)):
        raise InputError(
            f"{path} has no training data: it is neither a directory with {MANIFEST} "
            f"(finermoe prepare), nor a pair of .bin and .idx, nor text ({KNOWN})"
        )
    pieces = list(TextFile(path).pieces())
    tokens = tokenize(pieces, tokenizer, show_progress)
    stream = TokenStream([tokens.ids])
    identity = {
        "kind": "text",
        "tokens_sha256": stream.digest(),
        "tokens": len(stream),
        "max_id": int(tokens.ids.max(initial=0)),
    }
    return Corpus(str(path), stream, ((tokens.starts, 0),), identity)


def _refuse_mixture(eval_path: str) -> None:
    name, colon, weight = eval_path.rpartition(":")
    weighted = colon and not weight.startswith("//") and (is_url(name) or _exists(name))
    if not _exists(eval_path) and ("," in eval_path or weighted):
        raise InputError(
            f"data.eval_path={eval_path} must name one source, without a weight: only data.path "
            "takes a mixture"
        )


# --- rows ----------------------------------------------------------------------------------


def split_held_out(sources: Sequence[tuple[Corpus, Fraction]], config: DataConfig) -> tuple[
    Mixture, Mixture | None
]:  # fmt: skip
    """Returns training rows and held-out rows; the latter come from the end of each source.

    Raises InputError for a source without a row, fewer rows than a batch, or held-out text without
    a row.
    """
    training = [_rows(source, config, config.eval_fraction) for source, _ in sources]
    names, weights = [s.path for s, _ in sources], [w for _, w in sources]
    kind = "row" if config.packing == "documents" else "window"
    train = Mixture([part for part, _ in training], names, weights)
    if len(train) < config.global_batch_size:
        raise InputError(
            f"{config.path} gives {len(train)} training {kind}s of {config.sequence_length} "
            f"tokens, fewer than one batch of data.global_batch_size={config.global_batch_size}; "
            "use more text, shorter sequences or a smaller batch"
        )
    for name, part in zip(names, train.parts, strict=True):
        if not len(part):
            raise InputError(
                f"{name} gives no training {kind} of {config.sequence_length} tokens; remove it "
                "from the mixture, or use shorter sequences"
            )
    if not config.eval_fraction:
        return train, None
    held_out = [part for _, part in training]
    for (source, _), part in zip(sources, held_out, strict=True):
        if not len(part):
            raise InputError(
                f"the held-out {config.eval_fraction:.0%} of the {len(source.tokens)} tokens of "
                f"{source.path} is less than one {kind} of {config.sequence_length}; raise "
                "data.eval_fraction, or set it to 0"
            )
    return train, Mixture(held_out, names, weights)


def _rows(source: Corpus, config: DataConfig, held_out: float) -> tuple[Rows, Rows]:
    """Returns a source's training rows, and the rows of its last `held_out` of tokens."""
    total, length = len(source.tokens), config.sequence_length
    cut = total - round(total * held_out)
    if config.packing == "stream":
        first = Windows(source.tokens, length, 0, cut)
        return first, Windows(source.tokens, length, cut, total)
    starts = source.documents()
    cut = int(np.append(starts, total)[np.searchsorted(starts, cut)])
    first_packed = Packed(source.tokens, starts, length, 0, cut)
    return first_packed, Packed(source.tokens, starts, length, cut, total)


class RunData(NamedTuple):
    """The data of a run. `identity`, JSON, distinguishes it from other data."""

    train: Mixture
    held_out: Mixture | None
    identity: dict[str, Any]


def open_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    files: Path,
    vocab_size: int,
    show_progress: bool = False,
) -> RunData:
    """Opens and checks all data of a run; held_out is None if nothing is held out.

    Prepared tokens must come from this tokenizer, which was loaded from the directory `files`, and
    token ids must be below the model's vocab_size. Raises InputError if anything is wrong with the
    data.
    """
    if not config.path:
        raise InputError(
            f"data.path is empty; set it to text ({KNOWN}), a prepared directory or a Megatron pair"
        )
    mixture = parse_mixture(config.path)
    _refuse_mixture(config.eval_path)

    def opened(name: str) -> Corpus:
        source = open_source(name, tokenizer, files, show_progress)
        return dataclasses.replace(source, path=name)  # the config's spelling, on every process

    sources = [(opened(name), weight) for name, weight in mixture]
    held_out = opened(config.eval_path) if config.eval_path else None
    for source in [s for s, _ in sources] + ([held_out] if held_out else []):
        largest = source.identity["max_id"]
        if largest >= vocab_size:
            raise InputError(
                f"{source.path} contains token {largest}, but the model's vocab_size is "
                f"{vocab_size}: prepare the text with the model's tokenizer"
            )
    identity = {
        "sources": [s.identity | {"path": s.path, "weight": str(w)} for s, w in sources],
        "eval": held_out and held_out.identity | {"path": held_out.path},
        "tokenizer_sha256": tokenizer_hash(files),
    }
    if held_out is None:
        return RunData(*split_held_out(sources, config), identity)
    train, _ = split_held_out(sources, dataclasses.replace(config, eval_fraction=0.0))
    rows, _ = _rows(held_out, config, 0.0)
    if not len(rows):
        raise InputError(
            f"data.eval_path={config.eval_path} has {len(held_out.tokens)} tokens, too few for a "
            f"row of data.sequence_length={config.sequence_length}"
        )
    return RunData(train, Mixture([rows], [held_out.path], [Fraction(1)]), identity)


# --- batches --------------------------------------------------------------------------------


class Order:
    """The endless training order with random access; each source's epochs are shuffled."""

    def __init__(self, rows: Mixture, seed: int):
        self.rows = rows
        self.parts = [
            grain.MapDataset.range(first, last).seed(_seed(seed, part)).shuffle().repeat()
            for part, (first, last) in enumerate(itertools.pairwise(rows.starts))
        ]

    def __getitem__(self, place: int) -> int:
        part, inside = self.rows.turn(place)
        return int(self.parts[part][inside])


def _seed(seed: int, part: int) -> int:
    """Returns the seed of a source: sources of equal size must get different orders."""
    if part == 0:
        return seed
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0])


def batch_reader(
    rows: Mixture, config: DataConfig, wanted: Sequence[int]
) -> Callable[[int], Batch]:
    """Returns a function that reads the wanted rows, [R, T + 1], of a step's global batch."""
    order = Order(rows, config.seed)

    def read(step: int) -> Batch:
        first = step * config.global_batch_size
        return rows.read([order[first + row] for row in wanted])

    return read


def train_batches(
    rows: Mixture, config: DataConfig, start_step: int, wanted: Sequence[int]
) -> Iterator[Batch]:
    """Yields the wanted rows, [R, T + 1], of every global batch from start_step on, prefetched.

    The order depends on the seed only, and row r of step s is its entry s * global_batch_size + r:
    global batches are the same for any number of processes.
    """
    steps = grain.MapDataset.range(start_step, 1 << 40)  # endless
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    return iter(steps.map(batch_reader(rows, config, wanted)).to_iter_dataset(options))


def batch_identity(rows: Mixture, config: DataConfig, step: int) -> list[dict[str, Any]]:
    """Lists the rows in the global batch of a step, which counts from 1.

    Each has its source, its number there, its first token, and the epoch.
    """
    order, found = Order(rows, config.seed), []
    first = (step - 1) * config.global_batch_size
    for row in range(config.global_batch_size):
        part, inside = rows.locate(order[first + row])
        epoch = rows.turn(first + row)[1] // len(rows.parts[part])
        found.append(
            {
                "row": row,
                "source": rows.names[part],
                "index": inside,
                "first_token": rows.parts[part].first_token(inside),
                "epoch": epoch,
            }
        )
    return found
