"""FineRMoE in JAX: experts fine in two dimensions, upcycled from dense Qwen2.5 models."""

from finermoe_jax.checkpoint import load_checkpoint, save_checkpoint
from finermoe_jax.config import ModelConfig, MoEConfig, UpcycleConfig
from finermoe_jax.errors import InputError
from finermoe_jax.generation import generate
from finermoe_jax.hf_weights import load_hf, save_hf
from finermoe_jax.model import Decoder, with_layer
from finermoe_jax.moe import FineRMoE
from finermoe_jax.presets import preset
from finermoe_jax.run_settings import RunConfig, default_config, run_config
from finermoe_jax.upcycle import upcycle, upcycle_model

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "FineRMoE",
    "InputError",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "UpcycleConfig",
    "default_config",
    "generate",
    "load_checkpoint",
    "load_hf",
    "preset",
    "run_config",
    "save_checkpoint",
    "save_hf",
    "upcycle",
    "upcycle_model",
    "with_layer",
]
