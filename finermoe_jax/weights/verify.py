"""Verifies a conversion: compares every tensor of the target with its source, bit for bit.

Upcycled experts are checked in the opposite direction from `upcycle.py`: each is compared with the
slice of the dense FFN that its number implies.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from tqdm import tqdm

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.data.tokenizers import GENERATION_FILE, kept_files
from finermoe_jax.errors import InputError, refuse_differences
from finermoe_jax.model.decoder import parameter_kinds
from finermoe_jax.runtime import buckets
from finermoe_jax.runtime.buckets import Place
from finermoe_jax.weights import lazy
from finermoe_jax.weights.hf_names import Parts, bank_layers, parts, run_layers
from finermoe_jax.weights.hf_weights import json_files, model_code
from finermoe_jax.weights.lazy import Index, LazyArray, ParamPath, Weights
from finermoe_jax.weights.safetensors_files import listing
from finermoe_jax.weights.source import ModelSource, open_model
from finermoe_jax.weights.upcycle import DRAWN, ROUTERS, by_layer, upcycled


@dataclasses.dataclass
class Report:
    """Counts of the target's Hugging Face tensors by how they were compared."""

    copied: int = 0
    slices: int = 0
    drawn: int = 0
    recomputed: int = 0
    squares: float = 0.0  # sum over the drawn values
    values: int = 0  # number of drawn values
    cast: str = ""  # note on values compared after a cast
    digest: str = ""  # xxh3_128 of all values in the decoder's order; the same for both formats
    differences: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        if self.copied:
            lines.append(f"{self.copied:>8,} tensors equal the source's bit for bit{self.cast}")
        if self.recomputed:
            lines.append(f"{self.recomputed:>8,} tensors equal those recomputed from the source")
        if self.slices:
            lines.append(f"{self.slices:>8,} slices make up the source's FFNs bit for bit")
        if self.drawn:
            deviation = math.sqrt(self.squares / self.values)
            lines.append(f"{self.drawn:>8,} random tensors, all finite, std {deviation:.4f}")
        return "\n".join([*lines, f"xxh3_128 of all values: {self.digest}"])


def verify(
    source: str,
    target: Place,
    to: Literal["orbax", "hf"] | None,
    moe: MoEConfig | None,
    *,
    upcycling: UpcycleConfig = PUBLISHED_UPCYCLING,
    seed: int | None = None,
    dtype: str | None = None,
    stated: bool = False,
) -> Report:
    """Verifies that `target` is what `convert` would write with the same arguments.

    Source and target may each be a HF directory or a finermoe checkpoint; of a checkpoint, the
    files' checksums are compared as well. If the target was cast, the source is cast for the
    comparison. Experts that are not plain slices of the dense FFN are upcycled again and compared.
    Only a few blocks are in memory at a time.

    Args:
      source: a directory, local or gs://, or a Hub id, as `convert` takes it.
      target: what was written, local or gs://.
      moe: the layer's granularities if a dense source was upcycled; None: it was imported.
      upcycling: the initialisation of the experts.
      stated: True if `moe` was asked for; a source with experts must then agree with it.
      to: the target's format. None accepts both formats as the result of "orbax", to compare an
        export with the original dense model.
      seed: random values are drawn again and compared up to the last few bits, which depend on the
        CPU. None: random values only have to be finite.
      dtype: dtype of the target's weights; None: the source's.

    Returns:
      What was compared, with the largest differences.

    Raises:
      InputError: another format or architecture than these arguments imply, damage, or tensors that
        differ; the message lists them.
    """
    target = buckets.place(target)
    if to is not None:
        _check_form(target, to)
    made = open_model(str(target))
    stored = made.weights["embed", "weight"].dtype
    given = open_model(source, stored)
    _check_dtype(source, given.stored, target, made.stored, dtype)
    wanted, again = given.config, given.weights
    if to != "hf":
        key = jax.random.key(seed or 0)
        wanted, again = upcycled(source, wanted, again, moe, key, upcycling, stated)
    _check_architectures(source, wanted, target, made.config)
    _check_files(given, made.home, to, str(stored))
    recomputed = bool(upcycling.drop_ratio or upcycling.copy_noise or upcycling.function_preserving)
    report = _compared(given, made, again, seed is not None, recomputed, f"verifying {target.name}")
    for model in (given, made):
        model.refuse_changed()
    if report.differences:
        raise InputError(
            f"{target} is not the conversion of {source}: {len(report.differences)} tensors differ:"
            + listing(report.differences, 20)
        )
    return report


