"""Fills the tables of PAGES from docs/studies/*.json: python -m docs.fill_results

The pages' words are written by hand, their studies' figures never: between two comments

    <!-- study: balance -->
    <!-- end of study -->

stands the table that STUDIES or TABLES describes. The script also draws the picture of each of
STUDIES, docs/studies/NAME.png. `benchmarks/studies/record.py` writes the JSON files from sweeps.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from docs import draw_studies
from docs.draw_studies import MATRICES, Rows, Seeds, losses
from finermoe_jax.runtime.json_files import read_json
from finermoe_jax.training import style

DOCS = Path(__file__).parent
PAGES = (DOCS / "results.md", DOCS / "route_ahead.md")
BLOCK = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- end of study -->)", re.DOTALL)


def loss(runs: Seeds, _: Rows) -> str:
    """The last held-out loss."""
    return spread(list(losses(runs).values()))


def start(runs: Seeds, _: Rows) -> str:
    """The held-out loss before training."""
    return spread([run["curve"]["loss"][0] for run in runs.values()])


def at_step(step: int) -> Callable[[Seeds, Rows], str]:
    """The held-out loss after `step` steps."""

    def cell(runs: Seeds, _: Rows) -> str:
        curves = [run["curve"] for run in runs.values()]
        return spread([each["loss"][each["steps"].index(step)] for each in curves])

    return cell


def halfway(runs: Seeds, rows: Rows) -> str:
    """The held-out loss after half of the steps."""
    steps = next(iter(runs.values()))["curve"]["steps"]
    return at_step(steps[-1] // 2)(runs, rows)


def at_equal_flops(runs: Seeds, rows: Rows) -> str:
    """The loss, between two evaluations, at the FLOPs of the row whose runs need fewest."""
    least = min(run["curve"]["flops"][-1] for row in rows.values() for run in row.values())
    curves = [run["curve"] for run in runs.values()]
    return spread([float(np.interp(least, each["flops"], each["loss"])) for each in curves])


def difference(runs: Seeds, rows: Rows) -> str:
    """The loss minus that of the study's first variant, seed by seed."""
    base = next(iter(rows.values()))
    if runs is base:
        return "–"
    ours, theirs = losses(runs), losses(base)
    return spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs], signed=True)


def spread(values: list[float], signed: bool = False, digits: int = 4) -> str:
    """Mean and standard deviation; one value alone has no deviation."""
    rounded = round(float(np.mean(values)), digits) + 0.0  # no −0.0000
    mean = f"{rounded:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def seeds(runs: Seeds, _: Rows) -> str:
    """The number of runs."""
    return str(len(runs))


def total(runs: Seeds, _: Rows) -> str:
    """All parameters."""
    return f"{next(iter(runs.values()))['parameters'] / 1e6:.2f} M"


def weights(runs: Seeds, _: Rows) -> str:
    """All parameters in float32."""
    return f"{next(iter(runs.values()))['parameters'] * 4 / 1e6:.1f}"


def active(runs: Seeds, _: Rows) -> str:
    """Parameters that a token uses."""
    return f"{next(iter(runs.values()))['active'] / 1e6:.2f} M"


def steps(runs: Seeds, _: Rows) -> str:
    """The steps of a run."""
    return str(next(iter(runs.values()))["curve"]["steps"][-1])


def tokens(runs: Seeds, _: Rows) -> str:
    """The tokens of a run."""
    return f"{next(iter(runs.values()))['curve']['tokens'][-1] / 1e3:,.0f} k"


def step_time(runs: Seeds, _: Rows) -> str:
    """The median seconds of a step."""
    return f"{np.mean([run['step_seconds'] for run in runs.values()]):.1f}"


def flops(runs: Seeds, _: Rows) -> str:
    """Model FLOPs of a whole run."""
    return f"{np.mean([run['curve']['flops'][-1] for run in runs.values()]) / 1e12:.2f}"


def of_load(name: str, digits: int) -> Callable[[Seeds, Rows], str]:
    """A figure of the load, the mean over the seeds."""

    def cell(runs: Seeds, _: Rows) -> str:
        values = [run["load"][name] for run in runs.values() if name in run.get("load", {})]
        return f"{np.mean(values):.{digits}f}" if values else "–"

    return cell


def copies(runs: Seeds, _: Rows) -> str:
    """Mean cosine similarity of experts that started equal, at the last checkpoint."""
    last = [
        next(reversed(r["similarity"].values()))["copies"]
        for r in runs.values()
        if "similarity" in r
    ]
    return f"{np.mean(last):.4f}" if last else "–"


