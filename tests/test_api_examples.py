"""Every public name has an example in its docstring, and the examples run."""

import doctest
import inspect
from pathlib import Path

import pytest

import finermoe_jax
from pallas_kernels import expert_ffn, grouped_matmul

PUBLIC = {name: getattr(finermoe_jax, name) for name in finermoe_jax.__all__} | {
    "expert_ffn": expert_ffn.expert_ffn,
    "grouped_matmul": grouped_matmul.grouped_matmul,
    "weight_gradient": grouped_matmul.weight_gradient,
}
REPOSITORY = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "finermoe_jax").mkdir()
    (tmp_path / "finermoe_jax/demo").symlink_to(REPOSITORY / "finermoe_jax/demo")
    monkeypatch.chdir(tmp_path)
    thing = PUBLIC[name]
    parser = doctest.DocTestParser()
    example = parser.get_doctest(inspect.getdoc(thing), {}, name, inspect.getfile(thing), 0)
    assert example.examples, f"{name} has no example"
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert not found.failed, capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isroutine(PUBLIC[name])])
def test_docstring_lists_every_argument(name):
    arguments = inspect.getdoc(PUBLIC[name])
    assert all(f"\n  {each}: " in arguments for each in inspect.signature(PUBLIC[name]).parameters)
