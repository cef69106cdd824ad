"""Starts or resumes a training run."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from finermoe_jax.config.hardware import device_memory
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data import batches as data
from finermoe_jax.data.tokenizers import check_kept, open_tokenizer
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.evaluation.evaluate import held_out_loss
from finermoe_jax.generation.text import stream_text
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime import distributed, files
from finermoe_jax.runtime.json_files import read_json, to_json
from finermoe_jax.runtime.preemption import EXIT_CODE, stop_requests
from finermoe_jax.training import goodput, plot
from finermoe_jax.training import monitor as metrics
from finermoe_jax.training.checkpoints import (
    TrainingCheckpoints,
    logged_bytes,
    skipped_in_a_row,
)
from finermoe_jax.training.initial import InitialModel, initial_model, resumed_model
from finermoe_jax.training.loop import Loop, RunSetup
from finermoe_jax.training.mesh import choose_mesh, is_automatic
from finermoe_jax.training.nonfinite import Guard
from finermoe_jax.training.optimizer import run_optimizer
from finermoe_jax.training.step import (
    abstract_optimizer,
    check_microbatch,
    init_optimizer,
    rebuild,
    updates_made,
)
from finermoe_jax.training.storage import Storage, Workdir, checkpoints_of, files_of
from finermoe_jax.training.storage import opened as open_storage
from finermoe_jax.training.workdir import (
    Log,
    claim,
    claim_data,
    fill_workdir,
    record_data,
    resume_hint,
)
from finermoe_jax.weights.checkpoint import abstract_params, newest_checkpoint
from finermoe_jax.weights.integrity import set_aside_damaged


def train(
    config: RunConfig,
    workdir: str | os.PathLike,
    say: Callable[[str], None] = print,
    telemetry: metrics.Telemetry = metrics.NOTHING_MORE,
    allow_changes: Sequence[str] = (),
    scratch: str | os.PathLike | None = None,
) -> None:
    """Starts or resumes a training run in `workdir`.

    Writes config.json, data.json, metrics.jsonl, expert_load.jsonl, evals.jsonl, samples.jsonl,
    checkpoints/, tokenizer/, loss.png and load.png, and the output of `telemetry`. A resumed run
    needs the workdir and the data, but not init_from.

    With several processes, all call this with the same arguments and a shared workdir; only the
    first one writes files and messages.

    Args:
      config: the run's config.
      workdir: a new directory, or that of a run to resume; local, or gs://bucket/run.
      say: called with each message.
      telemetry: TensorBoard, Weights & Biases and profiles; by default none.
      allow_changes: config fields (dotted) or groups that may differ from the resumed run's.
      scratch: the local directory of a run in a bucket; by default one in the user's cache.

    Raises:
      InputError: invalid input. Raised before the first step, on all processes.
      RunEnded: the run ends early because of a signal, a full disk, a bucket that cannot be
        reached, or non-finite steps.
    """
    started = time.perf_counter()
    first = jax.process_index() == 0
    if not first:
        say = silent
    with contextlib.ExitStack() as opened:
        storage = opened.enter_context(open_storage(workdir, scratch, say))
        settings = to_json([dataclasses.asdict(config), str(storage.workdir), list(allow_changes)])
        distributed.same(settings, "was started with another config or --workdir than process 0")
        _train_in(storage, config, say, telemetry, allow_changes, started)
        here = files_of(storage.workdir)
        if first:
            pictures = " ".join(f"{storage.workdir}/{path.name}" for path in plot.draw(here))
            say(f"peak memory {metrics.memory_gib():.2f} GiB · plots: {pictures}")
            say(goodput.report(here))


def _train_in(
    storage: Storage,
    config: RunConfig,
    say: Callable[[str], None],
    telemetry: metrics.Telemetry,
    allow_changes: Sequence[str],
    started: float,
) -> None:
    """Trains to the last checkpoint."""
    with contextlib.ExitStack() as opened:
        setup = _claimed(config, storage, say, telemetry, allow_changes)
        setup.started, steps = started, checkpoints_of(storage.workdir)
        checkpoints = TrainingCheckpoints(
            steps,
            config.train.keep_checkpoints,
            config.train.keep_best,
            setup.initial.origin,
            storage,
        )
        opened.enter_context(contextlib.closing(checkpoints))
        try:
            with checkpoints.ending_when_full():
                _train(setup, checkpoints, telemetry, opened)
        except OSError as error:
            # Usually a failing file system, not invalid input.
            hint = resume_hint(storage.workdir)
            code = EXIT_CODE if storage.is_outage(error) else 1
            raise RunEnded(f"{error}. {hint}", code, alone=True) from error
        best = checkpoints.best_step()
        if best is not None:
            say(f"checkpoint with the lowest held-out loss: {steps}/{best}")


def silent(message: str) -> None:
    """Drops a message: `say` on all processes but the first."""


def _claimed(
    config: RunConfig,
    storage: Storage,
    say: Callable[[str], None],
    telemetry: metrics.Telemetry,
    allow_changes: Sequence[str],
) -> RunSetup:
    """Reads and checks all input, then locks and prepares the workdir (a bucket is locked)."""
    first, workdir = jax.process_index() == 0, storage.workdir
    steps, here = checkpoints_of(workdir), files_of(workdir)
    with distributed.together():
        metrics.check(telemetry, config.train.steps)
        storage.open()
        changes = claim(workdir, config, allow_changes)
        storage.take()
    set_aside_damaged(steps, say)
    with distributed.together():
        setup = check_run(config, workdir, say, allow_changes)
    distributed.same(to_json(setup.data.identity), "reads other data than process 0")
    distributed.same(str(setup.config.mesh), "chose another mesh than process 0: set config.mesh")
    newest = newest_checkpoint(steps)
    distributed.same(
        str(newest),
        f"sees other checkpoints in {workdir} than process 0: --workdir must be a directory "
        "shared by all processes",
    )
    with distributed.together():
        if first:
            files.make_directory(here)
            storage.take()
        if newest_checkpoint(steps) != newest:
            raise InputError(f"another run has just written to {workdir}: start this one again")
        if changes:
            step = newest.name if newest else "0"
            Log(here).config_changes(int(step), changes)
            for name, (old, new) in changes.items():
                say(f"{name} changes from {old!r} to {new!r} after step {step}")
        fill_workdir(here, setup.config, setup.initial.tokenizer_files, setup.initial.ends_files)
        record_data(workdir, setup.data.identity)
        storage.publish()
    with distributed.together():
        storage.receive()
    setup.initial.tokenizer_files = here / "tokenizer"
    return setup


def check_run(
    config: RunConfig,
    workdir: Workdir,
    say: Callable[[str], None],
    allow_changes: Sequence[str] = (),
) -> RunSetup:
    """Reads and checks all input, without the weights. Writes nothing, does not communicate.

    Raises InputError for invalid input.
    """
    if not is_automatic(config.mesh):
        check_microbatch(config, sharding.make_mesh(config.mesh))
    kernel = sharding.kernel_named(config.train.kernel)
    exchange = sharding.exchange_named(config.train.exchange)
    newest, here = newest_checkpoint(checkpoints_of(workdir)), files_of(workdir)
    initial = initial_model(config) if newest is None else resumed_model(config, newest, here)
    model = initial.model.config
    config = _with_mesh(config, model, here, newest is not None, say)
    mesh = sharding.make_mesh(config.mesh)
    check_microbatch(config, mesh)
    initial.model.placement = Placement(mesh, kernel, exchange, config.train.force_balance)
    _check_frozen(config, initial.model, say)
    _check_balance(config, model)
    if newest is None:
        _check_ignored(config)
    length = config.data.sequence_length
    if length > model.context_length:
        raise InputError(
            f"data.sequence_length={length} exceeds the model's context of "
            f"{model.context_length} tokens; lower it"
        )
    place, first = initial.tokenizer_files, jax.process_index() == 0
    tokenizer = open_tokenizer(place, model.vocab_size)
    if newest is None:
        check_kept(place)
    found = data.open_data(config.data, tokenizer, place, model.vocab_size, show_progress=first)
    if newest is not None:
        if int(newest.name) > config.train.steps:
            raise InputError(
                f"train.steps={config.train.steps}, but {workdir} is already at step "
                f"{newest.name}: raise train.steps, or give a new --workdir with init_from set to "
                "a checkpoint"
            )
        claim_data(workdir, found.identity, allow_changes)
    for prompt in config.prompts:
        stream_text(
            initial.model, tokenizer, prompt, config.prompt_tokens
        )  # only checks the prompt
    return RunSetup(config, workdir, mesh, initial, tokenizer, found, say)


def _with_mesh(
    config: RunConfig, model: ModelConfig, workdir: Path, resumes: bool, say: Callable[[str], None]
) -> RunConfig:
    """Returns the config with its mesh, which is chosen if all sizes are at their defaults.

    A resumed run keeps the mesh in its config.json if it matches the number of devices.
    """
    devices, here = jax.devices(), jax.local_devices()[0]
    reported = (here.memory_stats() or {}).get("bytes_limit")
    memory = device_memory(here.device_kind, reported)
    if resumes and memory and is_automatic(config.mesh):
        kept = run_config(read_json(workdir / "config.json")).mesh
        if is_automatic(kept):  # data parallel
            return config
        if sharding.least_devices(kept) == len(devices):
            sizes = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(kept).items())
            say(f"keeps the mesh {sizes} of the run. Set config.mesh to use another one")
            return dataclasses.replace(config, mesh=kept)
    slices = sharding.slice_count(devices)
    chosen, note = choose_mesh(config, model, len(devices), memory, slices)
    if note:
        say(note)
    return dataclasses.replace(config, mesh=chosen)


def _check_balance(config: RunConfig, model: ModelConfig) -> None:
    """Raises InputError for a balancing that this model's experts do not have."""
    balance, moe = config.balance, model.moe
    if balance.kind == "bias" and not (moe and moe.selection_bias):
        raise InputError(
            "balance.kind=bias moves the selection biases of experts, but the model has none: "
            + (
                "start a new --workdir with init_from set to this checkpoint"
                if moe
                else "set moe, or another balance.kind"
            )
        )
    if balance.over == "pool" and (moe is None or moe.experts_across == 1):
        found = "no experts" if moe is None else "moe.experts_across=1"
        raise InputError(
            "balance.over=pool is for layers that share a pool of experts, but the model has "
            f"{found}: set balance.over=layer, or moe.experts_across to 2 or more"
        )


