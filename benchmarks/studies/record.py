"""Records a sweep's raw figures as JSON, for docs/results.md.

    python benchmarks/studies/record.py runs/balance docs/studies/balance.json
    python -m docs.fill_results

The file holds, for every finished run, the parameters, the curve of held-out losses over steps,
tokens, FLOPs and seconds, the median seconds of a step, the load's figures at the last three logged
steps, and the similarity of copies at every checkpoint that the run kept. A sweep that is not
finished can be recorded; the file then holds the runs that are.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finermoe_jax.analysis.similarity import expert_similarity
from finermoe_jax.config.parse import run_config
from finermoe_jax.model.counts import true_counts
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import read_json, read_lines, read_log, to_json
from finermoe_jax.training.history import History
from finermoe_jax.training.sweep import every_run, finished
from finermoe_jax.weights.checkpoint import newest_checkpoint, read_description
from finermoe_jax.weights.integrity import saved_steps

# Figures of expert_load.jsonl, each a mean over layers (and groups) and the last logged steps.
OF_LOAD = ("max_over_mean", "entropy", "group_max_over_mean", "group_entropy", "foreign", "starved")
LOGGED = 3


def record(history: History) -> dict[str, Any]:
    """Returns the figures of one run."""
    curve = {name: getattr(history, name).tolist() for name in ("steps", "loss", "tokens", "flops")}
    curve["seconds"] = [round(value, 1) for value in history.seconds.tolist()]
    newest = newest_checkpoint(history.workdir / "checkpoints")
    assert newest is not None, f"{history.workdir} holds no checkpoint"
    config = read_description(newest)[0]
    counts = true_counts(config)
    found = {"parameters": counts.total, "active": counts.active, "curve": curve}
    lines = read_lines(history.workdir / "metrics.jsonl")
    found["step_seconds"] = round(statistics.median(line["step_seconds"] for line in lines), 2)
    if (path := history.workdir / "expert_load.jsonl").is_file():
        found["load"] = load([line for _, line in read_log(path)][-LOGGED:])
    if config.moe is not None and config.moe.pool_size > 1:
        steps = saved_steps(history.workdir / "checkpoints")
        where = history.workdir / "checkpoints"
        parts = {str(step): expert_similarity(str(where / str(step))).parts for step in steps}
        found["similarity"] = parts
    return found


def load(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the means of the figures that all lines have."""
    found = {
        name: statistics.fmean(float(np.mean(line[name])) for line in lines)
        for name in OF_LOAD
        if all(line.get(name) is not None for line in lines)
    }
    found["dead"] = statistics.fmean(float(np.sum(line["dead"])) for line in lines)
    largest = (np.array(line["candidates"]).max(axis=-1) for line in lines)
    return found | {"larger_candidate": statistics.fmean(float(part.mean()) for part in largest)}


def recorded(sweep: Path) -> dict[str, Any]:
    """Returns the figures of a sweep's finished runs, by variant and seed."""
    configs = read_json(sweep / "sweep.json")
    variants = {name: run_config(values) for name, values in configs.items()}
    runs: dict[str, Any] = {name: {} for name in variants}
    for run, history in finished(every_run(sweep, variants)).items():
        runs[run.variant][str(run.seed)] = record(history)
    about = {"jax": jax.__version__, "platform": jax.default_backend()}
    return {"about": about, "runs": {name: done for name, done in runs.items() if done}}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="folder of finermoe sweep")
    parser.add_argument("output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    found = recorded(arguments.sweep)
    files.write(arguments.output, to_json(found, indent=1) + "\n")
    runs = found["runs"]
    print(f"{arguments.output}: {sum(map(len, runs.values()))} runs of {len(runs)} variants")


if __name__ == "__main__":
    main()
