"""Where named files are found."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def find(path: str) -> Path:
    """A relative path as it stands in the working directory or, failing that, in the package.

    So `demo/model` and `configs/demo.py` work from anywhere: configs/ lies beside the package in a
    clone and inside it in an installed wheel.
    """
    local = Path(path)
    places = (local, _PACKAGE / local, _PACKAGE.parent / local)
    return next((place for place in places if place.exists()), local)
