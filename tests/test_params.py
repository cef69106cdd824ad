"""Parameter counts against the paper's tables and against instantiated models."""

import dataclasses

import jax
import pytest
from flax import nnx

from finermoe_jax.config import MeshConfig, MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.model import Decoder
from finermoe_jax.params import paper_counts, run_model, sharding_table, true_counts
from finermoe_jax.published import QWEN2P5
from finermoe_jax.upcycle import upcycled_config
from tests.test_config import SMALL, _preset


@pytest.mark.parametrize(
    ("size", "paper", "true"),
    [
        ("0.5B", (1.68, 0.65), (1.6789, 0.6493)),
        ("1.5B", (5.64, 1.85), (5.6362, 1.8428)),
        ("7B", (26.65, 7.94), (26.6392, 7.9256)),
    ],
)
def test_published_models(size, paper, true):
    config = upcycled_config(QWEN2P5[size], MoEConfig())
    counts = paper_counts(config)
    assert (round(counts.total / 1e9, 2), round(counts.active / 1e9, 2)) == paper
    counts = true_counts(config)
    assert (round(counts.total / 1e9, 4), round(counts.active / 1e9, 4)) == true


@pytest.mark.parametrize(("size", "billions"), [("0.5B", 0.49), ("1.5B", 1.54), ("7B", 7.62)])
def test_dense_models(size, billions):
    assert round(paper_counts(QWEN2P5[size]).total / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("settings", "paper"),
    [  # Table 4 and Table 8, from 1.5B
        ((2, 2, 1, 2, 1), (5.63, 2.74)),
        ((16, 8, 1, 2, 1), (14.90, 2.21)),
        ((64, 8, 1, 2, 1), (14.97, 1.97)),
        ((32, 2, 1, 2, 4), (5.64, 2.03)),
        ((32, 2, 4, 2, 1), (17.24, 1.88)),
    ],
)
def test_ablations(settings, paper):
    counts = paper_counts(upcycled_config(QWEN2P5["1.5B"], MoEConfig(*settings)))
    assert (round(counts.total / 1e9, 2), round(counts.active / 1e9, 2)) == paper


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 1, 2, 1, decoder_sparse_step=2)])
def test_true_count_is_what_a_model_holds(moe):
    config = dataclasses.replace(SMALL, moe=moe)
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert true_counts(config).total == held


def test_shardings_are_shown_without_devices():
    config = dataclasses.replace(_preset("qwen7b"), mesh=MeshConfig(-1, 16, 8, 2))
    model = run_model(config)
    text = sharding_table(config, model, 256)
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("runs")}
    assert "layer expert expert_mlp expert_in" in lines["runs/0/0/moe/gate_up"]
    assert "28x128x1184x3584" in lines["runs/0/0/moe/gate_up"]
    bytes_each = [int(line.split()[-1].replace(",", "")) for line in lines.values()]
    whole = 4 * true_counts(model).total
    assert whole / 256 <= sum(bytes_each) < whole
    assert "GiB)" in text and "'data': 1" in text
    assert "stays whole" in sharding_table(
        dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, 8)), model
    )
    with pytest.raises(InputError, match="256 places for 8 devices"):
        sharding_table(dataclasses.replace(config, mesh=MeshConfig(1, 16, 8, 2)), model, 8)
