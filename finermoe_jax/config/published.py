"""Dense shapes of Qwen's models and the paper's recipe (Table 5), for configs/qwen*.py."""

import dataclasses
from typing import Any

from finermoe_jax.config.architectures import apply_variant
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.run import default_config

_QWEN: Any = dict(rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32768)

QWEN2P5 = {
    "0.5B": ModelConfig(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN,
    ),
    "1.5B": ModelConfig(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN,
    ),
    "7B": ModelConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False, **_QWEN,
    ),
}  # fmt: skip

# Not of the paper.
QWEN3 = {
    "0.6B": ModelConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        attention_bias=False, qk_norm=True, **_QWEN | {"max_position_embeddings": 40960},
    ),
}  # fmt: skip

# Global batch 2048 sequences of 8192 tokens, 50 B tokens.
_STEPS = round(50e9 / (2048 * 8192))


def qwen_config(size: str, variant: str) -> Any:
    """The run that made FineRMoE from Qwen2.5-{size}.

    Variants are those of finermoe_jax/config/architectures.py. Granularities, optimizer,
    schedule and batch are the defaults of finermoe_jax/config/run.py.
    """
    return _recipe(f"Qwen/Qwen2.5-{size}", QWEN2P5[size], variant)


def qwen3_config(size: str, variant: str) -> Any:
    """The same run from Qwen3-{size}."""
    return _recipe(f"Qwen/Qwen3-{size}", QWEN3[size], variant)


def _recipe(source: str, dense: ModelConfig, variant: str) -> Any:
    config = default_config()
    config.init_from = source
    shape = dataclasses.asdict(dense)
    del shape["moe"]
    config.model = type(config)(shape)
    config.train.update(steps=_STEPS, grad_accumulation=64)
    apply_variant(config, variant)
    return config
