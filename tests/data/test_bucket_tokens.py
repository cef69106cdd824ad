"""Prepared tokens in a bucket: uploaded once, copied once, and equal to the local ones."""

import json
import shutil
import threading

import numpy as np
import pytest

import finermoe_jax as fm
from finermoe_jax.config.run import DataConfig
from finermoe_jax.data.batches import open_data, parse_mixture
from finermoe_jax.data.bucket_tokens import download_prepared, upload_prepared
from finermoe_jax.data.prepare import prepare
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.runtime import disk
from finermoe_jax.runtime.buckets import BucketPath
from finermoe_jax.runtime.files import find
from tests.support import buckets as support
from tests.support import command

MODEL = find("demo/model")
TEXT = find("demo/LICENSE.pydoc.txt")


pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finermoe-jax" / "tokens"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("whole"), TEXT.read_text()
    lines = [json.dumps({"text": text[i : i + 500]}) for i in range(0, 9000, 500)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    target = folder / "tokens"
    prepare([str(folder / "lines.jsonl")], target, MODEL, say=lambda line: None, shard_tokens=1000)
    return target


@pytest.fixture
def uploaded(whole):
    prefix = support.new_bucket() / "tokens"
    upload_prepared(whole, prefix, lambda line: None)
    return prefix


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rows(path):
    config = DataConfig(path=path, sequence_length=32, global_batch_size=2)
    data = open_data(config, open_tokenizer(MODEL, 2048), MODEL, 2048)
    return data.train.read(range(len(data.train)))


@pytest.mark.slow
def test_a_run_reads_the_same_rows(whole, uploaded, cache):
    ours, theirs = rows(f"{uploaded}:2,{TEXT}:1"), rows(f"{whole}:2,{TEXT}:1")
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one, other)
    (copy,) = [path for path in cache.iterdir() if path.is_dir()]
    assert content(copy) == content(whole)
    assert rows(str(uploaded)) is not None


def test_the_copy_is_used_again_and_repaired(uploaded, cache, whole, monkeypatch):
    copy = download_prepared(uploaded)
    fetched = []
    of_one = BucketPath.download
    monkeypatch.setattr(
        BucketPath, "download", lambda self, to: fetched.append(self.name) or of_one(self, to)
    )
    assert download_prepared(uploaded) == copy and fetched == []
    # The same tokens under another name need no second copy.
    other = support.new_bucket()
    upload_prepared(whole, other, lambda line: None)
    assert download_prepared(other) == copy and fetched == []
    (copy / "00000.bin").unlink()
    assert content(download_prepared(uploaded)) == content(whole)
    # An interrupted download fetches only what it lacks.
    fetched.clear()
    shutil.move(copy, copy.with_name(f".{copy.name}.partial"))
    (copy.with_name(f".{copy.name}.partial") / "00000.bin").write_bytes(b"torn")
    assert content(download_prepared(uploaded)) == content(whole) and fetched == ["00000.bin"]


