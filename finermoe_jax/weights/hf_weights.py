"""Reads and writes Hugging Face directories block by block, by the table in hf_names.py.

Only safetensors are read: nothing is unpickled or executed.
"""

import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from finermoe_jax.config.arguments import FLOATS, check_path, check_type
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.data.tokenizers import (
    GENERATION_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    check_kept,
    generation_settings,
    kept_files,
    write_files,
)
from finermoe_jax.errors import InputError
from finermoe_jax.layers.stored import Quantized
from finermoe_jax.model.decoder import (
    LOAD_A_MODEL,
    Decoder,
    parameter_kinds,
    parameter_shapes,
    with_params,
)
from finermoe_jax.model.offload import check_place, host_arguments
from finermoe_jax.runtime.buckets import BucketPath, Place, locate
from finermoe_jax.runtime.downloads import cache, named_after
from finermoe_jax.runtime.files import make_directory
from finermoe_jax.runtime.hub import directory_of
from finermoe_jax.runtime.json_files import read_json, to_json
from finermoe_jax.runtime.paths import local
from finermoe_jax.weights import lazy
from finermoe_jax.weights.hf_config import AUTO_MAP, model_config_from_hf, model_config_to_hf
from finermoe_jax.weights.hf_names import STATE, Parts, parts
from finermoe_jax.weights.lazy import LazyArray, Weights
from finermoe_jax.weights.model_card import CARD_FILE, UNKNOWN, model_card
from finermoe_jax.weights.safetensors_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    TensorFiles,
    indexed_files,
    listing,
    write_tensors,
)
from finermoe_jax.weights.targets import new_target

# Computed buffers that old exports contain.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# The size in bytes must fit 64 bits.
_MOST_PARAMETERS = 1 << 60
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


# --- reading --------------------------------------------------------------------------------


def resolve_source(source: str | os.PathLike) -> Path:
    """The directory of a dense model or a FineRMoE, or of a Hub id. Raises as `directory_of`."""
    names = ["config.json", CARD_FILE, INDEX_FILE, *TOKENIZER_FILES, TEMPLATE_FILES]
    # Repositories may hold their weights in other forms beside these.
    return directory_of(source, names, lambda found: indexed_files(found) or [SINGLE_FILE])


def read_config(directory: Path) -> ModelConfig:
    """Returns the architecture in a HF directory's config.json."""
    return model_config_from_hf(
        read_json(directory / "config.json"), str(directory / "config.json")
    )


def open_hf(directory: Path, dtype: DTypeLike | None = None) -> tuple[ModelConfig, Weights]:
    """Opens a HF directory; checks every name, shape and dtype.

    The weights are read when indexed. Their files stay open as long as the weights exist.

    Args:
      directory: config.json and safetensors of a dense model or a FineRMoE.
      dtype: float dtype of the weights; None keeps that of the embedding.

    Returns:
      The architecture and the lazy weights.

    Raises:
      InputError: missing, unexpected or wrongly shaped or typed tensors (one message lists all), a
        config that is not supported, or files that are not safetensors.
    """
    config = read_config(directory)
    shapes = parameter_shapes(config)
    table = parts(config, list(shapes))
    files = TensorFiles(directory)
    _check_tensors(files, table, shapes, config)
    stored, kinds = jnp.dtype(dtype or DTYPES[files.dtype(_EMBEDDING)]), parameter_kinds(config)
    return config, {
        path: _stored(files, table[path], shape, kinds[path].stored_as(stored))
        for path, shape in shapes.items()
    }


def stored_dtypes(directory: Path) -> list[str]:
    """Returns the dtypes of the weights stored in a HF directory, without model state."""
    files = TensorFiles(directory)
    other = re.compile(f"{_IGNORED.pattern}|{STATE.pattern}")
    found = {files.dtype(name) for name in files.where if not other.search(name)}
    return sorted(DTYPES.get(name, name) for name in found)


