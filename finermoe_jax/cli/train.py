"""`finermoe train`, `python train.py`."""

import datetime
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags, print_config
from finermoe_jax.errors import InputError


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_config(default="demo")
    flags.add_path(
        "workdir",
        "where the run lives; it is resumed from there (default: a new directory under runs/)",
    )
    flags.add_names(
        "allow_changes",
        "fields or groups of the config that may differ from those that the workdir's run began "
        "with: train.steps,optimizer.learning_rate",
    )
    flags.add_number(
        "heartbeat_seconds", 60.0, "of several processes: how long one may be silent until all end"
    )
    flags.add_number(
        "start_timeout", 300.0, "of several processes: seconds to wait for all to start"
    )
    flags.add_boolean("tensorboard", "also write TensorBoard event files, into the workdir")
    flags.add_text("wandb", "", "also tell Weights & Biases; the value is the project")
    flags.add_text(
        "profile_steps",
        "",
        "A:B traces steps A to B, for xprof and Perfetto, into profile/ in the workdir",
    )
    flags.add_number(
        "peak_tflops",
        None,
        "what one device can do, in TFLOP/s, for MFU (default: the bfloat16 peak of a known TPU or "
        "GPU; no MFU elsewhere)",
    )


def main(flags: Flags) -> None:
    """Runs the command."""
    config = flags.run_config()
    if flags.print_config:
        print_config(config)
        return
    silence, start_timeout = flags.heartbeat_seconds, flags.start_timeout
    if not 1 <= silence <= 3600:
        raise InputError(f"--heartbeat_seconds={silence} must lie in 1 … 3600")
    if not 1 <= start_timeout <= 86400:
        raise InputError(f"--start_timeout={start_timeout} must lie in 1 … 86400")
    from finermoe_jax.runtime import distributed, heartbeat, host_memory
    from finermoe_jax.training import monitor, run
    from finermoe_jax.training.workdir import way_on

    telemetry = monitor.Telemetry(
        flags.tensorboard,
        flags.wandb,
        monitor.read_steps(flags.profile_steps),
        None if flags.peak_tflops is None else flags.peak_tflops * 1e12,
    )
    host_memory.keep_freed()
    distributed.initialize(silence, start_timeout)
    workdir = flags.workdir
    if not workdir:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        workdir = distributed.exchange(f"runs/{flags.config_name}-{stamp}")[0]
    with heartbeat.heartbeats(silence, lambda: way_on(Path(workdir))):
        run.train(config, Path(workdir), telemetry=telemetry, allow_changes=flags.allow_changes)


COMMAND = Command("--config=configs/demo.py [--workdir=DIR]", define, main)
