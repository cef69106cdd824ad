"""Sending a directory to the Hub: the real client, over loopback, to a server like the Hub."""

import time

import pytest

from finermoe_jax.errors import InputError, RunEnded
from finermoe_jax.runtime import publish
from finermoe_jax.weights.convert import convert
from tests.support import GOLDEN, assert_refused, command
from tests.support.hub import account

# Of httpx, about the client's own call.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MIXTURE = GOLDEN / "e_conv_split"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    target = tmp_path_factory.mktemp("source") / "checkpoint"
    convert(str(MIXTURE), target, "orbax", None, seed=0)
    return target


def push(source, target, name, *flags, to="--to=hf"):
    return command(
        "convert", f"--source={source}", f"--target={target}", to, f"--push_to_hub={name}", *flags
    )


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["me/first", "first", "team/first"])
def test_a_directory_is_sent(checkpoint, tmp_path, monkeypatch, name):
    full = name if "/" in name else f"me/{name}"
    with account(monkeypatch) as server:
        done = push(checkpoint, tmp_path / "hf", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "hf"), f"{server.address}/{full}"]
    assert "sending" in done.stderr and "model.safetensors" in done.stderr  # the bar's file
    assert "POST /api/validate-yaml" in server.asked  # the model card
    sent = server.repositories[full]
    assert sent.pop(".gitattributes")
    assert sent == content(tmp_path / "hf") and "model.safetensors" in sent
    assert server.private == {full}
    assert f'from_pretrained("{full}", trust_remote_code=True)'.encode() in sent["README.md"]


def test_an_existing_target_is_verified_and_sent(checkpoint, tmp_path, monkeypatch):
    convert(str(checkpoint), tmp_path / "hf", "hf", None, seed=0)
    with account(monkeypatch) as server:
        server.repositories["me/again"] = {".gitattributes": b"lfs"}  # made, but nothing was sent
        done = push(checkpoint, tmp_path / "hf", "again", "--verify")
    assert done.returncode == 0, done.stderr
    server.repositories["me/again"].pop(".gitattributes")
    assert server.repositories["me/again"] == content(tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("me/x", None, ["needs a Hugging Face token", "hf auth login", "HF_TOKEN"]),
        ("me/x", "wrong", ["does not accept the token", "hf auth login"]),
        ("me/x", "reads", ["this token can only read"]),
        ("me/taken", "good", ["me/taken already has 1 files (config.json)", "another name"]),
        ("taken", "good", ["me/taken already has 1 files"]),
        ("you/x", "good", ["cannot write for you, only for me, team"]),
        ("readers/x", "good", ["cannot write for readers, only for me, team"]),
        ("forbidden", "good", ["refuses to create this repository", "no rights to create"]),
        ("", "good", ["is no Hub id"]),
        ("a/b/c", "good", ["--push_to_hub=a/b/c is no Hub id", "owner/name"]),
        ("me/x--y", "good", ["is no Hub id", "x--y"]),
        ("https://huggingface.co/me/x", "good", ["is no Hub id"]),
    ],
)  # fmt: skip
def test_refused_before_any_work(checkpoint, tmp_path, monkeypatch, name, token, words):
    with account(monkeypatch, token) as server:
        server.repositories["me/taken"] = {".gitattributes": b"", "config.json": b"{}"}
        assert_refused(push(checkpoint, tmp_path / "hf", name), *words)
    assert server.repositories.keys() == {"me/taken"} and not server.stored
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_sent(checkpoint, tmp_path, monkeypatch):
    with account(monkeypatch) as server:
        done = push(checkpoint, tmp_path / "out", "me/x", to="--to=orbax")
    assert_refused(done, "--push_to_hub=me/x", "--to=orbax writes a checkpoint", "add --to=hf")
    assert server.asked == []


def test_a_bad_source_creates_no_repository(tmp_path, monkeypatch):
    with account(monkeypatch) as server:
        assert_refused(push(tmp_path / "no/such/model", tmp_path / "hf", "me/x"), "no/such/model")
    assert server.repositories == {}


def test_without_the_hub(monkeypatch):
    with account(monkeypatch) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: unset it"):
            publish.repository("me/x")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(InputError, match=r"does not answer as expected .* `hf upload`"):
            publish.repository("me/x")
    assert server.asked == []


def test_a_server_that_dies(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's retries
    target = tmp_path / "my export"
    with account(monkeypatch) as server:
        server.lives = 0
        done = push(checkpoint, target, "me/x")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        again = f"Send it with `hf upload me/x '{target}' .`"
        assert f"{target} is complete, but it was not sent to me/x: " in done.stderr
        assert again in done.stderr
        assert done.stdout.splitlines() == [str(target)]
        assert server.repositories["me/x"].keys() == {".gitattributes"}
        whole = content(target)
        assert command("convert", f"--source={checkpoint}", f"--target={target}", "--to=hf",
                       "--verify").returncode == 0  # fmt: skip
        server.lives = 10
        publish.send(target, "me/x")
    server.repositories["me/x"].pop(".gitattributes")
    assert server.repositories["me/x"] == whole == content(target)


def test_an_interrupted_upload(checkpoint, tmp_path, monkeypatch):
    def interrupt(self, **_):
        raise KeyboardInterrupt

    with account(monkeypatch):
        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
        with pytest.raises(RunEnded, match=r"to me/x: interrupted\. Send it with") as ended:
            publish.send(tmp_path, "me/x")
    assert ended.value.code == 130
