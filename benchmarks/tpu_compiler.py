"""Compiles for a TPU without one: the chip's mesh, and the compiler's estimate of cycles.

Estimates rank variants; they are not measurements.
"""

import contextlib
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Variables that libtpu reads before it finds that no TPU is attached.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Peak(NamedTuple):
    """Published peaks of one core, and the clock whose cycles the estimates count."""

    clock: float  # Hz
    flops: float  # bf16, per second
    bandwidth: float  # HBM bytes per second

    def bound(self, flops: float, moved: float) -> float:
        """Lower bound in cycles, from MXU and HBM peaks."""
        return max(flops / self.flops, moved / self.bandwidth) * self.clock


# At these clocks, the estimate of a large product reaches the published FLOP/s.
PEAKS = {"v5e": Peak(1.5e9, 197e12, 819e9), "v6e": Peak(1.75e9, 918e12, 1640e9)}


def chip(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context that compiles for one TPU chip; yields the sharding of the arguments."""
    return one_device(platform="tpu", topology_name=TOPOLOGIES[name])


@contextlib.contextmanager
def one_device(**description: Any) -> Iterator[Any]:
    """`chip` for any device that JAX's get_topology_desc can describe."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(**description)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield NamedSharding(mesh, PartitionSpec())


def compile_for(
    function: Any,
    arguments: Sequence[Any],
    sharding: Any,
    row_major: bool = False,
    options: dict[str, Any] | None = None,
    platform: str = "tpu",
) -> Any:
    """Compiles jit(function) for the chip of the sharding.

    arguments: need only shape and dtype.
    row_major: stores all arrays in the order of their axes; otherwise XLA may add copies.
    options: XLA's compiler options, by name.
    """
    import jax
    from jax.experimental.layout import Format, Layout

    def place(a: Any) -> Any:
        return Format(Layout(tuple(range(a.ndim))), sharding) if row_major else sharding

    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(a)) for a in arguments]
    out = jax.tree.map(place, jax.eval_shape(function, *specs)) if row_major else None
    traced = jax.jit(function, out_shardings=out, compiler_options=options).trace(*specs)
    return traced.lower(lowering_platforms=(platform,)).compile()


def estimate(script: str, job: dict[str, Any], timeout: float = 900) -> dict[str, Any]:
    """Runs `script --job` in its own process and returns the JSON object that it prints.

    Adds "cycles", the estimates of its kernels by name, or "error" on failure. The simulator ends
    the process on a program that it cannot handle.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_static_llo_profile_to={directory}" if job.get("cycles") else ""
        try:
            run = subprocess.run(
                [sys.executable, script, "--job", json.dumps(job)],
                env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"longer than {timeout} s"}
        cycles = {}
        for path in glob.glob(f"{directory}/**/*.textproto", recursive=True):
            found = re.search(r"estimated_cycles: (\d+)", Path(path).read_text())
            if found:
                cycles[re.split(r"\.\d+_|_TPU", Path(path).name)[0]] = int(found.group(1))
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "rror" in line or "Check" in line]
            return {"error": " ".join(lines[-3:])[:400] or run.stderr[-400:], "cycles": cycles}
        return json.loads(run.stdout.splitlines()[-1]) | {"cycles": cycles}
