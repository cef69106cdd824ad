"""Makes the directories beside this file with transformers' own models, on random weights.

    pip install torch==2.13.0 transformers==5.23.0     # Python 3.11
    python tests/recorded/dense/make.py

Each holds config.json and model.safetensors as save_pretrained writes them, and golden.safetensors:
input_ids [2, 24]; logits [2, 24, V]; left_pad.mask and left_pad.logits, row 1 padded by 5 tokens;
sequences [2, 40], the greedy continuation of the first 24 tokens with transformers' KV cache.
All float32, eager attention.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# No two widths are equal, so that a transposition shows.
SIZES = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=3, head_dim=10, max_position_embeddings=64,
    pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
)  # fmt: skip
# As Qwen3 and Mistral allow and Llama does not: a width that is no multiple of the heads.
UNEVEN = SIZES | {"num_attention_heads": 9}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
# Of the five frequencies the fastest stays, the next is stretched in part, the others in full.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e2, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
}  # fmt: skip
# The texts are longer than the original context. Of the five frequencies the fastest stays, the
# next is stretched in part, the others in full.
YARN = {
    "rope_type": "yarn", "rope_theta": 1e2, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}
SHORT = SIZES | {"max_position_embeddings": 16}
CASES = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_parameters=PLAIN),
    ),
    "llama3_tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**UNEVEN, rms_norm_eps=1e-5, rope_parameters=PLAIN, sliding_window=None),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**UNEVEN, rms_norm_eps=1e-3, rope_parameters=PLAIN),
    ),
    "qwen3_tied": (
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, rms_norm_eps=1e-6, rope_parameters=PLAIN, tie_word_embeddings=True),
    ),
    "qwen2_yarn": (Qwen2ForCausalLM, Qwen2Config(**SHORT, rope_parameters=YARN)),
    "llama_linear": (LlamaForCausalLM, LlamaConfig(**SHORT, rope_parameters=LINEAR)),
}


def main() -> None:
    for seed, (name, (kind, config)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                # Small weights and norms of one would hide most errors.
                if path.endswith("norm.weight"):
                    weight.copy_(1 + 0.3 * torch.randn(weight.shape))
                else:
                    weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
            ids = torch.randint(config.vocab_size, (2, 24))
            mask = torch.ones_like(ids)
            mask[1, :5] = 0
            golden = {
                "input_ids": ids.int(),
                "logits": model(ids).logits,
                "left_pad.mask": mask.int(),
                "left_pad.logits": model(
                    ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
                ).logits,
                "sequences": model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
                ).int(),
            }
            scores = model(golden["sequences"].long()).logits[:, 23:-1].topk(2).values
            print(name, "smallest gap of a greedy step:", (scores[..., 0] - scores[..., 1]).min())
        folder = Path(__file__).parent / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")


if __name__ == "__main__":
    main()
