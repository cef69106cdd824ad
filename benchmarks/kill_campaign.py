"""Kills and interrupts training runs and checks that they lose nothing (docs/reliability.md).

    python benchmarks/kill_campaign.py [--kills=50] [--steps=4000] [--output=FILE.json]

A small model trains on CPUs in processes of train.py. After each test the run must be bit-equal to
an uninterrupted one: every line of metrics.jsonl except its times, and every array of the last
checkpoint. Tests, in this order:

    interrupt  200 steps with SIGTERM and SIGKILL at random steps, in one process and in two
    processes  the same with 1, 2, 1 and 2 processes in turn; losses agree to 1e-5
    disk       a save does not fit on a tmpfs, which is then enlarged
    kills      SIGKILL at random moments: during the start, training, and a save
"""

import argparse
import json
import logging
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.training.monitor import MEASURED
from finermoe_jax.weights.integrity import damage, saved_steps

ROOT = Path(__file__).parent.parent
EVERY = 25  # steps between saves
CONFIG = f"""
from finermoe_jax import default_config

def get_config():
    config = default_config()
    config.dense = dict(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4, rms_norm_eps=1e-6,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
    )
    config.moe.update(intermediate_granularity=4, output_granularity=2)
    config.data.update(
        tokenizer="demo/model", path="demo/LICENSE.pydoc.txt", sequence_length=16,
        global_batch_size=8, eval_windows=4,
    )
    config.optimizer.update(learning_rate=1e-3, warmup_fraction=0.0)
    config.train.update(
        compute_dtype="float32", remat="none", checkpoint_every={EVERY}, eval_every=100,
    )
    return config
"""


# --- runs -----------------------------------------------------------------------------------


