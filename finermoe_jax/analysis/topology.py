"""Descriptions of absent hardware to compile for.

Names: `v5e:16x16`, `v5p:4x4x8`, `v6e:16x16`, `tpu7x:4x4x4` (chips; a tpu7x chip has two devices),
for one or several slices of that shape; `h100:8` (GPUs of one node).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from finermoe_jax.config.arguments import check_integer
from finermoe_jax.config.hardware import CHIPS, Chip
from finermoe_jax.errors import InputError, first_line, near_misses
from finermoe_jax.runtime.install import require

# libtpu reads these before it detects that no TPU is attached.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
GPUS_PER_NODE = 8
# Between slices, over the data centre's network. An assumption: vendors do not publish it.
HOST_BYTES_PER_SECOND = 25e9


class Target(NamedTuple):
    """The devices of one topology."""

    name: str
    chip: Chip
    platform: str  # "tpu" or "cuda"
    devices: tuple[jax.Device, ...]
    slices: int
    per_host: int

    @property
    def outside(self) -> float:
        """Bytes/s per device between slices."""
        return HOST_BYTES_PER_SECOND / self.per_host

    def slice_of(self, device: Any) -> int:
        """Returns the index of a device's slice."""
        return getattr(device, "slice_index", None) or 0


def describe(name: str, num_slices: int = 1) -> Target:
    """Returns the devices of a topology that need not be attached.

    Call it before JAX finds its devices: it restricts JAX to the CPU.

    Raises InputError for an unknown name or shape, or if the compiler is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or not shape:
        known = "v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:8"
        hint = "" if generation in CHIPS else f" {near_misses(generation, CHIPS)}"
        raise InputError(f"--topology={name!r} must be CHIP:SHAPE, such as {known}.{hint}")
    check_integer("--num_slices", num_slices, 1)
    jax.config.update("jax_platforms", "cpu")
    if generation == "h100":
        return _gpus(name, shape, num_slices)
    require("libtpu", "compile-tpu", f"--topology={name}")
    options: dict[str, Any] = {"num_slices": num_slices}
    if shape in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _defaults(_TPU_ENVIRONMENT):
            found = topologies.get_topology_desc(name, platform="tpu", **options)
    except Exception as error:  # the plugin's exceptions are not documented
        raise InputError(f"--topology={name}: TPU compiler: {first_line(error)}") from None
    devices = tuple(found.devices)
    hosts = len({(getattr(d, "slice_index", 0), getattr(d, "process_index", 0)) for d in devices})
    return Target(name, CHIPS[generation], "tpu", devices, num_slices, len(devices) // hosts)


def _gpus(name: str, count: str, num_slices: int) -> Target:
    if not count.isdigit() or not 1 <= int(count) <= GPUS_PER_NODE:
        raise InputError(
            f"--topology={name}: the shape must be a number of GPUs in one node, 1 to "
            f"{GPUS_PER_NODE}"
        )
    if num_slices > 1:
        raise InputError(f"--num_slices={num_slices} applies to TPUs only: omit it")
    require("jax_cuda13_plugin", "compile-cuda", f"--topology={name}")
    try:
        with _defaults({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=target_description("h100"),
                topology=f"1x1x{count}",  # NVLink domains x processes x GPUs
            )
    except Exception as error:
        raise InputError(f"--topology={name}: CUDA compiler: {first_line(error)}") from None
    return Target(name, CHIPS["h100"], "cuda", tuple(found.devices), 1, int(count))


@contextlib.contextmanager
def _defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets unset variables temporarily: jax.distributed would take this for a TPU worker."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def target_description(gpu: str) -> str:
    """Returns XLA's target description of a GPU, h100 or b200, as text."""
    return (Path(__file__).parent / "targets" / f"{gpu}.txtpb").read_text()
