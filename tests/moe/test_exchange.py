"""Experts over a mesh: one device's numbers, whatever the mesh and the skew; bounded buffers."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from finermoe_jax.moe import exchange as expert_parallel
from finermoe_jax.moe.bank import bank_of_layer
from finermoe_jax.moe.exchange import routed_experts
from pallas_kernels.expert_ffn import expert_ffn_of_run

E, F, D, W, A, B, T = 16, 8, 32, 16, 2, 8, 12


def _arguments(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((B, T, D), (B, T, A), (E, 2 * F, D), (E, F, W), (B, T, A, W))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def _experts():
    """Choices of experts: evenly, one expert alone, and few experts in falling shares."""
    even = jax.random.randint(jax.random.key(7), (B, T, A), 0, E)
    return {"even": even, "one": jnp.full_like(even, 5), "few": (even % 3) * (even % 2)}


def _mesh(*sizes):
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def _value_and_grads(placement):
    """By skew; compiled once."""
    *arguments, cotangent = _arguments()

    def loss(x, weights, gate_up, down, experts):
        y = routed_experts(x, experts, weights, bank_of_layer(gate_up, down, placement), placement)
        return (y * cotangent).sum(), y

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    results = {skew: compute(*arguments, experts) for skew, experts in _experts().items()}
    return {skew: [y, *grads] for skew, ((_, y), grads) in results.items()}


@pytest.fixture(scope="module")
def one_device():
    return _value_and_grads(ONE_DEVICE)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "sizes", [(1, 1, 8, 1), (1, 1, 2, 4), (2, 1, 4, 1), (1, 2, 4, 1), (1, 4, 2, 1), (2, 2, 1, 2)]
)
def test_one_devices_result_and_gradients(sizes, one_device):
    for skew, arrays in _value_and_grads(Placement(_mesh(*sizes))).items():
        for got, want in zip(arrays, one_device[skew], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def _ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """lax.ragged_all_to_all by its documentation.

    NaN where the sizes contradict each other, or no such rows are there.
    """
    me, place = lax.axis_index(axis_name), jnp.arange(output.shape[0])
    operands, *sent = (
        lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    devices = operands.shape[0]
    starts, sizes, targets = (x.reshape(devices, devices, -1) for x in sent)
    for source, part in np.ndindex(devices, starts.shape[2]):
        target, size = targets[source, me, part], sizes[source, me, part]
        row = jnp.clip(starts[source, me, part] + place - target, 0, operands.shape[1] - 1)
        here = (place >= target) & (place < target + size)
        here = here.reshape(-1, *(1,) * (output.ndim - 1))
        output = jnp.where(here, operands[source][row], output)
    wrong = (sizes[:, me].reshape(-1) != recv_sizes).any() | (sizes < 0).any()
    for begin, rows in ((starts, operands.shape[1]), (targets, output.shape[0])):
        wrong |= ((begin < 0) | (begin + sizes > rows)).any()
    return jnp.where(wrong, jnp.nan, output)


def _poisoned(x, count):
    """The rows that a kernel leaves unspecified, at their worst."""
    return jnp.where((jnp.arange(x.shape[0]) < count).reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _unspecified_ffn(rows, gate_up, down, sizes, weights, layer, gradients, adds):
    y, gradients = expert_ffn_of_run(rows, gate_up, down, sizes, weights, layer, gradients)
    return _poisoned(y, sizes.sum()), gradients


def _unspecified_backward(adds, saved, cotangents):
    rows, gate_up, down, sizes, weights, layer, gradients = saved

    def plain(rows, weights, gradients):
        return expert_ffn_of_run(rows, gate_up, down, sizes, weights, layer, gradients, adds=adds)

    drows, dweights, into = jax.vjp(plain, rows, weights, gradients)[1](cotangents)
    count = sizes.sum()
    return _poisoned(drows, count), None, None, None, _poisoned(dweights, count), None, into


_unspecified_ffn.defvjp(
    lambda *a: (_unspecified_ffn(*a), a[:7]),
    _unspecified_backward,
)


@pytest.mark.nightly
@pytest.mark.parametrize(("sizes", "packs"), [((1, 1, 8, 1), True), ((2, 1, 4, 1), False)])
def test_the_ragged_exchange_of_accelerators(sizes, packs, one_device, monkeypatch):
    """XLA has none on a CPU: the same offsets and sizes through one written from its documentation,
    around a kernel that leaves NaN wherever it may, with buffers that begin as NaN."""
    monkeypatch.setattr(lax, "ragged_all_to_all", _ragged_all_to_all)
    monkeypatch.setattr(
        expert_parallel, "uninitialised", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
    )
    monkeypatch.setattr(expert_parallel, "_packs", lambda _: packs)
    monkeypatch.setattr(
        expert_parallel,
        "expert_ffn_of_run",
        lambda *a, adds: _unspecified_ffn(*a[:7], adds),
    )
    for skew, arrays in _value_and_grads(Placement(_mesh(*sizes), None, "ragged")).items():
        for got, want in zip(arrays, one_device[skew], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("width", [448, 512, 896])
def test_rows_are_packed_for_a_tpu_and_unpacked(width):
    rows = jnp.arange(6 * width, dtype=jnp.int32).reshape(6, width).astype(jnp.bfloat16)
    packed = expert_parallel._packed(rows, padded=False)
    assert packed.shape == (6, 2, -(-width // 256) * 128)
    assert (expert_parallel._unpacked(packed, width) == rows).all()
    assert expert_parallel._packed(rows, padded=True).shape == rows.shape
    assert expert_parallel._packed(rows.astype(jnp.float32), padded=False).shape == rows.shape


@pytest.mark.slow
def test_tokens_that_no_axis_divides_are_computed_whole():
    experts = _experts()["few"]
    x, weights, gate_up, down, _ = _arguments()
    placement = Placement(_mesh(1, 1, 4, 2))
    cut = slice(0, 3), slice(0, 5)  # 3 rows of 5 tokens
    got, want = (
        jax.jit(lambda *a, p=p: routed_experts(*a, bank_of_layer(gate_up, down, p), p))(
            x[cut], experts[cut], weights[cut]
        )
        for p in (placement, ONE_DEVICE)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_divide_are_refused_by_name():
    mesh = _mesh(1, 1, 3, 1)
    with pytest.raises(InputError, match=r"experts: 16 experts .* expert=3; make mesh.expert a"):
        sharding.spec(("expert",), (16,), mesh, "experts")


@pytest.mark.slow
def test_no_buffer_holds_more_than_twice_a_devices_rows():
    """The program's shapes do not depend on the routing: the worst skew runs in the same ones."""
    mesh, length = _mesh(1, 1, 8, 1), 256

    def loss(x, weights, gate_up, down, experts, cotangent):
        bank = bank_of_layer(gate_up, down, Placement(mesh))
        return (routed_experts(x, experts, weights, bank, Placement(mesh)) * cotangent).sum()

    split = NamedSharding(mesh, P("expert"))  # batch and experts, so that nothing else is whole
    shapes = (
        (B, length, D),
        (B, length, A),
        (E, 2 * F, D),
        (E, F, W),
        (B, length, A),
        (B, length, A, W),
    )
    dtypes = (*(jnp.float32,) * 4, jnp.int32, jnp.float32)
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), in_shardings=(split,) * 6)
    text = grad.lower(*map(jax.ShapeDtypeStruct, shapes, dtypes)).compile().as_text()
    rows = B * length * A // 8  # a device's: many more than a kernel's block
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    # The largest are the rows in flight, of D values each, and the kernel's padding of a block.
    assert 2 * rows * D <= max(sizes) <= (2 * rows + 128) * D


