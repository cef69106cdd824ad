"""One optimizer step as a function of arrays, and its compilation for a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from finermoe_jax import sharding
from finermoe_jax.config import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.losses import cross_entropy_sum
from finermoe_jax.model import Decoder
from finermoe_jax.optim import apply_updates


def train_step(
    graphdef: Any,
    config: RunConfig,
    tx: optax.GradientTransformation,
    params: dict,
    opt_state: Any,
    batch: Int[Array, "B T1"],
) -> tuple[dict, Any, dict[str, Float[Array, ""]]]:
    """One optimizer step on a global batch of windows; inputs are [:, :-1], targets [:, 1:].

    The loss is the mean cross-entropy in nats per token plus aux_loss_weight times the sum over
    layers of Eq. 11. With grad_accumulation = n the rows are taken in n microbatches, whose mean
    gradient is that of the whole batch: windows are all full, and Eq. 11 is per sequence.

    Where the loss or the gradient's norm is not finite, parameters and optimizer state stay as
    they are and `skipped` is 1: the schedule and the rounding, which go by the optimizer's count,
    take the next step as if this one had not been.
    """
    parts = config.train.grad_accumulation
    compute = jax.value_and_grad(batch_loss, argnums=2, has_aux=True)

    def body(carry: Any, part: Int[Array, "B T1"]) -> tuple[Any, None]:
        (_, metrics), grads = compute(graphdef, config, params, part)
        return jax.tree.map(lambda a, b: a + b / parts, carry, (grads, metrics)), None

    if parts == 1:
        (_, metrics), grads = compute(graphdef, config, params, batch)
    else:
        zeros = (
            # In float32, or small gradients would be lost in a long sum of bfloat16.
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            {"loss": jnp.float32(0), "aux_loss": jnp.float32(0)},
        )
        # Row r of every microbatch comes from block r of the batch, so each device keeps its rows
        # (a microbatch is a multiple of the devices that share it: check_microbatch).
        pieces = batch.reshape(-1, parts, batch.shape[1]).swapaxes(0, 1)
        (grads, metrics), _ = jax.lax.scan(body, zeros, pieces)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"] + metrics["aux_loss"])

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        # A key per update, by the optimizer's count: a resumed run rounds as the straight one.
        key = jax.random.fold_in(jax.random.key(config.train.seed), updates_made(opt_state))
        return apply_updates(params, updates, key), opt_state

    def keep(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        return params, opt_state

    # A branch: both sides write into the donated buffers. A choice per element took 15 % longer
    # on a CPU, and half a copy of the weights.
    params, opt_state = jax.lax.cond(finite, update, keep, grads, opt_state, params)
    return params, opt_state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}


def updates_made(opt_state: Any) -> Int[Array, ""]:
    """How many updates an optimizer's state has seen."""
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return count


def batch_loss(
    graphdef: Any, config: RunConfig, params: dict, batch: Int[Array, "B T1"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The training loss of a microbatch; `loss` and `aux_loss` (summed over layers) apart."""
    model = rebuild(graphdef, params)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    features = model.features(inputs, remat=config.train.remat)
    total = cross_entropy_sum(
        model,
        features.hidden,
        targets,
        jnp.ones_like(targets, bool),
        config.train.loss_chunk_tokens,
    )
    loss = total / targets.size
    aux_loss = features.aux_loss.sum()
    return loss + config.train.aux_loss_weight * aux_loss, {"loss": loss, "aux_loss": aux_loss}


def rebuild(graphdef: Any, params: dict) -> Decoder:
    """The decoder from its graph and a pure dict of arrays."""
    return nnx.merge(graphdef, nnx.State(params))


def check_microbatch(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError when a microbatch is no multiple of the devices that share it."""
    microbatch = config.data.global_batch_size // config.train.grad_accumulation
    parts, processes = sharding.batch_parts(mesh), jax.process_count()
    if microbatch % parts:
        raise InputError(
            f"a microbatch of {microbatch} sequences (data.global_batch_size / "
            f"train.grad_accumulation) must be a multiple of the {parts} devices that share it, "
            f"in {processes} process{'es' if processes > 1 else ''}"
        )


def jit_step(
    graphdef: Any,
    config: RunConfig,
    tx: optax.GradientTransformation,
    params: dict,
    opt_state: Any,
    shardings: dict,
    mesh: Mesh,
) -> tuple[jax.stages.Wrapped, tuple[Any, Any]]:
    """train_step(params, opt_state, batch), jitted for a mesh; it consumes its first two.

    Arrays or shapes will do for params and opt_state. Returned with the Formats that both live in.
    """
    places = (
        sharding.row_major(params, shardings),
        sharding.row_major(opt_state, sharding.like_params(opt_state, params, shardings, mesh)),
    )
    step = jax.jit(
        lambda p, o, b: train_step(graphdef, config, tx, p, o, b),
        in_shardings=(*places, sharding.batch_sharding(mesh)),
        out_shardings=(*places, sharding.replicated(mesh)),
        donate_argnums=(0, 1),
    )
    return step, places


def abstract_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh
) -> Any:
    """Shapes, dtypes and shardings of the optimizer's state."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        shapes,
        sharding.like_params(shapes, params, shardings, mesh),
    )


def init_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh
) -> Any:
    """The optimizer's state for these parameters, born on its shardings."""
    abstract = abstract_optimizer(tx, params, shardings, mesh)
    return jax.jit(tx.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(
        params
    )
