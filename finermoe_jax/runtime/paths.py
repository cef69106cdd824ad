"""User-given paths: expands `~` and rejects URLs.

Every path from a flag, a config field or the Python API passes through `local` first or, where
gs:// is supported, through `buckets.place`.
"""

import os
import re
from collections.abc import Callable
from pathlib import PurePath

from finermoe_jax.errors import InputError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# pathlib collapses the two slashes. No scheme has a single letter.
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(.*)", re.DOTALL)
_HUB_HOSTS = ("huggingface.co/", "www.huggingface.co/", "hf.co/")
_COPYING = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}


def local(name: str | os.PathLike, what: str = "") -> str:
    """Returns a local path with `~` expanded; Hub ids (owner/name) are unchanged.

    Args:
      name: the user's input.
      what: the field or argument, as a prefix for messages.

    Raises InputError for a URL (scheme://…), which would become a directory named `gs:`.
    """
    if found := address(name):
        raise InputError((f"{what}: " if what else "") + _url_message(*found))
    return os.path.expanduser(os.fspath(name))


def address(name: str | os.PathLike) -> tuple[str, str] | None:
    """Splits a URL into its scheme, in lower case, and the rest; None for a local path."""
    text = os.fspath(name)
    found = _ADDRESS.match(text)
    if found is None and isinstance(name, PurePath):
        found = _COLLAPSED.match(text)
    return (found[1].lower(), found[2]) if found else None


def local_list(names: str, what: str = "") -> str:
    """Applies `local` to each part of a comma-separated list."""
    return each_of(names, lambda part: local(part, what))


def each_of(names: str, convert: Callable[[str], str]) -> str:
    """Converts each part of a comma-separated list, such as a mixture path:weight,…"""
    return re.sub(r"[^\s,][^,]*", lambda part: convert(part[0]), names)


def _url_message(scheme: str, rest: str) -> str:
    """Returns the error message for a URL."""
    url = f"{scheme}://{rest}"
    if scheme == "file":
        return f"{url} is a URL: give the path alone, /{rest.partition('/')[2]}"
    if scheme in ("http", "https"):
        host = next((host for host in _HUB_HOSTS if rest.startswith(host)), None)
        hub_name = rest.removeprefix(host) if host else ""
    else:
        hub_name = rest if scheme == "hf" else ""
    found = re.match(r"(?:(?:datasets|models)/)?([\w.-]+/[\w.-]+)", hub_name)
    if found:
        return (
            f"{url} is a URL: give the Hub id {found[1]} if Hub ids are allowed here; "
            f"otherwise download it (hf download {found[1]} --local-dir DIR) and give DIR"
        )
    if scheme in _COPYING:
        return (
            f"{url} is a bucket URL, but only local paths are supported here: copy it with "
            f"`{_COPYING[scheme]}`, and give the local path. docs/howto/buckets.md lists the flags "
            "that take gs://"
        )
    return (
        f"{url} is a URL, but only local paths are supported: copy the files from or to a local "
        "directory, and give its path"
    )
