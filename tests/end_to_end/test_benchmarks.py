"""Every benchmark is imported; each runs in its smallest form, where that needs nothing special."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

import finermoe_jax as fm
from benchmarks.kernels import gpu_first_hour, gpu_shapes
from benchmarks.studies import low_rank, mutations, pool_order
from finermoe_jax.model.decoder import with_params
from tests.support import ROOT

CONFIG = """
from finermoe_jax import preset

def get_config():
    config = preset("demo")
    config.prompts = ()
    config.dense = dict(
        vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=10000.0,
        rms_norm_eps=1e-6, max_position_embeddings=1024, tie_word_embeddings=True,
    )
    config.data.update(sequence_length=16, global_batch_size=2, eval_windows=2)
    return config
"""
SMALLEST = {
    "cpu_kernels": ["--repeats=1", "--rows=128"],
    "exchange": ["--tokens=16", "--sizes=0.5B"],
    "kernels.gpu_first_hour": ["--smallest", "--minutes=30", "--output={out}/gpu.json"],
    "host_experts": ["--shape=tiny", "--work={out}/host", "--tokens=2"],
    "input_pipeline": ["--tokens=2097152", "--batches=1"],
    "outside_step": ["--config={config}", "--steps=3"],
    "overlap": ["tests/recorded/tpu.hlo"],
    "studies.mutations": ["{out}/none.json", "--most=0"],
    "studies.step_times": ["{out}/seconds.json", "--config={config}", "--rounds=1"],
    "studies.python_text": ["{out}/text.txt", "--megabytes=0.1"],
    "train_step": ["--config={config}", "--repeats=1"],
}
ELSEWHERE = {
    "architectures": "needs SmolLM2's weights",
    "attention": "needs a compiler for TPUs",
    "bucket_kills": "needs a bucket; tests/training/test_storage.py runs it",
    "convert": "writes gigabytes",
    "demo_against_dense": "trains for minutes",
    "function_preserving": "trains for minutes",
    "host_overlap": "needs a compiler for TPUs",
    "inference": "takes minutes at Qwen2.5-0.5B's width",
    "kernels.gpu_compiled": "needs a compiler for GPUs",
    "kernels.gpu_jobs": "is no command",
    "kernels.gpu_shapes": "is no command",
    "kill_campaign": "takes minutes",
    "pods": "needs a compiler for TPUs",
    "pools": "compiles for minutes",
    "power_cuts": "needs root",
    "studies.record": "needs a finished sweep; tests/training/test_sweep.py records one",
    "studies.ahead": "needs a FineRMoE; tests/model/test_route_ahead.py runs it",
    "studies.pool_order": "needs a run with pools; a test below reads one",
    "studies.low_rank": "needs a trained FineRMoE; a test below measures one",
    "tpu_compiler": "is no command",
    "tpu_kernels": "needs a compiler for TPUs; .ci/nightly runs it",
}
RUN = """
import importlib, runpy, sys
for name, arguments in {forms!r}.items():
    importlib.import_module(f"benchmarks.{{name}}")
    if arguments is not None:
        print(f"== {{name}}", flush=True)
        sys.argv = [name, *arguments]
        try:
            runpy.run_module(f"benchmarks.{{name}}", run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, end.code)
"""


def test_every_mutation_fits_the_code():
    mutations.refuse_stale()


@pytest.mark.nightly
def test_every_benchmark_in_its_smallest_form(tmp_path):
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    names = [".".join(f.relative_to(ROOT / "benchmarks").with_suffix("").parts) for f in files]
    assert sorted(names) == sorted([*SMALLEST, *ELSEWHERE])
    (tmp_path / "tiny.py").write_text(CONFIG)
    places = {"config": tmp_path / "tiny.py", "out": tmp_path}
    forms = dict.fromkeys(names)
    forms |= {n: [text.format(**places) for text in given] for n, given in SMALLEST.items()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", RUN.format(forms=forms)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Nothing is measured: the compiler need not optimise.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    parts = done.stdout.split("== ")[1:]
    assert [part.split()[0] for part in parts] == [name for name in names if name in SMALLEST]
    assert [part for part in parts if len(part.splitlines()) < 2] == []
    gpu = json.loads((tmp_path / "gpu.json").read_text())
    assert {"device", "jax", "jaxlib", "peak_flops"} < set(gpu["device"])
    jobs = {name: figures for name, figures in gpu.items() if name != "device"}
    assert all({"errors", "samples"} & set(figures) for figures in jobs.values()), jobs


# A process of benchmarks/kernels/gpu_first_hour.py's jobs.
CHILD = """
import json, sys, time
for name in sys.argv[1:]:
    if name == "crashes":
        sys.exit("illegal address")
    if name == "hangs":
        time.sleep(60)
    figures = {"seconds": 0.0}
    if name == "raises":
        figures["error"] = broken = "CUDA error"
    elif "broken" in globals():
        sys.exit("a process must not go on after a CUDA error")
    print("a library's line", flush=True)
    print("first-hour-result " + json.dumps([name, figures]), flush=True)
