"""Peak figures of accelerators, as their makers publish them."""

from collections.abc import Mapping
from typing import NamedTuple

_GIB = 2**30


_GBIT = 1e9 / 8


class Chip(NamedTuple):
    """One device's figures. Peaks are the vendors' published ones, divided by devices per chip."""

    memory: float  # bytes that a program may use
    memory_note: str
    flops: float  # bf16 per second
    bandwidth: float  # HBM bytes per second
    wire: float  # bytes per second out of a device over all links inside a slice or node


def _tpu(memory: float, teraflops: float, gigabytes: float, gigabits: float, devices: int) -> Chip:
    return Chip(
        memory * _GIB,
        "what the TPU compiler grants",
        teraflops * 1e12 / devices,
        gigabytes * 1e9 / devices,
        gigabits * _GBIT / devices,
    )


# Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: bf16 FLOP/s, HBM and ICI bandwidth per
# chip); NVIDIA's H100 SXM data sheet, NVLink's 900 GB/s being both directions together. Memory of
# a TPU is the limit in libtpu's own out-of-memory error.
CHIPS: Mapping[str, Chip] = {
    "v5e": _tpu(15.75, 197.0, 819.0, 1600.0, 1),
    "v5p": _tpu(95.73, 459.0, 2765.0, 4800.0, 1),
    "v6e": _tpu(31.24, 918.0, 1640.0, 3584.0, 1),
    "tpu7x": _tpu(94.74, 2307.0, 7380.0, 9600.0, 2),
    "h100": Chip(
        0.9 * 84942979072,
        "0.9 of its 79.1 GiB: needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
        989e12,
        3350e9,
        450e9,
    ),
}


# FLOP/s of one JAX device in dense bfloat16 products, by the beginning of its device_kind: the
# vendors' published peaks, as topology.CHIPS. The longest beginning that fits counts.
PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "TPU v7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": CHIPS["h100"].flops,
    "NVIDIA B200": 2250e12,
}


# Other chips whose names begin alike.
_OTHERS = ("TPU v4 lite", "TPU v4i")


def peak_flops(kind: str) -> float | None:
    """A device kind's peak in bfloat16, FLOP/s; None where it is not known, as of any CPU."""
    found = [name for name in (*PEAKS, *_OTHERS) if kind.startswith(name)]
    return PEAKS.get(max(found, key=len)) if found else None
