"""`finermoe train`, `python train.py`."""

import datetime

from finermoe_jax.cli.flags import Command, Flags, print_config
from finermoe_jax.errors import InputError


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_config(default="demo")
    flags.add_path(
        "workdir",
        "new directory, or a run to resume; local or gs://bucket/run (default: a new one in runs/)",
        buckets=True,
    )
    flags.add_path(
        "scratch", "local directory of a run in a bucket (default: one in ~/.cache/finermoe-jax)"
    )
    flags.add(
        "allow_changes",
        [],
        "config fields or groups that may differ from the resumed run's config, such as "
        "train.steps,optimizer.learning_rate",
    )
    flags.add(
        "dry_run",
        False,
        "check the input, compile the step, print what the run needs and writes, and exit",
    )
    flags.add(
        "heartbeat_seconds", 60.0, "end the run if a process sends no heartbeat for this long"
    )
    flags.add("start_timeout", 300.0, "seconds to wait for all processes to start")
    flags.add("tensorboard", False, "also write TensorBoard event files to the workdir")
    flags.add("wandb", "", "also log to this Weights & Biases project")
    flags.add(
        "profile_steps",
        "",
        "A:B writes a trace of steps A to B to WORKDIR/profile (xprof, Perfetto)",
    )
    flags.add(
        "peak_tflops",
        float,
        "peak TFLOP/s of one device, for MFU (default: the bfloat16 peak of a known TPU or GPU; "
        "otherwise no MFU)",
    )


def main(flags: Flags) -> int:
    """Runs the command; returns 1 if a dry run finds that the run does not fit."""
    config = flags.run_config()
    if flags.print_config:
        print_config(config)
        return 0
    heartbeat_seconds, start_timeout = flags.heartbeat_seconds, flags.start_timeout
    if not 1 <= heartbeat_seconds <= 3600:
        raise InputError(f"--heartbeat_seconds={heartbeat_seconds} must be in 1 … 3600")
    if not 1 <= start_timeout <= 86400:
        raise InputError(f"--start_timeout={start_timeout} must be in 1 … 86400")
    from finermoe_jax.runtime import distributed, heartbeat, host_memory
    from finermoe_jax.runtime.buckets import place
    from finermoe_jax.training import monitor, run
    from finermoe_jax.training.workdir import resume_hint

    telemetry = monitor.Telemetry(
        flags.tensorboard,
        flags.wandb,
        monitor.read_steps(flags.profile_steps),
        None if flags.peak_tflops is None else flags.peak_tflops * 1e12,
    )
    host_memory.keep_freed()
    distributed.initialize(heartbeat_seconds, start_timeout)
    workdir = flags.workdir
    if not workdir:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        workdir = distributed.exchange(f"runs/{flags.config_name}-{stamp}")[0]
    run_place, allowed = place(workdir), flags.allow_changes
    if flags.dry_run:
        from finermoe_jax.analysis.dry_run import dry_run

        needs = dry_run(config, run_place, telemetry.peak_flops, allow_changes=allowed)
        return 0 if needs.fits else 1
    scratch = flags.scratch or None
    with heartbeat.heartbeats(heartbeat_seconds, lambda: resume_hint(run_place)):
        run.train(config, run_place, telemetry=telemetry, allow_changes=allowed, scratch=scratch)
    return 0


COMMAND = Command("--config=configs/demo.py [--workdir=DIR]", define, main)
