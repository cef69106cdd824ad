"""Muon beside AdamW at three learning rates each, on the demo.

    finermoe sweep --workdir=runs/muon --seeds=1 \\
        --config=configs/studies/muon.py:{adamw,muon}_lr{1,2,3}

docs/results.md has the figures. configs/studies/smollm2.py has Muon on SmolLM2.
"""

import re

from ml_collections import ConfigDict

from finermoe_jax import InputError, preset

# Learning rates after warm-up. The second is the preset's.
RATES = (3e-4, 1e-3, 3e-3)


def get_config(variant: str = "muon_lr2") -> ConfigDict:
    found = re.fullmatch(r"(adamw|muon)_lr([123])", variant)
    if found is None:
        raise InputError(
            f"unknown variant {variant!r}: give adamw_lr1 to adamw_lr3, or muon_lr1 to muon_lr3"
        )
    rate = RATES[int(found[2]) - 1]
    config = preset("demo")
    config.prompts = ()
    config.optimizer.update(name=found[1], learning_rate=rate, final_learning_rate=rate / 10)
    config.train.update(steps=60, eval_every=30, checkpoint_every=60, keep_checkpoints=1)
    return config
