"""SmolLM2-135M upcycled to 128 experts: optimizers, routing ahead and pools, 60 steps each.

    finermoe sweep --workdir=runs/smollm2 --seeds=1 --config.init_from=models/smollm2_135m \\
        --config=configs/studies/smollm2.py \\
        --config=configs/studies/smollm2.py:{lr1,lr3,muon,muon+lr1,muon+lr3,ahead1,ahead2,ahead3,rex2}

configs/smollm2_135m.py says how to get the weights. All variants train on the same 512 tokens per
step, in the same order. A variant is a list of names joined by "+"; none means the preset, AdamW at
2e-4. docs/results.md has the figures.

    lr1, lr3          the learning rate after warm-up: 6e-5 or 6e-4
    muon              Muon instead of AdamW
    ahead1 to ahead3  moe.route_ahead
    rex2              pools of two layers
    foreign           masks other layers' experts at first
    ct                the dense model, trained on the same tokens
    steps200          200 steps instead of 60, evaluated five times; any multiple of 10 can be given

A longer run against the dense model:

    finermoe sweep --workdir=runs/smollm2_long --seeds=1 --config.init_from=models/smollm2_135m \\
        --config=configs/studies/smollm2.py:{steps200,ct+steps200}
"""

import re

from ml_collections import ConfigDict

from finermoe_jax import preset
from finermoe_jax.config.presets import apply_variant

RATES = {"lr1": 6e-5, "lr3": 6e-4}


def get_config(variant: str = "") -> ConfigDict:
    config = preset("smollm2_135m")
    config.prompts = ()
    config.data.global_batch_size = 1
    config.train.update(eval_every=30)
    for name in variant.split("+") if variant else ():
        if name in RATES:
            config.optimizer.update(learning_rate=RATES[name], final_learning_rate=RATES[name] / 10)
        elif steps := re.fullmatch(r"steps(\d+)", name):
            config.train.update(steps=int(steps[1]), eval_every=int(steps[1]) // 5)
            config.train.checkpoint_every = int(steps[1])
        elif name == "muon":
            config.optimizer.name = "muon"
        elif name == "foreign":
            config.train.update(psr="linear", psr_mask="foreign")
        else:
            apply_variant(config, name)
    return config
