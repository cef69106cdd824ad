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


# The chip of a TPU's device_kind, by prefix. The longest matching prefix wins.
_TPUS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
# Published peak of one JAX device in dense bfloat16 products, FLOP/s, by prefix of its
# device_kind.
PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    **{kind: CHIPS[chip].flops for kind, chip in _TPUS.items()},
    "NVIDIA A100": 312e12,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": CHIPS["h100"].flops,
    "NVIDIA B200": 2250e12,
}
# Published HBM bandwidth of one JAX device, bytes/s, in the same way.
BANDWIDTHS: dict[str, float] = {
    **{kind: CHIPS[chip].bandwidth for kind, chip in _TPUS.items()},
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


def device_memory(kind: str, reported: int | None) -> float | None:
    """Returns the bytes of a device's memory; None if unknown, as on a CPU.

    For a known TPU, the figure in CHIPS, the same on every process. Otherwise `reported`, the bytes
    that the device reports, rounded down to whole GiB.
    """
    known = _of_kind({kind: CHIPS[chip].memory for kind, chip in _TPUS.items()}, kind)
    return known or (float(reported // _GIB * _GIB) if reported else None)


def _of_kind(table: Mapping[str, float], kind: str) -> float | None:
    found = [name for name in (*table, *_OTHERS) if kind.startswith(name)]
    return table.get(max(found, key=len)) if found else None
