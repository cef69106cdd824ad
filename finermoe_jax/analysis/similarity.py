"""Similarity of each layer's experts (paper, Appendix D, Figure 4).

It is the mean cosine similarity over all pairs of a layer's experts, an expert being its three
matrices as one vector. The mean is also split by what the two experts of a pair were made from:

    copies        the same slice of the intermediate width, the same output slot
    same slice    the same slice of the intermediate width, other slots
    other slices  all other pairs

If neighbouring layers share a pool of experts (experts_across), the pairs are those of the pool,
and "layer" is the pool's first layer. Experts of two layers that have the same slice and slot then
count as copies, though they come from different FFNs.

The mean over all pairs hides whether copies part: in a published layer 1 pair in 127 is a copy.

Pairs are not formed. With û the unit vectors of n experts, the cosines of their ordered pairs add
up to |Σ û|² − n. Experts are added slice by slice, and slot by slot inside a slice.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.model.decoder import parameter_kinds
from finermoe_jax.runtime import buckets
from finermoe_jax.training.compare import aligned
from finermoe_jax.weights import lazy
from finermoe_jax.weights.checkpoint import steps_of
from finermoe_jax.weights.hf_names import bank_layers
from finermoe_jax.weights.integrity import saved_steps
from finermoe_jax.weights.lazy import LazyArray, ParamPath
from finermoe_jax.weights.source import ModelSource, open_model
from finermoe_jax.weights.upcycle import slice_and_slot

_CHUNK = 1 << 20  # values converted to float64 at a time
_LAYER_BYTES = 1 << 30  # a layer's experts are read at once up to this size


@dataclasses.dataclass(frozen=True)
class Similarity:
    """One model's experts per layer (or pool), layer indices, and mean similarities per layer.

    A mean over no pairs is None: a layer may have no copies.
    """

    experts: int
    layers: tuple[int, ...]
    values: tuple[float, ...]  # all pairs
    copies: tuple[float | None, ...]
    same_slice: tuple[float | None, ...]
    other_slices: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        """Mean over the layers, of all pairs."""
        return float(np.mean(self.values))

    @property
    def parts(self) -> dict[str, float | None]:
        """Mean over the layers, of each part of the pairs."""
        return {
            name: None if None in values else float(np.mean(np.array(values, float)))
            for name, values in (
                ("copies", self.copies),
                ("same slice", self.same_slice),
                ("other slices", self.other_slices),
            )
        }


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
    if model.config.moe.pool_size < 2:
        raise InputError(f"{source} has one expert per layer; at least 2 are needed")
    return model


def _model_similarity(model: ModelSource, name: str, read: Callable[[int], None]) -> Similarity:
    """Computes each layer's similarity; calls read(bytes) for each block of weights."""
    assert model.config.moe is not None
    found: dict[int, tuple] = {}
    for (_, run, place), banks in itertools.groupby(_banks(model), lambda path: path[:3]):
        arrays = [model.weights[path] for path in banks]
        for repeat, (layer, *_) in enumerate(bank_layers(model.config, run, place)):
            layer_banks = [array.row(repeat) for array in arrays]
            where = f"{name}: layer {layer}"
            found[layer] = _layer_similarity(layer_banks, model.config.moe, where, read)
    layers = tuple(sorted(found))
    means = zip(*(found[layer] for layer in layers), strict=True)
    return Similarity(model.config.moe.pool_size, layers, *map(tuple, means))


def _banks(model: ModelSource) -> list[ParamPath]:
    """Returns the paths of the experts' parameters, grouped by layer."""
    return [path for path, kind in parameter_kinds(model.config).items() if kind.bank]


