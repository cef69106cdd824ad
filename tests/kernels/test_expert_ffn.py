"""expert_ffn: every implementation against float64 NumPy, forward and all four gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.expert_ffn import expert_ffn, mosaic_tpu, tiles_tpu
from tests.support.kernels import (
    ARRAYS,
    GROUPS,
    LARGEST,
    TOLERANCE,
    assert_close,
    make,
    truth,
)

IMPLEMENTATIONS = ["cpu", "reference", "tpu", "gpu"]
# Interpreted GPU kernels take ten seconds each; the rest of theirs is in test_mosaic_gpu.py.
ON_GPU = [("ragged", jnp.bfloat16), ("odd widths", jnp.bfloat16), ("no rows", jnp.float32)]

QUICK = {"tpu": ("ragged", "one row", "no rows"), "gpu": ("no rows",)}


@functools.partial(jax.jit, static_argnames=("implementation", "strict"))
def compute(arguments, cotangent, implementation, strict=None):
    """Output and gradients, by the implementation; strict: parameters of the interpreter."""
    sizes = arguments["group_sizes"]

    def forward(rows, gate_up, down, row_weights):
        interpret = strict or implementation in ("tpu", "gpu")
        return expert_ffn(rows, gate_up, down, sizes, row_weights, implementation, interpret)

    y, pull = jax.vjp(forward, *(arguments[name] for name in ARRAYS))
    return {"y": y} | dict(zip(ARRAYS, pull(cotangent), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "implementation"),
    [
        pytest.param(
            name, dtype, implementation, id=f"{name}-{dtype.__name__}-{implementation}",
            marks=[pytest.mark.nightly] * (name not in QUICK.get(implementation, GROUPS)),
        )
        for implementation in IMPLEMENTATIONS
        for name in GROUPS
        for dtype in TOLERANCE
        if implementation != "gpu" or (name, dtype) in ON_GPU
    ],
)  # fmt: skip
def test_output_and_gradients(name, dtype, implementation):
    arguments, cotangent = make(name, dtype)
    got = compute(arguments, cotangent, implementation)
    assert got["y"].dtype == dtype
    assert all(got[key].dtype == arguments[key].dtype for key in ARRAYS)
    assert_close(got, truth(arguments, cotangent), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "reference", "tpu"])
@pytest.mark.parametrize("seed", range(4))
def test_random_group_sizes(seed, implementation):
    arguments, cotangent = make("balanced", jnp.float32, seed)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(8, 0.3))
    arguments["group_sizes"] = jnp.asarray(rng.multinomial(96, shares), jnp.int32)
    got = compute(arguments, cotangent, implementation)
    assert_close(got, truth(arguments, cotangent), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [*IMPLEMENTATIONS[:3], pytest.param("gpu", marks=pytest.mark.nightly)],
)
def test_weights_of_another_dtype_than_rows(implementation):
    arguments, cotangent = make("ragged", jnp.bfloat16)
    arguments["row_weights"] = arguments["row_weights"].astype(jnp.float32)
    arguments["down"] = arguments["down"].astype(jnp.float32)
    got = compute(arguments, cotangent, implementation)
    assert got["y"].dtype == got["rows"].dtype == got["gate_up"].dtype == jnp.bfloat16
    assert got["down"].dtype == got["row_weights"].dtype == jnp.float32
    assert_close(got, truth(arguments, cotangent), 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_the_tolerance_catches_one_wrong_row(dtype):
    """One row of the largest case is computed by its neighbour's expert."""
    arguments, cotangent = make(LARGEST, dtype)
    wanted = truth(arguments, cotangent)
    off_by_one = arguments | {"group_sizes": arguments["group_sizes"] + jnp.array([-1, 1])}
    got = compute(off_by_one, cotangent, "cpu")
    assert (np.asarray(got["y"] != compute(arguments, cotangent, "cpu")["y"]).any(1)).sum() == 1
    for name in wanted:
        with pytest.raises(AssertionError, match=name):
            assert_close({name: got[name]}, {name: wanted[name]}, TOLERANCE[dtype])


@pytest.mark.slow
def test_default_is_an_implementation_that_works_without_jit():
    arguments, cotangent = make("ragged", jnp.float32)
    y = expert_ffn(**arguments)
    assert_close({"y": y}, {"y": truth(arguments, cotangent)["y"]}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "tpu"])
def test_experts_without_rows_are_not_read(implementation):
    """The weights of an idle expert reach no output; its gradient is exactly 0."""
    arguments, cotangent = make("empty groups", jnp.float32)
    idle = np.asarray(arguments["group_sizes"]) == 0
    clean = compute(arguments, cotangent, implementation)
    for name in ("gate_up", "down"):
        arguments[name] = arguments[name].at[np.flatnonzero(idle)].set(jnp.nan)
    got = compute(arguments, cotangent, implementation)
    for name, array in clean.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert not np.asarray(got["gate_up"])[idle].any()
    assert not np.asarray(got["down"])[idle].any()


