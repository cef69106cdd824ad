"""Megatron-Core's .bin/.idx pairs of tokens (IndexedDataset), memory-mapped."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import xxhash

from finermoe_jax.data.token_files import Corpus, TokenStream, id_range, map_file, scan_bar
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import refuse_pointer

_HEADER = b"MMIDIDX\x00\x00"
_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def megatron_prefix(path: Path) -> Path | None:
    """Returns the common prefix of the .bin/.idx pair that `path` names, with or without suffix."""
    for prefix in (path, path.with_suffix("") if path.suffix in (".idx", ".bin") else path):
        if Path(f"{prefix}.idx").is_file():
            return prefix
    return None


def _read_index(
    index: Path, content: np.ndarray, data: Path
) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Returns the tokens' dtype, the first token of each sequence and the end, document marks.

    A mark is the number of a document's first sequence; the last one is the number of sequences.
    """
    head = len(_HEADER) + 25
    if len(content) < head or content[:9].tobytes() != _HEADER:
        refuse_pointer(index)
        raise InputError(f"{index} does not begin with MMIDIDX, as an index of Megatron-Core does")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:head].tobytes())
    if version != 1 or code not in _DTYPES:
        raise InputError(
            f"{index} has version {version} and dtype code {code}; supported are version 1 and "
            f"the integer codes {', '.join(map(str, _DTYPES))}"
        )
    needed = head + 12 * sequences + 8 * documents
    # Multimodal data adds one byte per sequence.
    if len(content) not in (needed, needed + sequences) or not sequences or not documents:
        raise InputError(
            f"{index} has {len(content)} bytes; its {sequences} sequences and {documents} "
            f"document marks need {needed}: it is truncated or damaged"
        )
    lengths = np.frombuffer(content, "<i4", sequences, head)
    pointers = np.frombuffer(content, "<i8", sequences, head + 4 * sequences)
    marks = np.frombuffer(content, "<i8", documents, head + 12 * sequences)
    dtype = np.dtype(_DTYPES[code])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise InputError(f"{index}: its sequences are not contiguous in {data}")
    if marks[0] != 0 or marks[-1] != sequences or (np.diff(marks) < 0).any():
        raise InputError(f"{index}: its document marks do not ascend from 0 to {sequences}")
    return dtype, starts, marks


def open_megatron(prefix: Path, show_progress: bool = False) -> Corpus:
    """Opens a .bin/.idx pair of Megatron-Core's IndexedDataset, memory-mapped.

    Reads all tokens once for their smallest and largest id and a hash, which the format does not
    state.

    Raises InputError for a header or sizes that contradict each other, a missing file, or negative
    ids.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    content = map_file(index, np.dtype("u1"))
    dtype, starts, marks = _read_index(index, content, data)
    total = int(starts[-1])
    if not total:
        raise InputError(f"{data} is empty")
    size = data.stat().st_size if data.is_file() else 0
    if size != total * dtype.itemsize:
        refuse_pointer(data)
        raise InputError(
            f"{data} has {size} bytes, but {index} states {total} tokens of "
            f"{dtype.itemsize} bytes: one file is truncated, or from another pair"
        )
    tokens = map_file(data, dtype)
    digest = xxhash.xxh3_128()
    with scan_bar(total, prefix.name if show_progress else "") as progress:
        low, high = id_range(tokens, progress, digest)
    if low < 0:
        raise InputError(f"{data} contains the negative token {low}")
    identity = {
        "kind": "megatron",
        "index_sha256": hashlib.sha256(content).hexdigest(),
        "tokens_xxh3_128": digest.hexdigest(),
        "tokens": total,
        "max_id": high,
    }
    return Corpus(str(prefix), TokenStream([tokens]), ((starts[marks[:-1]], 0),), identity)
