"""Training: start or resume, step, score, save."""

import contextlib
import dataclasses
import json
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
from jaxtyping import Array

from finermoe_jax import data, distributed, metrics, plot, sharding
from finermoe_jax.checkpoint import (
    TrainingCheckpoints,
    abstract_params,
    load_model,
    newest_checkpoint,
    read_description,
)
from finermoe_jax.config import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation import held_out_loss
from finermoe_jax.files import find
from finermoe_jax.generation import complete
from finermoe_jax.hf_weights import with_shapes
from finermoe_jax.model import Decoder
from finermoe_jax.optim import optimizer
from finermoe_jax.packing import Batch
from finermoe_jax.rows import Mixture
from finermoe_jax.sharding import Placement
from finermoe_jax.step import (
    abstract_optimizer,
    check_microbatch,
    init_optimizer,
    jit_step,
    rebuild,
)
from finermoe_jax.tokenizers import load_tokenizer
from finermoe_jax.upcycle import cast, upcycle_model, upcycled_config
from finermoe_jax.workdir import (
    Log,
    claim,
    claim_data,
    find_shared,
    prepare,
    record_data,
    refuse_differences,
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
    watch: metrics.Watch = metrics.NOTHING_MORE,
) -> None:
    """Runs or resumes the training that `config` describes, in `workdir`.

    Writes config.json, metrics.jsonl, expert_load.jsonl, evals.jsonl, samples.jsonl, checkpoints/,
    tokenizer/, loss.png and load.png; and what `watch` asks for. A resumed run needs the workdir
    and the text, not init_from.

    With several processes all of them call this, with the same arguments and a workdir that they
    share; the first one writes and speaks.

    Raises InputError for whatever is wrong with the input, before the first step, and on every
    process alike.
    """
    workdir = workdir.absolute()
    first = jax.process_index() == 0
    if not first:
        say = _silent
    stated = json.dumps([dataclasses.asdict(config), str(workdir)])
    distributed.same(stated, "was started with another config or --workdir than process 0")
    with distributed.together():
        metrics.check(watch, 0, config.train.steps)
        mesh, start, tokenizer, text = _checked(config, workdir)
    distributed.same(json.dumps(text.identity), "reads other data than process 0")
    distributed.same(
        str(newest_checkpoint(workdir / "checkpoints")),
        f"sees other checkpoints in {workdir} than process 0: --workdir must be one directory "
        "that all processes share",
    )
    with distributed.together():
        prepare(workdir, config, start.tokenizer_files)
        record_data(workdir, text.identity)
    with distributed.together():
        find_shared(workdir)
    start.tokenizer_files = workdir / "tokenizer"

    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(
            contextlib.closing(
                TrainingCheckpoints(workdir / "checkpoints", config.train.keep_checkpoints)
            )
        )
        _run(config, workdir, mesh, start, tokenizer, text, checkpoints, say, watch, opened)
    if first:
        pictures = " ".join(map(str, plot.draw(workdir)))
        say(f"peak memory {metrics.memory_gib():.2f} GiB · drawn: {pictures}")


def _silent(message: str) -> None:
    """What processes other than the first say."""


def _checked(config: RunConfig, workdir: Path) -> tuple[Mesh, _Start, Any, data.RunData]:
    """All that is read; nothing is written, and nothing said to other processes."""
    mesh = sharding.make_mesh(config.mesh)
    check_microbatch(config, mesh)
    kernel = _kernel(config)
    claim(workdir, config)
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
    text = data.open_data(
        config.data,
        tokenizer,
        start.tokenizer_files,
        model_config.vocab_size,
        show_progress=jax.process_index() == 0,
    )
    if newest is not None:
        claim_data(workdir, text.identity)
    for prompt in config.prompts:
        complete(start.model, tokenizer, prompt, config.prompt_tokens, 0.0, 0)  # checks it
    return mesh, start, tokenizer, text


