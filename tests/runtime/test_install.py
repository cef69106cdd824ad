"""Installs that are refused: versions outside the ranges, and extras that are missing."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finermoe_jax.errors import InputError
from finermoe_jax.runtime import install
from tests.support import ROOT

REQUIRES = [
    "jax>=0.11.2", "numpy>=2.1", "tqdm>=4.67", "datasets>=4.0; extra == 'eval'",
    "jax_cuda13>=3; extra == 'cuda'",
]  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """Versions of the installed packages; to be changed."""
    versions = {"jax": "0.12.0.1", "numpy": "2.1.0", "tqdm": "4.70.1", "datasets": "4.0"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_supported_versions_pass(installed):
    install.check_versions()
    installed["jax"] = "0.13.0.dev20270101+ab12"
    install.check_versions()
    del installed["datasets"]  # of an extra
    install.check_versions()


def test_every_version_outside_its_range_is_named(installed):
    installed["jax"] = "0.9.0"
    del installed["tqdm"]
    with pytest.raises(InputError) as refused:
        install.check_versions()
    assert str(refused.value).splitlines() == [
        "these versions are not supported:",
        "  jax 0.9.0, needed: jax>=0.11.2",
        "  tqdm is not installed, needed: tqdm>=4.67",
        "Run: pip install 'jax>=0.11.2' 'tqdm>=4.67'",
    ]


def test_a_clone_that_is_not_installed_is_not_checked(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    install.check_versions()


def test_a_package_of_an_extra(installed, monkeypatch, tmp_path):
    install.require("datasets", "eval", "--tasks")
    installed["datasets"] = "3.9"
    with pytest.raises(InputError, match=r"datasets 3\.9, needed: datasets>=4\.0"):
        install.require("datasets", "eval", "--tasks")
    (tmp_path / "no_such_package").mkdir()  # found by Python, and empty
    monkeypatch.syspath_prepend(tmp_path)
    for missing in ("no_such_package", "no_such_parent.module"):
        words = f"--flag needs {missing}.*pip install 'finermoe-jax\\[data\\]'"
        with pytest.raises(InputError, match=words):
            install.require(missing, "data", "--flag")


def test_a_command_of_an_unsupported_install_ends_with_one_message(tmp_path):
    """The package beside metadata that asks for a JAX of the future."""
    shutil.copytree(ROOT / "finermoe_jax", tmp_path / "finermoe_jax", symlinks=True)
    info = tmp_path / "finermoe_jax-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: finermoe-jax\nVersion: 9\nRequires-Dist: jax>=99\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "finermoe_jax", "params", "--help"],
        env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    found = re.escape(metadata.version("jax"))
    assert re.fullmatch(
        "error: these versions are not supported:\n"
        f"  jax {found}, needed: jax>=99\nRun: pip install 'jax>=99'\n",
        done.stderr,
    ), done.stderr


def test_constraints_name_every_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    exact = {
        canonicalize_name(line.name): next(iter(line.specifier)).version
        for line in map(
            Requirement, re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text(), re.M)
        )
    }
    extras = project["optional-dependencies"]
    for extra, listed in {"": project["dependencies"], **extras}.items():
        for requirement in map(Requirement, listed):
            if requirement.name == project["name"]:
                continue
            # This install lives beside others.
            assert [bound.operator for bound in requirement.specifier] == [">="], str(requirement)
            if extra not in ("tpu", "cuda", "compile-tpu"):  # jax[tpu] has an exact libtpu
                version = exact[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version), (str(requirement), version)
