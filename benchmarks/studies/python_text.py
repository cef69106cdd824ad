"""Writes text for studies from this Python's own library: language reference and sources.

    python benchmarks/studies/python_text.py FILE.txt [--megabytes=8]

Needs no network. The text depends on the version of Python. The script prints it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from pydoc_data import topics

_LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"}


def parts():
    """Yields the reference's topics, then every source file, in order of their names."""
    yield from (topics.topics[name] for name in sorted(topics.topics))
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        found = importlib.util.find_spec(name)
        if found is None or not (found.origin or "").endswith(".py"):
            continue
        origin = Path(found.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            if not {"test", "tests", "__pycache__"} & {*file.parts}:
                yield file.read_text(encoding="utf-8", errors="replace")


def main(place: Path, megabytes: float) -> None:
    """Writes at most so many megabytes; prints the size."""
    left = int(megabytes * 1e6)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w", encoding="utf-8") as out:
        for part in parts():
            if left <= 0:
                break
            left -= out.write(part[:left].strip() + "\n\n")
    print(f"{place}: {place.stat().st_size / 1e6:.1f} MB, from Python {sys.version.split()[0]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="text file to write")
    parser.add_argument("--megabytes", type=float, default=8.0, help="most text, in MB")
    given = parser.parse_args()
    main(given.file, given.megabytes)
