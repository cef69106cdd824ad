"""The optimizer step as a pure function, and its compilation for a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.packing import Batch, counted, masks
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import Path, kinds, trained_kinds
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.moe.balance import updated_bias
from finermoe_jax.moe.bank import Places, Summed
from finermoe_jax.moe.psr import Reuse, reuse_at
from finermoe_jax.moe.routing import SelectionBias
from finermoe_jax.training.optimizer import apply_updates, completed, learning_rate, trained
from finermoe_jax.weights.hf_names import run_layers


def train_step(
    graphdef: Any,
    config: RunConfig,
    tx: optax.GradientTransformation,
    params: dict,
    opt_state: Any,
    batch: Batch,
) -> tuple[dict, Any, dict[str, Array]]:
    """Runs one optimizer step on a global batch.

    The loss is the mean cross-entropy in nats per counted target, plus balance.weight times the sum
    over layers of Eq. 11, plus balance.z_loss times the sum over layers of the router z-loss. With
    grad_accumulation = n, n microbatches give the gradient of the whole batch: the cross-entropy is
    divided by the batch's counted targets, and Eq. 11 is per sequence. The loss of
    balance.kind="batch" and the z-loss are means over the microbatches. That of "batch" counts the
    choices of a microbatch together with those of the earlier ones.

    With balance.kind="bias" the selection biases move after the update, by the tokens of the whole
    batch (`moe.balance.updated_bias`).

    If the loss or the gradient norm is not finite, parameters and optimizer state are unchanged and
    `skipped` is 1. Schedule and rounding depend on the optimizer's count, which does not advance.

    Returns:
      params, opt_state and metrics. float32 []: loss, aux_loss (sum over layers), z_loss (the same,
      only if balance.z_loss is positive), grad_norm, learning_rate, skipped, tokens (input tokens
      without padding). float32 [L]: layer_aux_loss. int32 [L, E]: expert_tokens, the tokens that
      selected each expert. L counts MoE layers.
    """
    model = rebuild(graphdef, params)
    free = trained(params, trained_kinds(model, config.train.freeze))
    made = updates_made(opt_state)  # the masks and the rate derive from it, like the key below
    psr = reuse_at(made, config.train, model.config.moe)
    metrics, grads = _gradients(graphdef, config, params, free, batch, psr)
    metrics["aux_loss"] = metrics["layer_aux_loss"].sum()
    if "z_loss" in metrics:
        metrics["z_loss"] = metrics["z_loss"].sum()
    metrics["learning_rate"] = learning_rate(config.optimizer, config.train.steps)(made)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"] + metrics["aux_loss"])

    def update(grads: Any, opt_state: Any, free: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, free)
        # Derived from the optimizer's count, so that a resumed run rounds identically.
        key = jax.random.fold_in(jax.random.key(config.train.seed), updates_made(opt_state))
        return apply_updates(free, updates, key), opt_state

    def keep(grads: Any, opt_state: Any, free: Any) -> tuple[Any, Any]:
        return free, opt_state

    # A branch rather than jnp.where: both sides reuse the donated buffers.
    with jax.named_scope("optimizer"):
        free, opt_state = jax.lax.cond(finite, update, keep, grads, opt_state, free)
    metrics |= {"grad_norm": norm, "skipped": 1.0 - finite, "tokens": _input_tokens(batch)}
    params = completed(params, free)
    if config.balance.kind == "bias":
        params = _with_moved_biases(model, config, params, metrics["expert_tokens"], finite)
    return params, opt_state, metrics


def _input_tokens(batch: Batch) -> Float[Array, ""]:
    """Counts a batch's input tokens without padding."""
    if batch.segment_ids is None:
        return jnp.float32(batch.tokens[:, 1:].size)
    return (batch.segment_ids[:, :-1] != 0).sum(dtype=jnp.float32)


