"""Google Cloud Storage: bucket paths, and reads and writes that depend on an object's generation.

A bucket has objects and no directories. An object is written whole, and each write gives it a new
generation; a write can be made to fail unless the object has a given one.
"""

import base64
import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from finermoe_jax.errors import InputError, RunEnded, first_line
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.install import require
from finermoe_jax.runtime.paths import address, each_of, local
from finermoe_jax.runtime.preemption import EXIT_CODE

# Seconds for which a request is repeated while the server cannot be reached.
OUTAGE_SECONDS = 45.0
_REQUEST_SECONDS = (10, 60)  # to connect, to answer
# tensorstore's words for it
_UNAVAILABLE = ("UNAVAILABLE", "CURL error", "DEADLINE_EXCEEDED")
# The server's words for a retention policy and for the two kinds of holds
_KEPT = re.compile(r"retention policy|object retention|active \S+ hold", re.I)
# Wildcards and version suffixes of other tools; they are legal in names, but never meant.
_SUSPECT = re.compile(r"[*?#\[\]]|//|(^|/)\.\.?(/|$)")


class Changed(Exception):
    """The object does not have the expected generation: something else wrote or deleted it."""


class Unreachable(RunEnded):
    """The server did not answer for OUTAGE_SECONDS. Commands exit with code 75."""

    def __init__(self, what: str, reason: str, state: str = ""):
        """`what` cannot be reached because of `reason`; `state` is a sentence about the rest."""
        super().__init__(
            f"{what} cannot be reached ({reason}). {state}{'. ' if state else ''}Run the same "
            "command again when it can be reached",
            EXIT_CODE,
            alone=True,
        )
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object's size in bytes, CRC-32C (base64, as the server reports it) and generation."""

    st_size: int
    crc32c: str
    generation: int


