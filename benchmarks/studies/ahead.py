"""Measures how often each router would choose the same experts from an earlier layer's input.

    python benchmarks/studies/ahead.py CHECKPOINT TEXT [--rows=32] [--length=128] [--json=FILE]

CHECKPOINT is a checkpoint, workdir, HF directory or Hub id of a FineRMoE with route_ahead=0, and a
tokenizer. TEXT is a .txt or .jsonl file, whose first rows * length tokens are read. For k = 1, 2, 3
every router also reads the FFN input of k layers before, or of layer 0 if there are fewer. The
model computes on with its own choice, as trained. Each number is a share of the choices of a slot:

    same     experts that are chosen from both inputs
    group    tokens for which both inputs choose the same candidate group
    chance   experts that two independent choices with the same loads would have in common

docs/route_ahead.md.
"""

import argparse
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.data.text import TextFile, encode
from finermoe_jax.layers.sharding import ONE_DEVICE
from finermoe_jax.model.decoder import Decoder, with_params
from finermoe_jax.moe.routing import in_groups
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.training.compare import aligned
from finermoe_jax.weights.source import open_with_tokenizer, read_model

DISTANCES = (1, 2, 3)
_ROWS_AT_A_TIME = 8


class BothChoices(fm.FineRMoE):
    """Computes with the choice from its own input, and records that from the earlier input too."""

    def __call__(
        self, x: Any, mask: Any, placement: Any = ONE_DEVICE, router_input: Any = None
    ) -> Any:
        """Returns what a layer with route_ahead=0 does; `experts` has both choices, [B, T, 2A]."""
        y, routing, aux_loss = super().__call__(x, mask, placement)
        ahead, _ = self.route(self._with_depth(router_input))
        both = jnp.concatenate([routing.experts, ahead.experts], axis=-1)
        return y, routing._replace(experts=both), aux_loss


class Agreement(NamedTuple):
    """Shares by [layer, slot]; `layers` are the MoE layers' numbers in the decoder."""

    layers: tuple[int, ...]
    same: np.ndarray
    group: np.ndarray
    chance: np.ndarray


def agreement(model: Decoder, ids: np.ndarray, distance: int) -> Agreement:
    """Compares the choices for tokens ids [B, T]. Layer 0 is omitted: it reads its own input.

    Raises InputError for a model without experts, one that routes ahead, or a distance that
    exceeds its layers.
    """
    moe = model.config.moe
    if moe is None or moe.route_ahead:
        has = "no experts" if moe is None else f"route_ahead={moe.route_ahead}"
        raise fm.InputError(f"the model has {has}: give a FineRMoE with route_ahead=0")
    ahead = dataclasses.replace(moe, route_ahead=distance)
    config = dataclasses.replace(model.config, moe=ahead)
    params = nnx.to_pure_dict(nnx.state(model))
    both = fm.with_layer(with_params(config, params, dtype=model.dtype), BothChoices)
    batches = [
        [np.asarray(each) for each in _experts(*nnx.split(both), jnp.asarray(rows))]
        for rows in np.array_split(ids, -(-len(ids) // _ROWS_AT_A_TIME))
    ]
    numbers = [layer for layer, kind in enumerate(config.layer_kinds) if kind == "moe"]
    group_of = np.empty(moe.pool_size, int)
    members = np.asarray(in_groups(jnp.arange(moe.pool_size), moe)).reshape(-1, moe.pool_group_size)
    group_of[members] = np.arange(len(members))[:, None]
    found = {
        number: _of_layer(np.concatenate(layer).reshape(-1, 2, moe.num_active), moe, group_of)
        for number, layer in zip(numbers, zip(*batches, strict=True), strict=True)
        if number
    }
    return Agreement(tuple(found), *map(np.array, zip(*found.values(), strict=True)))


@functools.partial(jax.jit, static_argnames="graphdef")
def _experts(graphdef: Any, state: Any, ids: jax.Array) -> list[jax.Array]:
    routing = nnx.merge(graphdef, state).features(ids).routing
    return [each.experts.reshape(-1, each.experts.shape[-1]) for each in routing]


def _of_layer(
    chosen: np.ndarray, moe: fm.MoEConfig, group_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares [slot] of one layer from the two choices [tokens, 2, A]."""
    tokens, slots = len(chosen), moe.output_granularity
    # By expert number, so slot by slot: a slot's experts are consecutive.
    own, ahead = np.sort(chosen, axis=-1).reshape(tokens, 2, slots, -1).swapaxes(0, 1)
    same = (own[..., :, None] == ahead[..., None, :]).any(-1).mean(axis=(0, 2))
    # With plain_top_k a slot's experts are of several groups.
    group = (group_of[own] == group_of[ahead]).all(-1).mean(axis=0)
    rates = [
        np.stack([np.bincount(each[:, s].ravel(), minlength=len(group_of)) for s in range(slots)])
        / tokens
        for each in (own, ahead)
    ]
    return same, group, (rates[0] * rates[1]).sum(axis=1) / moe.active_per_group


def table(found: dict[int, Agreement]) -> str:
    """Formats a row per layer and slot, and the means over layers per slot."""
    slots = next(iter(found.values())).same.shape[1]
    names = ("same", "group", "chance")
    rows = [["layer  slot", *(f"{name} {k}" for k in found for name in names)]]
    for i, slot in itertools.product(range(len(next(iter(found.values())).layers)), range(slots)):
        values = [getattr(one, name)[i, slot] for one in found.values() for name in names]
        layer = next(iter(found.values())).layers[i]
        rows.append([f"{layer:>5}  {slot:>4}", *(f"{value:.3f}" for value in values)])
    for slot in range(slots):
        values = [getattr(one, name)[:, slot].mean() for one in found.values() for name in names]
        rows.append([f" mean  {slot:>4}", *(f"{value:.3f}" for value in values)])
    return "\n".join(aligned(rows))


def first_tokens(text: Path, tokenizer: Any, rows: int, length: int) -> np.ndarray:
    """The text's first tokens as [rows, length]. Raises InputError if there are fewer."""
    ids: list[int] = []
    for piece in TextFile(text).pieces():
        ids += encode([piece], tokenizer)[0].tolist()
        if len(ids) >= rows * length:
            return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)
    raise fm.InputError(
        f"{text} has {len(ids)} tokens, fewer than {rows} rows of {length}: give more text, or "
        "smaller --rows or --length"
    )


def main(checkpoint: str, text: Path, rows: int, length: int, output: Path | None) -> None:
    """Prints the table; writes the shares as JSON."""
    source, tokenizer, _ = open_with_tokenizer(checkpoint)
    ids = first_tokens(text, tokenizer, rows, length)
    model = read_model(source, checkpoint, None)
    most = source.config.layer_kinds.count("moe") - 1
    found = {k: agreement(model, ids, k) for k in DISTANCES if k <= most}
    print(table(found))
    if output:
        values = {
            k: {name: np.asarray(shares).tolist() for name, shares in one._asdict().items()}
            for k, one in found.items()
        }
        write(output, to_json(values, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint, workdir, HF directory or Hub id")
    parser.add_argument("text", type=Path, help=".txt or .jsonl file")
    parser.add_argument("--rows", type=int, default=32, help="rows of text")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--json", type=Path, help="also write the shares to this file")
    given = parser.parse_args()
    main(given.checkpoint, given.text, given.rows, given.length, given.json)
