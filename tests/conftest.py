"""Strict tests: several CPU devices, no silent rank promotion, shapes in signatures checked."""

import os

_FLAGS = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
# Nine tenths of a test's time is compiling: programs this small need no optimised machine code.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + _FLAGS
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.devices()  # reads the flags
os.environ["XLA_FLAGS"] = _FLAGS  # for the processes that tests start: they are a user's

# Before anything of the package is imported: every annotated shape is checked at each call.
install_import_hook("finermoe_jax", "beartype.beartype").__enter__()

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def golden():
    """Vectors computed with the authors' published model; tests/data/golden/README.md."""
    from pathlib import Path

    return Path(__file__).parent / "data" / "golden"
