"""Causal attention over whole sequences, in blocks of queries, and for single decoding queries.

A token sees itself and the earlier tokens of its segment. All padding is one segment.

    TPU  JAX's splash attention kernel, with or without segments
    GPU  cuDNN's kernel for 16-bit types without segments, as in training with packed streams;
         its public API supports no segments. JAX's Mosaic GPU kernel supports none either and has
         no causal backward pass. All other cases use blocks of queries.
    CPU  blocks of queries, each against all keys

Axis letters: config/model.py; here G is the number of queries that share one k, v head, and Q
counts these queries over all tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.sharding import ONE_DEVICE, Placement
from pallas_kernels.platform import Implementation, choose

PADDING = jnp.iinfo(jnp.int32).min  # segment of padding
# Queries per block without a kernel. On a CPU faster than 512, and much faster than one block.
QUERY_BLOCK = 256
SPLASH_BLOCK, LANES = 512, 128


def segments(
    attention_mask: Int[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"] | None:
    """Returns each token's segment, PADDING where attention_mask is 0; None: a single segment."""
    if attention_mask is None:
        return segment_ids
    return jnp.where(attention_mask != 0, 0 if segment_ids is None else segment_ids, PADDING)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    placement: Placement = ONE_DEVICE,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over each query's visible keys; N / K queries share k, v.

    On a mesh each device attends to its shard of batch and heads (sharding.RULES). Query heads that
    do not divide stay whole; k, v heads that do not divide are repeated as little as possible.

    Args:
      q: queries, rotated; float32 or bfloat16, the result's dtype.
      k: keys, rotated.
      v: values.
      segment_ids: None: one segment, no padding.
      placement: mesh and kernel; "cpu" and "reference" use blocks of queries on any platform.
      interpret: runs the TPU kernel in interpret mode on any platform; placement must name it.

    Raises:
      NotImplementedError: no kernel for this platform, or placement names another platform's.
    """
    mesh, kernel = placement.mesh, placement.kernel
    local = functools.partial(_on_one_device, kernel=kernel, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return local(q, k, v, segment_ids)
    split, _ = sharding.spec(("batch", "sequence", "heads", "head_dim"), q.shape, mesh, "queries")
    parts = q.shape[2] // NamedSharding(mesh, split).shard_shape(q.shape)[2]
    # N is a multiple of K and of parts, thus of what K becomes: every device has whole groups.
    copies = math.lcm(k.shape[2], parts) // k.shape[2]
    k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, split, P(*split[:2])),
        out_specs=split,
        check_vma=False,
    )
    return mapped(q, k, v, segment_ids)


def _on_one_device(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    kernel: Implementation | None,
    interpret: bool,
) -> Array:
    match choose(kernel, interpret):
        case "tpu":
            return _splash(q, k, v, segment_ids, interpret)
        case "gpu" if segment_ids is None and q.dtype.itemsize == 2 and not q.shape[-1] % 8:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return _blocked(q, k, v, segment_ids)


def _splash(q: Array, k: Array, v: Array, segment_ids: Array | None, interpret: bool) -> Array:
    """The splash kernel. It needs whole blocks; padding is added after all real queries."""
    tokens, heads, width = q.shape[1:]
    block, padded = _even_blocks(tokens, SPLASH_BLOCK, LANES)
    # Unfused, the backward pass computes scores twice but stores no dq per block of keys.
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        return kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))

    q, k, v = (jnp.einsum("BTNH->BNTH", _pad(x, padded)) for x in (q * width**-0.5, k, v))
    y = jax.vmap(one)(q, k, v, None if segment_ids is None else _pad(segment_ids, padded))
    return jnp.einsum("BNTH->BTNH", y)[:, :tokens]


def _blocked(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """Attends one block of queries at a time to all keys, in the backward pass too."""
    batch, tokens = q.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    block, padded = _even_blocks(tokens, QUERY_BLOCK)
    # float32, so that gradients of k, v are summed over blocks in float32.
    keys, values = (x if padded == block else x.astype(jnp.float32) for x in (k, v))

    def rows(block: tuple[Array, Array, Array]) -> Array:
        q, slots, ids = block
        mask = (jnp.arange(tokens)[None, :] <= slots[:, None])[None]
        mask &= ids[:, :, None] == segment_ids[:, None, :]
        return attend(q, keys.astype(q.dtype), values.astype(q.dtype), mask[:, None])

    slots = jnp.arange(padded)
    if padded == block:
        return rows((q, slots, segment_ids))
    stacked = (
        jnp.moveaxis(_pad(x, padded).reshape(batch, -1, block, *x.shape[2:]), 1, 0)
        for x in (q, segment_ids)
    )
    qs, ids = stacked
    y = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), (qs, slots.reshape(-1, block), ids))
    return jnp.moveaxis(y, 0, 1).reshape(batch, padded, *q.shape[2:])[:, :tokens]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v, all scores at once, in float32; N / K queries share k, v.

    The queries of one k, v head are stacked along the token axis, so both products are plain
    batched matmuls. Masked scores are finite, so a fully masked row gives no NaN.
    """
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    q = jnp.einsum("BTKGH->BKGTH", q).reshape(batch, kv_heads, -1, width)
    k, v = jnp.einsum("BSKH->BKSH", k), jnp.einsum("BSKH->BKSH", v)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    mask = jnp.tile(mask, (1, 1, heads // kv_heads, 1))
    scores = jnp.where(mask, scores / width**0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("BKQS,BKSH->BKQH", probabilities, v)
    y = y.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    return jnp.einsum("BKGTH->BTKGH", y).reshape(batch, tokens, heads, width)


def attend_one(
    q: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 N H"]:
    """Returns softmax(q k^T / sqrt(H)) v of one query per row over visible slots, in float32."""
    batch, _, heads, width = q.shape
    kv_heads = keys.shape[1]
    f32 = jnp.float32
    keys, values = cpu.widened(keys), cpu.widened(values)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width).astype(keys.dtype)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, keys, preferred_element_type=f32)
    scores = jnp.where(visible[:, None, None], scores / width**0.5, jnp.finfo(f32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    y = jnp.einsum("BKGS,BKSH->BKGH", probabilities, values)
    return y.reshape(q.shape).astype(q.dtype)


def _even_blocks(tokens: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """Returns the size of equal blocks of at most `most` that hold the tokens, and their sum."""
    blocks = -(-tokens // most)
    block = -(-tokens // (blocks * multiple)) * multiple
    return block, blocks * block


def _pad(x: Array, tokens: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
