"""Paths as users name them: `~` is expanded, addresses such as gs://bucket/run are refused.

Every path of a flag, of a config's field and of the Python API passes through `local`, before any
work. Support for a kind of address begins here: let its scheme through.
"""

import os
import re
from pathlib import PurePath

from finermoe_jax.errors import InputError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# pathlib has made one slash of two. No scheme has a single letter.
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(.*)", re.DOTALL)
_HUB_HOSTS = ("huggingface.co/", "www.huggingface.co/", "hf.co/")
_COPYING = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}


def local(name: str | os.PathLike, what: str = "") -> str:
    """Returns the path that `name` means on this machine; hub ids (owner/name) stay as they are.

    Args:
      name: as the user gave it.
      what: the field or argument that it was given for; messages begin with it.

    Raises InputError for an address, scheme://…, with what to do instead. It would otherwise
    become a directory called `gs:`.
    """
    path = os.fspath(name)
    found = (_COLLAPSED if isinstance(name, PurePath) else _ADDRESS).match(path)
    if found:
        message = _way_out(found[1].lower(), found[2])
        raise InputError((f"{what}: " if what else "") + message)
    return os.path.expanduser(path)


def local_list(names: str, what: str = "") -> str:
    """Returns `local` of each part of a comma-separated list, such as a mixture path:weight,…"""
    return re.sub(r"[^\s,][^,]*", lambda part: local(part[0], what), names)


def _way_out(scheme: str, rest: str) -> str:
    """The message for an address of this scheme."""
    address = f"{scheme}://{rest}"
    if scheme == "file":
        return f"{address} is an address: give the path alone, /{rest.partition('/')[2]}"
    if scheme in ("http", "https"):
        host = next((host for host in _HUB_HOSTS if rest.startswith(host)), None)
        hub_name = rest.removeprefix(host) if host else ""
    else:
        hub_name = rest if scheme == "hf" else ""
    found = re.match(r"(?:(?:datasets|models)/)?([\w.-]+/[\w.-]+)", hub_name)
    if found:
        return (
            f"{address} is an address: where a hub id can be given, give {found[1]}; elsewhere "
            f"download it (hf download {found[1]} --local-dir DIR) and give DIR"
        )
    if scheme in _COPYING:
        return (
            f"{address} is the address of a bucket, and only local and mounted paths are read and "
            f"written: copy with `{_COPYING[scheme]}`, or mount the bucket, and give the local path"
        )
    return (
        f"{address} is an address, and only local and mounted paths are read and written: copy the "
        "files from or to a local directory, and give its path"
    )
