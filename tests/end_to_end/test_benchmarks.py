"""Every benchmark is imported; each runs in its smallest form, where that needs nothing special."""

import os
import subprocess
import sys

import pytest

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
    "input_pipeline": ["--tokens=2097152", "--batches=1"],
    "outside_step": ["--config={config}", "--steps=3"],
    "overlap": ["tests/recorded/tpu.hlo"],
    "studies.mutations": ["{out}/none.json", "--most=0"],
    "studies.python_text": ["{out}/text.txt", "0.1"],
    "train_step": ["--config={config}", "--repeats=1"],
}
ELSEWHERE = {
    "architectures": "needs SmolLM2's weights",
    "attention": "needs a compiler for TPUs",
    "convert": "writes gigabytes",
    "demo_against_dense": "trains for minutes",
    "function_preserving": "trains for minutes",
    "gpu_kernels": "needs a compiler for GPUs",
    "inference": "takes minutes at Qwen2.5-0.5B's width",
    "kill_campaign": "takes minutes",
    "pods": "needs a compiler for TPUs",
    "power_cuts": "needs root",
    "tpu_compiler": "is no command",
    "tpu_kernels": "needs a compiler for TPUs; .ci/run runs it",
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


@pytest.mark.slow
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
