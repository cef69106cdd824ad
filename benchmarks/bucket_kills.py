"""Kills training runs in a bucket and checks that they lose nothing (docs/howto/buckets.md).

    python -m benchmarks.bucket_kills --workdir=gs://BUCKET/NAME [--kills=10] [--steps=200]

A small model trains on CPUs. SIGKILL ends the run at random moments: during its start, in training
and in saves. Each time the next run waits until the lock of the killed one has expired. The result
must be bit-equal to an uninterrupted run in a local workdir: every line of metrics.jsonl except its
times, and every array of the last checkpoint.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.kill_campaign import CONFIG, assert_same, ends, environment, logged, wait_for
from finermoe_jax.runtime.buckets import BucketPath, place
from finermoe_jax.runtime.lease import LEASE
from finermoe_jax.weights.integrity import damage, saved_steps, set_aside

TTL_SECONDS = 2.0  # of the lock, instead of a minute
EVERY = 5  # steps between saves
_PROGRAM = f"""
import sys
from finermoe_jax.cli.main import run
from finermoe_jax.runtime import lease
lease.TTL_SECONDS = {TTL_SECONDS}
run("train", sys.argv[1:])
"""


def start(
    folder: Path,
    workdir: str,
    scratch: Path | None,
    steps: int,
    popen: type = subprocess.Popen,
    more: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Starts a run, with `more` environment variables; its output goes to FOLDER/log."""
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "run.py").write_text(_PROGRAM)
    command = [
        sys.executable, str(folder / "run.py"), f"--config={folder / 'tiny.py'}",
        f"--workdir={workdir}", f"--config.train.steps={steps}",
        f"--config.train.checkpoint_every={EVERY}", "--heartbeat_seconds=6",
    ]  # fmt: skip
    if scratch:
        command.append(f"--scratch={scratch}")
    settings = environment(folder) | dict(more or {})
    with (folder / "log").open("a") as log:
        return popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)


def kill_once(
    folder: Path, workdir: BucketPath, steps: int, chance: random.Random, popen: type
) -> dict:
    """Starts or resumes a run and kills it; returns a record. "done": the run ended first."""
    resumed = (saved_steps(workdir / "checkpoints") or [0])[-1]
    scratch = Path(tempfile.mkdtemp(dir=folder)) / "run"  # as if on another machine
    started = start(folder, str(workdir), scratch, steps, popen)
    if starting := chance.random() < 0.25:
        time.sleep(chance.uniform(0, 4))
    else:
        # A save takes several steps.
        until = min(resumed + chance.randrange(1, 8 * EVERY), steps - EVERY)
        wait_for(lambda: logged(scratch) >= until, [started])
        time.sleep(chance.uniform(0, 0.3))
    started.kill()
    code = started.wait()
    known = saved_steps(workdir / "checkpoints")
    found = {
        "starting": starting,
        "done": code == 0,
        "resumed_from": resumed,
        "reached": logged(scratch),
        "newest": known[-1] if known else 0,
        "torn": len(set((workdir / "checkpoints").names()) - {str(step) for step in known}),
        "damage": damage(workdir / "checkpoints" / str(known[-1])) if known else [],
    }
    assert code in (0, -signal.SIGKILL), found
    assert found["newest"] >= resumed and not found["damage"], found
    return found


def downloaded(workdir: BucketPath, target: Path) -> Path:
    """Copies a finished run to a local directory."""
    for name in workdir.objects():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).download(target / name)
    return target


def campaign(
    folder: Path,
    workdir: BucketPath,
    count: int,
    steps: int,
    seed: int = 0,
    popen: type = subprocess.Popen,
) -> list[dict]:
    """Kills a run `count` times, finishes it, and returns a record per kill.

    Raises AssertionError if the result differs from an uninterrupted local run.
    """
    chance, found = random.Random(seed), []
    for _ in range(count):
        found.append(kill_once(folder, workdir, steps, chance, popen))
        print(json.dumps(found[-1]), flush=True)
    last = start(folder, str(workdir), folder / "last" / "run", steps, popen)
    assert ends([last]) == [0], (folder / "log").read_text()
    assert not (workdir / LEASE).exists() and not set_aside(workdir / "checkpoints")
    straight = start(folder, str(folder / "straight"), None, steps, popen)
    assert ends([straight]) == [0]
    assert_same(downloaded(workdir, folder / "downloaded"), folder / "straight")
    said = (folder / "log").read_text()
    assert "Traceback" not in said and "damaged" not in said, said
    return found


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="a new workdir, gs://BUCKET/NAME")
    parser.add_argument("--kills", type=int, default=10, help="number of kills")
    parser.add_argument("--steps", type=int, default=200, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    arguments = parser.parse_args()
    workdir = place(arguments.workdir)
    assert isinstance(workdir, BucketPath), workdir
    with tempfile.TemporaryDirectory(prefix="bucket-kills-") as folder:
        found = campaign(Path(folder), workdir, arguments.kills, arguments.steps, arguments.seed)
    lost = max(one["reached"] - one["newest"] for one in found)
    resumed = sum(one["resumed_from"] > 0 for one in found)
    torn = sum(one["torn"] for one in found)
    print(f"{len(found)} kills, {resumed} of resumed runs, {torn} torn saves: bit-equal. "
          f"A kill cost at most {lost} steps; {EVERY} steps between saves")  # fmt: skip


if __name__ == "__main__":
    main()
