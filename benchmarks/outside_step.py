"""Measures the time that a run spends outside the training step, and what it compiles.

    python benchmarks/outside_step.py [--config=configs/demo.py] [--steps=60]

Runs the loop of train.py in a temporary workdir, with a save and a held-out evaluation every 20
steps. The device counts as busy with step n from when n is dispatched and n - 1 has ended until n
has ended. All other time of the loop is outside the step: input, logging, starting saves. Held-out
evaluations are omitted from both. On a CPU the host's work competes with the step for cores, so
the CPU time of the loop's thread is listed too.
"""

import argparse
import contextlib
import dataclasses
import queue
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax

from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.training import loop, monitor, run

EVERY = 20
COMPILED = "/jax/core/compile/backend_compile_duration"


class TimedStep:
    """A jitted step that records when it is dispatched and when it has ended."""

    def __init__(self, step: Any):
        self.step, self.run = step, None
        self.called: list[float] = []
        self.ended: list[float] = []
        self.waiting: queue.Queue = queue.Queue()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Records when each step's loss is ready."""
        while True:
            self.waiting.get().block_until_ready()
            self.ended.append(time.perf_counter())

    def lower(self, *arguments: Any) -> "TimedStep":
        """Like `lower` of jax.jit."""
        self.step = self.step.lower(*arguments)
        return self

    def compile(self) -> "TimedStep":
        """Like `compile` of a lowered jax.jit."""
        self.run = self.step.compile()
        return self

    def __call__(self, *arguments: Any) -> Any:
        """Dispatches a step."""
        self.called.append(time.perf_counter())
        out = self.run(*arguments)
        self.waiting.put(out[2]["loss"])
        return out

    def busy(self, first: int) -> float:
        """Seconds that the device was busy from step `first` on, counted from 0."""
        begins = [max(a, b) for a, b in zip(self.called[1:], self.ended, strict=False)]
        spans = [end - begin for end, begin in zip(self.ended[1:], begins, strict=True)]
        return sum(spans[first - 1 :])


class Watched:
    """Wraps functions that the loop calls and sums the time in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Times calls of owner.name under this label."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.timing(label):
                return inner(*arguments, **keywords)

        setattr(owner, name, timed)

    @contextlib.contextmanager
    def timing(self, label: str) -> Any:
        """Adds the time inside the context to a label."""
        began, cpu = time.perf_counter(), time.thread_time()
        yield
        self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - began
        self.cpu[label] = self.cpu.get(label, 0.0) + time.thread_time() - cpu


def main() -> None:
    """Runs the loop and prints the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="demo", help="a preset or a config file")
    parser.add_argument("--steps", type=int, default=60, help="number of steps")
    arguments = parser.parse_args()
    config, steps = run_config(preset(arguments.config).to_dict()), arguments.steps
    config = dataclasses.replace(
        config,
        prompts=(),
        train=dataclasses.replace(
            config.train, steps=steps, eval_every=EVERY, checkpoint_every=EVERY
        ),
    )
    watched, found, compiled = Watched(), {}, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append((len(found["step"].called), seconds))
            if name == COMPILED and "step" in found
            else None
        )
    )

    def jit_step(*arguments: Any, inner: Any = loop.jit_step) -> Any:
        step, places = inner(*arguments)
        found["step"] = TimedStep(step)
        return found["step"], places

    def waiting(self: Any, inner: Any = monitor.Monitor.waiting) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(inner(self))
        stack.enter_context(watched.timing("input"))
        return stack

    loop.jit_step = jit_step
    monitor.Monitor.waiting = waiting
    watched.wrap(monitor.Monitor, "step", "logging")
    watched.wrap(run.TrainingCheckpoints, "save", "start of saves")
    watched.wrap(run, "held_out_loss", "held-out scores")
    with tempfile.TemporaryDirectory() as place:
        workdir = Path(place) / "run"
        steps_of_a_run = loop.Loop.run
        marks: dict[str, float] = {}
        spent: dict[str, float] = {}

        def timed_loop(*arguments: Any) -> Any:
            watched.seconds.clear()
            watched.cpu.clear()
            result = steps_of_a_run(*arguments)
            marks["end"] = time.perf_counter()
            spent.update(watched.seconds)
            return result

        loop.Loop.run = timed_loop
        run.train(config, workdir, say=lambda _: None)
    step = found["step"]
    # From the second step on, because the first one also warms up the allocator.
    total = marks["end"] - step.ended[0] - spent.get("held-out scores", 0.0)
    outside = total - step.busy(1)
    late = [at for at, _ in compiled if at > 2]
    print(f"{steps} steps, {jax.devices()[0].device_kind}: {total:.1f} s in the loop")
    print(f"outside the step    {outside:8.3f} s  {outside / total:6.2%}")
    for label, seconds in spent.items():
        print(
            f"  in {label:<17}{seconds:8.3f} s  {seconds / total:6.2%}   of it CPU "
            f"{watched.cpu[label]:.3f} s"
        )
    ahead = sum(a < b for a, b in zip(step.called[1:], step.ended, strict=False))
    print(f"steps dispatched while the previous one was running: {ahead} of {steps - 1}")
    print(f"programs compiled after step 2: {len(late)} {late}")


if __name__ == "__main__":
    main()
