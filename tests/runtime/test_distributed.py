"""Several real processes on this machine: one run's losses, shared checkpoints, a death."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

from finermoe_jax.data.prepare import prepare
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.distributed import initialize
from finermoe_jax.runtime.files import find
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.runtime.rendezvous import Member, meet
from tests.support import ROOT
from tests.support.processes import Process

HEARTBEAT = 6

# Small enough to compile in seconds. The data is a mixture of packed documents: whatever can
# differ between processes is in it.
CONFIG = """
from pathlib import Path

from finermoe_jax import default_config

HERE = Path(__file__).parent

def get_config():
    config = default_config()
    config.dense = dict(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4, rms_norm_eps=1e-6,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
    )
    config.moe.update(intermediate_granularity=4, output_granularity=2)
    config.data.update(
        tokenizer="demo/model", path=f"{HERE}/tokens:2,{HERE}/lines.jsonl:1", sequence_length=16,
        global_batch_size=8, eval_windows=4, packing="documents",
    )
    config.optimizer.update(learning_rate=1e-2, warmup_fraction=0.0)
    config.train.update(steps=4, compute_dtype="float32", remat="none", checkpoint_every=2)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.py").write_text(CONFIG)
    words = find("demo/LICENSE.pydoc.txt").read_text().split()
    for name, length in (("lines", 9), ("more", 5)):
        texts = (" ".join(words[i : i + length]) for i in range(0, len(words), length))
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "more.jsonl")], folder / "tokens", find("demo/model"), shard_tokens=999)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(place, workdir, *flags, processes, last=None, heartbeat=60):
    """Processes of one run, with 4 devices in all; the last one may have a directory of its own.

    On a busy machine a healthy process can be silent for more than HEARTBEAT seconds.
    """
    port = free_port()
    flags = [f"--config={place / 'tiny.py'}", f"--workdir={place / workdir}", *flags]
    shared = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        # Compilation is what takes the time here.
        XLA_FLAGS=f"--xla_force_host_platform_device_count={4 // processes} "
        "--xla_backend_optimization_level=0",
        JAX_COMPILATION_CACHE_DIR=str(place / "cache"),
    )
    if processes > 1:
        shared |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    return [
        Process(
            [sys.executable, str(ROOT / "train.py"), f"--heartbeat_seconds={heartbeat}", *flags],
            cwd=last if last and i == processes - 1 else place,
            env=shared | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
        )
        for i in range(processes)
    ]  # fmt: skip


def ends(started):
    """The (exit code, stdout, stderr) of each process."""
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def finished(place, workdir, *flags, processes):
    """A run that succeeds; what its first process says."""
    results = ends(start(place, workdir, *flags, processes=processes))
    assert [code for code, _, _ in results] == [0] * processes, "\n".join(map(str, results))
    for _, out, _ in results[1:]:
        # Gloo's threads print across each other.
        words = r"\[Gloo\]|Rank|is connected to|peer ranks|Expected number of connected|is"
        assert re.fullmatch(rf"(?:{words}|[\d\s.:])*", out), out
    return results[0][1]


def same_losses(a, b):
    """Equal but for the order of float32 sums."""
    for file, fields in (
        ("metrics", ("loss", "aux_loss", "grad_norm", "learning_rate")),
        ("expert_load", ("tokens", "aux_loss")),
        ("evals", ("loss",)),
    ):
        ours, theirs = read_lines(a / f"{file}.jsonl"), read_lines(b / f"{file}.jsonl")
        assert [x["step"] for x in ours] == [x["step"] for x in theirs]
        for field in fields:
            np.testing.assert_allclose(
                [x[field] for x in ours], [x[field] for x in theirs], rtol=1e-6, err_msg=field
            )


def until_step_2(place, source, target):
    """A copy of a workdir, as if the run had been broken off after step 2."""
    shutil.copytree(place / source, place / target)
    shutil.rmtree(place / target / "checkpoints" / "4")


def asked_to_stop(place, workdir, process):
    """Two processes, one of which gets SIGTERM before the first step; the step that both save."""
    started = start(place, workdir, processes=2)
    while not (place / workdir / "config.json").exists():
        assert not any(p.poll() for p in started)
        time.sleep(0.05)
    started[process].send_signal(signal.SIGTERM)
    results = ends(started)
    assert [code for code, _, _ in results] == [75, 75], results
    step = max(int(p.name) for p in (place / workdir / "checkpoints").iterdir())
    errors = [errors for _, _, errors in results]
    assert f"stopped on request after step {step}. Resume from step" in errors[0]
    assert "stopped on request" not in errors[1] and "Traceback" not in "".join(errors)
    return step


@pytest.mark.nightly
def test_one_run_by_one_process_or_two(place):
    """One test, so that parallel testing does not repeat the runs that all comparisons need."""
    finished(place, "one", processes=1)
    finished(place, "two", processes=2)
    assert [line["step"] for line in read_lines(place / "two" / "metrics.jsonl")] == [1, 2, 3, 4]
    same_losses(place / "two", place / "one")
    sources = json.loads((place / "two" / "data.json").read_text())["sources"]
    assert [(s["kind"], s["weight"]) for s in sources] == [("prepared", "2"), ("text", "1")]

    step = asked_to_stop(place, "two_then_one", 1)
    assert f"resumed from step {step} of 4" in finished(place, "two_then_one", processes=1)
    same_losses(place / "two_then_one", place / "one")

    until_step_2(place, "one", "one_then_two")
    shared_experts = ("--config.mesh.data=1", "--config.mesh.expert=4")
    said = finished(place, "one_then_two", *shared_experts, processes=2)
    assert "resumed from step 2 of 4" in said and "'expert': 4" in said
    same_losses(place / "one_then_two", place / "one")


