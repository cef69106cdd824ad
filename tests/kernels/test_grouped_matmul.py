"""grouped_matmul: every implementation against float64 NumPy, all three forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import grouped_matmul, mosaic_tpu, weight_gradient
from pallas_kernels.platform import platform
from tests.support import kernels
from tests.support.kernels import TOLERANCE, assert_close

IMPLEMENTATIONS = ["cpu", "reference", "tpu", "gpu"]
PALLAS = ("tpu", "gpu")
SLOW_ON_GPU = [*IMPLEMENTATIONS[:3], pytest.param("gpu", marks=pytest.mark.nightly)]
# K, N and rows of each expert.
GROUPS = {name: ((k, n), sizes) for name, ((k, n, _), sizes) in kernels.GROUPS.items()}
GROUPS |= {
    "many rows for few experts": ((8, 8), [200, 121]),
    "wider than a tile": ((300, 260), [0, 40, 0, 3, 30]),
}
LARGEST = "many rows for few experts"
FEW = ("ragged", "odd widths")
# The gradient of one orientation is a product of the other, so that each case covers both.
CASES = [(name, False) for name in GROUPS] + [
    (name, True)
    for name in ("empty groups", "ragged", "one row", "odd widths", "wider than a tile")
]


def make(name, dtype, transpose=False, seed=0):
    """rows, weights, group sizes and a cotangent; values that dtype holds exactly."""
    (k, n), sizes = GROUPS[name]
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        # jnp.asarray would compile a program for each shape.
        return jax.device_put((rng.standard_normal(shape) * scale).astype(dtype))

    weights = draw(len(sizes), *((n, k) if transpose else (k, n)), scale=k**-0.5)
    return draw(sum(sizes), k), weights, jnp.asarray(sizes, jnp.int32), draw(sum(sizes), n)


def truth(rows, weights, sizes, cotangent, transpose=False):
    """Output and gradients, row by row in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for m, e in enumerate(np.repeat(np.arange(len(w)), np.asarray(sizes))):
        matrix = w[e].T if transpose else w[e]
        y[m], dx[m] = x[m] @ matrix, matrix @ dy[m]
        dw[e] += np.outer(dy[m], x[m]) if transpose else np.outer(x[m], dy[m])
    return {"y": y, "rows": dx, "weights": dw}


@functools.partial(jax.jit, static_argnames=("transpose", "implementation"))
def compute(rows, weights, sizes, cotangent, transpose=False, implementation="cpu"):
    """Output and gradients, by the implementation."""

    def forward(rows, weights):
        interpret = implementation in PALLAS
        return grouped_matmul(rows, weights, sizes, transpose, implementation, interpret)

    y, pull = jax.vjp(forward, rows, weights)
    drows, dweights = pull(cotangent)
    return {"y": y, "rows": drows, "weights": dweights}


