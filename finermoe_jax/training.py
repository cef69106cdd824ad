"""Training: start or resume, step, score, save."""

import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from finermoe_jax import data, distributed, plot, sharding
from finermoe_jax.checkpoint import (
    TrainingCheckpoints,
    abstract_params,
    load_model,
    newest_checkpoint,
    read_description,
)
from finermoe_jax.config import RunConfig
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.evaluation import held_out_loss
from finermoe_jax.files import find
from finermoe_jax.generation import complete
from finermoe_jax.guard import Guard
from finermoe_jax.hf_weights import with_shapes
from finermoe_jax.integrity import set_aside_damaged
from finermoe_jax.model import Decoder
from finermoe_jax.optim import learning_rate, optimizer
from finermoe_jax.preemption import EXIT_CODE, stop_requests
from finermoe_jax.sharding import Placement
from finermoe_jax.step import (
    abstract_optimizer,
    check_microbatch,
    init_optimizer,
    jit_step,
    rebuild,
    updates_made,
)
from finermoe_jax.tokenizers import load_tokenizer
from finermoe_jax.upcycle import cast, upcycle_model, upcycled_config
from finermoe_jax.workdir import (
    Lock,
    Log,
    claim,
    find_shared,
    prepare,
    refuse_differences,
    way_on,
)
from pallas_kernels.platform import Implementation, platform


@dataclasses.dataclass
class _Start:
    """What a fresh run begins with: the model, and the dense one it was made of, if any."""

    model: Decoder
    dense: Decoder | None
    tokenizer_files: Path


def train(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None] = print,
    allow_changes: Sequence[str] = (),
) -> None:
    """Runs or resumes the training that `config` describes, in `workdir`.

    Writes config.json, metrics.jsonl, evals.jsonl, samples.jsonl, checkpoints/, tokenizer/ and
    loss.png. A resumed run needs the workdir and the text, not init_from.

    With several processes all of them call this, with the same arguments and a workdir that they
    share; the first one writes and speaks.

    Args:
      config: the run.
      workdir: a new directory, or that of a run to go on with.
      say: what is told along the way.
      allow_changes: fields of the config (dotted, or groups) that may differ from the run's.

    Raises InputError for whatever is wrong with the input, before the first step, and on every
    process alike; RunEnded when the run must end early: asked to by a signal, the disk full, the
    loss not finite.
    """
    workdir = workdir.absolute()
    first = jax.process_index() == 0
    if not first:
        say = _silent
    stated = json.dumps([dataclasses.asdict(config), str(workdir), list(allow_changes)])
    distributed.same(stated, "was started with another config or --workdir than process 0")
    with contextlib.closing(Lock(workdir)) as lock:
        _train(config, workdir, say, allow_changes, lock)
    if first:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        say(f"peak memory {peak:.2f} GiB · loss curve in {plot.draw_loss(workdir)}")


def _silent(message: str) -> None:
    """What processes other than the first say."""


def _train(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None],
    allow_changes: Sequence[str],
    lock: Lock,
) -> None:
    with distributed.together():
        changes = claim(workdir, config, allow_changes)
        if workdir.exists():
            lock.take()
    set_aside_damaged(workdir / "checkpoints", say)
    with distributed.together():
        mesh, start, tokenizer, text = _checked(config, workdir)
    distributed.same(
        str(newest_checkpoint(workdir / "checkpoints")),
        f"sees other checkpoints in {workdir} than process 0: --workdir must be one directory "
        "that all processes share",
    )
    newest = newest_checkpoint(workdir / "checkpoints")
    with distributed.together():
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
        lock.take()
        if newest_checkpoint(workdir / "checkpoints") != newest:
            raise InputError(f"another run has been in {workdir} meanwhile: start this one again")
        if changes:
            step = newest.name if newest else "0"
            Log(workdir).config_changes(int(step), changes)
            for name, (old, new) in changes.items():
                say(f"from step {step} on, {name} is {new!r}; it was {old!r}")
        prepare(workdir, config, start.tokenizer_files)
    with distributed.together():
        find_shared(workdir)
    start.tokenizer_files = workdir / "tokenizer"

    with contextlib.closing(
        TrainingCheckpoints(
            workdir / "checkpoints", config.train.keep_checkpoints, config.train.keep_best
        )
    ) as checkpoints:
        with checkpoints.disk.watched():
            _run(config, workdir, mesh, start, tokenizer, text, checkpoints, say)
        best = checkpoints.best_step()
        if best is not None:
            say(f"lowest held-out loss of the checkpoints kept: {workdir / 'checkpoints'}/{best}")


