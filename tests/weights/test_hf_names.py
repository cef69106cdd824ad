"""Names and shapes of the published models' tensors, against a list written from the paper."""

import math

import pytest

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.model.decoder import parameter_shapes
from finermoe_jax.weights.hf_config import model_config_from_hf, model_config_to_hf
from finermoe_jax.weights.hf_names import parts
from finermoe_jax.weights.upcycle import upcycled_config

# The dense model; h, H, layers, query heads, kv heads, vocabulary; H / 32; 1e-4 billions in all.
PUBLISHED = [
    ("0.5B", (896, 4864, 24, 14, 2, 151936), 152, 1.6789),
    ("1.5B", (1536, 8960, 28, 12, 2, 151936), 280, 5.6362),
    ("7B", (3584, 18944, 28, 28, 4, 152064), 592, 26.6392),
]


def published_tensors(h, H, layers, heads, kv_heads, vocabulary):
    """(name, [out, in]) of 128 experts, 32 slices and 2 slots of 2 candidates, a shared expert."""
    keys = kv_heads * (h // heads)
    yield "model.embed_tokens.weight", (vocabulary, h)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocabulary, h)
    for layer in range(layers):
        of_layer = {
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (h, h),
            "self_attn.q_proj.bias": (h,),
            "self_attn.k_proj.weight": (keys, h),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.weight": (keys, h),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate.weight": (128, h),
            "mlp.shared_expert.gate_proj.weight": (H, h),
            "mlp.shared_expert.up_proj.weight": (H, h),
            "mlp.shared_expert.down_proj.weight": (h, H),
            "mlp.shared_expert_gate.weight": (1, h),
        }
        for expert in range(128):
            of_layer[f"mlp.experts.{expert}.gate_proj.weight"] = (H // 32, h)
            of_layer[f"mlp.experts.{expert}.up_proj.weight"] = (H // 32, h)
            of_layer[f"mlp.experts.{expert}.down_proj.weight"] = (h // 2, H // 32)
        for name, shape in of_layer.items():
            yield f"model.layers.{layer}.{name}", shape


@pytest.mark.slow
@pytest.mark.parametrize(("size", "numbers", "expert", "billions"), PUBLISHED)
def test_published_layouts(size, numbers, expert, billions):
    config = upcycled_config(QWEN2P5[size], MoEConfig())
    shapes = parameter_shapes(config)
    found = [
        tensor
        for path, where in parts(config, list(shapes)).items()
        for tensor in where.shapes(shapes[path])
    ]
    wanted = dict(published_tensors(*numbers))
    assert len(wanted) == numbers[2] * (14 + 3 * 128) + 3
    assert len(found) == len(wanted) and dict(found) == wanted
    assert round(sum(math.prod(shape) for shape in wanted.values()) / 1e9, 4) == billions
    values = model_config_to_hf(config, "bfloat16")
    stated = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "G_I", "G_O")
    assert [values[key] for key in stated] == [128, 2, expert, 32, 2]
    assert (values["R_I"], values["R_O"], values["tie_word_embeddings"]) == (1, 2, False)
    again = model_config_from_hf(values, "config.json")
    assert parameter_shapes(again) == shapes