def _stored(files: TensorFiles, where: Parts, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    axes, first = len(where.leading), where.rules[0]

    def assemble(*place: int) -> np.ndarray:
        whole = np.empty(shape[axes:], dtype)
        for rule in where.rules:
            rule.view(whole)[...] = _cast(files, where.name(rule, place), dtype)
        return whole

    kept = lazy.cache_last(assemble)

    def read(*at: Any) -> np.ndarray:
        *place, index = at
        if first.same:
            return _cast(files, where.name(first, tuple(place)), dtype, index)
        if lazy.is_whole(index, shape[axes:]):
            return assemble(*place)
        return kept(*place)[index]

    return lazy.stacked(shape, dtype, axes, read)


def _cast(files: TensorFiles, name: str, dtype: np.dtype, index: lazy.Index = ()) -> np.ndarray:
    """Reads a tensor, or part of it, and casts it; InputError if a value overflows."""
    return lazy.converted(files.tensor(name, index), dtype, f"{files.directory}: {name}")


def load_hf(
    source: str | os.PathLike, dtype: DTypeLike | None = None, *, experts: str = "device"
) -> Decoder:
    """Loads a dense (Qwen2, Qwen3, Llama, Mistral) or FineRMoE model from Hugging Face files.

    Args:
      source: a directory (local or gs://) with config.json and safetensors, a Hub id
        ("Qwen/Qwen2.5-0.5B"), or "demo/model", the dense model that comes with the package.
      dtype: float dtype of weights and activations; None keeps that of the embedding.
      experts: "device", "host" or "host_compute": the memory of the experts, as in `generate`.

    Returns:
      The model, on one device.

    Raises:
      InputError: no such directory or Hub repository, an architecture that is not supported,
        tensors that are missing, unexpected or of the wrong shape or dtype (one message lists
        all of them), an unknown `dtype`, or experts that cannot be placed so.

    Examples:
      >>> import finermoe_jax as fm
      >>> model = fm.load_hf("finermoe_jax/demo/model", dtype="float32")
      >>> model.config.hidden_size, model.config.vocab_size
      (128, 2048)
    """
    check_path("source", source)
    try:
        known = dtype is None or jnp.dtype(dtype).name in FLOATS
    except TypeError:
        known = False
    if not known:
        raise InputError(f"dtype={dtype!r} must be {', '.join(FLOATS)}, or None")
    given = locate(source)
    directory = resolve_source(given)
    with named_after(given if isinstance(given, BucketPath) else directory, directory):
        config, weights = open_hf(directory, dtype)
    check_place(experts, config)
    params = lazy.in_memory(weights, *host_arguments(config, experts))
    return with_params(config, params, dtype=weights["embed", "weight"].dtype)


def _check_tensors(
    files: TensorFiles,
    table: Mapping[lazy.ParamPath, Parts],
    shapes: Mapping[lazy.ParamPath, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    """Checks every name, shape and dtype on both sides; one InputError lists all faults."""
    # A damaged config may imply more tensors than can be listed.
    names, sizes = sum(where.count for where in table.values()), map(math.prod, shapes.values())
    if names > 10 * len(files.where) + 10_000 or (size := sum(sizes)) > _MOST_PARAMETERS:
        implied = f"{names} tensors" if names > 10 * len(files.where) else f"{size} parameters"
        raise InputError(
            f"{files.directory}: config.json implies {implied}, but the files contain "
            f"{len(files.where)} tensors"
        )
    wanted: dict[str, tuple[int, ...]] = {}
    for path, where in table.items():
        wanted |= where.shapes(shapes[path])
    present = {name for name in files.where if not _IGNORED.search(name)}
    if config.tie_word_embeddings and present.issuperset((_HEAD, _EMBEDDING)):
        if not _equal(files, _HEAD, _EMBEDDING):
            raise InputError(
                f"{files.directory}: tie_word_embeddings is true, but {_HEAD} differs "
                f"from {_EMBEDDING}; set tie_word_embeddings to false in config.json"
            )
        present.remove(_HEAD)
    known = sorted(wanted.keys() & present)
    faults = {
        "missing": sorted(wanted.keys() - present),
        "unexpected": sorted(present - wanted.keys()),
        "of the wrong shape": [
            f"{name} {files.shape(name)}, config.json implies {wanted[name]}"
            for name in known
            if files.shape(name) != wanted[name]
        ],
        f"not of {', '.join(DTYPES)}": [
            f"{name} is {files.dtype(name)}" for name in known if files.dtype(name) not in DTYPES
        ],
    }
    complaints = [f"{len(of)} {fault}:{listing(of)}" for fault, of in faults.items() if of]
    if complaints:
        raise InputError(
            f"the tensors in {files.directory} do not fit its config.json\n" + "\n".join(complaints)
        )


def _equal(files: TensorFiles, one: str, other: str) -> bool:
    shape = files.shape(one)
    if shape != files.shape(other) or files.dtype(one) != files.dtype(other):
        return False
    if 0 in shape or files.dtype(one) not in DTYPES:
        return True  # reported as a wrong shape or dtype
    dtype = jnp.dtype(DTYPES[files.dtype(one)])
    first, second = (
        LazyArray(shape, dtype, functools.partial(files.tensor, name)) for name in (one, other)
    )
    return all(
        first[index].tobytes() == second[index].tobytes()
        for index in lazy.blocks(shape, lazy.block_shape(first))
    )


# --- writing --------------------------------------------------------------------------------


def write_hf(
    config: ModelConfig,
    weights: Weights,
    target: Place,
    tokenizer: Path | None,
    card: str,
    before_last: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Writes a HF directory, which must not exist yet; yields the bytes of weights as written.

    config.json has the published keys. `tokenizer` is a directory whose tokenizer files are copied
    and whose end-of-text tokens are written (`generation_settings`). `card` is the model card.

    In a bucket, each file of weights is written to the local cache, uploaded and deleted.
    config.json is uploaded last, after before_last(): without it the rest is no model.

    Raises InputError if the variant has no HF form, if files of the tokenizer cannot be read, or if
    the exported tokenizer would behave differently (`check_kept`).
    """
    if isinstance(target, Path):
        yield from _write_local(config, weights, target, tokenizer, card, lambda file: None)
        return

    def upload(file: Path) -> None:
        (target / str(file.relative_to(staged))).write(file, if_generation=0)
        file.unlink()

    make_directory(cache())
    with tempfile.TemporaryDirectory(prefix="upload-", dir=cache()) as folder:
        staged = Path(folder) / target.name
        yield from _write_local(config, weights, staged, tokenizer, card, upload)
        last = (INDEX_FILE, "config.json")
        rest = [file for file in staged.rglob("*") if file.is_file() and file.name not in last]
        for file in [*rest, *(staged / name for name in last if (staged / name).exists())]:
            if file.name == last[-1]:
                before_last()
            upload(file)


def _write_local(
    config: ModelConfig,
    weights: Weights,
    directory: Path,
    tokenizer: Path | None,
    card: str,
    finished: Callable[[Path], None],
) -> Iterator[int]:
    texts = json_files(config, str(weights["embed", "weight"].dtype), tokenizer)
    if tokenizer is not None:
        check_kept(tokenizer, texts)
    directory.mkdir()
    if config.moe is not None:
        for file in model_code():
            shutil.copyfile(file, directory / file.name)
    if tokenizer is not None:
        write_files(kept_files(tokenizer), directory)
    for name, text in (*texts.items(), (CARD_FILE, card)):
        (directory / name).write_text(text, encoding="utf-8")
    table = parts(config, list(weights))
    entries = [
        Entry(name, shape, array.dtype)
        for path, array in weights.items()
        for name, shape in table[path].shapes(array.shape)
    ]
    yield from write_tensors(directory, entries, _pieces(weights, table), finished)


def json_files(config: ModelConfig, dtype: str, tokenizer: Path | None) -> dict[str, str]:
    """Returns the content of config.json and, unless empty, of GENERATION_FILE."""
    values = model_config_to_hf(config, dtype)
    generation = generation_settings(tokenizer, config.vocab_size) if tokenizer is not None else {}
    for key in ("bos_token_id", "eos_token_id"):
        # If a dense config.json omits these, transformers assumes its family's tokens, not this
        # model's.
        if key in generation or config.moe is None:
            values[key] = generation.get(key)
    files = {"config.json": values} | ({GENERATION_FILE: generation} if generation else {})
    return {name: to_json(content, indent=2) + "\n" for name, content in files.items()}


def _pieces(
    weights: Weights, table: dict[lazy.ParamPath, Parts]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, values) in the order of `Parts.shapes`; large tensors as runs of rows."""
    for path, array in weights.items():
        where = table[path]
        leading, block = len(where.leading), lazy.block_shape(array)
        if not where.rules[0].same:
            block = (*block[:leading], *array.shape[leading:])
        indices = list(lazy.blocks(array.shape, block))
        for index, values in zip(indices, lazy.prefetched(array, indices), strict=True):
            for place in np.ndindex(*values.shape[:leading]):
                at = tuple(index[axis].start + i for axis, i in enumerate(place))
                for rule in where.rules:
                    yield where.name(rule, at), rule.view(values[place])


def model_code() -> list[Path]:
    """Returns the model's code for transformers, the files of auto_map. None of it runs here."""
    modules = {place.split(".")[0] for place in AUTO_MAP.values()}
    return [Path(__file__).parent / "hf_export" / f"{module}.py" for module in sorted(modules)]


def to_save(model: Any, path: Any, tokenizer: Any) -> tuple[Weights, Path | None]:
    """Checks the arguments of a save; returns the weights and the tokenizer's directory, if any.

    Raises InputError for arguments of the wrong type, for a model with int8 weights, or if
    `tokenizer` is not a directory.
    """
    check_type("model", model, Decoder, LOAD_A_MODEL)
    check_path("path", path)
    params = nnx.to_pure_dict(nnx.state(model))
    if any(isinstance(leaf, Quantized) for leaf in nnx.traversals.flatten_mapping(params).values()):
        raise InputError(
            "model has int8 weights, which cannot be saved: save it before int8_weights"
        )
    weights = lazy.of_params(params)
    if tokenizer is None:
        return weights, None
    check_path("tokenizer", tokenizer)
    files = Path(local(tokenizer))
    if not files.is_dir():
        raise InputError(f"tokenizer={str(tokenizer)!r} is not a directory with tokenizer files")
    return weights, files


def save_hf(
    model: Decoder, path: str | os.PathLike, tokenizer: str | os.PathLike | None = None
) -> None:
    """Writes a Hugging Face directory: config.json, safetensors, tokenizer files, model card.

    For a model with experts, config.json has the keys of the published models, and the directory
    contains the model's code for transformers (docs/huggingface.md).

    Args:
      model: a dense decoder, or a FineRMoE variant that the published HF model can express.
      path: a new or empty directory, or gs://…. It is a model only when complete.
      tokenizer: a directory whose tokenizer files are copied. Without it transformers does not know
        which token ends a text.

    Raises:
      InputError: `path` is not empty, the variant has no HF form, the weights are int8, or the
        tokenizer cannot be read.

    Examples:
      >>> import jax
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model")
      >>> moe = fm.MoEConfig(intermediate_granularity=8)
      >>> model = fm.upcycle_model(dense, moe, jax.random.key(0))
      >>> fm.save_hf(model, "demo_moe_hf", tokenizer="finermoe_jax/demo/model")
    """
    weights, files = to_save(model, path, tokenizer)
    with new_target(path) as new:
        card = model_card(model.config, UNKNOWN)
        for _ in write_hf(model.config, weights, new.path, files, card, new.confirm):
            pass
