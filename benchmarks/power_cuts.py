"""Simulates power cuts during training and after conversion and data preparation.

    sudo python -m benchmarks.power_cuts [--cuts=12] [--steps=600] [--output=FILE.json]

Needs root and loop devices. The work runs on a file system in an image file, ext4 and, with
mkfs.xfs, xfs. A cut stops the process, copies the image and continues the process. The copy has
what the kernel had written to the image by then, like a disk after a power cut. It is mounted,
which replays the journal, and checked (docs/reliability.md has results):

    training       every checkpoint saved at least a second before is complete; the same command
                   resumes and ends bit-equal to a run without a cut: every line of metrics.jsonl
                   except its times, every score, every array
    convert_hf.py, prepare    after a cut when the command has ended, every file is complete
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from benchmarks.kill_campaign import (
    EVERY,
    ROOT,
    assert_same,
    ends,
    environment,
    logged,
    saving,
    start,
    straight,
    wait_for,
)
from finermoe_jax.weights.integrity import damage, saved_steps

# Lazy initialization would write to the image all the time.
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q"],
}
IMAGE_BYTES = 400 << 20
# Seconds after a checkpoint's rename within which its save must be on the disk.
SEEN = 1.0
KINDS = ("starting", "training", "saving", "saved")


# --- images ---------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(image: Path, place: Path, kind: str) -> Iterator[Path]:
    """Mounts an image and unmounts it at the end."""
    place.mkdir(exist_ok=True)
    options = "loop,nouuid" if kind == "xfs" else "loop"  # its original may be mounted
    subprocess.run(["mount", "-o", options, image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def new_image(folder: Path, kind: str) -> Path:
    """Creates an empty file system in an image file."""
    image = folder / f"{kind}.img"
    with image.open("wb") as stream:
        stream.truncate(IMAGE_BYTES)
    subprocess.run([*MAKE[kind], image], check=True)
    return image


def cut(image: Path, copy: Path) -> Path:
    """Copies an image while nothing writes to it; the processes on it must be stopped or ended."""
    said = subprocess.run(["losetup", "-j", image], check=True, stdout=subprocess.PIPE, text=True)
    device = Path("/sys/block") / Path(said.stdout.partition(":")[0]).name / "stat"

    def writes() -> tuple[str, str]:
        fields = device.read_text().split()
        return fields[4], fields[8]  # completed, in flight

    while True:
        before = writes()
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        if before == writes() and before[1] == "0":
            return copy


def refuse_without_loop_devices() -> None:
    """Exits with a message if images cannot be mounted."""
    if os.geteuid() != 0:
        sys.exit("power_cuts.py mounts images, which needs root; start it with sudo")
    if subprocess.run(["losetup", "-f"], capture_output=True).returncode:
        sys.exit("power_cuts.py needs loop devices, and losetup finds none; use another machine")


# --- training -------------------------------------------------------------------------------


def cut_run(folder: Path, kind: str, count: int, steps: int, chance: random.Random) -> list[dict]:
    """Trains on an image with `count` cuts. Returns a record of each cut."""
    found: list[dict] = []
    image = new_image(folder, kind)
    with mounted(image, folder / kind, kind) as place:
        for run in range(1, 100):
            workdir = place / f"run-{run}"
            started = start(folder, workdir, steps)
            how = iter(KINDS)
            while len(found) < count and started[0].poll() is None:
                if one := cut_once(workdir, started, next(how, chance.choice(KINDS[1:])), chance):
                    one |= {"file_system": kind, "run": workdir.name}
                    cut(image, folder / f"{kind}-{len(found)}.img")
                    found.append(one)
                started[0].send_signal(signal.SIGCONT)
            if len(found) == count:
                break
            shutil.rmtree(workdir)
        started[0].kill()
        ends(started)
    return found


def cut_once(
    workdir: Path, started: list[subprocess.Popen], how: str, chance: random.Random
) -> dict | None:
    """Stops a run at a moment of kind `how`. Returns None if it has ended before."""
    steps = workdir / "checkpoints"
    if how == "starting":
        wait_for(lambda: workdir.exists(), started)
        time.sleep(chance.uniform(0, 3))
    else:
        wait_for(lambda: bool(saved_steps(steps)), started)
        time.sleep(chance.uniform(0.5, 4))
    known = saved_steps(steps)
    time.sleep(SEEN)
    if how in ("saving", "saved"):
        wait_for(lambda: saving(workdir), started)
        time.sleep(chance.uniform(0, 0.05))
    if how == "saved":
        wait_for(lambda: not saving(workdir), started)
    if started[0].poll() is not None:
        return None
    started[0].send_signal(signal.SIGSTOP)
    time.sleep(0.2)  # for in-flight writes of the kernel
    return {
        "how": how,
        "saved": known[-1] if known else None,
        "newest": (saved_steps(steps) or [None])[-1],
        "logged": logged(workdir),
        "in_save": saving(workdir),
    }


def look(folder: Path, number: int, one: dict, steps: int, same: Path) -> dict:
    """Mounts the copy of a cut, checks its checkpoints, resumes the run and compares the result."""
    kind = one["file_system"]
    image = folder / f"{kind}-{number}.img"
    with mounted(image, folder / f"{kind}-{number}", kind) as place:
        workdir = place / one["run"]
        known = saved_steps(workdir / "checkpoints")
        found = one | {
            "there": known[-1] if known else None,
            # Older ones may be half removed.
            "damage": damage(workdir / "checkpoints" / str(known[-1])) if known else [],
            "lost_steps": one["logged"] - (known[-1] if known else 0),
        }
        if workdir.exists() and (workdir / "config.json").exists():
            json.loads((workdir / "config.json").read_text())
        tqdm.write(json.dumps(found))
        assert not found["damage"], found
        assert one["saved"] is None or (known and known[-1] >= one["saved"]), found
        assert found["lost_steps"] <= 2 * EVERY, found
        log = folder / f"{one['run']}.0.log"
        log.unlink(missing_ok=True)
        assert ends(start(folder, workdir, steps)) == [0], log.read_text()
        assert not any(word in log.read_text() for word in ("damaged", "Traceback", "shortened"))
        assert_same(workdir, same)
    image.unlink()
    return found


# --- commands -------------------------------------------------------------------------------


def cut_commands(folder: Path, kind: str, checkpoint: Path) -> list[str]:
    """Cuts the power when a command has ended and checks that every file of its target is there."""
    commands = {
        "hf": ["convert_hf.py", f"--source={checkpoint}", "--to=hf"],
        "orbax": ["convert_hf.py", f"--source={folder / kind / 'new' / 'hf'}", "--to=orbax"],
        "tokens": [
            "-m", "finermoe_jax", "prepare", "--source=demo/LICENSE.pydoc.txt",
            "--tokenizer=demo/model", "--shard_tokens=1000", "--processes=1",
        ],
    }  # fmt: skip
    done = []
    for name, arguments in commands.items():
        image = folder / f"{kind}.img"
        with mounted(image, folder / kind, kind) as place:
            target = place / "new" / name
            subprocess.run(
                [sys.executable, *arguments, f"--target={target}"], check=True, cwd=ROOT,
                env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            copy = cut(image, folder / "command.img")
            whole = content(target)
            with mounted(copy, folder / "command", kind) as after:
                assert content(after / "new" / name) == whole, (kind, name)
        copy.unlink()
        done.append(f"{kind}: {name}, {len(whole)} files")
        print(done[-1])
    return done


def content(directory: Path) -> dict[str, bytes]:
    """Contents of all files in a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def campaign(folder: Path, count: int, steps: int, seed: int) -> dict:
    """Runs all tests. Raises AssertionError at the first loss or difference."""
    chance, began = random.Random(seed), time.monotonic()
    kinds = [kind for kind, command in MAKE.items() if shutil.which(command[0])]
    same, found, commands = straight(folder, "straight", steps), [], []
    for kind in kinds:
        cuts = cut_run(folder, kind, count, steps, chance)
        bar = tqdm(list(enumerate(cuts)), desc=f"looking at {kind}", unit="cut")
        found += [look(folder, number, one, steps, same) for number, one in bar]
        checkpoint = same / "checkpoints" / str(saved_steps(same / "checkpoints")[-1])
        commands += cut_commands(folder, kind, checkpoint)
        (folder / f"{kind}.img").unlink()
    return {
        "cuts": found,
        "file_systems": kinds,
        "commands": commands,
        "cuts_in_a_save": sum(one["in_save"] for one in found),
        "most_lost_steps": max(one["lost_steps"] for one in found),
        "steps_between_saves": EVERY,
        "minutes": (time.monotonic() - began) / 60,
    }


def main() -> None:
    """Runs the campaign in a temporary directory, which is kept if a test fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cuts", type=int, default=12, help="cuts of training, on each file system"
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument(
        "--folder", type=Path, help="directory for images and runs (default: a temporary one)"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    refuse_without_loop_devices()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="power-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
    result = campaign(folder, arguments.cuts, arguments.steps, arguments.seed)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "cuts"}, indent=1))
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
