"""Freed memory is found again."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, importlib.util, resource, sys
keep = sys.argv[1] != "leave"
spec = importlib.util.spec_from_file_location("host_memory", sys.argv[2])
host_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host_memory)
if keep and not host_memory.keep_freed():
    sys.exit("nothing was done")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size, faults = 64 << 20, []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    libc.free(place)
    if sys.argv[1] == "release":
        host_memory.release_freed()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator, which only Linux has")
def test_memory_that_was_freed_costs_nothing_anew():
    from finermoe_jax.runtime import host_memory

    def faults(mode):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        command = [sys.executable, "-c", _FAULTS, mode, host_memory.__file__]
        environment["JAX_PLATFORMS"] = "cpu"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return list(map(int, done.stdout.split()))

    first, *later = faults("keep")
    assert first > 1000 and max(later) < 100
    assert min(faults("leave")) > 1000
    assert min(faults("release")) > 1000


def test_what_the_environment_says_is_left_alone(monkeypatch):
    from finermoe_jax.runtime.host_memory import keep_freed

    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    assert not keep_freed()


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path):
    from finermoe_jax.runtime.host_memory import available

    assert available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    assert available(tmp_path) == 5000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "max"), ("current", "3000000"), ("stat", "anon 9\nfile 500000\n")):
        (group / f"memory.{name}").write_text(f"{text}\n")
    assert available(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("4000000\n")
    assert available(tmp_path) == 1_500_000
