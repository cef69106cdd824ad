"""User-given paths: expands `~` and rejects URLs such as gs://bucket/run.

Every path from a flag, a config field or the Python API passes through `local` first. To support a
URL scheme, let it through here.
"""

import os
import re
from pathlib import PurePath

from finermoe_jax.errors import InputError

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
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
    path = os.fspath(name)
    found = (_COLLAPSED if isinstance(name, PurePath) else ADDRESS).match(path)
    if found:
        message = _url_message(found[1].lower(), found[2])
        raise InputError((f"{what}: " if what else "") + message)
    return os.path.expanduser(path)


def local_list(names: str, what: str = "") -> str:
    """Applies `local` to each part of a comma-separated list, such as a mixture path:weight,…"""
    return re.sub(r"[^\s,][^,]*", lambda part: local(part[0], what), names)


def _url_message(scheme: str, rest: str) -> str:
    """Returns the error message for a URL."""
    address = f"{scheme}://{rest}"
    if scheme == "file":
        return f"{address} is a URL: give the path alone, /{rest.partition('/')[2]}"
    if scheme in ("http", "https"):
        host = next((host for host in _HUB_HOSTS if rest.startswith(host)), None)
        hub_name = rest.removeprefix(host) if host else ""
    else:
        hub_name = rest if scheme == "hf" else ""
    found = re.match(r"(?:(?:datasets|models)/)?([\w.-]+/[\w.-]+)", hub_name)
    if found:
        return (
            f"{address} is a URL: give the Hub id {found[1]} if Hub ids are allowed here; "
            f"otherwise download it (hf download {found[1]} --local-dir DIR) and give DIR"
        )
    if scheme in _COPYING:
        return (
            f"{address} is a bucket URL, but only local and mounted paths are supported: copy it "
            f"with `{_COPYING[scheme]}` or mount the bucket, and give the local path"
        )
    return (
        f"{address} is a URL, but only local and mounted paths are supported: copy the files from "
        "or to a local directory, and give its path"
    )