def test_one_process_downloads_and_the_others_wait(uploaded, whole, monkeypatch):
    fetched, found = [], []
    of_one = BucketPath.download
    monkeypatch.setattr(
        BucketPath, "download", lambda self, to: fetched.append(self.name) or of_one(self, to)
    )
    threads = [
        threading.Thread(target=lambda: found.append(download_prepared(uploaded))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and sorted(fetched) == sorted(content(whole))


def test_lost_and_changed_objects_are_refused(uploaded, whole, cache):
    shard = uploaded / "00001.bin"
    kept = shard.read_bytes()
    shard.delete()
    with pytest.raises(fm.InputError, match=rf"{uploaded} lacks 00001.bin.*--upload={uploaded}"):
        download_prepared(uploaded)
    changed = bytearray(kept)
    changed[5] ^= 1
    shard.write(bytes(changed))
    with pytest.raises(
        fm.InputError, match=rf"(?s)damaged files:\n  {shard}: .*Delete the objects below gs://"
    ) as error:
        download_prepared(uploaded)
    assert ".partial" not in str(error.value)
    assert [path for path in cache.iterdir() if path.suffix == ""] == []
    # Uploading again does not overwrite it, and repairs what is deleted.
    with pytest.raises(fm.InputError, match=rf"{shard} holds something else"):
        upload_prepared(whole, uploaded, lambda line: None)
    shard.delete()
    upload_prepared(whole, uploaded, lambda line: None)
    assert content(download_prepared(uploaded)) == content(whole)


def test_an_upload_is_complete_with_its_manifest_and_resumes(whole, monkeypatch):
    prefix = support.new_bucket() / "tokens"
    written = []
    of_one = BucketPath.write

    def write(self, *arguments, **settings):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(self.name)
        return of_one(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "write", write)
        with pytest.raises(KeyboardInterrupt):
            upload_prepared(whole, prefix, lambda line: None)
    with pytest.raises(fm.InputError, match=r"has no manifest\.json.*run the same command again"):
        download_prepared(prefix)
    first = prefix.objects()
    said = []
    upload_prepared(whole, prefix, said.append)
    assert first.items() < prefix.objects().items(), "whole objects are not uploaded again"
    assert len(said) == 1 and str(prefix) in said[0]
    (prefix / "notes.txt").write("mine")
    with pytest.raises(fm.InputError, match=r"is not empty: it has notes\.txt"):
        upload_prepared(whole, prefix, lambda line: None)


def test_a_small_disk_is_refused_with_sizes(uploaded, cache, monkeypatch):
    monkeypatch.setattr(disk, "has_room", lambda *arguments: False)
    with pytest.raises(fm.InputError, match=r"needs \S+B for a local copy .*has \S+B free"):
        download_prepared(uploaded)


def test_a_replacement_during_the_download_is_refused(uploaded, monkeypatch):
    listed = uploaded.objects()
    (uploaded / "00000.bin").write(b"other")
    monkeypatch.setattr(BucketPath, "objects", lambda self: listed)
    with pytest.raises(fm.InputError, match=r"00000\.bin was replaced while it was downloaded"):
        download_prepared(uploaded)
    (uploaded / "00000.bin").delete()
    with pytest.raises(fm.InputError, match=r"00000\.bin was deleted while it was downloaded"):
        download_prepared(uploaded)


def test_text_in_a_bucket_is_refused(server):
    path = support.new_bucket() / "text.jsonl"
    path.write(json.dumps({"text": "hello"}))
    with pytest.raises(fm.InputError, match="Only prepared tokens are read from buckets"):
        rows(str(path))


def test_mixtures_of_urls():
    assert parse_mixture("gs://b/x") == [("gs://b/x", 1)]
    assert parse_mixture("gs://b/x:2, gs://b/y:1") == [("gs://b/x", 2), ("gs://b/y", 1)]
    with pytest.raises(fm.InputError, match=r"weight '' of gs://b/x is not a number"):
        parse_mixture("gs://b/x,gs://b/y")
    with pytest.raises(fm.InputError, match=r"names gs://b/x/ twice \(as gs://b/x\)"):
        parse_mixture("gs://b/x:1,gs://b/x/:1")
    with pytest.raises(fm.InputError, match=r"data\.path: s3://b/x:1 is not supported: Orbax"):
        DataConfig(path="s3://b/x:1")


def test_the_command_uploads(tmp_path, server):
    prefix = support.new_bucket() / "tokens"
    flags = [f"--source={TEXT}", f"--target={tmp_path / 'tokens'}", "--processes=1"]
    flags += [f"--tokenizer={MODEL}", f"--upload={prefix}"]
    result = command("prepare", *flags)
    assert result.returncode == 0, result.stderr
    assert str(prefix) in result.stdout
    assert content(download_prepared(prefix)) == content(tmp_path / "tokens")
    result = command("prepare", *flags[:-1], f"--upload={tmp_path}/x")
    assert result.returncode == 2 and "must be a gs:// URL" in result.stderr
    flags[1] = f"--target={prefix}"
    result = command("prepare", *flags)
    assert result.returncode == 2 and "--target=" in result.stderr and "local" in result.stderr


def test_upload_of_a_damaged_directory_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "tokens")
    (tmp_path / "tokens" / "00000.bin").write_bytes(b"ab")
    prefix = support.new_bucket()
    with pytest.raises(fm.InputError, match=r"damaged files:"):
        upload_prepared(tmp_path / "tokens", prefix, lambda line: None)
    assert prefix.objects() == {}