@dataclasses.dataclass(frozen=True)
class BucketPath:
    """gs://bucket/key: an object, or the prefix of the objects below it.

    Has the methods of pathlib.Path that also make sense here. os.fspath gives the URL, which
    etils.epath, Orbax and tensorstore take.

    All methods raise InputError if access is denied or the bucket does not exist, and Unreachable
    if the server does not answer.
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}"

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str | os.PathLike) -> "BucketPath":
        return BucketPath(self.bucket, str(PurePosixPath(self.key) / name))

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "BucketPath":
        """The path without its last part."""
        above = str(PurePosixPath(self.key).parent)
        return BucketPath(self.bucket, "" if above == "." else above)

    def with_name(self, name: str) -> "BucketPath":
        """Returns the path with another last part."""
        return self.parent / name

    def absolute(self) -> "BucketPath":
        """Returns itself."""
        return self

    # --- looking ----------------------------------------------------------------------------

    def objects(self, deep: bool = True) -> dict[str, Stored]:
        """Returns the objects below this prefix by their relative names, in one LIST.

        `deep`: also those whose relative names have slashes.
        """
        prefix = f"{self.key}/" if self.key else ""
        with _requests(self, whole_bucket=True):
            found = list(
                _client().list_blobs(
                    self.bucket,
                    prefix=prefix,
                    delimiter=None if deep else "/",
                    fields="items(name,size,crc32c,generation),nextPageToken",
                    **_patience(),
                )
            )
        return {
            blob.name.removeprefix(prefix): _stored(blob) for blob in found if blob.name != prefix
        }

    def names(self) -> list[str]:
        """Returns the sorted names one level below this prefix, of objects and of prefixes."""
        prefix = f"{self.key}/" if self.key else ""
        with _requests(self, whole_bucket=True):
            listed = _client().list_blobs(self.bucket, prefix=prefix, delimiter="/", **_patience())
            found = {blob.name for blob in listed} | listed.prefixes
        return sorted(name.removeprefix(prefix).rstrip("/") for name in found if name != prefix)

    def stat(self) -> Stored:
        """Returns the object's description. Raises FileNotFoundError if there is none."""
        blob = _client().bucket(self.bucket).blob(self.key)
        with _requests(self):
            blob.reload(**_patience())
        return _stored(blob)

    def is_file(self) -> bool:
        """Returns True if there is an object of this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Returns True if there are objects below this prefix."""
        with _requests(self, whole_bucket=True):
            listed = _client().list_blobs(
                self.bucket, prefix=f"{self.key}/" if self.key else "", max_results=1, **_patience()
            )
            return any(True for _ in listed)

    def exists(self) -> bool:
        """Returns True if there is an object of this name, or objects below it."""
        return self.is_file() or self.is_dir()

    # --- contents ---------------------------------------------------------------------------

    def read(self) -> tuple[bytes, int]:
        """Returns the object's content and generation. Raises FileNotFoundError without one."""
        blob = _client().bucket(self.bucket).blob(self.key)
        with _requests(self):
            content = blob.download_as_bytes(**_patience())
        return content, int(blob.generation)

    def read_bytes(self) -> bytes:
        """Returns the object's content. Raises FileNotFoundError without one."""
        return self.read()[0]

    def download(self, target: Path) -> int:
        """Writes the object to a local file, and returns its generation. Raises as `read` does."""
        blob = _client().bucket(self.bucket).blob(self.key)
        with _requests(self):
            blob.download_to_filename(str(target), **_patience())
        return int(blob.generation)

    def write(self, content: bytes | str | Path, if_generation: int | None = None) -> int:
        """Writes the object, from a local file if `content` is a Path; returns its generation.

        Raises Changed unless the object has the generation `if_generation`; 0: it must not exist.
        """
        blob = _client().bucket(self.bucket).blob(self.key)
        options = _patience() | {"if_generation_match": if_generation, "checksum": "crc32c"}
        data = content.encode() if isinstance(content, str) else content
        try:
            with _requests(self, whole_bucket=True):
                if isinstance(data, Path):
                    blob.upload_from_filename(str(data), **options)
                else:
                    blob.upload_from_string(data, "application/octet-stream", **options)
        except Changed as error:
            return self._written_before(data, error)
        return int(blob.generation)

    def _written_before(self, data: bytes | Path, changed: Changed) -> int:
        """Returns the generation if the object has this content; else raises `changed`.

        A request that was repeated because its answer got lost finds the object that it wrote.
        """
        try:
            found = self.stat()
        except FileNotFoundError:
            raise Changed(f"{self} was deleted") from None
        if found.crc32c != crc32c(data):
            raise changed
        return found.generation

    def delete(self, if_generation: int | None = None) -> None:
        """Deletes the object; a no-op if there is none. Raises Changed as `write` does."""
        blob = _client().bucket(self.bucket).blob(self.key)
        with contextlib.suppress(FileNotFoundError), _requests(self):
            blob.delete(if_generation_match=if_generation, **_patience())

    def copy(self, target: "BucketPath") -> None:
        """Copies the object inside the server. Raises FileNotFoundError if there is none."""
        client = _client()
        new = client.bucket(target.bucket).blob(target.key)
        old = client.bucket(self.bucket).blob(self.key)
        with _requests(self):
            token, *_ = new.rewrite(old, **_patience())
            while token:  # objects above some size are copied in several calls
                token, *_ = new.rewrite(old, token=token, **_patience())


# A local or a bucket path.
Place = Path | BucketPath


def is_url(text: str | os.PathLike) -> bool:
    """Returns True for scheme://…, in contrast to a local path or Hub id."""
    return address(text) is not None


def place(text: str | os.PathLike, what: str = "") -> Place:
    """Returns the place that a user gave: a local path, with `~` expanded, or a bucket path.

    `what` is the field or argument, for messages. Raises InputError for URLs other than gs://.
    """
    if isinstance(text, BucketPath):
        return text
    scheme, rest = address(text) or ("", "")
    if scheme != "gs":
        if scheme == "s3":
            raise InputError(
                f"{what}{': ' if what else ''}s3://{rest} is not supported: Orbax, which writes "
                "the checkpoints, cannot write to S3. Give a gs:// URL or a local directory"
            )
        return Path(local(text, what))
    bucket, _, key = rest.partition("/")
    key = key.strip("/")
    if not bucket or not key or _SUSPECT.search(key):
        raise InputError(
            f"{what}{': ' if what else ''}gs://{rest} must be gs://BUCKET/NAME, without wildcards "
            "or empty parts"
        )
    return BucketPath(bucket, key)


def placed(text: str, what: str = "") -> str:
    """Returns `place(text)` as text, for flags and fields; an empty text stays."""
    return str(place(text, what)) if is_url(text) else local(text, what)


def placed_list(texts: str, what: str = "") -> str:
    """Applies `placed` to each part of a comma-separated list, such as a mixture path:weight,…"""
    return each_of(texts, lambda part: placed(part, what))


