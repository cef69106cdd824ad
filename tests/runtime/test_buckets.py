"""Bucket paths against a server on loopback."""

import threading

import pytest

import finermoe_jax as fm
from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import buckets
from finermoe_jax.runtime.buckets import BucketPath, Changed, crc32c, place
from tests.support import buckets as support


@pytest.fixture
def run(server):
    return support.new_bucket()


def test_places(tmp_path):
    assert place("gs://b/x/y/") == BucketPath("b", "x/y")
    assert str(place("GS://b/x")) == "gs://b/x"
    assert place(tmp_path) == tmp_path
    path = place("gs://b/x/y")
    assert (path.name, str(path.parent), str(path / "z")) == ("y", "gs://b/x", "gs://b/x/y/z")
    assert str(path.with_name("w")) == "gs://b/x/w"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/x", "--workdir: s3://b/x is not supported: Orbax"),
        ("az://b/x", "is a URL"),
        ("gs://", "must be gs://BUCKET/NAME"),
        ("gs://b", "must be gs://BUCKET/NAME"),
        ("gs://b/x/*", "without wildcards"),
        ("gs://b/x/../y", "empty parts"),
    ],
)
def test_other_urls_are_refused_by_name(url, words):
    with pytest.raises(fm.InputError, match="--workdir: ") as error:
        place(url, "--workdir")
    assert words in str(error.value)


def test_objects_are_written_read_and_listed(run, tmp_path):
    assert not run.exists() and run.objects() == {} and run.names() == []
    first = (run / "a.json").write("one")
    (run / "steps" / "4" / "x").write(b"\0" * 1000)
    assert (run / "a.json").read() == (b"one", first)
    listed = run.objects()
    assert set(listed) == {"a.json", "steps/4/x"}
    assert listed["steps/4/x"].st_size == 1000
    assert listed["steps/4/x"].crc32c == crc32c(b"\0" * 1000)
    assert (run / "a.json").stat() == listed["a.json"]
    assert run.names() == ["a.json", "steps"]
    assert (run / "steps").is_dir() and not (run / "steps").is_file() and run.exists()
    # A prefix of a name is no directory of it.
    assert not BucketPath(run.bucket, "ru").exists()
    (run / "steps" / "4" / "x").copy(run / "damaged")
    assert (run / "damaged").read_bytes() == b"\0" * 1000
    (run / "damaged").download(tmp_path / "x")
    assert crc32c(tmp_path / "x") == listed["steps/4/x"].crc32c
    (run / "file").write(tmp_path / "x")
    assert (run / "file").stat().st_size == 1000
    (run / "file").delete()
    (run / "file").delete()
    for read in (BucketPath.read, BucketPath.stat, lambda path: path.download(tmp_path / "y")):
        with pytest.raises(FileNotFoundError, match="file"):
            read(run / "file")
    assert not (tmp_path / "y").exists()


def test_one_of_many_writers_creates_an_object(run):
    won, lost = [], []

    def race(number):
        try:
            won.append((run / "lock").write(str(number), if_generation=0))
        except Changed as error:
            lost.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 11)


def test_a_write_needs_the_generation_it_names(run):
    lock = run / "lock"
    first = lock.write("one", if_generation=0)
    second = lock.write("two", if_generation=first)
    assert second != first
    with pytest.raises(Changed, match="was written by another process"):
        lock.write("three", if_generation=first)
    # The same content: the answer to this very request got lost, and it was repeated.
    assert lock.write("two", if_generation=first) == second
    lock.delete()
    with pytest.raises(Changed, match="was deleted"):
        lock.write("four", if_generation=second)
    assert not lock.exists()


def test_a_missing_bucket_and_denied_access_are_named(server, monkeypatch):
    away = BucketPath("there-is-none", "run")
    for use in (BucketPath.objects, lambda path: path.write("x"), BucketPath.is_dir):
        with pytest.raises(fm.InputError, match="there is no bucket there-is-none"):
            use(away)
    with support.gate(server, monkeypatch) as gate:
        gate.answer = support.DENIED
        with pytest.raises(fm.InputError, match=r"access is denied .*roles/storage.objectUser"):
            away.write("x")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Object 'b/o' is subject to bucket's retention policy or object retention and cannot "
            "be deleted or overwritten until 2027-01-01T00:00:00-07:00",
            "retentionPolicyNotMet",
        ),
        (
            "Object 'b/o' is under active Event-Based hold and cannot be deleted, overwritten or "
            "archived until hold is removed.",
            "forbidden",
        ),
    ],
)
def test_a_bucket_that_keeps_objects_is_named(server, monkeypatch, message, reason):
    with support.gate(server, monkeypatch) as gate:
        gate.answer = support.refusal(message, reason)
        for use in (BucketPath.delete, lambda path: path.write("x")):
            with pytest.raises(fm.InputError) as error:
                use(BucketPath("b", "o"))
            assert "gs://b/o: the bucket keeps objects from being" in str(error.value)
            assert message in str(error.value) and "access is denied" not in str(error.value)
            assert str(error.value).endswith("without a retention policy and without holds")


def test_a_server_that_is_gone_ends_the_command(server, monkeypatch):
    monkeypatch.setattr(buckets, "OUTAGE_SECONDS", 0.2)
    path = support.new_bucket()
    with support.gate(server, monkeypatch) as gate:
        gate.close()
        with pytest.raises(RunEnded, match=r"cannot be reached \([^()]*\)\. Run the same") as error:
            path.write("x")
    assert error.value.code == 75 and error.value.alone
