"""The train step compiled for hardware that is not there, and what is said of it."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from finermoe_jax.analysis import aot, candidates, programs, report, topology
from finermoe_jax.analysis.hlo_costs import Costs
from finermoe_jax.config.flops import newton_schulz_flops, training_flops
from finermoe_jax.config.run import MeshConfig, OptimizerConfig
from finermoe_jax.errors import InputError
from tests.support import ROOT, load_preset
from tests.support.interpreters import interpreter


def _target(devices=8, memory=1e9):
    chip = topology.CHIPS["v5e"]._replace(memory=memory)
    return topology.Target("v5e:2x4", chip, "cpu", tuple(jax.devices()[:devices]), 1, 4)


def _config(**mesh):
    config = load_preset("demo")
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        data=dataclasses.replace(config.data, sequence_length=32, global_batch_size=8),
        train=dataclasses.replace(config.train, kernel="cpu"),
    )


@pytest.fixture(scope="module")
def compiled():
    target, config = _target(), _config(data=1, fsdp=2, expert=4)
    muon = dataclasses.replace(config.optimizer, name="muon")
    step = programs.abstract_program(dataclasses.replace(config, optimizer=muon), target)
    return step, target, aot.compile_program(step, target, say=lambda _: None)


@pytest.mark.nightly
def test_state_is_what_the_compiler_takes_as_arguments(compiled):
    step, _, figures = compiled
    batch = 4 * 33  # one row of each device
    assert figures["argument_bytes"] == step.state_bytes + batch
    assert figures["fits"] and figures["matmul_flops"] > 0
    length = step.config.data.sequence_length
    assert figures["model_flops_per_token"] == training_flops(step.model, length)
    assert {"all-gather", "all-to-all"} <= figures["sent_bytes"].keys()
    assert figures["newton_schulz_flops"] == newton_schulz_flops(step.model) > 0
    assert figures["bytes_by"]["Newton-Schulz: update"] > 0
    assert figures["bytes_by"]["optimizer: update"] > 0


@pytest.mark.nightly
def test_the_report_names_every_assumption(compiled):
    _, target, figures = compiled
    text = report.text(figures, target)
    for words in (
        "compiler estimate", "nothing measured", "197.0 TFLOP/s", "819 GB/s", "200 GB/s", "FITS",
        "MFU at most", "tokens/s/device", "Newton-Schulz (Muon)",
    ):  # fmt: skip
        assert words in text, words
    json.dumps(figures)


def test_the_roofline_is_the_slowest_resource():
    costs = Costs(98e12, 49e12, 50e12, 819e9 / 2, {"all-gather": 200e9 / 4}, {})
    bounds = report.roofline(costs, _target(), 8000, 197e9)["bounds"]
    assert bounds["overlapped"]["seconds"] == pytest.approx(1.0)
    assert bounds["serial"]["seconds"] == pytest.approx(1.25)
    assert bounds["overlapped"]["tokens_per_second_per_device"] == pytest.approx(1000)
    assert bounds["overlapped"]["mfu"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. "
         "Used 24.05G of 15.75G hbm. Exceeded hbm capacity by 8.30G.", 24.05),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
         "required for HLO temporaries (33.90G) exceeds available HBM (15.75G).", 33.90),
        ("RESOURCE_EXHAUSTED: CompileTimeHbmOom: Used 512.5M of 15.75G hbm.", 512.5 / 1024),
    ],
)  # fmt: skip
def test_the_size_of_what_did_not_fit_is_read(message, gibibytes):
    assert aot.out_of_memory(message) == pytest.approx(gibibytes * 2**30)


def test_another_failure_is_the_users_to_see():
    with pytest.raises(InputError, match="INTERNAL: Mosaic failed"):
        aot.out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel\n…")


def test_the_ladder_begins_with_what_leaves_the_arithmetic_alone():
    config = dataclasses.replace(
        _config(),
        train=dataclasses.replace(_config().train, loss_chunk_tokens=1024),
        data=dataclasses.replace(_config().data, global_batch_size=64, sequence_length=8192),
        optimizer=OptimizerConfig(),
    )
    found = list(candidates.combinations(config, _target()))
    names = [name for name, _ in found]
    alone = names[: next(i for i, name in enumerate(names) if " + " in name)]
    assert alone == list(candidates.LADDER)
    last = found[-1][1]
    assert dataclasses.astuple(last.mesh) == (1, 1, 8, 1)
    assert (last.train.grad_accumulation, last.train.remat) == (8, "full")
    assert (last.optimizer.name, last.train.param_dtype) == ("adafactor", "bfloat16")
    assert last.data.sequence_length == 2048


def test_what_does_not_fit_gets_a_change_that_may():
    config = _config(data=8)
    step = programs.abstract_program(config, _target())
    state = step.state_bytes + step.gradient_bytes
    said = []
    rows = candidates.search(
        config, _target(memory=0.4 * state), programs.abstract_program, None, said.append
    )
    first = next(row for row in rows if row["possible"])
    assert first["change"] == "mesh.data to mesh.expert and mesh.fsdp"
    assert first["floor_bytes"] < state / 4
    assert said[-1].endswith("starting with: mesh.data to mesh.expert and mesh.fsdp")
    candidates.search(config, _target(memory=1e3), programs.abstract_program, None, said.append)
    assert "larger slice" in said[-1]


@pytest.mark.nightly
def test_changes_are_compiled_until_one_fits():
    config = _config(data=8)
    whole = aot.compile_program(
        programs.abstract_program(config, _target()), _target(), say=lambda _: None
    )
    target = _target(memory=0.7 * whole["peak_bytes"])
    rows = candidates.search(
        config, target, programs.abstract_program, aot.compile_program, lambda _: None
    )
    assert rows[-1]["fits"] and not any(row.get("fits") for row in rows[:-1])
    assert rows[-1]["compiled_bytes"] <= target.chip.memory


@pytest.mark.parametrize(
    ("name", "slices", "words"),
    [
        ("v5:2x4", 1, "Did you mean"),
        ("v5e", 1, "must be CHIP:SHAPE"),
        ("", 1, "v5e:16x16"),
        ("h100:9", 1, "GPUs in one node"),
        ("h100:8", 2, "num_slices=2"),
        ("v5e:2x4", 0, "num_slices=0"),
    ],
)
def test_unknown_topologies_are_refused(name, slices, words):
    with pytest.raises(InputError, match=words):
        topology.describe(name, slices)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("v5e:2x4", "libtpu", "compile-tpu"), ("h100:8", "jax_cuda13_plugin", "compile-cuda")],
)
def test_a_missing_compiler_is_named_with_its_extra(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=extra):
        topology.describe(name)


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])
def test_a_description_leaves_no_environment_behind(name, monkeypatch):
    """TPU_WORKER_ID would make a TPU worker of this process, for whatever it does next."""
    seen = []

    def describes(*_, **__):
        seen.append(dict(os.environ))
        raise ValueError("no compiler")

    monkeypatch.setattr(topology, "require", lambda *_: None)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describes)
    before = dict(os.environ)
    with pytest.raises(InputError, match="no compiler"):
        topology.describe(name)
    assert set(seen[0]) > set(before)
    assert dict(os.environ) == before


# Overrides of the demo, and the program. The last one's experts are stored in pieces and gathered,
# which shows that copies are found.
IN_PLACE = [
    ("v5e:1x1", "train", ["--config.train.remat=full"]),
    ("v5e:1x1", "train", ["--config.train.remat=dots", "--config.train.param_dtype=float32"]),
    ("v5e:1x1", "train", ["--config.train.grad_accumulation=2"]),
    ("v5e:2x4", "train", ["--config.mesh.expert=8"]),
    ("v5e:2x4", "train", ["--config.mesh.data=2", "--config.mesh.expert=4"]),
    ("v5e:1x1", "train", ["--config.train.remat=full", "--config.moe.experts_across=2"]),
    (
        "v5e:2x4",
        "train",
        ["--config.mesh.fsdp=2", "--config.mesh.expert=4", "--config.moe.experts_across=2"],
    ),
    ("v5e:1x1", "eval", []),
    ("v5e:2x4", "eval", ["--config.mesh.expert=8"]),
    ("v5e:1x1", "prefill", []),
    ("v5e:1x1", "decode", []),
    ("v5e:2x4", "train", ["--config.mesh.fsdp=2", "--config.mesh.expert=4", "--bytes"]),
]
# Their experts are in host memory: known one layer early, chosen on demand, and multiplied there.
FROM_HOST = [
    ("v5e:1x1", "decode", ["--config.moe.route_ahead=1", "--experts=host"]),
    ("v5e:1x1", "decode", ["--experts=host"]),
    ("v5e:1x1", "decode", ["--experts=host_compute"]),
]
BEGIN = "begin of a program"
RUN_ALL = f"""
import json, sys
from finermoe_jax.cli.main import run
for command in json.loads(sys.argv[1]):
    print({BEGIN!r}, flush=True)
    try:
        run("aot", command)
    except SystemExit as end:
        assert not end.code, (end.code, command)
