"""Training: start or resume, step, score, save."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finermoe_jax.config.run import RunConfig
from finermoe_jax.data import batches as data
from finermoe_jax.data.tokenizers import check_kept, load_tokenizer
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.evaluation.evaluate import held_out_loss
from finermoe_jax.generation.text import complete
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime import distributed, files
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.locks import Lock
from finermoe_jax.runtime.paths import local
from finermoe_jax.runtime.preemption import stop_requests
from finermoe_jax.training import monitor as metrics
from finermoe_jax.training import plot
from finermoe_jax.training.checkpoints import TrainingCheckpoints, logged_bytes
from finermoe_jax.training.initial import Start, fresh_start, restart
from finermoe_jax.training.loop import Loop
from finermoe_jax.training.nonfinite import Guard
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import (
    abstract_optimizer,
    check_microbatch,
    init_optimizer,
    rebuild,
    updates_made,
)
from finermoe_jax.training.workdir import (
    Log,
    claim,
    claim_data,
    find_shared,
    prepare,
    record_data,
    way_on,
)
from finermoe_jax.weights.checkpoint import abstract_params, newest_checkpoint
from finermoe_jax.weights.integrity import set_aside_damaged


def train(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None] = print,
    watch: metrics.Watch = metrics.NOTHING_MORE,
    allow_changes: Sequence[str] = (),
) -> None:
    """Runs or resumes the training that `config` describes, in `workdir`.

    Writes config.json, data.json, metrics.jsonl, expert_load.jsonl, evals.jsonl, samples.jsonl,
    checkpoints/, tokenizer/, loss.png and load.png; and what `watch` asks for. A resumed run needs
    the workdir and the data, not init_from.

    With several processes all of them call this, with the same arguments and a workdir that they
    share; the first one writes and speaks.

    Args:
      config: the run.
      workdir: a new directory, or that of a run to go on with.
      say: what is told along the way.
      watch: what else is told, and where to.
      allow_changes: fields of the config (dotted, or groups) that may differ from the run's.

    Raises InputError for whatever is wrong with the input, before the first step, and on every
    process alike; RunEnded when the run must end early: asked to by a signal, the disk full, the
    loss not finite.
    """
    workdir = Path(local(workdir)).absolute()
    first = jax.process_index() == 0
    if not first:
        say = _silent
    stated = to_json([dataclasses.asdict(config), str(workdir), list(allow_changes)])
    distributed.same(stated, "was started with another config or --workdir than process 0")
    with contextlib.ExitStack() as opened:
        lock = opened.enter_context(contextlib.closing(Lock(workdir, "--workdir")))
        mesh, start, tokenizer, text = _claimed(config, workdir, say, watch, allow_changes, lock)
        checkpoints = opened.enter_context(
            contextlib.closing(
                TrainingCheckpoints(
                    workdir / "checkpoints", config.train.keep_checkpoints, config.train.keep_best
                )
            )
        )
        try:
            with checkpoints.saves.watched():
                _run(config, workdir, mesh, start, tokenizer, text, checkpoints, say, watch, opened)
        except OSError as error:
            # Not the user's input any more: a file system that fails, mostly.
            raise RunEnded(f"{error}. {way_on(workdir)}", alone=True) from error
        best = checkpoints.best_step()
        if best is not None:
            say(f"lowest held-out loss of the checkpoints kept: {workdir / 'checkpoints'}/{best}")
    if first:
        pictures = " ".join(map(str, plot.draw(workdir)))
        say(f"peak memory {metrics.memory_gib():.2f} GiB · drawn: {pictures}")


def _silent(message: str) -> None:
    """What processes other than the first say."""


def _claimed(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None],
    watch: metrics.Watch,
    allow_changes: Sequence[str],
    lock: Lock,
) -> tuple[Mesh, Start, Any, data.RunData]:
    """All that is read, checked, and then the workdir, taken and prepared."""
    with distributed.together():
        metrics.check(watch, config.train.steps)
        changes = claim(workdir, config, allow_changes)
        if workdir.exists() and jax.process_index() == 0:
            lock.take()
    set_aside_damaged(workdir / "checkpoints", say)
    with distributed.together():
        mesh, start, tokenizer, text = _checked(config, workdir, allow_changes)
    distributed.same(to_json(text.identity), "reads other data than process 0")
    distributed.same(
        str(newest_checkpoint(workdir / "checkpoints")),
        f"sees other checkpoints in {workdir} than process 0: --workdir must be one directory "
        "that all processes share",
    )
    newest = newest_checkpoint(workdir / "checkpoints")
    with distributed.together():
        if jax.process_index() == 0:
            files.make_directory(workdir)
            lock.take()
        if newest_checkpoint(workdir / "checkpoints") != newest:
            raise InputError(f"another run has been in {workdir} meanwhile: start this one again")
        if changes:
            step = newest.name if newest else "0"
            Log(workdir).config_changes(int(step), changes)
            for name, (old, new) in changes.items():
                say(f"from step {step} on, {name} is {new!r}; it was {old!r}")
        prepare(workdir, config, start.tokenizer_files, start.ends_files)
        record_data(workdir, text.identity)
    with distributed.together():
        find_shared(workdir)
    start.tokenizer_files = workdir / "tokenizer"
    return mesh, start, tokenizer, text


def _checked(
    config: RunConfig, workdir: Path, allow_changes: Sequence[str]
) -> tuple[Mesh, Start, Any, data.RunData]:
    """All that is read; nothing is written, and nothing said to other processes."""
    mesh = sharding.make_mesh(config.mesh)
    check_microbatch(config, mesh)
    kernel = sharding.kernel_named(config.train.kernel)
    newest = newest_checkpoint(workdir / "checkpoints")
    start = fresh_start(config) if newest is None else restart(config, newest, workdir)
    start.model.placement = Placement(mesh, kernel)
    model_config = start.model.config
    length = config.data.sequence_length
    if length > model_config.context_length:
        raise InputError(
            f"data.sequence_length={length} exceeds the model's context of "
            f"{model_config.context_length} tokens"
        )
    tokenizer = load_tokenizer(start.tokenizer_files, model_config.vocab_size)
    if newest is None:
        check_kept(start.tokenizer_files)
    text = data.open_data(
        config.data,
        tokenizer,
        start.tokenizer_files,
        model_config.vocab_size,
        show_progress=jax.process_index() == 0,
    )
    if newest is not None:
        if int(newest.name) > config.train.steps:
            raise InputError(
                f"train.steps={config.train.steps}, but {workdir} is at step {newest.name}: give "
                "more steps, or a new --workdir with init_from set to the checkpoint wanted"
            )
        claim_data(workdir, text.identity, allow_changes)
    for prompt in config.prompts:
        complete(start.model, tokenizer, prompt, config.prompt_tokens)  # checks it
    return mesh, start, tokenizer, text


def _run(
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    start: Start,
    tokenizer: Any,
    text: data.RunData,
    checkpoints: TrainingCheckpoints,
    say: Callable[[str], None],
    watch: metrics.Watch,
    opened: contextlib.ExitStack,
) -> None:
    """Everything between checked input and the last checkpoint."""
    log, (windows, held_out, _) = Log(workdir), text
    shardings, notes = sharding.param_shardings(start.model, mesh)
    for note in notes:
        say(note)
    graphdef, state = nnx.split(start.model)
    tx = optimizer(config.optimizer, config.train.steps)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    say(
        f"{count:,} parameters · {len(windows):,} training and {len(held_out or ())} held-out "
        f"rows of {windows.length} tokens · mesh {dict(mesh.shape)} · {workdir}"
    )

    def report(name: str, model: Decoder, step: int) -> float | None:
        loss = None
        if held_out:
            loss = held_out_loss(
                model, held_out, config.data.eval_windows, config.train.loss_chunk_tokens
            )
            monitor.evaluation(name, step, loss)
            say(f"held-out loss  {name:<28} {loss:.4f}  (perplexity {np.exp(loss):.2f})")
        for prompt in config.prompts:
            words = "".join(complete(model, tokenizer, prompt, config.prompt_tokens))
            log.sample(name, step, prompt, words)
            say(f"  {prompt!r} → {words!r}")
        return loss

    first = checkpoints.latest_step()
    log.cut(-1 if first is None else first)
    if first is not None and (lost := log.lost(logged_bytes(workdir / "checkpoints" / f"{first}"))):
        say(lost)
    with distributed.together():
        monitor = metrics.Monitor(workdir, config, start.model.config, watch, first or 0, mesh.size)
    opened.push(lambda kind, *_: monitor.close(failed=kind is not None))
    if first is None:
        if start.dense is not None:
            report("dense base", _placed(start.dense, start.model.placement), 0)
        start.dense = None
        with distributed.together():
            params = start.place(shardings)
        opt_state = init_optimizer(tx, params, shardings, mesh)
        loss = report("step 0", rebuild(graphdef, params), 0)
        logged = log.sync()
        checkpoints.save(0, start.model, params, opt_state, start.tokenizer_files, loss, logged)
        first = 0
    else:
        target = abstract_params(start.model.config, config.train.param_dtype, shardings)
        params, opt_state = checkpoints.restore(
            first, target, abstract_optimizer(tx, target, shardings, mesh)
        )
        say(f"resumed from step {first} of {config.train.steps}")

    guard = Guard(config, windows, workdir, first - int(updates_made(opt_state)), say)
    with stop_requests() as must_stop:
        loop = Loop(
            config, workdir, mesh, start.model, shardings, tx, windows, checkpoints, monitor,
            guard, report, must_stop, say,
        )  # fmt: skip
        params = loop.run(first, params, opt_state)
        # Scored already, unless train.steps was lowered to a step that was not. All go by what the
        # first process finds: it may already be writing when another one looks.
        if distributed.exchange(str(log.has_evaluation(config.train.steps)))[0] == "False":
            report(f"step {config.train.steps}", rebuild(graphdef, params), config.train.steps)
        log.sync()
        checkpoints.wait()  # here, so that a request to stop does not cut the last save off


def _placed(start: Start, placement: Placement) -> Decoder:
    """The model with its weights over the mesh."""
    assert placement.mesh is not None
    start.model.placement = placement
    shardings, _ = sharding.param_shardings(start.model, placement.mesh)
    with distributed.together():
        params = start.place(shardings)
    return rebuild(nnx.split(start.model)[0], params)
