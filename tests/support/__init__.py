"""Helpers that several tests use."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finermoe_jax.cli.main import run
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.parse import run_config

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
# Recorded results of other implementations, with the small models that they are of.
DATA = ROOT / "tests" / "recorded"
GOLDEN = DATA / "golden"  # of the authors' published model; its README.md says how

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4, rms_norm_eps=1e-6,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


def load_preset(name, *variant):
    """The checked config of configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_config(module.get_config(*variant).to_dict())


def invoke(name, *arguments):
    """Runs `finermoe NAME …` in this process; returns the exit code."""
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv])  # the command changes it
        try:
            run(name, [str(each) for each in arguments])
        except SystemExit as end:
            return end.code
        finally:
            os.environ.clear()
            os.environ.update(environment)
    return 0


def command(name, *arguments, cwd=None):
    """`invoke`, in a directory, with what it wrote: as subprocess.run would return it."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or os.getcwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = invoke(name, *arguments)
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


def assert_refused(result, *words):
    """Exit code 2 and one message, on stderr alone."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert [word for word in words if word not in result.stderr] == [], result.stderr
