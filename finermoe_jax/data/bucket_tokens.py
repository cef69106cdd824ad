"""Prepared tokens in buckets: uploaded once, and copied once to each host that trains on them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from finermoe_jax.data.token_files import (
    MANIFEST,
    Manifest,
    manifest_of,
    shard_files,
    verify,
)
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import BucketPath, Changed, crc32c
from finermoe_jax.runtime.downloads import local_copy, named_after
from finermoe_jax.runtime.json_files import parse_json


def _names(manifest: Manifest) -> list[str]:
    """Returns the names of a prepared directory's shard files."""
    return [path.name for shard in manifest.shards for path in shard_files(Path(), shard.name)]


def download_prepared(prefix: BucketPath) -> Path:
    """Returns a local copy of a prepared directory. Only its first call on a host downloads it.

    The copy is named after the manifest's SHA-256, and its files are compared with the SHA-256 sums
    in the manifest before it is used.

    Raises InputError without a manifest, for objects that are missing or differ from the manifest,
    and if the disk is too small.
    """
    try:
        content = (prefix / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{prefix} has no {MANIFEST}. Only prepared tokens are read from buckets: upload them "
            f"with finermoe prepare … --upload={prefix}, and run the same command again if it was "
            "interrupted"
        ) from None
    where = str(prefix / MANIFEST)
    manifest = manifest_of(parse_json(content, where), where)
    listed = prefix.objects()
    wanted = [MANIFEST, *_names(manifest)]
    if missing := [name for name in wanted if name not in listed]:
        raise InputError(
            f"{prefix} lacks {missing[0]}, which its {MANIFEST} names ({len(missing)} missing): "
            f"upload it again with finermoe prepare … --upload={prefix}"
        )
    name = f"tokens/{hashlib.sha256(content).hexdigest()}"

    def check(copy: Path) -> None:
        try:
            with named_after(prefix, copy):
                verify(copy)
        except InputError as error:
            raise InputError(
                f"{error}\nDelete the objects below {prefix}, and upload the tokens again with "
                f"finermoe prepare … --upload={prefix}"
            ) from None

    return local_copy(prefix, {each: listed[each] for each in wanted}, name, check)


def refuse_unknown(prefix: BucketPath, directory: Path) -> None:
    """Raises InputError if there are objects that a directory, not yet prepared, cannot explain."""
    if (names := prefix.names()) and not (directory / MANIFEST).is_file():
        raise InputError(
            f"--upload={prefix} is not empty: it has {names[0]}, and {directory} is not prepared. "
            "Nothing is overwritten: give a new prefix"
        )


def upload_prepared(directory: Path, prefix: BucketPath, say: Callable[[str], None]) -> None:
    """Uploads a prepared directory, the manifest last. A repeated call resumes.

    Raises InputError if the directory is damaged, or `prefix` holds something else.
    """
    listed = prefix.objects()
    manifest = verify(directory)
    names = [*_names(manifest), MANIFEST]
    if others := sorted(listed.keys() - set(names)):
        raise InputError(
            f"--upload={prefix} is not empty: it has {others[0]}, which is not in {directory}. "
            "Nothing is overwritten: give a new prefix"
        )
    total = sum((directory / name).stat().st_size for name in names)
    with tqdm(total=total, desc="uploading", unit="B", unit_scale=True) as bar:
        for name in names:
            _upload_one(directory / name, prefix / name, name in listed)
            bar.update((directory / name).stat().st_size)
    say(f"{prefix}: {len(names)} objects, {total:,} bytes")


def _upload_one(source: Path, target: BucketPath, exists: bool) -> None:
    try:
        if not exists:
            target.write(source, if_generation=0)
        elif target.stat().crc32c != crc32c(source):
            raise Changed
    except Changed:
        raise InputError(
            f"{target} holds something else than {source}. Nothing is overwritten: give a new "
            "prefix to --upload, or delete the object"
        ) from None
