"""Checkpoint reads and writes that fail or are interrupted: one error, and nothing runs on."""

import contextlib
import gc
import os
import random
import resource
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.layers import sharding
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.runtime.json_files import read_lines
from finermoe_jax.runtime.preemption import redeliver_interrupts
from finermoe_jax.training.checkpoints import TrainingCheckpoints
from finermoe_jax.training.run import train
from finermoe_jax.weights import orbax_files as lazy_checkpoint
from tests.support import SMALL
from tests.support.training import tiny_run


@contextlib.contextmanager
def nothing_runs_on(monkeypatch):
    """Fails where a thread is left behind, or an error reaches one of Python's last hooks."""
    heard = []
    for module, hook in (
        (sys, "excepthook"),
        (sys, "unraisablehook"),
        (threading, "excepthook"),
    ):
        monkeypatch.setattr(module, hook, lambda *found: heard.append(found))
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("asyncio_"):  # idle: a closed loop tells it to end, and no more
            thread.join(10)
    assert set(threading.enumerate()) <= before
    time.sleep(0.05)  # for callbacks of reads and writes that would still be in flight
    gc.collect()
    assert not heard, heard
    monkeypatch.undo()


@pytest.fixture(scope="module")
def state():
    """A model's description, arrays over two devices as its weights and moments, and targets."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    values = np.random.default_rng(0).standard_normal((3, 16, 64, 128), np.float32)
    arrays = [{f"w{i}": jax.device_put(each, split) for i, each in enumerate(v)} for v in values]
    params, moments = (
        arrays[0],
        (arrays[1:], jax.device_put(np.int32(7), jax.NamedSharding(mesh, jax.P()))),
    )

    def target(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return with_shapes(SMALL), params, moments, jax.tree.map(target, (params, moments))


@pytest.fixture
def interrupts():
    """Ctrl-C raises, also where a shell has started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def saved(state, tmp_path):
    """Checkpoints with a step 1."""
    model, params, moments, _ = state
    with contextlib.closing(TrainingCheckpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        checkpoints.save(1, model, params, moments, None)
        checkpoints.wait()
        yield checkpoints


def test_restored_bit_by_bit(state, saved):
    _, params, moments, targets = state
    restored = saved.restore(1, *targets)
    for was, found in zip(
        jax.tree.leaves((params, moments)), jax.tree.leaves(restored), strict=True
    ):
        assert found.sharding == was.sharding and found.dtype == was.dtype
        assert np.asarray(found).tobytes() == np.asarray(was).tobytes()


@pytest.mark.slow
def test_many_damaged_arrays_are_one_error(state, saved, monkeypatch):
    # The largest file holds the chunks of all arrays; what finds them there stays intact.
    for item in ("params", "optimizer"):
        files = (saved.directory / "1" / item).rglob("d/*")
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(bytes(largest.stat().st_size))
    for _ in range(2):
        with nothing_runs_on(monkeypatch), pytest.raises(InputError) as found:
            saved.restore(1, *state[3])
        assert "checkpoints/1/params: " in str(found.value)
        assert "is damaged or cannot be read" in str(found.value)


@pytest.mark.slow
def test_an_interrupted_restore_is_interrupted(interrupts, state, saved):
    def seconds():
        began = time.monotonic()
        saved.restore(1, *state[3])
        return time.monotonic() - began

    whole, chance, during = min(seconds() for _ in range(3)), random.Random(0), 0
    with often_collected(), redeliver_interrupts():
        for number in range(200):
            if number >= 20 and during > 2:  # enough came in the middle of a restore
                break
            timer = threading.Timer(chance.uniform(0, whole), os.kill, (os.getpid(), signal.SIGINT))
            restored = False
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                saved.restore(1, *state[3])
                restored = True
                time.sleep(10)
            during += not restored
            timer.join()
    assert during > 2


@contextlib.contextmanager
def often_collected():
    """JAX calls back from each collection, and Python drops an interrupt that comes there."""
    before = gc.get_threshold()
    gc.set_threshold(10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def small_files(size):
    """Lets no file grow beyond `size` bytes: writes then fail as they do on a failing disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_is_noticed_before_the_next(state, tmp_path, monkeypatch):
    model, params, moments, _ = state
    with nothing_runs_on(monkeypatch):
        checkpoints = TrainingCheckpoints(tmp_path / "checkpoints", 2)
        with small_files(1 << 12), pytest.raises(RunEnded) as found:
            checkpoints.save(1, model, params, moments, None)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
        checkpoints.close()
    assert found.value.alone and "File too large" in str(found.value)
    assert "There is no complete checkpoint" in str(found.value)


def test_all_writes_end_before_one_that_failed_is_raised(state, tmp_path):
    ended = []

    def slow(call):
        def made():
            time.sleep(0.05)
            ended.append(call)
            if call == 0:
                raise OSError("the first")

        return made

    with pytest.raises(OSError, match="the first"):
        lazy_checkpoint._in_threads(map(slow, range(100)), 4)
    count = len(ended)
    assert 4 <= count < 20
    time.sleep(0.2)
    assert len(ended) == count


@pytest.mark.nightly
def test_a_run_ends_at_the_step_after_a_failed_save(tmp_path):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with contextlib.ExitStack() as limit:
        # Compiled programs, too, would be written to files that must not grow.
        limit.callback(jax.config.update, "jax_persistent_cache_min_compile_time_secs", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)

        def say(message):
            if message.startswith("held-out loss  step 0"):
                limit.enter_context(small_files(1 << 14))

        with pytest.raises(RunEnded, match=r"could not be written to .*: .*File too large"):
            train(tiny_run(steps=2000, checkpoint_every=1000), tmp_path / "run", say=say)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) <= 2


def test_no_room_for_a_directory_ends_a_save_at_once(state, tmp_path, monkeypatch):
    model, params, moments, _ = state
    with contextlib.closing(TrainingCheckpoints(tmp_path / "checkpoints", 2)) as checkpoints:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        began = time.monotonic()
        with monkeypatch.context() as patch, pytest.raises(RunEnded, match=r"is full \(.* free"):
            patch.setattr(os, "mkdir", full)
            checkpoints.save(1, model, params, moments, None)
            checkpoints.wait()
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_an_interrupt_in_the_garbage_collector_comes_again(interrupts, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)

    def interrupt(phase, _):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    with redeliver_interrupts():
        gc.callbacks.append(interrupt)
        with pytest.raises(KeyboardInterrupt):
            gc.collect()
            time.sleep(10)

        class Broken:
            def __del__(self):
                raise ValueError

        Broken()
    assert [each.exc_type for each in heard] == [ValueError]
