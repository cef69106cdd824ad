"""The lock of a bucket path: one holder, taken over only from one that no longer writes."""

import contextlib
import time

import pytest

import finermoe_jax as fm
from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import buckets, lease
from finermoe_jax.runtime.lease import Lease
from tests.support import buckets as support


@pytest.fixture
def run(server, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 0.8)
    return support.new_bucket()


def test_a_lease_is_renewed_refused_to_others_and_released(run):
    said = []
    with contextlib.closing(Lease(run, said.append)) as ours:
        ours.take()
        ours.take()
        first = ours.object.stat().generation
        with pytest.raises(fm.InputError, match=r"is in use by process \d+ on .*, since .*: wait"):
            Lease(run, said.append).take()
        assert ours.object.stat().generation != first
        ours.confirm()
        ours.check()
    assert len(said) == 1 and "is locked by process" in said[0]
    assert not ours.object.exists()
    again = Lease(run, pytest.fail)
    again.take()
    again.close()


def test_a_killed_holders_lease_is_taken_over_after_its_time(run):
    (run / "lock").write("process 1 on away, since then\nx 1\n")
    said, began = [], time.monotonic()
    with contextlib.closing(Lease(run, said.append)) as ours:
        ours.take()
        assert time.monotonic() - began >= lease.TTL_SECONDS
        assert "is locked by process 1 on away, since then: waiting up to 0.8 s" in said[0]
    assert not ours.object.exists()


@pytest.mark.parametrize("taken", ["written", "deleted"])
def test_a_holder_that_was_replaced_learns_of_it(run, taken):
    ours = Lease(run, pytest.fail)
    ours.take()
    if taken == "written":
        ours.object.write("another process\n")
    else:
        ours.object.delete()
    with pytest.raises(RunEnded, match=f"was {taken}.*: another run has taken the lock") as error:
        ours.confirm()
    assert error.value.code == 1
    with pytest.raises(RunEnded):
        ours.check()
    ours.close()
    # The other one's lock stays.
    assert ours.object.exists() == (taken == "written")


def test_an_outage_is_no_loss(run, server, monkeypatch):
    monkeypatch.setattr(buckets, "OUTAGE_SECONDS", 0.2)
    with (
        support.gate(server, monkeypatch) as gate,
        contextlib.closing(Lease(run, pytest.fail)) as ours,
    ):
        ours.take()
        gate.close()
        with pytest.raises(buckets.Unreachable):
            ours.confirm()
        ours.check()
        gate.closed = False
        ours.confirm()


def test_withdrawn_rights_are_not_called_another_run(run, server, monkeypatch):
    with (
        support.gate(server, monkeypatch) as gate,
        contextlib.closing(Lease(run, pytest.fail)) as ours,
    ):
        ours.take()
        gate.close()  # connections that are open would go on
        gate.answer, gate.closed = support.DENIED, False
        until = time.monotonic() + 30
        while not ours.lost and time.monotonic() < until:  # renewed every quarter of TTL_SECONDS
            time.sleep(0.05)
        with pytest.raises(RunEnded, match=r"access is denied .*saves nothing more") as error:
            ours.check()
        assert "another run" not in str(error.value)


def test_a_bucket_that_keeps_objects_is_refused_before_anything_is_read(run, monkeypatch):
    writes, write = [], type(run).write

    def once(self, content, if_generation=None):
        writes.append(if_generation)
        if len(writes) > 1:
            raise fm.InputError("the bucket keeps objects from being overwritten")
        return write(self, content, if_generation)

    monkeypatch.setattr(type(run), "write", once)
    with (
        contextlib.closing(Lease(run, pytest.fail)) as ours,
        pytest.raises(fm.InputError, match="the bucket keeps objects"),
    ):
        ours.take()
    assert len(writes) == 2 and writes[0] == 0 and writes[1]


def test_a_write_whose_answer_got_lost_was_ours(run, server, monkeypatch):
    monkeypatch.setattr(buckets, "OUTAGE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "TTL_SECONDS", 60)  # nothing else renews it
    with (
        support.gate(server, monkeypatch) as gate,
        contextlib.closing(Lease(run, pytest.fail)) as ours,
    ):
        ours.take()
        before = ours.generation
        gate.mute = True
        with pytest.raises(buckets.Unreachable):
            ours.confirm()
        gate.mute = False
        assert ours.object.stat().generation != before == ours.generation
        ours.confirm()
        ours.close()
        assert not ours.object.exists()


@pytest.mark.slow
def test_an_abandoned_lock_expires(run):
    ours = Lease(run, pytest.fail)
    ours.take()
    ours.abandon()
    said = []
    with contextlib.closing(Lease(run, said.append)) as theirs:
        theirs.take()
    assert "is locked by" in said[0]
