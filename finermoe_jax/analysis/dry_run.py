"""A run's needs and files, found by compiling its step on the devices that are here."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from finermoe_jax.analysis.aot import memory_of
from finermoe_jax.analysis.programs import Program, abstract_program
from finermoe_jax.analysis.topology import Target
from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.hardware import Chip, peak_flops
from finermoe_jax.config.run import RunConfig
from finermoe_jax.runtime import disk
from finermoe_jax.training.monitor import memory_gib
from finermoe_jax.training.run import check_run, silent
from finermoe_jax.training.storage import Workdir, readable_workdir
from finermoe_jax.training.workdir import claim

_GIB = 2**30


class Needs(NamedTuple):
    """Bytes that a run needs.

    Attributes:
      memory: per device, by kind.
      limit: of a device; None if it reports none. On a CPU, the machine's memory.
      checkpoint: one checkpoint's size.
      disk: of all checkpoints that exist at one time.
      free: on the workdir's disk; None in a bucket.
      slack: the peak may be so many times the sum. A CPU's allocator keeps freed memory for reuse,
        and what evaluations and saves leave behind does not always fit a step's large buffers.
    """

    memory: dict[str, int]
    limit: int | None
    checkpoint: int
    disk: int
    free: int | None
    slack: float = 1.0

    @property
    def total(self) -> int:
        """Memory of all kinds."""
        return sum(self.memory.values())

    @property
    def surely_fits(self) -> bool:
        """True if memory suffices with the slack, too."""
        return self.fits and (self.limit is None or self.total * self.slack <= self.limit)

    @property
    def fits(self) -> bool:
        """True if memory and disk suffice."""
        enough = self.limit is None or self.total <= self.limit
        return enough and (self.free is None or self.disk <= self.free)


def dry_run(
    config: RunConfig,
    workdir: str | os.PathLike,
    peak: float | None = None,
    say: Callable[[str], None] = print,
    allow_changes: Sequence[str] = (),
) -> Needs:
    """Checks a run's input, compiles its step, and says what it needs. Writes nothing.

    Args:
      config: of the run.
      workdir: of the run; a run to resume is checked as such. Local, or gs://bucket/run.
      peak: FLOP/s of one device; None: the published peak of a known device.
      say: prints a message, on the first process.
      allow_changes: as in `train`.

    Raises InputError as `train` does before its first step.
    """
    if jax.process_index() > 0:
        say = silent
    say("reading and checking the input …")
    with readable_workdir(workdir) as found:
        claim(found, config, allow_changes)
        setup = check_run(config, found, say, allow_changes)
    config, model = setup.config, setup.initial.model.config
    shape = dataclasses.replace(
        config, init_from="", dense=dataclasses.replace(model, moe=None), moe=model.moe
    )
    devices = tuple(setup.mesh.devices.flat)
    # Of the target only the devices are used; the mesh is chosen already.
    chip = Chip(0.0, "", 0.0, 0.0, 0.0)
    platform = {"gpu": "cuda"}.get(devices[0].platform, devices[0].platform)
    program = abstract_program(shape, Target("here", chip, platform, devices, 1, 1))
    say("compiling the training step …")
    began = time.perf_counter()
    compiled = program.lower().compile()
    say(f"compiled the step in {time.perf_counter() - began:.0f} s")
    needs = _needs(program, compiled, found, devices)
    for line in (*_memory(needs, devices), *_time(program, peak), *_files(needs, config, found)):
        say(line)
    return needs


def _needs(program: Program, compiled: Any, workdir: Workdir, devices: tuple) -> Needs:
    found = memory_of(compiled)
    state = program.parameter_bytes + program.optimizer_bytes
    memory = {
        "parameters": program.parameter_bytes,
        "optimizer state": program.optimizer_bytes,
        "gradients, activations, buffers": found["peak_bytes"] - state,
    }
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if devices[0].platform == "cpu":  # virtual devices share the machine
        memory = {kind: size * here for kind, size in memory.items()}
        memory["a checkpoint while it is saved"] = program.whole_state_bytes
        memory["Python and libraries"] = int(memory_gib() * _GIB)
        limit: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    train, checkpoint = program.config.train, program.whole_state_bytes
    kept = train.keep_checkpoints + train.keep_best + 1  # one more while it is saved
    free = shutil.disk_usage(disk.existing(workdir)).free if isinstance(workdir, Path) else None
    slack = 2.0 if devices[0].platform == "cpu" else 1.0
    return Needs(memory, limit, checkpoint, kept * checkpoint, free, slack)


def _memory(needs: Needs, devices: tuple) -> list[str]:
    kind = "this machine" if devices[0].platform == "cpu" else f"each of {len(devices)} devices"
    lines = [f"memory of {kind}, by the compiler's estimate:"]
    lines += [f"  {name:<34}{size / _GIB:9.3f} GiB" for name, size in needs.memory.items()]
    limit = "" if needs.limit is None else f" of {needs.limit / _GIB:.3f} GiB"
    lines.append(f"  {'together':<34}{needs.total / _GIB:9.3f} GiB{limit}")
    if needs.slack > 1:
        most = needs.total * needs.slack / _GIB
        lines.append(f"  the process keeps freed memory: its peak may reach {most:.1f} GiB")
    return lines


def _time(program: Program, peak: float | None) -> list[str]:
    config, devices = program.config, program.mesh.size
    length = config.data.sequence_length
    flops = training_flops(program.model, length, config.train.freeze) * program.tokens
    lines = [
        f"a step: {program.tokens:,} tokens, {flops:.3g} model FLOPs; all "
        f"{config.train.steps:,} steps: {program.tokens * config.train.steps:,} tokens"
    ]
    rate = peak or peak_flops(jax.devices()[0].device_kind)
    if rate is None:
        return [*lines, "time per step: not known on this device; --peak_tflops gives a bound"]
    seconds = flops / devices / rate
    hours = seconds * config.train.steps / 3600
    return [
        *lines,
        f"time per step: at least {seconds:.3g} s at {rate / 1e12:.0f} TFLOP/s per device, a peak "
        f"that no program reaches; the run: at least {hours:.3g} h",
    ]


def _files(needs: Needs, config: RunConfig, workdir: Workdir) -> list[str]:
    train = config.train
    best = f" and the {train.keep_best} best" if train.keep_best else ""
    local = disk.existing(workdir) if isinstance(workdir, Path) else None
    return [
        f"written to {workdir}: logs, tokenizer/, plots and checkpoints/",
        f"  a checkpoint of {needs.checkpoint / _GIB:.3f} GiB every {train.checkpoint_every} steps",
        f"  the newest {train.keep_checkpoints}{best} are kept: up to {needs.disk / _GIB:.3f} GiB",
        *([f"  {disk.free_text(local)} there"] if local else []),
        "FITS" if needs.surely_fits else "MAY NOT FIT" if needs.fits else "DOES NOT FIT",
    ]
