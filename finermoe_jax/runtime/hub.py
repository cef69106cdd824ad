"""Models and tokenizers by directory, by gs:// URL, or by their id on the Hugging Face Hub."""

import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

from finermoe_jax.errors import InputError, first_line
from finermoe_jax.runtime.buckets import BucketPath, place
from finermoe_jax.runtime.downloads import identity, local_copy
from finermoe_jax.runtime.paths import local


def directory_of(
    source: str | os.PathLike,
    names: Sequence[str],
    further: Callable[[Path], Sequence[str]] | None = None,
) -> Path:
    """Returns a local directory, or that of a Hub id (owner/name) or URL: downloaded, or cached.

    HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT work as everywhere.

    Args:
      source: the directory, the id, or gs://….
      names: of the files to download; globs.
      further: given the directory with these files, names more of the same revision.

    Raises InputError for a file, or if there is neither such a directory nor such an id.
    """
    path = place(source)
    if isinstance(path, BucketPath):
        return _from_bucket(path, names, further)
    source = local(source)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source} is a file; pass the directory that contains {names[0]}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(f"{source} is neither a directory nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(source, allow_patterns=list(names)))
        if further is None:
            return directory
        # A snapshot's directory is named after its revision.
        wanted = list(further(directory))
        return Path(snapshot_download(source, revision=directory.name, allow_patterns=wanted))
    except InputError:
        raise
    except Exception as error:  # the Hub client raises many unrelated types
        raise InputError(
            f"{source} is not a directory here, and the Hub download failed: {first_line(error)}"
        ) from None


def _from_bucket(
    prefix: BucketPath,
    names: Sequence[str],
    further: Callable[[Path], Sequence[str]] | None,
) -> Path:
    listed = prefix.objects()
    if not listed:
        raise InputError(f"{prefix} does not exist: no object's name begins with it")

    def copied(patterns: Sequence[str]) -> Path:
        wanted = {
            name: stored
            for name, stored in listed.items()
            if any(
                name == each or (fnmatch(name, each) and name.count("/") == each.count("/"))
                for each in patterns
            )
        }
        return local_copy(prefix, wanted, f"models/{identity(prefix, wanted)}")

    directory = copied(names)
    return directory if further is None else copied([*names, *further(directory)])