def _compared(
    given: ModelSource, made: ModelSource, again: Weights, draws: bool, recomputed: bool, title: str
) -> Report:
    """Compares all blocks of `made` with the source or `again`, the weights upcycled again."""
    new_experts = again is not given.weights
    # A trained FineRMoE that gets pools has new rows in its routers only.
    new_names = DRAWN if given.config.moe is None else ROUTERS
    report, digest = Report(), xxhash.xxh3_128()
    if given.stored != made.stored:
        stored = made.weights["embed", "weight"].dtype
        report.cast = f" after casting {'/'.join(given.stored)} to {stored}"
    table, kinds = parts(made.config, list(made.weights)), parameter_kinds(made.config)
    size = sum(array.nbytes for array in made.weights.values())
    with tqdm(total=size, desc=title, unit="B", unit_scale=True) as bar:
        for path, array in made.weights.items():
            drawn = new_experts and path[-1] in new_names
            expected = None
            if new_experts and (recomputed or (drawn and draws) or kinds[path].state):
                expected = again[path]
            elif not drawn:
                expected = _expected(given, made.config, path, array.shape)
            digest.update(repr((path, array.shape, str(array.dtype))).encode())
            for index in lazy.blocks(array.shape, lazy.block_shape(array)):
                values = np.ascontiguousarray(array[index])
                _compare(report, table[path], array.shape, index, values, expected, drawn)
                digest.update(values.view(np.uint8).data)
                bar.update(values.nbytes)
            kind = "copied"
            if new_experts:
                slices = kinds[path].bank and given.config.moe is None
                compared = "slices" if slices else "copied"
                kind = "drawn" if drawn else "recomputed" if recomputed else compared
            setattr(report, kind, getattr(report, kind) + table[path].count)
    report.digest = digest.hexdigest()
    return report


def _check_form(target: Place, to: Literal["orbax", "hf"]) -> None:
    found = "hf" if (target / "config.json").is_file() else "orbax"
    if found != to:
        forms = {"hf": "a Hugging Face directory", "orbax": "an Orbax checkpoint"}
        raise InputError(
            f"{target} is {forms[found]}, and --to={to} asks for {forms[to]}: pass --to={found} "
            "or name another target"
        )


def _check_dtype(
    source: str, given: list[str], target: Place, made: list[str], dtype: str | None
) -> None:
    """Raises InputError unless the target's weights have the dtype asked for, or the source's."""
    asked = [dtype] if dtype else given
    if made != asked or len(asked) > 1:
        raise InputError(
            f"{target} stores {' and '.join(made)}, not {' and '.join(asked)}"
            + ("" if dtype else f" as {source} does: pass the --dtype of the conversion")
        )


def _check_files(given: ModelSource, made: Place, to: str | None, dtype: str) -> None:
    """Compares the files beside the weights: the tokenizer and, for an export, config and code."""
    exported = (made / "config.json").is_file()
    # An export has its own generation_config.json.
    wanted = {
        name: content
        for name, content in kept_files(given.files).items()
        if not (exported and name == GENERATION_FILE)
    }
    if to == "hf":
        texts = json_files(given.config, dtype, given.files)
        wanted |= {name: text.encode() for name, text in texts.items()}
        if given.config.moe is not None:
            wanted |= {file.name: file.read_bytes() for file in model_code()}
    for name, content in wanted.items():
        if not (made / name).is_file() or (made / name).read_bytes() != content:
            raise InputError(
                f"{made / name} is missing or not what {given.files} implies: convert again"
            )


def _check_architectures(source: str, given: ModelConfig, target: Place, made: ModelConfig) -> None:
    def comparable(config: ModelConfig) -> dict[str, Any]:
        values = dataclasses.asdict(config)
        # Not stated in a Hugging Face directory.
        del values["initializer_range"]
        if config.moe is not None:
            values["moe"]["shared_expert_intermediate_size"] = config.shared_expert_size
        return values

    refuse_differences(
        f"{target} has another architecture than {source}",
        comparable(made),
        comparable(given),
        "pass the conversion's own --source and --config, and --to=hf if it was an export",
        "as the source and the config imply",
    )


