"""`finermoe train`, `python train.py`."""

import datetime
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags, print_config
from finermoe_jax.errors import InputError


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_config(default="demo")
    flags.add_path("workdir", "new directory, or that of a run to resume (default: under runs/)")
    flags.add_names(
        "allow_changes",
        "config fields or groups that may differ from the resumed run's config, such as "
        "train.steps,optimizer.learning_rate",
    )
    flags.add_number(
        "heartbeat_seconds", 60.0, "seconds without a process's heartbeat that end the run"
    )
    flags.add_number("start_timeout", 300.0, "seconds to wait until all processes have started")
    flags.add_boolean("tensorboard", "also write TensorBoard event files to the workdir")
    flags.add_text("wandb", "", "also log to this Weights & Biases project")
    flags.add_text(
        "profile_steps", "", "A:B traces steps A to B to WORKDIR/profile, for xprof and Perfetto"
    )
    flags.add_number(
        "peak_tflops",
        None,
        "peak TFLOP/s of one device, for MFU (default: the bfloat16 peak of a known TPU or GPU; "
        "otherwise no MFU)",
    )


def main(flags: Flags) -> None:
    """Runs the command."""
    config = flags.run_config()
    if flags.print_config:
        print_config(config)
        return
    heartbeat_seconds, start_timeout = flags.heartbeat_seconds, flags.start_timeout
    if not 1 <= heartbeat_seconds <= 3600:
        raise InputError(f"--heartbeat_seconds={heartbeat_seconds} must be in 1 … 3600")
    if not 1 <= start_timeout <= 86400:
        raise InputError(f"--start_timeout={start_timeout} must be in 1 … 86400")
    from finermoe_jax.runtime import distributed, heartbeat, host_memory
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
    with heartbeat.heartbeats(heartbeat_seconds, lambda: resume_hint(Path(workdir))):
        run.train(config, Path(workdir), telemetry=telemetry, allow_changes=flags.allow_changes)


COMMAND = Command("--config=configs/demo.py [--workdir=DIR]", define, main)