COLUMNS: dict[str, Callable[[Seeds, Rows], str]] = {
    "seeds": seeds,
    "held-out loss": loss,
    "start": start,
    "halfway": halfway,
    "step 40": at_step(40),
    "difference": difference,
    "at equal TFLOP": at_equal_flops,
    "parameters": total,
    "weights, MB": weights,
    "active": active,
    "steps": steps,
    "tokens": tokens,
    "s per step": step_time,
    "TFLOP": flops,
    "fullest expert / mean": of_load("max_over_mean", 2),
    "entropy": of_load("entropy", 3),
    "dead experts": of_load("dead", 1),
    "fullest / mean in a group": of_load("group_max_over_mean", 2),
    "share of the larger group": of_load("larger_candidate", 3),
    "other layers' experts": of_load("foreign", 2),
    "starved experts": of_load("starved", 2),
    "similarity of copies": copies,
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's table and picture.

    Attributes:
      title: the picture's title.
      columns: names in COLUMNS.
      names: rows in order; a variant's name in the JSON file, and its name in the table. The first
        is the one that differences are from.
      draw: draws the picture.
    """

    title: str
    columns: tuple[str, ...]
    names: Mapping[str, str]
    draw: draw_studies.Draw = draw_studies.dots


POOLS = (
    "seeds", "start", "halfway", "held-out loss", "difference", "parameters",
    "fullest expert / mean", "starved experts", "other layers' experts",
)  # fmt: skip
BALANCE = (
    "seeds", "held-out loss", "difference", "fullest expert / mean", "entropy", "dead experts",
    "fullest / mean in a group", "share of the larger group", "similarity of copies",
)  # fmt: skip
RATES = {"1e-4": 1e-4, "3e-4": 3e-4, "1e-3": 1e-3}
STUDIES = {
    "balance": Study(
        "Balancing on the demo, 100 steps",
        BALANCE,
        {name: f"`{name}`" for name in ("sequence", "batch", "bias", "none")}
        | {"z_loss": "`sequence`, z-loss 0.001", "frozen": "`sequence`, frozen router"},
    ),
    "muon": Study(
        "Muon beside AdamW on the demo, 60 steps",
        ("seeds", "halfway", "held-out loss", "difference", "similarity of copies"),
        {
            f"{optimizer}_lr{place}": f"{label}, {rate}"
            for optimizer, label in (("adamw", "AdamW"), ("muon", "Muon"))
            for place, rate in ((2, "1e-3"), (1, "3e-4"), (3, "3e-3"))
        },
    ),
    "pools": Study(
        "Pools from scratch, ReXMoE's form: 16 experts a layer, 2 active",
        POOLS,
        {
            "base": "no pools",
            "rex2": "r = 2",
            "rex2+psr": "r = 2, PSR `random`",
            "rex2+foreign": "r = 2, PSR `foreign`",
            "rex4+psr": "r = 4, PSR `random`",
            "rex2+depth": "r = 2, depth vector",
            "psr": "no pools, PSR on own experts",
            "wide": "no pools, 32 own experts",
        },
    ),
    "pools_fine": Study(
        "Pools from scratch, FineRMoE's form (8, 2, 1, 2)",
        POOLS,
        {
            "fine": "no pools",
            "fine+rex2": "r = 2, `copies`",
            "fine+rex2+psr": "r = 2, `copies`, PSR `random`",
            "fine+rex2+foreign": "r = 2, `copies`, PSR `foreign`",
            "fine+rex2+candidates": "r = 2, `candidates`",
            "fine+rex2+candidates+psr": "r = 2, `candidates`, PSR `random`",
            "fine+rex2+candidates+foreign": "r = 2, `candidates`, PSR `foreign`",
            "fine+rex4+psr": "r = 4, `copies`, PSR `random`",
            "fine+rex2+depth": "r = 2, `copies`, depth vector",
            "fine+psr": "no pools, PSR on own experts",
            "fine+wide": "no pools, twice the own experts",
        },
    ),
    "ahead": Study(
        "Routing ahead in the upcycled demo, 60 steps",
        ("seeds", "start", "halfway", "held-out loss", "difference", "fullest expert / mean"),
        {f"ahead{k}": f"k = {k}" for k in range(4)},
    ),
    "smollm2": Study(
        "The upcycled SmolLM2-135M, 60 steps of 512 tokens",
        ("start", "halfway", "held-out loss", "difference", "parameters", "fullest expert / mean"),
        {
            "base": "AdamW, 2e-4",
            "lr1": "AdamW, 6e-5",
            "lr3": "AdamW, 6e-4",
            "muon": "Muon, 2e-4",
            "muon+lr1": "Muon, 6e-5",
            "muon+lr3": "Muon, 6e-4",
            "rex2": "pools, r = 2",
            "ahead1": "routing ahead, k = 1",
            "ahead2": "routing ahead, k = 2",
            "ahead3": "routing ahead, k = 3",
        },
    ),
    "smollm2_long": Study(
        "SmolLM2-135M upcycled, and the dense model trained on",
        ("steps", "tokens", "TFLOP", "s per step", "start", "held-out loss", "difference"),
        {
            "steps200": "FineRMoE (32, 2, 1, 2)",
            "ct+steps200": "dense, trained on",
        },
        draw_studies.curves("tokens", "seconds", top=3.0),
    ),
    "demo_rates": Study(
        "The demo and its dense base, 150 steps of 4,096 tokens",
        ("seeds", "start", "held-out loss", "difference"),
        {
            f"{model}+lr{place}": f"{label}, {rate}"
            for model, label in (("finermoe", "FineRMoE"), ("ct", "dense"))
            for place, rate in ((3, "1e-3"), (2, "3e-4"), (1, "1e-4"))
        },
        draw_studies.over_values("learning rate after warm-up", RATES, log=True),
    ),
    "table1": Study(
        "Table 1 in miniature, 60 steps of 4,096 tokens",
        (
            "seeds",
            "start",
            "held-out loss",
            "difference",
            "TFLOP",
            "at equal TFLOP",
            "parameters",
            "active",
        ),
        {
            "inter_out_fg": "FineRMoE (32, 2, 1, 2)",
            "ct": "CT, the base trained on",
            "s16a4": "S16A4",
            "nvshard": "NVShard",
            "du": "DU",
            "c32a2": "C32A2",
            "function_preserving": "FineRMoE, `function_preserving`",
            "scratch": "dense, from scratch",
        },
        draw_studies.curves("tokens", "flops", top=3.25),
    ),
    "granularity": Study(
        "Granularity in both dimensions, from scratch, equal parameters per token",
        (
            "seeds",
            "held-out loss",
            "difference",
            "TFLOP",
            "weights, MB",
            "parameters",
            "active",
            "fullest expert / mean",
        ),
        {
            f"{slices}x{slots}": f"G_I = {slices}, G_O = {slots}"
            for slices in (32, 8)
            for slots in (2, 1, 4)
        },
        draw_studies.over_values("slots of the output", {f"G_O = {n}": n for n in (1, 2, 4)}),
    ),
    "starts": Study(
        "Starts and learning rates, 60 steps of 4,096 tokens",
        ("start", "step 40", "held-out loss", "difference", "similarity of copies"),
        {
            f"{start}+lr{place}": f"{label}, {rate}"
            for start, label in (
                ("inter_out_fg", "published"),
                ("function_preserving", "`function_preserving`"),
                ("drop", "`drop_ratio=0.5`"),
                ("noise", "`copy_noise=0.1`"),
                ("nvshard", "NVShard, scaled"),
                ("ct", "CT, the dense base"),
            )
            for place, rate in ((2, "3e-4"), (1, "1e-4"), (3, "1e-3"))
        },
        draw_studies.over_values("learning rate after warm-up", RATES, log=True),
    ),
    "copies": Study(
        "Balancing against copies, 60 steps of 4,096 tokens",
        BALANCE,
        {name: f"`{name}`" for name in ("sequence", "batch", "bias", "none")},
        draw_studies.parting,
    ),
    "pools_upcycled": Study(
        "Pools in the upcycled demo, 150 steps",
        POOLS,
        {
            "upcycled": "no pools",
            "upcycled+rex2": "r = 2",
            "upcycled+rex2+foreign": "r = 2, PSR `foreign`",
            "upcycled+rex2+psr": "r = 2, PSR `random`",
        },
    ),
}


def variants(name: str) -> Rows:
    """The runs of a study by the rows' names, without rows that have no run yet."""
    runs = read_json(DOCS / "studies" / f"{name}.json")["runs"]
    names = STUDIES[name].names
    first = next(iter(names))
    assert first in runs, f"{name}.json has no run of {first}, which differences are from"
    return {label: runs[key] for key, label in names.items() if key in runs}


def table(name: str) -> str:
    """The study's table in Markdown."""
    if name in TABLES:
        return TABLES[name](read_json(DOCS / "studies" / f"{name}.json"))
    study, rows = STUDIES[name], variants(name)
    lines = ["| |" + "".join(f" {column} |" for column in study.columns)]
    lines.append("|---|" + "---|" * len(study.columns))
    for label, runs in rows.items():
        cells = (COLUMNS[column](runs, rows) for column in study.columns)
        lines.append(f"| {label} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines) + "\n"


def shares(values: Mapping[str, Any]) -> str:
    """Shares of equal choices by layer, slot and distance, as benchmarks/studies/ahead.py's."""
    runs = list(values["seeds"].values())
    distances = list(runs[0])
    lines = ["| layer | slot |" + "".join(f" k = {k} |" for k in distances)]
    lines.append("|---|---|" + "---|" * len(distances))
    for place, layer in enumerate(runs[0]["1"]["layers"]):
        for slot in range(len(runs[0]["1"]["same"][place])):
            cells = []
            for k in distances:
                same, group = (
                    spread([run[k][part][place][slot] for run in runs], digits=2)
                    for part in ("same", "group")
                )
                cells.append(f"as k = {layer}" if int(k) > layer else f"{same} ({group})")
            lines.append(f"| {layer} | {slot} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines) + "\n"


def shares_by_depth(values: Mapping[str, Any]) -> str:
    """Means over the slots and the layers of each third of the model, and by chance."""
    (run,) = values["seeds"].values()
    layers = run["1"]["layers"]
    thirds = [list(third) for third in np.array_split(np.arange(len(layers)), 3)]
    lines = ["| layers |" + "".join(f" k = {k} | by chance |" for k in run)]
    lines.append("|---|" + "---|" * 2 * len(run))
    for third in [[0], thirds[0][1:], *thirds[1:]]:
        ends = {str(layers[third[0]]), str(layers[third[-1]])}
        cells = []
        for k in run:
            same, group, chance = (
                f"{np.mean(np.array(run[k][part])[third]):.2f}"
                for part in ("same", "group", "chance")
            )
            cells.append(f" {same} ({group}) | {chance} |")
        lines.append(f"| {' to '.join(sorted(ends, key=int))} |" + "".join(cells))
    return "\n".join(lines) + "\n"


def ranks(values: Mapping[str, Any]) -> str:
    """Loss and share of the copies' differences by rank, as benchmarks/studies/low_rank.py's."""
    lines = [
        "| rank | held-out loss | difference | gate | up | down |",
        "|---|---|---|---|---|---|",
    ]
    runs = list(values["seeds"].values())
    for rank in runs[0]:
        each_loss = [run[rank]["loss"] for run in runs]
        added = [run[rank]["loss"] - run["all"]["loss"] for run in runs]
        kept = [spread([run[rank][name] for run in runs], digits=2) for name in MATRICES]
        cells = [spread(each_loss), "–" if rank == "all" else spread(added, signed=True, digits=5)]
        lines.append(f"| {rank} |" + "".join(f" {cell} |" for cell in cells + kept))
    return "\n".join(lines) + "\n"


def step_seconds(values: Mapping[str, Any]) -> str:
    """Seconds per step and ratios to the first, as benchmarks/studies/step_times.py's."""
    seconds = values["seconds"]
    first = next(iter(seconds.values()))
    lines = ["| | s per step | ratio to the first |", "|---|---|---|"]
    for name, each in seconds.items():
        ratio = np.median(np.divide(each, first))
        lines.append(f"| `{name}` | {np.median(each):.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


PICTURES = {"low_rank": ("What training added to copies, cut to low rank", draw_studies.ranks)}
TABLES = {
    "ahead_shares": shares,
    "smollm2_shares": shares_by_depth,
    "low_rank": ranks,
    "table1_seconds": step_seconds,
}


@style.applied()
def draw(name: str) -> None:
    """Draws a study's picture, docs/studies/NAME.png."""
    if name in STUDIES:
        picture = STUDIES[name].draw(STUDIES[name].title, variants(name))
    elif name in PICTURES:
        title, of_values = PICTURES[name]
        picture = of_values(title, read_json(DOCS / "studies" / f"{name}.json")["seeds"])
    else:
        return
    picture.savefig(DOCS / "studies" / f"{name}.png")


def filled(text: str) -> str:
    """The page with the tables of all studies that it names."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def main() -> None:
    """Writes the pages and the pictures."""
    for page in PAGES:
        text = page.read_text()
        page.write_text(filled(text))
        for found in BLOCK.finditer(text):
            draw(found[2])


if __name__ == "__main__":
    main()
