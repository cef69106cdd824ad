"""The initial model and tokenizer of a run."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING
from finermoe_jax.data.token_files import tokenizer_hash
from finermoe_jax.data.tokenizers import has_tokenizer, tokenizer_directory
from finermoe_jax.errors import InputError, refuse_differences
from finermoe_jax.model.decoder import Decoder, with_shapes
from finermoe_jax.runtime.buckets import Place, locate
from finermoe_jax.weights import lazy
from finermoe_jax.weights.checkpoint import read_description, read_stored_origin
from finermoe_jax.weights.model_card import UNKNOWN, Origin, upcycled_origin
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import upcycled, with_selection_bias


@dataclasses.dataclass
class InitialModel:
    """The initial model of a run.

    Attributes:
      model: a decoder with shapes in place of arrays.
      place: takes the parameters' shardings (a pure dict); returns the weights on them. Each
        device's shard is computed for that device alone.
      tokenizer_files: directory of the tokenizer.
      ends_files: directory that defines the end-of-text tokens if tokenizer_files does not.
      dense: the dense model before upcycling, if any.
      origin: where the weights come from.
    """

    model: Decoder
    place: Callable[[dict], dict]
    tokenizer_files: Path
    ends_files: Path | None = None
    dense: "InitialModel | None" = None
    origin: Origin = UNKNOWN


def initial_model(config: RunConfig) -> InitialModel:
    """Returns the model before training: upcycled from init_from, unchanged, or random.

    Raises InputError if init_from, the tokenizer and the config do not fit together.
    """
    compute, stored = jnp.dtype(config.train.compute_dtype), jnp.dtype(config.train.param_dtype)
    key = jax.random.key(config.train.seed)
    named = config.data.tokenizer
    tokenizer = tokenizer_directory(locate(named)) if named else None
    if not config.init_from:
        if tokenizer is None:
            raise InputError(
                "data.tokenizer and init_from are both empty: training from scratch needs "
                "data.tokenizer, a directory with tokenizer files or a Hub id"
            )
        assert config.dense is not None
        if config.upcycle != PUBLISHED_UPCYCLING:
            raise InputError(
                f"init_from is empty, so {config.upcycle} has no effect: random weights are not "
                "upcycled. Keep config.upcycle at its default, or set init_from to a dense model"
            )
        model_config = dataclasses.replace(config.dense, moe=config.moe)

        def build() -> dict:
            rngs = nnx.Rngs(params=key)
            decoder = Decoder(model_config, dtype=compute, param_dtype=stored, rngs=rngs)
            return nnx.to_pure_dict(nnx.state(decoder))

        return InitialModel(
            with_shapes(model_config, compute),
            lambda shardings: jax.jit(build, out_shardings=shardings)(),
            tokenizer,
        )
    source = open_model(locate(config.init_from), stored)
    if config.dense is not None:
        _check_agreement(config, source.config)
    files = tokenizer or source.files
    ends = source.files if _same_tokenizer(files, source.files) else files
    model, weights = upcycled(
        config.init_from, source.config, source.weights, config.moe, key, config.upcycle
    )
    if config.balance.kind == "bias" and model.moe is not None:
        model, weights = with_selection_bias(model, weights)
    origin = source.origin
    if weights is not source.weights:
        origin = upcycled_origin(origin, source.config, model, config.upcycle)
    # Without other weights, moe.route_ahead alone may differ from the source's.
    made, dense = (
        InitialModel(with_shapes(c, compute), functools.partial(lazy.placed, w), files, ends)
        for c, w in ((model, weights), (source.config, source.weights))
    )
    if source.config.moe is None and weights is not source.weights:
        made.dense = dense
    made.origin = origin
    return made


def _same_tokenizer(one: Path, other: Path) -> bool:
    """Returns True if both tokenizers are equal or either directory has none."""
    if not (has_tokenizer(one) and has_tokenizer(other)):
        return True
    return tokenizer_hash(one) == tokenizer_hash(other)


def resumed_model(config: RunConfig, checkpoint: Place, workdir: Path) -> InitialModel:
    """Returns a resumed run's model, without weights, and the workdir's tokenizer."""
    model_config, _, _ = read_description(checkpoint)
    model = with_shapes(model_config, config.train.compute_dtype)

    def restored(shardings: dict) -> dict:
        raise AssertionError("a resumed run's weights are restored with its optimizer state")

    origin = read_stored_origin(checkpoint)
    return InitialModel(model, restored, workdir / "tokenizer", origin=origin)


def _check_agreement(config: RunConfig, source: ModelConfig) -> None:
    found = dataclasses.asdict(source)
    assert config.dense is not None
    stated = dataclasses.asdict(config.dense)
    for free in ("moe", "initializer_range"):
        found.pop(free), stated.pop(free)
    found["head_dim"] = source.attention_head_dim
    stated["head_dim"] = config.dense.attention_head_dim
    if source.moe is not None:
        found.pop("tie_word_embeddings"), stated.pop("tie_word_embeddings")
    refuse_differences(
        f"{config.init_from} differs from config.dense",
        found,
        stated,
        "set config.dense to the source's values, or to None to use them automatically",
    )
