"""Attention over whole sequences against NumPy that loops over queries, on every path."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.config.run import MeshConfig
from finermoe_jax.layers import causal as flash
from finermoe_jax.layers.attention import Attention
from finermoe_jax.layers.basic import rotary_angles
from finermoe_jax.layers.kv_cache import CacheUse, LayerCache
from finermoe_jax.layers.sharding import Placement, make_mesh
from tests.support import SMALL


def naive(q, k, v, sees):
    """float64, a query at a time; `sees` [B, T, T] says of which keys. Rows that see none are 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, width = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(tokens):
            keys = np.flatnonzero(sees[b, t])
            for n in range(heads if keys.size else 0):
                group = n // (heads // k.shape[2])
                scores = k[b, keys, group] @ q[b, t, n] / width**0.5
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, keys, group]
    return out


def gradients_of_naive(q, k, v, dy, sees):
    """The same by formula, in float64: dq, dk, dv."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, wide_k) / q.shape[3] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * sees[:, None]
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("btnh,bsnh->bnts", dy, wide_v)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) / q.shape[3] ** 0.5

    def of_group(wide):
        return wide.reshape(*k.shape[:3], groups, -1).sum(3)

    return (
        np.einsum("bnts,bsnh->btnh", dscores, wide_k),
        of_group(np.einsum("bnts,btnh->bsnh", dscores, q)),
        of_group(np.einsum("bnts,btnh->bsnh", weights, dy)),
    )


def draw(batch, tokens, heads, kv_heads, width, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, width), (heads, width))
    return tuple(jnp.asarray(rng.normal(size=(batch, tokens, *s)), dtype) for s in shapes)


def layouts(tokens):
    """Attention mask and segment ids, by name; two rows."""
    rng = np.random.default_rng(tokens)
    left, right = np.ones((2, tokens), np.int32), np.ones((2, tokens), np.int32)
    left[1, : tokens // 3], right[1, -(tokens // 3) :] = 0, 0
    packed = np.sort(rng.integers(0, 4, (2, tokens)), axis=1).astype(np.int32)
    return {
        "whole": (None, None),
        "left": (left, None),
        "right": (right, None),
        "packed": (None, packed),
        # A document's number may be any, and one document may hold the numbers of padding's place.
        "packed, padded": (right * left[::-1], -packed),
    }


LAYOUTS = tuple(layouts(4))


def visible(mask, ids, tokens):
    """Returns the keys that each real query sees, and which queries are real."""
    real = np.ones((2, tokens), bool) if mask is None else mask == 1
    ids = np.zeros((2, tokens), np.int32) if ids is None else ids
    sees = np.tril(np.ones((tokens, tokens), bool)) & (ids[:, :, None] == ids[:, None, :])
    return sees & real[:, None, :] & real[:, :, None], real


def attention(path, q, k, v, ids, mesh=None):
    kernel = "tpu" if path == "splash" else None
    return flash.causal_attention(q, k, v, ids, Placement(mesh, kernel), path == "splash")


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, q, k, v, ids, dy):
    y, pull = jax.vjp(lambda q, k, v: function(q, k, v, ids), q, k, v)
    return y, pull(dy)


def check(function, shape, layout, dtype=jnp.float32, tolerance=2e-6):
    """Outputs at real tokens, and gradients of what only they give, against the naive ones."""
    mask, ids = layouts(shape[1])[layout]
    sees, real = visible(mask, ids, shape[1])
    q, k, v, dy = draw(*shape, dtype)
    given = flash.segments(*(None if x is None else jnp.asarray(x) for x in (mask, ids)))
    # Whatever comes back at padding, it must not spoil what it is added to.
    y, anywhere = gradients(function, q, k, v, given, dy)
    assert all(jnp.isfinite(g).all() for g in anywhere)
    dy = jnp.where(real[:, :, None, None], dy, 0)
    y, got = gradients(function, q, k, v, given, dy)
    assert y.dtype == dtype and y.shape == q.shape
    assert jnp.isfinite(y).all()
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(np.asarray(y, np.float64)[real], naive(q, k, v, sees)[real])
    # Rows of padding see themselves in the naive one, only to divide by something.
    sees |= np.eye(shape[1], dtype=bool) & ~real[:, :, None]
    for g, wanted in zip(got, gradients_of_naive(q, k, v, dy, sees), strict=True):
        assert g.dtype == dtype
        close(np.asarray(g, np.float64), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens, heads, kv_heads", [(1, 4, 1), (16, 6, 2), (17, 3, 3), (41, 6, 2)])
def test_blocks_of_queries(monkeypatch, layout, tokens, heads, kv_heads):
    monkeypatch.setattr(flash, "QUERY_BLOCK", 16)
    check(functools.partial(attention, "blocks"), (2, tokens, heads, kv_heads, 8), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens, heads, kv_heads, width", [(200, 4, 2, 64), (128, 1, 1, 128)])
def test_splash(monkeypatch, layout, tokens, heads, kv_heads, width):
    """The TPU's kernel, interpreted: one block, and blocks with a rest."""
    monkeypatch.setattr(flash, "SPLASH_BLOCK", 128)
    check(functools.partial(attention, "splash"), (2, tokens, heads, kv_heads, width), layout)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["blocks", "splash"])