def _check_ignored(config: RunConfig) -> None:
    """Raises InputError for a field that is set although another field makes the run ignore it.

    For new runs only: older versions accepted such configs, and their runs can resume.
    """
    train, moe = config.train, config.moe
    if train.psr != "none" and train.force_balance:
        raise InputError(
            f"train.force_balance=true ignores the masks of train.psr={train.psr}: set "
            "force_balance=false, or psr=none"
        )
    if moe is not None and moe.pooled_as == "candidates" and moe.experts_across == 1:
        raise InputError(
            "moe.pooled_as=candidates has no effect with moe.experts_across=1: set experts_across "
            "to 2 or more, or pooled_as=copies"
        )
    for name, (decides, users) in USED_BY.items():
        group, _, field = name.partition(".")
        part = getattr(config, group)
        value, used_by = getattr(part, field), getattr(part, decides)
        # A balancing weight or rate of 0 says the same as the kind that ignores it.
        unset = value == getattr(type(part), field) or (group == "balance" and value == 0)
        if used_by not in users and not unset:
            raise InputError(
                f"{name}={value} has no effect with {group}.{decides}={used_by}: set "
                f"{group}.{decides}={' or '.join(users)}, or remove {name}"
            )


# Fields that only some values of another field of their group use.
USED_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "balance.weight": ("kind", ("sequence", "batch")),
    "balance.bias_rate": ("kind", ("bias",)),
    "optimizer.beta1": ("name", ("adamw", "muon")),
    "optimizer.beta2": ("name", ("adamw", "muon")),
    "train.psr_start": ("psr", ("linear", "stepwise")),
    "train.psr_end": ("psr", ("linear", "stepwise")),
    "train.psr_mask": ("psr", ("linear", "stepwise")),
}