def _checked(
    config: RunConfig, workdir: Path
) -> tuple[Mesh, _Start, Any, tuple[data.Windows, data.Windows]]:
    """All that is read; nothing is written, and nothing said to other processes."""
    mesh = sharding.make_mesh(config.mesh)
    check_microbatch(config, mesh)
    kernel = _kernel(config)
    newest = newest_checkpoint(workdir / "checkpoints")
    # In the host's memory: no accelerator has to hold the whole model.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        start = _start(config) if newest is None else _restart(config, newest, workdir)
    start.model.placement = Placement(mesh, kernel)
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
    tokens = data.tokenize(documents, tokenizer, show_progress=jax.process_index() == 0)
    text = data.split_held_out(tokens, config.data)
    for prompt in config.prompts:
        complete(start.model, tokenizer, prompt, config.prompt_tokens, 0.0, 0)  # checks it
    return mesh, start, tokenizer, text


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
    log, (windows, held_out) = Log(workdir), text
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

    def report(name: str, model: Decoder, step: int) -> float | None:
        loss = None
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
        return loss

    first = checkpoints.latest_step()
    log.cut(-1 if first is None else first)
    if first is None:
        if start.dense is not None:
            report("dense base", _spread(start.dense, start.model.placement), 0)
        start.dense = None
        params = distributed.place(nnx.to_pure_dict(state), shardings)
        opt_state = init_optimizer(tx, params, shardings, mesh)
        loss = report("step 0", rebuild(graphdef, params), 0)
        checkpoints.save(0, start.model, params, opt_state, start.tokenizer_files, loss)
        first = 0
    else:
        target = abstract_params(start.model.config, config.train.param_dtype, shardings)
        params, opt_state = checkpoints.restore(
            first, target, abstract_optimizer(tx, target, shardings, mesh)
        )
        say(f"resumed from step {first} of {config.train.steps}")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    start.model = nnx.merge(graphdef, abstract)  # free the weights that params now holds
    del state

    guard = Guard(config, windows, workdir, first - int(updates_made(opt_state)), say)
    with stop_requests() as must_stop:
        params, _ = _loop(
            config, mesh, graphdef, start, tx, params, opt_state, shardings, windows, first,
            checkpoints, log, report, guard, must_stop,
        )  # fmt: skip
    # Scored already, unless train.steps was lowered to a step that was not. All go by what the
    # first process finds: it may already be writing when another one looks.
    if distributed.exchange(str(log.has_evaluation(config.train.steps)))[0] == "False":
        report(f"step {config.train.steps}", rebuild(graphdef, params), config.train.steps)


def _loop(
    config: RunConfig, mesh: Mesh, graphdef: Any, start: _Start,
    tx: optax.GradientTransformation, params: dict, opt_state: Any, shardings: dict,
    windows: data.Windows, first: int, checkpoints: TrainingCheckpoints, log: Log,
    report: Callable[[str, Decoder, int], float | None], guard: Guard,
    must_stop: Callable[[int], bool],
) -> tuple[dict, Any]:  # fmt: skip
    """Steps first … steps - 1, with logging, held-out scores and saves on the way."""
    settings, steps = config.train, config.train.steps
    step_fn, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
    params, opt_state = jax.device_put((params, opt_state), places, donate=True)
    rows = sharding.batch_sharding(mesh)
    schedule = learning_rate(config.optimizer, steps)
    batches = _global_batches(config, windows, first, rows)
    tokens_per_step = config.data.global_batch_size * config.data.sequence_length
    bar = tqdm(
        total=steps, initial=first, desc="training", unit="step", file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
        disable=jax.process_index() > 0,
    )  # fmt: skip
    clock, since = time.perf_counter(), first
    unchecked: list[tuple[int, dict]] = []
    for step in range(first + 1, steps + 1):
        params, opt_state, metrics = step_fn(params, opt_state, next(batches))
        stop = must_stop(step) and step < steps
        due = step % settings.checkpoint_every == 0 or step == steps or stop
        logged = step % settings.log_every == 0 or step == steps
        unchecked.append((step, metrics))
        # A step late, so that the next one is under way: what is read here has to be waited for.
        while len(unchecked) > (0 if logged or due else 1):
            guard.check(*unchecked.pop(0))
        checkpoints.check()
        if logged:
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            speed = (step - since) * tokens_per_step / (now - clock)
            clock, since = now, step
            # The rate that this step used: Optax counts updates from 0.
            rate = float(schedule(guard.updates_before(step)))
            values |= {"skipped": guard.skipped, "learning_rate": rate, "tokens_per_second": speed}
            log.metrics({"step": step, **values})
            bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        loss = None
        if (step % settings.eval_every == 0 or step == steps) and not stop:
            loss = report(f"step {step}", rebuild(graphdef, params), step)
            clock, since = time.perf_counter(), step
        # Saved when scored and logged, so that a run that goes on from here has both. Not while
        # steps are left out: weights that no batch is right with would displace good ones.
        if due and (not guard.in_a_row or step == steps):
            checkpoints.save(step, start.model, params, opt_state, start.tokenizer_files, loss)
        if stop:
            raise RunEnded(_stopped(step, checkpoints, log.workdir), EXIT_CODE)
    bar.close()
    return params, opt_state


def _spread(model: Decoder, placement: Placement) -> Decoder:
    """The model with its weights over the mesh."""
    assert placement.mesh is not None
    model.placement = placement
    shardings, _ = sharding.param_shardings(model, placement.mesh)
    graphdef, state = nnx.split(model)
    return rebuild(graphdef, distributed.place(nnx.to_pure_dict(state), shardings))


def _global_batches(
    config: RunConfig, windows: data.Windows, first: int, sharding: jax.sharding.NamedSharding
) -> Iterator[Array]:
    """Batches [B, T + 1] over all devices; each process reads the rows that its devices hold."""
    shape = (config.data.global_batch_size, config.data.sequence_length + 1)

    def rows_of(index: tuple[slice, ...] | None) -> range:
        assert index is not None
        return range(shape[0])[index[0]]

    here = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for index in here for row in rows_of(index)})
    for batch in data.train_batches(windows, config.data, first, rows):

        def part(index: tuple[slice, ...] | None, batch: np.ndarray = batch) -> np.ndarray:
            wanted = rows_of(index)
            start = rows.index(wanted[0])
            return batch[start : start + len(wanted)]

        yield jax.make_array_from_callback(shape, sharding, part)


def _stopped(step: int, checkpoints: TrainingCheckpoints, workdir: Path) -> str:
    checkpoints.wait()
    return f"stopped on request after step {step}. {way_on(workdir)}"


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
            refuse_differences(
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
    refuse_differences(
        f"{config.init_from} is not the model that config.model states",
        found,
        stated,
        "set config.model to the source's sizes, or to None to take them over",
    )
