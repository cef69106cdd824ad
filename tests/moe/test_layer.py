"""The layer and the upcycling functions against an oracle that shares no code with them."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder, with_layer, with_params
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.moe.routing import route
from finermoe_jax.weights.upcycle import expert_down, expert_gate_up
from pallas_kernels.expert_ffn import cpu
from tests.oracles import naive
from tests.support import SMALL

VARIANTS = {
    "published": {},
    "no shared expert": dict(shared=False),
    "plain_top_k": dict(plain_top_k=True),
    "pre_softmax": dict(pre_softmax=True),
    "plain_top_k, pre_softmax": dict(plain_top_k=True, pre_softmax=True),
    "norm_topk_prob": dict(norm_topk_prob=True),
    "concat_proj routed": dict(concat_proj="routed"),
    "concat_proj all": dict(concat_proj="all"),
    "separate_routers": dict(separate_routers=True),
    "separate_routers, pre_softmax": dict(separate_routers=True, pre_softmax=True),
    "concat_proj all, no shared expert": dict(concat_proj="all", shared=False),
}
# Decisions closer than this may fall differently in float32.
GAP = 1e-4
few_examples = hypothesis.settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@st.composite
def sizes(draw, **variant):
    """Settings of any granularity; widths are kept off 1 so that no output is one number."""
    slots = 1 if variant.get("plain_top_k") else draw(st.integers(1, 4))
    slices, copies = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return naive.Settings(
        hidden_size=slots * draw(st.integers(4 if slots == 1 else 2, 6)),
        intermediate_size=slices * draw(st.integers(1, 5)),
        G_I=slices,
        G_O=slots,
        R_I=copies,
        R_O=draw(st.integers(1, 3)),
        T_I=draw(st.integers(1, min(3, slices * copies))),
        **variant,
    )


def moe_config(s):
    return MoEConfig(
        intermediate_granularity=s.G_I,
        output_granularity=s.G_O,
        intermediate_expansion=s.R_I,
        output_expansion=s.R_O,
        active_per_group=s.T_I,
        shared_expert_intermediate_size=None if s.shared else 0,
        plain_top_k=s.plain_top_k,
        pre_softmax=s.pre_softmax,
        norm_topk_prob=s.norm_topk_prob,
        concat_proj=s.concat_proj,
        separate_routers=s.separate_routers,
    )


def draw_case(s, batch, tokens, seed, dtype=np.float32):
    """Weights and tokens that dtype holds exactly, and a mask of any shape of padding."""
    rng = np.random.default_rng(seed)
    weights = {k: w.astype(dtype) for k, w in naive.random_weights(rng, s).items()}
    x = rng.standard_normal((batch, tokens, s.hidden_size)).astype(dtype)
    return weights, x, rng.random((batch, tokens)) < rng.choice([0.3, 0.8, 1.0], (batch, 1))


def parameters(weights):
    """The module's parameters from naive.py's weights."""
    ours = {
        "router": weights["gate"],
        "gate_up": np.concatenate([weights["experts_gate"], weights["experts_up"]], axis=1),
        "down": weights["experts_down"].swapaxes(1, 2),
    }
    if "group_gate" in weights:
        ours["group_router"] = weights["group_gate"]
    if "concat_proj" in weights:
        ours["concat_proj"] = weights["concat_proj"]
    if "shared_expert_gate" in weights:
        ours["shared_gate"] = weights["shared_expert_gate"][0]
        names = ("gate", "up", "down")
        ours["shared"] = {name: weights[f"shared_{name}_proj"] for name in names}
    return jax.tree.map(jnp.asarray, ours)


def weights_of(parameters):
    """naive.py's weights, or their gradients, from the module's parameters."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    gate, up = np.split(p["gate_up"], 2, axis=1)
    theirs = {
        "gate": p["router"],
        "experts_gate": gate,
        "experts_up": up,
        "experts_down": p["down"].swapaxes(1, 2),
    }
    if "group_router" in p:
        theirs["group_gate"] = p["group_router"]
    if "concat_proj" in p:
        theirs["concat_proj"] = p["concat_proj"]
    if "shared" in p:
        theirs["shared_expert_gate"] = p["shared_gate"][None]
        theirs |= {f"shared_{name}_proj": leaf for name, leaf in p["shared"].items()}
    return theirs


