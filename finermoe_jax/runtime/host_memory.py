"""Free host memory, and allocator settings that speed up training on a CPU."""

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path

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


def available(root: Path = Path("/")) -> int | None:
    """Returns the bytes of host memory that this process can still use; None if unknown.

    The smaller of the machine's free memory and what the container's limit (cgroup 2) leaves; file
    caches count as free. `root` is the directory of proc/ and sys/.
    """
    found = []
    if free := _number(root / "proc/meminfo", r"^MemAvailable:\s+(\d+) kB"):
        found.append(1024 * free)
    group = root / "sys/fs/cgroup"
    limit, used = (_number(group / f"memory.{n}", r"^(\d+)$") for n in ("max", "current"))
    if limit is not None and used is not None:
        cached = _number(group / "memory.stat", r"^file (\d+)$") or 0
        found.append(max(0, limit - used + cached))
    return min(found, default=None)


def _number(file: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:  # not Linux, or no limit
        return None
    return int(found[1]) if found else None
