"""A run's programs (training, evaluation, generation) on shapes, for compilation for a target."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from finermoe_jax.analysis.params import run_model
from finermoe_jax.analysis.topology import Target
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.packing import Batch
from finermoe_jax.errors import InputError, near_misses
from finermoe_jax.evaluation.evaluate import batch_rows, summed_loss
from finermoe_jax.generation.decode import bucket, decode, prefill
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.layers import sharding
from finermoe_jax.layers.kv_cache import init_cache
from finermoe_jax.layers.sharding import Placement, per_device_bytes
from finermoe_jax.layers.stored import HostLayers
from finermoe_jax.model.decoder import Decoder, with_shapes
from finermoe_jax.model.offload import check_place, host_shapes
from finermoe_jax.training.mesh import choose_mesh, gradient_bytes
from finermoe_jax.training.optimizer import run_optimizer
from finermoe_jax.training.step import abstract_optimizer, check_microbatch, jit_step
from finermoe_jax.weights.checkpoint import abstract_params


@dataclasses.dataclass(frozen=True)
class Program:
    """A program on shapes."""

    name: str  # a key of PROGRAMS
    config: RunConfig
    model: ModelConfig
    mesh: Mesh
    notes: list[str]
    rows: int  # input rows, of data.sequence_length tokens each, or of one (decode)
    stored: str  # dtype of the weights
    parameter_bytes: int  # per device, as the next two
    gradient_bytes: int
    optimizer_bytes: int
    whole_state_bytes: int  # parameters and optimizer state, whole arrays
    lower: Callable[[], Any]
    experts: str = "device"  # offload.PLACES
    host_bytes: int = 0  # of experts in host memory; not in parameter_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters and optimizer state per device."""
        return self.parameter_bytes + self.optimizer_bytes

    @property
    def tokens(self) -> int:
        """Input tokens per run of the program."""
        return self.rows * (1 if self.name == "decode" else self.config.data.sequence_length)

    @property
    def trains(self) -> bool:
        """True if the program computes gradients."""
        return self.name == "train"


def abstract_program(
    config: RunConfig, target: Target, name: str = "train", experts: str = "device"
) -> Program:
    """Returns a config's program on a target's mesh. Allocates nothing.

    A mesh at its defaults is chosen as in training (training/mesh.py); `notes` says so. `experts`
    is one of offload.PLACES.

    Raises InputError for an unknown name, a mesh that does not match the devices, a microbatch that
    cannot be split over them, generation on more than one device, or experts that the program
    cannot have in host memory.
    """
    if name not in PROGRAMS:
        raise InputError(f"--program={name} is unknown. {near_misses(name, PROGRAMS)}")
    make = PROGRAMS[name]
    if experts != "device":
        check_place(experts, run_model(config))
        if make is not _generate:
            raise InputError(
                f"--experts={experts} needs --program=decode or prefill, but the program is "
                f"{name}: omit one of them"
            )
        if target.platform != "tpu":
            raise InputError(
                f"--experts={experts} needs a TPU, but {target.name} is {target.platform}: XLA "
                "ignores host memory when it compiles for a GPU ahead of time"
            )
        make = functools.partial(_generate, experts=experts)
    count, memory = len(target.devices), target.chip.memory
    chosen, note = choose_mesh(config, run_model(config), count, memory, target.slices)
    config = dataclasses.replace(config, mesh=chosen)
    program = make(name, config, target, sharding.make_mesh(chosen, target.devices))
    return dataclasses.replace(program, notes=[note, *program.notes]) if note else program


def _model(config: RunConfig, mesh: Mesh, dtype: str) -> tuple[Decoder, dict, dict, list[str]]:
    """Returns the decoder on shapes, its parameters in `dtype`, their shardings, and notes."""
    model = with_shapes(run_model(config))
    model.dtype = jnp.dtype(config.train.compute_dtype)
    kernel = config.train.kernel
    model.placement = Placement(mesh, None if kernel == "auto" else kernel, config.train.exchange)
    shardings, notes = sharding.param_shardings(model, mesh)
    return model, abstract_params(model.config, dtype, shardings), shardings, notes


def _lowered(jitted: Any, arguments: tuple, mesh: Mesh, target: Target) -> Callable[[], Any]:
    def lower() -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jitted.trace(*arguments).lower(lowering_platforms=(target.platform,))

    return lower