def _expected(
    given: ModelSource, made: ModelConfig, path: ParamPath, shape: tuple[int, ...]
) -> LazyArray:
    """Returns the values that the source implies for a parameter that is not drawn at random."""
    weights = given.weights
    moe, source = made.moe, given.config.moe
    if moe is None or (source is not None and source.experts_across == moe.experts_across):
        return weights[path]
    if path[0] != "runs":
        return weights.get(path, weights["embed", "weight"])
    layers, name = run_layers(made, path[1], path[2]), path[3:]
    rows = by_layer(given.config, weights)
    if name[-1] == "depth_vector" and name not in rows:
        return lazy.of_array(np.zeros(shape, weights["embed", "weight"].dtype))
    if parameter_kinds(made)[path].bank:
        groups = bank_layers(made, path[1], path[2])
        if given.config.moe is None:
            return _slices(given, made, groups, name[1], shape)
        of_layers = rows[name]
        across = moe.experts_across

        def expert(i: int, pooled: int, rest: Index) -> np.ndarray:
            return of_layers[groups[i][pooled % across]].row(pooled // across)[rest]

        return lazy.stacked(shape, of_layers[layers[0]].dtype, 2, expert)
    if given.config.moe is None and name[:2] == ("moe", "shared"):
        name = ("mlp", name[2])  # the dense FFN is the shared expert
    same = rows[name]
    return lazy.stacked(shape, same[layers[0]].dtype, 1, lambda i, rest: same[layers[i]][rest])


def _slices(
    given: ModelSource,
    made: ModelConfig,
    groups: tuple[tuple[int, ...], ...],
    name: str,
    shape: tuple[int, ...],
) -> LazyArray:
    """The slice of the dense FFN that each expert must equal (Eq. 9-10), one expert at a time."""
    moe = made.moe
    assert moe is not None
    numbers = (
        moe.output_granularity,
        moe.output_expansion,
        moe.intermediate_expansion,
        moe.intermediate_granularity,
    )
    wide, wide_out = made.expert_intermediate_size, made.expert_output_size
    dense = {part: given.weights["runs", 0, 0, "mlp", part] for part in ("gate", "up", "down")}
    scale = 1 if made.shared_expert_size else moe.intermediate_granularity

    def one(i: int, pooled: int, rest: Index) -> np.ndarray:
        expert, of_layer = divmod(pooled, moe.experts_across)
        layer = groups[i][of_layer]
        slot, _, _, place = map(int, np.unravel_index(expert, numbers))
        channels = slice(place * wide, (place + 1) * wide)
        if name == "gate_up":
            both = [dense[part].row(layer)[channels] for part in ("gate", "up")]
            return np.concatenate(both)[rest]
        outputs = slice(slot * wide_out, (slot + 1) * wide_out)
        return lazy.scaled(dense["down"].row(layer)[outputs, channels].T, scale)[rest]

    return lazy.stacked(shape, dense["down"].dtype, 2, one)


def _compare(
    report: Report,
    where: Parts,
    shape: tuple[int, ...],
    index: Index,
    values: np.ndarray,
    expected: LazyArray | None,
    drawn: bool,
) -> None:
    """Adds the tensors of a block that differ from the expected values to the report."""
    wanted = None if expected is None else np.ascontiguousarray(expected[index])
    if drawn:
        numbers = values.astype(np.float64)
        report.squares += float((numbers * numbers).sum())
        report.values += numbers.size
        wrong = ~np.isfinite(numbers)
        if wanted is not None:
            few_bits = 4 * float(jnp.finfo(values.dtype).eps)
            wrong |= ~np.isclose(numbers, wanted.astype(np.float64), few_bits, 1e-7)
    else:
        assert wanted is not None
        if wanted.tobytes() == values.tobytes():
            return
        bits = np.dtype(f"u{values.dtype.itemsize}")
        wrong = wanted.view(bits) != values.view(bits)
    leading = len(where.leading)
    for place in np.ndindex(*values.shape[:leading]):
        if not wrong[place].any():
            continue
        at = tuple(index[axis].start + i for axis, i in enumerate(place))
        # Gate and up share one array, and the block may hold part of it.
        whole = np.zeros(shape[leading:], bool)
        whole[index[leading:]] = wrong[place]
        for rule in where.rules:
            name = where.name(rule, at)
            if rule.view(whole).any() and name not in report.differences:
                report.differences.append(name)
