"""Strict tests: several CPU devices, no silent rank promotion, shapes in signatures checked."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
# Most of a test's time is compiling: programs this small need no optimised machine code.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers, and the processes that tests start, share what they compile, for this run of the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="finermoe-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from jax._src import compilation_cache
from jaxtyping import install_import_hook

jax.devices()  # reads the flags
# The processes that tests start are a user's.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(
    " --xla_backend_optimization_level=0"
)

# XLA sometimes crashes (JAX 0.12.0.1) where it stores the prefill as machine code that is not
# optimised, or reads it back: generation's programs stay out of the tests' cache.
_stored, _put = compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time


def _uncached(name):
    return name.startswith(("jit__prefill", "jit__decode"))


def _get_but_generation(key, *rest, **more):
    return (None, None) if _uncached(key) else _stored(key, *rest, **more)


def _put_but_generation(key, name, *rest, **more):
    if not _uncached(name):
        _put(key, name, *rest, **more)


compilation_cache.get_executable_and_time = _get_but_generation
compilation_cache.put_executable_and_time = _put_but_generation

# Before anything of the package is imported: every annotated shape is checked at each call.
install_import_hook("finermoe_jax", "beartype.beartype").__enter__()

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def golden():
    """Vectors computed with the authors' published model; tests/data/golden/README.md."""
    from pathlib import Path

    return Path(__file__).parent / "data" / "golden"