def _train(name: str, config: RunConfig, target: Target, mesh: Mesh) -> Program:
    check_microbatch(config, mesh)
    model, params, shardings, notes = _model(config, mesh, config.train.param_dtype)
    tx = run_optimizer(config, model)
    state = abstract_optimizer(tx, params, shardings, mesh)
    graphdef = nnx.split(model)[0]
    step, _ = jit_step(graphdef, config, tx, params, state, shardings, mesh)
    rows = config.data.global_batch_size
    return Program(
        name, config, model.config, mesh, notes, rows, config.train.param_dtype,
        per_device_bytes(params), gradient_bytes(config, params),
        per_device_bytes(state), whole_bytes((params, state)),
        _lowered(step, (params, state, _batch(config, rows, mesh)), mesh, target),
    )  # fmt: skip


def _evaluate(name: str, config: RunConfig, target: Target, mesh: Mesh) -> Program:
    """The held-out loss of one batch, as in training."""
    model, params, shardings, notes = _model(config, mesh, config.train.param_dtype)
    graphdef, rows = nnx.split(model)[0], batch_rows(config.data.eval_windows, mesh)
    chunk = config.train.loss_chunk_tokens
    jitted = jax.jit(
        lambda p, batch, real: summed_loss(graphdef, nnx.State(p), batch, real, chunk),
        in_shardings=(
            sharding.row_major(params, shardings, model), sharding.batch_sharding(mesh), None,
        ),
    )  # fmt: skip
    arguments = params, _batch(config, rows, mesh), jax.ShapeDtypeStruct((rows,), bool)
    return Program(
        name, config, model.config, mesh, notes, rows, config.train.param_dtype,
        per_device_bytes(params), 0, 0, whole_bytes(params),
        _lowered(jitted, arguments, mesh, target),
    )  # fmt: skip


def _generate(
    name: str, config: RunConfig, target: Target, mesh: Mesh, experts: str = "device"
) -> Program:
    """Prefill of a prompt of data.sequence_length tokens, or decoding of one token after it."""
    if mesh.size > 1:
        raise InputError(
            f"--program={name} runs on one device, but {target.name} has {mesh.size}: use "
            "--topology=v5e:1x1 and set all mesh sizes to 1"
        )
    model, params, shardings, notes = _model(config, mesh, config.train.compute_dtype)
    places, host = sharding.row_major(params, shardings, model), 0
    if experts != "device":
        params, places = host_shapes(params, places, model.config, experts)
        host = sum(
            whole_bytes(leaf)
            for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, HostLayers))
            if isinstance(leaf, HostLayers)
        )
    graphdef, length = nnx.split(model)[0], config.data.sequence_length
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, bucket(length + 1), model.dtype))
    scalars = jax.eval_shape(lambda: Sampling().scalars())
    one = jax.ShapeDtypeStruct((1,), jnp.int32)

    def first(params: dict, cache: Any, ids: Any, lengths: Any, scalars: Any) -> Any:
        return prefill(graphdef, nnx.State(params), ids, lengths, cache, scalars)

    def following(params: dict, running: Any, token: Any, scalars: Any) -> Any:
        return decode(graphdef, nnx.State(params), token, running, scalars)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        _, running = jax.eval_shape(first, params, cache, ids, one, scalars)
    function, rest = (
        (first, (cache, ids, one, scalars)) if name == "prefill" else
        (following, (running, one, scalars))
    )  # fmt: skip
    jitted = jax.jit(function, in_shardings=(places, *(None for _ in rest)), donate_argnums=1)
    total = whole_bytes(params)
    return Program(
        name, config, model.config, mesh, notes, 1, config.train.compute_dtype,
        total - host, 0, 0, total, _lowered(jitted, (params, *rest), mesh, target), experts, host,
    )  # fmt: skip


PROGRAMS: dict[str, Callable[[str, RunConfig, Target, Mesh], Program]] = {
    "train": _train,
    "eval": _evaluate,
    "prefill": _generate,
    "decode": _generate,
}


def _batch(config: RunConfig, rows: int, mesh: Mesh) -> Batch:
    tokens = jax.ShapeDtypeStruct(
        (rows, config.data.sequence_length + 1), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    return Batch(tokens, tokens if config.data.packing == "documents" else None)


def whole_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree of shapes, however they are sharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
