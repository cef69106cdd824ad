"""Routing ahead by 0, 1, 2 or 3 layers (docs/route_ahead.md), on the demo.

    finermoe sweep --workdir=runs/ahead --seeds=3 --config=configs/studies/ahead.py:ahead{0,1,2,3}
    python benchmarks/studies/ahead.py runs/ahead/… text.txt       # of a run of ahead0

All arms upcycle the same dense model and see the same tokens in the same order.
configs/studies/smollm2.py routes SmolLM2 ahead.
"""

import re

from ml_collections import ConfigDict

from finermoe_jax import InputError, preset


def get_config(variant: str = "ahead0") -> ConfigDict:
    found = re.fullmatch(r"ahead([0123])", variant)
    if found is None:
        raise InputError(f"unknown variant {variant!r}: give ahead0 to ahead3")
    config = preset("demo")
    config.prompts = ()
    config.moe.route_ahead = int(found[1])
    config.train.update(steps=60, eval_every=30, checkpoint_every=60, keep_checkpoints=1)
    return config
