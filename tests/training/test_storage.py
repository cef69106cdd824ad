"""Runs in a bucket: what they write where, damage, locks, and servers that refuse or vanish."""

import contextlib
import re
import signal
import socket
import time

import pytest

import finermoe_jax as fm
from benchmarks import bucket_kills
from benchmarks.kill_campaign import assert_same, ends, lines, logged, wait_for
from finermoe_jax.analysis.dry_run import dry_run
from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import buckets, lease
from finermoe_jax.runtime.lease import Lease
from finermoe_jax.training import storage
from finermoe_jax.training.checkpoints import TrainingCheckpoints
from finermoe_jax.training.run import train
from finermoe_jax.weights.integrity import CHECKSUMS, COMMITTED, damage, saved_steps
from tests.support import assert_refused, command
from tests.support import buckets as support
from tests.support.processes import Process
from tests.support.training import silent, tiny_run

STEPS = 40  # of the runs in processes: more than pass before an interruption is noticed


@pytest.fixture(scope="module")
def server(server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "TTL_SECONDS", 0.8)
        yield server


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("local") / "run"
    train(tiny_run(), workdir, silent)
    return workdir


@pytest.fixture(scope="module")
def commits():
    """For each step of `finished`: the objects when it was about to be committed."""
    return {}


@pytest.fixture(scope="module")
def finished(server, commits, tmp_path_factory):
    """A run in a bucket with steps 0, 2 and 4."""
    run, before_commit = support.new_bucket(), storage.BucketStorage.before_commit

    def look(self):
        before_commit(self)
        names = set(run.objects())
        step = max(int(name.split("/")[1]) for name in names if name.startswith("checkpoints/"))
        commits[step] = names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.BucketStorage, "before_commit", look)
        train(tiny_run(), str(run), silent, scratch=tmp_path_factory.mktemp("scratch") / "run")
    return run


@pytest.fixture
def copy(finished):
    """A copy of it in another bucket."""
    run = support.new_bucket()
    for name in finished.objects():
        (finished / name).copy(run / name)
    return run


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_a_local_one(finished, local, tmp_path):
    names = set(finished.objects())
    kept = {name for name in names if not name.startswith("checkpoints/")}
    written = {
        str(path.relative_to(local))
        for path in local.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts and path.name != ".lock"
    }
    assert kept == written
    for step in (0, 2, 4):
        assert {f"checkpoints/{step}/{name}" for name in (COMMITTED, CHECKSUMS)} <= names
        assert damage(finished / "checkpoints" / str(step)) == []
    assert_same(bucket_kills.downloaded(finished, tmp_path / "run"), local)
    # A checkpoint copied from the bucket is verified by the server's hashes.
    step = tmp_path / "run" / "checkpoints" / "4"
    assert damage(step) == []
    large = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    large.write_bytes(large.read_bytes()[:-1] + b"x")
    assert "has checksum" in damage(step)[0]


def test_the_commit_mark_comes_last_after_checksums_and_logs(finished, commits):
    assert sorted(commits) == [0, 2, 4]
    for step, names in commits.items():
        place = f"checkpoints/{step}"
        assert f"{place}/{CHECKSUMS}" in names and f"{place}/{COMMITTED}" not in names
        assert {f"{place}/params/{COMMITTED}", f"{place}/optimizer/{COMMITTED}"} <= names
        assert "config.json" in names and ("metrics.jsonl" in names) == (step > 0)


@pytest.mark.slow
def test_another_machine_resumes_and_a_changed_config_is_refused(copy, tmp_path):
    with pytest.raises(fm.InputError, match=rf"{copy} contains a run with another config"):
        train(tiny_run(steps=6), str(copy), silent, scratch=tmp_path / "a")
    said = []
    train(tiny_run(steps=6), str(copy), said.append, allow_changes=["train.steps"],
          scratch=tmp_path / "b")  # fmt: skip
    assert "restoring the checkpoint of step 4 …" in said
    assert saved_steps(copy / "checkpoints") == [2, 4, 6]
    assert (copy / "config_changes.jsonl").exists() and not (copy / "lock").exists()


@pytest.mark.slow
def test_compare_and_a_dry_run_read_a_bucket(finished, local):
    before = finished.objects()
    result = command("compare", finished, local)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines()[1].split()[1] == "2"  # one setting, two runs
    said = []
    needs = dry_run(tiny_run(), str(finished), say=said.append)
    assert needs.free is None and f"written to {finished}: logs, tokenizer/, plots and" in said[-4]
    with pytest.raises(fm.InputError, match="contains a run with another config"):
        dry_run(tiny_run(steps=6), str(finished), say=silent)
    assert finished.objects() == before


