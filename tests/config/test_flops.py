"""Model FLOPs against the program that XLA compiles, and against sums by hand; chips' peaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.analysis.hlo_costs import analyse
from finermoe_jax.config.flops import forward_flops, newton_schulz_flops, training_flops
from finermoe_jax.config.hardware import BANDWIDTHS, CHIPS, PEAKS, peak_bandwidth, peak_flops
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import PARTS, OptimizerConfig, RunConfig, TrainConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.layers.parameters import trained_kinds
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.counts import true_counts
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import batch_loss
from finermoe_jax.weights.checkpoint import abstract_params
from finermoe_jax.weights.upcycle import upcycled_config
from tests.support import SMALL


def program_flops(model, rows, length):
    """Of the compiled loss and its gradients, on one device, without recomputation."""
    config = RunConfig(
        dense=dataclasses.replace(model, moe=None),
        train=TrainConfig(remat="none", loss_chunk_tokens=rows * length),
    )
    decoder = with_shapes(model)
    decoder.dtype = jnp.dtype("float32")
    decoder.placement = Placement(None, "reference")
    params = abstract_params(model, "float32")
    gradients = jax.grad(batch_loss, argnums=2, has_aux=True)
    step = jax.jit(functools.partial(gradients, nnx.split(decoder)[0], config))
    batch = Batch(jax.ShapeDtypeStruct((rows, length + 1), jnp.int32))
    return analyse(step.lower(params, batch).compile().as_text()).flops


@pytest.mark.nightly
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 1, 2, 2, separate_routers=True)])
def test_the_compiled_program_has_as_many(moe):
    model = dataclasses.replace(
        SMALL, hidden_size=128, intermediate_size=256, num_hidden_layers=2, moe=moe
    )
    rows, length = 4, 48
    parts = forward_flops(model, length)
    # The program computes whole scores and masks half of them.
    wanted = 3 * (sum(parts.values()) + parts["scores"] * (2 * length / (length + 1) - 1))
    if moe:
        # The reference computes every expert for every row, and the forward pass a second time
        # on the way back.
        wanted += parts["routed experts"] * (4 * moe.num_experts - 3)
    found = program_flops(model, rows, length) / (rows * length)
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.slow
def test_a_compiled_update_of_muon_has_as_many():
    """Every product of the update is one of Newton-Schulz. The experts' are counted elsewhere."""
    config = dataclasses.replace(SMALL, num_hidden_layers=1)
    params, trained = abstract_params(config, "float32"), trained_kinds(with_shapes(config))
    trained = {path: kind for path, kind in trained.items() if kind.part == "attention"}
    tx = optimizer(OptimizerConfig(name="muon"), 10, trained)
    grads = nnx.traversals.unflatten_mapping(
        {p: x for p, x in nnx.traversals.flatten_mapping(params).items() if p in trained}
    )
    update = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, params), params)
    found = analyse(update.compile().as_text()).flops
    assert found == newton_schulz_flops(config, ("dense_ffn",))
    small, large = sorted((config.hidden_size, config.intermediate_size))
    others = 3 * 5 * (4 * small**2 * large + 2 * small**3)
    assert newton_schulz_flops(config) == found + others


@pytest.mark.parametrize("size", ["0.5B", "7B"])
def test_published_models_need_two_for_each_active_weight(size):
    model = upcycled_config(QWEN2P5[size], MoEConfig())
    parts = forward_flops(model, 8192)
    products = sum(parts.values()) - parts["scores"]
    weights = true_counts(model).active - model.vocab_size * model.hidden_size  # a lookup
    assert products == pytest.approx(2 * weights, rel=1e-3)  # norms and biases apart
    assert training_flops(model, 8192) == 3 * sum(parts.values())
    # Frozen parts need no gradient of their weights; tied embeddings are the head's weights.
    head = "embedding" if model.tie_word_embeddings else "lm_head"
    for freeze, kept in (((*PARTS[1:-1], head), parts["scores"]), (("norms",), None)):
        saved = 0 if kept is None else sum(parts.values()) - kept
        assert training_flops(model, 8192, freeze) == 3 * sum(parts.values()) - saved
    # A query sees itself and what came before it.
    heads = model.num_attention_heads * model.attention_head_dim
    seen = np.arange(1, 8193).mean()
    assert parts["scores"] == model.num_hidden_layers * 4 * heads * seen


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", CHIPS["v5e"].flops),
        ("TPU v5", CHIPS["v5p"].flops),
        ("TPU v5p", CHIPS["v5p"].flops),
        ("TPU v6 lite", CHIPS["v6e"].flops),
        ("TPU7x", CHIPS["tpu7x"].flops),
        ("NVIDIA H100 80GB HBM3", CHIPS["h100"].flops),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_the_devices_name(kind, peak):
    assert peak_flops(kind) == peak


def test_bandwidths_go_by_the_devices_name():
    assert peak_bandwidth("NVIDIA H100 80GB HBM3") == CHIPS["h100"].bandwidth
    assert peak_bandwidth("NVIDIA H100 PCIe") < peak_bandwidth("NVIDIA H200") == 4800e9
    assert peak_bandwidth("cpu") is peak_bandwidth("TPU v4 lite") is None
    assert set(BANDWIDTHS) <= set(PEAKS)
