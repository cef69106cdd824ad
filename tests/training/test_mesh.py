"""The mesh that a run chooses if its config leaves it open."""

import dataclasses
import json

import pytest

from finermoe_jax.analysis.params import run_model
from finermoe_jax.config.hardware import CHIPS, device_memory
from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.training import run as training
from finermoe_jax.training.mesh import choose_mesh, estimated_bytes, meshes
from tests.support.training import silent, tiny_run

GIB = 2**30


def paper_recipe(name, devices):
    """A preset with one sequence per device in each microbatch."""
    config = run_config(preset(name))
    train = dataclasses.replace(config.train, grad_accumulation=2048 // devices)
    return dataclasses.replace(config, train=train)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chip", "devices", "slices", "sizes", "verdict"),
    [
        ("qwen0p5b", "v6e", 8, 1, (1, 1, 8), ""),
        ("qwen0p5b", "v5e", 4, 1, (1, 1, 4), ""),
        ("qwen0p5b", "v5e", 2, 1, (1, 1, 2), "too much"),
        ("qwen0p5b", "v6e", 32, 1, (2, 1, 16), ""),  # 16 devices suffice for the experts
        ("qwen1p5b", "v5e", 8, 1, (1, 1, 8), "too much"),  # docs/scaling.md: by 0.15 GiB
        ("qwen1p5b", "v6e", 16, 1, (1, 1, 16), ""),
        ("qwen7b", "v5e", 256, 1, (4, 1, 64), ""),
        ("qwen7b", "v6e", 64, 1, (2, 1, 32), ""),
        ("qwen7b", "v6e", 128, 2, (4, 1, 32), ""),  # only data spans the slices
        ("qwen7b:c32a2", "v5e", 256, 1, (1, 8, 32), "too much"),  # 32 experts, then fsdp
        ("qwen7b:ct", "v5e", 64, 1, (2, 32, 1), ""),  # no experts
    ],
)
def test_the_least_sharded_mesh_that_fits(name, chip, devices, slices, sizes, verdict):
    config = paper_recipe(name, devices)
    memory = CHIPS[chip].memory
    mesh, message = choose_mesh(config, run_model(config), devices, memory, slices)
    assert dataclasses.astuple(mesh) == (*sizes, 1)
    assert ("too much" in message) == (verdict == "too much")
    assert "data={}, fsdp={}, expert={}".format(*sizes) in message
    assert f"of {memory / GIB:.1f} GiB" in message


# Peaks of docs/scaling.md, compiled.
@pytest.mark.parametrize(
    ("name", "sizes", "peak"),
    [
        ("qwen0p5b", (1, 1, 8), 6.03),
        ("qwen1p5b", (1, 1, 16), 9.25),
        ("qwen1p5b", (1, 2, 8), 9.58),
        ("qwen7b", (2, 1, 128), 10.25),
        ("qwen7b", (1, 1, 64), 13.46),
    ],
)
def test_the_estimate_is_a_close_upper_bound_of_compiled_peaks(name, sizes, peak):
    mesh = MeshConfig(*sizes)
    config = paper_recipe(name, sizes[0] * sizes[1] * sizes[2])
    assert 1 <= estimated_bytes(config, run_model(config), mesh) / GIB / peak < 1.25
    model = run_model(config)
    ahead = dataclasses.replace(model, moe=dataclasses.replace(model.moe, route_ahead=2))
    more = estimated_bytes(config, ahead, mesh) - estimated_bytes(config, model, mesh)
    assert more == 2 * model.num_hidden_layers * model.hidden_size * 8192 * 2  # bfloat16
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))
    assert estimated_bytes(kept, run_model(config), mesh) > 1.5 * peak * GIB


def test_what_is_given_or_unknown_stays():
    config = paper_recipe("qwen1p5b", 16)
    model = run_model(config)
    assert choose_mesh(config, model, 16, None) == (MeshConfig(), "")
    assert choose_mesh(config, model, 16, 0.0) == (MeshConfig(), "")
    assert choose_mesh(config, model, 1, 1e6) == (MeshConfig(), "")
    given = dataclasses.replace(config, mesh=MeshConfig(data=16))
    assert choose_mesh(given, model, 16, 1e6) == (MeshConfig(data=16), "")


def test_meshes_shard_experts_first_and_divide_the_devices():
    assert [dataclasses.astuple(mesh)[:3] for mesh in meshes(24, 2, 128)] == [
        (6, 1, 4), (2, 3, 4),
    ]  # fmt: skip
    assert [mesh.expert for mesh in meshes(512, 1, 128)] == [16, 32, 64, 128, 128, 128]
    assert list(meshes(7)) == [MeshConfig(7, 1, 1, 1), MeshConfig(1, 7, 1, 1)]


def test_memory_of_known_chips_and_of_devices_that_report_it():
    assert device_memory("TPU v6 lite", 7) == CHIPS["v6e"].memory
    assert device_memory("TPU v5", None) == CHIPS["v5p"].memory
    assert device_memory("NVIDIA Future", 5 * GIB + 9) == 5 * GIB
    assert device_memory("cpu", None) is None


def test_a_run_records_its_mesh_and_keeps_it(tmp_path, monkeypatch):
    config, said = tiny_run(), []

    def checked(config):
        return training.check_run(config, tmp_path, said.append)

    assert checked(config).config == config and said == []  # a CPU: memory unknown
    monkeypatch.setattr(training, "device_memory", lambda *_: 1e5)
    setup = checked(config)
    assert setup.config.mesh == MeshConfig(1, 8, 1, 1)
    assert dict(setup.mesh.shape)["fsdp"] == 8
    assert "chose the mesh data=1, fsdp=8, expert=1" in said[0]
    given = MeshConfig(2, 2, 2, 1)
    assert checked(dataclasses.replace(config, mesh=given)).config.mesh == given
    assert len(said) == 1

    def resumed(recorded):
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(recorded)))
        found = training._with_mesh(config, setup.initial.model.config, tmp_path, True, silent)
        return found.mesh

    assert resumed(config) == MeshConfig()  # data parallel, as all runs before
    assert resumed(dataclasses.replace(config, mesh=given)) == given
    other_count = MeshConfig(1, 1, 4, 1)
    assert resumed(dataclasses.replace(config, mesh=other_count)) == MeshConfig(1, 8, 1, 1)
