"""Where named files are found."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def find(path: str) -> Path:
    """A relative path as it stands in the working directory or, failing that, in the package.

    So `demo/model` and, in an installed wheel, `configs/demo.py` work from anywhere.
    """
    local = Path(path)
    if not local.is_absolute() and not local.exists() and (_PACKAGE / local).exists():
        return _PACKAGE / local
    return local
