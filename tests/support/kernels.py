"""Groups of rows, arguments, and expert_ffn in float64, for the tests of every kernel."""

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
ARRAYS = ("rows", "gate_up", "down", "row_weights")
# D, F, W. Distributions of one shape and number of rows share a compilation.
SMALL, ODD = (16, 24, 8), (9, 7, 5)
GROUPS = {
    "balanced": (SMALL, [12] * 8),
    "empty groups": (SMALL, [0, 40, 0, 0, 31, 1, 24, 0]),
    "empty at the ends only": (SMALL, [0, 16, 16, 16, 16, 16, 16, 0]),
    "all rows on the first": (SMALL, [96, 0, 0, 0, 0, 0, 0, 0]),
    "all rows on the last": (SMALL, [0, 0, 0, 0, 0, 0, 0, 96]),
    "all rows on one in the middle": (SMALL, [0, 0, 0, 96, 0, 0, 0, 0]),
    "ragged": (SMALL, [1, 2, 3, 5, 8, 13, 21, 43]),
    "one row": (SMALL, [0, 0, 1]),
    "one row for each": (SMALL, [1] * 5),
    "fewer rows than experts": (SMALL, [0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1]),
    "no rows": (SMALL, [0, 0, 0]),
    "one expert": (SMALL, [37]),
    "odd widths": (ODD, [5, 0, 11, 3]),
    "width one": ((1, 1, 1), [3, 4]),
    "not a multiple of any block": (SMALL, [129, 1, 127, 0, 64]),
    "many rows for few experts": ((8, 6, 8), [200, 121]),
    "whole tiles": (SMALL, [512, 0, 256, 300, 84]),
}
LARGEST = "many rows for few experts"


def make(name, dtype, seed=0):
    """Arguments of expert_ffn and a cotangent; values that dtype holds exactly."""
    (d, f, w), sizes = GROUPS[name]
    rng = np.random.default_rng(seed)
    m, e = sum(sizes), len(sizes)

    def draw(*shape, scale=1.0):
        # jnp.asarray would compile a program for each shape.
        return jax.device_put((rng.standard_normal(shape) * scale).astype(dtype))

    arguments = {
        "rows": draw(m, d),
        "gate_up": draw(e, 2 * f, d, scale=d**-0.5),
        "down": draw(e, f, w, scale=f**-0.5),
        "group_sizes": jax.device_put(np.asarray(sizes, np.int32)),
        "row_weights": jax.device_put(rng.uniform(0.1, 1.0, m).astype(dtype)),
    }
    return arguments, draw(m, w)


def truth(arguments, cotangent):
    """Output and gradients, row by row in float64."""
    x, gate_up, down, weights = (np.asarray(arguments[k], np.float64) for k in ARRAYS)
    dy = np.asarray(cotangent, np.float64)
    owner = np.repeat(np.arange(len(gate_up)), np.asarray(arguments["group_sizes"]))
    f = down.shape[1]
    y = np.zeros(dy.shape)
    dx, dgate_up, ddown, dweights = (np.zeros(a.shape) for a in (x, gate_up, down, weights))
    for m, e in enumerate(owner):
        wg, wu = gate_up[e, :f], gate_up[e, f:]
        g, u = wg @ x[m], wu @ x[m]
        s = 1 / (1 + np.exp(-g))
        active = g * s * u
        plain = active @ down[e]
        y[m] = weights[m] * plain
        dweights[m] = plain @ dy[m]
        dactive = weights[m] * (down[e] @ dy[m])
        ddown[e] += weights[m] * np.outer(active, dy[m])
        dg, du = dactive * u * (s + g * s * (1 - s)), dactive * g * s
        dx[m] = dg @ wg + du @ wu
        dgate_up[e, :f] += np.outer(dg, x[m])
        dgate_up[e, f:] += np.outer(du, x[m])
    return {"y": y, "rows": dx, "gate_up": dgate_up, "down": ddown, "row_weights": dweights}


def assert_close(got, wanted, tolerance):
    """Each array's error, in norm, relative to the array's norm."""
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        error = np.linalg.norm((np.asarray(got[name], np.float64) - array).ravel())
        assert error <= tolerance * np.linalg.norm(array.ravel()), (name, error)
