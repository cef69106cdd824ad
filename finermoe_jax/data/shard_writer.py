"""Writes a prepared directory, shard by shard (token_files.py describes its files)."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from finermoe_jax.data.token_files import (
    DTYPES,
    MANIFEST,
    PARTIAL,
    Manifest,
    Settings,
    Shard,
    shard_files,
    shard_name,
)
from finermoe_jax.errors import InputError
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import to_json


def partial_path(manifest: Path) -> Path:
    """Returns a manifest's path while it is being written."""
    return manifest.with_name(f".{manifest.name}.partial")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest atomically."""
    files.write(path, to_json(dataclasses.asdict(manifest), indent=1))


class ShardWriter:
    """Writes tokens into shards in order; a shard is complete when the manifest lists it."""

    def __init__(self, target: Path, settings: Settings, shards: list[Shard]):
        self.target, self.settings, self.shards = target, settings, shards
        self.dtype = DTYPES[settings.dtype]
        self.end = shards[-1].end if shards else (0, 0)
        self.begins = not shards or not shards[-1].open
        self.file: Any = None

    def add(self, ids: np.ndarray, ends_document: bool, source: int, pieces: int) -> None:
        """Adds a piece's tokens; `pieces` of its source are then done."""
        if self.file is None:
            path, _ = shard_files(self.target, shard_name(len(self.shards)))
            self.file = path.with_suffix(".partial").open("wb")
            self.tokens, self.max_id, self.first_source = 0, 0, source
            self.digest = hashlib.sha256()
            self.starts: list[int] = []
        if self.begins:
            self.starts.append(self.tokens)
        content = ids.astype(self.dtype).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(ids)
        self.max_id = max(self.max_id, int(ids.max(initial=0)))
        self.begins, self.end = ends_document, (source, pieces)
        if self.tokens >= self.settings.shard_tokens:
            self._complete()

    def _complete(self) -> None:
        name = shard_name(len(self.shards))
        path, documents = shard_files(self.target, name)
        self.file.close()
        self.file = None
        files.sync(path.with_suffix(".partial"))
        files.rename(path.with_suffix(".partial"), path)
        content = io.BytesIO()
        np.save(content, np.asarray(self.starts, "<i8"), allow_pickle=False)
        files.write(documents, content.getvalue())
        shard = Shard(
            name, self.tokens, len(self.starts), self.max_id,
            self.settings.sources[self.first_source : self.end[0] + 1], self.digest.hexdigest(),
            hashlib.sha256(content.getvalue()).hexdigest(), self.end, not self.begins,
        )  # fmt: skip
        self.shards.append(shard)
        write_manifest(self.target / PARTIAL, Manifest.of(self.settings, self.shards))

    def close(self) -> None:
        """Closes an incomplete shard, which the next run removes."""
        if self.file is not None:
            self.file.close()

    def finish(self) -> Manifest:
        """Writes the last shard, and the manifest that completes the directory."""
        if self.file is not None and self.tokens:
            self._complete()
        if not self.shards:
            raise InputError("the text has no tokens")
        manifest = Manifest.of(self.settings, self.shards)
        write_manifest(self.target / MANIFEST, manifest)
        (self.target / PARTIAL).unlink()
        return manifest