"""


def test_jobs_after_an_error_a_crash_and_a_hang_are_still_run():
    command = [sys.executable, "-c", CHILD]
    planned = [
        ("check a", "good", 1),
        ("crashes", "bad", 1),
        ("needs bad", "bad", 1),
        ("check b", "good", 1),
        ("raises", "good", 1),
        ("hangs", "", 0.02),
        ("check c", "good", 1),
    ]
    results = gpu_first_hour.Supervisor(command, time.monotonic() + 60).run(planned)
    done = {"seconds": 0.0}
    assert results == {
        "check a": done,
        "crashes": {"error": "the process ended: illegal address"},
        "needs bad": {"omitted": "bad crashed or hung before"},
        "check b": done,
        "raises": done | {"error": "CUDA error"},
        "hangs": {"error": "no result after 0.02 minutes"},
        "check c": done,
    }
    late = gpu_first_hour.Supervisor(command, time.monotonic()).run(planned[:1])
    assert late == {"check a": {"omitted": "no time left"}}


def test_a_wrong_kernel_and_a_failed_job_have_their_own_exit_codes():
    right, wrong = ({"wrong": names} for names in ([], ["y"]))
    codes = [
        gpu_first_hour.exit_code({"device": {}, "check a": check, "time b": timing})
        for check in (right, wrong, {"error": "it hung"})
        for timing in ({}, {"error": "out of memory"})
    ]
    assert codes == [0, 2, 1, 1, 1, 1]


def test_nan_is_wrong():
    from benchmarks.kernels import gpu_jobs

    one, nan = {"y": np.ones(3)}, {"y": np.array([1.0, np.nan, 1.0])}
    assert gpu_jobs.compared(one, one, "bfloat16")["wrong"] == []
    assert gpu_jobs.compared(nan, one, "bfloat16", "even: ")["wrong"] == ["even: y"]


@pytest.mark.parametrize(
    ("platform", "capability", "message"),
    [
        ("cpu", "", "no GPU: JAX finds 'this' (platform cpu)"),
        ("gpu", "8.0", "compute capability 8.0, but the kernels need 9.0"),
        ("gpu", "9.0", ""),
    ],
)
def test_the_device_of_the_first_hour(platform, capability, message):
    found = {"platform": platform, "device": "this", "compute_capability": capability}
    assert message in gpu_first_hour.not_hopper(found)
    assert bool(message) == bool(gpu_first_hour.not_hopper(found))


def test_bytes_of_the_gpu_kernels_by_cause():
    """In megabytes, worked out by hand for 0.5B with 512 rows per expert."""
    shape = gpu_shapes.SIZES["0.5B"]
    rows, cotangent, weights = 65536 * 896 * 2, 65536 * 448 * 2, 128 * 152 * (2 * 896 + 448) * 2
    assert gpu_shapes.bound(shape, 512) == {
        "forward": rows + weights + cotangent,
        "backward": 2 * (rows + weights) + cotangent,
    }
    padded = 65536 * 192 * 2
    assert list(gpu_shapes.excess(shape, 512).values()) == [
        rows + cotangent,
        3 * padded,
        3 * padded,
        0,
    ]
    large = gpu_shapes.SIZES["7B"]
    assert list(gpu_shapes.excess(large, 16).values())[2:] == [
        5 * 2048 * 640 * 2,
        128 * 2 * 592 * 3584 * 2,
    ]


@pytest.mark.slow
def test_differences_of_known_rank():
    """Copies differ by matrices of rank 2: two singular values hold all, one does not."""
    config = fm.ModelConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4, rms_norm_eps=1e-6,
        max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.5,
        moe=fm.MoEConfig(2, 2, 1, 2, 1),
    )  # fmt: skip
    model = fm.Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    [block] = low_rank.blocks(params)
    rng = np.random.default_rng(0)
    for name, parts in (("gate_up", 2), ("down", 1)):
        slots = 2, 2, 2, 2  # layers, slots, copies, slices
        rows, columns = block[name].shape[-2:]
        shape = (*slots, parts, rows // parts)
        values = rng.normal(size=(2, 2, 1, 2, parts, rows // parts, columns))
        left, right = rng.normal(size=(*shape, 2)), rng.normal(size=(*slots, parts, 2, columns))
        # The second copy has the opposite difference: the mean stays, and so does the rank.
        left[:, :, 1], right[:, :, 1] = -left[:, :, 0], right[:, :, 0]
        block[name] = np.asarray(values + left @ right, np.float32).reshape(block[name].shape)
    model = with_params(config, params, dtype="float32")
    found = low_rank.measure(model, rng.integers(0, 32, (3, 16)), (0, 1, 2))
    assert found["2"]["loss"] == pytest.approx(found["all"]["loss"], abs=1e-5)
    assert abs(found["0"]["loss"] - found["all"]["loss"]) > 1e-3
    for name in low_rank.MATRICES:
        assert found["0"][name] == 0 and found["2"][name] == pytest.approx(1)
        assert 0.5 < found["1"][name] < 0.99


def test_devices_share_the_rows_of_a_pool(tmp_path, monkeypatch, capsys):
    """Layers that use only their own experts, and experts that all are used alike."""
    own = np.array([[4, 0, 4, 0, 4, 0, 4, 0], [0, 6, 0, 2, 0, 2, 0, 6]])
    assert pool_order.fullest(own, 2, 2) == (1.0, 2.0)
    assert pool_order.fullest(own, 2, 4) == ((1.0 + 1.5) / 2, 2.0)
    config = fm.preset("demo:rex2")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    record = {"step": 1, "tokens": [[3] * 64] * 4, "foreign": [0.5] * 4}
    (tmp_path / "expert_load.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(sys, "argv", ["pool_order", str(tmp_path), "--devices=4"])
    pool_order.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| 1 | 0.50 | 1.00 | 1.00 |"