def _run(
    config: RunConfig,
    workdir: Path,
    mesh: Mesh,
    start: _Start,
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

    def report(name: str, model: Decoder, step: int) -> None:
        if held_out:
            loss = held_out_loss(
                model, held_out, config.data.eval_windows, config.train.loss_chunk_tokens
            )
            monitor.evaluation(name, step, loss)
            say(f"held-out loss  {name:<28} {loss:.4f}  (perplexity {np.exp(loss):.2f})")
        for prompt in config.prompts:
            words = "".join(complete(model, tokenizer, prompt, config.prompt_tokens, 0.0, 0))
            log.sample(name, step, prompt, words)
            say(f"  {prompt!r} → {words!r}")

    first = checkpoints.latest_step()
    log.cut(-1 if first is None else first)
    with distributed.together():
        metrics.check(watch, first or 0, config.train.steps)
        monitor = metrics.Monitor(workdir, config, start.model.config, watch, first or 0, mesh.size)
    opened.push(lambda kind, *_: monitor.close(failed=kind is not None))
    if first is None:
        if start.dense is not None:
            report("dense base", _spread(start.dense, start.model.placement), 0)
        start.dense = None
        params = distributed.place(nnx.to_pure_dict(state), shardings)
        opt_state = init_optimizer(tx, params, shardings, mesh)
        report("step 0", rebuild(graphdef, params), 0)
        checkpoints.save(0, start.model, params, opt_state, start.tokenizer_files)
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

    params, _ = _loop(
        config, mesh, graphdef, start, tx, params, opt_state, shardings, windows, first,
        checkpoints, monitor, report, say,
    )  # fmt: skip
    # A kill may have come just before it. All go by what the first process finds: it may already
    # be writing when another one looks.
    if distributed.exchange(str(log.has_evaluation(config.train.steps)))[0] == "False":
        report(f"step {config.train.steps}", rebuild(graphdef, params), config.train.steps)


def _loop(
    config: RunConfig, mesh: Mesh, graphdef: Any, start: _Start,
    tx: optax.GradientTransformation, params: dict, opt_state: Any, shardings: dict,
    windows: Mixture, first: int, checkpoints: TrainingCheckpoints,
    monitor: metrics.Monitor, report: Callable[[str, Decoder, int], None],
    say: Callable[[str], None],
) -> tuple[dict, Any]:  # fmt: skip
    """Steps first + 1 … steps, with logging, held-out scores and saves on the way.

    The host is a step ahead: it hands the device step n + 1 before it asks for what step n gave.
    It waits for a step itself only where a save, a held-out score or a profile comes after it; what
    a checkpoint holds is in the log before it is saved.
    """
    settings, steps = config.train, config.train.steps
    if first == steps:
        return params, opt_state
    step_fn, places = jit_step(graphdef, config, tx, params, opt_state, shardings, mesh)
    params, opt_state = jax.device_put((params, opt_state), places, donate=True)
    rows = sharding.batch_sharding(mesh)
    batches = _global_batches(config, windows, first, rows)
    batch = next(batches)
    began = time.perf_counter()
    run_step = step_fn.lower(params, opt_state, batch).compile()
    say(f"compiled the step in {time.perf_counter() - began:.0f} s")
    under_way: list[tuple[int, dict]] = []

    def finish() -> None:
        """Waits for the steps under way, and tells of them."""
        for step, values in under_way:
            monitor.step(step, jax.device_get(values))
        under_way.clear()

    monitor.show_progress(first)
    for step in range(first + 1, steps + 1):
        if monitor.profile_begins(step):
            finish()
            with monitor.pause():
                monitor.start_profile()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            params, opt_state, told = run_step(params, opt_state, batch)
        finish()
        under_way.append((step, told))
        if step < steps:
            with monitor.waiting():
                batch = next(batches)
        saves = step % settings.checkpoint_every == 0 or step == steps
        scores = step % settings.eval_every == 0 and step < steps
        if saves or scores or monitor.profile_ends(step):
            finish()
        if monitor.profile_ends(step):
            with monitor.pause():
                monitor.stop_profile()
        if saves:
            with monitor.pause():
                checkpoints.save(step, start.model, params, opt_state, start.tokenizer_files)
        if scores:
            with monitor.pause():
                report(f"step {step}", rebuild(graphdef, params), step)
    return params, opt_state


def _spread(model: Decoder, placement: Placement) -> Decoder:
    """The model with its weights over the mesh."""
    assert placement.mesh is not None
    model.placement = placement
    shardings, _ = sharding.param_shardings(model, placement.mesh)
    graphdef, state = nnx.split(model)
    return rebuild(graphdef, distributed.place(nnx.to_pure_dict(state), shardings))


def _global_batches(
    config: RunConfig, windows: Mixture, first: int, sharding: jax.sharding.NamedSharding
) -> Iterator[Batch]:
    """Batches [B, T + 1] over all devices; each process reads the rows that its devices hold."""
    shape = (config.data.global_batch_size, config.data.sequence_length + 1)

    def rows_of(index: tuple[slice, ...] | None) -> range:
        assert index is not None
        return range(shape[0])[index[0]]

    here = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for index in here for row in rows_of(index)})
    for batch in data.train_batches(windows, config.data, first, rows):

        def over_devices(local: np.ndarray) -> Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                wanted = rows_of(index)
                start = rows.index(wanted[0])
                return local[start : start + len(wanted)]

            return jax.make_array_from_callback(shape, sharding, part)

        yield jax.tree.map(over_devices, batch)


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
