"""Power cuts, by what the fsyncs of this process leave on a disk (benchmarks/power_cuts.py cuts).

Two disks bound what a real one may hold. A late one knows a name once its directory was fsynced; an
early one knows every name at once. Both know of a file what its last fsync wrote, at first nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading

import jax
import pytest
from flax import nnx

from benchmarks.kill_campaign import assert_same
from finermoe_jax import save_checkpoint, save_hf
from finermoe_jax.data.prepare import prepare
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.runtime import files
from finermoe_jax.runtime.files import find
from finermoe_jax.training.checkpoints import TrainingCheckpoints, logged_bytes
from finermoe_jax.training.run import train
from finermoe_jax.training.workdir import Log, claim
from finermoe_jax.weights.checkpoint import load_checkpoint
from finermoe_jax.weights.integrity import damage, saved_steps
from tests.support.training import silent, tiny_run


@dataclasses.dataclass
class Moment:
    """Numbers of files and directories are inodes; names are those of a directory's entries."""

    content: dict[int, bytes]  # of files, as fsynced
    late: dict[int, dict[str, int]]  # names in directories, as fsynced
    early: dict[int, dict[str, int]]  # names as they are


class Disk:
    """Records moments of a folder: after each fsync and each rename of this process."""

    def __init__(self, root, monkeypatch):
        self.root, self.moments, self.held = root, [], {}
        self.content, self.late = {}, {}
        self.lock = threading.RLock()
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        self.fsync(root)

    def fsync(self, path):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def _watched(self, call):
        def watched(*arguments, **options):
            with self.lock:
                call(*arguments, **options)
                if call.__name__ == "fsync":
                    self._keep(arguments[0])
                self.moments.append(Moment(dict(self.content), dict(self.late), self._names()))

        return watched

    def _keep(self, descriptor):
        path, number = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_ino
        if not path.startswith(str(self.root)):
            return
        if number not in self.held:
            self.held[number] = os.dup(descriptor)  # no later file gets this number
        if os.path.isdir(path):
            self.late[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            with open(path, "rb") as stream:
                self.content[number] = stream.read()

    def _names(self):
        found = {}

        def look(path, number):
            with contextlib.suppress(OSError):
                entries = list(os.scandir(path))
                found[number] = {entry.name: entry.inode() for entry in entries}
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        look(entry.path, entry.inode())

        look(self.root, self.root.stat().st_ino)
        return found

    def after(self, moment, late, below=""):
        """{path: bytes} after a power cut; {path/: None} for directories."""
        found = {}

        def look(number, prefix):
            names = moment.early.get(number, {})
            if late:  # what was removed since may be gone as well
                names = {n: i for n, i in moment.late.get(number, {}).items() if n in names}
            for name, inode in names.items():
                if inode in moment.early or inode in moment.late:
                    found[f"{prefix}{name}/"] = None
                    look(inode, f"{prefix}{name}/")
                else:
                    found[prefix + name] = moment.content.get(inode, b"")

        look(self.root.stat().st_ino, "")
        inside = [name for name in found if name.startswith(below) and name != below]
        return {name[len(below) :]: found[name] for name in inside}

    def close(self):
        for descriptor in self.held.values():
            os.close(descriptor)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    root = tmp_path / "disk"
    root.mkdir()
    recorded = Disk(root, monkeypatch)
    yield recorded
    recorded.close()


def _actual(folder):
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): path.read_bytes() if path.is_file()
        else None for path in folder.rglob("*")
    }  # fmt: skip


def _put(tree, folder):
    folder.mkdir(parents=True)
    for name, data in sorted(tree.items()):
        if data is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def _distinct(disk, below, ours):
    """(moment, late, tree) wherever the part of a tree that `ours` picks has changed."""
    for late in (True, False):
        before = None
        for number, moment in enumerate(disk.moments):
            tree = disk.after(moment, late, below)
            part = {name: data for name, data in tree.items() if ours(name)}
            if part != before:
                before = part
                yield number, late, tree


def _noted(method, calls):
    def noted(*arguments, **options):
        method(*arguments, **options)
        calls.append(method.__name__)

    return noted