def test_bfloat16(monkeypatch, path):
    """Both round probabilities and results; gradients of k, v are summed over blocks in float32."""
    monkeypatch.setattr(flash, "QUERY_BLOCK", 16)
    monkeypatch.setattr(flash, "SPLASH_BLOCK", 128)
    function = functools.partial(attention, path)
    check(function, (2, 200, 2, 1, 64), "packed", jnp.bfloat16, tolerance=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, layout, calls",
    [(jnp.bfloat16, "whole", 1), (jnp.bfloat16, "packed", 0), (jnp.float32, "whole", 0)],
)
def test_gpu(monkeypatch, dtype, layout, calls):
    """cuDNN gets what it can take, with the right arguments: XLA computes it here by the same."""
    given = []

    def by_xla(*arguments, implementation, **options):
        assert implementation == "cudnn"
        given.append(options)
        return library(*arguments, implementation="xla", **options)

    library = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(flash, "choose", lambda *_: "gpu")
    tolerance = 2**-6 if dtype == jnp.bfloat16 else 2e-6
    # A function of its own: what is compiled under these patches is not kept for other tests.
    function = functools.partial(attention, "blocks")
    check(function, (2, 24, 6, 2, 8), layout, dtype, tolerance)
    assert len(given) == calls


def test_one_block_computes_what_attend_does():
    """Below QUERY_BLOCK nothing is split, and the numbers are those of all scores at once."""
    q, k, v, _ = draw(2, 24, 4, 2, 8)
    mask = jnp.tril(jnp.ones((2, 1, 24, 24), bool))
    np.testing.assert_array_equal(
        jax.jit(flash.causal_attention)(q, k, v, None), jax.jit(flash.attend)(q, k, v, mask)
    )


