"""Study: the four kinds of balancing, on the demo.

    finermoe sweep --config=configs/studies/balance.py:{sequence,batch,bias,none} --seeds=3 \\
        --workdir=runs/balance

docs/results.md has the figures. docs/howto/balance.md describes the kinds.
"""

from ml_collections import ConfigDict

from finermoe_jax import preset


def get_config(variant: str = "sequence") -> ConfigDict:
    config = preset("demo")
    config.balance.kind = variant
    config.prompts = ()
    # All checkpoints are kept, for finermoe similarity --over_steps.
    config.train.update(steps=100, eval_every=100, checkpoint_every=25, keep_checkpoints=5)
    return config
