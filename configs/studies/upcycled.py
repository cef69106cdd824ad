"""Studies on the base of configs/studies/base.py, 2.4 M parameters besides the vocabulary.

    finermoe prepare --source=build/base.txt --target=build/base_tokens --tokenizer=demo/model
    S=configs/studies/upcycled.py
    finermoe sweep --seeds=3 --workdir=runs/table1 \\
        --config=$S:{inter_out_fg,ct,s16a4,nvshard,du,c32a2,scratch,function_preserving}
    finermoe sweep --seeds=3 --workdir=runs/table1_flops \\
        --config=$S:{inter_out_fg,ct+steps65,s16a4+steps111,nvshard+steps63,du+steps41,c32a2+steps41}
    finermoe sweep --seeds=2 --workdir=runs/granularity --config=$S:{32x2,32x1,8x2,8x1,32x4,8x4}
    finermoe sweep --seeds=1 --workdir=runs/starts \\
        --config=$S:{inter_out_fg,ct,function_preserving,drop,noise,nvshard}+lr{1,2,3}
    finermoe sweep --seeds=3 --workdir=runs/copies --config=$S:{sequence,batch,bias,none}

The base is expected in runs/base, its text in build/. A variant is a list of names joined by "+".
Rates and lengths hold wherever they stand in it. All variants train on the same tokens in the same
order. docs/results.md has the figures, but for table1_flops, which was not run yet.

    inter_out_fg, ct, …    an architecture of Table 1 or 2 (docs/architectures.md), upcycled
    scratch                a dense model with as many FLOPs per token as inter_out_fg
    8x1 to 32x4            G_I x G_O from random weights, 240 steps of 1,024 tokens. The shared
                           expert's width makes the parameters that a token uses equal.
    function_preserving, drop, noise
                           another start of inter_out_fg: drop redraws half of each expert, noise
                           has a tenth of each matrix's standard deviation
    steps65                65 steps instead of 60, evaluated three times; any number can be given
    lr1, lr2, lr3          the learning rate after warm-up: 1e-4, 3e-4 (the default), 1e-3
    sequence, batch, bias, none  the kind of balancing; all checkpoints are kept
"""

import re

from ml_collections import ConfigDict

from finermoe_jax import preset
from finermoe_jax.config.presets import apply_variant

RATES = {"lr1": 1e-4, "lr2": 3e-4, "lr3": 1e-3}
KINDS = ("sequence", "batch", "bias", "none")
LAST = re.compile(r"lr[123]|steps\d+")
WIDTH, FFN, ACTIVE_FFN = 192, 512, 580


def get_config(variant: str = "inter_out_fg") -> ConfigDict:
    config = preset("demo")
    config.init_from = "runs/base"
    config.prompts = ()
    config.data.update(
        path="build/base_tokens", eval_path="build/held_out/code.txt", eval_windows=256
    )
    config.train.update(steps=60, eval_every=20, checkpoint_every=60, keep_checkpoints=1)
    config.optimizer.update(learning_rate=RATES["lr2"], final_learning_rate=RATES["lr2"] / 10)
    apply_variant(config, "inter_out_fg")
    # Rates and lengths come last: an architecture from random weights brings its own.
    for name in sorted(variant.split("+"), key=lambda name: bool(LAST.fullmatch(name))):
        _apply(config, name)
    return config


def _apply(config: ConfigDict, name: str) -> None:
    if name in RATES:
        rate = RATES[name]
        config.optimizer.update(learning_rate=rate, final_learning_rate=rate / 10)
    elif steps := re.fullmatch(r"steps(\d+)", name):
        count = int(steps[1])
        config.train.update(steps=count, eval_every=-(-count // 3), checkpoint_every=count)
    elif name in KINDS:
        config.balance.kind = name
        config.train.update(checkpoint_every=20, keep_checkpoints=4)
    elif name == "drop":
        config.upcycle.drop_ratio = 0.5
    elif name == "noise":
        config.upcycle.copy_noise = 0.1
    elif name == "scratch":
        apply_variant(config, "ct")
        _from_scratch(config, ACTIVE_FFN)
    elif re.fullmatch(r"(8|32)x[124]", name):
        _from_scratch(config, FFN)
        slices, slots = map(int, name.split("x"))
        # Random weights need many updates more than they need large batches.
        config.data.global_batch_size = 4
        config.train.update(steps=240, eval_every=60, checkpoint_every=240)
        config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-4)
        config.moe.update(
            intermediate_granularity=slices,
            output_granularity=slots,
            plain_top_k=False,
            pre_softmax=slots == 1,
            shared_expert_intermediate_size=shared_width(slices, slots),
        )
    else:
        apply_variant(config, name)


def _from_scratch(config: ConfigDict, width: int) -> None:
    config.init_from, config.data.tokenizer = "", "demo/model"
    config.dense = preset("demo_dense").dense
    config.dense.update(hidden_size=WIDTH, intermediate_size=width, num_hidden_layers=6)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4)


def shared_width(slices: int, slots: int) -> int:
    """Returns the shared expert's width with which a token uses the parameters of 32 x 2.

    Per unit of hidden size, an active expert has FFN / slices * (2 + 1 / slots) parameters, one is
    active per slot, the router has a row for each of 2 * slices * slots experts, and the shared
    expert has 3 per unit of its width.
    """

    def routed(slices: int, slots: int) -> float:
        return FFN // slices * (2 * slots + 1) + 2 * slices * slots

    return round(FFN + (routed(32, 2) - routed(slices, slots)) / 3)
