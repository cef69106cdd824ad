"""The repository's address: written to all files that name it; links of notebooks are absolute."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest

from tests.support import ROOT

RECIPE = "recipes/qwen0p5b_kaggle/train.ipynb"
FILES = ("pyproject.toml", "mkdocs.yml", "CITATION.cff", "README.md", RECIPE)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST, SECOND = "https://github.com/someone/moe", "https://github.com/others/finermoe-jax"


@pytest.fixture
def tool(monkeypatch):
    """The module tools/set_repository.py."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("set_repository")
    sys.modules.pop("set_repository", None)


@pytest.fixture
def clone(tmp_path):
    """A folder with the files that name the address."""
    for name in (*FILES, "docs", "notebooks", "tools"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def links_of(cells):
    return [link for cell in cells for link in re.findall(r"\]\(([^)\s]+)\)", cell)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_dead_or_relative_link(path, tool):
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    address = tool.stored_address()
    for link in links_of(cells):
        assert link.startswith("https://"), link
        if link.startswith("https://colab.research.google.com/github"):
            assert address, link
        elif address and link.startswith(address):
            file = link.removeprefix(f"{address}/blob/main/").partition("#")[0]
            assert (ROOT / file).exists(), link
        else:
            known = (
                tool.PYPI,
                "https://arxiv.org/abs/",
                "https://huggingface.co/",
                "https://colab",
            )
            assert link.startswith(known), link
    # Links of the sources name files of this repository: they become the ones above.
    source = path.with_suffix(".py").read_text()
    for link in links_of([source]):
        assert re.match(r"\w+:|#", link) or (path.parent / link.partition("#")[0]).exists(), link


def test_every_place_names_the_address_and_a_second_one_replaces_it(tool, clone):
    for address in (FIRST, SECOND, SECOND):
        for path, text in tool.texts_with(address, clone).items():
            path.write_text(text)
    assert tool.stored_address(clone) == SECOND
    for name in FILES:
        text = (clone / name).read_text()
        assert text.count(SECOND) == 1 and FIRST not in text, name
        # The address's own lines apart, all is as before.
        before = (ROOT / name).read_text()
        assert len(text.splitlines()) - len(before.splitlines()) in (0, 1, 3, 4), name
    project = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"] and project["dependencies"]
    first = json.loads((clone / RECIPE).read_text())["cells"][1]["source"]
    assert f'SOURCE = "git+{SECOND}"\n' in first
    assert f"git clone {SECOND} && cd finermoe-jax" in (clone / "README.md").read_text()


def test_cells_with_an_address_and_without(tool):
    text = "# Title\n\nSee [a page](../docs/data.md#rows), [next](b.ipynb), [it](https://x.y)."
    assert links_of([tool.with_address(text, FIRST)]) == [
        f"{FIRST}/blob/main/docs/data.md#rows", f"{FIRST}/blob/main/notebooks/b.ipynb", "https://x.y"
    ]  # fmt: skip
    assert links_of([tool.with_address(text, None)]) == [tool.PYPI, tool.PYPI, "https://x.y"]
    assert tool.with_address('SOURCE = ""  # p', FIRST) == f'SOURCE = "git+{FIRST}"  # p'
    assert tool.with_address('SOURCE = ""  # p', None) == 'SOURCE = ""  # p'
    badge = "https://colab.research.google.com/github/someone/moe/blob/main/notebooks/a.ipynb"
    assert badge in tool.with_badge(text, "a.ipynb", FIRST)
    assert tool.with_badge(text, "a.ipynb", None) == text


@pytest.mark.parametrize("arguments", [[], ["moe"], ["https://example.com/a/b"], [FIRST, SECOND]])
def test_no_address_is_refused(arguments, tool, capsys):
    assert tool.main(arguments) == 2
    assert "https://github.com/OWNER/NAME" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("jupytext") is None, reason="needs the extra notebooks")
def test_the_command_in_a_clone(clone):
    command = [sys.executable, "tools/set_repository.py", f"{FIRST}.git"]
    subprocess.run(command, cwd=clone, check=True)
    for path in (clone / "notebooks").glob("*.ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
        assert any("colab-badge" in cell for cell in cells[:1])
        assert any(f'SOURCE = "git+{FIRST}"' in cell for cell in cells)
        assert all(link.startswith("https://") for link in links_of(cells))
    subprocess.run([sys.executable, "tools/notebooks.py", "--check"], cwd=clone, check=True)
