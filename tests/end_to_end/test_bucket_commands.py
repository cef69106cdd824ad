"""The commands of docs/howto/buckets.md, one after the other."""

import pytest

from finermoe_jax.runtime.files import find
from tests.support import buckets as support
from tests.support import command

TEXT = find("demo/LICENSE.pydoc.txt")
# A small run of the dense model, which compiles soonest.
SIZES = [
    "--config.train.steps=2", "--config.data.global_batch_size=8", "--config.data.eval_windows=8",
    "--config.data.sequence_length=32", "--config.prompts=()",
]  # fmt: skip


@pytest.mark.nightly  # the whole way of a model, through four commands
def test_a_model_goes_its_way_through_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *flags):
        result = command(name, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    with support.emulated():
        there = support.new_bucket()
        run("prepare", f"--source={TEXT}", "--target=tokens", "--tokenizer=demo/model",
            "--processes=1", f"--upload={there}/tokens")  # fmt: skip
        run("convert", "--source=demo/model", f"--target={there}/start", "--config=demo:ct")
        run("train", "--config=demo:ct", f"--config.init_from={there}/start", *SIZES,
            f"--config.data.path={there}/tokens", f"--workdir={there}/run")  # fmt: skip
        assert "2" in (there / "run" / "checkpoints").names()
        out = run("convert", f"--source={there}/run", f"--target={there}/exported", "--to=hf",
                  "--verify")  # fmt: skip
        assert "bit for bit" in out
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", "cache"}
