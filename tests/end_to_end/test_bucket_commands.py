"""The commands of docs/howto/buckets.md, one after the other."""

import pytest

from finermoe_jax.runtime.files import find
from tests.support import buckets as support
from tests.support import command

TEXT = find("demo/LICENSE.pydoc.txt")
# A small run.
SIZES = [
    "--config.train.steps=2", "--config.data.global_batch_size=2", "--config.data.eval_windows=2",
    "--config.data.sequence_length=32",
]  # fmt: skip


@pytest.mark.slow  # the whole way of a model, through five commands
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
        run("convert", "--source=demo/model", f"--target={there}/start", "--config=demo")
        run("train", "--config=demo", f"--config.init_from={there}/start", *SIZES,
            f"--config.data.path={there}/tokens", f"--workdir={there}/run")  # fmt: skip
        assert "2" in (there / "run" / "checkpoints").names()
        out = run("convert", f"--source={there}/run", f"--target={there}/exported", "--to=hf",
                  "--verify")  # fmt: skip
        assert "bit for bit" in out
        said = [
            run("generate", f"--checkpoint={there}/{name}", "--prompt=Return", "--max_new_tokens=2")
            for name in ("run", "exported")
        ]
        assert said[0] == said[1] and said[0].startswith("Return")
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", "cache"}
