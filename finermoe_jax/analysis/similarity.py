"""How alike a layer's experts are (paper, Appendix D and Figure 4).

    python -m finermoe_jax.analysis.similarity CHECKPOINT … [--output=F.png] [--output=F.json]

CHECKPOINT is a checkpoint, a workdir, a Hugging Face directory or a hub id, or LABEL=CHECKPOINT.
Each is a column of the table that is printed, and a curve of the picture.

For each layer this is the mean cosine similarity over all pairs of experts, an expert being its
three matrices laid end to end. With û an expert over its norm, the N experts' pairs need not be
formed: the mean is (|Σ û|² − N) / (N (N − 1)). Experts are read a few at a time, once.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from finermoe_jax.errors import InputError, print_anything
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.training.plot import draw_similarity
from finermoe_jax.weights import lazy
from finermoe_jax.weights.checkpoint import Source, open_model
from finermoe_jax.weights.hf_names import run_layers
from finermoe_jax.weights.lazy import LazyArray

# Values that are made float64 at a time.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Of one model: its MoE layers' numbers, ascending, and each one's mean cosine similarity."""

    experts: int
    layers: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the layers."""
        return float(np.mean(self.values))


def expert_similarity(source: str) -> Similarity:
    """Mean pairwise cosine similarity of the experts in each MoE layer of a model.

    source is a checkpoint, a workdir, a Hugging Face directory or a hub id.

    Raises InputError: no such model, a dense one, layers of one expert, weights that are zero or
    not finite.
    """
    return _of_model(_open(source), source, lambda size: None)


def _open(source: str) -> Source:
    model = open_model(source)
    if model.config.moe is None:
        raise InputError(f"{source} is a dense model; only experts are compared")
    if model.config.moe.num_experts < 2:
        raise InputError(f"{source} has one expert per layer, and nothing to compare it with")
    return model


def _of_model(model: Source, name: str, read: Callable[[int], None]) -> Similarity:
    """read(bytes) is told of each block of weights."""
    assert model.config.moe is not None
    found: dict[int, float] = {}
    for path, gate_up in model.weights.items():
        if path[-2:] != ("moe", "gate_up"):
            continue
        down = model.weights[*path[:-1], "down"]
        for place, layer in enumerate(run_layers(model.config, path[1], path[2])):
            of_layer = f"{name}: layer {layer}"
            found[layer] = _of_layer(gate_up.row(place), down.row(place), of_layer, read)
    layers = tuple(sorted(found))
    return Similarity(model.config.moe.num_experts, layers, tuple(found[i] for i in layers))


def _of_layer(gate_up: LazyArray, down: LazyArray, name: str, read: Callable[[int], None]) -> float:
    """A layer's similarity from [E, 2F, D] and [E, F, W]."""
    count = gate_up.shape[0]
    sums = [np.zeros(array.shape[1:]).reshape(-1) for array in (gate_up, down)]
    # As they are stored, so that no block is read twice.
    step = max(lazy.block_shape(array)[0] for array in (gate_up, down))
    for start in range(0, count, step):
        parts = [array[start : start + step] for array in (gate_up, down)]
        for expert in range(len(parts[0])):
            matrices = [part[expert].reshape(-1) for part in parts]
            square = sum(_dot(matrix) for matrix in matrices)
            if not 0 < square < np.inf:
                state = "zero" if square == 0 else "not finite"
                raise InputError(f"{name}: the weights of expert {start + expert} are {state}")
            for total, matrix in zip(sums, matrices, strict=True):
                for chunk in _chunks(matrix):
                    total[chunk] += matrix[chunk].astype(np.float64) / np.sqrt(square)
        read(sum(part.nbytes for part in parts))
    return float((sum(_dot(total) for total in sums) - count) / (count * (count - 1)))


def _dot(values: np.ndarray) -> float:
    """The sum of squares, in float64."""
    return sum(float(np.square(values[chunk], dtype=np.float64).sum()) for chunk in _chunks(values))


def _chunks(values: np.ndarray) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, len(values), _CHUNK)]


def table(found: dict[str, Similarity]) -> str:
    """One line per layer, one column per model."""
    widths = {name: max(len(name), 7) for name in found}
    lines = ["layer  " + "  ".join(f"{name:>{width}}" for name, width in widths.items())]
    for layer in sorted({layer for one in found.values() for layer in one.layers}):
        cells = []
        for name, one in found.items():
            known = dict(zip(one.layers, one.values, strict=True))
            text = f"{known[layer]:.4f}" if layer in known else ""
            cells.append(f"{text:>{widths[name]}}")
        lines.append(f"{layer:>5}  " + "  ".join(cells))
    means = (f"{one.mean:>{widths[name]}.4f}" for name, one in found.items())
    return "\n".join([*lines, " mean  " + "  ".join(means)])


def _labelled(arguments: Sequence[str]) -> dict[str, str]:
    """Label → source. Raises InputError for a label that is given twice."""
    sources: dict[str, str] = {}
    for argument in arguments:
        label, equals, source = argument.partition("=")
        if not equals or Path(local(argument)).exists():
            label, source = Path(argument).name or argument, argument
        source = local(source)
        if not source:
            raise InputError(f"{argument}: no checkpoint follows the label; give LABEL=CHECKPOINT")
        if label in sources:
            raise InputError(
                f"{sources[label]} and {source} are both called {label}; give LABEL=CHECKPOINT"
            )
        sources[label] = source
    return sources


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m finermoe_jax.analysis.similarity", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", nargs="+", help="[LABEL=]CHECKPOINT")
    parser.add_argument("--output", action="append", default=[], help="a .png or .json to write")
    print_anything()
    given = parser.parse_args(argv)
    try:
        outputs = [Path(local(output, "--output")) for output in given.output]
        for output in outputs:
            if output.suffix not in (".png", ".json"):
                raise InputError(f"--output={output} must end in .png or .json")
            if not output.absolute().parent.is_dir():
                raise InputError(f"--output={output}: {output.absolute().parent} does not exist")
        sources = _labelled(given.checkpoint)
        models = {label: _open(source) for label, source in sources.items()}
        size = sum(
            array.nbytes
            for model in models.values()
            for path, array in model.weights.items()
            if path[-2:] in (("moe", "gate_up"), ("moe", "down"))
        )
        with tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            found = {
                label: _of_model(model, sources[label], bar.update)
                for label, model in models.items()
            }
        print(table(found))
        for output in outputs:
            if output.suffix == ".png":
                draw_similarity({n: (o.layers, o.values) for n, o in found.items()}, output)
            else:
                values = {n: dataclasses.asdict(o) | {"mean": o.mean} for n, o in found.items()}
                files.write(output, to_json(values, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
