"""What the exchange of rows between experts' devices moves, counted from its send sizes.

    python benchmarks/exchange.py

Tokens are routed by the layer's own rule (finermoe_jax/routing.py) from normal logits, 8192 on each
device; nothing is timed and nothing is sent. "stay" is the share of rows whose expert is on their
own device. "copies" is how often a token is sent to a device that it goes to already.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from finermoe_jax.config import ModelConfig, MoEConfig
from finermoe_jax.expert_parallel import Exchange, quota
from finermoe_jax.published import QWEN2P5
from finermoe_jax.routing import route

TOKENS = 8192


def routed(moe: MoEConfig, devices: int, skew: str) -> np.ndarray:
    """The experts [devices, TOKENS, A] of every token."""
    key = jax.random.key(0)
    logits = jax.random.normal(key, (devices, TOKENS, moe.num_experts))
    if skew == "uneven":  # a load as of an untrained router: a few experts are much liked
        logits += jax.random.normal(jax.random.key(1), (moe.num_experts,))
    experts = np.asarray(route(logits, moe, jnp.float32)[0].experts)
    return np.zeros_like(experts) if skew == "one" else experts


def plan(experts: np.ndarray, count: int) -> Exchange:
    """The exchange of those rows."""
    devices = experts.shape[0]
    sizes = np.stack([np.bincount(e.reshape(-1), minlength=count) for e in experts])
    rows = experts[0].size
    return Exchange(jnp.asarray(sizes), jnp.int32(0), quota(rows, devices))


def values_per_token(model: ModelConfig, exchange: Exchange) -> tuple[float, float]:
    """Values that one token causes on the wire in a forward pass, and the share of rows that stay.

    Rows that stay are counted as if they travelled, so that the figure can be held against
    G_O * T_I * h + T_I * h; weights travel to every place of the buffer, sizes to every device.
    """
    moe = model.moe
    assert moe is not None
    devices = exchange.sizes.shape[0]
    rounds = int(exchange.rounds)
    moved = sum(np.asarray(exchange.moved(step), np.int64) for step in range(rounds))
    row_values = moved.sum() * (model.hidden_size + model.expert_output_size)
    weights = rounds * devices**2 * exchange.quota
    sizes = devices * exchange.sizes.size
    total = (row_values + weights + sizes) / (devices * TOKENS)
    return total, float(np.trace(moved) / moved.sum())


def main() -> None:
    """Prints the tables as Markdown."""
    print("| from | devices | load | rounds | values per token | / (G_O T_I h + T_I h) "
          "| stay | buffer / balanced |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for size, dense in QWEN2P5.items():
        model = dataclasses.replace(dense, moe=MoEConfig())
        moe = model.moe
        assert moe is not None
        limit = (moe.num_active + moe.active_per_group) * model.hidden_size
        for devices in (2, 8, 32):
            for load in ("even", "uneven", "one"):
                exchange = plan(routed(moe, devices, load), moe.num_experts)
                total, stay = values_per_token(model, exchange)
                rows = TOKENS * moe.num_active
                print(f"| {size} | {devices} | {load} | {int(exchange.rounds)} | {total:.0f} | "
                      f"{total / limit:.4f} | {stay:.1%} | "
                      f"{exchange.quota * devices / rows:.2f} |")  # fmt: skip
    print("\n| T_I | devices | copies of a token to a device that has it |\n|---|---|---|")
    for active in (1, 2, 4):
        moe = MoEConfig(active_per_group=active)
        for devices in (2, 4, 8, 16, 32, 128):
            experts = routed(moe, 1, "even")[0]
            homes = np.sort(experts // (moe.num_experts // devices), axis=1)
            copies = (homes[:, 1:] == homes[:, :-1]).sum() / homes.size
            print(f"| {active} | {devices} | {copies:.1%} |")


if __name__ == "__main__":
    main()