"""


@pytest.fixture(scope="module")
def for_tpus(tmp_path_factory):
    """Each program's text and figures, and what the command says of it.

    By a process of the environment that can compile for TPUs.
    """
    python = interpreter("TPU_TEST_PYTHON", "libtpu", "compile-tpu")
    place = tmp_path_factory.mktemp("tpu")
    commands = [
        ["--config=demo", f"--topology={topology}", f"--program={program}",
         "--config.train.compute_dtype=bfloat16", "--config.mesh.data=1",
         "--config.data.global_batch_size=16", "--config.data.sequence_length=256", *overrides,
         f"--output={place / f'{i}.json'}", f"--hlo={place / f'{i}.txt'}"]
        for i, (topology, program, overrides) in enumerate([*IN_PLACE, *FROM_HOST])
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [python, "-c", RUN_ALL, json.dumps(commands)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [
        ((place / f"{i}.txt").read_text(), json.loads((place / f"{i}.json").read_text()), said)
        for i, said in enumerate(done.stdout.split(BEGIN)[1:])
    ]


@pytest.mark.nightly
def test_experts_are_neither_copied_nor_sliced(for_tpus):
    """In the programs compiled for a TPU nothing but the kernels touches a layer's experts."""
    for case, (text, figures, _) in zip(IN_PLACE, for_tpus[: len(IN_PLACE)], strict=True):
        assert "tpu_custom_call" in text
        copies = [each for each in figures["expert_copies"] if not each.startswith("outside")]
        pooled = "--config.moe.experts_across=2" in case[2]
        if "--config.mesh.fsdp=2" in case[2]:
            note = "experts_across=2: each of a pool's 2 layers gathers its 64 experts over fsdp"
            assert (note in figures["notes"]) == pooled, figures["notes"]
            assert copies and figures["expert_bytes_in_loops"] > 0
            continue
        assert copies == [] and figures["expert_bytes_in_loops"] == 0, case
        if case[1] != "train":  # small stacks go to the chip and back for the update
            assert figures["expert_bytes"] == figures["expert_bound_bytes"], case


