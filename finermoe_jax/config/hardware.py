"""Vendors' published peak figures of accelerators."""

from collections.abc import Mapping
from typing import NamedTuple

_GIB = 2**30
_GBIT = 1e9 / 8


class Chip(NamedTuple):
    """Figures of one JAX device: the chip's published peaks divided by its devices."""

    memory: float  # bytes available to a program
    memory_note: str
    flops: float  # bfloat16 FLOP/s
    bandwidth: float  # HBM bytes/s
    wire: float  # bytes/s that a device sends over all its links inside a slice or node


def _tpu(memory: float, teraflops: float, gigabytes: float, gigabits: float, devices: int) -> Chip:
    return Chip(
        memory * _GIB,
        "the TPU compiler's limit",
        teraflops * 1e12 / devices,
        gigabytes * 1e9 / devices,
        gigabits * _GBIT / devices,
    )


# Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: bf16 FLOP/s, HBM and ICI bandwidth per
# chip); NVIDIA's H100 SXM data sheet (NVLink: 900 GB/s for both directions together). A TPU's
# memory is the limit in libtpu's out-of-memory error.
CHIPS: Mapping[str, Chip] = {
    "v5e": _tpu(15.75, 197.0, 819.0, 1600.0, 1),
    "v5p": _tpu(95.73, 459.0, 2765.0, 4800.0, 1),
    "v6e": _tpu(31.24, 918.0, 1640.0, 3584.0, 1),
    "tpu7x": _tpu(94.74, 2307.0, 7380.0, 9600.0, 2),
    "h100": Chip(
        0.9 * 84942979072,
        "0.9 of 79.1 GiB: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
        989e12,
        3350e9,
        450e9,
    ),
}


# Published peak of one JAX device in dense bfloat16 products, FLOP/s, by prefix of its
# device_kind. The longest matching prefix wins.
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
# Published HBM bandwidth of one JAX device, bytes/s, in the same way.
BANDWIDTHS: dict[str, float] = {
    "TPU v5 lite": CHIPS["v5e"].bandwidth,
    "TPU v5e": CHIPS["v5e"].bandwidth,
    "TPU v5": CHIPS["v5p"].bandwidth,
    "TPU v5p": CHIPS["v5p"].bandwidth,
    "TPU v6 lite": CHIPS["v6e"].bandwidth,
    "TPU v6e": CHIPS["v6e"].bandwidth,
    "TPU7x": CHIPS["tpu7x"].bandwidth,
    "TPU v7x": CHIPS["tpu7x"].bandwidth,
    "NVIDIA H100": CHIPS["h100"].bandwidth,
    "NVIDIA H100 PCIe": 2000e9,
    "NVIDIA H100 NVL": 3900e9,
    "NVIDIA H200": 4800e9,
    "NVIDIA B200": 8000e9,
}
# Chips without known figures that share a prefix with one above.
_OTHERS = ("TPU v4 lite", "TPU v4i")


def peak_flops(kind: str) -> float | None:
    """Returns a device kind's peak in bfloat16, FLOP/s; None if unknown, as for any CPU."""
    return _of_kind(PEAKS, kind)


def peak_bandwidth(kind: str) -> float | None:
    """Returns a device kind's HBM bandwidth, bytes/s; None if unknown, as for any CPU."""
    return _of_kind(BANDWIDTHS, kind)


def _of_kind(table: Mapping[str, float], kind: str) -> float | None:
    found = [name for name in (*table, *_OTHERS) if kind.startswith(name)]
    return table.get(max(found, key=len)) if found else None
