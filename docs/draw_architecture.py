"""Draws docs/architecture.svg, folders and imports: python docs/draw_architecture.py"""

import ast
from collections.abc import Iterator
from pathlib import Path

from svg import arrow, box, picture, text

from finermoe_jax.training.style import GREY, PLAIN, QUIET, SLOTS

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = "finermoe_jax", "pallas_kernels"
# Folders of one floor stand side by side in this order.
ABOUT = {
    "cli": "the commands and their flags",
    "analysis": "sizes, costs, does it fit?",
    "training": "a run: steps, logs, checkpoints",
    "evaluation": "scores of texts and benchmarks",
    "generation": "decoding, sampling",
    "weights": "models on disk",
    "model": "the decoder, the loss",
    "data": "text to batches",
    "moe": "routing, exchange, the layer",
    "layers": "attention, norms, sharding",
    KERNELS: "the experts",
    "config": "what can be set",
    "runtime": "files, signals, processes",
    "errors": "messages, exit codes",
}
ON_DEVICE = {"generation", "model", "moe", "layers", KERNELS}
WIDTH, TALL, PITCH, TOP, EDGE, GAP, LANE = 460, 46, 68, 58, 8, 16, 34


def modules(folder: str) -> list[Path]:
    """The modules of a folder, of pallas_kernels, or errors.py alone."""
    if folder == "errors":
        return [ROOT / PACKAGE / "errors.py"]
    place = ROOT / folder if folder == KERNELS else ROOT / PACKAGE / folder
    found = place.rglob("*.py") if folder == KERNELS else place.glob("*.py")
    return sorted(path for path in found if path.name != "__init__.py")


def imported(module: Path) -> Iterator[str]:
    """The folders that a module imports from, wherever in the module the import stands."""
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for first, *rest in (name.split(".") for name in names):
            if first == KERNELS:
                yield KERNELS
            elif first == PACKAGE and rest and rest[0] in ABOUT:
                yield rest[0]


def imports() -> dict[str, set[str]]:
    """The folders that each folder imports from. Raises ValueError for a folder without a text."""
    here = {p.parent.name for p in (ROOT / PACKAGE).glob("*/__init__.py")} | {KERNELS, "errors"}
    if here != set(ABOUT):
        raise ValueError(f"ABOUT names {sorted(ABOUT)}, the folders are {sorted(here)}")
    return {
        folder: {name for path in modules(folder) for name in imported(path)} - {folder}
        for folder in ABOUT
    }


def below(graph: dict[str, set[str]], folder: str, above: tuple[str, ...] = ()) -> set[str]:
    """All that a folder imports, directly or not. Raises ValueError for a circle."""
    if folder in above:
        circle = (*above[above.index(folder) :], folder)
        raise ValueError(f"imports go in a circle: {' → '.join(circle)}")
    found = set(graph[folder])
    for name in graph[folder]:
        found |= below(graph, name, (*above, folder))
    return found


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """The folders from the top: each stands on the first floor under all that import it."""
    number: dict[str, int] = {}

    def floor(folder: str) -> int:
        if folder not in number:
            importers = [name for name in graph if folder in graph[name]]
            number[folder] = 1 + max(map(floor, importers), default=-1)
        return number[folder]

    rows: list[list[str]] = [[] for _ in range(1 + max(map(floor, graph)))]
    for folder in ABOUT:
        rows[number[folder]].append(folder)
    return rows


def essential(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""
    return {
        folder: graph[folder] - set().union(*(below(graph, name) for name in graph[folder]))
        for folder in graph
    }


def place(rows: list[list[str]], arrows: dict[str, set[str]]) -> dict[str, tuple[float, ...]]:
    """x, y and width of each box; a floor that an arrow passes leaves a lane free at the right."""
    level = {folder: number for number, row in enumerate(rows) for folder in row}
    found = {}
    for number, row in enumerate(rows):
        passed = any(level[a] < number < level[b] for a, targets in arrows.items() for b in targets)
        wide = WIDTH - 2 * EDGE - LANE * passed
        each = (wide - GAP * (len(row) - 1)) / len(row)
        for column, folder in enumerate(row):
            found[folder] = (EDGE + column * (each + GAP), TOP + number * PITCH, each)
    return found


def draw() -> str:
    """The whole picture, as SVG."""
    graph = imports()
    arrows = essential(graph)
    boxes = place(floors(graph), arrows)
    bottom = max(y for _, y, _ in boxes.values()) + TALL
    dark, light = SLOTS[0]
    parts = [
        text(WIDTH / 2, 26, "finermoe COMMAND · train.py, eval.py, …", 15),
        arrow([(WIDTH / 2, 34), (WIDTH / 2, TOP - 2)]),
    ]
    for folder, targets in arrows.items():
        x, y, wide = boxes[folder]
        for target in sorted(targets):
            to_x, to_y, to_wide = boxes[target]
            left, right = max(x, to_x), min(x + wide, to_x + to_wide)
            start = end = (left + right) / 2  # straight down where the boxes overlap
            if to_y - y > PITCH:  # past other floors, in the lane
                start = end = WIDTH - EDGE - LANE / 2 + 4
            elif right < left:
                leftwards = to_x < x
                start = x + 12 if leftwards else x + wide - 12
                end = to_x + to_wide - 16 if leftwards else to_x + 16
            parts.append(arrow([(start, y + TALL), (end, to_y - 2)]))
    for folder, (x, y, wide) in boxes.items():
        count = len(modules(folder))
        parts += [
            box(x, y, wide, TALL, *((light, dark) if folder in ON_DEVICE else (PLAIN, GREY))),
            text(x + 10, y + 20, folder, 16, "start", font_weight="bold"),
            text(x + wide - 10, y + 20, f"{count} file{'s' * (count > 1)}", 12, "end", fill=QUIET),
            text(x + 10, y + 38, ABOUT[folder], 13, "start", fill=QUIET),
        ]
    parts += [
        text(WIDTH / 2, bottom + 22, "An arrow is an import. Arrows that follow from", 13),
        text(WIDTH / 2, bottom + 40, "others are omitted. Blue: computes on the device.", 13),
    ]
    return picture(WIDTH, bottom + 52, "The package's folders and their imports", parts)


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw())
