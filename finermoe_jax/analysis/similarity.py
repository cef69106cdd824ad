"""Similarity of a layer's experts (paper, Appendix D and Figure 4).

For each layer, the mean cosine similarity over all pairs of the N experts. An expert is the vector
of its three concatenated matrices. With û the normalised vector, the mean is
(|Σ û|² − N) / (N (N − 1)), so each expert is read only once.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from finermoe_jax.errors import InputError
from finermoe_jax.model.decoder import parameter_kinds
from finermoe_jax.weights import lazy
from finermoe_jax.weights.hf_names import run_layers
from finermoe_jax.weights.lazy import LazyArray, ParamPath
from finermoe_jax.weights.source import ModelSource, open_model

_CHUNK = 1 << 20  # values converted to float64 at a time


@dataclasses.dataclass(frozen=True)
class Similarity:
    """One model's experts per layer, MoE layer indices in order, and their mean similarities."""

    experts: int
    layers: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the layers."""
        return float(np.mean(self.values))


def expert_similarity(source: str) -> Similarity:
    """Returns the mean pairwise cosine similarity of the experts in each MoE layer of a model.

    `source` is a checkpoint, workdir, Hugging Face directory or Hub id.

    Raises InputError if the model does not exist, is dense or has one expert per layer, or if an
    expert's weights are zero or not finite.
    """
    return _model_similarity(_open(source), source, lambda size: None)


def _open(source: str) -> ModelSource:
    model = open_model(source)
    if model.config.moe is None:
        raise InputError(f"{source} is a dense model without experts: give an MoE model")
    if model.config.moe.num_experts < 2:
        raise InputError(f"{source} has one expert per layer; at least 2 are needed")
    return model


def _model_similarity(model: ModelSource, name: str, read: Callable[[int], None]) -> Similarity:
    """Computes each layer's similarity; calls read(bytes) for each block of weights."""
    assert model.config.moe is not None
    found: dict[int, float] = {}
    for (_, run, place), banks in itertools.groupby(_banks(model), lambda path: path[:3]):
        arrays = [model.weights[path] for path in banks]
        for repeat, layer in enumerate(run_layers(model.config, run, place)):
            layer_banks = [array.row(repeat) for array in arrays]
            found[layer] = _layer_similarity(layer_banks, f"{name}: layer {layer}", read)
    layers = tuple(sorted(found))
    return Similarity(model.config.moe.num_experts, layers, tuple(found[i] for i in layers))


def _banks(model: ModelSource) -> list[ParamPath]:
    """Returns the paths of the experts' parameters, grouped by layer."""
    return [path for path, kind in parameter_kinds(model.config).items() if kind.bank]


def _layer_similarity(banks: list[LazyArray], name: str, read: Callable[[int], None]) -> float:
    """Computes a layer's similarity from its experts' arrays, [E, …] each."""
    count = banks[0].shape[0]
    sums = [np.zeros(array.shape[1:]).reshape(-1) for array in banks]
    # Blocks as stored, so that none is read twice.
    step = max(lazy.block_shape(array)[0] for array in banks)
    for start in range(0, count, step):
        parts = [array[start : start + step] for array in banks]
        for expert in range(len(parts[0])):
            matrices = [part[expert].reshape(-1) for part in parts]
            square = sum(_sum_of_squares(matrix) for matrix in matrices)
            if not 0 < square < np.inf:
                state = "zero" if square == 0 else "not finite"
                raise InputError(f"{name}: the weights of expert {start + expert} are {state}")
            for total, matrix in zip(sums, matrices, strict=True):
                for chunk in _chunks(matrix):
                    total[chunk] += matrix[chunk].astype(np.float64) / np.sqrt(square)
        read(sum(part.nbytes for part in parts))
    squares = sum(_sum_of_squares(total) for total in sums)
    return float((squares - count) / (count * (count - 1)))


def _sum_of_squares(values: np.ndarray) -> float:
    """Returns the sum of squares, in float64."""
    return sum(float(np.square(values[chunk], dtype=np.float64).sum()) for chunk in _chunks(values))


def _chunks(values: np.ndarray) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, len(values), _CHUNK)]


def table(found: dict[str, Similarity]) -> str:
    """Formats a table with one line per layer and one column per model."""
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


def similarities(sources: dict[str, str]) -> dict[str, Similarity]:
    """Computes {label: similarity} from {label: source}, with a progress bar.

    Raises InputError as `expert_similarity` does; bad sources before any weight is read.
    """
    models = {label: _open(source) for label, source in sources.items()}
    size = sum(model.weights[path].nbytes for model in models.values() for path in _banks(model))
    with tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
        return {
            label: _model_similarity(model, sources[label], bar.update)
            for label, model in models.items()
        }
