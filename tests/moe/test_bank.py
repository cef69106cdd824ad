"""A run's experts in place: its gradients are those of layers that the loop hands out as copies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from finermoe_jax.config.run import MeshConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model import stack
from finermoe_jax.model.decoder import with_layer
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.training.step import rebuild, train_step
from tests.support.training import MOE, mixture_model, random_tokens, small_run

# Two pools of two layers each.
SHARED = dataclasses.replace(
    MOE, num_hidden_layers=4, moe=dataclasses.replace(MOE.moe, experts_across=2)
)
THREE = dataclasses.replace(MOE, num_hidden_layers=3)
ROWS = 8
# data, fsdp, expert, tensor; what is changed in the settings; dtype of the weights.
CASES = {
    "one device": ((1, 1, 1, 1), {}, "float32"),
    "recomputed": ((1, 1, 1, 1), {"remat": "full"}, "float32"),
    "products kept": ((1, 1, 1, 1), {"remat": "dots"}, "float32"),
    "written out": ((1, 1, 1, 1), {"scan_unroll": 3}, "float32"),
    "microbatches": ((1, 1, 1, 1), {"grad_accumulation": 2}, "float32"),
    "bfloat16 weights": ((1, 1, 1, 1), {"remat": "full"}, "bfloat16"),
    "bfloat16 weights in microbatches": ((1, 1, 1, 1), {"grad_accumulation": 2}, "bfloat16"),
    "experts split": ((1, 1, 4, 1), {"remat": "full"}, "float32"),
    "copies of experts": ((2, 1, 2, 1), {}, "float32"),
    "copies, also over tensor": ((2, 1, 2, 2), {"remat": "full"}, "float32"),
    "pieces": ((1, 2, 2, 1), {}, "float32"),
    "copies of pieces in microbatches": ((2, 2, 1, 1), {"grad_accumulation": 2}, "float32"),
    "copies in microbatches": ((2, 1, 2, 1), {"grad_accumulation": 2}, "float32"),
}


def kept():
    """An optimizer that keeps the gradients."""
    count = optax.ScaleByScheduleState(jnp.int32(0))
    return optax.GradientTransformation(
        lambda params: (count, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, params), (count, grads)),
    )


def gradients(sizes=(1, 1, 1, 1), settings=None, stored="float32", model=None, over="layer"):
    """Every parameter's gradient by a train step, float32."""
    model = model or mixture_model(THREE)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model.placement = Placement(mesh)
    shardings, _ = sharding.param_shardings(model, mesh)
    graphdef, state = nnx.split(model)
    params = jax.tree.map(lambda p: p.astype(stored), jax.device_get(nnx.to_pure_dict(state)))
    params = jax.device_put(params, shardings)
    batch = jax.device_put(Batch(random_tokens(ROWS)), sharding.batch_sharding(mesh))
    config = small_run(ROWS, balance=dict(weight=0.1, over=over))
    train = dataclasses.replace(config.train, **(settings or {}))
    config = dataclasses.replace(config, moe=model.config.moe, train=train)
    run = functools.partial(train_step, graphdef, config, kept())
    _, (_, grads), _ = jax.jit(run)(params, kept().init(params), batch)
    flat = nnx.traversals.flatten_mapping(jax.device_get(grads))
    return {path: np.asarray(g, np.float64) for path, g in flat.items()}


SHARED_CASES = {
    "one device": ((1, 1, 1, 1), {"remat": "full"}),
    "copies in microbatches": ((2, 1, 4, 1), {"grad_accumulation": 2}),
    "pieces": ((1, 2, 2, 2), {}),
}


@pytest.fixture(scope="module")
def handed_out():
    """Of weights in each dtype, on one device, without a bank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "_bank", lambda *_: None)
        return {dtype: gradients(stored=dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(each, marks=[pytest.mark.nightly] * (each != "one device")) for each in CASES],
)
def test_gradients_are_those_of_layers_handed_out(case, handed_out):
    sizes, settings, stored = CASES[case]
    got, wanted = gradients(sizes, settings, stored), handed_out[stored]
    tolerance = 1e-5 if stored == "float32" else 1e-2
    for path, want in wanted.items():
        error = np.linalg.norm(got[path] - want) / np.linalg.norm(want)
        assert error < tolerance, (path, error)


@pytest.fixture(scope="module")
def shared_handed_out():
    """Of layers that share their experts, each given a copy of them: JAX adds the gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "_bank", lambda *_: None)
        return gradients(model=mixture_model(SHARED))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, marks=[pytest.mark.nightly] * (each == "copies in microbatches"))
        for each in SHARED_CASES
    ],
)
def test_gradients_of_shared_experts_add_up(case, shared_handed_out):
    got = gradients(*SHARED_CASES[case], model=mixture_model(SHARED))
    for path, want in shared_handed_out.items():
        error = np.linalg.norm(got[path] - want) / np.linalg.norm(want)
        assert error < 1e-5, (path, error)


@pytest.mark.nightly
def test_masks_and_balanced_pools_are_the_same_on_a_mesh_and_in_microbatches(shared_handed_out):
    given = dict(model=mixture_model(SHARED), over="pool")
    masked = dict(psr="linear", psr_start=0.0)  # half of the experts at the first step
    wanted = gradients((1, 1, 1, 1), masked, **given)
    got = gradients((2, 1, 4, 1), masked | {"grad_accumulation": 2}, **given)
    for path, want in wanted.items():
        error = np.linalg.norm(got[path] - want) / np.linalg.norm(want)
        assert error < 1e-5, (path, error)
    down = next(path for path in wanted if path[-2:] == ("moe", "down"))
    unused = [(each[down] == 0).all(axis=(2, 3)).sum() for each in (wanted, shared_handed_out)]
    assert unused[0] > unused[1] + 4, unused  # masked in both layers


@pytest.mark.slow
def test_the_bank_is_what_computes_them(monkeypatch, handed_out):
    """Checks what the comparisons above would not see: both sides taking the same way."""
    used = []

    def seen(*arguments):
        used.append(stack_bank(*arguments))
        return used[-1]

    stack_bank = stack._bank
    monkeypatch.setattr(stack, "_bank", seen)
    gradients()
    assert [bank.bank.gate_up.shape[0] for bank in used] == [3]


@pytest.mark.slow
def test_frozen_experts_leave_the_other_gradients_as_they_are():
    model = mixture_model(THREE)
    graphdef, state = nnx.split(model)
    params, tokens = nnx.to_pure_dict(state), random_tokens(2)

    def loss(params, frozen):
        features = rebuild(graphdef, params).features(tokens, frozen_experts=frozen)
        return (features.hidden**2).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    free, frozen = (nnx.traversals.flatten_mapping(grad(params, f)) for f in (False, True))
    for path, kind in kinds(model).items():
        if kind.bank:
            assert np.asarray(free[path]).any() and not np.asarray(frozen[path]).any(), path
        else:
            np.testing.assert_allclose(frozen[path], free[path], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_layer_that_computes_its_experts_otherwise_is_refused():
    class Mine(FineRMoE):
        def __call__(self, x, mask, placement=sharding.ONE_DEVICE):
            _, routing, aux_loss = super().__call__(x, mask, placement)
            self.bank = dataclasses.replace(self.bank, gradients=self.given)
            return x, routing, aux_loss

        def experts(self, placement):
            bank = super().experts(placement)
            self.given = bank.gradients
            return bank

    with pytest.raises(InputError, match="did not compute its experts with routed_experts"):
        gradients(model=with_layer(mixture_model(THREE), Mine))