def _with_moved_biases(
    model: Decoder,
    config: RunConfig,
    params: dict,
    tokens: Int[Array, "L E"],
    finite: Bool[Array, ""],
) -> dict:
    """Returns params with all selection biases updated, or unchanged if the step is not finite."""
    moe, rate = model.config.moe, config.balance.bias_rate
    assert moe is not None
    flat = nnx.traversals.flatten_mapping(params)
    moe_layers = [i for i, kind in enumerate(model.config.layer_kinds) if kind == "moe"]
    for path in [path for path in flat if path[-1] == "expert_bias"]:
        of_groups = (*path[:-1], "group_bias")
        layers = run_layers(model.config, path[1], path[2])
        of_run = tokens[jnp.asarray([moe_layers.index(layer) for layer in layers])]
        old = SelectionBias(flat[path], flat.get(of_groups))
        new = jax.vmap(lambda bias, tokens: updated_bias(bias, tokens, moe, rate))(old, of_run)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        flat[path] = kept.experts
        if kept.groups is not None:
            flat[of_groups] = kept.groups
    return nnx.traversals.unflatten_mapping(flat)


def _gradients(
    graphdef: Any, config: RunConfig, params: dict, free: dict, batch: Batch, psr: Reuse | None
) -> tuple[dict[str, Array], dict]:
    """Returns `batch_loss`'s metrics of a global batch, and its gradients by `free`."""
    parts = config.train.grad_accumulation
    if parts > 1:
        return _accumulated(graphdef, config, params, free, batch, psr)

    def loss(free: dict) -> tuple[Array, dict[str, Array]]:
        targets = None
        if batch.segment_ids is not None:
            targets = jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0)
        return batch_loss(graphdef, config, completed(params, free), batch, targets, psr)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(free)
    return metrics, grads


def _accumulated(
    graphdef: Any, config: RunConfig, params: dict, free: dict, batch: Batch, psr: Reuse | None
) -> tuple[dict[str, Array], dict]:
    """`_gradients` in microbatches, summed in float32; for experts by the kernels (Summed)."""
    parts, model = config.train.grad_accumulation, rebuild(graphdef, params)
    targets = None
    if batch.segment_ids is not None:
        targets = jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0) / parts
    free = nnx.traversals.flatten_mapping(free)
    banks = _banks_in_place(model, free)
    # Cast once instead of in every microbatch.
    with jax.named_scope("weights"):
        weights = {path: lax.stop_gradient(_narrowed(free[path], model.dtype)) for path in banks}

    def loss(
        by: dict, sums: dict, before: Array | None, part: Batch
    ) -> tuple[Array, dict[str, Array]]:
        summed = {path: Summed(weights[path], sums[path], by[path]) for path in banks}
        whole = completed(params, nnx.traversals.unflatten_mapping(by | summed))
        total, metrics = batch_loss(graphdef, config, whole, part, targets, psr, before)
        return total / parts, metrics

    def body(carry: Any, part: Batch) -> tuple[Any, Array]:
        sums, totals, before = carry
        # Placeholders to differentiate by; their values are never read.
        by = free | {path: jnp.zeros_like(sums[path]) for path in banks}
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(by, sums, before, part)
        tokens = metrics.pop("expert_tokens")
        with jax.named_scope("sums"):
            totals = jax.tree.map(lambda a, b: a + b / parts, totals, metrics)
            sums = {p: g if p in banks else sums[p] + g for p, g in grads.items()}
            before = None if before is None else before + tokens
        return (sums, totals, before), tokens

    with jax.named_scope("sums"):
        sums = {
            path: banks[path].zeros(p) if path in banks else jnp.zeros(p.shape, jnp.float32)
            for path, p in free.items()
        }
    layers = model.config.layer_kinds.count("moe")
    totals = {"loss": jnp.float32(0), "layer_aux_loss": jnp.zeros(layers)}
    if config.balance.z_loss and layers:
        totals["z_loss"] = jnp.zeros(layers)
    before = None
    if config.balance.kind == "batch" and model.config.moe:
        before = jnp.zeros((layers, model.config.moe.pool_size))
    # Row r of every microbatch comes from block r of the batch, so each device keeps its rows.
    pieces = jax.tree.map(lambda x: x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1), batch)
    (sums, metrics, _), tokens = jax.lax.scan(body, (sums, totals, before), pieces)
    metrics["expert_tokens"] = tokens.sum(axis=0)
    with jax.named_scope("sums"):
        sums |= {path: places.total(sums[path]) for path, places in banks.items()}
        grads = {path: sums[path].astype(p.dtype) for path, p in free.items()}
    return metrics, nnx.traversals.unflatten_mapping(grads)


def _narrowed(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) if dtype.itemsize < x.dtype.itemsize else x


