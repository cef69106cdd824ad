"""The demo and its dense base, each at three learning rates.

    finermoe sweep --seeds=3 --workdir=runs/demo_rates \\
        --config=configs/studies/demo_rates.py:{finermoe,ct}+lr{1,2,3}

lr1, lr2 and lr3 are the rates after warm-up: 1e-4, 3e-4 and 1e-3, the demo's own. The rate falls to
a tenth. docs/results.md has the figures.
"""

from ml_collections import ConfigDict

from finermoe_jax import InputError, preset

RATES = {"lr1": 1e-4, "lr2": 3e-4, "lr3": 1e-3}


def get_config(variant: str = "finermoe+lr3") -> ConfigDict:
    model, _, rate = variant.partition("+")
    if model not in ("finermoe", "ct") or rate not in RATES:
        raise InputError(f"unknown variant {variant!r}: give finermoe or ct, +lr1, +lr2 or +lr3")
    config = preset("demo:ct" if model == "ct" else "demo")
    config.prompts = ()
    config.optimizer.update(learning_rate=RATES[rate], final_learning_rate=RATES[rate] / 10)
    return config
