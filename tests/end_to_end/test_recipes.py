"""The Dockerfile and the recipes: their commands are ours, their files pass their own tools.

RECIPE_TOOLS names a folder with hadolint, shellcheck and kubernetes-validate (.ci/nightly). What is
neither there nor on PATH is skipped.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from finermoe_jax.analysis import topology
from tests.support import ROOT, command

RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir())
SCRIPTS = sorted([*ROOT.glob("recipes/*/*.sh"), *ROOT.glob("recipes/*/*.sbatch")])
JOBSET = ROOT / "recipes" / "qwen7b_v6e64" / "jobset.yaml"
# The JobSet API, v1alpha2: types of fields, or the values that they can have. Fields with ! are
# required. The Job in it has Kubernetes' own schema.
LABELS = {"annotations": dict, "labels": dict, "name": str, "namespace": str, "finalizers": [str]}
FAILURE_RULE = {
    "name!": str, "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [str], "targetReplicatedJobs": [str],
}  # fmt: skip
REPLICATED_JOB = {
    "name!": str, "replicas": int, "groupName": str,
    "template!": {"metadata": LABELS, "spec": dict},
    "dependsOn": [{"name!": str, "status!": {"Ready", "Complete"}}],
}  # fmt: skip
JOBSET_API = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"}, "kind!": {"JobSet"}, "metadata!": LABELS,
    "spec!": {
        "replicatedJobs": [REPLICATED_JOB],
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [FAILURE_RULE],
        },
        "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "startupPolicy": {"startupPolicyOrder!": {"AnyOrder", "InOrder"}},
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "coordinator": {"replicatedJob!": str, "jobIndex": int, "podIndex": int},
        "suspend": bool, "managedBy": str, "ttlSecondsAfterFinished": int,
    },
}  # fmt: skip
# What the compiler was asked, by recipe: topology and its devices.
TOPOLOGIES = {
    "qwen0p5b_v5e8": ("v5e:2x4", 8),
    "qwen0p5b_kaggle": ("v5e:2x4", 8),
    "qwen7b_v6e64": ("v6e:8x8", 64),
    "qwen1p5b_8xh100": ("h100:8", 8),
}


def tool(name):
    """The path of a linter; skips the test without it."""
    found = shutil.which(name, path=f"{os.environ.get('RECIPE_TOOLS', '')}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"needs {name}: name its folder in RECIPE_TOOLS, as .ci/nightly does")
    return found


def checked(*arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def commands(text, name):
    """Every `finermoe NAME …` of a script, a page or a notebook, as arguments."""
    joined = text.replace("\\\n", " ")
    return [
        [word for word in shlex.split(line, comments=True) if word.startswith("--")]
        for line in re.findall(rf"finermoe {name} (--.*)", joined)
    ]


def texts(recipe):
    """The texts of a recipe's files; a notebook's cells."""
    for path in sorted(recipe.iterdir()):
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        yield text


def config_of(arguments):
    """The config that flags of a command resolve to; variables of the script stay as they are."""
    kept = [flag for flag in arguments if not flag.startswith(("--workdir", "--topology"))]
    done = command("train", *kept, "--workdir=unused", "--print_config")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_command_that_trains_is_the_one_that_was_compiled(recipe):
    found = [each for text in texts(recipe) for each in commands(text, "train")]
    assert len(found) == 1
    config, (named, devices) = config_of(found[0]), TOPOLOGIES[recipe.name]
    mesh, data, train = config["mesh"], config["data"], config["train"]
    assert mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["tensor"] == devices
    assert data["global_batch_size"] % (devices * train["grad_accumulation"]) == 0
    assert topology.CHIPS[named.partition(":")[0]]
    for arguments in (each for text in texts(recipe) for each in commands(text, "aot")):
        assert f"--topology={named}" in arguments
        compiled = config_of(arguments)
        assert compiled["mesh"] == mesh and compiled["moe"] == config["moe"]
        assert compiled["optimizer"] == config["optimizer"]
        for name in ("sequence_length", "global_batch_size"):
            assert compiled["data"][name] == data[name]
        for name in ("grad_accumulation", "remat", "param_dtype", "exchange"):
            assert compiled["train"][name] == train[name]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_memory_is_that_of_the_page(recipe):
    """docs/scaling.md has a row with the recipe's peak, its topology and its limit."""
    readme = (recipe / "README.md").read_text()
    peak, limit = re.search(r"\| ([\d.]+) of ([\d.]+) GiB \|", readme).groups()
    rows = [
        line
        for line in (ROOT / "docs" / "scaling.md").read_text().splitlines()
        if line.startswith("|") and f"| {TOPOLOGIES[recipe.name][0]} |" in line
    ]
    assert any(f"| {peak} / {limit} |" in line for line in rows)
    assert re.search(r"\*\*(Compiled for [^*]*, )never run on", readme)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts(path):
    checked("bash", "-n", path)
    checked(tool("shellcheck"), path)


