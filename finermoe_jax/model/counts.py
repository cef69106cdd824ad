"""Parameter counts, without weights or devices."""

import dataclasses
import math

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.model.decoder import parameter_kinds, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters: total, and used by one token."""

    total: int
    active: int


def true_counts(config: ModelConfig) -> Counts:
    """Counts every parameter once, including embeddings.

    Active parameters include A of the N routed experts of each MoE layer.
    """
    total = active = 0
    kinds = parameter_kinds(config)
    for path, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        total += size
        if kinds[path].bank:
            assert config.moe is not None
            size = size // config.moe.num_experts * config.moe.num_active
        active += size
    return Counts(total, active)
