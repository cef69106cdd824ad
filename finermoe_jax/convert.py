"""Conversion between Hugging Face directories and Orbax checkpoints."""

from pathlib import Path
from typing import Literal

import jax

from finermoe_jax.checkpoint import load_model, save_checkpoint
from finermoe_jax.config import MoEConfig
from finermoe_jax.hf_weights import load_hf, read_config, refuse_occupied, resolve_source, save_hf
from finermoe_jax.upcycle import cast, upcycle_model, upcycled_config


def convert(
    source: str,
    target: Path,
    to: Literal["orbax", "hf"],
    moe: MoEConfig | None,
    *,
    seed: int,
    dtype: str | None = None,
) -> None:
    """Writes `target`, a new or empty directory that appears only when complete.

    To "orbax", a dense HF source is upcycled as `moe` says (None: imported as it is) and a
    FineRMoE source is imported as it is. To "hf", a checkpoint of ours is exported. dtype casts
    the weights; None keeps the source's. seed draws the routers.

    Raises InputError for whatever the source, the target or the sizes have wrong.
    """
    refuse_occupied(target.absolute())
    if to == "hf":
        model, tokenizer = load_model(source)
        save_hf(cast(model, dtype) if dtype else model, target, tokenizer)
        return
    directory = resolve_source(source)
    config = read_config(directory)
    if config.moe is not None or moe is None:
        model = load_hf(directory, dtype)
    else:
        upcycled_config(config, moe)  # sizes that do not divide, before any tensor is read
        model = upcycle_model(load_hf(directory, dtype), moe, jax.random.key(seed))
    save_checkpoint(model, target, tokenizer=directory)
