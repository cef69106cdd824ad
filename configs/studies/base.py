"""The dense base of the studies in configs/studies/miniature.py: 4.1 M parameters beside 0.5 M for
the vocabulary, trained from scratch on code and prose.

    python benchmarks/studies/python_text.py build/base.txt --megabytes=30 --books=DIR \\
        --held_out=build/held_out
    finermoe train --config=configs/studies/base.py --workdir=runs/base

DIR holds public-domain books as .txt files; docs/results.md names those that were used. The variant
`active` has as many parameters as FineRMoE uses per token.
"""

from ml_collections import ConfigDict

from finermoe_jax import InputError, default_config

# Text and batches of all studies: 4,096 tokens a step.
DATA = dict(
    path="build/base.txt",
    eval_path="build/held_out/code.txt",
    tokenizer="demo/model",
    sequence_length=256,
    global_batch_size=16,
    eval_windows=256,
)


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "active"):
        raise InputError(f"unknown variant {variant!r}: give active, or none")
    config = default_config()
    config.moe = None
    config.dense = ConfigDict(
        dict(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=720 if variant else 640,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10_000.0,
            rms_norm_eps=1e-6,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.02,
        )
    )
    config.data.update(DATA)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-4, warmup_fraction=0.02)
    config.train.update(
        steps=2400,
        compute_dtype="float32",
        remat="dots",
        eval_every=200,
        checkpoint_every=100,
        keep_checkpoints=2,
    )
    return config
