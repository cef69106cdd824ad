"""libtpu beside a CPU: JAX is kept from looking for a TPU that is not there."""

import os
import subprocess
import sys

import pytest

from finermoe_jax.runtime.devices import has_accelerator
from tests.support import ROOT
from tests.support.interpreters import interpreter

SHOW = "import jax; print(jax.default_backend(), jax.config.jax_platforms)"


def show(first, python=sys.executable, **environment):
    """The platform that JAX runs on after `first`, and the stderr."""
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "PYTHONPATH")}
    done = subprocess.run(
        [python, "-c", f"{first}; {SHOW}"], env=clean | environment,
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


def device(root, vendor, kind):
    folder = root / "sys/bus/pci/devices" / f"0000:00:{vendor}{kind}"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "class").write_text(kind + "\n")


def test_signs_of_an_accelerator(tmp_path):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/vfio").touch()
    device(tmp_path, "0x8086", "0x060000")
    device(tmp_path, "0x1ae0", "0x010802")  # a disk of Google's cloud
    device(tmp_path, "0x1ae0", "0x020000")  # its network card
    assert not has_accelerator(tmp_path)
    device(tmp_path, "0x1ae0", "0x088000")
    assert has_accelerator(tmp_path)


@pytest.mark.parametrize("name", ["accel0", "vfio/3", "nvidiactl", "kfd"])
def test_device_files(tmp_path, name):
    (tmp_path / "dev" / name).parent.mkdir(parents=True)
    assert not has_accelerator(tmp_path)
    (tmp_path / "dev" / name).touch()
    assert has_accelerator(tmp_path)


@pytest.mark.nightly
@pytest.mark.skipif(has_accelerator(), reason="needs a machine that surely has no accelerator")
@pytest.mark.parametrize("first", ["import finermoe_jax", "import jax, finermoe_jax"])
def test_with_libtpu_and_without_a_tpu(tmp_path, first):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu/__init__.py").write_text("def get_library_path(): return 'no.so'\n")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    assert show(first, PYTHONPATH=path) == ("cpu cpu", "")
    assert show(first, PYTHONPATH=path, JAX_PLATFORMS="cpu,cpu")[0] == "cpu cpu,cpu"
    assert show(first, PYTHONPATH=str(ROOT))[0].endswith(" None")  # nothing to keep JAX from


@pytest.mark.nightly
@pytest.mark.skipif(has_accelerator(), reason="needs a machine that surely has no accelerator")
def test_with_the_real_libtpu():
    python = interpreter("TPU_TEST_PYTHON", "libtpu", "compile-tpu")
    assert show("import finermoe_jax", python, PYTHONPATH=str(ROOT)) == ("cpu cpu", "")