@pytest.mark.nightly
def test_a_training_run_keeps_what_it_has_saved_at_every_moment(disk, tmp_path, monkeypatch):
    reported, calls = [(0, -1)], []
    wait, workdir = TrainingCheckpoints.wait, disk.root / "runs" / "run"
    save, append = TrainingCheckpoints.save, Log.append
    monkeypatch.setattr(TrainingCheckpoints, "save", _noted(save, calls))

    def logged(self, file, values):
        append(self, file, values)
        calls.append(file)

    monkeypatch.setattr(Log, "append", logged)

    def told(self):
        wait(self)
        calls.append("wait")
        if saved := saved_steps(self.directory):
            reported.append((len(disk.moments), saved[-1]))

    monkeypatch.setattr(TrainingCheckpoints, "wait", told)
    config = tiny_run(keep_checkpoints=1)
    train(config, workdir, say=silent)
    monkeypatch.undo()
    assert saved_steps(workdir / "checkpoints") == [4] == [reported[-1][1]]
    # A log with steps and no checkpoint is one that has lost them.
    steps = [call for call in calls if call in ("wait", "save", "metrics.jsonl")]
    assert steps[:4] == ["wait", "save", "wait", "metrics.jsonl"]
    cuts, resumed, tokenizer = 0, set(), _actual(workdir / "tokenizer")

    def counts(name):
        place = name.split("/")
        return place[0] in ("config.json", "data.json", "tokenizer") or (
            place[0] == "checkpoints" and place[1:2] and place[1].isdecimal()
        )

    for number, late, tree in _distinct(disk, "runs/run/", counts):
        copy = _put(tree, tmp_path / f"cut-{cuts}")
        cuts += 1
        at_least = max(step for moment, step in reported if moment <= number)
        assert claim(copy, config) == {}
        saved = saved_steps(copy / "checkpoints")
        assert max(saved, default=-1) >= at_least, (number, late)
        if saved:  # older ones may be half removed
            newest = copy / "checkpoints" / str(saved[-1])
            assert not damage(newest), (number, late)
            assert not Log(copy).lost(logged_bytes(newest)), (number, late)
            assert _actual(copy / "tokenizer") == tokenizer
        step = max(saved, default=None)
        if late and step in (None, 2) and step not in resumed:
            resumed.add(step)
            train(config, copy, say=silent)
            assert_same(copy, workdir)
    assert cuts > 10 and resumed == {None, 2}


@pytest.mark.slow
def test_a_conversion_is_there_whole_or_not_at_all(disk):
    config, tokenizer = tiny_run(), find("demo/model")
    sizes = dataclasses.replace(config.dense, moe=config.moe)
    model = Decoder(sizes, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    save_checkpoint(model, disk.root / "new" / "orbax", tokenizer=tokenizer)
    save_hf(model, disk.root / "new" / "hf", tokenizer=tokenizer)
    for below in ("new/orbax/", "new/hf/"):
        whole = _actual(disk.root / below)
        for number, late, tree in _distinct(disk, below, lambda name: True):
            assert tree in ({}, whole), (below, number, late)
        assert disk.after(disk.moments[-1], True, below) == whole
    loaded = load_checkpoint(disk.root / "new" / "orbax")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, loaded)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_prepared_shards_are_there_before_a_manifest_names_them(disk, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "One sentence after the other."}\n' * 400)
    target = disk.root / "new" / "tokens"
    prepare([str(text)], target, find("demo/model"), shard_tokens=1000, say=silent)
    seen = set()
    for number, late, tree in _distinct(disk, "new/tokens/", lambda name: "manifest" in name):
        for name in ("manifest.json", "manifest.partial.json"):
            for shard in json.loads(tree[name])["shards"] if name in tree else ():
                seen.add(shard["name"])
                for file in ("bin", "documents.npy"):
                    stated = shard["sha256" if file == "bin" else "documents_sha256"]
                    found = hashlib.sha256(tree[f"{shard['name']}.{file}"]).hexdigest()
                    assert found == stated, (number, late)
    assert len(seen) > 2
    assert disk.after(disk.moments[-1], True, "new/tokens/").items() >= _actual(target).items()
    assert sorted(disk.late[target.stat().st_ino]) == sorted(os.listdir(target))  # removed for good


def test_a_file_has_its_old_or_its_new_content(disk):
    path = disk.root / "results.json"
    for content in ("old", "new"):
        files.write(path, content)
    for late in (True, False):
        found = [disk.after(moment, late).get("results.json") for moment in disk.moments]
        assert set(found) == {None, b"old", b"new"} and found[-1] == b"new"
    assert os.listdir(disk.root) == ["results.json"]


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "results.json")
    files.write(link, "{}")
    assert link.is_symlink() and (tmp_path / "results.json").read_text() == "{}"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.write(pipe, "{}")
    reader.join()
    assert read == ["{}"] and pipe.is_fifo()
