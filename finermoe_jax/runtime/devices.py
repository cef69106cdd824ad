"""Keeps JAX off a TPU that is not there.

libtpu, installed in order to compile for TPUs, prints errors where JAX looks for TPU devices and
finds none.
"""

import importlib.util
import os
import sys
from pathlib import Path

# PCI: Google's vendor number, and the classes of its disks and network cards.
_GOOGLE, _OTHER_CLASSES = "0x1ae0", ("0x01", "0x02")
_GPU_FILES = ("nvidia0", "nvidiactl", "dxg", "kfd")


def skip_absent_tpu() -> None:
    """Sets JAX_PLATFORMS to "cpu" if libtpu is installed and the machine has no accelerator.

    Leaves JAX_PLATFORMS, JAX_FORCE_TPU_INIT and jax.config's jax_platforms alone if they are set.
    Has no effect once JAX has devices.
    """
    if os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ:
        return
    if importlib.util.find_spec("libtpu") is None or has_accelerator():
        return
    if "jax" in sys.modules:  # it has read the environment
        import jax

        if jax.config.jax_platforms:
            return
        jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"


def has_accelerator(root: Path = Path("/")) -> bool:
    """True if the machine may have a TPU or a GPU: its device files, and its PCI devices."""
    devices = root / "dev"
    if any((devices / name).exists() for name in _GPU_FILES):
        return True
    if any(devices.glob("accel*")) or any((devices / "vfio").glob("[0-9]*")):
        return True
    return any(map(_may_be_tpu, (root / "sys/bus/pci/devices").glob("*")))


def _may_be_tpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _GOOGLE and not kind.startswith(_OTHER_CLASSES)
