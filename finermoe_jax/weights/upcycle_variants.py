"""Variants of the experts' initial weights: pure functions of one layer.

Letters: config/model.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.weights import lazy

# The shared expert's gate starts at sigmoid(0) = 1/2; this factor cancels it exactly.
SHARED_SCALE = 2
# Make the keys of drop-upcycling and of noise differ from the routers', and from each other.
DROP_KEY = 2**31
NOISE_KEY = 2**31 + 1
# Matrices in each of an expert's two arrays.
PARTS = {"gate_up": 2, "down": 1}
# Channels of an expert redrawn at a time.
_CHANNELS = 1024


def drop(
    name: str, expert: Float[np.ndarray, "F X"], ratio: float, key: Array
) -> Float[np.ndarray, "F X"]:
    """Drop-upcycling (arXiv 2502.19261) of one expert's `gate_up` [2F, D] or `down` [F, W].

    The formula at the end of "diversity re-initialization" in that paper's section 3. Column-wise
    sampling: S is floor(ratio * F) of the expert's F channels, the same set for all three matrices
    (`key` is the expert's). For each matrix, with mu and sigma the mean and standard deviation of
    its entries in S,

        W' = I_S * R + (1 - I_S) * W,   R ~ normal(mu, sigma^2),

    I_S the indicator of S. NumPy draws the values, so the bits are the same on every platform. The
    paper's converter differs in two points: it also permutes each expert's channels, which changes
    no function, and it samples another S for each matrix; the paper's text has one set, as here.

    Raises InputError if the drawn values are not finite.
    """
    sampling, *matrices = _generators(key, 4)
    width = len(expert) // PARTS[name]
    channels = sampling.permutation(width)[: int(ratio * width)]

    def new(_: np.ndarray, drawn: np.ndarray, mean: np.float32, std: np.float32) -> np.ndarray:
        return drawn * std + mean

    return _redrawn(name, expert, channels, matrices, new, "drop-upcycling")


def noise(
    name: str, expert: Float[np.ndarray, "F X"], share: float, key: Array
) -> Float[np.ndarray, "F X"]:
    """Adds noise to one expert's `gate_up` [2F, D] or `down` [F, W], so that copies differ.

    For each of the expert's three matrices, with sigma the standard deviation of its entries,

        W' = W + share * sigma * R,   R ~ normal(0, 1).

    Not from the paper. NumPy draws the values with `key`, the expert's.

    Raises InputError if a value is not finite.
    """

    def new(old: np.ndarray, drawn: np.ndarray, _: np.float32, std: np.float32) -> np.ndarray:
        return old.astype(np.float32) + np.float32(share) * std * drawn

    channels = np.arange(len(expert) // PARTS[name])
    return _redrawn(name, expert, channels, _generators(key, 3), new, "upcycle.copy_noise")


def _generators(key: Array, count: int) -> list[np.random.Generator]:
    return [
        np.random.default_rng(np.asarray(jax.random.key_data(own)))
        for own in jax.random.split(key, count)
    ]


def _redrawn(
    name: str,
    expert: Float[np.ndarray, "F X"],
    channels: Int[np.ndarray, " _"],
    generators: list[np.random.Generator],
    new: Callable[[np.ndarray, np.ndarray, np.float32, np.float32], np.ndarray],
    what: str,
) -> Float[np.ndarray, "F X"]:
    """Returns the expert with other values in some channels of each of its matrices.

    `new` gets the channels' old values, as many draws of normal(0, 1), and the mean and standard
    deviation of the matrix's entries in all `channels`. `generators` are for gate, up and down.
    `what` draws, for messages.
    """
    if not len(channels):
        return expert
    parts, made = PARTS[name], np.array(expert)
    width = len(expert) // parts
    own = generators[:2] if name == "gate_up" else generators[2:]

    def redraw(place: int, generator: np.random.Generator) -> None:
        # Some channels at a time: one expert of a large model has hundreds of megabytes.
        some = np.split(channels + place * width, range(_CHANNELS, len(channels), _CHANNELS))
        mean, std = _moments(made, some)
        for rows in some:
            drawn = generator.standard_normal((len(rows), expert.shape[1]), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                values = new(made[rows], drawn, mean, std)
            if not np.isfinite(values).all():
                raise InputError(
                    f"{what} draws from the source's mean and standard deviation, but these are "
                    f"not finite or too large (std {std}): look for a damaged tensor in the source"
                )
            made[rows] = lazy.converted(values, made.dtype, f"what {what} draws")

    with ThreadPoolExecutor(parts) as pool:  # drawing takes most of the time
        list(pool.map(redraw, range(parts), own))
    return made


def _moments(
    matrix: Float[np.ndarray, "F X"], some: list[Int[np.ndarray, " _"]]
) -> tuple[np.float32, np.float32]:
    size = sum(map(len, some)) * matrix.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):  # checked in the drawn values
        mean = sum(matrix[rows].astype(np.float64).sum() for rows in some) / size
        squares = (np.square(matrix[rows].astype(np.float64) - mean).sum() for rows in some)
        return np.float32(mean), np.float32(np.sqrt(sum(squares) / size))


def virtual_group_rows(moe: MoEConfig) -> Int[np.ndarray, " E"]:
    """Returns, for each expert, the expert whose router row it starts with.

    NVShard (arXiv 2410.07524), "virtual group initialization": section 2.3 (words, no equation) and
    the pseudo-code of appendix A. The T_I chosen experts must be one copy of every slice. If the
    copies of one *slice* shared a row, they would all have equal logits, and the best T_I = G_I
    experts would be copies of a single slice. So the slices of one *copy* share a row, as in the
    paper's code: the best copy is chosen as a whole, with equal weights; for T_I = k G_I, the best
    k copies.

    Scale of the weights (Eq. 2, section 2.3.1): the paper has N G_I / T_I in total, for a softmax
    over all experts, which gives each the weight 1/N. Here the softmax is over the T_I chosen ones,
    each has 1/T_I, and the same reasoning gives G_I. Eq. 2 puts the factor's cube root into each
    matrix, which is exact for the paper's squared ReLU but not for SwiGLU. Here the
    down-projections take the whole factor, as in every start without a shared expert, and the layer
    equals the dense FFN up to rounding.
    """
    slices = moe.intermediate_granularity
    return np.arange(moe.num_experts) // slices * slices
