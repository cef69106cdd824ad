"""Settings of the process's allocator for freed memory, for training on a CPU."""

import ctypes
import os
from importlib.util import find_spec

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin")


def keep_freed() -> bool:
    """Keeps freed memory for the next allocation; to be called before JAX has devices.

    XLA takes a step's temporaries from malloc and gives them back after it. glibc maps and unmaps
    anything that large, and the kernel then clears gigabytes of pages at every step: a third of a
    step's time. From one heap that is never trimmed they are found again as they were.

    Where JAX may find an accelerator, or the C library is another one, nothing is done; neither
    where GLIBC_TUNABLES says what is wanted. Returns whether freed memory is now kept.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(find_spec, _ACCELERATORS))
    library = ctypes.CDLL(None)
    if not on_cpu or "GLIBC_TUNABLES" in os.environ or not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([library.mallopt(name, value) for name, value in settings])
