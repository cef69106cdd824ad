"""Strict tests: several CPU devices, no silent rank promotion, shapes in signatures checked."""

import atexit
import collections
import ctypes
import gc
import itertools
import os
import resource
import shutil
import tempfile
import typing

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
# Most of a test's time is compiling: programs this small need no optimised machine code. The
# processes that tests start inherit this; those of test_demo.py compile as a user's do.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers, and the processes that tests start, share what they compile, for this run of the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="finermoe-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest


def _of_shapes(annotation):
    parts = typing.get_args(annotation)
    return hasattr(annotation, "dim_str") or any(_of_shapes(part) for part in parts)


def _checked(typechecker, decorate=jaxtyping.jaxtyped):
    """`jaxtyped`, but for functions inside of others that speak of no shape.

    These are decorated again at each call of the outer one, which takes milliseconds.
    """

    def of(function):
        inside = "<locals>" in function.__qualname__
        if inside and not any(map(_of_shapes, function.__annotations__.values())):
            return function
        return decorate(function, typechecker=typechecker)

    return of


# Before anything of the package is imported: every annotated shape is checked at each call.
jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook("finermoe_jax", "beartype.beartype").__enter__()

# A failed assertion of a helper shows its values, too.
pytest.register_assert_rewrite("tests.support")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """A nightly test is a slow one, too.

    Files with many slow tests come first, so that no worker waits for another one's last.
    """
    for each in items:
        if each.get_closest_marker("nightly"):
            each.add_marker("slow")
    slow = collections.Counter(each.path for each in items if each.get_closest_marker("slow"))
    items.sort(key=lambda each: -slow[each.path])


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped_after_a_file():
    """They are most of a worker's memory."""
    yield
    _drop_compiled_programs()


@pytest.fixture(autouse=True)
def compiled_programs_are_dropped():
    """Every program that JAX keeps takes some maps of memory, and Linux gives a process 65530.

    Beyond them XLA cannot load another one, and the exception that says so can crash the process.
    """
    yield
    if _resident_bytes() > _limit or (next(_tests) % 5 == 0 and _maps() > 30000):
        _drop_compiled_programs()


_tests = itertools.count(1)
_limit = 1 << 30


def _drop_compiled_programs():
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    # What stays would otherwise have programs compiled anew for each test.
    global _limit
    _limit = max(1 << 30, _resident_bytes() + (1 << 28))


def _maps():
    try:
        with open("/proc/self/maps", "rb") as lines:
            return sum(1 for _ in lines)
    except OSError:  # not Linux
        return 0


def _resident_bytes():
    try:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


@pytest.fixture(scope="module")
def server():
    """The URL of a Cloud Storage server on loopback, which this process uses."""
    from tests.support.buckets import emulated

    with emulated() as url:
        yield url