@pytest.mark.nightly
def test_experts_in_host_memory(for_tpus):
    ahead, on_demand, computed = (figures for _, figures, _ in for_tpus[len(IN_PLACE) :])
    layers, active, expert = 4, 2, 2 * (128 * 128 + 64 * 64)
    for figures in (ahead, on_demand):
        assert figures["host_moved_bytes"] == layers * active * expert
        assert figures["host_transfers"] == 2 * layers * active
    for figures in (ahead, on_demand, computed):
        assert figures["host_argument_bytes"] >= figures["host_bytes"] > 0
        assert figures["host_temporary_bytes"] == 0
    assert ahead["host_covered_bytes"] > on_demand["host_covered_bytes"] > 0
    # Only rows travel, and no experts pass through the device's memory.
    assert computed["kernel_flops"] == 0 and computed["hbm_bytes"] < on_demand["hbm_bytes"]


OPTIONS = """
from finermoe_jax.analysis import topology
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.layers import sharding
from finermoe_jax.training import step
eight = sharding.make_mesh(MeshConfig(expert=8), topology.describe("v5e:2x4").devices)
one = sharding.make_mesh(MeshConfig(), topology.describe("v5e:1x1").devices)
assert step.compiler_options(eight) == step.ON_TPU
assert step.compiler_options(one) is None
step.ON_TPU = {"xla_no_such_option": 1}
assert step.compiler_options(eight) is None
"""


@pytest.mark.nightly
def test_a_libtpu_gets_no_options_that_it_does_not_know():
    python = interpreter("TPU_TEST_PYTHON", "libtpu", "compile-tpu")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([python, "-c", OPTIONS], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.nightly
def test_a_tpu_slice(for_tpus):
    _, figures, said = for_tpus[len(IN_PLACE) - 1]
    assert "FITS" in said
    state = figures["parameter_bytes"] + figures["optimizer_bytes"]
    assert state < figures["argument_bytes"]  # tiny axes are padded to whole tiles
    assert figures["kernel_flops"] > 0 and figures["matmul_flops"] > 0
    assert sum(figures["bytes_by"].values()) == pytest.approx(figures["hbm_bytes"])
    assert figures["bytes_by"]["routed experts: backward"] > 0
    assert "HBM bytes by cause" in said and "norms and residual" in said
    assert {"all-gather", "ragged-all-to-all"} <= figures["sent_bytes"].keys()
    loops = [note for note in figures["counting_notes"] if "data-dependent trip count" in note]
    assert all("shard_map" in note for note in loops)  # the exchange's further rounds alone
