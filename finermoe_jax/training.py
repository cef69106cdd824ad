"""Training: start or resume, step, score, save."""

import contextlib
import dataclasses
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from finermoe_jax import data, plot, sharding
from finermoe_jax.checkpoint import (
    TrainingCheckpoints,
    abstract_params,
    load_model,
    newest_checkpoint,
    read_description,
)
from finermoe_jax.config import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.files import find
from finermoe_jax.generation import complete
from finermoe_jax.hf_config import read_json
from finermoe_jax.hf_weights import copy_tokenizer, with_shapes
from finermoe_jax.losses import cross_entropy_sum
from finermoe_jax.model import Decoder
from finermoe_jax.optim import learning_rate, optimizer
from finermoe_jax.tokenizers import load_tokenizer
from finermoe_jax.upcycle import cast, upcycle_model, upcycled_config
from pallas_kernels.platform import Implementation, platform

# --- the step -------------------------------------------------------------------------------


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
        # Row r of every microbatch comes from block r of the batch, so each device keeps its rows.
        pieces = batch.reshape(-1, parts, batch.shape[1]).swapaxes(0, 1)
        (grads, metrics), _ = jax.lax.scan(body, zeros, pieces)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, metrics | {"grad_norm": optax.tree.norm(grads)}


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


# --- scoring --------------------------------------------------------------------------------


def held_out_loss(model: Decoder, windows: data.Windows, count: int, chunk_tokens: int) -> float:
    """Mean cross-entropy, nats per token, of the first `count` windows; float64 sum on the host."""
    graphdef, state = nnx.split(model)
    count = min(count, len(windows))
    rows = min(16, count)
    total = 0.0
    for start in range(0, count, rows):
        batch = np.zeros((rows, windows.length + 1), np.int32)
        real = np.arange(rows) < count - start
        batch[real] = [windows[start + i] for i in range(real.sum())]
        total += float(_score(graphdef, state, batch, real, chunk_tokens))
    return total / (count * windows.length)


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk_tokens"))
def _score(
    graphdef: Any, state: Any, batch: Array, real: Array, chunk_tokens: int
) -> Float[Array, ""]:
    """Summed cross-entropy of the real rows of a batch of windows [B, T + 1]."""
    model = nnx.merge(graphdef, state)
    hidden = model.features(batch[:, :-1]).hidden
    targets = batch[:, 1:]
    mask = jnp.broadcast_to(real[:, None], targets.shape)
    return cross_entropy_sum(model, hidden, targets, mask, chunk_tokens)


# --- the run --------------------------------------------------------------------------------


@dataclasses.dataclass
class _Start:
    """What a fresh run begins with: the model, and the dense one it was made of, if any."""

    model: Decoder
    dense: Decoder | None
    tokenizer_files: Path


def train(config: RunConfig, workdir: Path, say: Callable[[str], None] = print) -> None:
    """Runs or resumes the training that `config` describes, in `workdir`.

    Writes config.json, metrics.jsonl, evals.jsonl, samples.jsonl, checkpoints/, tokenizer/ and
    loss.png. A resumed run needs the workdir and the text, not init_from.

    Raises InputError for whatever is wrong with the input, before the first step.
    """
    workdir = workdir.absolute()
    mesh = sharding.make_mesh(config.mesh)
    parts = sharding.batch_parts(mesh)
    microbatch = config.data.global_batch_size // config.train.grad_accumulation
    if microbatch % parts:
        raise InputError(
            f"a microbatch of {microbatch} sequences (data.global_batch_size / "
            f"train.grad_accumulation) must be a multiple of the {parts} devices that share it"
        )
    kernel = _kernel(config)
    _claim(workdir, config)
    newest = newest_checkpoint(workdir / "checkpoints")
    start = _start(config) if newest is None else _restart(config, newest, workdir)
    start.model.kernel = kernel
    model_config = start.model.config
    length = config.data.sequence_length
    if length > model_config.max_position_embeddings:
        raise InputError(
            f"data.sequence_length={length} exceeds the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    tokenizer = load_tokenizer(start.tokenizer_files, model_config.vocab_size)
    if not config.data.path:
        raise InputError("data.path is empty; name a .txt or .jsonl file to train on")
    documents = data.read_documents(find(config.data.path))
    tokens = data.tokenize(documents, tokenizer, show_progress=True)
    windows, held_out = data.split_held_out(tokens, config.data)
    for prompt in config.prompts:
        complete(start.model, tokenizer, prompt, config.prompt_tokens, 0.0, 0)  # checks it
    _prepare(workdir, config, start.tokenizer_files)
    start.tokenizer_files = workdir / "tokenizer"

    with contextlib.closing(
        TrainingCheckpoints(workdir / "checkpoints", config.train.keep_checkpoints)
    ) as checkpoints:
        _run(config, workdir, mesh, start, tokenizer, (windows, held_out), checkpoints, say)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"peak memory {peak:.2f} GiB · loss curve in {plot.draw_loss(workdir)}")