def _check_frozen(config: RunConfig, model: Decoder, say: Callable[[str], None]) -> None:
    """Names parts in train.freeze that the model lacks.

    Raises InputError if nothing is left to train, or to Muon.
    """
    run_optimizer(config, model)
    absent = {*config.train.freeze} - {kind.part for kind in kinds(model).values()}
    if absent:
        say(f"train.freeze: this model has no {' and no '.join(sorted(absent))}")


def _train(
    setup: RunSetup,
    checkpoints: TrainingCheckpoints,
    telemetry: metrics.Telemetry,
    opened: contextlib.ExitStack,
) -> None:
    """Trains from the checked input to the last checkpoint."""
    config, workdir, model, say = setup.config, setup.workdir, setup.initial.model, setup.say
    shardings, notes = sharding.param_shardings(model, setup.mesh)
    for note in notes:
        say(note)
    graphdef, state = nnx.split(model)
    rows, held_out = setup.data.train, setup.data.held_out or ()
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    say(
        f"{count:,} parameters · {len(rows):,} training and {len(held_out)} held-out rows of "
        f"{rows.length} tokens · mesh {dict(setup.mesh.shape)} · {workdir}"
    )
    here, steps = files_of(workdir), checkpoints_of(workdir)
    log, first = Log(here), checkpoints.latest_step()
    log.cut(-1 if first is None else first)
    if first is not None and (lost := log.lost(logged_bytes(steps / str(first)))):
        say(lost)
    with distributed.together():
        monitor = metrics.Monitor(
            here, config, model.config, telemetry, first or 0, setup.mesh.size, setup.started
        )
    opened.push(lambda kind, *_: monitor.close(failed=kind is not None))
    report = functools.partial(_report, setup, monitor)
    tx = run_optimizer(config, model)
    if first is None:
        params, opt_state = _begin(setup, checkpoints, shardings, tx, report, log)
        first, in_a_row = 0, 0
    else:
        say(f"restoring the checkpoint of step {first} …")
        target = abstract_params(model.config, config.train.param_dtype, shardings)
        params, opt_state = checkpoints.restore(
            first, target, abstract_optimizer(tx, target, shardings, setup.mesh)
        )
        in_a_row = skipped_in_a_row(steps / str(first))
        say(f"resumed from step {first} of {config.train.steps}")
    guard = Guard(config, rows, here, first - int(updates_made(opt_state)), in_a_row, say)
    with stop_requests() as must_stop:
        loop = Loop(setup, shardings, tx, checkpoints, monitor, guard, report, must_stop)
        params = loop.run(first, params, opt_state)
        # Evaluated already, unless train.steps was lowered. The first process decides for all.
        if distributed.exchange(str(log.has_evaluation(config.train.steps)))[0] == "False":
            report(f"step {config.train.steps}", rebuild(graphdef, params), config.train.steps)
        log.sync()
        with monitor.spending("saving", config.train.steps):
            checkpoints.wait()  # inside stop_requests: a signal must not interrupt the last save


