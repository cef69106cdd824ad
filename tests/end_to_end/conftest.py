"""Runs that several files damage copies of."""

import pytest

from finermoe_jax.training.run import train
from finermoe_jax.weights.integrity import saved_steps
from tests.support.training import silent, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir with steps 0, 2 and 4."""
    workdir = tmp_path_factory.mktemp("surviving") / "run"
    train(tiny_run(), workdir, say=silent)
    assert saved_steps(workdir / "checkpoints") == [0, 2, 4]
    return workdir
