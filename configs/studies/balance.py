"""Study: the four kinds of balancing, the z-loss, and a router that does not learn, on the demo.

    finermoe sweep --seeds=3 --workdir=runs/balance \\
        --config=configs/studies/balance.py:{sequence,batch,bias,none,z_loss,frozen}

`z_loss` adds the router z-loss to `sequence`. `frozen` is `sequence` with the router frozen.
docs/results.md has the figures. docs/howto/balance.md describes the kinds.
"""

from ml_collections import ConfigDict

from finermoe_jax import preset


def get_config(variant: str = "sequence") -> ConfigDict:
    config = preset("demo")
    if variant == "z_loss":
        config.balance.z_loss = 0.001
    elif variant == "frozen":
        config.train.freeze = ("router",)
    else:
        config.balance.kind = variant
    config.prompts = ()
    # All checkpoints are kept, for finermoe similarity --over_steps.
    config.train.update(steps=100, eval_every=100, checkpoint_every=25, keep_checkpoints=5)
    return config