def faults(value, wanted, at="."):
    """Where a value differs from a schema such as JOBSET_API."""
    if isinstance(wanted, list) and isinstance(value, list):
        return [each for item in value for each in faults(item, wanted[0], f"{at}[]")]
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{at}: {value}"]
    if not isinstance(wanted, dict) or not isinstance(value, dict):
        kind = wanted if isinstance(wanted, type) else type(wanted)
        return [] if type(value) is kind else [f"{at}: {value}"]
    known = {name.rstrip("!"): each for name, each in wanted.items()}
    required = [name[:-1] for name in wanted if name.endswith("!")]
    found = [f"{at}: no {name}" for name in required if name not in value]
    for name, each in value.items():
        found += faults(each, known[name], f"{at}{name}.") if name in known else [f"{at}{name}"]
    return found


def test_the_schema_of_a_job_set_finds_faults():
    jobset = yaml.safe_load(JOBSET.read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    jobset["spec"] |= {"failurepolicy": {}, "successPolicy": {"operator": "Most"}, "suspend": 1}
    job["replicas"] = "1"
    del job["template"]
    assert faults(jobset, JOBSET_API) == [
        ".spec.replicatedJobs.[]: no template", ".spec.replicatedJobs.[]replicas.: 1",
        ".spec.failurepolicy", ".spec.successPolicy.operator.: Most", ".spec.suspend.: 1",
    ]  # fmt: skip


def test_the_job_set(tmp_path):
    jobset = yaml.safe_load(JOBSET.read_text())
    assert faults(jobset, JOBSET_API) == []
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    selector = spec["template"]["spec"]["nodeSelector"]
    sizes = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["completions"] == spec["parallelism"]
    assert chips * spec["parallelism"] == next(sizes) * next(sizes) == 64
    assert (ROOT / container["command"][-1]).is_file()  # below the image's folder
    # The Jobs that JobSet makes of it.
    kubernetes = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(kubernetes))
    checked(tool("kubernetes-validate"), "--strict", "--quiet", tmp_path / "job.yaml")


def test_the_notebook():
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
    for path in ROOT.glob("recipes/*/*.ipynb"):
        nbformat.validate(nbformat.read(path, as_version=4))
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") for cell in cells)


def test_the_dockerfile_installs_as_the_readme(tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    install = "pip install --no-cache-dir -c constraints.txt -e"
    assert (
        text.count(install) == 1
        and "pip install -c constraints.txt -e" in (ROOT / "README.md").read_text()
    )
    run = re.search(r"^RUN (.*?)\n\n", text, re.M | re.S)[1].replace("\\\n", " ")
    # The same lines, with a pip and a finermoe that only say what they are called with.
    for name in ("pip", "finermoe"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    for device, wanted in (("cpu", "."), ("tpu", ".[tpu]"), ("cuda", ".[cuda]"), ("gpu", None)):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
        done = subprocess.run(["sh", "-c", run], env=environment, capture_output=True, text=True)
        if wanted:
            assert done.stdout.splitlines() == [f"{install} {wanted}", "finermoe --help"]
        else:
            assert done.returncode and "DEVICE=gpu must be cpu, tpu or cuda" in done.stderr
    checked(tool("hadolint"), ROOT / "Dockerfile")


# Parses as xpk does; prints the hosts of the slice and the chips of each.
XPK = """
import argparse, sys
from xpk.core.system_characteristics import get_system_characteristics_by_device_type
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
found, _ = get_system_characteristics_by_device_type(parser.parse_args(sys.argv[1:]).tpu_type)
print(found.gke_accelerator, found.topology, found.vms_per_slice, found.chips_per_vm)
"""


def test_the_command_of_xpk(tmp_path):
    (tmp_path / "xpk").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "xpk").chmod(0o755)
    script = ROOT / "recipes" / "qwen7b_v6e64" / "xpk.sh"
    given = {"CLUSTER": "c", "IMAGE": "i", "STORAGE": "s"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bare = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert bare.returncode and "set CLUSTER to" in bare.stderr and not bare.stdout
    done = subprocess.run([script], env=environment | given, capture_output=True, text=True)
    arguments = done.stdout.splitlines()
    assert arguments[:2] == ["workload", "create"] and "--tpu-type=v6e-64" in arguments
    (run,) = (flag.split()[-1] for flag in arguments if flag.startswith("--command="))
    assert (ROOT / run).is_file()  # below the image's folder
    python = Path(tool("xpk")).resolve().parent / "python"
    parsed = subprocess.run([python, "-c", XPK, *arguments], capture_output=True, text=True)
    assert parsed.stdout.splitlines()[-1:] == ["tpu-v6e-slice 8x8 16 4"], parsed.stderr
