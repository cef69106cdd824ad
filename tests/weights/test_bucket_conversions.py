"""Conversions from and to buckets: equal to the local ones to the bit, or refused."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.config.run import RunConfig
from finermoe_jax.data.token_files import tokenizer_hash
from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import buckets, install, lease
from finermoe_jax.runtime.buckets import BucketPath
from finermoe_jax.runtime.lease import Lease
from finermoe_jax.training.initial import initial_model
from finermoe_jax.weights import safetensors_files, targets
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.source import open_model, open_with_tokenizer
from finermoe_jax.weights.verify import verify
from tests.support import GOLDEN, assert_refused, command
from tests.support import buckets as support
from tests.support.models import weights, write_tokenizer

MOE = fm.MoEConfig(4, 2, 1, 2, 1)
SEED = dict(seed=1)


pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "TTL_SECONDS", 0.3)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A dense source, the checkpoint upcycled from it, and its export: all local."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(GOLDEN / "upcycle" / "dense_untied", folder / "dense")
    write_tokenizer(folder / "dense", 96, eos_token="w1")
    convert(str(folder / "dense"), folder / "orbax", "orbax", MOE, **SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "_SHARD_BYTES", 40_000)
        convert(str(folder / "orbax"), folder / "hf", "hf", None, **SEED)
    return folder


@pytest.fixture(scope="module")
def away(server, here):
    """The same in a bucket, made from and to there."""
    run = support.new_bucket()
    put(here / "dense", run / "dense")
    convert(str(run / "dense"), run / "orbax", "orbax", MOE, **SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "_SHARD_BYTES", 40_000)
        convert(str(run / "orbax"), run / "hf", "hf", None, **SEED)
    return run


def put(folder, target):
    for file in folder.rglob("*"):
        if file.is_file():
            (target / str(file.relative_to(folder))).write(file)


def values(path):
    model = open_model(path)
    return model.config, {path: array[:].tobytes() for path, array in model.weights.items()}


def content(folder):
    if isinstance(folder, BucketPath):
        return {name: (folder / name).read_bytes() for name in folder.objects()}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_each_combination_equals_the_local_result(here, away, tmp_path, cache):
    assert values(str(away / "orbax")) == values(here / "orbax")
    assert len(list((here / "hf").glob("*.safetensors"))) > 2
    assert content(away / "hf") == content(here / "hf")
    # From a bucket to the disk.
    convert(str(away / "orbax"), tmp_path / "hf", "hf", None, **SEED)
    convert(str(away / "hf"), tmp_path / "orbax", "orbax", None, **SEED)
    assert values(tmp_path / "hf") == values(here / "hf") == values(tmp_path / "orbax")
    # Nothing else is there, and no checkpoint was copied to this disk.
    assert set(away.names()) == {"dense", "hf", "orbax"}
    kept = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file() and "hf" not in f.parts)
    assert kept < 2 * sum(len(each) for each in content(here / "hf").values())
    assert not list(cache.glob("finermoe-jax/upload-*"))


@pytest.mark.slow
def test_verify(here, away):
    for source, target, to in (
        ("dense", "orbax", "orbax"), ("orbax", "hf", "hf"), ("dense", "hf", None),
    ):  # fmt: skip
        moe = None if to == "hf" else MOE
        found = verify(str(away / source), away / target, to, moe, **SEED)
        assert found == verify(str(here / source), here / target, to, moe, **SEED)
    with pytest.raises(fm.InputError, match="an Orbax checkpoint, and --to=hf asks for"):
        verify(str(away / "dense"), away / "orbax", "hf", None)


def test_the_command_converts_and_verifies(here, away, monkeypatch):
    monkeypatch.setattr(targets, "_AT_A_TIME", 2)
    flags = [f"--source={away / 'orbax'}", f"--target={away / 'again'}", "--to=hf", "--verify"]
    result = command("convert", *flags)
    assert result.returncode == 0, result.stderr
    assert "bit for bit" in result.stdout and result.stdout.endswith(f"{away / 'again'}\n")
    (away / "again" / "config.json").delete()
    (away / "again" / "config.json").write("{}")
    result = command("convert", *flags)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert f"{away / 'again' / 'config.json'}: model_type=None is not" in result.stderr
    assert (away / "again" / "config.json").read_bytes() == b"{}", "only checked, not written"


@pytest.mark.slow
def test_models_are_loaded_and_saved(here, away):
    dense, moe = fm.load_hf(away / "dense"), fm.load_checkpoint(str(away / "orbax"))
    locally = fm.load_hf(here / "dense"), fm.load_checkpoint(here / "orbax")
    for ours, local in zip((dense, moe), locally, strict=True):
        theirs = weights(local)
        assert all(np.array_equal(each, theirs[path]) for path, each in weights(ours).items())
    assert fm.load_tokenizer(str(away / "orbax"))("w3")["input_ids"] == [3]
    fm.save_checkpoint(moe, str(away / "saved"), tokenizer=here / "dense")
    fm.save_hf(moe, str(away / "saved_hf"), tokenizer=here / "dense")
    assert values(away / "saved") == values(here / "orbax")
    assert values(away / "saved_hf") == values(here / "hf")


def test_a_run_starts_from_a_bucket(here, away):
    def start(folder):
        initial = initial_model(RunConfig(init_from=str(folder / "orbax"), moe=MOE))
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = nnx.to_pure_dict(nnx.state(initial.model))
        placed = jax.tree.leaves(initial.place(jax.tree.map(lambda _: one, shapes)))
        return [np.asarray(leaf) for leaf in placed], tokenizer_hash(initial.tokenizer_files)

    (ours, tokenizer), (local, same) = start(away), start(here)
    assert tokenizer == same
    assert all(np.array_equal(*pair) for pair in zip(ours, local, strict=True))


@pytest.mark.slow
def test_the_commands_read_checkpoints(here, away, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w3")
    for name, *flags in (("eval", f"--text={text}", "--checkpoint={}"), ("similarity", "{}")):
        ours, local = (
            command(name, *(flag.format(folder / "orbax") for flag in flags))
            for folder in (away, here)
        )
        assert ours.returncode == 0, ours.stderr
        assert ours.stdout == local.stdout


# --- what breaks ----------------------------------------------------------------------------


class Killed(BaseException):
    """In place of SIGKILL: nothing is cleaned up."""


@pytest.fixture
def killed(monkeypatch):
    """Runs a call that is killed when it writes an object of this name."""

    def run(name, call):
        of_one = BucketPath.write

        def write(self, *arguments, **settings):
            if self.name == name:
                raise Killed
            return of_one(self, *arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(BucketPath, "write", write)
            patch.setattr(targets, "_clear", lambda target: None)
            patch.setattr(Lease, "close", lambda self: self._over.set())
            with pytest.raises(Killed):
                call()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("hf", "model", r"config\.json is missing"),
        ("hf", "config.json", r"config\.json is missing"),
        ("orbax", "checksums.json", "is damaged.*(missing|not completed)|is neither a checkpoint"),
    ],
)
def test_a_killed_conversion_is_no_model_and_is_begun_again(
    here, away, killed, monkeypatch, to, name, words
):
    monkeypatch.setattr(safetensors_files, "_SHARD_BYTES", 40_000)
    source, target = away / ("orbax" if to == "hf" else "dense"), away / f"killed-{name}"
    if to == "hf" and name.startswith("model"):
        name = sorted(path.name for path in (here / "hf").glob("*.safetensors"))[1]
    moe = None if to == "hf" else MOE
    killed(name, lambda: convert(str(source), target, to, moe, **SEED))
    assert target.objects(), "something was left"
    with pytest.raises(fm.InputError, match=words):
        open_model(target)
    (target / "left").write("by the killed process")
    convert(str(source), target, to, moe, **SEED)
    assert values(target) == values(here / to)
    assert "left" not in target.objects()
    assert not (away / f".{target.name}.partial").exists()


def test_what_is_there_is_kept(away, here):
    for target in ("orbax", "hf"):
        before = (away / target).objects()
        with pytest.raises(fm.InputError, match=rf"{away / target} is not empty; nothing is over"):
            convert(str(here / "dense"), away / target, "orbax", MOE, **SEED)
        assert (away / target).objects() == before
    flags = [f"--source={here / 'orbax'}", f"--target={away / 'new'}", "--to=hf"]
    result = command("convert", *flags, "--push_to_hub=someone/model")
    assert_refused(result, "--push_to_hub=someone/model sends a local directory", "new")
    (away / "object").write("x")
    with pytest.raises(fm.InputError, match="is an object; give a new prefix"):
        convert(str(here / "dense"), away / "object", "orbax", MOE, **SEED)


@pytest.mark.slow
def test_two_at_once(away, here, monkeypatch):
    target = away / "two"
    monkeypatch.setattr(lease, "TTL_SECONDS", 4.0)  # a busy machine renews it in time
    held = Lease(target, print, "target", targets._claim(target))
    held.take()
    try:
        with pytest.raises(fm.InputError, match=rf"{target} is in use by process .*another target"):
            convert(str(here / "dense"), target, "orbax", MOE, **SEED)
    finally:
        held.close()
    assert target.objects() == {}

    # One that is stopped for long finds that another has taken over, and completes nothing.
    def overtaken(self):
        self.lost = "lost"
        self.check()

    monkeypatch.setattr(Lease, "confirm", overtaken)
    for to in ("orbax", "hf"):
        with pytest.raises(RunEnded, match="lost"):
            convert(str(away / "orbax"), away / f"lost-{to}", to, None, **SEED)
        assert (away / f"lost-{to}").objects(), "the other one's objects stay"
        with pytest.raises(fm.InputError):
            open_model(away / f"lost-{to}")


def test_an_interrupted_conversion_leaves_nothing(away, here):
    target = away / "interrupted"
    for to in ("orbax", "hf"):
        handler, of_one = signal.getsignal(signal.SIGTERM), BucketPath.write

        def write(self, *arguments, of_one=of_one, **settings):
            os.kill(os.getpid(), signal.SIGTERM)
            return of_one(self, *arguments, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BucketPath, "write", write)
            with pytest.raises(RunEnded, match=f"nothing of {target} is left"):
                convert(str(here / "orbax"), target, to, None, **SEED)
        assert signal.getsignal(signal.SIGTERM) == handler
        assert target.objects() == {} and not targets._claim(target).exists()


def test_a_source_that_changes_is_refused(away, here):
    put_again = away / "moving"
    convert(str(here / "orbax"), put_again, "orbax", None, **SEED)
    model, _, _ = open_with_tokenizer(put_again)
    model.refuse_changed()
    data = next(name for name in put_again.objects() if name.startswith("params/ocdbt.process_0/d"))
    kept = (put_again / data).read_bytes()
    (put_again / data).write(kept)  # the same bytes, written again
    with pytest.raises(fm.InputError, match=f"{put_again / data} was changed while it was read"):
        model.refuse_changed()
    (put_again / data).delete()
    with pytest.raises(fm.InputError, match=f"{put_again / data} was removed while it was read"):
        model.refuse_changed()
    assert model.was_removed()
    # A conversion that meets it leaves nothing.
    (put_again / data).write(kept)
    of_one = BucketPath.write

    def write(self, *arguments, **settings):
        if self.name == "_METADATA" or self.name == "config.json":
            return of_one(self, *arguments, **settings)
        (put_again / data).delete()
        return of_one(self, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BucketPath, "write", write)
        with pytest.raises(fm.InputError, match=r"was removed while it was read|is damaged"):
            convert(str(put_again), away / "of-moving", "hf", None, **SEED)
    assert (away / "of-moving").objects() == {}


def test_lost_and_changed_objects_are_refused(away, here):
    broken = away / "broken"
    convert(str(here / "orbax"), broken, "orbax", None, **SEED)
    data = next(name for name in broken.objects() if name.startswith("params/ocdbt.process_0/d"))
    kept = (broken / data).read_bytes()
    for content_now, words in (
        (None, "is missing"),
        (kept[:-1], f"has {len(kept) - 1} bytes, {len(kept)} when saved"),
        (bytes([kept[0] ^ 1]) + kept[1:], "has checksum"),
    ):
        (broken / data).delete()
        if content_now is not None:
            (broken / data).write(content_now)
        with pytest.raises(fm.InputError, match=f"{broken} is damaged: {data} {words}"):
            fm.load_checkpoint(broken)
    (broken / data).write(kept)
    fm.load_checkpoint(broken)


def test_denied_no_bucket_and_no_extra_are_one_message_each(here, server, monkeypatch):
    flags = [f"--source={here / 'orbax'}", "--to=hf"]
    result = command("convert", *flags, "--target=gs://there-is-none/x")
    assert_refused(result, "there is no bucket there-is-none")
    result = command("convert", f"--source={support.new_bucket()}/x", f"--target={here}/never")
    assert_refused(result, "/run/x does not exist")
    gate = support.Gate(server)
    gate.answer = support.DENIED
    with monkeypatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", gate.url)
        buckets._client.cache_clear()
        try:
            result = command("convert", *flags, "--target=gs://denied/x")
        finally:
            gate.end()
            buckets._client.cache_clear()
    assert_refused(result, "access is denied", "roles/storage.objectUser")
    with monkeypatch.context() as patch:
        patch.setattr(install.importlib.util, "find_spec", lambda name: None)
        buckets._client.cache_clear()
        result = command("convert", *flags, "--target=gs://bucket/x")
    assert_refused(result, "gs:// needs gcsfs, which is not installed: pip install", "[gcs]")


def test_a_server_that_is_gone_ends_the_conversion_which_is_begun_again(
    here, away, server, monkeypatch
):
    target, gate = away / "outage", support.Gate(server)
    of_one = BucketPath.write

    def write(self, *arguments, **settings):
        if self.name == "config.json":
            gate.close()
        return of_one(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", gate.url)
        patch.setattr(buckets, "OUTAGE_SECONDS", 0.2)
        patch.setattr(BucketPath, "write", write)
        buckets._client.cache_clear()
        try:
            with pytest.raises(RunEnded, match="cannot be reached") as error:
                convert(str(here / "orbax"), target, "hf", None, **SEED)
        finally:
            gate.end()
            buckets._client.cache_clear()
    assert error.value.code == 75
    assert "model.safetensors" in target.objects()
    convert(str(here / "orbax"), target, "hf", None, **SEED)
    assert values(target) == values(here / "hf")


def test_a_small_disk_is_refused_with_sizes(here, away, monkeypatch):
    from finermoe_jax.runtime import disk

    monkeypatch.setattr(disk, "has_room", lambda directory, size, files=0: size == 0)
    with pytest.raises(fm.InputError, match=r"needs \S+B, but the disk of .* has \S+B free"):
        convert(str(here / "orbax"), away / "full", "hf", None, **SEED)
    convert(str(here / "orbax"), away / "full", "orbax", None, **SEED)  # needs none
    with pytest.raises(fm.InputError, match=r"needs \S+B for a local copy"):
        fm.load_hf(away / "hf")
