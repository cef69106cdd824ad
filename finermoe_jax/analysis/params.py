"""Parameter counts and sharding tables, without weights or devices."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import RunConfig
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import axes_of
from finermoe_jax.model.counts import Counts, true_counts
from finermoe_jax.model.decoder import with_shapes
from finermoe_jax.runtime.buckets import locate
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import adds_pools, routed_ahead, upcycled_config


def run_model(config: RunConfig) -> ModelConfig:
    """Returns the config of the model that a run trains.

    Raises InputError if init_from, whose sizes stand for a missing config.dense, holds no model.
    """
    if not config.init_from:
        assert config.dense is not None
        return dataclasses.replace(config.dense, moe=config.moe)
    model = config.dense or open_model(locate(config.init_from)).config
    if config.moe is None:
        return model
    if model.moe is None:
        return upcycled_config(model, config.moe)
    model = routed_ahead(model, config.moe)
    assert model.moe is not None
    moe = config.moe if adds_pools(model, config.moe) else model.moe
    biased = model.moe.selection_bias or config.moe.selection_bias
    return dataclasses.replace(model, moe=dataclasses.replace(moe, selection_bias=biased))


def sharding_table(config: RunConfig, model: ModelConfig, devices: int = 0) -> str:
    """Formats every parameter's shape, logical axes, PartitionSpec and bytes per device.

    `devices`: number of devices; 0: the product of the mesh's sizes, counting -1 as 1. Raises
    InputError if the mesh's sizes do not multiply to it.
    """
    sizes = sharding.mesh_sizes(config.mesh, devices or sharding.least_devices(config.mesh))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    decoder = with_shapes(model)
    shardings, notes = sharding.param_shardings(decoder, mesh)
    placed = nnx.traversals.flatten_mapping(shardings)
    lines, total, width = [], 0, jnp.dtype(config.train.param_dtype).itemsize
    for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        size = math.prod(placed[path].shard_shape(variable.shape)) * width
        total += size
        lines.append(
            f"{'/'.join(map(str, path)):<36} {'x'.join(map(str, variable.shape)):<18} "
            f"{' '.join(axes_of(variable)):<36} "
            f"{_partition(placed[path].spec):<34} {size:>15,}"
        )
    head = f"mesh {sizes} · {config.train.param_dtype} · last column: bytes per device"
    return "\n".join(
        [head, *lines, f"{total:,} bytes per device ({total / 2**30:.2f} GiB)", *notes]
    )


def _partition(spec: PartitionSpec) -> str:
    entries = ("*".join(e) if isinstance(e, tuple) else e or "-" for e in spec)
    return f"({', '.join(entries)})"


def paper_counts(config: ModelConfig) -> Counts:
    """Counts by the paper's formula, which reproduces its tables to the printed digit.

    It counts router and norms twice and omits biases and the shared gate. A tied embedding counts
    once in dense rows only.
    """
    h, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    attention = 1 + config.num_key_value_heads / config.num_attention_heads

    def count(experts_part: float, ffn: int, embeddings: int) -> int:
        inner = attention + 1.5 * ffn / h + experts_part + 2 / h + 1 / (layers * h)
        return round(2 * layers * h * h * inner) + embeddings * vocab * h

    moe = config.moe
    if moe is None:
        size = count(0.0, config.intermediate_size, 1 if config.tie_word_embeddings else 2)
        return Counts(size, size)
    width = config.expert_intermediate_size

    def experts(n: int) -> float:
        return n * width / h + n * width / (2 * h * moe.output_granularity) + moe.pool_size / h

    shared = config.shared_expert_size
    return Counts(
        count(experts(moe.num_experts), shared, 2), count(experts(moe.num_active), shared, 2)
    )


def table(rows: dict[str, ModelConfig]) -> str:
    """Formats a table of the counts, in billions, or in millions if all are below 0.1 billion."""
    counts = {name: (true_counts(c), paper_counts(c)) for name, c in rows.items()}
    small = max(true.total for true, _ in counts.values()) < 1e8
    unit, letter = (1e6, "M") if small else (1e9, "B")
    lines = [
        f"{'':<24}{'true total':>12}{'active':>10}{'by the paper: total':>22}{'active':>9}  experts"
    ]
    for name, (true, paper) in counts.items():
        moe = rows[name].moe
        experts = f"{moe.num_experts} ({moe.num_active} active)" if moe else "dense"
        lines.append(
            f"{name:<24}{true.total / unit:>11.4f}{letter}{true.active / unit:>9.4f}{letter}"
            f"{paper.total / unit:>21.2f}{letter}{paper.active / unit:>8.2f}{letter}  {experts}"
        )
    return "\n".join(lines)


def published_models() -> dict[str, ModelConfig]:
    """Returns the dense Qwen2.5 models and their upcycled published versions, by name."""
    rows: dict[str, ModelConfig] = {}
    for size, dense in QWEN2P5.items():
        rows[f"Qwen2.5-{size}"] = dense
        rows[f"FineRMoE from {size}"] = upcycled_config(dense, MoEConfig())
    return rows
