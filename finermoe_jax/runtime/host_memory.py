"""Allocator settings that speed up training on a CPU."""

import ctypes
import os
from importlib.util import find_spec

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_kept = False  # keep_freed has been applied
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin")


def keep_freed() -> bool:
    """Makes glibc keep freed memory for reuse. Call it before JAX finds its devices.

    By default glibc unmaps a step's large temporaries, and the kernel clears their pages again in
    the next step: up to a third of a step's time.

    A no-op if JAX may use an accelerator, if the C library is not glibc, or if GLIBC_TUNABLES is
    set. Returns True if the settings were applied.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(find_spec, _ACCELERATORS))
    library = ctypes.CDLL(None)
    if not on_cpu or "GLIBC_TUNABLES" in os.environ or not hasattr(library, "gnu_get_libc_version"):
        return False
    global _kept
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    _kept = all([library.mallopt(name, value) for name, value in settings])
    return _kept


def release_freed() -> None:
    """Returns to the system all memory that `keep_freed` has kept. A no-op without `keep_freed`.

    Kept memory is fragmented: a large buffer that does not fit it takes new memory.
    """
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)
