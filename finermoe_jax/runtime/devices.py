"""Keeps JAX off a TPU that is not there.

libtpu, installed in order to compile for TPUs, prints errors where JAX looks for TPU devices and
finds none.
"""

import importlib.util
import os
import sys

# Of PCI: Google's vendor number, and the classes of its disks and network cards.
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


def has_accelerator(root: str | os.PathLike = "/") -> bool:
    """True if the machine may have a TPU or a GPU: its device files, and its PCI devices."""
    files = _names(root, "dev")
    if any(name in _GPU_FILES for name in files):
        return True
    if any(name.startswith("accel") and name[5:].isdigit() for name in files):
        return True
    if any(name.isdigit() for name in _names(root, "dev/vfio")):
        return True
    pci = "sys/bus/pci/devices"
    return any(_may_be_tpu(os.path.join(root, pci, name)) for name in _names(root, pci))


def _names(root: str | os.PathLike, folder: str) -> list[str]:
    try:
        return os.listdir(os.path.join(root, folder))
    except OSError:
        return []


def _may_be_tpu(device: str) -> bool:
    try:
        with (
            open(os.path.join(device, "vendor")) as vendor,
            open(os.path.join(device, "class")) as kind,
        ):
            return vendor.read().strip() == _GOOGLE and not kind.read().startswith(_OTHER_CLASSES)
    except OSError:
        return False