def _layer_similarity(
    banks: list[LazyArray], moe: MoEConfig, name: str, read: Callable[[int], None]
) -> tuple[float, float | None, float | None, float | None]:
    """Returns a layer's means over all pairs, copies, same slices and other slices.

    `banks` are its experts' arrays, [E, …] each.
    """
    if sum(array.nbytes for array in banks) <= _LAYER_BYTES:  # then no block is read twice
        banks = [lazy.of_array(array[:]) for array in banks]
    members: dict[int, dict[int, list[int]]] = {}
    for expert in range(moe.pool_size):
        place, slot = slice_and_slot(moe, expert // moe.experts_across)
        members.setdefault(place, {}).setdefault(slot, []).append(expert)
    pairs, cosines = np.zeros(3), np.zeros(3)  # ordered pairs: copies, same slice, all
    total = _zeros(banks)
    for slots in members.values():
        of_slice = _zeros(banks)
        inside = np.zeros(2)  # of the copies of each slot: ordered pairs, and their cosines
        for experts in slots.values():
            of_slot = _zeros(banks)
            for expert in experts:
                _add_unit_vector(of_slot, banks, expert, name)
                read(sum(array.nbytes // moe.pool_size for array in banks))
            inside += _pairs(of_slot, len(experts))
            _add(of_slice, of_slot)
        together = _pairs(of_slice, sum(map(len, slots.values())))
        for part, (count, value) in enumerate((inside, together - inside)):
            pairs[part] += count
            cosines[part] += value
        _add(total, of_slice)
    pairs[2], cosines[2] = _pairs(total, moe.pool_size)
    other = pairs[2] - pairs[:2].sum(), cosines[2] - cosines[:2].sum()
    copies, same, rest = (
        float(value / count) if count else None
        for count, value in (*zip(pairs[:2], cosines[:2], strict=True), other)
    )
    return float(cosines[2] / pairs[2]), copies, same, rest


def _zeros(banks: list[LazyArray]) -> list[np.ndarray]:
    return [np.zeros(math.prod(array.shape[1:])) for array in banks]


def _add(sums: list[np.ndarray], terms: list[np.ndarray]) -> None:
    for total, term in zip(sums, terms, strict=True):
        total += term


def _pairs(sums: list[np.ndarray], count: int) -> np.ndarray:
    """Returns the number of ordered pairs of `count` experts, and the sum of their cosines."""
    return np.array([count * (count - 1), sum(map(_sum_of_squares, sums)) - count])


def _add_unit_vector(
    sums: list[np.ndarray], banks: list[LazyArray], expert: int, name: str
) -> None:
    """Adds an expert, divided by its norm. Raises InputError if it is zero or not finite."""
    matrices = [array[expert : expert + 1].reshape(-1) for array in banks]
    square = sum(map(_sum_of_squares, matrices))
    if not 0 < square < np.inf:
        state = "zero" if square == 0 else "not finite"
        raise InputError(f"{name}: the weights of expert {expert} are {state}")
    for total, matrix in zip(sums, matrices, strict=True):
        for chunk in _chunks(matrix):
            total[chunk] += matrix[chunk].astype(np.float64) / np.sqrt(square)


def _sum_of_squares(values: np.ndarray) -> float:
    """Returns the sum of squares, in float64."""
    return sum(float(np.square(values[chunk], dtype=np.float64).sum()) for chunk in _chunks(values))


def _chunks(values: np.ndarray) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, len(values), _CHUNK)]


def table(found: dict[str, Similarity]) -> str:
    """Formats a table: a line per layer and a column per model, then each model's means by part."""
    rows = [["layer", *found]]
    for layer in sorted({layer for one in found.values() for layer in one.layers}):
        known = [dict(zip(one.layers, one.values, strict=True)) for one in found.values()]
        rows.append([str(layer), *(_text(values.get(layer)) for values in known)])
    rows.append(["mean", *(_text(one.mean) for one in found.values())])
    for part in next(iter(found.values())).parts:
        rows.append([part, *(_text(one.parts[part]) for one in found.values())])
    return "\n".join(aligned(rows))


def steps_table(found: dict[int, Similarity]) -> str:
    """Formats a table with a line per checkpoint: the mean over all pairs, and over each part."""
    parts = next(iter(found.values())).parts
    rows = [["step", "all pairs", *parts]]
    for step, one in found.items():
        rows.append([str(step), _text(one.mean), *map(_text, one.parts.values())])
    return "\n".join(aligned(rows))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def checkpoints_of(workdir: str) -> dict[int, str]:
    """Returns {step: path} of a run's checkpoints. Raises InputError if there are none."""
    steps = steps_of(buckets.place(workdir).absolute())
    found = {step: str(steps / str(step)) for step in saved_steps(steps)}
    if not found:
        raise InputError(f"{workdir} holds no checkpoints of a run: give a workdir")
    return found


def similarities[Label](sources: dict[Label, str]) -> dict[Label, Similarity]:
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