# Compiling takes nearly all the time.
@functools.partial(
    jax.jit, static_argnums=(0, 4), compiler_options={"xla_backend_optimization_level": 0}
)
def run(s, params, x, mask, kernel=None):
    config = ModelConfig(
        vocab_size=1,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=1,
        tie_word_embeddings=False,
        moe=moe_config(s),
    )
    module = nnx.eval_shape(lambda: FineRMoE(config, jnp.float32, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert shapes == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)(x, mask, Placement(kernel=kernel))


def gaps(s, weights, x):
    """Differences between winner and loser of every decision, and between reported neighbours."""
    x, gate = np.asarray(x, np.float64), np.asarray(weights["gate"], np.float64)
    logits = x.reshape(-1, s.hidden_size) @ gate.T
    if s.plain_top_k:
        return -np.diff(np.sort(logits)[:, ::-1][:, : s.A + 1])
    groups = logits.reshape(len(logits), s.G_O, s.R_O, -1)
    scores = groups.sum(-1)
    if s.separate_routers:
        second = np.asarray(weights["group_gate"], np.float64)
        scores = (x.reshape(-1, s.hidden_size) @ second.T).reshape(scores.shape)
    return np.concatenate(
        [
            np.diff(np.sort(logits)).ravel(),
            np.diff(np.sort(scores)[..., -2:]).ravel(),
        ]
    )


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def scaled_weights(s, weights, x, wanted):
    """The routing weights of every token, times their slot's factor."""
    scaled = np.empty(wanted["weights"].shape)
    for place in np.ndindex(x.shape[:2]):
        second = None
        if s.separate_routers:
            second = np.asarray(weights["group_gate"], np.float64) @ x[place].astype(np.float64)
        experts, mix, scale = naive.route(wanted["logits"][place], s, second)
        slots = np.asarray(experts) // (s.N // s.G_O)
        scaled[place] = mix * scale[slots]
    return scaled


@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer(variant):
    @hypothesis.settings(few_examples, max_examples=5)
    @hypothesis.given(
        s=sizes(**VARIANTS[variant]),
        batch=st.integers(1, 3),
        tokens=st.integers(4, 7),
        seed=st.integers(0, 2**31),
    )
    def check(s, batch, tokens, seed):
        weights, x, mask = draw_case(s, batch, tokens, seed)
        hypothesis.assume(gaps(s, weights, x).min(initial=1.0) > GAP)
        y, routing, aux_loss = run(s, parameters(weights), x, mask)
        wanted = naive.layer(x, weights, s)
        np.testing.assert_array_equal(routing.experts, wanted["experts"])
        assert relative(routing.logits, wanted["logits"]) < 1e-5
        assert relative(routing.weights, scaled_weights(s, weights, x, wanted)) < 1e-5
        assert relative(y, wanted["output"]) < 1e-5
        loss = naive.aux_loss(wanted["logits"], wanted["experts"], mask, s)
        np.testing.assert_allclose(aux_loss, loss, rtol=1e-5)

    check()


FIXED = dict(hidden_size=12, intermediate_size=12, G_I=3, G_O=2, R_I=2, R_O=2, T_I=2)


def fixed(variant, **changes):
    slots = 1 if VARIANTS[variant].get("plain_top_k") else 2
    return naive.Settings(**FIXED | {"G_O": slots} | VARIANTS[variant] | changes)


def clear_case(s, batch, tokens, dtype=np.float32, gap=1e-3):
    """The first seed whose decisions are all clear."""
    for seed in range(100):
        weights, x, mask = draw_case(s, batch, tokens, seed, dtype)
        if gaps(s, weights, x).min() > gap and 0 < mask.sum() < mask.size:
            return weights, x, mask
    raise AssertionError("no seed gives clear decisions")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    """Every parameter's gradient, along one direction, against differences of naive.py."""
    s = fixed(variant)
    weights, x, mask = clear_case(s, 2, 4)
    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal(x.shape)

    def loss(params, x):
        y, _, aux_loss = run(s, params, x, mask)
        return (y * jnp.asarray(cotangent, jnp.float32)).sum() + 3.0 * aux_loss

    grads, dx = jax.grad(loss, argnums=(0, 1))(parameters(weights), jnp.asarray(x))
    grads = weights_of(grads) | {"x": np.asarray(dx, np.float64)}
    exact = {k: w.astype(np.float64) for k, w in weights.items()}
    # f carries no gradient: the selection of the given weights is counted throughout.
    experts = naive.layer(x, exact, s)["experts"]

    def true_loss(changes):
        out = naive.layer(changes.get("x", x), exact | changes, s)
        np.testing.assert_array_equal(out["experts"], experts)
        return np.sum(out["output"] * cotangent) + 3.0 * naive.aux_loss(
            out["logits"], experts, mask, s
        )

    assert grads.keys() == exact.keys() | {"x"}
    for name, grad in grads.items():
        here = exact.get(name, x.astype(np.float64))
        direction = rng.standard_normal(here.shape)
        step = 1e-5
        slope = (
            true_loss({name: here + step * direction}) - true_loss({name: here - step * direction})
        ) / (2 * step)
        scale = np.linalg.norm(grad) * np.linalg.norm(direction) / np.sqrt(direction.size)
        assert scale > 0, name
        assert abs(np.sum(grad * direction) - slope) < 1e-4 * scale, name


def test_padding_changes_the_loss_only():
    s = fixed("published")
    weights, x, mask = clear_case(s, 2, 4)
    y, routing, aux_loss = run(s, parameters(weights), x, mask)
    y_all, routing_all, aux_all = run(s, parameters(weights), x, np.ones_like(mask))
    np.testing.assert_array_equal(y, y_all)
    np.testing.assert_array_equal(routing.experts, routing_all.experts)
    assert abs(aux_loss - aux_all) > 1e-3


def test_bfloat16_tokens_are_routed_in_float32():
    s = fixed("published", hidden_size=32)
    weights, x, mask = clear_case(s, 2, 6, ml_dtypes.bfloat16)
    y, routing, _ = run(s, parameters(weights), x, mask)
    wanted = naive.layer(x, weights, s)
    assert (y.dtype, routing.logits.dtype, routing.weights.dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.bfloat16,
    )
    np.testing.assert_array_equal(routing.experts, wanted["experts"])
    assert relative(routing.logits, wanted["logits"]) < 1e-5
    assert relative(routing.weights, wanted["weights"]) < 1e-2
    assert relative(y, wanted["output"]) < 1e-2


def test_tokens_do_not_depend_on_each_other():
    s = fixed("published")
    weights, x, mask = clear_case(s, 2, 4)
    y, _, _ = run(s, parameters(weights), x, mask)
    alone, _, _ = run(s, parameters(weights), x[1:, 2:3], mask[1:, 2:3])
    assert relative(alone[0, 0], y[1, 2]) < 1e-6


@pytest.mark.slow
def test_the_kernel_asked_for_computes_the_layer(monkeypatch):
    s = fixed("published")
    weights, x, mask = clear_case(s, 2, 6)
    y, _, _ = run(s, parameters(weights), x, mask, "cpu")

    def refuse(*_, **__):
        raise AssertionError("the other implementation")

    monkeypatch.setattr(cpu, "forward", refuse)
    other, _, _ = run(s, parameters(weights), x, mask, "reference")
    assert relative(other, np.asarray(y)) < 1e-6
    with pytest.raises(AssertionError, match="the other implementation"):
        run(s, parameters(weights), x, mask)


def test_one_wrong_expert_is_caught():
    """The comparisons above tell one token's swapped experts from rounding."""
    s = fixed("published")
    weights, x, mask = clear_case(s, 2, 4)
    wanted = naive.layer(x, weights, s)["output"]
    swapped = {k: w.copy() for k, w in weights.items()}
    experts = naive.layer(x, weights, s)["experts"]
    rare = np.bincount(experts.ravel(), minlength=s.N)
    rare = int(np.flatnonzero(rare == rare[rare > 0].min())[0])
    swapped["experts_down"][rare] *= 1 + 1e-3
    y, _, _ = run(s, parameters(swapped), x, mask)
    assert relative(y, wanted) > 1e-5


# --- upcycling ------------------------------------------------------------------------------


def dense_ffn(s, layers, dtype, seed):
    rng = np.random.default_rng(seed)
    h, H = s.hidden_size, s.intermediate_size
    return [
        rng.standard_normal((*layers, *shape)).astype(dtype) for shape in [(H, h), (H, h), (h, H)]
    ]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_upcycling_is_bit_equal(shared, dtype):
    @few_examples
    @hypothesis.given(s=sizes(shared=shared), seed=st.integers(0, 2**31))
    def check(s, seed):
        gate, up, down = dense_ffn(s, (), dtype, seed)
        config, wanted = moe_config(s), naive.upcycle_ffn(gate, up, down, s)
        for expert in range(s.N):
            fused = np.concatenate([wanted["experts_gate"][expert], wanted["experts_up"][expert]])
            got = expert_gate_up(gate, up, config, expert)
            np.testing.assert_array_equal(got, fused.astype(dtype), strict=True)
            got = expert_down(down, config, expert, shared)
            theirs = wanted["experts_down"][expert].T.astype(dtype)
            np.testing.assert_array_equal(got, theirs, strict=True)

    check()


def test_upcycled_layer_of_whole_copies_is_the_dense_ffn():
    """G_I = G_O = R_O = 1 without a shared expert: weights sum to 1 over equal experts."""
    s = naive.Settings(8, 12, G_I=1, G_O=1, R_I=4, R_O=1, T_I=2, shared=False)
    weights, x, mask = clear_case(s, 2, 4)
    gate, up, down = dense_ffn(s, (), np.float32, 0)
    weights |= naive.upcycle_ffn(gate, up, down, s)
    weights = {k: w.astype(np.float32) for k, w in weights.items()}
    y, _, _ = run(s, parameters(weights), x, mask)
    x64 = x.astype(np.float64)
    g = x64 @ gate.T
    wanted = (g / (1 + np.exp(-g)) * (x64 @ up.T)) @ down.T
    assert relative(y, wanted) < 1e-5


def test_settings_and_config_agree_on_the_sizes():
    s = naive.Settings(**FIXED)
    config = moe_config(s)
    assert (config.num_experts, config.num_active) == (s.N, s.A)
    assert dataclasses.replace(config, shared_expert_intermediate_size=None) == config


@pytest.mark.nightly
def test_a_subclass_of_the_layer_serves_a_whole_model():
    """One candidate group with twice the copies is the same selection as a slot's best expert."""

    class OneLevel(FineRMoE):
        def route(self, x):
            flat = dataclasses.replace(self.moe, output_expansion=1, intermediate_expansion=2)
            return route(super().route(x)[0].logits, flat, x.dtype)

    config = dataclasses.replace(
        SMALL,
        num_hidden_layers=2,
        moe=MoEConfig(4, 2, 1, 2, 1, mlp_only_layers=(1,)),
        initializer_range=0.3,
    )
    flat = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, intermediate_expansion=2, output_expansion=1)
    )
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(1))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    before = model(ids)
    changed = with_layer(model, OneLevel)
    wanted = with_params(flat, nnx.to_pure_dict(nnx.state(model)), dtype="float32")(ids)
    got = changed(ids)
    for a, b in zip(got.routing, wanted.routing, strict=True):
        np.testing.assert_array_equal(a.experts, b.experts)
    np.testing.assert_array_equal(got.logits, wanted.logits)
    assert not np.array_equal(got.logits, before.logits)
    np.testing.assert_array_equal(model(ids).logits, before.logits)  # the given one is as it was
    np.testing.assert_array_equal(with_layer(changed, FineRMoE)(ids).logits, before.logits)
