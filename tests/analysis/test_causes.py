"""Causes of a compiled program's HBM bytes: named scopes in its text, and in a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from finermoe_jax.analysis import report
from finermoe_jax.analysis.causes import CAUSES, PHASES
from finermoe_jax.analysis.hlo_costs import LARGEST, analyse
from finermoe_jax.data.packing import Batch
from finermoe_jax.layers.parameters import trained_kinds
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import train_step
from finermoe_jax.weights.checkpoint import abstract_params
from tests.support.training import MOE, small_run

TEXT = """HloModule jit_step

%fused (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %small = f32[4]{0} slice(%x), metadata={op_name="jit(step)/while/body/attention/add"}
  ROOT %large = f32[8,4]{1,0} negate(%x), metadata={op_name="jit(step)/while/body/norms/neg"}
}

%body (a: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %v = f32[8,4]{1,0} get-tuple-element(%a), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %fusion.1 = f32[8,4]{1,0} fusion(%v), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/while/body/neg"}
  %copy.1 = f32[8,4]{1,0} copy(%fusion.1), metadata={op_name="jit(step)/while/body/attention/copy"}
  %back = f32[8,4]{1,0} negate(%copy.1), metadata={op_name="jit(step)/transpose(jvp(attention))/rematted/neg"}
  ROOT %t = (s32[], f32[8,4]) tuple(%next, %back)
}

%condition (a: (s32[], f32[8,4])) -> pred[] {
  %a = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %fast = f32[8,4]{1,0:S(1)} copy(%p), metadata={op_name="jit(step)/exchange/routed_experts/copy"}
  %t = (s32[], f32[8,4]) tuple(%zero, %p)
  %loop = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body
  %v = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %again = f32[8,4]{1,0} negate(%v), metadata={op_name="jit(step)/checkpoint/rematted_computation/loss/neg"}
  %mine = f32[8,4]{1,0} negate(%again), metadata={op_name="jit(step)/my_norms/neg"}
  ROOT %sum = f32[8,4]{1,0} add(%mine, %v), metadata={op_name="jit(step)/optimizer/add"}
}
"""  # noqa: E501


def test_a_programs_text_tells_cause_pass_and_trips():
    array = 8 * 4 * 4
    found = analyse(TEXT, fast_memory=True)
    other = found.bytes_by.pop("other: forward")
    assert found.bytes_by == {
        "norms and residual: forward": 3 * 2 * array,  # most of the fusion, in each of 3 trips
        "copies: forward": 3 * 2 * array,  # HBM to HBM
        "attention: backward": 3 * 2 * array,
        "routed experts: forward": array,  # the inner scope; to the chip's memory: only a read
        "loss: recompute": 2 * array,
        "optimizer: update": 3 * array,
    }
    assert other == 2 * array + 3 * 3 * 4  # my_norms is no scope; the loop's counter
    assert found.hbm_bytes == sum(found.bytes_by.values()) + other
    assert next(iter(found.movers)).startswith("norms and residual: forward: 3 x fusion.1 ")


@pytest.fixture(scope="module")
def step():
    """A training step of two microbatches on one device, compiled for this machine."""
    config = small_run(4, grad_accumulation=2, remat="full")
    model = with_shapes(MOE)
    params, tx = (
        abstract_params(MOE, "float32"),
        optimizer(config.optimizer, 10, trained_kinds(model)),
    )
    state = jax.eval_shape(tx.init, params)
    graphdef = nnx.split(model)[0]
    run = jax.jit(lambda p, o, b: train_step(graphdef, config, tx, p, o, b))
    batch = Batch(jax.ShapeDtypeStruct((4, 17), jnp.int32))
    return analyse(run.lower(params, state, batch).compile().as_text())


@pytest.mark.nightly
def test_a_steps_causes_sum_to_its_bytes(step):
    assert sum(step.bytes_by.values()) == pytest.approx(step.hbm_bytes, rel=1e-12)
    names, phases = zip(*(key.rsplit(": ", 1) for key in step.bytes_by), strict=True)
    assert set(names) <= set(CAUSES) and set(phases) <= set(PHASES)
    # No such layer; one device, float32; AdamW.
    unused = {"dense FFN", "weights, cast and gathered", "Newton-Schulz"}
    assert set(CAUSES) - set(names) <= unused | {"copies"}
    parts = ["attention", "norms and residual", "shared expert", "routed experts", "router", "loss"]
    for name in parts[:-1]:
        assert {f"{name}: {p}" for p in ("forward", "backward")} <= step.bytes_by.keys(), name
    assert step.bytes_by["attention: recompute"] > 0
    unnamed = sum(size for key, size in step.bytes_by.items() if key.startswith("other"))
    assert unnamed < 0.25 * step.hbm_bytes
    assert len(step.movers) <= LARGEST


@pytest.mark.nightly
def test_the_table_has_every_cause_and_the_total(step):
    text = report.bytes_by_cause(dataclasses.asdict(step))
    for key in step.bytes_by:
        assert key.rsplit(": ", 1)[0] in text
    [total] = [line.split() for line in text.splitlines() if line.startswith("total")]
    assert float(total[1]) == pytest.approx(step.hbm_bytes / 1e9, abs=1e-3)
    assert total[-1] == "100.0%"
