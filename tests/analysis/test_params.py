"""Parameter counts against the paper's tables and against instantiated models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.analysis.paper_tables import ROWS
from finermoe_jax.analysis.paper_tables import text as paper_tables_text
from finermoe_jax.analysis.params import paper_counts, run_model, sharding_table
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import BalanceConfig, MeshConfig, RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers.sharding import ONE_DEVICE
from finermoe_jax.model.counts import true_counts
from finermoe_jax.model.decoder import Decoder, with_shapes
from finermoe_jax.training.initial import initial_model
from tests.support import SMALL, load_preset
from tests.support.training import MOE, mixture_model


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.table}-{row.size}-{row.label}")
def test_every_row_of_the_papers_tables_to_the_printed_digit(row):
    counts = paper_counts(row.model)
    assert (round(counts.total / 1e9, 2), round(counts.active / 1e9, 2)) == (row.total, row.active)


@pytest.mark.slow
def test_papers_tables_are_whole_and_shown():
    tables = [row.table for row in ROWS]
    assert {n: tables.count(n) for n in set(tables)} == {1: 21, 2: 4, 4: 14, 8: 6}
    shown = paper_tables_text()
    assert "DIFFERS" not in shown and shown.count("Table") == 4
    # The true counts of the three published models, independent of the formula.
    for true in ("1.6789 /  0.6493", "5.6362 /  1.8428", "26.6392 /  7.9256"):
        assert true in shown


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 1, 2, 1, decoder_sparse_step=2)])
def test_true_count_is_what_a_model_holds(moe):
    config = dataclasses.replace(SMALL, moe=moe)
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert true_counts(config).total == held


@pytest.mark.parametrize("save", [fm.save_checkpoint, fm.save_hf])
@pytest.mark.parametrize("across", [1, 2])
def test_the_model_of_a_run_is_the_one_that_it_trains(tmp_path, save, across):
    """Started from a trained mixture that the run gives pools, routing ahead and biases."""
    save(mixture_model(), tmp_path / "trained")
    moe = dataclasses.replace(MOE.moe, experts_across=across, route_ahead=1)
    config = RunConfig(
        dense=None, moe=moe, init_from=str(tmp_path / "trained"), balance=BalanceConfig("bias")
    )
    found = run_model(config)
    assert found.moe.selection_bias and found.moe.route_ahead == 1
    assert found == initial_model(config).model.config


def test_shardings_are_shown_without_devices():
    config = dataclasses.replace(load_preset("qwen7b"), mesh=MeshConfig(-1, 16, 8, 2))
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
    with pytest.raises(InputError, match="needs 256 devices, but 8 devices are available"):
        sharding_table(dataclasses.replace(config, mesh=MeshConfig(1, 16, 8, 2)), model, 8)


def test_a_decoder_of_shapes_is_its_callers_own():
    """Traced once for each config, but what one caller writes into it no other finds."""
    first, equal = with_shapes(SMALL), dataclasses.replace(SMALL)
    first.embed.weight.set_value(jnp.zeros(3))
    first.placement = None
    again = with_shapes(equal)
    assert again.embed.weight.shape == (SMALL.vocab_size, SMALL.hidden_size)
    assert again.placement is ONE_DEVICE
    assert again.config is equal is not SMALL