@pytest.mark.slow
def test_a_local_workdir_is_moved_to_a_bucket(server, local, tmp_path):
    """As `gcloud storage cp -r` does; sizes are verified, since the hashes are other ones."""
    run = support.new_bucket()
    for path in local.rglob("*"):
        if path.is_file():
            (run / path.relative_to(local)).write(path)
    step = run / "checkpoints" / "4"
    assert damage(step) == []
    said = []
    train(tiny_run(), str(run), said.append, scratch=tmp_path / "scratch")
    assert "resumed from step 4 of 4" in said
    name = next(name for name in step.objects() if "/d/" in name)
    (step / name).write(b"short")
    assert f"{name} has 5 bytes, " in damage(step)[0]


def _torn(step):
    (step / COMMITTED).delete()  # alone: the checksums are there


def _unlisted(step):
    (step / CHECKSUMS).delete()


def _lost(step):
    next(step / name for name in step.objects() if "/d/" in name).delete()


def _changed(step):
    objects = step.objects()
    large = step / max(objects, key=lambda name: objects[name].st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_lost, "is missing ("),
        pytest.param(_torn, "", marks=pytest.mark.nightly),
        pytest.param(_changed, "has checksum", marks=pytest.mark.nightly),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_and_made_again(copy, local, tmp_path, harm, words):
    harm(copy / "checkpoints" / "4")
    said = []
    train(tiny_run(), str(copy), said.append, scratch=tmp_path / "scratch")
    assert "restoring the checkpoint of step 2 …" in said
    warnings = [line for line in said if line.startswith("WARNING: checkpoint")]
    if words:
        (warning,) = warnings
        assert words in warning
        assert f"It was renamed to {copy}/damaged/4. Step 2 is used instead." in warning
        assert damage(copy / "damaged" / "4") and not (copy / "damaged" / "4" / COMMITTED).exists()
    else:
        assert warnings == [] and not (copy / "damaged").exists()
    assert damage(copy / "checkpoints" / "4") == []
    assert_same(bucket_kills.downloaded(copy, tmp_path / "run"), local)


def test_damage_survives_the_next_start_and_lost_checkpoints_are_named(copy, tmp_path):
    for step, harm in ((0, _changed), (2, _changed), (4, _unlisted)):
        harm(copy / "checkpoints" / str(step))
    said = []
    for _ in range(2):
        with pytest.raises(fm.InputError, match=r"holds no intact checkpoint: 0, 2, 4 are damaged"):
            train(tiny_run(), str(copy), said.append, scratch=tmp_path / "scratch")
        assert (copy / "damaged").names() == ["0", "2", "4"]
    warnings = [line for line in said if line.startswith("WARNING: checkpoint")]
    assert len(warnings) == 3
    # It has the mark; it counts only with the checksums too.
    assert "checkpoints/4 is damaged: " in warnings[0] and f"{CHECKSUMS} is missing" in warnings[0]


def test_a_second_run_is_refused_and_changes_nothing(copy, tmp_path):
    before = copy.objects()
    holder = Lease(copy, pytest.fail)
    holder.take()
    try:
        with pytest.raises(fm.InputError, match=r"is in use by process \d+ on "):
            train(tiny_run(), str(copy), silent, scratch=tmp_path / "scratch")
    finally:
        holder.close()
    assert copy.objects() == before
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["before a save", "during a save"])
def test_a_run_that_lost_its_lease_commits_nothing(server, monkeypatch, tmp_path, lost):
    monkeypatch.setattr(lease, "TTL_SECONDS", 600)  # no confirmation but those of saves
    run, before_save = support.new_bucket(), storage.BucketStorage.before_save

    def take_over():
        (run / "lock").write("another run\n")

    def say(message):
        if message.startswith("drawing random weights") and lost == "before a save":
            take_over()

    def save(self):
        before_save(self)
        take_over()

    if lost == "during a save":
        monkeypatch.setattr(storage.BucketStorage, "before_save", save)
    with pytest.raises(RunEnded, match=r"another run has taken the lock of gs://.*ends and") as end:
        train(tiny_run(), str(run), say, scratch=tmp_path / "scratch")
    assert end.value.code == 1
    assert saved_steps(run / "checkpoints") == []
    written = [name for name in run.objects() if name.startswith("checkpoints/0/")]
    assert bool(written) == (lost == "during a save")
    assert (run / "lock").read_bytes() == b"another run\n"


@pytest.mark.slow
def test_logs_written_by_another_process_end_the_run(server, tmp_path):
    run = support.new_bucket()

    def say(message):
        if message.startswith("held-out loss  step 0"):
            (run / "evals.jsonl").write("{}\n")

    with pytest.raises(RunEnded, match="another run writes to gs://"):
        train(tiny_run(), str(run), say, scratch=tmp_path / "scratch")
    assert saved_steps(run / "checkpoints") == []
    assert not (run / "lock").exists()