def _run(
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    start: _Start,
    tokenizer: Any,
    text: tuple[data.Windows, data.Windows],
    checkpoints: TrainingCheckpoints,
    say: Callable[[str], None],
) -> None:
    """Everything between checked input and the last checkpoint."""
    log, (windows, held_out) = _Log(workdir), text
    shardings, notes = sharding.param_shardings(start.model, mesh)
    for note in notes:
        say(note)
    graphdef, state = nnx.split(start.model)
    tx = optimizer(config.optimizer, config.train.steps)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    say(
        f"{count:,} parameters · {len(windows):,} training and {len(held_out)} held-out windows "
        f"of {windows.length} tokens · mesh {dict(mesh.shape)} · {workdir}"
    )

    def report(name: str, model: Decoder, step: int) -> None:
        if len(held_out):
            loss = held_out_loss(
                model, held_out, config.data.eval_windows, config.train.loss_chunk_tokens
            )
            log.evaluation(name, step, loss)
            say(f"held-out loss  {name:<28} {loss:.4f}  (perplexity {np.exp(loss):.2f})")
        for prompt in config.prompts:
            words = "".join(complete(model, tokenizer, prompt, config.prompt_tokens, 0.0, 0))
            log.sample(name, step, prompt, words)
            say(f"  {prompt!r} → {words!r}")

    first = checkpoints.latest_step()
    log.cut(-1 if first is None else first)
    if first is None:
        if start.dense is not None:
            report("dense base", start.dense, 0)
        start.dense = None
        params = jax.device_put(nnx.to_pure_dict(state), shardings)
        opt_state = _init_optimizer(tx, params, shardings, mesh)
        report("step 0", rebuild(graphdef, params), 0)
        checkpoints.save(0, start.model, params, opt_state, start.tokenizer_files)
        first = 0
    else:
        target = abstract_params(start.model.config, config.train.param_dtype, shardings)
        params, opt_state = checkpoints.restore(
            first, target, _abstract_optimizer(tx, target, shardings, mesh)
        )
        say(f"resumed from step {first} of {config.train.steps}")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    start.model = nnx.merge(graphdef, abstract)  # free the weights that params now holds
    del state

    params, _ = _loop(
        config, mesh, graphdef, start, tx, params, opt_state, shardings, windows, first,
        checkpoints, log, report,
    )  # fmt: skip
    if not log.has_evaluation(config.train.steps):  # a kill may have come just before it
        report(f"step {config.train.steps}", rebuild(graphdef, params), config.train.steps)