@functools.cache
def computed(name, dtype, transpose, implementation):
    """The arguments of a case and what the implementation makes of them, once for all tests."""
    arguments = make(name, dtype, transpose)
    return arguments, compute(*arguments, transpose, implementation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "transpose", "dtype", "implementation"),
    [
        pytest.param(
            *case, dtype, implementation, id=f"{case}-{dtype.__name__}-{implementation}",
            marks=[pytest.mark.nightly] * ((implementation in PALLAS and case[0] not in FEW)
                                        or implementation == "gpu"),
        )
        for implementation in IMPLEMENTATIONS
        for dtype in TOLERANCE
        for case in CASES
        # On the GPU float32 is six bfloat16 products, ten seconds each interpreted.
        if implementation != "gpu" or dtype == jnp.bfloat16 or case[0] in FEW
    ],
)  # fmt: skip
def test_output_and_gradients(name, transpose, dtype, implementation):
    arguments, got = computed(name, dtype, transpose, implementation)
    assert all(array.dtype == dtype for array in got.values())
    assert_close(got, truth(*arguments, transpose), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", SLOW_ON_GPU)
@pytest.mark.parametrize("seed", range(3))
def test_random_group_sizes(seed, implementation):
    rows, weights, _, cotangent = make("balanced", jnp.float32, seed=seed)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(8, 0.3))
    arguments = rows, weights, jnp.asarray(rng.multinomial(96, shares), jnp.int32), cotangent
    got = compute(*arguments, implementation=implementation)
    assert_close(got, truth(*arguments), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_another_dtype_than_rows(implementation):
    rows, weights, sizes, cotangent = make("ragged", jnp.bfloat16)
    arguments = rows, weights.astype(jnp.float32), sizes, cotangent
    got = compute(*arguments, implementation=implementation)
    assert got["y"].dtype == got["rows"].dtype == jnp.bfloat16
    assert got["weights"].dtype == jnp.float32
    assert_close(got, truth(*arguments), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_gradient_by_itself(implementation):
    rows, weights, sizes, cotangent = make("ragged", jnp.bfloat16)
    wanted = truth(rows, weights, sizes, cotangent)["weights"]
    options = dict(implementation=implementation, interpret=implementation in PALLAS)
    got = weight_gradient(rows, cotangent, sizes, **options)
    assert got.dtype == jnp.bfloat16
    assert_close({"weights": got}, {"weights": wanted}, 1e-2)
    exact = weight_gradient(rows, cotangent, sizes, out_dtype=jnp.float32, **options)
    assert exact.dtype == jnp.float32
    assert_close({"weights": exact}, {"weights": wanted}, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_the_tolerance_catches_one_wrong_row(dtype):
    """One row of the largest case is computed by its neighbour's expert."""
    rows, weights, sizes, cotangent = make(LARGEST, dtype)
    wanted = truth(rows, weights, sizes, cotangent)
    got = compute(rows, weights, sizes + jnp.array([-1, 1]), cotangent)
    right = compute(rows, weights, sizes, cotangent)
    assert (np.asarray(got["y"] != right["y"]).any(1)).sum() == 1
    for name in wanted:
        with pytest.raises(AssertionError, match=name):
            assert_close({name: got[name]}, {name: wanted[name]}, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["cpu", *SLOW_ON_GPU[2:]])
def test_experts_without_rows_are_not_read(implementation):
    """The weights of an idle expert reach no output; its gradient is exactly 0."""
    arguments, clean = computed("empty groups", jnp.float32, False, implementation)
    rows, weights, sizes, cotangent = arguments
    idle = np.flatnonzero(np.asarray(sizes) == 0)
    dirty = weights.at[idle].set(jnp.nan)
    got = compute(rows, dirty, sizes, cotangent, False, implementation)
    for name, array in clean.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert not np.asarray(got["weights"])[idle].any()


@pytest.mark.parametrize("implementation", SLOW_ON_GPU)
def test_a_row_reaches_only_itself_and_its_expert(implementation):
    (rows, weights, sizes, cotangent), clean = computed(
        "ragged", jnp.float32, False, implementation
    )
    row, expert = 17, 4
    rows, cotangent = rows.at[row].set(jnp.nan), cotangent.at[row].set(jnp.nan)
    got = compute(rows, weights, sizes, cotangent, False, implementation)
    for name, alone in (("y", row), ("rows", row), ("weights", expert)):
        assert np.isnan(got[name][alone]).all(), name
        others = np.arange(len(got[name])) != alone
        np.testing.assert_array_equal(got[name][others], clean[name][others], err_msg=name)


def test_default_follows_the_platform_and_works_without_jit():
    assert platform() == "cpu"
    rows, weights, sizes, cotangent = make("ragged", jnp.float32)
    y = grouped_matmul(rows, weights, sizes)
    assert_close({"y": y}, {"y": truth(rows, weights, sizes, cotangent)["y"]}, 1e-5)


@pytest.mark.parametrize(
    ("device", "wanted"), [("tpu", "tpu"), ("cuda", "gpu"), ("gpu", "gpu"), ("cpu", "cpu")]
)
def test_platform_is_the_one_compiled_for(device, wanted):
    with jax.sharding.use_abstract_mesh(abstract_mesh(device)):
        assert platform() == wanted


def test_unknown_platform():
    rows, weights, sizes, _ = make("ragged", jnp.float32)
    with (
        jax.sharding.use_abstract_mesh(abstract_mesh("abacus")),
        pytest.raises(NotImplementedError, match=r"'abacus'.*cpu.*tpu.*gpu"),
    ):
        grouped_matmul(rows, weights, sizes)


def abstract_mesh(name):
    device = jax.sharding.AbstractDevice(name, 1, name)
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


# --- work -----------------------------------------------------------------------------------


def test_work_is_not_rows_times_experts():
    m, e, k, n = 512, 64, 32, 24
    f32 = jnp.float32
    shapes = [
        jax.ShapeDtypeStruct(*each)
        for each in (((m, k), f32), ((e, k, n), f32), ((e,), jnp.int32), ((m, n), f32))
    ]

    def largest(implementation):
        """The largest array of the program, in elements."""
        step = functools.partial(compute, implementation=implementation)
        text = str(jax.make_jaxpr(step)(*shapes))
        names = {part.split("]")[0] for part in text.split("f32[")[1:]}
        return max(np.prod([int(size) for size in name.split(",") if size]) for name in names)

    assert largest("cpu") <= max(e * k * n, (m + 128) * k)
    assert largest("reference") >= m * e * min(k, n), "the search misses inner arrays"


# --- tiles and memory of the TPU kernels ----------------------------------------------------

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def tpu_forms(arguments, tiles, interpret, transpose):
    rows, weights, sizes, cotangent = arguments
    left, right = (cotangent, rows) if transpose else (rows, cotangent)
    options = dict(interpret=interpret, tiles=tiles)
    product = functools.partial(mosaic_tpu.grouped_matmul, **options)
    return {
        "y": product(rows, weights, sizes, transpose_weights=transpose),
        "rows": product(cotangent, weights, sizes, transpose_weights=not transpose),
        "weights": mosaic_tpu.weight_gradient(
            left, right, sizes, out_dtype=weights.dtype, **options
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.nightly)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("wider than a tile", mosaic_tpu.Tiles(64, 32, 128, 128)),
        ("not a multiple of any block", mosaic_tpu.Tiles(96, 32, 128, 128)),
        ("ragged", mosaic_tpu.Tiles(64, 32, 128, 128)),
    ],
    ids=str,
)
def test_tpu_tiles(name, tiles, transpose, dtype):
    arguments = make(name, dtype, transpose)
    got = tpu_forms(arguments, tiles, True, transpose)
    assert_close(got, truth(*arguments, transpose), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    "name",
    [pytest.param("wider than a tile", marks=pytest.mark.nightly), "empty groups", "one row"],
)
def test_tpu_races_and_memory(name, transpose):
    arguments = make(name, jnp.float32, transpose)
    got = tpu_forms(arguments, mosaic_tpu.Tiles(32, 32, 128, 256), STRICT, transpose)
    assert_close(got, truth(*arguments, transpose), 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize(("share", "rows"), [(16, 32), (64, 32)])
def test_visits_in_closed_form_are_those_of_a_balanced_schedule(share, rows):
    """The twin that estimates are taken from computes the same thing."""
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((4 * share, 16), (4, 16, 24), (4 * share, 24))
    )
    sizes, tiles = jnp.full(4, share, jnp.int32), mosaic_tpu.Tiles(rows, 16, 128, 128)
    options = dict(interpret=True, tiles=tiles)
    for form in (
        functools.partial(mosaic_tpu.grouped_matmul, x, w, sizes, transpose_weights=False),
        functools.partial(mosaic_tpu.weight_gradient, x, dy, sizes, out_dtype=jnp.float32),
    ):
        got, wanted = (
            jax.jit(functools.partial(form, **options, **more))() for more in ({"share": share}, {})
        )
        np.testing.assert_array_equal(got, wanted)


# --- mistakes -------------------------------------------------------------------------------


def shaped(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=shaped(6)), ["rows", "(6,)", "2 axes"]),
        (dict(weights=shaped(4, 3)), ["weights", "(4, 3)", "3 axes"]),
        (dict(group_sizes=shaped(1, 2, dtype=jnp.int32)), ["group_sizes", "(1, 2)", "1 axes"]),
        (dict(rows=shaped(6, 7)), ["rows", "(6, 7)", "(2, 4, 3)", "4 != 7"]),
        (dict(transpose_weights=True), ["transpose_weights=True", "3 != 4"]),
        (dict(group_sizes=jnp.array([6, 0, 0])), ["group_sizes", "3 != 2"]),
        (dict(rows=shaped(6, 4, dtype=jnp.int32)), ["rows", "int32", "bfloat16"]),
        (dict(weights=shaped(2, 4, 3, dtype=jnp.int8)), ["weights", "int8", "bfloat16"]),
        (
            dict(rows=shaped(6, 4, dtype=jnp.float16), implementation="tpu", interpret=True),
            ["rows", "float16", "'tpu'", "bfloat16"],
        ),
        (dict(group_sizes=jnp.array([3.0, 3.0])), ["group_sizes", "float32", "integer"]),
        (dict(group_sizes=jnp.array([3, 4])), ["group_sizes", "6 rows", "7"]),
        (dict(group_sizes=jnp.array([7, -1])), ["group_sizes", "-1"]),
        (
            dict(weights=shaped(0, 4, 3), group_sizes=shaped(0, dtype=jnp.int32)),
            ["group_sizes", "empty"],
        ),
        (dict(implementation="mosaic"), ["'mosaic'", "'cpu'", "'reference'", "'tpu'"]),
        (dict(implementation="CPU"), ["'CPU'", "'cpu'"]),
        (dict(interpret=True), ["interpret=True", "'cpu'", "'tpu'"]),
        (dict(interpret=True, implementation="reference"), ["interpret=True", "'reference'"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_name_the_values(changes, message):
    good = dict(rows=shaped(6, 4), weights=shaped(2, 4, 3), group_sizes=jnp.array([2, 4]))
    assert grouped_matmul(**good).shape == (6, 3)
    with pytest.raises(ValueError) as error:
        grouped_matmul(**good | changes)
    assert all(part in str(error.value) for part in message), error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cotangent=shaped(5, 3)), ["cotangent", "5 != 6"]),
        (dict(cotangent=shaped(6)), ["cotangent", "(6,)", "2 axes"]),
        (dict(out_dtype=jnp.int32), ["out_dtype", "int32", "bfloat16"]),
        (dict(group_sizes=jnp.array([3, 4])), ["group_sizes", "6 rows", "7"]),
        (dict(implementation="mosaic"), ["'mosaic'", "'cpu'"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_of_a_weight_gradient(changes, message):
    good = dict(rows=shaped(6, 4), cotangent=shaped(6, 3), group_sizes=jnp.array([2, 4]))
    assert weight_gradient(**good).shape == (2, 4, 3)
    with pytest.raises(ValueError) as error:
        weight_gradient(**good | changes)
    assert all(part in str(error.value) for part in message), error.value
