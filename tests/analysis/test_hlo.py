"""Counts in compiled programs whose costs are known by hand, on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finermoe_jax.analysis import hlo
from finermoe_jax.analysis.hlo_costs import analyse, host_overlap
from tests.support import DATA

F32 = jnp.float32


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def costs(function, *shapes, slices=()):
    arguments = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    return analyse(jax.jit(function).lower(*arguments).compile().as_text(), slices)


def mapped(mesh, function, shape, spec, out=None, slices=()):
    run = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=spec if out is None else out, check_vma=False
    )
    argument = jax.ShapeDtypeStruct(shape, F32, sharding=NamedSharding(mesh, spec))
    return analyse(jax.jit(run).lower(argument).compile().as_text(), slices)


def test_a_product_counts_once_per_trip():
    def loop(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    found = costs(loop, (16, 32), (32, 32))
    assert found.matmul_flops == 7 * 2 * 16 * 32 * 32
    moved = 7 * 4 * (2 * 16 * 32 + 32 * 32)
    assert moved <= found.hbm_bytes <= 3 * moved


def test_loops_in_loops_multiply():
    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    def outer(x, w):
        return lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    assert costs(outer, (8, 16), (3, 16, 16)).matmul_flops == 15 * 2 * 8 * 16 * 16


def test_a_stack_of_weights_is_read_slice_by_slice():
    def loop(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    stack = 4 * 64 * 256 * 256
    assert stack <= costs(loop, (8, 256), (64, 256, 256)).hbm_bytes < 4 * stack


def test_an_operand_that_a_nested_fusion_renames_is_read():
    """On TPUs XLA wraps a product's operands in fusions that only bitcast."""
    text = """HloModule m

%renamed (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[8,4]{1,0} bitcast(%a)
}

%product (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,2]{1,0} parameter(1)
  %same = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%renamed
  ROOT %dot = f32[8,2]{1,0} dot(%same, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,2]{1,0} parameter(1)
  ROOT %y = f32[8,2]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
}
"""
    assert analyse(text).hbm_bytes == 4 * (8 * 4 + 4 * 2 + 8 * 2)


def test_batched_products():
    found = costs(lambda x, w: jnp.einsum("bij,bkj->bik", x, w), (3, 8, 16), (3, 5, 16))
    assert found.matmul_flops == 2 * 3 * 8 * 5 * 16


def test_trips_that_depend_on_data_are_named_and_not_counted():
    def loop(x, n):
        return lax.fori_loop(0, n.astype(jnp.int32)[0], lambda _, x: x @ x, x)

    found = costs(loop, (8, 8), (1,))
    assert found.matmul_flops == 0
    assert any("data-dependent trip count" in note for note in found.notes)


@pytest.mark.parametrize("axis", ["a", "b", ("a", "b")])
def test_all_reduce(mesh, axis):
    found = mapped(mesh, lambda x: lax.psum(x, axis), (64, 32), P(("a", "b")))
    parts = {"a": 2, "b": 4}.get(axis, 8)
    assert found.sent_bytes == {"all-reduce": 2 * (parts - 1) / parts * 4 * 8 * 32}
    assert not found.crossing_bytes


@pytest.mark.parametrize(("axis", "parts"), [("a", 2), ("b", 4)])
def test_all_gather_and_reduce_scatter(mesh, axis, parts):
    gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True)
    found = mapped(mesh, gather, (64, 32), P(("a", "b")), P())
    assert found.sent_bytes == {"all-gather": (parts - 1) * 4 * 8 * 32}
    scatter = functools.partial(lax.psum_scatter, axis_name=axis, tiled=True)
    found = mapped(mesh, scatter, (64, 32), P(("a", "b")))
    assert found.sent_bytes == {"reduce-scatter": (parts - 1) / parts * 4 * 8 * 32}


def test_all_to_all_and_permute_in_a_loop(mesh):
    def exchange(x):
        def body(x, _):
            x = lax.all_to_all(x, "b", 0, 0, tiled=True)
            return lax.ppermute(jnp.sin(x), "a", [(0, 1), (1, 0)]), None

        return lax.scan(body, x, length=3)[0]

    found = mapped(mesh, exchange, (64, 32), P(("a", "b")))
    one = 4 * 8 * 32
    assert found.sent_bytes == {"all-to-all": 3 * 3 / 4 * one, "collective-permute": 3 * one}