def _loop(
    config: RunConfig, mesh: Mesh, graphdef: Any, start: _Start,
    tx: optax.GradientTransformation, params: dict, opt_state: Any, shardings: dict,
    windows: data.Windows, first: int, checkpoints: TrainingCheckpoints, log: "_Log",
    report: Callable[[str, Decoder, int], None],
) -> tuple[dict, Any]:  # fmt: skip
    """Steps first … steps - 1, with logging, held-out scores and saves on the way."""
    settings, steps = config.train, config.train.steps
    places = (
        sharding.row_major(params, shardings),
        sharding.row_major(opt_state, sharding.like_params(opt_state, shardings, mesh)),
    )
    params, opt_state = jax.device_put((params, opt_state), places, donate=True)
    rows = sharding.batch_sharding(mesh)
    step_fn = jax.jit(
        lambda p, o, b: train_step(graphdef, config, tx, p, o, b),
        in_shardings=(*places, rows),
        out_shardings=(*places, sharding.replicated(mesh)),
        donate_argnums=(0, 1),
    )
    schedule = learning_rate(config.optimizer, steps)
    batches = _global_batches(config, windows, first, rows)
    tokens_per_step = config.data.global_batch_size * config.data.sequence_length
    bar = tqdm(
        total=steps, initial=first, desc="training", unit="step", file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
    )  # fmt: skip
    clock, since = time.perf_counter(), first
    for step in range(first + 1, steps + 1):
        params, opt_state, metrics = step_fn(params, opt_state, next(batches))
        if step % settings.log_every == 0 or step == steps:
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            speed = (step - since) * tokens_per_step / (now - clock)
            clock, since = now, step
            # The rate that this step used: Optax counts updates from 0.
            rate = float(schedule(step - 1))
            log.metrics({"step": step, **values, "learning_rate": rate, "tokens_per_second": speed})
            bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if step % settings.checkpoint_every == 0 or step == steps:
            checkpoints.save(step, start.model, params, opt_state, start.tokenizer_files)
        if step % settings.eval_every == 0 and step < steps:
            report(f"step {step}", rebuild(graphdef, params), step)
            clock, since = time.perf_counter(), step
    bar.close()
    return params, opt_state


def _global_batches(
    config: RunConfig, windows: data.Windows, first: int, rows: jax.sharding.NamedSharding
) -> Iterator[Array]:
    """Batches [B, T + 1] over all devices, made of each process's own rows."""
    local = data.train_batches(
        windows, config.data, first, jax.process_index(), jax.process_count()
    )
    shape = (config.data.global_batch_size, config.data.sequence_length + 1)
    for batch in local:
        yield jax.make_array_from_process_local_data(rows, np.asarray(batch), shape)


