"""Log-likelihood and cross-entropy in chunks, without a full [tokens, vocabulary] array.

Training and the held-out loss use `cross_entropy_sum`; perplexity and the evaluation harness use
`log_likelihood` through evaluation/scoring.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.parameters import axes_of
from finermoe_jax.model.decoder import Decoder


def log_likelihood(
    logits: Float[Array, "M V"], targets: Int[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, "M V"]]:
    """Returns log p of each target and of every token, in nats, from float32 logits.

    The targets' values are taken from the logits, so that a caller who needs only a function of
    log p writes no array of it. In training it would be a fifth of the loss's HBM bytes.
    """
    top = logits.max(axis=-1, keepdims=True)
    total = jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1) - top - total
    return chosen[:, 0], logits - top - total


@jax.named_scope("loss")
def cross_entropy_sum(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk_tokens: int,
) -> Float[Array, ""]:
    """Returns the sum of -log p(target) over the masked positions, in nats, float32.

    Logits exist for chunk_tokens positions at a time on each device. Gradients are computed in the
    forward pass, while a chunk's logits exist, so nothing is recomputed. On a mesh every device
    gathers lm_head once and computes its own tokens; the tensor axis splits tokens too.
    """
    mesh, weight = model.placement.mesh, model.head[...]
    if mesh is None or mesh.size == 1:
        return _chunked(hidden, weight, targets, mask, chunk_tokens, None)
    axes = ("batch", "routed_sequence", "width")
    tokens, _ = sharding.spec(axes, hidden.shape, mesh, "hidden")
    stored, _ = sharding.spec(axes_of(model.head), weight.shape, mesh, "lm_head")

    def local(hidden: Array, weight: Array, targets: Array, mask: Array) -> Array:
        return _chunked(hidden, weight, targets, mask, chunk_tokens, stored)[None, None]

    sums = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, stored, P(*tokens[:2]), P(*tokens[:2])),
        out_specs=P(*tokens[:2]),
        check_vma=False,
    )(hidden, weight, targets, mask)
    return sums.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(
    hidden: Array, weight: Array, targets: Array, mask: Array, chunk: int, stored: P | None
) -> Array:
    def body(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _chunk_loss(piece, whole)[0], None

    whole = _whole(weight, hidden, stored)
    return lax.scan(body, jnp.float32(0), _pieces(hidden, targets, mask, chunk))[0]


def _chunked_forward(
    hidden: Array, weight: Array, targets: Array, mask: Array, chunk: int, stored: P | None
) -> tuple[Array, tuple[Array, Array]]:
    """The loss, and its gradients in hidden and in the stored part of weight."""
    whole = _whole(weight, hidden, stored)

    def body(carry: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple:
        total, dweight = carry
        h, target, real = piece
        loss, probabilities = _chunk_loss(piece, whole)
        chosen = jnp.arange(whole.shape[0])[None] == target[:, None]
        dlogits = jnp.where(real[:, None], probabilities - chosen, 0.0).astype(h.dtype)
        h, dlogits = cpu.materialized((h, dlogits))
        dh = jnp.einsum("MV,VD->MD", dlogits, whole)
        dweight += jnp.einsum("MV,MD->VD", dlogits, h, preferred_element_type=jnp.float32)
        return (total + loss, dweight), dh

    start = jnp.float32(0), jnp.zeros(whole.shape, jnp.float32)
    dh: Array
    (total, dweight), dh = lax.scan(body, start, _pieces(hidden, targets, mask, chunk))
    dh = dh.reshape(-1, hidden.shape[2])[: targets.size].reshape(hidden.shape)
    for place, entry in enumerate(stored or ()):
        # One mesh axis at a time: a TPU turns several into an all-reduce.
        for name in sharding.mesh_axes(entry):
            if lax.axis_size(name) > 1:
                dweight = lax.psum_scatter(dweight, name, scatter_dimension=place, tiled=True)
    return total, (dh, dweight.astype(weight.dtype))


_chunked.defvjp(
    _chunked_forward,
    lambda chunk, stored, grads, g: (*((g * x).astype(x.dtype) for x in grads), None, None),
)


def _whole(weight: Array, hidden: Array, stored: P | None) -> Float[Array, "V D"]:
    cast = weight.astype(hidden.dtype)
    return cast if stored is None else sharding.gather_inside(cast, stored)


def _pieces(hidden: Array, targets: Array, mask: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Cuts the tokens of all rows into chunks [N, chunk, ...]; padding of the last is masked."""
    chunk = max(1, min(targets.size, chunk))
    pad = -targets.size % chunk

    def cut(x: Array) -> Array:
        x = x.reshape(targets.size, *x.shape[2:])
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    return cut(hidden), cut(targets), cut(mask)


def _chunk_loss(
    piece: tuple[Array, Array, Array], weight: Float[Array, "V D"]
) -> tuple[Float[Array, ""], Float[Array, "M V"]]:
    """Returns a chunk's summed loss and p of every token."""
    h, target, real = piece
    logits = jnp.einsum("MD,VD->MV", h, weight, preferred_element_type=jnp.float32)
    chosen, log_p = log_likelihood(logits, target)
    return -jnp.where(real, chosen, 0.0).sum(), jnp.exp(log_p)