def _report(
    setup: RunSetup, monitor: metrics.Monitor, name: str, model: Decoder, step: int
) -> float | None:
    """Evaluates a model and continues the prompts; returns the held-out loss, if any."""
    work = [f"{setup.config.data.eval_windows} held-out rows"] if setup.data.held_out else []
    work += [f"{len(setup.config.prompts)} prompts"] if setup.config.prompts else []
    before = setup.report_seconds
    if work and (before is None or before > 3):
        known = "compiles first" if before is None else f"about {before:.0f} s"
        setup.say(f"evaluating {name} on {' and '.join(work)} ({known}) …")
    began = time.perf_counter()
    with monitor.spending("evaluating", step):
        loss = _evaluate(setup, monitor, name, model, step)
    setup.report_seconds = time.perf_counter() - began
    return loss


def _evaluate(
    setup: RunSetup, monitor: metrics.Monitor, name: str, model: Decoder, step: int
) -> float | None:
    config, held_out, loss = setup.config, setup.data.held_out, None
    if held_out:
        loss = held_out_loss(
            model, held_out, config.data.eval_windows, config.train.loss_chunk_tokens
        )
        monitor.evaluation(name, step, loss)
        setup.say(f"held-out loss  {name:<28} {loss:.4f}  (perplexity {np.exp(loss):.2f})")
    for prompt in config.prompts:
        words = "".join(stream_text(model, setup.tokenizer, prompt, config.prompt_tokens))
        sample = {"name": name, "step": step, "prompt": prompt, "text": words}
        monitor.log.append("samples.jsonl", sample)
        setup.say(f"  {prompt!r} → {words!r}")
    return loss


def _begin(
    setup: RunSetup,
    checkpoints: TrainingCheckpoints,
    shardings: dict,
    tx: optax.GradientTransformation,
    report: Callable[[str, Decoder, int], float | None],
    log: Log,
) -> tuple[dict, Any]:
    """Returns parameters and optimizer state of a new run, evaluated and saved as step 0."""
    initial, source = setup.initial, setup.config.init_from
    if initial.dense is not None:
        setup.say(f"reading {source} …")
        report(plot.DENSE_BASE, _placed(initial.dense, initial.model.placement), 0)
    work = f"upcycling {source}" if initial.dense else f"reading {source}"
    setup.say(f"{work if source else 'drawing random weights'} …")
    initial.dense = None
    with distributed.together():
        params = initial.place(shardings)
    opt_state = init_optimizer(tx, params, shardings, setup.mesh)
    loss = report("step 0", rebuild(nnx.split(initial.model)[0], params), 0)
    logged = log.sync()
    checkpoints.save(0, initial.model, params, opt_state, initial.tokenizer_files, loss, logged)
    return params, opt_state


def _placed(initial: InitialModel, placement: Placement) -> Decoder:
    """Returns the model with its weights sharded over the mesh."""
    assert placement.mesh is not None
    initial.model.placement = placement
    shardings, _ = sharding.param_shardings(initial.model, placement.mesh)
    with distributed.together():
        params = initial.place(shardings)
    return rebuild(nnx.split(initial.model)[0], params)
