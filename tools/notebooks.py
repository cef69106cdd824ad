"""Builds, checks and runs the notebooks: notebooks/*.py (Jupytext) are the sources of the .ipynb.

    python tools/notebooks.py                 # write every .ipynb, without outputs
    python tools/notebooks.py --check         # exit code 1 if an .ipynb differs from its source
    python tools/notebooks.py --run [NAME …]  # execute them on TINY in a temporary directory
        [--output=DIR]                        # and write the executed notebooks to DIR

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
    """Converts a source to a notebook without outputs; deterministic."""
    result, address = jupytext.read(source), stored_address()
    result.metadata.pop("jupytext", None)
    for number, cell in enumerate(result.cells):
        cell.id = f"{source.stem}-{number}"  # Jupytext's ids are random
        cell.source = with_address(cell.source, address)
    badge = with_badge(result.cells[0].source, f"{source.stem}.ipynb", address)
    result.cells[0].source = badge
    return result


def execute(source: Path, work: Path, output: Path | None) -> None:
    """Runs a notebook in `work`. Raises nbclient's CellExecutionError if a cell fails."""
    began, executed = time.perf_counter(), notebook(source)
    resources = {"metadata": {"path": str(work)}}
    try:
        NotebookClient(executed, timeout=600, kernel_name="python3", resources=resources).execute()
    finally:
        if output:
            nbformat.write(executed, output / f"{source.stem}.ipynb")
    print(f"{source.name}: {time.perf_counter() - began:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="notebook names without suffix; default: all")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    parser.add_argument("--run", action="store_true", help="execute the notebooks")
    parser.add_argument("--output", type=Path, help="with --run: directory for the results")
    options = parser.parse_args(arguments)
    # In this order: look_inside reads the checkpoint that upcycle_and_train writes.
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
        print(f"{' '.join(stale)} differ from their sources: run python tools/notebooks.py")
        return 1
    if options.run:
        os.environ["FINERMOE_TINY"] = "1"
        with tempfile.TemporaryDirectory() as work:
            for source in sources:
                execute(source, Path(work), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