# 12 heads over tensor=4 with 2 k, v heads, each needed by two devices; 4 over 2, which divide;
# 6 over 4, which do not and stay whole; 3 rows over data=2, which stay whole.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path, sizes, batch, heads, kv_heads, layout",
    [
        ("blocks", (2, 4), 2, 12, 2, "whole"),
        ("blocks", (2, 4), 2, 12, 2, "packed, padded"),
        ("blocks", (4, 2), 4, 4, 2, "packed, padded"),
        ("blocks", (2, 4), 2, 6, 2, "packed, padded"),
        ("blocks", (2, 4), 3, 4, 1, "packed, padded"),
        ("splash", (2, 4), 2, 12, 2, "packed, padded"),
    ],
)
def test_mesh(monkeypatch, path, sizes, batch, heads, kv_heads, layout):
    monkeypatch.setattr(flash, "QUERY_BLOCK", 16)
    monkeypatch.setattr(flash, "SPLASH_BLOCK", 128)
    tokens = 40
    mesh = make_mesh(MeshConfig(data=sizes[0], tensor=sizes[1]))
    mask, ids = layouts(tokens)[layout]
    given = flash.segments(*(None if x is None else jnp.asarray(x) for x in (mask, ids)))
    if given is not None:
        given = jnp.resize(given, (batch, tokens))
    *qkv, dy = draw(batch, tokens, heads, kv_heads, 64)

    wanted = gradients(functools.partial(attention, "blocks"), *qkv, given, dy)
    function = functools.partial(attention, path, mesh=mesh)
    for got, want in zip(
        jax.tree.leaves(gradients(function, *qkv, given, dy)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mesh_gives_each_device_its_heads():
    """Twelve heads over tensor=4: three each, of one k, v head, and half of the batch."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    seen = []

    def spy(q, k, v, ids, **_):
        seen.append((q.shape, k.shape, v.shape))
        return q

    q, k, v, _ = draw(2, 8, 12, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_on_one_device", spy)
        flash.causal_attention(q, k, v, None, Placement(mesh))
    assert set(seen) == {((1, 8, 3, 8), (1, 8, 1, 8), (1, 8, 1, 8))}


@pytest.mark.parametrize("differentiate", [False, True])
def test_no_scores_of_all_pairs(differentiate):
    """Neither the program as written nor as compiled holds an array with tokens twice."""
    tokens = 2048
    q, k, v, dy = draw(1, tokens, 2, 1, 8)
    ids = jnp.zeros((1, tokens), jnp.int32)

    def both(q, k, v, dy):
        y, pull = jax.vjp(lambda *qkv: flash.causal_attention(*qkv, ids), q, k, v)
        return y, *(pull(dy) if differentiate else ())

    lowered = jax.jit(both).lower(q, k, v, dy)
    compiled = lowered.compile()
    for text in (lowered.as_text(), compiled.as_text()):
        shapes = {
            tuple(map(int, re.split("[x,]", s)))
            for s in re.findall(r"\[(\d+(?:,\d+)+)\]|tensor<(\d+(?:x\d+)+)x", text)
            for s in s
            if s
        }
        assert (1, tokens, 2, 8) in shapes or (1, tokens, 1, 8) in shapes
        assert not [s for s in shapes if np.prod(s) >= tokens**2]
    scores = 4 * flash.QUERY_BLOCK * tokens * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * scores < 4 * 2 * 2 * tokens**2 * 4


CONFIG = dataclasses.replace(SMALL, hidden_size=24, num_attention_heads=6)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_agrees_with_the_whole_sequence(side):
    """A prefill and single tokens through the cache give what the whole sequence gives."""
    tokens, split = 8, 6
    run = nnx.jit(Attention(CONFIG, jnp.float32, nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, tokens, 24)), jnp.float32)
    real = np.ones((2, tokens), np.int32)
    real[1, slice(0, 3) if side == "left" else slice(4, 6)] = 0
    mask = jnp.asarray(real)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cos, sin = rotary_angles(positions, CONFIG)
    whole, no_cache = run(x, (cos, sin), flash.segments(mask, None))
    assert no_cache is None
    empty = jnp.zeros((1, 2, 2, tokens, CONFIG.attention_head_dim))
    cache, parts = LayerCache(empty, empty), []
    for start, end in [(0, split)] + [(t, t + 1) for t in range(split, tokens)]:
        valid = (mask != 0) & (jnp.arange(tokens) < end)[None]
        y, cache = run(
            x[:, start:end],
            (cos[:, start:end], sin[:, start:end]),
            flash.segments(mask[:, start:end], None),
            cache=CacheUse(cache, jnp.int32(0), jnp.int32(start), valid),
        )
        parts.append(y)
    shown = real == 1
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1)[shown], np.asarray(whole)[shown], rtol=1e-5, atol=1e-6
    )
