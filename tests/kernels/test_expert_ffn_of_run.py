"""expert_ffn_of_run: every implementation reads, and writes gradients, in a run of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from finermoe_jax.layers.stored import quantize
from pallas_kernels.expert_ffn import expert_ffn, expert_ffn_of_run, mosaic_tpu, unread
from tests.support.kernels import TOLERANCE, assert_close, make, truth

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
# One shape and number of rows; the last layer is visited first on the way back.
LAYERS = ["ragged", "empty groups", "all rows on the first"]
BF16, F32 = jnp.bfloat16, jnp.float32


def run_of(stored):
    """Arguments and a cotangent of each layer, and the stacks of their weights."""
    layers = [make(name, BF16 if stored == BF16 else F32, seed) for seed, name in enumerate(LAYERS)]
    stacks = [
        jnp.stack([arguments[name] for arguments, _ in layers]).astype(stored)
        for name in ("gate_up", "down")
    ]
    return layers, stacks


# Compiled once for all layers, and once more for their gradients.
one_layer = jax.jit(expert_ffn_of_run, static_argnames=("implementation", "interpret", "adds"))


def by_run(layers, stacks, before, kept, **options):
    """Output and gradients of every layer; the stacks of gradients begin as `before`."""

    def forward(each, carried):
        outputs = []
        for layer, (rows, weights) in enumerate(each):
            sizes = layers[layer][0]["group_sizes"]
            y, carried = one_layer(
                rows, *stacks, sizes, weights, jnp.int32(layer), carried, **options
            )
            outputs.append(y)
        return unread(lambda: before, outputs, carried)

    each = [(arguments["rows"], arguments["row_weights"]) for arguments, _ in layers]
    carried = tuple(jnp.zeros(s.shape, kept) for s in stacks) if before else ()
    outputs, pull = jax.vjp(forward, each, carried)
    gradients, written = pull([cotangent for _, cotangent in layers])
    return outputs, gradients, written


def compare(layers, results, sums=None, tolerance=1e-5):
    outputs, gradients, written = results
    for layer, (arguments, cotangent) in enumerate(layers):
        wanted = truth(arguments, cotangent)
        got = {
            "y": outputs[layer],
            "rows": gradients[layer][0],
            "row_weights": gradients[layer][1],
        }
        for place, name in enumerate(("gate_up", "down")):
            if not written:
                del wanted[name]
                continue
            got[name] = written[place][layer]
            idle = np.asarray(arguments["group_sizes"]) == 0
            if sums is None:
                assert not np.asarray(got[name], np.float64)[idle].any()
            else:
                wanted[name] += np.asarray(sums[place][layer], np.float64)
        assert_close(got, wanted, tolerance)


KEPT = [
    pytest.param(F32, F32, id="float32"),
    pytest.param(BF16, BF16, id="bfloat16"),
    pytest.param(BF16, F32, id="float32 gradients of bfloat16", marks=pytest.mark.nightly),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "kept"), KEPT)
@pytest.mark.parametrize("implementation", ["cpu", "reference", "tpu"])
def test_a_run_is_read_and_written_in_place(implementation, stored, kept):
    layers, stacks = run_of(stored)
    # Whatever memory holds: each of the gradients is written, once.
    before = tuple(jnp.full(s.shape, jnp.nan, kept) for s in stacks)
    interpret = implementation == "tpu"
    results = by_run(
        layers, stacks, before, kept, implementation=implementation, interpret=interpret
    )
    assert all(w.dtype == kept for w in results[2])
    compare(layers, results, tolerance=TOLERANCE[stored])


@pytest.mark.nightly
@pytest.mark.parametrize("implementation", ["cpu", "tpu"])
def test_float32_weights_under_bfloat16_rows(implementation):
    layers, stacks = run_of(F32)
    layers = [
        (a | {n: a[n].astype(BF16) for n in ("rows", "row_weights")}, dy.astype(BF16))
        for a, dy in layers
    ]
    before = tuple(jnp.full(s.shape, jnp.nan, F32) for s in stacks)
    interpret = implementation == "tpu"
    results = by_run(
        layers, stacks, before, F32, implementation=implementation, interpret=interpret
    )
    compare(layers, results, tolerance=TOLERANCE[BF16])


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "kept"), KEPT)
@pytest.mark.parametrize("implementation", ["cpu", "tpu"])
def test_gradients_are_added_where_it_says_so(implementation, stored, kept):
    layers, stacks = run_of(stored)
    rng = np.random.default_rng(0)
    sums = tuple(jnp.asarray(rng.standard_normal(s.shape), kept) for s in stacks)
    interpret = implementation == "tpu"
    results = by_run(
        layers, stacks, sums, kept, implementation=implementation, interpret=interpret, adds=True
    )
    compare(layers, results, sums, TOLERANCE[stored])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "reference", "tpu"])
def test_frozen_experts_have_no_gradient(implementation):
    layers, stacks = run_of(F32)
    interpret = implementation == "tpu"
    results = by_run(layers, stacks, (), F32, implementation=implementation, interpret=interpret)
    assert results[2] == ()
    compare(layers, results)


@pytest.mark.nightly
@pytest.mark.parametrize("adds", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("stored", [F32, BF16], ids=["float32", "bfloat16"])
def test_no_race_in_a_run(stored, adds):
    """No race, no use of memory that nothing wrote, no access out of bounds."""
    layers, stacks = run_of(stored)
    layers, stacks = layers[:2], [s[:2] for s in stacks]
    value = 1.0 if adds else jnp.nan
    before = tuple(jnp.full(s.shape, value, stored) for s in stacks)
    results = by_run(
        layers, stacks, before, stored, implementation="tpu", interpret=STRICT, adds=adds
    )
    compare(layers, results, before if adds else None, TOLERANCE[stored])


@pytest.mark.nightly
def test_hopper_reads_a_run_in_place():
    layers, stacks = run_of(BF16)
    layers, stacks = layers[:2], [s[:2] for s in stacks]
    before = tuple(jnp.full(s.shape, jnp.nan, BF16) for s in stacks)
    results = by_run(layers, stacks, before, BF16, implementation="gpu", interpret=True)
    compare(layers, results, tolerance=TOLERANCE[BF16])


@pytest.mark.nightly
def test_experts_larger_than_the_chip(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "plan_call", lambda *_, **__: None)
    monkeypatch.setitem(globals(), "one_layer", expert_ffn_of_run)  # compiled with another plan
    layers, stacks = run_of(F32)
    before = tuple(jnp.full(s.shape, jnp.nan, F32) for s in stacks)
    compare(layers, by_run(layers, stacks, before, F32, implementation="tpu", interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "reference", "tpu"])
@pytest.mark.parametrize("sizes", [[0, 2, 0, 0, 0, 1, 0, 0], [5, 0, 9, 1, 0, 3, 2, 0]])
def test_a_window_on_more_experts(implementation, sizes):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), F32)

    m, interpret, first = sum(sizes), implementation == "tpu", 5
    rows, weights = draw(m, 16), draw(m)
    gate_up, down = draw(20, 24, 16), draw(20, 12, 8)
    groups = jnp.asarray(sizes, jnp.int32)
    window = slice(first, first + len(sizes))

    def loss(how, first, rows, gate_up, down):
        y = expert_ffn(rows, gate_up, down, groups, weights, how, how == "tpu", first)
        return (y**2).sum(), y

    grad = jax.value_and_grad(loss, argnums=(2, 3, 4), has_aux=True)
    (_, wanted), grads = grad("reference", None, rows, gate_up[window], down[window])
    (_, y), got = grad(implementation, jnp.int32(first), rows, gate_up, down)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[0], grads[0], rtol=1e-4, atol=1e-3)
    for of_all, of_window in zip(got[1:], grads[1:], strict=True):
        np.testing.assert_allclose(of_all[window], of_window, rtol=1e-4, atol=1e-3)
        assert not np.delete(np.asarray(of_all), np.r_[window], axis=0).any()
    if implementation == "reference":
        return
    # Experts outside of the window, and idle ones, reach nothing.
    keep = jnp.zeros(20, bool).at[window].set(groups > 0)[:, None, None]
    poisoned = [jnp.where(keep, w, jnp.nan) for w in (gate_up, down)]
    clean = expert_ffn(rows, *poisoned, groups, weights, implementation, interpret, first)
    np.testing.assert_allclose(clean, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[0, 2, 0, 0, 0, 1, 0, 0], [5, 0, 9, 1, 0, 3, 2, 0]])
def test_int8_experts_with_scales(sizes):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), F32)

    m = sum(sizes)
    rows, weights, groups = draw(m, 16), draw(m), jnp.asarray(sizes, jnp.int32)
    gate_up, down = draw(20, 24, 16), draw(20, 12, 8)
    small = [quantize(w, (axis,)) for w, axis in ((gate_up, -1), (down, -2))]
    restored = [
        (w.values.astype(F32) * jnp.expand_dims(w.scale, axis))[5:13]
        for w, axis in zip(small, (-1, -2), strict=True)
    ]
    wanted = expert_ffn(rows, *restored, groups, weights, "reference")
    values, scales = [w.values for w in small], (small[0].scale, small[1].scale)
    got = expert_ffn(rows, *values, groups, weights, None, False, 5, scales)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="gate_up is int8"):
        expert_ffn(rows, *values, groups, weights, None, False, 5)
    with pytest.raises(ValueError, match="weights with scales are int8"):
        expert_ffn(rows, gate_up, down, groups, weights, None, False, 5, scales)
