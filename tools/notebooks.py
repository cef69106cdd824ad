"""The notebooks: their sources are notebooks/*.py (Jupytext), the .ipynb are made from them.

    python tools/notebooks.py                 # writes every .ipynb, without outputs
    python tools/notebooks.py --check         # exit code 1 where one is not its source's
    python tools/notebooks.py --run [NAME …]  # executes them on TINY, in a directory of its own
        [--output=DIR]                        # and leaves the executed notebooks there

Needs the extra notebooks.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

try:
    import jupytext
    import nbformat
    from nbclient import NotebookClient
except ModuleNotFoundError as missing:
    sys.exit(f"error: this needs the package {missing.name}: pip install -e '.[notebooks]'")
from set_repository import stored_address, with_address, with_badge

FOLDER = Path(__file__).parent.parent / "notebooks"


def notebook(source: Path) -> nbformat.NotebookNode:
    """Returns a source as a notebook without outputs; the same for the same source."""
    made, address = jupytext.read(source), stored_address()
    made.metadata.pop("jupytext", None)
    for number, cell in enumerate(made.cells):
        cell.id = f"{source.stem}-{number}"  # Jupytext's are random
        cell.source = with_address(cell.source, address)
    made.cells[0].source = with_badge(made.cells[0].source, f"{source.stem}.ipynb", address)
    return made


def execute(source: Path, work: Path, output: Path | None) -> None:
    """Runs a notebook in `work`. Raises nbclient's CellExecutionError where a cell fails."""
    began, made = time.perf_counter(), notebook(source)
    resources = {"metadata": {"path": str(work)}}
    try:
        NotebookClient(made, timeout=600, kernel_name="python3", resources=resources).execute()
    finally:
        if output:
            nbformat.write(made, output / f"{source.stem}.ipynb")
    print(f"{source.name}: {time.perf_counter() - began:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="of notebooks, without an ending; default: all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    # In this order: look_inside takes the checkpoint that upcycle_and_train leaves.
    known = [FOLDER / f"{n}.py" for n in ("upcycle_and_train", "look_inside", "your_own_layer")]
    if unknown := {*options.names} - {source.stem for source in known}:
        parser.error(f"no notebook {', '.join(sorted(unknown))}")
    sources = [s for s in known if not options.names or s.stem in options.names]
    stale = []
    for source in sources:
        text = nbformat.writes(notebook(source)) + "\n"
        target = source.with_suffix(".ipynb")
        if options.check:
            if not target.is_file() or target.read_text() != text:
                stale.append(target.name)
        elif not options.run:
            target.write_text(text)
    if stale:
        print(f"not what the source says: {' '.join(stale)}; python tools/notebooks.py makes them")
        return 1
    if options.run:
        os.environ["FINERMOE_TINY"] = "1"
        with tempfile.TemporaryDirectory() as work:
            for source in sources:
                execute(source, Path(work), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
