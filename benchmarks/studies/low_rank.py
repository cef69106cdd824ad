"""Measures the rank of what training added to copies of a slice.

    python benchmarks/studies/low_rank.py CHECKPOINT TEXT [--ranks=0,1,2,4,8,16] [--json=FILE]

CHECKPOINT is a checkpoint, workdir, HF directory or Hub id of an upcycled FineRMoE, with its
tokenizer. TEXT is a .txt or .jsonl file, whose first rows * length tokens are read. Copies of a
slice for one slot start from equal weights. Each is split into the mean of its copies and a
difference. For every rank r, the differences of all gates, ups and downs are cut to their r
largest singular values:

    loss      nats per token of the model with the cut experts; r = 0: all copies are their mean
    gate, up, down    share of the squared singular values that is left, mean over the experts

The last line has the experts as trained. The idea is that of LightMoE (arXiv 2603.12645), which
cuts experts of trained mixtures to a shared part and low-rank differences.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import finermoe_jax as fm
from benchmarks.studies.ahead import first_tokens
from finermoe_jax.model.decoder import Decoder, with_params
from finermoe_jax.runtime.files import write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.training.compare import aligned
from finermoe_jax.weights.source import open_with_tokenizer, read_model

RANKS = (0, 1, 2, 4, 8, 16)
MATRICES = ("gate", "up", "down")
_ROWS_AT_A_TIME = 8


class Parts(NamedTuple):
    """Experts [L, slots, copies, slices, F, out] as their mean [..., 1, ...] and differences."""

    mean: np.ndarray
    left: np.ndarray  # singular vectors, times the singular values
    right: np.ndarray
    squares: np.ndarray  # of the singular values, [L, slots, copies, slices, min(F, out)]

    def cut(self, rank: int) -> np.ndarray:
        """The experts, with differences of this rank."""
        return self.mean + self.left[..., :rank] @ self.right[..., :rank, :]

    def share(self, rank: int) -> float:
        """Share of the squared singular values that a rank keeps; 1 where the copies are equal."""
        whole = self.squares.sum(-1)
        kept = self.squares[..., :rank].sum(-1)
        return float(np.divide(kept, whole, out=np.ones_like(whole), where=whole > 0).mean())


def split(experts: np.ndarray, moe: fm.MoEConfig) -> Parts:
    """Splits experts [L, E, F, out] of one layer kind. Experts are numbered as in Eq. 9-10."""
    copies = moe.output_expansion * moe.intermediate_expansion
    shape = (len(experts), moe.output_granularity, copies, moe.intermediate_granularity)
    experts = experts.astype(np.float32).reshape(*shape, *experts.shape[-2:])
    mean = experts.mean(axis=2, keepdims=True)
    left, values, right = np.linalg.svd(experts - mean, full_matrices=False)
    return Parts(mean, left * values[..., None, :], right, values**2)


def matrices(params: dict[str, Any], moe: fm.MoEConfig) -> list[dict[str, Parts]]:
    """The parts of every run of layers: {gate, up, down} of each MoE block with experts."""
    found = []
    for block in blocks(params):
        gate, up = np.split(np.asarray(block["gate_up"]), 2, axis=-2)
        values = zip(MATRICES, (gate, up, np.asarray(block["down"])), strict=True)
        found.append({name: split(value, moe) for name, value in values})
    return found


def blocks(params: dict[str, Any]) -> list[dict[str, Any]]:
    """The dicts of `params` that hold experts, in the order of the layers."""
    runs = [block for run in params["runs"].values() for block in run.values()]
    return [block["moe"] for block in runs if "moe" in block]


def with_rank(model: Decoder, params: dict[str, Any], parts: list, rank: int) -> Decoder:
    """The model with every difference cut to a rank."""
    for block, cut in zip(blocks(params), parts, strict=True):
        gate, up, down = (cut[name].cut(rank) for name in MATRICES)
        like = block["gate_up"], block["down"]
        new = np.concatenate([gate, up], axis=-2), down
        block["gate_up"], block["down"] = (
            jnp.asarray(values.reshape(old.shape), old.dtype)
            for values, old in zip(new, like, strict=True)
        )
    return with_params(model.config, params, dtype=model.dtype)


def loss(model: Decoder, ids: np.ndarray) -> float:
    """Mean cross-entropy of the tokens ids [B, T] but each row's first, in nats."""
    pieces = np.array_split(ids, -(-len(ids) // _ROWS_AT_A_TIME))
    sums = [float(_summed(*nnx.split(model), jnp.asarray(rows))) for rows in pieces]
    return sum(sums) / (ids.size - len(ids))


@jax.jit(static_argnames="graphdef")
def _summed(graphdef: Any, state: Any, ids: jax.Array) -> jax.Array:
    logits = nnx.merge(graphdef, state)(ids).logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()


def measure(model: Decoder, ids: np.ndarray, ranks: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Returns {rank: {loss, gate, up, down}}; the rank "all" is the model as it is.

    Raises InputError for a model without copies, and for one that shares experts between layers.
    """
    moe = model.config.moe
    if moe is None or moe.output_expansion * moe.intermediate_expansion < 2:
        raise fm.InputError("the model has no copies of slices: give one with R_I or R_O above 1")
    if moe.experts_across > 1:
        raise fm.InputError(
            f"the model has experts_across={moe.experts_across}: give one with experts_across=1"
        )
    params = nnx.to_pure_dict(nnx.state(model))
    parts = matrices(params, moe)
    found = {}
    for rank in ranks:
        shares = {name: np.mean([each[name].share(rank) for each in parts]) for name in MATRICES}
        found[str(rank)] = {"loss": loss(with_rank(model, params, parts, rank), ids), **shares}
    return found | {"all": {"loss": loss(model, ids), **dict.fromkeys(MATRICES, 1.0)}}


def main() -> None:
    """Prints the table; writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="checkpoint, workdir, HF directory or Hub id")
    parser.add_argument("text", type=Path, help=".txt or .jsonl file")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="ranks to cut to")
    parser.add_argument("--rows", type=int, default=64, help="rows of text")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    source, tokenizer, _ = open_with_tokenizer(given.checkpoint)
    ids = first_tokens(given.text, tokenizer, given.rows, given.length)
    model = read_model(source, given.checkpoint, None)
    found = measure(model, ids, tuple(map(int, given.ranks.split(","))))
    names = ("loss", *MATRICES)
    rows = [["rank", *names]]
    rows += [[rank, *(f"{row[name]:.4f}" for name in names)] for rank, row in found.items()]
    print("\n".join(aligned(rows)))
    if given.json:
        write(given.json, to_json(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