def test_a_log_whose_answer_got_lost_is_this_runs(server, monkeypatch, tmp_path):
    monkeypatch.setattr(buckets, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "TTL_SECONDS", 60)
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 3600)
    with support.gate(server, monkeypatch) as gate:
        kept = storage.BucketStorage(support.new_bucket(server), tmp_path / "scratch", silent)
        kept.open()
        log = kept.scratch / "metrics.jsonl"
        log.write_text("1\n")
        kept.publish()
        log.write_text("1\n2\n")
        gate.mute = True
        with pytest.raises(buckets.Unreachable):
            kept.publish()
        gate.mute = False
        log.write_text("1\n2\n3\n")
        kept.publish()
        kept.close()
        assert (kept.bucket / "metrics.jsonl").read_bytes() == b"1\n2\n3\n"


def test_logs_are_uploaded_between_checkpoints(server, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 0.1)
    kept = storage.BucketStorage(support.new_bucket(server), tmp_path / "scratch", silent)
    with contextlib.closing(kept):
        kept.open()
        log = kept.scratch / "metrics.jsonl"
        log.write_text("1\n")
        kept.publish()
        with log.open("a") as file:
            file.write("2\n")
        until = time.monotonic() + 30
        while (kept.bucket / log.name).read_bytes() != b"1\n2\n" and time.monotonic() < until:
            time.sleep(0.05)
        assert (kept.bucket / log.name).read_bytes() == b"1\n2\n"


def test_unsynced_runs_of_weights_and_biases_stay(server, tmp_path):
    run, scratch = support.new_bucket(), tmp_path / "scratch"
    for made in (("wandb", "old"), ()):
        with contextlib.closing(storage.BucketStorage(run, scratch, silent)) as kept:
            kept.open()
            for name in made:
                (scratch / name).mkdir()
    assert (scratch / "wandb").is_dir() and not (scratch / "old").exists()


