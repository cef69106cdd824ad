"""The training loop, with logging, evaluations and saves."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from finermoe_jax.config.run import RunConfig
from finermoe_jax.data import batches as data
from finermoe_jax.data.batches import RunData
from finermoe_jax.data.packing import Batch
from finermoe_jax.data.rows import Mixture
from finermoe_jax.errors import RunEnded
from finermoe_jax.layers.sharding import batch_sharding
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime import host_memory
from finermoe_jax.runtime.preemption import EXIT_CODE
from finermoe_jax.training.checkpoints import TrainingCheckpoints
from finermoe_jax.training.initial import InitialModel
from finermoe_jax.training.monitor import Monitor
from finermoe_jax.training.nonfinite import Guard
from finermoe_jax.training.step import jit_step, rebuild
from finermoe_jax.training.storage import Workdir, files_of
from finermoe_jax.training.workdir import resume_hint

# Steps between two releases of freed memory on a CPU. A release costs a step's page faults.
_STEPS_OF_KEPT_MEMORY = 16


@dataclasses.dataclass
class RunSetup:
    """A run's config, and the inputs that have been read and checked."""

    config: RunConfig
    workdir: Workdir
    mesh: Mesh
    initial: InitialModel
    tokenizer: Any
    data: RunData
    say: Callable[[str], None]  # prints a message
    started: float = dataclasses.field(default_factory=time.perf_counter)
    report_seconds: float | None = None  # of the last evaluation with its samples


@dataclasses.dataclass
class Loop:
    """The training loop of one run, on every process.

    `report(name, model, step)` scores a model; `must_stop(step)` is True if the run must stop.
    """

    setup: RunSetup
    shardings: dict
    tx: optax.GradientTransformation
    checkpoints: TrainingCheckpoints
    monitor: Monitor
    guard: Guard
    report: Callable[[str, Decoder, int], float | None]
    must_stop: Callable[[int], bool]
    in_flight: list[tuple[int, dict]] = dataclasses.field(default_factory=list)

    def run(self, first: int, params: dict, opt_state: Any) -> dict:
        """Runs steps first + 1 … train.steps and returns the parameters after them.

        The host dispatches step n + 1 before it fetches the metrics of step n. It blocks on a step
        only before a save, an evaluation or the start or end of a profile. All steps in a
        checkpoint are logged before it is saved.

        Raises RunEnded on a request to stop, a full disk, or too many non-finite steps.
        """
        setup, monitor, steps = self.setup, self.monitor, self.setup.config.train.steps
        if first == steps:
            return params
        batches = _global_batches(setup.config, setup.data.train, first, batch_sharding(setup.mesh))
        batch = next(batches)
        run_step, params, opt_state = self._compiled(params, opt_state, batch)
        # So that logged steps without a checkpoint mean lost checkpoints (workdir.claim).
        with monitor.spending("saving", first):
            self.checkpoints.wait()
        saved = first - self.guard.skipped  # updates in the newest checkpoint
        monitor.show_progress(first)
        for step in range(first + 1, steps + 1):
            if step == monitor.profile[0]:
                self._drain()
                with monitor.pause(), monitor.spending("profiling", step):
                    monitor.start_profile()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                params, opt_state, metrics = run_step(params, opt_state, batch)
            self._drain()
            self.in_flight.append((step, metrics))
            self.checkpoints.check()
            if step < steps:
                with monitor.waiting():
                    batch = next(batches)
            stop = self.must_stop(step) and step < steps
            saved = self._after(step, params, opt_state, stop, saved)
            if stop:
                self.checkpoints.wait()
                raise RunEnded(
                    f"stopped on request after step {step}. {resume_hint(setup.workdir)}", EXIT_CODE
                )
        return params

    def _compiled(
        self, params: dict, opt_state: Any, batch: Batch
    ) -> tuple[Callable[..., Any], dict, Any]:
        """Returns the compiled step, and parameters and optimizer state in its layouts."""
        setup = self.setup
        graphdef, _ = nnx.split(setup.initial.model)
        step, places = jit_step(
            graphdef, setup.config, self.tx, params, opt_state, self.shardings, setup.mesh
        )
        params, opt_state = jax.device_put((params, opt_state), places, donate=True)
        setup.say("compiling the training step …")
        began = time.perf_counter()
        with self.monitor.spending("compiling", self.monitor.since):
            compiled = step.lower(params, opt_state, batch).compile()
        setup.say(f"compiled the step in {time.perf_counter() - began:.0f} s")
        return compiled, params, opt_state

    def _drain(self) -> None:
        """Blocks on in-flight steps and logs their metrics."""
        for step, metrics in self.in_flight:
            values = jax.device_get(metrics)
            try:
                self.guard.check(step, values)
            finally:
                self.monitor.step(step, values | {"skipped": self.guard.skipped})
        self.in_flight.clear()

    def _after(self, step: int, params: dict, opt_state: Any, stop: bool, saved: int) -> int:
        """Profiles, evaluates and saves after a step; returns the updates saved so far."""
        monitor, model = self.monitor, self.setup.initial.model
        settings = self.setup.config.train
        last = step == settings.steps
        saves = step % settings.checkpoint_every == 0 or last or stop
        scores = step % settings.eval_every == 0 or last
        if saves or scores or step == monitor.profile[1]:
            self._drain()
        # Freed memory is fragmented and does not fit later buffers: without this, memory grows.
        if saves or scores or step % _STEPS_OF_KEPT_MEMORY == 0:
            host_memory.release_freed()
        if step == monitor.profile[1]:
            with monitor.pause(), monitor.spending("profiling", step):
                monitor.stop_profile()
        loss = None
        if scores:
            with monitor.pause():
                loss = self.report(f"step {step}", rebuild(nnx.split(model)[0], params), step)
        # Saved after evaluation and logging, so that a run resumed from here has both. If every
        # step since the last save was skipped, nothing is saved, to keep the older checkpoints.
        updates = step - self.guard.skipped
        if not saves or not (updates > saved or stop or last):
            return saved
        with monitor.pause(), monitor.spending("saving", step):
            tokenizer, logged = files_of(self.setup.workdir) / "tokenizer", monitor.log.sync()
            self.checkpoints.save(
                step, model, params, opt_state, tokenizer, loss, logged, self.guard.in_a_row
            )
            host_memory.release_freed()
        return updates


def _global_batches(
    config: RunConfig, windows: Mixture, first: int, sharding: jax.sharding.NamedSharding
) -> Iterator[Batch]:
    """Yields global batches [B, T + 1]; each process reads the rows of its own devices."""
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