@pytest.mark.nightly
@pytest.mark.parametrize("victim", [1, 0])
def test_a_death_ends_the_other_with_its_name(place, victim):
    workdir = place / f"without_{victim}"
    endless = ("--config.train.steps=1000000", "--config.train.checkpoint_every=20")
    started = start(place, workdir.name, *endless, processes=2, heartbeat=HEARTBEAT)
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "checkpoints" / "20").is_dir():
            assert time.monotonic() < deadline and not any(p.poll() for p in started)
            time.sleep(0.1)
        time.sleep(1)
        started[victim].send_signal(signal.SIGKILL)
        since = time.monotonic()
        _, errors = started[1 - victim].communicate(timeout=2 * HEARTBEAT + 10)
        seconds = time.monotonic() - since
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[1 - victim].returncode != 0
    # The watch looks ten times per heartbeat; the rest is for a busy machine.
    assert seconds < 1.1 * HEARTBEAT + 8
    assert "Traceback" not in errors
    if victim == 0 and "error: process" not in errors:  # JAX's own abort can be faster
        assert "leader task" in errors
        return
    # Looked up five times a second: one may have been completed since.
    known = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    newest = "|".join(map(str, sorted(known)[-2:]))
    message = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert f"process {victim} of 2 (host {socket.gethostname()})" in message
    assert re.search(
        rf"Resume from step ({newest}) with --workdir={re.escape(str(workdir))}", message
    )


@pytest.mark.nightly
def test_what_one_process_refuses_ends_all(place):
    # Only the first process has the text in its directory.
    (place / "here.txt").write_text("some text " * 1000)
    (place / "elsewhere").mkdir()
    flags = ("--config.data.path=here.txt", "--config.data.packing=stream")
    started = start(place, "refused", *flags, processes=2, last=place / "elsewhere")
    for process, (code, out, errors) in enumerate(ends(started)):
        assert code == 2
        # Gloo's threads print across each other.
        words = r"\[Gloo\]|Rank|is connected to|peer ranks|Expected number of connected|is"
        assert re.fullmatch(rf"(?:{words}|[\d\s.:])*", out), out
        assert errors.count("error: ") == 1 and "Traceback" not in errors, errors
        assert "text file here.txt does not exist" in errors
        assert ("process 1 of 2" in errors) == (process == 0)
    assert not (place / "refused").exists()


@pytest.mark.nightly
def test_processes_that_do_not_come_together(place):
    """JAX itself would abort each of them; several runs at once, none of which begins."""
    by_hand = {"JAX_NUM_PROCESSES": "2"}
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.[1,3-4]", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    gke = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2", "TPU_WORKER_ID": "0"}
    open_mpi = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken, nobody, met = other.getsockname()[1], free_port(), free_port()
        cannot = f"process 0 cannot listen on 127.0.0.1:{taken} (Address already in use)"
        address, port = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
        cases = [
            (by_hand | {"JAX_PROCESS_ID": "0", address: f"127.0.0.1:{taken}"},
             [cannot, f"another one in {address}"]),
            (by_hand | {"JAX_PROCESS_ID": "1", address: f"127.0.0.1:{nobody}"},
             [f"process 1 of 2 did not find process 0 at 127.0.0.1:{nobody}", "within 2 s"]),
            (slurm | {port: str(taken)}, [cannot, f"another one in {port}"]),
            (gke | {port: str(taken)}, [cannot, f"another one in {port}"]),
            (open_mpi | {port: str(met)}, ["not all processes of this run started", "within 2 s"]),
        ]  # fmt: skip
        flags = ["--start_timeout=2", f"--config={place / 'tiny.py'}", "--workdir=apart"]
        started = [
            Process(
                [sys.executable, str(ROOT / "train.py"), *flags],
                cwd=place, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            )
            for environment, _ in cases
        ]  # fmt: skip
        # Open MPI's second process comes to the meeting, but not to JAX.
        partner = threading.Thread(
            target=meet, args=(Member(f"127.0.0.1:{met}", "", 1, 2), 120.0), daemon=True
        )
        partner.start()
        results = ends(started)
    for (code, out, errors), (_, words) in zip(results, cases, strict=True):
        assert code == 2 and out == "", (code, errors)
        assert errors.count("error: ") == 1 and "Traceback" not in errors, errors
        assert [word for word in words if word not in errors] == [], errors
    assert not (place / "apart").exists()
    partner.join(10)
    assert not partner.is_alive()


def test_a_port_in_use_where_only_kubernetes_knows_the_address(monkeypatch):
    monkeypatch.setattr("finermoe_jax.runtime.launchers.find_spec", lambda _: True)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("would crash"))
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "JOB_COMPLETION_INDEX": "0"}
        for name, value in (pod | {"JAX_COORDINATOR_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=rf"cannot listen on \[::\]:{port} .*_PORT"):
            initialize()


def test_what_a_launchers_client_raises_is_one_message(monkeypatch):
    def fails(**_):
        raise OSError("no route to the server")

    monkeypatch.setattr("jax.distributed.initialize", fails)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(InputError, match=r"cannot be joined: no route to the server\nSee docs"):
        initialize()
