"""The steps of a run, with logging, held-out scores and saves on the way."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from finermoe_jax.runtime.preemption import EXIT_CODE
from finermoe_jax.training.checkpoints import TrainingCheckpoints
from finermoe_jax.training.initial import InitialModel
from finermoe_jax.training.monitor import Monitor
from finermoe_jax.training.nonfinite import Guard
from finermoe_jax.training.step import jit_step, rebuild
from finermoe_jax.training.workdir import way_on


@dataclasses.dataclass
class RunSetup:
    """One run: what was asked for, and what has been read and checked of it."""

    config: RunConfig
    workdir: Path
    mesh: Mesh
    initial: InitialModel
    tokenizer: Any
    data: RunData
    say: Callable[[str], None]  # takes messages along the way


@dataclasses.dataclass
class Loop:
    """The steps of one run. Every process holds one.

    `report` scores a model, by name, after a step; `must_stop` says whether a run ends after one.
    """

    setup: RunSetup
    shardings: dict
    tx: optax.GradientTransformation
    checkpoints: TrainingCheckpoints
    monitor: Monitor
    guard: Guard
    report: Callable[[str, Decoder, int], float | None]
    must_stop: Callable[[int], bool]
    under_way: list[tuple[int, dict]] = dataclasses.field(default_factory=list)

    def run(self, first: int, params: dict, opt_state: Any) -> dict:
        """Steps first + 1 … steps, and the parameters after them.

        The host is a step ahead: it dispatches step n + 1 before it asks for the result of step n.
        It waits for a step itself only if a save, a held-out score or a profile comes after it. The
        steps in a checkpoint are logged before it is saved.

        Raises RunEnded when it is asked to stop, the disk is full, or steps are not finite.
        """
        setup, monitor, steps = self.setup, self.monitor, self.setup.config.train.steps
        if first == steps:
            return params
        batches = _global_batches(setup.config, setup.data.train, first, batch_sharding(setup.mesh))
        batch = next(batches)
        run_step, params, opt_state = self._compiled(params, opt_state, batch)
        # A log with steps and no checkpoint then means that checkpoints were lost (workdir.claim).
        self.checkpoints.wait()
        saved = first - self.guard.skipped  # updates in the newest checkpoint
        monitor.show_progress(first)
        for step in range(first + 1, steps + 1):
            if step == monitor.profile[0]:
                self._finish()
                with monitor.pause():
                    monitor.start_profile()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                params, opt_state, told = run_step(params, opt_state, batch)
            self._finish()
            self.under_way.append((step, told))
            self.checkpoints.check()
            if step < steps:
                with monitor.waiting():
                    batch = next(batches)
            stop = self.must_stop(step) and step < steps
            saved = self._after(step, params, opt_state, stop, saved)
            if stop:
                self.checkpoints.wait()
                raise RunEnded(
                    f"stopped on request after step {step}. {way_on(setup.workdir)}", EXIT_CODE
                )
        return params

    def _compiled(
        self, params: dict, opt_state: Any, batch: Batch
    ) -> tuple[Callable[..., Any], dict, Any]:
        """The compiled step, and parameters and optimizer state where it wants them."""
        setup = self.setup
        graphdef, _ = nnx.split(setup.initial.model)
        step, places = jit_step(
            graphdef, setup.config, self.tx, params, opt_state, self.shardings, setup.mesh
        )
        params, opt_state = jax.device_put((params, opt_state), places, donate=True)
        began = time.perf_counter()
        compiled = step.lower(params, opt_state, batch).compile()
        setup.say(f"compiled the step in {time.perf_counter() - began:.0f} s")
        return compiled, params, opt_state

    def _finish(self) -> None:
        """Blocks on in-flight steps and logs their metrics."""
        for step, told in self.under_way:
            values = jax.device_get(told)
            try:
                self.guard.check(step, values)
            finally:
                self.monitor.step(step, values | {"skipped": self.guard.skipped})
        self.under_way.clear()

    def _after(self, step: int, params: dict, opt_state: Any, stop: bool, saved: int) -> int:
        """Profile, held-out score and save after a step; returns the updates saved so far."""
        monitor, model = self.monitor, self.setup.initial.model
        settings = self.setup.config.train
        last = step == settings.steps
        saves = step % settings.checkpoint_every == 0 or last or stop
        scores = step % settings.eval_every == 0 or last
        if saves or scores or step == monitor.profile[1]:
            self._finish()
        if step == monitor.profile[1]:
            with monitor.pause():
                monitor.stop_profile()
        loss = None
        if scores:
            with monitor.pause():
                loss = self.report(f"step {step}", rebuild(nnx.split(model)[0], params), step)
        # Saved after scoring and logging, so that a run resumed from here has both. Not saved if
        # all steps since the last save were skipped: the same weights would displace others.
        updates = step - self.guard.skipped
        if not saves or not (updates > saved or stop or last):
            return saved
        with monitor.pause():
            tokenizer, logged = self.setup.workdir / "tokenizer", monitor.log.sync()
            self.checkpoints.save(
                step, model, params, opt_state, tokenizer, loss, logged, self.guard.in_a_row
            )
        return updates


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
