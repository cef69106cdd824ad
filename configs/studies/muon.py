"""Muon beside AdamW at three learning rates each, on the demo or on SmolLM2.

    finermoe sweep --workdir=runs/muon --seeds=1 \\
        --config=configs/studies/muon.py:{adamw,muon}_lr{1,2,3}

`smollm2_` in front of a variant's name, as in smollm2_muon_lr2, takes SmolLM2-135M instead.
docs/results.md has the demo's figures.
"""

import re

from ml_collections import ConfigDict

from finermoe_jax import InputError, preset

# Learning rates after warm-up. The second is the preset's.
RATES = {"demo": (3e-4, 1e-3, 3e-3), "smollm2_135m": (6e-5, 2e-4, 6e-4)}


def get_config(variant: str = "muon_lr2") -> ConfigDict:
    found = re.fullmatch(r"(smollm2_)?(adamw|muon)_lr([123])", variant)
    if found is None:
        raise InputError(
            f"unknown variant {variant!r}: give adamw_lr1 to adamw_lr3, muon_lr1 to muon_lr3, or "
            "one of these after smollm2_"
        )
    name = "smollm2_135m" if found[1] else "demo"
    rate = RATES[name][int(found[3]) - 1]
    config = preset(name)
    config.prompts = ()
    config.optimizer.update(name=found[2], learning_rate=rate, final_learning_rate=rate / 10)
    config.train.update(steps=60, eval_every=30, checkpoint_every=60, keep_checkpoints=1)
    return config
