"""One optimizer step as a function of arrays, and its compilation for a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.packing import Batch, counted, masks
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import Path, kinds
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.moe.bank import Places, Summed
from finermoe_jax.training.optimizer import apply_updates, completed, learning_rate, trained


def train_step(
    graphdef: Any,
    config: RunConfig,
    tx: optax.GradientTransformation,
    params: dict,
    opt_state: Any,
    batch: Batch,
) -> tuple[dict, Any, dict[str, Array]]:
    """One optimizer step on a global batch.

    Returns params, opt_state and the step's metrics: loss, aux_loss (the sum over layers),
    grad_norm, learning_rate, skipped and tokens (of the input, without padding), float32 [];
    layer_aux_loss, float32 [L]; expert_tokens, int32 [L, E], how many tokens of the global batch
    selected each expert (L counts the MoE layers; 0 in a dense model).

    The loss is the mean cross-entropy in nats per counted target plus aux_loss_weight times the
    sum over layers of Eq. 11. With grad_accumulation = n the rows are taken in n microbatches,
    whose mean gradient is that of the whole batch: each is divided by its share of all counted
    targets, and Eq. 11 is per sequence.

    Where the loss or the gradient's norm is not finite, parameters and optimizer state stay as
    they are and `skipped` is 1: the schedule and the rounding, which go by the optimizer's count,
    take the next step as if this one had not been.
    """
    free = trained(params, config.optimizer, kinds(rebuild(graphdef, params)))
    metrics, grads = _gradients(graphdef, config, params, free, batch)
    metrics["aux_loss"] = metrics["layer_aux_loss"].sum()
    metrics["learning_rate"] = learning_rate(config.optimizer, config.train.steps)(
        updates_made(opt_state)
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"] + metrics["aux_loss"])

    def update(grads: Any, opt_state: Any, free: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, free)
        # A key per update, by the optimizer's count: a resumed run rounds as the straight one.
        key = jax.random.fold_in(jax.random.key(config.train.seed), updates_made(opt_state))
        return apply_updates(free, updates, key), opt_state

    def keep(grads: Any, opt_state: Any, free: Any) -> tuple[Any, Any]:
        return free, opt_state

    # A branch: both sides write into the donated buffers. A choice per element took 15 % longer
    # on a CPU, and half a copy of the weights.
    free, opt_state = jax.lax.cond(finite, update, keep, grads, opt_state, free)
    segments, size = batch.segment_ids, batch.tokens[:, 1:].size
    tokens = (
        jnp.float32(size) if segments is None else (segments[:, :-1] != 0).sum(dtype=jnp.float32)
    )
    metrics |= {"grad_norm": norm, "skipped": 1.0 - finite, "tokens": tokens}
    return completed(params, free), opt_state, metrics


def _gradients(
    graphdef: Any, config: RunConfig, params: dict, free: dict, batch: Batch
) -> tuple[dict[str, Array], dict]:
    """The metrics of a global batch, as `batch_loss` returns them, and its gradients by `free`."""
    parts = config.train.grad_accumulation
    if parts > 1:
        return _accumulated(graphdef, config, params, free, batch)

    def loss(free: dict) -> tuple[Array, dict[str, Array]]:
        targets = None
        if batch.segment_ids is not None:
            targets = jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0)
        return batch_loss(graphdef, config, completed(params, free), batch, targets)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(free)
    return metrics, grads


def _accumulated(
    graphdef: Any, config: RunConfig, params: dict, free: dict, batch: Batch
) -> tuple[dict[str, Array], dict]:
    """`_gradients` in microbatches.

    They add up in float32, or small ones would be lost in a long sum of bfloat16. Kernels add
    those of experts to the sums themselves (moe/bank.py's Summed).
    """
    parts, model = config.train.grad_accumulation, rebuild(graphdef, params)
    targets = None
    if batch.segment_ids is not None:
        targets = jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0) / parts
    free = nnx.traversals.flatten_mapping(free)
    banks = _banks_in_place(model, free)
    # Cast once, where each microbatch would read them wider than it computes.
    weights = {path: lax.stop_gradient(_narrowed(free[path], model.dtype)) for path in banks}

    def loss(by: dict, sums: dict, part: Batch) -> tuple[Array, dict[str, Array]]:
        summed = {path: Summed(weights[path], sums[path], by[path]) for path in banks}
        whole = nnx.traversals.unflatten_mapping(by | summed)
        total, metrics = batch_loss(graphdef, config, completed(params, whole), part, targets)
        return total / parts, metrics

    def body(carry: Any, part: Batch) -> tuple[Any, Array]:
        sums, totals = carry
        # What a bank's gradient is taken by is never read.
        by = free | {path: jnp.zeros_like(sums[path]) for path in banks}
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(by, sums, part)
        tokens = metrics.pop("expert_tokens")
        totals = jax.tree.map(lambda a, b: a + b / parts, totals, metrics)
        return ({p: g if p in banks else sums[p] + g for p, g in grads.items()}, totals), tokens

    sums = {
        path: banks[path].zeros(p) if path in banks else jnp.zeros(p.shape, jnp.float32)
        for path, p in free.items()
    }
    layers = model.config.layer_kinds.count("moe")
    totals = {"loss": jnp.float32(0), "layer_aux_loss": jnp.zeros(layers)}
    # Row r of every microbatch comes from block r of the batch, so each device keeps its rows
    # (a microbatch is a multiple of the devices that share it: check_microbatch).
    pieces = jax.tree.map(lambda x: x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1), batch)
    (sums, metrics), tokens = jax.lax.scan(body, (sums, totals), pieces)
    sums |= {path: places.total(sums[path]) for path, places in banks.items()}
    metrics["expert_tokens"] = tokens.sum(axis=0)
    grads = {path: sums[path].astype(p.dtype) for path, p in free.items()}
    return metrics, nnx.traversals.unflatten_mapping(grads)


def _narrowed(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) if dtype.itemsize < x.dtype.itemsize else x


def _banks_in_place(model: Decoder, free: dict) -> dict[Path, Places]:
    """The banks among flat parameters that are not stored in pieces, and their mesh places."""
    found = {
        path: Places.of(free[path].shape[1], model.placement)
        for path, kind in kinds(model).items()
        if kind.bank and path in free
    }
    return {path: places for path, places in found.items() if not places.pieces}


def updates_made(opt_state: Any) -> Int[Array, ""]:
    """The number of updates that an optimizer's state has seen."""
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return count


def batch_loss(
    graphdef: Any,
    config: RunConfig,
    params: dict,
    batch: Batch,
    count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The training loss of a microbatch; apart `loss`, `layer_aux_loss` and `expert_tokens`.

    The summed cross-entropy is divided by `count`; None: by the number of all targets.
    """
    model = rebuild(graphdef, params)
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    settings = config.train
    features = model.features(
        inputs, remat=settings.remat, unroll=settings.scan_unroll, **masks(batch)
    )
    total = cross_entropy_sum(
        model, features.hidden, targets, counted(batch), config.train.loss_chunk_tokens
    )
    loss = total / (targets.size if count is None else count)
    return loss + config.train.aux_loss_weight * features.aux_loss.sum(), {
        "loss": loss,
        "layer_aux_loss": features.aux_loss,
        "expert_tokens": features.expert_tokens,
    }


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
    model = rebuild(graphdef, params)
    of_state = sharding.like_params(opt_state, params, shardings, mesh)
    places = (
        sharding.row_major(params, shardings, model),
        sharding.row_major(opt_state, of_state, model),
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
