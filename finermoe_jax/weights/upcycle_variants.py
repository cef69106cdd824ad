"""Starts of experts that are more than a copied slice: pure functions of one layer.

Letters: config/model.py.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.errors import InputError
from finermoe_jax.weights import lazy

# The gate of the shared expert starts at sigmoid(0) = 1/2; this makes it good, exactly.
SHARED_SCALE = 2
# Sets the key of drop-upcycling apart from those of the routers.
DROP_KEY = 2**31
# Channels of an expert that are redrawn at a time.
_CHANNELS = 1024


def drop(
    name: str, expert: Float[np.ndarray, "F X"], ratio: float, key: Array
) -> Float[np.ndarray, "F X"]:
    """Drop-upcycling (arXiv 2502.19261) of one expert's `gate_up` [2F, D] or `down` [F, W].

    The formula that ends "diversity re-initialization" in the paper's section 3; its number there
    was not checked. Column-wise sampling: S is floor(ratio * F) of the expert's F channels, one set
    for all three matrices (`key` is the expert's). Then for each matrix, with mu and sigma the mean
    and standard deviation of its entries in S,

        W' = I_S * R + (1 - I_S) * W,   R ~ normal(mu, sigma^2),

    I_S the indicator of S. Drawn by NumPy, so that the bits are the same on every platform and
    however the expert is read. The paper's converter also permutes each expert's channels, which
    changes no function, and takes another S for each matrix; here S is the paper's one set.
    """
    sampling, *matrices = (
        np.random.default_rng(np.asarray(jax.random.key_data(own)))
        for own in jax.random.split(key, 4)
    )
    first, parts = (0, 2) if name == "gate_up" else (2, 1)
    width = len(expert) // parts
    channels = sampling.permutation(width)[: int(ratio * width)]
    if not len(channels):
        return expert
    new = np.array(expert)

    def redraw(place: int, own: np.random.Generator) -> None:
        # Some channels at a time: an expert of a large model is hundreds of megabytes.
        some = np.split(channels + place * width, range(_CHANNELS, len(channels), _CHANNELS))
        mean, std = _moments(new, some)
        for rows in some:
            noise = own.standard_normal((len(rows), expert.shape[1]), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                drawn = noise * std + mean
            if not np.isfinite(drawn).all():
                raise InputError(
                    "drop-upcycling draws weights like those that are there, and some of these are "
                    f"not finite, or too large for their deviation ({std}): look for a damaged "
                    "tensor in the source"
                )
            new[rows] = lazy.converted(drawn, new.dtype, "what drop-upcycling draws")

    with ThreadPoolExecutor(parts) as pool:  # drawing takes most of the time
        list(pool.map(redraw, range(parts), matrices[first : first + parts]))
    return new


def _moments(
    matrix: Float[np.ndarray, "F X"], some: list[Int[np.ndarray, " _"]]
) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of the entries in these rows."""
    size = sum(map(len, some)) * matrix.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):  # seen in what is drawn
        mean = sum(matrix[rows].astype(np.float64).sum() for rows in some) / size
        squares = (np.square(matrix[rows].astype(np.float64) - mean).sum() for rows in some)
        return np.float32(mean), np.float32(np.sqrt(sum(squares) / size))


def virtual_group_rows(moe: MoEConfig) -> Int[np.ndarray, " E"]:
    """For each expert, the expert whose row of the router it starts with.

    NVShard (arXiv 2410.07524), "virtual group initialization": section 2.3, in words and without
    an equation, and the pseudo-code of appendix A. What has to hold is that the T_I chosen experts
    are one copy of every slice. Rows shared by the copies of one *slice* would give all of them
    equal logits, and the best T_I = G_I experts would be copies of a single slice. Rows shared by
    the slices of one *copy* do it, and so does the paper's code: the best copy is chosen as a
    whole, at equal weights; of T_I = k G_I, the best k copies.

    The weights are scaled by Eq. 2 (section 2.3.1): by N G_I / T_I in all, for a softmax over all
    experts, each of which then has the weight 1/N. Over the T_I chosen ones, as here, each has
    1/T_I, and the same reasoning gives G_I. Eq. 2 puts the factor's cube root into each matrix,
    which is exact for the paper's squared ReLU and not for SwiGLU. Here the whole factor is in the
    down-projections, as in every start without a shared expert: the layer is the dense FFN, to
    rounding.
    """
    slices = moe.intermediate_granularity
    return np.arange(moe.num_experts) // slices * slices
