"""Paths as users name them: `~` is expanded, URLs are supported or refused before any work."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from absl import flags

import finermoe_jax as fm
from finermoe_jax.cli.flags import Flags
from finermoe_jax.cli.main import COMMANDS
from finermoe_jax.cli.similarity import labelled
from finermoe_jax.config.run import DataConfig, RunConfig
from finermoe_jax.data import token_files
from finermoe_jax.data.prepare import prepare
from finermoe_jax.data.text import TextFile
from finermoe_jax.evaluation.evaluate import Tasks, evaluate
from finermoe_jax.runtime.paths import local, local_list
from finermoe_jax.training import plot
from finermoe_jax.training.run import train
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_weights import resolve_source
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.verify import verify
from tests.support import GOLDEN, command, invoke

MIXTURE = GOLDEN / "e_conv_split"
BUCKET = "gs://bucket/run"
S3 = "s3://bucket/run"
# What place() says of URLs that are supported nowhere.
REFUSED = {
    S3: "s3://bucket/run is not supported: Orbax",
    "az://bucket/run": "az://bucket/run is a URL",
    "hf://owner/name": "hf://owner/name is a URL: give the Hub id owner/name",
    "https://example.org/x": "https://example.org/x is a URL",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, which stays empty: nothing called `gs:` is made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/user")
    yield tmp_path / "here"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("gs://b/x", ["gs://b/x", "gcloud storage cp -r", "docs/howto/buckets.md"]),
        ("GS://b/x", ["gcloud storage cp -r"]),
        ("s3://b/x", ["aws s3 cp --recursive"]),
        ("az://b/x", ["az://b/x", "copy the files", "local directory"]),
        ("hdfs:///x", ["hdfs:///x is a URL"]),
        ("abfs+x.y-z://b", ["is a URL"]),
        (Path("gs://b/x"), ["gs://b/x", "gcloud"]),
        (Path("hf://o/n"), ["give the Hub id o/n"]),
        ("file:///data/x.txt", ["give the path alone, /data/x.txt"]),
        ("file://localhost/data/x", ["give the path alone, /data/x"]),
        ("hf://owner/name", ["give the Hub id owner/name", "hf download owner/name"]),
        ("hf://datasets/owner/name", ["give the Hub id owner/name"]),
        ("https://huggingface.co/owner/na.me-1", ["give the Hub id owner/na.me-1"]),
        ("https://huggingface.co/owner/name/tree/main", ["give the Hub id owner/name if"]),
        ("http://hf.co/datasets/owner/name", ["give the Hub id owner/name"]),
        ("https://huggingface.co/", ["is a URL", "copy the files"]),
        ("https://example.org/owner/name", ["is a URL", "copy the files"]),
    ],
)
def test_an_address_is_refused_with_the_way_out(address, words):
    with pytest.raises(fm.InputError) as error:
        local(address, "data.path")
    assert str(error.value).startswith("data.path: ")
    assert [word for word in words if word not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    "path",
    ["", "demo/model", "Qwen/Qwen2.5-0.5B", "/a/b", "a:b/c", "./gs:/b", "C:/x", "x/y://z",
     "a~b", "./~"],
)  # fmt: skip
def test_a_path_stays(path):
    assert local(path) == path


def test_the_home_directory():
    assert local("~/a") == local(Path("~/a")) == "/home/user/a"
    assert local_list("~/a:1, ~/b:2,c") == "/home/user/a:1, /home/user/b:2,c"
    with pytest.raises(fm.InputError, match="gs://b/c:2"):
        local_list("~/a:1, gs://b/c:2")


# --- every way in ---------------------------------------------------------------------------

# Flags that take gs:// URLs.
BUCKETS = {
    "convert": {"source", "target"}, "eval": {"checkpoint"}, "generate": {"checkpoint"},
    "prepare": {"tokenizer", "upload"}, "train": {"workdir"},
}  # fmt: skip
# Of the flags that take text, those that name no path.
NO_PATHS = {"wandb", "profile_steps", "program", "to", "dtype", "prompt", "system", "topology",
            "text_field", "split", "config", "push_to_hub", "experts"}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_flag(command, monkeypatch):
    """A new flag that takes text is either a path's or stands in NO_PATHS."""
    monkeypatch.setattr(sys, "argv", ["command"])
    defined = Flags()
    importlib.import_module(f"finermoe_jax.cli.{command}").COMMAND.define(defined)
    for name in set(defined.values) - NO_PATHS:
        flag = defined.values[name]
        if type(flag) is not flags.Flag or flag.flag_type() != "string":
            continue
        if name in BUCKETS.get(command, ()):
            flag.parse(f"{BUCKET}/")
            assert flag.value == BUCKET
            for url, words in REFUSED.items():
                with pytest.raises(flags.IllegalFlagValueError, match=f"--{name}=.*{words}"):
                    flag.parse(url)
        else:
            for url, words in ((BUCKET, "gcloud"), (S3, "aws s3 cp"), ("az://b/x", "is a URL")):
                with pytest.raises(flags.IllegalFlagValueError, match=f"--{name}=.*{words}"):
                    flag.parse(url)
        flag.parse("~/x")
        assert flag.value == "/home/user/x"