def locate(text: str | os.PathLike) -> Place:
    """Returns a bucket path, or a local path that is also looked for in the package (`find`)."""
    return place(text) if is_url(text) else find(text)


def crc32c(content: bytes | Path) -> str:
    """Returns the CRC-32C of bytes or of a local file, as a server reports it."""
    require("google_crc32c", "gcs", "a checksum of a bucket")
    import google_crc32c

    checksum = google_crc32c.Checksum()
    if isinstance(content, Path):
        with content.open("rb") as stream:
            while part := stream.read(1 << 22):
                checksum.update(part)
    else:
        checksum.update(content)
    return base64.b64encode(checksum.digest()).decode()


# --- requests -------------------------------------------------------------------------------


@functools.cache
def _client() -> Any:
    """Returns the client of this process. Raises InputError without the extra or credentials."""
    require("gcsfs", "gcs", "gs://")
    import fsspec
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    # gcsfs, through which Orbax lists directories, would not see what other processes write.
    for scheme in ("gs", "gcs"):
        fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it also raises
    try:
        return storage.Client()
    except DefaultCredentialsError:
        raise InputError(
            "gs:// needs Google credentials: run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to a service account's key file"
        ) from None
    except OSError:  # google.cloud's, without a project
        raise InputError(
            "gs:// needs a Google Cloud project: set GOOGLE_CLOUD_PROJECT, or run "
            "`gcloud auth application-default set-quota-project PROJECT`"
        ) from None


def _patience() -> dict[str, Any]:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": _REQUEST_SECONDS, "retry": DEFAULT_RETRY.with_timeout(OUTAGE_SECONDS)}


@contextlib.contextmanager
def _requests(path: BucketPath, whole_bucket: bool = False) -> Iterator[None]:
    """Converts the client's errors. An object may be missing or Changed.

    `whole_bucket`: NotFound means that the bucket does not exist.
    """
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError, TransportError

    try:
        yield
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        if _KEPT.search(str(error)):
            raise InputError(
                f"{path}: the bucket keeps objects from being overwritten and deleted "
                f"({_said(error)}). Commands overwrite locks and logs, and delete old "
                "checkpoints: use a bucket without a retention policy and without holds"
            ) from None
        raise InputError(
            f"{path}: access is denied ({_said(error)}). Reading needs the role "
            "roles/storage.objectViewer on the bucket, writing roles/storage.objectUser"
        ) from None
    except exceptions.NotFound:
        if not whole_bucket:
            raise FileNotFoundError(2, "no such object", str(path)) from None
        raise InputError(
            f"{path}: there is no bucket {path.bucket}, or these credentials may not see it. "
            f"Create it (gcloud storage buckets create gs://{path.bucket}), or correct the name"
        ) from None
    except exceptions.PreconditionFailed:
        raise Changed(f"{path} was written by another process") from None
    except (
        exceptions.RetryError,
        exceptions.ServerError,
        exceptions.TooManyRequests,
        requests.exceptions.RequestException,
        TransportError,
    ) as error:
        raise Unreachable(str(path), _cause(error)) from None
    except GoogleAuthError as error:
        raise InputError(
            f"{path}: the Google credentials are not valid ({first_line(error)}). Run `gcloud auth "
            "application-default login`"
        ) from None


def _said(error: Exception) -> str:
    """Returns the server's own message in an error that quotes its JSON, else the first line."""
    found = re.search(r'"message": *"([^"]+)"', str(error))
    return found[1] if found else first_line(error)


def _cause(error: Exception) -> str:
    """Returns the system's own words in an error of requests, such as Connection refused."""
    found = re.search(r"\[Errno -?\d+\] ([^'\"()]+)|\w+\((?:\d+, )?'([^']+)'\)", str(error))
    return found[1] or found[2] if found else first_line(error)


def is_outage(error: BaseException | None) -> bool:
    """Returns True if an error, or one in its cause chain, says that a bucket cannot be reached."""
    while error is not None:
        of_http = type(error).__module__.partition(".")[0] in ("aiohttp", "requests", "urllib3")
        unavailable = any(word in str(error) for word in _UNAVAILABLE)
        if isinstance(error, Unreachable) or of_http or unavailable:
            return True
        error = error.__cause__ or error.__context__
    return False


def _stored(blob: Any) -> Stored:
    return Stored(int(blob.size), str(blob.crc32c), int(blob.generation))
