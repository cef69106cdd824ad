"""The Mosaic GPU kernels, interpreted, against float64 NumPy; and compiled for Hopper without one.

The interpreter knows neither alignment nor registers: what TMA and wgmma demand is tested on the
tables the kernels read and by the compiler.
"""

import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn import mosaic_gpu as ffn
from pallas_kernels.grouped_matmul import mosaic_gpu as matmul
from tests.support import ROOT
from tests.support.interpreters import interpreter
from tests.support.kernels import ARRAYS, GROUPS, TOLERANCE, assert_close, make, truth

RACES = plgpu.InterpretGPUParams(detect_races=True)


@functools.partial(jax.jit, static_argnames="interpret")
def forward(arguments, interpret=True):
    return expert_ffn(**arguments, implementation="gpu", interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def compute(arguments, cotangent, interpret=True):
    """Output and gradients."""
    sizes = arguments["group_sizes"]

    def run(rows, gate_up, down, row_weights):
        return expert_ffn(rows, gate_up, down, sizes, row_weights, "gpu", interpret)

    y, pull = jax.vjp(run, *(arguments[name] for name in ARRAYS))
    return {"y": y} | dict(zip(ARRAYS, pull(cotangent), strict=True))


# --- expert_ffn -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("empty groups", marks=pytest.mark.nightly),
        pytest.param("all rows on the last", marks=pytest.mark.nightly),
        "ragged",
        "one row",
        "no rows",
        pytest.param("fewer rows than experts", marks=pytest.mark.nightly),
        pytest.param("width one", marks=pytest.mark.nightly),
        pytest.param("not a multiple of any block", marks=pytest.mark.nightly),
    ],
)
def test_output(name):
    arguments, cotangent = make(name, jnp.bfloat16)
    wanted = truth(arguments, cotangent)["y"]
    assert_close({"y": forward(arguments)}, {"y": wanted}, TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("one row", jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param("ragged", jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param("odd widths", jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param("not a multiple of any block", jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param("all rows on one in the middle", jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param("odd widths", jnp.float32, marks=pytest.mark.nightly),
        pytest.param("empty groups", jnp.float32, marks=pytest.mark.nightly),
    ],
)
def test_output_and_gradients(name, dtype):
    arguments, cotangent = make(name, dtype)
    got = compute(arguments, cotangent)
    assert got["y"].dtype == dtype
    assert all(got[key].dtype == arguments[key].dtype for key in ARRAYS)
    assert_close(got, truth(arguments, cotangent), TOLERANCE[dtype])


def wide(f, sizes=(70, 0, 9)):
    """bfloat16 arguments with several blocks of F, of which the last is not whole."""
    rng = np.random.default_rng(0)
    d, w, m, e = 136, 200, sum(sizes), len(sizes)

    def draw(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.bfloat16)

    arguments = {
        "rows": draw(m, d),
        "gate_up": draw(e, 2 * f, d, scale=d**-0.5),
        "down": draw(e, f, w, scale=f**-0.5),
        "group_sizes": jnp.asarray(sizes, jnp.int32),
        "row_weights": jnp.asarray(rng.uniform(0.1, 1.0, m), jnp.float32),
    }
    return arguments, draw(m, w)


@pytest.mark.nightly
@pytest.mark.parametrize("f", [152, 424], ids=["rows shared", "columns shared"])
def test_both_tilings_of_the_forward_kernel_are_free_of_races(f):
    """The tiles of 128 and of 64 rows, with an odd and an even number of blocks of F."""
    assert ffn.tile_rows(f) == {152: 128, 424: 64}[f]
    arguments, cotangent = wide(f)
    wanted = truth(arguments, cotangent)["y"]
    assert_close({"y": forward(arguments, RACES)}, {"y": wanted}, 1e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("f", [152, 200], ids=["one kernel for rows", "its own product"])
def test_gradients_are_free_of_races_and_weights_may_have_another_dtype(f):
    """The gradient of the rows comes from the fused kernel, or from a product of its own."""
    assert ffn.keeps_hidden(f) == (f == 152)
    arguments, cotangent = wide(f)
    arguments["down"] = arguments["down"].astype(jnp.float32)
    got = compute(arguments, cotangent, RACES)
    assert got["down"].dtype == got["row_weights"].dtype == jnp.float32
    assert got["y"].dtype == got["rows"].dtype == got["gate_up"].dtype == jnp.bfloat16
    assert_close(got, truth(arguments, cotangent), 1e-2)


@pytest.mark.nightly
def test_experts_too_large_for_shared_memory_take_separate_products(monkeypatch):
    monkeypatch.setattr(ffn, "MAX_FUSED_F", 23)
    arguments, cotangent = make("ragged", jnp.bfloat16)
    jax.clear_caches()
    assert_close(compute(arguments, cotangent), truth(arguments, cotangent), 1e-2)


@pytest.mark.nightly
def test_weights_of_experts_without_rows_reach_nothing():
    """NaN in them is in no output; their gradients are exactly 0."""
    arguments, cotangent = make("empty groups", jnp.bfloat16)
    idle = np.flatnonzero(np.asarray(arguments["group_sizes"]) == 0)
    wanted = truth(arguments, cotangent)
    for name in ("gate_up", "down"):
        arguments[name] = arguments[name].at[idle].set(jnp.nan)
    got = compute(arguments, cotangent)
    assert_close(got, wanted, TOLERANCE[jnp.bfloat16])
    assert not np.asarray(got["gate_up"], np.float32)[idle].any()
    assert not np.asarray(got["down"], np.float32)[idle].any()


def test_nothing_of_the_intermediates_size_is_kept_for_the_backward_pass():
    (d, f, w), m, e = (64, 512, 64), 256, 2
    x, w_in, w_out = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, d), (e, 2 * f, d), (e, f, w))
    )
    sizes, weights = jax.ShapeDtypeStruct((e,), jnp.int32), jax.ShapeDtypeStruct((m,), jnp.float32)

    def saved(x, w_in, w_out, sizes, weights):
        def run(*arrays):
            return expert_ffn(*arrays[:3], sizes, arrays[3], "gpu", True)

        return jax.vjp(run, x, w_in, w_out, weights)[1]

    kept = jax.tree.leaves(jax.eval_shape(saved, x, w_in, w_out, sizes, weights))
    known = {x.shape, w_in.shape, w_out.shape, (e,), (m,), ()}
    assert {array.shape for array in kept} <= known


# --- grouped matmuls ------------------------------------------------------------------------

SIZES, K, N = (70, 0, 3, 130, 1), 72, 136


def draw(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "transpose", "interpret"),
    [
        (jnp.bfloat16, False, RACES),
        (jnp.bfloat16, True, RACES),
        pytest.param(jnp.float32, True, True, marks=pytest.mark.nightly),
    ],
    ids=["bfloat16", "bfloat16-transposed", "float32-transposed"],
)
def test_grouped_matmul(dtype, transpose, interpret):
    m, e = sum(SIZES), len(SIZES)
    x = draw(dtype, m, K)
    weights = draw(dtype, e, *((N, K) if transpose else (K, N)), seed=1)
    weights = weights.at[1].set(jnp.nan)  # it owns no row
    y = matmul.grouped_matmul(
        x, weights, jnp.asarray(SIZES), transpose_weights=transpose, interpret=interpret
    )
    assert y.dtype == dtype
    owner = np.repeat(np.arange(e), SIZES)
    w = np.asarray(weights, np.float64)
    w = np.swapaxes(w, 1, 2) if transpose else w
    wanted = np.einsum("mk,mkn->mn", np.asarray(x, np.float64), w[owner])
    assert_close({"y": y}, {"y": wanted}, {jnp.float32: 1e-6, jnp.bfloat16: 3e-3}[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "interpret"),
    [(jnp.bfloat16, RACES), pytest.param(jnp.float32, True, marks=pytest.mark.nightly)],
    ids=["bfloat16", "float32"],
)
def test_weight_gradient_sees_no_row_of_other_experts(dtype, interpret):
    m, e = sum(SIZES), len(SIZES)
    x, dy = draw(dtype, m, K), draw(dtype, m, N, seed=1)
    wanted = np.zeros((e, K, N))
    owner = np.repeat(np.arange(e), SIZES)
    for i in range(m):
        wanted[owner[i]] += np.outer(np.asarray(x, np.float64)[i], np.asarray(dy, np.float64)[i])
    poisoned = 2  # its rows stand before and after rows of others
    x = jnp.where((owner == poisoned)[:, None], jnp.nan, x)
    dy = jnp.where((owner == poisoned)[:, None], jnp.nan, dy)
    got = matmul.weight_gradient(
        x, dy, jnp.asarray(SIZES), interpret=interpret, out_dtype=jnp.float32
    )
    assert got.dtype == jnp.float32
    got = np.asarray(got)
    assert np.isnan(got[poisoned]).all()
    assert not got[1].any(), "an expert without rows has exact zeros"
    for expert in (0, 1, 3, 4):
        assert_close({"w": got[expert]}, {"w": wanted[expert]}, 1e-6)


def test_parts_hold_float32_exactly():
    x = draw(jnp.float32, 1000) * jnp.exp2(draw(jnp.float32, 1000, seed=1) * 10)
    split = jax.jit(matmul.parts)(x)
    assert all(part.dtype == jnp.bfloat16 for part in split)
    np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in split), x)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("name", GROUPS)