PATH_FIELDS = {"init_from", "data.path", "data.tokenizer", "data.eval_path"}


def test_every_field_of_a_config():
    """A new field of type str is either a path's or fails here."""
    run = dataclasses.asdict(RunConfig(init_from="x"))
    run = {k: v for k, v in run.items() if k != "upcycle"}
    text = {name for name, value in run.items() if isinstance(value, str)}
    text |= {f"data.{name}" for name, v in run["data"].items() if isinstance(v, str)}
    assert text - {"data.packing"} == PATH_FIELDS
    for name in PATH_FIELDS:
        field = name.removeprefix("data.")

        def made(value, field=field, name=name):
            if name == "init_from":
                return RunConfig(init_from=value).init_from
            return getattr(DataConfig(**{field: value}), field)

        assert made("~/x") == "/home/user/x"
        assert made(BUCKET) == BUCKET
        for url, words in REFUSED.items():
            with pytest.raises(fm.InputError, match=f"^{name}: {words}"):
                made(url)
    assert DataConfig(path="~/a:1,~/b:2").path == "/home/user/a:1,/home/user/b:2"
    with pytest.raises(fm.InputError, match=r"data\.path: s3://b/c:2 "):
        DataConfig(path="~/a:1,s3://b/c:2")


@pytest.mark.parametrize("address", [S3, Path(S3)])
@pytest.mark.parametrize(
    "call",
    [
        fm.load_hf,
        fm.load_checkpoint,
        open_model,
        resolve_source,
        lambda path: fm.save_hf(fm.load_hf(MIXTURE), path),
        lambda path: fm.save_hf(fm.load_hf(MIXTURE), "out", tokenizer=path),
        lambda path: fm.save_checkpoint(fm.load_hf(MIXTURE), path),
        lambda path: fm.save_checkpoint(fm.load_hf(MIXTURE), "out", tokenizer=path),
    ],
)
def test_every_call(call, address):
    with pytest.raises(fm.InputError, match=r"s3://bucket/run.*(Orbax|aws s3 cp)"):
        call(address)


OUT = Path("out")


@pytest.mark.parametrize(
    "call",
    [
        lambda url: fm.preset(url),
        lambda url: plot.draw(Path(url)),
        lambda url: TextFile(Path(url)),
        lambda url: token_files.verify(Path(url)),
        lambda url: evaluate("x", text=Path(url)),
        lambda url: evaluate("x", tasks=Tasks(["arc_easy"], data_dir=Path(url))),
        lambda url: prepare(["x"], Path(url), OUT),
        lambda url: prepare([url], OUT, OUT),
    ],
)
def test_every_call_of_a_command_for_local_paths(call):
    with pytest.raises(fm.InputError, match=r"gs://bucket/run.*gcloud"):
        call(BUCKET)
    with pytest.raises(fm.InputError, match=r"s3://bucket/run.*aws s3 cp"):
        call(S3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: train(RunConfig(init_from="x"), Path(S3)),
        lambda: convert(str(MIXTURE), Path(S3), "orbax", None, seed=0),
        lambda: convert(S3, OUT, "orbax", None, seed=0),
        lambda: verify(str(MIXTURE), Path(S3), None, None),
        lambda: evaluate(S3),
        lambda: prepare(["x"], OUT, Path(S3)),
    ],
)
def test_every_call_of_a_command_that_takes_buckets(call):
    with pytest.raises(fm.InputError, match=r"s3://bucket/run is not supported: Orbax"):
        call()


@pytest.mark.parametrize("argument", [S3, f"label={S3}", f"{S3}=x"])
def test_similarity_and_plot(argument, capsys):
    assert invoke("similarity", argument) == 2
    assert "Orbax" in capsys.readouterr().err
    assert invoke("similarity", MIXTURE, f"--output={BUCKET}.png") == 2
    assert "gcloud" in capsys.readouterr().err
    assert invoke("plot", argument) == 2
    assert labelled(["~/a", "b=~/c"]) == {"a": "/home/user/a", "b": "/home/user/c"}
    assert labelled([f"a={BUCKET}", BUCKET]) == {"a": BUCKET, "run": BUCKET}


@pytest.mark.parametrize("flag", ["--workdir=s3://bucket/run", "--workdir=az://bucket/run",
                                  "--config.init_from=s3://bucket/run"])  # fmt: skip
def test_nothing_is_left_of_a_run(place, flag):
    result = command("train", flag, "--config.train.steps=1", cwd=place)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("error: ") == 1 and "//bucket/run" in result.stderr
    assert "Traceback" not in result.stderr