def command(folder: Path, workdir: Path, steps: int) -> list[str]:
    """The command line of a run of `steps` steps."""
    config = folder / "tiny.py"
    if not config.exists():
        config.write_text(CONFIG)
    return [
        sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}",
        f"--config.train.steps={steps}", "--heartbeat_seconds=6",
    ]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Environment with one device per process and a compilation cache shared by all runs."""
    return dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        JAX_COMPILATION_CACHE_DIR=str(folder / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.05",
    )


def start(folder: Path, workdir: Path, steps: int, processes: int = 1) -> list[subprocess.Popen]:
    """Starts the processes of a run; their output goes to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment(folder)
    if processes > 1:
        shared |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    started = []
    for process in range(processes):
        with (folder / f"{workdir.name}.{process}.log").open("a") as log:
            own = shared | ({"JAX_PROCESS_ID": str(process)} if processes > 1 else {})
            started.append(
                subprocess.Popen(
                    command(folder, workdir, steps), env=own, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return started


def ends(started: list[subprocess.Popen], seconds: float = 600) -> list[int]:
    """Waits for all processes and returns their exit codes; kills those that take too long."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def straight(folder: Path, name: str, steps: int, processes: int = 1) -> Path:
    """Runs to the last step, resuming if the workdir exists. Returns the workdir."""
    codes = ends(start(folder, folder / name, steps, processes), 3600)
    assert codes == [0] * processes, (name, codes)
    return folder / name


def logged(workdir: Path) -> int:
    """The last complete step in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        try:
            return json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue
    return 0


def saving(workdir: Path) -> bool:
    """Returns True if a save is in progress, or was when the run ended."""
    try:
        names = os.listdir(workdir / "checkpoints")
    except FileNotFoundError:
        return False
    return any("orbax-checkpoint-tmp" in name for name in names)


def wait_for(condition: Callable[[], bool], started: list[subprocess.Popen]) -> bool:
    """Waits for the condition. Returns False if a process ends first."""
    while not condition():
        if any(process.poll() is not None for process in started):
            return False
        time.sleep(0.0005)
    return True


# --- comparisons ----------------------------------------------------------------------------


def arrays(workdir: Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint: weights and optimizer state."""
    step = workdir / "checkpoints" / str(saved_steps(workdir / "checkpoints")[-1])
    leaves: list[np.ndarray] = []
    logging.getLogger("absl").setLevel("ERROR")  # of files that only Orbax's own manager writes
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("params", "optimizer"):
            arguments = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                reader.metadata(step / item).item_metadata.tree,
            )
            restored = reader.restore(
                step / item, args=ocp.args.PyTreeRestore(restore_args=arguments)
            )
            leaves += jax.tree.leaves(restored)
    return leaves


def lines(workdir: Path) -> list[dict]:
    """Lines of metrics.jsonl without fields that depend on time or machine."""
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def assert_same(ours: Path, theirs: Path) -> None:
    """Asserts that two runs have the same steps, each once, and bit-equal arrays."""
    assert lines(ours) == lines(theirs), (ours, theirs)
    ours_scored, scored = (read_lines(place / "evals.jsonl") for place in (ours, theirs))
    assert ours_scored == scored, (ours_scored, scored)
    for a, b in zip(arrays(ours), arrays(theirs), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (ours, theirs)


# --- the campaign ---------------------------------------------------------------------------


def kill_once(
    folder: Path, workdir: Path, steps: int, how: str, pause: float, chance: random.Random
) -> dict:
    """Starts or resumes a run, kills it, and returns a record. "done": the run ended first.

    how: "starting" kills at a random moment of the start, "training" `pause` seconds after the
    first new step, "saving" in the first save after that.
    """
    before = logged(workdir)
    resumed = (saved_steps(workdir / "checkpoints") or [0])[-1]
    started = start(folder, workdir, steps)
    if how == "starting":
        time.sleep(chance.uniform(0, 6))
    else:
        # The log is cut to the checkpoint first; then it grows.
        wait_for(lambda: resumed < logged(workdir) != before, started)
        time.sleep(pause)
    if how == "saving":
        wait_for(lambda: not saving(workdir), started)
        wait_for(lambda: saving(workdir), started)
        time.sleep(chance.uniform(0, 0.03))
    started[0].kill()
    code = started[0].wait()
    known = saved_steps(workdir / "checkpoints")
    newest = known[-1] if known else 0
    found = {
        "how": how,
        "done": code == 0,
        "resumed_from": resumed,
        "reached": logged(workdir),
        "newest": newest,
        "lost": max(0, logged(workdir) - newest),
        "in_save": saving(workdir),
        "damage": damage(workdir / "checkpoints" / str(newest)) if known else [],
    }
    assert code in (0, -signal.SIGKILL), found
    assert newest >= resumed and not found["damage"], found
    # A kill during a save loses that save and the steps that ran meanwhile.
    assert found["lost"] <= EVERY or (found["in_save"] and found["lost"] <= 2 * EVERY), found
    return found


def kills(folder: Path, count: int, steps: int, seed: int, same: Path) -> list[dict]:
    """Kills runs `count` times; each run must end bit-equal to the uninterrupted run `same`."""
    chance, found, runs = random.Random(seed), [], 0
    bar = tqdm(total=count, desc="kills", unit="kill")
    while len(found) < count:
        runs += 1
        workdir, done = folder / f"killed-{runs}", False
        while not done and len(found) < count:
            how = chance.choices(("starting", "training", "saving"), (1, 2, 2))[0]
            one = kill_once(folder, workdir, steps, how, chance.uniform(0, 8), chance)
            if not (done := one.pop("done")):
                found.append(one)
                tqdm.write(json.dumps(one))
                bar.update()
        if not done:
            assert ends(start(folder, workdir, steps)) == [0], workdir
        assert_same(workdir, same)
        log = (folder / f"{workdir.name}.0.log").read_text()
        assert "damaged" not in log and "Traceback" not in log, workdir
        shutil.rmtree(workdir)
    bar.close()
    return found


def stopping_points(chance: random.Random, processes: list[int]) -> list[tuple[int, int, int]]:
    """(step, signal, processes): a random step per 40, SIGTERM and SIGKILL in turn."""
    signals = (signal.SIGTERM, signal.SIGKILL)
    return [
        (40 * i + chance.randrange(5, 25), signals[i % 2], count)
        for i, count in enumerate(processes)
    ]


def interrupt(
    folder: Path,
    workdir: Path,
    steps: int,
    stops: list[tuple[int, int, int]],
    chance: random.Random,
) -> Path:
    """Interrupts a run at each (step, signal, processes), then finishes it; its workdir."""
    for step, number, processes in stops:
        started = start(folder, workdir, steps, processes)
        assert wait_for(lambda step=step: logged(workdir) >= step, started), (workdir, step)
        started[chance.randrange(processes)].send_signal(number)
        codes = ends(started)
        expected = {75} if number == signal.SIGTERM else {1, -signal.SIGKILL, -signal.SIGABRT}
        assert set(codes) <= expected, (workdir, step, number, codes)
        if number == signal.SIGTERM:
            assert logged(workdir) == saved_steps(workdir / "checkpoints")[-1], workdir
    return straight(folder, workdir.name, steps, stops[-1][2])


def largest_difference(ours: Path, theirs: Path) -> float:
    """Largest relative difference of the losses of two runs over the same steps."""
    a, b = lines(ours), lines(theirs)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    return max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True))


def disk(folder: Path, steps: int, size: str) -> tuple[int, int, Path] | None:
    """Runs on a tmpfs that is too small for the saves, and resumes after enlarging it.

    Returns both exit codes and a copy of the workdir, or None if nothing can be mounted.
    """
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", place]).returncode:
        return None
    run = f"{shlex.join(command(folder, place / 'disk', steps))} >> disk.0.log 2>&1"
    script = f"""
        mount -t tmpfs -o size={size} none disk
        {run}; first=$?
        mount -o remount,size=64m disk
        {run}; second=$?
        cp -r disk/disk disk-copy
        echo $first $second
    """
    said = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], check=True, stdout=subprocess.PIPE, text=True,
        cwd=folder, env=environment(folder),
    ).stdout  # fmt: skip
    first, second = map(int, said.split())
    return first, second, folder / "disk-copy"


def campaign(folder: Path, count: int, steps: int, seed: int) -> dict:
    """Runs all tests. Raises AssertionError at the first loss or difference."""
    chance, began = random.Random(seed), time.monotonic()
    result: dict = {}
    whole = {
        processes: straight(folder, f"straight-{processes}", 200, processes) for processes in (1, 2)
    }
    for processes in (1, 2):
        stops = stopping_points(chance, [processes] * 4)
        ours = interrupt(folder, folder / f"interrupted-{processes}", 200, stops, chance)
        assert_same(ours, whole[processes])
        result[f"interrupt_{processes}"] = [(step, int(number)) for step, number, _ in stops]
        print(f"200 steps, {processes} process(es), interrupted at {stops}: bit-equal")
    stops = stopping_points(chance, [1, 2, 1, 2])
    ours = interrupt(folder, folder / "changed", 200, stops, chance)
    result["processes"] = {
        "interrupted": largest_difference(ours, whole[1]),
        "straight": largest_difference(whole[2], whole[1]),
    }
    print(f"1, 2, 1, 2 processes against 1: {result['processes']}")
    assert max(result["processes"].values()) < 1e-5
    for size in ("2600k", "6m"):  # too small for the first save; for one of the later ones
        if found := disk(folder, 200, size):
            first, second, copy = found
            assert (first, second) == (1, 0), found
            assert_same(copy, whole[1])
            shutil.rmtree(copy)
            log = (folder / "disk.0.log").read_text()
            assert "Traceback" not in log
            result[f"disk_{size}"] = log[log.rindex("error: ") :].splitlines()[0]
            print(result[f"disk_{size}"])
    same = straight(folder, "straight", steps)
    found = kills(folder, count, steps, seed, same)
    result |= {
        "kills": found,
        "kills_in_a_save": sum(one["in_save"] for one in found),
        "most_lost": max(one["lost"] for one in found),
        "most_lost_outside_a_save": max(one["lost"] for one in found if not one["in_save"]),
        "steps_between_saves": EVERY,
        "minutes": (time.monotonic() - began) / 60,
    }
    return result


def main() -> None:
    """Runs the campaign in a temporary directory, which is kept if a test fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--steps", type=int, default=4000, help="steps of each killed run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--folder", type=Path, help="directory for the runs (default: a temporary one)"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
    result = campaign(folder, arguments.kills, arguments.steps, arguments.seed)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "kills"}, indent=1))
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