def test_errors_of_a_file_system_are_no_outages(tmp_path):
    error = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
    assert buckets.is_outage(error)
    with contextlib.closing(TrainingCheckpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        assert not checkpoints.storage.is_outage(error)


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(copy, server, monkeypatch):
    with support.gate(server, monkeypatch) as gate:
        gate.answer = support.DENIED
        with pytest.raises(fm.InputError, match="access is denied"):
            damage(copy / "checkpoints" / "4")


@pytest.mark.parametrize("names", [["notes.txt"], ["config.json", "model.safetensors"], ["a/b"]])
def test_other_content_is_left_alone(server, tmp_path, names):
    run = support.new_bucket()
    for name in names:
        (run / name).write("{}")
    with pytest.raises(fm.InputError, match="is not empty and contains no run: give a new --work"):
        train(tiny_run(), str(run), silent, scratch=tmp_path / "scratch")
    assert sorted(run.objects()) == names


def test_scratch_directories_are_checked(server, tmp_path):
    run, used = support.new_bucket(), tmp_path / "used"
    used.mkdir()
    (used / "mine").write_text("kept")
    with pytest.raises(fm.InputError, match=r"--scratch=.*/used is not empty and is not the scrat"):
        train(tiny_run(), str(run), silent, scratch=used)
    assert (used / "mine").read_text() == "kept"
    with pytest.raises(fm.InputError, match=r"--scratch=gs://b/x must be a local directory"):
        train(tiny_run(), str(run), silent, scratch="gs://b/x")
    with pytest.raises(fm.InputError, match=r"is only used with a --workdir in a bucket, but"):
        train(tiny_run(), tmp_path / "run", silent, scratch=used)
    assert run.objects() == {}


def test_the_default_scratch_is_in_the_cache_and_named_like_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (buckets.BucketPath(bucket, "a/run") for bucket in ("x", "y"))
    found = storage.default_scratch(one)
    assert found.name == "run" and found.parent.parent == tmp_path / "finermoe-jax"
    assert found != storage.default_scratch(other)


def test_refusals_on_the_command_line(server, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_refused(
        command("train", "--config=demo", "--workdir=s3://b/run"), "s3://b/run is not supported"
    )
    assert_refused(
        command("train", "--config=demo", "--workdir=gs://there-is-none/run"),
        "there is no bucket there-is-none",
    )
    with support.gate(server, monkeypatch) as gate:
        gate.answer = support.DENIED
        assert_refused(
            command("train", "--config=demo", f"--workdir={support.new_bucket(server)}"),
            "access is denied (", "roles/storage.objectUser",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


# --- processes ------------------------------------------------------------------------------


@pytest.mark.nightly
def test_killed_runs_end_as_the_straight_one(server, tmp_path):
    """The short form of benchmarks/bucket_kills.py."""
    found = bucket_kills.campaign(tmp_path, support.new_bucket(), 2, 60, popen=Process)
    assert len(found) == 2 and not any(one["done"] for one in found)


@pytest.mark.nightly
def test_sigterm_saves_uploads_and_releases_the_lock(server, tmp_path):
    run, scratch = support.new_bucket(), tmp_path / "scratch"
    started = bucket_kills.start(tmp_path, str(run), scratch, 100000, Process)
    assert wait_for(lambda: logged(scratch) >= 1, [started])
    started.send_signal(signal.SIGTERM)
    assert ends([started]) == [75]
    said = (tmp_path / "log").read_text()
    stopped = next(line for line in said.splitlines() if line.startswith("stopped on request"))
    step = int(stopped.split()[5].rstrip("."))
    assert stopped.endswith(f"Resume from the newest complete checkpoint with --workdir={run}.")
    assert (
        saved_steps(run / "checkpoints")[-1] == step
        and damage(run / "checkpoints" / str(step)) == []
    )
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == step
    assert not (run / "lock").exists()


@pytest.mark.nightly
def test_a_server_that_is_gone_costs_the_step_being_saved(server, monkeypatch, tmp_path):
    run, scratch = support.new_bucket(), tmp_path / "scratch"
    gate = support.Gate(server)
    with monkeypatch.context() as patch:
        for name, value in support.settings(gate.url).items():
            patch.setenv(name, value)
        started = bucket_kills.start(tmp_path, str(run), scratch, STEPS, Process)
    assert wait_for(lambda: 5 in saved_steps(run / "checkpoints"), [started])
    gate.end()
    assert ends([started]) == [75]
    known = saved_steps(run / "checkpoints")
    said = (tmp_path / "log").read_text().rpartition("compiled the step")[2]
    assert "Traceback" not in said and "error" not in said.lower().replace("oserror", "")
    assert re.search(rf"step \d+ was not saved: {run}/checkpoints cannot be reached \(", said)
    assert f"Complete checkpoints: step {known[-1]}. Run the same command again" in said
    # Nothing is lost: the next run takes over the lock and resumes from there.
    again = bucket_kills.start(tmp_path, str(run), scratch, STEPS, Process)
    assert ends([again]) == [0]
    said = (tmp_path / "log").read_text()
    assert f"resumed from step {known[-1]} of {STEPS}" in said
    whole = bucket_kills.start(tmp_path, str(tmp_path / "whole"), None, STEPS, Process)
    assert ends([whole]) == [0]
    assert_same(bucket_kills.downloaded(run, tmp_path / "run"), tmp_path / "whole")


@pytest.mark.nightly
def test_rights_withdrawn_from_a_save_end_the_run(server, monkeypatch, tmp_path):
    run, scratch = support.new_bucket(), tmp_path / "scratch"
    gate = support.Gate(server)
    # Before tensorstore alone, which writes the arrays: the lock and the logs are still written.
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gate.url)
    started = bucket_kills.start(tmp_path, str(run), scratch, STEPS, Process)
    assert wait_for(lambda: 5 in saved_steps(run / "checkpoints"), [started])
    gate.answer = support.DENIED
    gate.close()  # connections that are open would go on
    gate.closed = False
    assert ends([started]) == [1]
    known = saved_steps(run / "checkpoints")
    said = (tmp_path / "log").read_text().rpartition("compiled the step")[2]
    assert "Traceback" not in said
    (message,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert f"a checkpoint could not be written to {run}/checkpoints: " in message
    assert "no permission storage.objects" in message
    assert f"Complete checkpoints: step {known[-1]}. Fix the cause, then run the" in message
    assert damage(run / "checkpoints" / str(known[-1])) == []
    assert not (run / "lock").exists()


@pytest.mark.nightly
def test_two_processes_write_one_run(server, tmp_path):
    run, scratch = support.new_bucket(), tmp_path / "scratch"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    started = [
        bucket_kills.start(tmp_path, str(run), scratch, 10, Process,
                           shared | {"JAX_PROCESS_ID": str(process)})
        for process in range(2)
    ]  # fmt: skip
    assert ends(started) == [0, 0], (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("parameters · ") == 1 and "Traceback" not in said
    assert saved_steps(run / "checkpoints") == [0, 5, 10]
    step = run / "checkpoints" / "10"
    assert damage(step) == []
    assert {"params/ocdbt.process_0", "params/ocdbt.process_1"} <= {
        name.partition("/d/")[0] for name in step.objects()
    }
    assert [line["step"] for line in lines(scratch)] == list(range(1, 11))
    assert not (run / "lock").exists()
    # The second process has its own scratch directory.
    assert (tmp_path / "scratch-process-1" / "tokenizer").is_dir()