def _banks_in_place(model: Decoder, free: dict) -> dict[Path, Places]:
    """Returns the expert banks among flat parameters that are not stored in pieces."""
    found = {
        path: Places.of(free[path].shape[1], model.placement)
        for path, kind in kinds(model).items()
        if kind.bank and path in free
    }
    return {path: places for path, places in found.items() if not places.pieces}


def updates_made(opt_state: Any) -> Int[Array, ""]:
    """Returns the optimizer's update count, int32 []."""
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return count


def batch_loss(
    graphdef: Any,
    config: RunConfig,
    params: dict,
    batch: Batch,
    count: Float[Array, ""] | None = None,
    psr: Reuse | None = None,
    tokens_before: Float[Array, "L E"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the total training loss of a microbatch and its metrics.

    The cross-entropy sum is divided by `count`; None: by the number of targets. `psr` masks experts
    (moe/psr.py). tokens_before as in `Decoder.features`. Metrics: `loss` (cross-entropy, []),
    `layer_aux_loss` [L], `expert_tokens` [L, E] and, if asked for, `z_loss` [L].
    """
    model, balance = rebuild(graphdef, params), config.balance
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    settings = config.train
    features = model.features(
        inputs, remat=settings.remat, unroll=settings.scan_unroll,
        frozen_experts="experts" in settings.freeze, balance=balance, psr=psr,
        tokens_before=tokens_before, **masks(batch),
    )  # fmt: skip
    total = cross_entropy_sum(
        model, features.hidden, targets, counted(batch), config.train.loss_chunk_tokens
    )
    loss = total / (targets.size if count is None else count)
    metrics = {
        "loss": loss,
        "layer_aux_loss": features.aux_loss,
        "expert_tokens": features.expert_tokens,
    }
    if balance.kind in ("sequence", "batch"):
        loss += balance.weight * features.aux_loss.sum()
    if features.z_loss is not None:
        metrics["z_loss"] = features.z_loss
        loss += balance.z_loss * features.z_loss.sum()
    return loss, metrics


def rebuild(graphdef: Any, params: dict) -> Decoder:
    """Rebuilds the decoder from its graph and a pure dict of arrays."""
    return nnx.merge(graphdef, nnx.State(params))


def check_microbatch(config: RunConfig, mesh: Mesh) -> None:
    """Raises InputError if a microbatch cannot be split evenly over the mesh."""
    microbatch = config.data.global_batch_size // config.train.grad_accumulation
    parts, processes = sharding.batch_parts(mesh), jax.process_count()
    if microbatch % parts:
        raise InputError(
            f"a microbatch of {microbatch} sequences (data.global_batch_size / "
            f"train.grad_accumulation) must be a multiple of the {parts} devices that share it, "
            f"in {processes} process{'es' if processes > 1 else ''}: change one of them"
        )


# By default XLA splits a product with a gathered weight into one per shard, and reads the
# activations again in each. On 16 v6e chips, 1.5B then moves 52 TB of HBM per step instead of 36
# (docs/scaling.md).
ON_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


def compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """Returns XLA's options for a step on several TPUs; None elsewhere.

    A libtpu that does not know them gets none: it would refuse to compile.
    """
    device = mesh.local_devices[0]
    if mesh.size == 1 or device.platform != "tpu":
        return None
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    identity = jax.jit(lambda x: x, compiler_options=ON_TPU).trace(one)
    try:
        identity.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return None
    return ON_TPU


def jit_step(
    graphdef: Any,
    config: RunConfig,
    tx: optax.GradientTransformation,
    params: dict,
    opt_state: Any,
    shardings: dict,
    mesh: Mesh,
) -> tuple[jax.stages.Wrapped, tuple[Any, Any]]:
    """Jits train_step(params, opt_state, batch) for a mesh; the first two are donated.

    params and opt_state may be arrays or shapes. Also returns the Formats of both.
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
        compiler_options=compiler_options(mesh),
    )
    return step, places


def abstract_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh | AbstractMesh
) -> Any:
    """Returns shapes, dtypes and shardings of the optimizer state."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        shapes,
        sharding.like_params(shapes, params, shardings, mesh),
    )


def init_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh
) -> Any:
    """Initialises the optimizer state directly on its shardings."""
    abstract = abstract_optimizer(tx, params, shardings, mesh)
    return jax.jit(tx.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(
        params
    )
