"""Studies of pools: experts shared by neighbouring layers (docs/pooling.md#studies).

    python benchmarks/studies/python_text.py build/python_text.txt --megabytes=2
    finermoe sweep --config=configs/studies/rex_arms.py --config=configs/studies/rex_arms.py:rex2 \\
        --seeds=3 --workdir=runs/rex

A variant is a list of names joined by "+". All arms of a form train on the same tokens in the same
order, with the same number of active experts. All but wide have the same expert parameters.

    plain         the form of ReXMoE, the default: from scratch, 16 experts, 2 active, no shared one
    fine          from scratch in FineRMoE's form (8, 2, 1, 2)
    upcycled      the demo: upcycled from its dense base
    rex2, rex4    pools of 2 or 4 layers
    candidates    moe.pooled_as=candidates (fine and upcycled)
    psr           masks random experts at first; without rex2 or rex4, of the layer's own
    foreign       masks other layers' experts at first
    depth         moe.depth_vector
    wide          no pools, but twice the experts per layer: the upper bound for rex2
"""

from ml_collections import ConfigDict

from finermoe_jax import InputError, default_config, preset

FORMS = ("plain", "fine", "upcycled")
MOE = {
    "rex2": dict(experts_across=2),
    "rex4": dict(experts_across=4),
    "candidates": dict(pooled_as="candidates"),
    "depth": dict(depth_vector=True),
    "wide": dict(intermediate_expansion=2),
}
TRAIN = {
    "psr": dict(psr="linear", psr_mask="random"),
    "foreign": dict(psr="linear", psr_mask="foreign"),
}


def get_config(variant: str = "") -> ConfigDict:
    names = variant.split("+") if variant else []
    unknown = [name for name in names if name not in (*FORMS, *MOE, *TRAIN)]
    forms = [name for name in names if name in FORMS] or ["plain"]
    if unknown or len(forms) > 1:
        raise InputError(
            f"variant {variant!r}: use at most one of {', '.join(FORMS)}, and any of "
            f"{', '.join((*MOE, *TRAIN))}"
        )
    for one, other in (("rex2", "rex4"), ("psr", "foreign")):
        if one in names and other in names:
            raise InputError(f"variant {variant!r} has {one} and {other}: choose one")
    config = default_config()
    config.data.update(
        path="build/python_text.txt",
        tokenizer="demo/model",
        sequence_length=128,
        global_batch_size=8,
        eval_windows=256,
    )
    if forms == ["upcycled"]:
        _upcycled(config)
    else:
        _from_scratch(config, forms[0])
    for name in names:
        config.moe.update(MOE.get(name, {}))
        config.train.update(TRAIN.get(name, {}))
    return config


def _upcycled(config: ConfigDict) -> None:
    config.init_from = "demo/model"
    config.data.update(
        path="demo/pydoc_small.txt",
        tokenizer="",
        sequence_length=256,
        global_batch_size=16,
        eval_windows=64,
    )
    config.moe.update(intermediate_granularity=8, output_granularity=2)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_fraction=0.05)
    config.train.update(steps=150, compute_dtype="float32", remat="dots", eval_every=75)


def _from_scratch(config: ConfigDict, form: str) -> None:
    config.dense = preset("demo_dense").dense
    config.dense.update(num_hidden_layers=8, intermediate_size=1024 if form == "plain" else 512)
    if form == "plain":
        config.moe.update(
            intermediate_granularity=16,
            output_granularity=1,
            output_expansion=1,
            active_per_group=2,
            shared_expert_intermediate_size=0,
        )
    else:
        config.moe.update(intermediate_granularity=8, output_granularity=2)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup_fraction=0.05)
    config.train.update(
        steps=240, compute_dtype="float32", remat="dots", eval_every=120, checkpoint_every=240
    )
