"""Commands run in this process: configs by name, output of any encoding, what a command says."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import finermoe_jax as fm
from finermoe_jax.cli import main
from finermoe_jax.config.parse import find_config, preset
from tests.support import GOLDEN, ROOT, invoke

TIED = GOLDEN / "upcycle" / "dense_tied"
PRESETS = "Presets: demo, demo_dense, qwen0p5b, qwen1p5b, qwen3_0p6b, qwen7b, smollm2_135m."


# --- configs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "moe", "steps"),
    [
        (["--config=demo"], True, 150),
        (["--config", "demo:ct", "--config.train.steps=7"], False, 7),
        (["--config.train.steps=7", "-config=configs/demo.py:ct"], False, 7),
        (["--config=demo:ct", "--config=demo"], True, 150),
        (["--config.train.steps=7"], True, 7),
    ],
)
def test_a_preset_by_name_or_path(capsys, arguments, moe, steps):
    assert invoke("train", "--print_config", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["moe"] is not None, printed["train"]["steps"]) == (moe, steps)


def test_the_former_name_of_dense_is_a_flag(capsys):
    arguments = "--config=demo_dense", "--config.dense.num_hidden_layers=2"
    assert invoke("train", "--print_config", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["dense"]["num_hidden_layers"] == 2


def test_flags_from_a_file(capsys, tmp_path):
    (tmp_path / "flags").write_text("--config=demo:ct\n--config.train.steps=7\n")
    assert invoke("train", f"--flagfile={tmp_path / 'flags'}", "--print_config") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["moe"], printed["train"]["steps"]) == (None, 7)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demoo", ["--config=demoo is neither", "Did you mean demo?", PRESETS]),
        ("demo.py", ["demo.py does not exist", "Did you mean demo?", PRESETS]),
        ("zzz:ct", ["--config=zzz is neither a preset nor a file. Presets:", PRESETS]),
        ("configs/demoo.py:ct", ["configs/demoo.py does not", "mean configs/demo.py", PRESETS]),
        ("no/such/x.py", ["config file no/such/x.py does not exist", PRESETS]),
        ("demo_dense:ct", ["demo_dense.py: this config has no variants: remove \":ct\""]),
        ("demo:cx", ["demo.py: unknown variant 'cx'"]),
    ],
)  # fmt: skip
def test_a_name_that_is_no_config(name, words):
    with pytest.raises(fm.InputError) as error:
        preset(name)
    assert [word for word in words if word not in str(error.value)] == [], error.value
    assert "train.py" not in str(error.value)  # no config lies beside the package


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n  pass", ["get_config() returns nothing", "default_config()"]),
        ("def get_config():\n  return dict(a=1)", ["returns a dict", "ConfigDict"]),
        ("x = 1", ["does not define get_config()"]),
        ("get_config = 1", ["does not define get_config()"]),
        ("\nraise KeyError('WANDB_PROJECT')", ["failed in line 2: KeyError: 'WANDB_PROJECT'"]),
        ("def get_config():\n  return 1 / 0", ["failed in line 2: ZeroDivisionError"]),
        ("def get_config(:", ["failed", "SyntaxError", "line 1"]),
        ("import no_such_package_x", ["failed in line 1: ModuleNotFoundError"]),
        ("raise SystemExit(0)", ["failed in line 1: SystemExit"]),
        ("raise OSError('disk')", ["failed in line 1: OSError: disk"]),
        ("def get_config(variant):\n  pass", ["needs a variant"]),
    ],
)
def test_a_config_that_fails_is_named(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text + "\n")
    with pytest.raises(fm.InputError) as error:
        preset(str(path))
    message = str(error.value)
    assert message.startswith(f"config file {path}") and "Traceback" not in message
    assert [word for word in words if word not in message] == [], message


def test_colons_in_a_path(tmp_path):
    folder = tmp_path / "a:b" / "c.py:d"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(
        "from finermoe_jax import default_config\n"
        "def get_config(variant=''):\n"
        "    config = default_config()\n"
        "    config.init_from = variant\n"
        "    return config\n"
    )
    assert find_config(f"{folder}/run.py") == (folder / "run.py", None)
    assert preset(f"{folder}/run.py:v:w").init_from == "v:w"
    assert preset(f"{folder}/run.py:").init_from == ""


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_config("own:x") == (Path("configs/own.py"), "x")
    assert find_config("demo")[0].is_absolute()


# --- output ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", main.COMMANDS)
def test_output_that_is_not_utf8(monkeypatch, name):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert invoke(name, "--help") == 0
    print("a · b", flush=True)
    assert written.getvalue().endswith(b"a \\xb7 b\n")


def test_every_command_is_listed_with_its_flags_and_defaults(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finermoe", "--help"])
        main.main()
    listed = capsys.readouterr().out
    for name in [*main.COMMANDS, "demo", "qwen7b"]:
        assert re.search(rf"^  {name} +\S.*\S$", listed, re.MULTILINE), name
        assert name not in main.COMMANDS or main.COMMANDS[name] in listed
    assert invoke("convert", "--help") == 0
    shown = capsys.readouterr().out
    assert "usage: finermoe convert --source=" in shown and "(default: orbax)" in shown
    assert shown.index("Required:") < shown.index("  --target") < shown.index("Optional:")
    assert shown.index("Optional:") < shown.index("  --to ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["unknown command 'trian'. Did you mean train?"]),
        (["zzz"], ["unknown command 'zzz'. Known: aot, compare, convert, "]),
        (["train", "--config=demmo"], ["Did you mean demo?"]),
        (["train", "demo"], ["unexpected argument 'demo'"]),
        (["plot"], ["finermoe plot RUN [RUN …]"]),
        (["similarity"], ["finermoe similarity [LABEL=]CHECKPOINT"]),
    ],
)
def test_a_command_line_that_is_none(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["finermoe", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ")
    assert [word for word in words if word not in message] == [], message


def test_a_dense_export_says_that_nothing_was_upcycled(capsys, tmp_path):
    flags = (f"--source={TIED}", "--to=hf")
    assert invoke("convert", *flags, f"--target={tmp_path / 'hf'}") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'hf'}\n"
    assert f"{TIED} is a dense model" in said.err and "does not upcycle" in said.err
    assert f"{tmp_path / 'hf'}: vLLM on a CPU cannot serve it: head_dim=6 is not one" in said.err


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("finermoe_jax.params", "params"),
        ("finermoe_jax.aot", "aot"),
        ("train", "train"),
        ("eval", "eval"),
        ("generate", "generate"),
        ("convert_hf", "convert"),
    ],
)
def test_the_ways_in_of_before(monkeypatch, capsys, module, name):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: finermoe {name} ")


SLOW = """
import sys
import numpy as np
from finermoe_jax.cli import main
if sys.argv[1] == "command":
    main.run("params", ["--config=demo"])
import jax
image = np.zeros((300, 300), np.float32)
sizes = (60, 60), (1, 1), "VALID"
window = lambda x: x + jax.lax.reduce_window(image, np.float32(0), jax.lax.add, *sizes)
jax.jit(window).lower(1.0).compile()
"""


@pytest.mark.nightly
def test_the_compilers_alarm_does_not_reach_the_user():
    environment = {
        name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"
    } | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # a cached program is not folded again
    for how, heard in (("alone", True), ("command", False)):
        done = subprocess.run(
            [sys.executable, "-c", SLOW, how], cwd=ROOT, env=environment, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("is taking > 1s" in done.stderr) == heard, done.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_that_a_command_loads(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert invoke("train", "--config=demo", "--print_config") == 0
    assert ("loading JAX …" in capsys.readouterr().err) == terminal