def test_bytes_between_slices(mesh):
    """Axis "a" goes from slice 0 (devices 0-3) to slice 1: the reduced data crosses in parts."""
    slices = (0, 0, 0, 0, 1, 1, 1, 1)
    one = 4 * 8 * 32
    found = mapped(mesh, lambda x: lax.psum(x, "a"), (64, 32), P(("a", "b")), slices=slices)
    assert not found.sent_bytes and found.crossing_bytes == {"all-reduce": one}
    found = mapped(mesh, lambda x: lax.psum(x, "b"), (64, 32), P(("a", "b")), slices=slices)
    assert not found.crossing_bytes
    found = mapped(mesh, lambda x: lax.psum(x, ("a", "b")), (64, 32), P(("a", "b")), slices=slices)
    assert found.sent_bytes == {"all-reduce": 2 * 3 / 4 * one}
    assert found.crossing_bytes == {"all-reduce": one / 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}, dim", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=2] {'z','x'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", None),
    ],
)
def test_replica_groups(text, groups):
    assert hlo.replica_groups(f", {text}, to_apply=%add", 4) == groups


# What libtpu writes, abridged: asynchronous parts of one gather, a kernel with its estimate,
# memory on the chip, a product as a convolution, a loop without a stated trip count.
TPU = (DATA / "tpu.hlo").read_text()


def test_a_tpus_text():
    found = analyse(TPU, fast_memory=True)
    assert found.matmul_flops == 3 * 2 * 1024 * 2 * 64 * 896
    assert found.kernel_flops == 3 * 1000
    assert found.sent_bytes == {"all-gather": 3 * 2 * 64 * 448, "reduce-scatter": 3 * 0.5 * 4 * 256}
    assert len(found.notes) == 0


def test_what_hosts_carry_between_slices():
    text = """HloModule jit_step, num_partitions=4

ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[256]{0}, u32[]{:S(2)}, token[]) send(%a, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[256]{0}, u32[]{:S(2)}, token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2
  %recv-done = (f32[256]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %out = f32[256]{0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501
    found = analyse(text, slices=(0,) * 4 + (1,) * 4, fast_memory=True)
    assert found.crossing_bytes == {"all-reduce": 2 * 1 / 2 * 1024}
    assert found.hbm_bytes == 2 * 1024 and not found.sent_bytes


# An instruction over several lines, whose metadata close a brace in the first column, and a loop
# that XLA has unrolled: its counter goes by two.
UNROLLED = """HloModule unrolled, num_partitions=1

%body (p: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %p = (u32[], f32[8,8]{1,0}) parameter(0)
  %n = u32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %kernel = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "512"
}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","bytes_accessed":"7"}}}
  %dot = f32[8,8]{1,0} dot(%kernel, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %two = u32[] constant(2)
  %next = u32[] add(%n, %two)
  ROOT %out = (u32[], f32[8,8]{1,0}) tuple(%next, %dot)
}

%condition (p: (u32[], f32[8,8])) -> pred[] {
  %p = (u32[], f32[8,8]{1,0}) parameter(0)
  %n = u32[] get-tuple-element(%p), index=0
  %eight = u32[] constant(8)
  ROOT %less = pred[] compare(%n, %eight), direction=LT
}

ENTRY %main (x: f32[8,8]) -> (u32[], f32[8,8]) {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %start = (u32[], f32[8,8]{1,0}) tuple(%zero, %x)
  ROOT %loop = (u32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501


def test_what_follows_a_kernels_metadata_is_counted_and_unrolled_loops_by_their_step():
    found = analyse(UNROLLED)
    assert found.kernel_flops == 4 * 100
    assert found.matmul_flops == 4 * 2 * 8**3


FROM_HOST = """
HloModule m, is_scheduled=true

ENTRY %e (w: bf16[4,8,8], x: f32[8,8]) -> f32[8,8] {
  %w = bf16[4,8,8]{2,1,0:S(5)} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %i = s32[] constant(1)
  %s = ((bf16[4,8,8]{2,1,0:S(5)}, s32[], s32[], s32[]), bf16[1,8,8]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%w, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %t = bf16[1,8,8]{2,1,0} dynamic-slice-done(%s)
  ROOT %r = f32[8,8]{1,0} add(%d, %d)
}
"""  # noqa: E501


def test_work_beside_transfers_from_host_memory():
    found = host_overlap(FROM_HOST)
    (one,) = found.transfers
    array = 8 * 8 * 4
    assert (one.bytes, one.times, one.flops) == (128, 1, 2 * 8**3)
    assert one.hbm_bytes == found.covered_bytes == 3 * array  # the product alone
    assert found.hbm_bytes == 128 + 3 * array + 3 * array
    assert found.moved_bytes == found.most_in_flight == 128
