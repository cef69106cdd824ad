"""Writes the repository's address to all files that contain it.

    python tools/set_repository.py https://github.com/OWNER/NAME

pyproject.toml stores it ([project.urls]); mkdocs.yml, CITATION.cff, README.md, the notebooks and
the recipe for Kaggle repeat it. Without an address, notebooks install from PyPI and link to it. Run
it again after a move. Needs the extra notebooks.
"""

import importlib
import posixpath
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPI = "https://pypi.org/project/finermoe-jax/"
_ADDRESS = re.compile(r"https://github\.com/[\w.-]+/([\w.-]+?)(?:\.git)?/?")
_RELATIVE = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
# File: pattern of the lines with the address, their template, and the text that follows them.
_PLACES = {
    "pyproject.toml": (
        r"\[project\.urls\]\n.*\n\n",
        '[project.urls]\nRepository = "{address}"\n\n',
        "[project.optional-dependencies]\n",
    ),
    "mkdocs.yml": (r"repo_url:.*\n", "repo_url: {address}\n", "docs_dir:"),
    "CITATION.cff": (r"repository-code:.*\n", 'repository-code: "{address}"\n', "license:"),
    "README.md": (
        r"```sh\ngit clone .*\n```\n\n",
        "```sh\ngit clone {address} && cd {name}\n```\n\n",
        "```sh\npython -m venv",
    ),
    "recipes/qwen0p5b_kaggle/train.ipynb": (
        r' *"SOURCE = .*\n',
        '    "SOURCE = \\"git+{address}\\"\\n",\n',
        '    "import subprocess\\n",\n',
    ),
}


def stored_address(root: Path = ROOT) -> str | None:
    """Returns the address in pyproject.toml; None if it is not set."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def texts_with(address: str, root: Path = ROOT) -> dict[Path, str]:
    """Returns the new text of every file with the address, except notebooks/.

    Raises ValueError if a file lacks the place for it.
    """
    name = _ADDRESS.fullmatch(address)[1]  # type: ignore[index]
    texts = {}
    for file, (pattern, line, before) in _PLACES.items():
        path, line = root / file, line.format(address=address, name=name)
        text = re.sub(pattern, "", path.read_text())
        if before not in text:
            raise ValueError(f"{file} has no {before!r}, before which the address belongs")
        texts[path] = text.replace(before, line + before, 1)
    return texts


def with_address(cell: str, address: str | None) -> str:
    """Makes a cell's links absolute and sets the install source; without an address: PyPI."""

    def absolute(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("notebooks", link[1]))
        return f"]({address}/blob/main/{target})" if address else f"]({PYPI})"

    cell = _RELATIVE.sub(absolute, cell)
    return cell.replace('SOURCE = ""', f'SOURCE = "git+{address}"') if address else cell


def with_badge(cell: str, notebook: str, address: str | None) -> str:
    """Adds an "Open in Colab" badge below the title of a notebook's first cell."""
    if not address:
        return cell
    path = address.removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook}"
    image = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
    title, rest = cell.split("\n", 1)
    return f"{title}\n\n[{image}]({target})\n{rest}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if len(arguments) != 1 or not _ADDRESS.fullmatch(arguments[0]):
        given = " ".join(arguments) or "nothing"
        print(
            f"give one address such as https://github.com/OWNER/NAME, not {given}: "
            "Colab opens notebooks from GitHub only",
            file=sys.stderr,
        )
        return 2
    notebooks = importlib.import_module("notebooks")  # before anything is written: needs Jupytext

    address = arguments[0].removesuffix("/").removesuffix(".git")
    for path, text in texts_with(address).items():
        path.write_text(text)
    return notebooks.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