@pytest.mark.slow
def test_no_row_is_dropped_in_any_round():
    """With weights and experts of ones, every row's result is a function of its own sum."""
    x, weights, gate_up, down, _ = _arguments()
    ones = jnp.ones_like(gate_up), jnp.ones_like(down)
    placement = Placement(_mesh(1, 1, 8, 1))
    bank = bank_of_layer(*ones, placement)
    run = jax.jit(lambda experts: routed_experts(x, experts, weights * 0 + 1, bank, placement))
    total = np.asarray(x).sum(axis=-1)
    expected = F * (total / (1 + np.exp(-total)) * total)
    for experts in _experts().values():
        y = run(experts)
        np.testing.assert_allclose(
            y, np.broadcast_to(expected[..., None, None], y.shape), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(
    ("platform", "kind", "devices", "padded"),
    [
        ("cpu", "cpu", 8, True),
        ("gpu", "NVIDIA H100", 8, True),
        ("tpu", "TPU v5 lite", 16, False),
        ("tpu", "TPU v5 lite", 32, True),
        ("tpu", "TPU v6 lite", 256, False),
    ],
)
def test_the_exchange_by_platform(platform, kind, devices, padded, monkeypatch):
    device = SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(expert_parallel, "platform", lambda: platform)
    monkeypatch.setattr(
        jax.sharding, "get_abstract_mesh",
        lambda: SimpleNamespace(abstract_device=device, size=devices),
    )  # fmt: skip
    assert expert_parallel.is_padded("auto") == padded
    assert expert_parallel.is_padded("padded") and not expert_parallel.is_padded("ragged")


def test_a_ragged_exchange_is_refused_on_a_cpu():
    with pytest.raises(
        InputError, match=r"train\.exchange='ragged' needs an accelerator.*has no ragged"
    ):
        sharding.exchange_named("ragged")
    assert [sharding.exchange_named(name) for name in ("auto", "padded")] == ["auto", "padded"]
