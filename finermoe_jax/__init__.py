"""FineRMoE in JAX: experts fine in two dimensions, upcycled from dense Qwen2.5 models."""

from finermoe_jax.config.model import ModelConfig, MoEConfig, UpcycleConfig
from finermoe_jax.config.parse import preset
from finermoe_jax.config.run import RunConfig, default_config, run_config
from finermoe_jax.errors import InputError
from finermoe_jax.generation.decode import generate
from finermoe_jax.model.decoder import Decoder, with_layer
from finermoe_jax.moe.layer import FineRMoE
from finermoe_jax.weights.checkpoint import load_checkpoint, save_checkpoint
from finermoe_jax.weights.hf_weights import load_hf, save_hf
from finermoe_jax.weights.upcycle import upcycle, upcycle_model

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
