"""A dense base to upcycle in studies: 2.4 M parameters, and 0.4 M for the vocabulary.

    python benchmarks/studies/python_text.py build/base.txt --megabytes=30 --books=DIR \\
        --held_out=build/held_out
    finermoe train --config=configs/studies/base.py --workdir=runs/base

It is trained from scratch on code and prose, 5.7 M tokens. DIR holds public-domain books as .txt
files. The variant `active` has as many parameters as a FineRMoE from this base uses per token; it
was not trained yet.
"""

from ml_collections import ConfigDict

from finermoe_jax import InputError, preset


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "active"):
        raise InputError(f"unknown variant {variant!r}: give active, or none")
    config = preset("demo_dense")
    config.prompts = ()
    width = 580 if variant else 512
    config.dense.update(hidden_size=192, intermediate_size=width, num_hidden_layers=6)
    config.data.update(path="build/base.txt", eval_path="build/held_out/code.txt", eval_windows=256)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-4, warmup_fraction=0.02)
    config.train.update(steps=1400, eval_every=200, checkpoint_every=100, keep_checkpoints=2)
    return config
