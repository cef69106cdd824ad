"""Hooks that mkdocs needs beside Markdown: files outside docs/ that pages link to become pages too.

On GitHub `../finermoe_jax/moe.py` is a file of the repository; on the site it is a page that shows
it. A link to a file that is not there fails the build.
"""

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\(((?!\w+:|#)[^)#\s]+)(#[^)]*)?\)")
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".yaml": "yaml"}


def _links(text: str, place: str) -> set[str]:
    """The paths, from the repository's root, of the files outside docs/ that a text links to."""
    folder = posixpath.dirname(place)
    found = {posixpath.normpath(posixpath.join(folder, m[1])) for m in _LINK.finditer(text)}
    outside = {path for path in found if not path.startswith("docs/")}
    if missing := sorted(path for path in outside if not (ROOT / path).exists()):
        raise PluginError(f"{place} links to {', '.join(missing)}, not there")
    return outside


def _relinked(text: str, place: str, page: str) -> str:
    """A text that lies at `place` of the repository, its links as they are from a site's page."""

    def moved(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        target = path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return _LINK.sub(moved, text)


def _notebook(path: Path) -> str:
    """A notebook's cells as Markdown, without the badge, a picture from elsewhere."""
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]
    cells = [(kind, re.sub(r"\[!\[.*\n", "", text)) for kind, text in cells]
    return "\n\n".join(s if kind == "markdown" else f"```python\n{s}\n```" for kind, s in cells)


# Pages of their own kinds: what they link to is linked on the site, too.
_TEXTS: dict[str, Callable[[Path], str]] = {".ipynb": _notebook, ".md": Path.read_text}


def _page(path: str) -> str:
    """The text that a site's page shows of a file or a folder."""
    file = ROOT / path
    if file.suffix in _TEXTS:
        return _relinked(_TEXTS[file.suffix](file), path, f"source/{path}.md")
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if not p.name.startswith("_"))
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    return f"# {path}\n\n``````{_LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}\n``````\n"


def on_files(files: Any, *, config: Any) -> Any:
    """Adds a page for each file outside docs/ that some page links to."""
    wanted: set[str] = set()
    for page in files.documentation_pages():
        wanted |= _links((Path(config.docs_dir) / page.src_uri).read_text(), f"docs/{page.src_uri}")
    for path in list(wanted):
        if (file := ROOT / path).suffix in _TEXTS:
            wanted |= _links(_TEXTS[file.suffix](file), path)
    for path in sorted(wanted):
        files.append(File.generated(config, f"source/{path}.md", content=_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links to files outside docs/ go to their pages."""
    uri = page.file.src_uri
    return markdown if uri.startswith("source/") else _relinked(markdown, f"docs/{uri}", uri)
