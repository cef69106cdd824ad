"""Conversion between Hugging Face directories and Orbax checkpoints, block by block."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.files import new_directory, refuse_occupied
from finermoe_jax.runtime.paths import local
from finermoe_jax.runtime.preemption import stop_requests
from finermoe_jax.weights.checkpoint import write_checkpoint
from finermoe_jax.weights.hf_config import model_config_to_hf
from finermoe_jax.weights.hf_weights import write_hf
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import upcycled

# The exit code by which a shell reports Ctrl-C.
_INTERRUPTED = 130


def convert(
    source: str,
    target: Path,
    to: Literal["orbax", "hf"],
    moe: MoEConfig | None,
    *,
    upcycling: UpcycleConfig = PUBLISHED_UPCYCLING,
    seed: int,
    dtype: str | None = None,
    stated: bool = False,
) -> ModelConfig:
    """Writes `target`, a new or empty directory that appears only when complete.

    To "orbax", a dense source is upcycled as `moe` and `upcycling` say (moe None: imported as it
    is) and a FineRMoE source is imported as it is. To "hf", the source is exported as it is. dtype
    casts the weights; None keeps the source's. seed draws the routers. With `stated`, a FineRMoE
    source has to be one of these experts already.

    Returns the architecture that was written. A few blocks of the model are in memory at a time.

    Raises InputError for whatever the source, the target or the sizes have wrong and for a disk
    without room, RunEnded on SIGTERM and Ctrl-C. Nothing of the target is then left.
    """
    target = Path(local(target))
    refuse_occupied(target.absolute())
    model = open_model(source, dtype)
    config, weights = model.config, model.weights
    if dtype is None and len(model.stored) > 1:
        raise InputError(
            f"{source} stores its weights as {' and '.join(model.stored)}, and a target has one "
            "dtype: say which by --dtype"
        )
    if to == "hf":
        model_config_to_hf(config, "float32")  # what has no HF form, before anything is written
    else:
        key = jax.random.key(seed)
        config, weights = upcycled(source, config, weights, moe, key, upcycling, stated)
    size = sum(array.nbytes for array in weights.values())
    with (
        stop_requests() as stopped,
        _room(target, size),
        new_directory(target) as directory,
        tqdm(total=size, desc=target.name, unit="B", unit_scale=True) as bar,
    ):

        def written(size: int) -> None:
            bar.update(size)
            if stopped(0):
                raise RunEnded(f"interrupted; nothing of {target} is left", _INTERRUPTED)

        try:
            if to == "hf":
                for size in write_hf(config, weights, directory, model.files):
                    written(size)
            else:
                activations = dtype or model.dtype
                write_checkpoint(config, activations, weights, directory, model.files, written)
        finally:
            model.refuse_changed()  # which is then the cause of whatever else was wrong
    return config


@contextlib.contextmanager
def _room(target: Path, size: int) -> Iterator[None]:
    """Refuses a disk with less room than the weights need, or that fills up meanwhile."""
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not disk.has_room(place, size):
        free = disk.text(shutil.disk_usage(place).free)
        raise InputError(
            f"{target} would take {disk.text(size)}, and its disk has {free} free: make room, or "
            "give a directory elsewhere"
        )
    filled = (
        f"{target} takes {disk.text(size)}, and its disk was full before it was written. Nothing "
        "of it is left; make room, or give a directory elsewhere"
    )
    with disk.refusing_full(filled):
        yield
