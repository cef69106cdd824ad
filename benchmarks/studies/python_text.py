"""Writes text for studies from this Python's own library: language reference and sources.

    python benchmarks/studies/python_text.py FILE.txt [--megabytes=8]
    python benchmarks/studies/python_text.py FILE.txt --books=DIR --held_out=DIR

Needs no network. The text depends on the version of Python. The script prints it.

`--books` adds the .txt files of a folder, such as books of Project Gutenberg, in parts of 50,000
characters. `--held_out` keeps one document in twenty out of FILE and writes its first 10,000
characters to DIR/code.txt or DIR/prose.txt: sources are code; the reference and parts of books are
prose. With either option the documents are shuffled, always in the same order.
"""

import argparse
import hashlib
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

_LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"}
_BOOK_PART = 50_000  # characters
_HELD_OUT = 20  # one document of so many
_HELD_OUT_CHARACTERS = 10_000


class Document(NamedTuple):
    """One text: its name, which decides whether it is held out, its kind and its characters."""

    name: str
    kind: str  # code or prose
    text: str

    @property
    def held_out(self) -> bool:
        """True for about one name in twenty."""
        return hashlib.sha256(self.name.encode()).digest()[0] % _HELD_OUT == 0

    def beginning(self) -> "Document":
        """The document's beginning, so that no long one decides a held-out loss."""
        return self._replace(text=self.text[:_HELD_OUT_CHARACTERS])


def parts() -> Iterator[Document]:
    """Yields the reference's topics, then every source file, in order of their names."""
    for name in sorted(topics.topics):
        yield Document(f"topic {name}", "prose", topics.topics[name])
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        found = importlib.util.find_spec(name)
        if found is None or not (found.origin or "").endswith(".py"):
            continue
        origin = Path(found.origin or "")
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            if not {"test", "tests", "__pycache__"} & {*file.parts}:
                place = file.relative_to(origin.parent)
                text = file.read_text(encoding="utf-8", errors="replace")
                yield Document(f"module {name} {place}", "code", text)


def book_parts(folder: Path) -> Iterator[Document]:
    """Yields the parts of all .txt files of a folder."""
    for file in sorted(folder.glob("*.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), _BOOK_PART):
            yield Document(f"book {file.name} {start}", "prose", text[start : start + _BOOK_PART])


def write(place: Path, documents: list[Document], megabytes: float) -> None:
    """Writes at most so many megabytes; prints the size."""
    left = int(megabytes * 1e6)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w", encoding="utf-8") as out:
        for document in documents:
            if left <= 0:
                break
            left -= out.write(document.text[:left].strip() + "\n\n")
    print(f"{place}: {place.stat().st_size / 1e6:.1f} MB, from Python {sys.version.split()[0]}")


def main() -> None:
    """Writes the text and what is held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="text file to write")
    parser.add_argument("--megabytes", type=float, default=8.0, help="most text in FILE, in MB")
    parser.add_argument("--books", type=Path, help="folder of .txt files to add")
    parser.add_argument("--held_out", type=Path, help="folder for the documents held out")
    given = parser.parse_args()
    documents = list(parts())
    if given.books or given.held_out:
        documents += book_parts(given.books) if given.books else ()
        random.Random(0).shuffle(documents)
    if given.held_out:
        for kind in ("code", "prose"):
            kept = [one.beginning() for one in documents if one.held_out and one.kind == kind]
            write(given.held_out / f"{kind}.txt", kept, sys.maxsize / 1e6)
        documents = [one for one in documents if not one.held_out]
    write(given.file, documents, given.megabytes)


if __name__ == "__main__":
    main()
