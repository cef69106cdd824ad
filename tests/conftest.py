"""Strict tests: several CPU devices, no silent rank promotion, shapes in signatures checked."""

import atexit
import itertools
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
from jaxtyping import install_import_hook

jax.devices()  # reads the flags
# The processes that tests start are a user's.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(
    " --xla_backend_optimization_level=0"
)

# Before anything of the package is imported: every annotated shape is checked at each call.
install_import_hook("finermoe_jax", "beartype.beartype").__enter__()

# A failed assertion of a helper shows its values, too.
pytest.register_assert_rewrite("tests.support")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def compiled_programs_are_dropped():
    """Every program that JAX keeps takes some maps of memory, and Linux gives a process 65530.

    Beyond them XLA cannot load another one, and the exception that says so can crash the process.
    """
    yield
    if next(_tests) % 5 == 0 and _maps() > 30000:
        jax.clear_caches()


_tests = itertools.count(1)


def _maps():
    try:
        with open("/proc/self/maps", "rb") as lines:
            return sum(1 for _ in lines)
    except OSError:  # not Linux
        return 0
