"""The pages name what exists: the picture of the imports, functions, files and links."""

import ast
import re
import sys

import pytest

from pallas_kernels import expert_ffn, grouped_matmul
from tests.support import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
PLACES = [ROOT / "finermoe_jax", ROOT]
FOLDERS = [path.name for path in (ROOT / "finermoe_jax").iterdir() if path.is_dir()]
FOLDERS += ["finermoe_jax", "pallas_kernels", "tests", "docs", "benchmarks", "configs"]
# `folder/module.py:name`, `finermoe_jax.module.name`, `folder/file` in backticks. What follows a
# config's colon is its variant.
FUNCTION = re.compile(r"`((?!configs/)[\w/]+\.py):([\w.]+)`")
DOTTED = re.compile(r"`(?:python -m )?((?:finermoe_jax|pallas_kernels)(?:\.\w+)+)")
FILE = re.compile(rf"`((?:{'|'.join(FOLDERS)})/(?:|[\w./]*(?:\.py|/))|tests/[\w./]+)`")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)[^)]*\)")


def defined(module, name):
    """Says whether a module defines a class, function, constant or Class.method, or imports it."""
    body = ast.parse(module.read_text()).body
    for part in name.split("."):
        found = [node for node in body if part in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node):
    """The names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def is_there(dotted):
    """Returns whether a dotted name is a module, or a name in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        place, name = ROOT.joinpath(*parts[:end]), ".".join(parts[end:])
        for module in (place.with_suffix(".py"), place / "__init__.pyi", place / "__init__.py"):
            if module.is_file():
                return not name or defined(module, name)
    return False


@pytest.fixture
def draw(monkeypatch):
    """The module docs/draw_architecture.py."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import draw_architecture

    yield draw_architecture
    for name in ("draw_architecture", "svg"):
        sys.modules.pop(name, None)


def test_the_picture_shows_the_imports_of_now(draw):
    assert (ROOT / "docs" / "architecture.svg").read_text() == draw.draw(), (
        "python docs/draw_architecture.py draws docs/architecture.svg anew"
    )


def test_a_circle_of_imports_is_not_drawn(draw):
    graph = draw.imports()
    graph["layers"].add("moe")
    with pytest.raises(ValueError, match=r"layers → moe → layers|moe → layers → moe"):
        draw.essential(graph)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_files_and_links_exist(page):
    text = page.read_text()
    lost = []
    for path, name in FUNCTION.findall(text):
        modules = [place / path for place in PLACES if (place / path).is_file()]
        if not any(defined(module, name) for module in modules):
            lost.append(f"{path}:{name}")
    lost += [name for name in DOTTED.findall(text) if not is_there(name)]
    for path in FILE.findall(text):
        if not any((place / path).exists() for place in PLACES):
            lost.append(path)
    lost += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert lost == []


def test_the_api_page_has_every_public_name():
    shown = set(re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M))
    stub = (ROOT / "finermoe_jax" / "__init__.pyi").read_text()
    names = {f"finermoe_jax.{name}" for name in re.findall(r" as (\w+)$", stub, re.M)}
    for package in (expert_ffn, grouped_matmul):
        names |= {f"{package.__name__}.{name}" for name in package.__all__}
    assert len(names) > 20
    assert names - shown == set()
    assert [name for name in shown if not is_there(name)] == []


def anchors(page):
    """The anchors of a page: its headings, and the names that the API page documents."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}
    return slugs | set(re.findall(r"^::: (\S+)", page.read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_exist(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    targets = [((page.parent / path) if path else page, anchor) for path, anchor in links]
    assert [anchor for target, anchor in targets if anchor not in anchors(target)] == []


def quoted_messages(page):
    """The lines of messages on a page: after `error:` or `WARNING:`, and in backticks in tables."""
    text = page.read_text()
    blocks = re.findall(r"^ *(?:error|WARNING): ((?:[^`\n]+\n)+)", text, re.M)
    lines = [line for block in blocks for line in block.splitlines() if "$ " not in line]
    rows = "\n".join(re.findall(r"^\|.*", text, re.M))
    return lines + re.findall(r"`([a-zA-Z][^`]* [a-z]+ [a-z]+ [^`]*)`", rows)


@pytest.mark.slow
def test_messages_on_the_pages_are_the_codes():
    sources = [ast.parse(path.read_text()) for path in (ROOT / "finermoe_jax").rglob("*.py")]
    strings = {
        " ".join(node.value.split())
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    lost, checked = [], 0
    for page in ("commands", "launch", "reliability"):
        for message in quoted_messages(ROOT / "docs" / f"{page}.md"):
            # The code fills in what stands between these parts: numbers, names, paths.
            parts = re.split(r"\S*[\d/=…_'\"(),:.;?-]\S*|\bN\b", message)
            parts = [" ".join(part.split()) for part in parts if len(part.split()) > 2]
            checked += len(parts)
            lost += [part for part in parts if not any(part in string for string in strings)]
    assert lost == []
    assert checked > 10


def test_the_walks_name_functions():
    text = (ROOT / "docs" / "architecture.md").read_text()
    walks = text.split("\n## ")[1:]
    assert len(walks) == 4
    for walk in walks:
        assert len(re.findall(r"^\d\. ", walk, re.M)) == 5
        assert len(FUNCTION.findall(walk)) >= 5
