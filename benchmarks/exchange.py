"""Counts the bytes of the exchange of rows between devices from its send sizes.

    python benchmarks/exchange.py [--tokens=8192]

Nothing is sent or timed. Each device has --tokens tokens, routed from normal logits by the layer's
own rule (moe/routing.py). The last table has two numberings of a pool's experts (docs/pooling.md).
Columns:

    limit    G_O * T_I * h + T_I * h values per token
    padded   values if empty places of the buffer travel too
    stay     share of rows whose expert is on their own device
    copies   share of rows sent to a device that already receives the same token
    fullest  rows of the pair of devices with the most rows, over the balanced number
"""

import argparse
import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.moe.exchange import Exchange, quota
from finermoe_jax.moe.routing import route


def routed(moe: MoEConfig, devices: int, tokens: int, skew: str) -> np.ndarray:
    """The active experts of every token, int [devices, tokens, A]."""
    key = jax.random.key(0)
    logits = jax.random.normal(key, (devices, tokens, moe.num_experts))
    if skew == "uneven":  # some experts are likelier, as with an untrained router
        logits += jax.random.normal(jax.random.key(1), (moe.num_experts,))
    experts = np.asarray(route(logits, moe, jnp.float32)[0].experts)
    return np.zeros_like(experts) if skew == "one" else experts


def plan(experts: np.ndarray, count: int) -> Exchange:
    """The exchange of these rows over `count` experts."""
    devices = experts.shape[0]
    sizes = np.stack([np.bincount(e.reshape(-1), minlength=count) for e in experts])
    rows = experts[0].size
    return Exchange(jnp.asarray(sizes), jnp.int32(0), quota(rows, devices), padded=True)


class Counts(NamedTuple):
    """Values that one token puts on the wire, and the share of rows that stay on their device.

    Rows that stay are counted as if they travelled, like in the limit G_O * T_I * h + T_I * h.
    Routing weights travel for every place of the buffer, sizes to every device.
    """

    forward: float
    backward: float
    padded: float  # forward, if empty places travel too
    stay: float


def count(model: ModelConfig, exchange: Exchange, tokens: int) -> Counts:
    """The traffic of an exchange (moe/exchange.py); `tokens` are those of all devices."""
    moe = model.moe
    assert moe is not None
    devices, rounds = exchange.sizes.shape[0], int(exchange.rounds)
    moved = [np.asarray(exchange.moved(step), np.int64).sum(axis=2) for step in range(rounds)]
    rows, again = sum(m.sum() for m in moved), sum(m.sum() for m in moved[1:])
    wide, narrow = model.hidden_size, model.expert_output_size
    places = devices**2 * exchange.quota  # of one round
    sizes = devices * exchange.sizes.size
    forward = rows * (wide + narrow) + rounds * places + sizes
    # The backward pass sends the rows and weights of later rounds again.
    backward = rows * (narrow + wide) + again * wide + (2 * rounds - 1) * places + sizes
    padded = rounds * places * (wide + narrow + 1) + sizes
    home = sum(np.trace(m) for m in moved)
    return Counts(forward / tokens, backward / tokens, padded / tokens, float(home / rows))


def pooled(
    experts: np.ndarray, count: int, across: int, foreign: float, by_layer: bool
) -> np.ndarray:
    """Numbers in a pool of `across` layers, of the same shape as `experts`, a layer's own numbers.

    A share `foreign` of the choices, at random, is of another layer's expert. The number of expert
    e of layer j is j * count + e if `by_layer`, else e * across + j.
    """
    rng = np.random.default_rng(0)
    others = rng.integers(1, across, experts.shape)
    layer = np.where(rng.random(experts.shape) < foreign, others, 0)
    return layer * count + experts if by_layer else experts * across + layer


ORDERS = {"p = e·r + j": False, "p = j·N + e": True}


def pools(sizes: list[str], tokens: int, devices: int = 8) -> None:
    """Prints a table of both numberings, for the first layer of a pool."""
    names = ("rounds", "fullest", "forward / limit", "backward / limit", "padded / limit")
    print("| from | r | other layers' experts | order | " + " | ".join(names) + " |")
    print("|" + "---|" * (4 + len(names)))
    own = routed(MoEConfig(), devices, tokens, "even")
    shares = {2: (0.0, 0.25, 0.5), 4: (0.0, 0.25, 0.75)}  # the last: all layers' alike
    cells = [(r, share, order) for r in shares for share in shares[r] for order in ORDERS]
    for size, (across, foreign, order) in itertools.product(sizes, cells):
        moe = MoEConfig()
        model = dataclasses.replace(QWEN2P5[size], moe=moe)
        experts = pooled(own, moe.num_experts, across, foreign, ORDERS[order])
        exchange = plan(experts, moe.num_experts * across)
        of_pairs = np.asarray(exchange.sizes).reshape(devices, devices, -1).sum(axis=2)
        counts = count(model, exchange, devices * tokens)
        limit = (moe.num_active + moe.active_per_group) * model.hidden_size
        ratios = (counts.forward / limit, counts.backward / limit, counts.padded / limit)
        print(f"| {size} | {across} | {foreign:.0%} | {order} | {int(exchange.rounds)} | "
              f"{of_pairs.max() / of_pairs.mean():.2f} | "
              + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")  # fmt: skip


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per device")
    parser.add_argument(
        "--sizes", default=",".join(QWEN2P5), help="dense models, separated by commas"
    )
    arguments = parser.parse_args()
    tokens, sizes = arguments.tokens, arguments.sizes.split(",")
    print("| from | devices | load | rounds | forward, values per token | forward / limit "
          "| backward / limit | padded / limit | stay | buffer / balanced |")  # fmt: skip
    print("|" + "---|" * 10)
    for size in sizes:
        model = dataclasses.replace(QWEN2P5[size], moe=MoEConfig())
        moe = model.moe
        assert moe is not None
        limit = (moe.num_active + moe.active_per_group) * model.hidden_size
        for devices in (2, 8, 32):
            for load in ("even", "uneven", "one"):
                exchange = plan(routed(moe, devices, tokens, load), moe.num_experts)
                counts = count(model, exchange, devices * tokens)
                rows = tokens * moe.num_active
                print(f"| {size} | {devices} | {load} | {int(exchange.rounds)} | "
                      f"{counts.forward:.0f} | {counts.forward / limit:.4f} | "
                      f"{counts.backward / limit:.4f} | {counts.padded / limit:.2f} | "
                      f"{counts.stay:.1%} | {exchange.quota * devices / rows:.2f} |")  # fmt: skip
    counts_of_devices = (2, 4, 8, 16, 32, 128)
    print("\n| copies | " + " | ".join(f"{n} devices" for n in counts_of_devices) + " |")
    print("|" + "---|" * (1 + len(counts_of_devices)))
    for active in (1, 2, 4):
        moe = MoEConfig(active_per_group=active)
        experts = routed(moe, 1, tokens, "even")[0]
        shares = []
        for devices in counts_of_devices:
            homes = np.sort(experts // (moe.num_experts // devices), axis=1)
            shares.append((homes[:, 1:] == homes[:, :-1]).sum() / homes.size)
        print(f"| T_I = {active} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    print()
    pools(sizes, tokens)


if __name__ == "__main__":
    main()