# --- the TPU kernels ------------------------------------------------------------------------


def test_default_goes_by_the_platform_and_another_kernel_is_refused():
    arguments, _ = make("one row", jnp.float32)
    for name in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match=f"'{name}'.*for a cpu.*interpret=True"):
            expert_ffn(**arguments, implementation=name)


@pytest.mark.slow
@pytest.mark.parametrize("stored", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", ["whole tiles", "empty groups", "not a multiple of any block"])
def test_tpu_kernels_under_the_strict_interpreter(name, stored):
    """No race, no use of memory that nothing wrote, no access out of bounds."""
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    arguments, cotangent = make(name, jnp.bfloat16)
    for weights in ("gate_up", "down"):  # another dtype than the rows' is cast on chip
        arguments[weights] = arguments[weights].astype(stored)

    got = compute(arguments, cotangent, "tpu", strict)
    assert_close(got, truth(arguments, cotangent), TOLERANCE[jnp.bfloat16])


@pytest.mark.slow
def test_rows_of_others_do_not_reach_a_weight_gradient():
    """One expert's rows are NaN; the others', in the same tile, are computed all the same."""
    arguments, cotangent = make("ragged", jnp.float32)
    stop = np.cumsum(arguments["group_sizes"])
    clean = compute(arguments, cotangent, "tpu")
    arguments["rows"] = arguments["rows"].at[stop[4] : stop[5]].set(jnp.nan)
    got = compute(arguments, cotangent, "tpu")
    for name in ("gate_up", "down"):
        others = np.arange(8) != 5
        np.testing.assert_array_equal(got[name][others], clean[name][others], err_msg=name)
        assert np.isnan(got[name][5]).any()


def test_an_idle_expert_is_out_of_its_neighbours_reach():
    """Inside a step of others' rows an idle expert gets zeros, whatever their weights hold."""
    arguments, cotangent = make("ragged", jnp.float32)
    arguments["group_sizes"] = jnp.array([12, 0, 40, 0, 0, 43, 1, 0], jnp.int32)
    for name in ("gate_up", "down"):
        arguments[name] = arguments[name].at[0].set(jnp.nan)
    got = compute(arguments, cotangent, "tpu")
    for name in ("gate_up", "down"):
        assert np.isnan(got[name][0]).any() and np.isfinite(got[name][1:]).all()
        assert not got[name][jnp.array([1, 3, 4, 7])].any()


@pytest.mark.parametrize("implementation", ["cpu", "reference", "tpu"])
def test_rows_past_the_last_group_give_no_gradient(implementation):
    """An exchange's buffer is longer than its rows, and its rest holds anything."""
    arguments, cotangent = make("ragged", jnp.float32)
    rows = len(arguments["rows"])
    filled = rows - int(arguments["group_sizes"][5])
    arguments["group_sizes"] = arguments["group_sizes"].at[5].set(0)
    for name in ("rows", "row_weights"):
        arguments[name] = arguments[name][:filled]
    wanted = compute(arguments, cotangent[:filled], implementation)
    for name, rest in (("rows", jnp.nan), ("row_weights", 1.0)):  # weights travel padded
        rest = jnp.full((rows - filled, *arguments[name].shape[1:]), rest)
        arguments[name] = jnp.concatenate([arguments[name], rest])
    got = compute(arguments, cotangent.at[filled:].set(jnp.nan), implementation)
    for name in ("gate_up", "down"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.nightly
def test_single_buffers_of_a_small_chip(monkeypatch):
    monkeypatch.setattr(tiles_tpu, "choices", lambda *_: iter([(128, 128, 1)]))
    for stored in TOLERANCE:
        arguments, cotangent = make("whole tiles", jnp.bfloat16)
        for name in ("gate_up", "down"):
            arguments[name] = arguments[name].astype(stored)
        got = compute.__wrapped__(arguments, cotangent, "tpu")
        assert_close(got, truth(arguments, cotangent), TOLERANCE[jnp.bfloat16])


@pytest.mark.slow
def test_an_expert_too_large_for_the_chip_goes_through_grouped_matmul(monkeypatch):
    arguments, cotangent = make("ragged", jnp.float32)
    small = dataclasses.replace(mosaic_tpu._chip(True), vmem_capacity_bytes=3 * 2**20)
    monkeypatch.setattr(mosaic_tpu, "_chip", lambda interpret: small)
    rows, gate_up, down = (arguments[name] for name in ARRAYS[:3])
    assert mosaic_tpu.plan_call("forward", rows, gate_up, down, True) is None
    got = compute.__wrapped__(arguments, cotangent, "tpu")
    assert_close(got, truth(arguments, cotangent), TOLERANCE[jnp.float32])


def test_tpu_refuses_float16():
    arguments, _ = make("one row", jnp.float16)
    with pytest.raises(ValueError, match=r"rows is float16; .*float32 and bfloat16"):
        expert_ffn(**arguments, implementation="tpu", interpret=True)


# --- work -----------------------------------------------------------------------------------


def arrays_of(jaxpr):
    """Abstract values of every variable, inner jaxprs included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        yield variable.aval
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (list, tuple)) else [parameter]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from arrays_of(inner)


def products_of(jaxpr):
    """Multiply-adds of each matrix product, inner jaxprs counted once."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = np.prod([shape[axis] for axis in contracted])
            yield int(depth * equation.outvars[0].aval.size)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (list, tuple)) else [parameter]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products_of(inner)


def test_work_is_not_rows_times_experts():
    m, e, d, f, w = 512, 64, 32, 24, 20
    shapes = {
        "rows": jax.ShapeDtypeStruct((m, d), jnp.float32),
        "gate_up": jax.ShapeDtypeStruct((e, 2 * f, d), jnp.float32),
        "down": jax.ShapeDtypeStruct((e, f, w), jnp.float32),
        "group_sizes": jax.ShapeDtypeStruct((e,), jnp.int32),
        "row_weights": jax.ShapeDtypeStruct((m,), jnp.float32),
    }
    cotangent = jax.ShapeDtypeStruct((m, w), jnp.float32)

    def jaxpr(implementation):
        step = functools.partial(compute, implementation=implementation)
        return jax.make_jaxpr(step)(shapes, cotangent)

    def largest(implementation):
        return max(getattr(aval, "size", 0) for aval in arrays_of(jaxpr(implementation)))

    # Nothing in memory beyond the weights and, padded by a block, the rows.
    assert largest("cpu") <= max(e * 2 * f * d, (m + 128) * d)
    assert largest("reference") >= m * e * f, "the search misses inner arrays"
    # No product is larger than one of twice the rows, each with one expert's weights.
    assert max(products_of(jaxpr("cpu"))) <= 2 * m * 2 * f * d
    assert max(products_of(jaxpr("reference"))) >= m * e * d * f


# --- mistakes -------------------------------------------------------------------------------


def shaped(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=shaped(6)), ["rows", "(6,)", "2 axes"]),
        (dict(gate_up=shaped(10, 4)), ["gate_up", "(10, 4)", "3 axes"]),
        (dict(down=shaped(5, 3)), ["down", "(5, 3)", "3 axes"]),
        (dict(group_sizes=shaped(1, 2, dtype=jnp.int32)), ["group_sizes", "(1, 2)", "1 axes"]),
        (dict(row_weights=shaped(6, 1)), ["row_weights", "(6, 1)", "1 axes"]),
        (dict(rows=shaped(6, 7)), ["rows", "4 != 7"]),
        (dict(gate_up=shaped(2, 9, 4)), ["gate_up", "twice down's F", "9 != 10"]),
        (dict(down=shaped(2, 6, 3)), ["gate_up", "twice down's F", "10 != 12"]),
        (dict(down=shaped(3, 5, 3)), ["experts", "3 != 2"]),
        (dict(group_sizes=jnp.array([6, 0, 0])), ["group_sizes", "3 != 2"]),
        (dict(row_weights=shaped(5)), ["row_weights", "5 != 6"]),
        (dict(rows=shaped(6, 4, dtype=jnp.int32)), ["rows", "int32", "bfloat16"]),
        (dict(gate_up=shaped(2, 10, 4, dtype=jnp.int8)), ["gate_up", "int8", "bfloat16"]),
        (dict(down=shaped(2, 5, 3, dtype=jnp.int16)), ["down", "int16", "bfloat16"]),
        (dict(group_sizes=jnp.array([3.0, 3.0])), ["group_sizes", "float32", "integer"]),
        (dict(group_sizes=jnp.array([3, 4])), ["group_sizes", "6 rows", "7"]),
        (dict(group_sizes=jnp.array([7, -1])), ["group_sizes", "-1"]),
        (
            dict(gate_up=shaped(0, 10, 4), down=shaped(0, 5, 3), group_sizes=jnp.array([], int)),
            ["gate_up", "(0, 10, 4)", "at least one expert"],
        ),
        (dict(implementation="mosaic"), ["'mosaic'", "'cpu'", "'reference'"]),
        (dict(implementation="CPU"), ["'CPU'", "'cpu'"]),
        (dict(interpret=True), ["interpret=True"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_name_the_values(changes, message):
    good = dict(
        rows=shaped(6, 4),
        gate_up=shaped(2, 10, 4),
        down=shaped(2, 5, 3),
        group_sizes=jnp.array([2, 4]),
        row_weights=shaped(6),
    )
    assert expert_ffn(**good).shape == (6, 3)
    with pytest.raises(ValueError) as error:
        expert_ffn(**good | changes)
    assert all(part in str(error.value) for part in message), error.value