def _abstract_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh
) -> Any:
    """Shapes, dtypes and shardings of the optimizer's state."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        shapes,
        sharding.like_params(shapes, shardings, mesh),
    )


def _init_optimizer(
    tx: optax.GradientTransformation, params: dict, shardings: dict, mesh: Mesh
) -> Any:
    abstract = _abstract_optimizer(tx, params, shardings, mesh)
    return jax.jit(tx.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(
        params
    )


def _kernel(config: RunConfig) -> Implementation | None:
    """The implementation of the experts that train.kernel names; None: by the platform."""
    kernel = config.train.kernel
    if kernel == "auto":
        return None
    if kernel in ("tpu", "gpu") and kernel != platform():
        raise InputError(
            f"train.kernel={kernel!r} runs on a {kernel} and the devices here are {platform()}: "
            'set train.kernel="auto"'
        )
    return kernel


def _start(config: RunConfig) -> _Start:
    """The model before training: upcycled from init_from, taken as it is, or random."""
    compute, stored = jnp.dtype(config.train.compute_dtype), jnp.dtype(config.train.param_dtype)
    key = jax.random.key(config.train.seed)
    tokenizer = find(config.data.tokenizer) if config.data.tokenizer else None
    if not config.init_from:
        if tokenizer is None:
            raise InputError("training from scratch needs data.tokenizer, a directory with one")
        assert config.model is not None
        model_config = dataclasses.replace(config.model, moe=config.moe)
        build = nnx.jit(
            lambda key: Decoder(
                model_config, dtype=compute, param_dtype=stored, rngs=nnx.Rngs(params=key)
            )
        )
        return _Start(build(key), None, tokenizer)
    source, files = load_model(find(config.init_from))
    if config.model is not None:
        _check_agreement(config, source)
    source = cast(source, stored, compute)
    if config.moe is None or source.config.moe is not None:
        if config.moe is not None:
            wanted = upcycled_config(source.config, config.moe)
            _refuse_differences(
                f"{config.init_from} is a mixture already and contradicts config.moe",
                dataclasses.asdict(source.config),
                dataclasses.asdict(wanted),
                "change config.moe, or start from a dense model",
            )
        return _Start(source, None, tokenizer or files)
    return _Start(upcycle_model(source, config.moe, key), source, tokenizer or files)


def _restart(config: RunConfig, checkpoint: Path, workdir: Path) -> _Start:
    """What a resumed run begins with: shapes alone, and the tokenizer that the workdir keeps."""
    model_config, _, _ = read_description(checkpoint)
    model = with_shapes(model_config)
    model.dtype = jnp.dtype(config.train.compute_dtype)
    return _Start(model, None, workdir / "tokenizer")


def _check_agreement(config: RunConfig, source: Decoder) -> None:
    found = dataclasses.asdict(source.config)
    assert config.model is not None
    stated = dataclasses.asdict(config.model)
    for free in ("moe", "initializer_range"):
        found.pop(free), stated.pop(free)
    found["head_dim"] = source.config.attention_head_dim
    stated["head_dim"] = config.model.attention_head_dim
    if source.config.moe is not None:
        found.pop("tie_word_embeddings"), stated.pop("tie_word_embeddings")
    _refuse_differences(
        f"{config.init_from} is not the model that config.model states",
        found,
        stated,
        "set config.model to the source's sizes, or to None to take them over",
    )


def _refuse_differences(what: str, found: dict, stated: dict, way_out: str) -> None:
    old, new = _flatten(found), _flatten(stated)
    differences = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} in the config"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise InputError(what + "\n  " + "\n  ".join(differences) + f"\n{way_out}")


def _flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


# --- the workdir ----------------------------------------------------------------------------


def _claim(workdir: Path, config: RunConfig) -> None:
    """Refuses a directory that holds something else, or a run with another config."""
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise InputError(f"{workdir} is a file; give a directory as --workdir")
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        _refuse_differences(
            f"{workdir} holds a run with another config",
            read_json(workdir / "config.json"),
            dataclasses.asdict(config),
            "give a new --workdir, or the config that the run began with",
        )
    elif any(workdir.iterdir()):
        raise InputError(f"{workdir} is not empty and holds no run; give a new --workdir")


def _prepare(workdir: Path, config: RunConfig, tokenizer_files: Path) -> None:
    """Makes the workdir: config.json, checkpoints/, and tokenizer/, which a resumed run uses."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / ".config.json.partial"
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.rename(workdir / "config.json")
    (workdir / "checkpoints").mkdir(exist_ok=True)
    (workdir / "tokenizer").mkdir(exist_ok=True)
    if tokenizer_files != workdir / "tokenizer":
        copy_tokenizer(tokenizer_files, workdir / "tokenizer")


class _Log:
    """The workdir's JSON-lines files; only the first process writes them."""

    def __init__(self, workdir: Path):
        self.workdir = workdir

    def _append(self, file: str, values: dict) -> None:
        if jax.process_index() == 0:
            with (self.workdir / file).open("a") as stream:
                stream.write(json.dumps(values) + "\n")

    def metrics(self, values: dict) -> None:
        self._append("metrics.jsonl", values)

    def evaluation(self, name: str, step: int, loss: float) -> None:
        self._append("evals.jsonl", {"name": name, "step": step, "loss": loss})

    def has_evaluation(self, step: int) -> bool:
        return any(
            e["name"] == f"step {step}" for e in plot.read_lines(self.workdir / "evals.jsonl")
        )

    def sample(self, name: str, step: int, prompt: str, text: str) -> None:
        self._append("samples.jsonl", {"name": name, "step": step, "prompt": prompt, "text": text})

    def cut(self, step: int) -> None:
        """Drops what an interrupted run logged after the step that is resumed from."""
        if jax.process_index() != 0:
            return
        for file in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
            path = self.workdir / file
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut short by a kill
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.rename(path)