def test_tiles_start_at_whole_eights_and_own_each_row_once(name, tile):
    """TMA reads whole eights: another start would read other rows, which no interpreter shows."""
    sizes = np.asarray(GROUPS[name][1])
    rows = sizes.sum()
    if not rows:
        return
    table, count = hopper.work(jnp.asarray(sizes), int(rows), tile)
    expert, first, start, stop = np.asarray(table)[:, : count[0]]
    assert not (first % 8).any()
    assert ((start >= 0) & (start < stop) & (stop <= tile)).all()
    owned = np.concatenate(
        [np.arange(f + a, f + b) for f, a, b in zip(first, start, stop, strict=True)]
    )
    np.testing.assert_array_equal(np.sort(owned), np.arange(rows))
    np.testing.assert_array_equal(
        np.repeat(expert, stop - start), np.repeat(np.arange(len(sizes)), sizes)
    )


# --- devices --------------------------------------------------------------------------------


def test_no_gpu_is_an_error_that_names_the_device():
    arguments, _ = make("one row", jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"'cpu'.*compute capability 9"):
        ffn.forward(**arguments, first_expert=0, interpret=False)


@pytest.mark.nightly
def test_compiles_for_hopper_without_spills_and_for_blackwell():
    """In a process of its own: some failures of the compiler end it."""
    python = interpreter("MOSAIC_GPU_TEST_PYTHON", "jax_cuda13_plugin", "compile-cuda")
    command = [
        python,
        "benchmarks/kernels/gpu_compiled.py",
        "--sizes=0.5B",
        "--rows=16",
        "--blackwell",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "fallback compiles" in done.stdout
