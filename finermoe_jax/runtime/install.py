"""Installed packages: versions outside the supported ranges, and extras that are missing."""

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from finermoe_jax.errors import InputError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAME = "finermoe-jax"


def check_versions() -> None:
    """Raises InputError for dependencies that are missing or outside their supported ranges.

    The message lists all of them. Checks nothing if the package itself is not installed, as in a
    clone on PYTHONPATH.
    """
    _refuse({each: _version(each.name) for each in _requirements()})


def require(package: str, extra: str, what: str) -> None:
    """Raises InputError if a package of an extra is missing or outside its supported range.

    Args:
      package: as it is imported.
      extra: the extra of this package that installs it.
      what: the flag, file or command that needs it; the message begins with it.
    """
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the parent of a dotted name
        found = None
    # A folder of that name in the working directory is found, too, but has no origin.
    if found is None or found.origin is None:
        raise InputError(
            f"{what} needs {package}, which is not installed: pip install "
            f"'{_NAME}[{extra}]' (in a clone: pip install -e '.[{extra}]')"
        )
    versions = {
        each: _version(each.name)
        for each in _requirements(extra)
        if each.name.replace("-", "_").lower() == package.lower()
    }
    _refuse({each: version for each, version in versions.items() if version})


def _requirements(extra: str = "") -> "list[Requirement]":
    """The package's own requirements, or those that an extra adds."""
    from packaging.requirements import Requirement

    try:
        listed = list(map(Requirement, metadata.requires(_NAME) or []))
    except metadata.PackageNotFoundError:
        return []

    def holds(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    return [each for each in listed if holds(each, extra) and (not extra or not holds(each, ""))]


def _version(name: str) -> str:
    """The installed version; "" if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _refuse(versions: "Mapping[Requirement, str]") -> None:
    """Raises InputError with the version and the range of each that is outside, if any is."""
    outside = {
        each: version
        for each, version in versions.items()
        if not version or not each.specifier.contains(version, prereleases=True)
    }
    if not outside:
        return
    lines = [
        f"  {each.name} {version or 'is not installed'}, needed: {each.name}{each.specifier}"
        for each, version in outside.items()
    ]
    ranges = " ".join(f"'{each.name}{each.specifier}'" for each in outside)
    raise InputError(
        "\n".join(["these versions are not supported:", *lines, f"Run: pip install {ranges}"])
    )
