"""Building blocks of presets: the paper's architectures by name, and Qwen's dense shapes.

`--config=configs/NAME.py:VARIANT` selects an architecture: a name, or the numbers
G_I,G_O,R_I,R_O[,T_I] (Tables 4 and 8). "+" adds an upcycling variant or a training recipe, as in
`c32a2+lean`; either may also stand alone. "+" also adds rex2 or rex4 (2 or 4 neighbouring layers
share a pool of experts) and ahead1 to ahead3 (routers read an earlier layer's input).
docs/architectures.md describes all of them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.parse import default_config
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError, near_misses


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of the paper's models; `moe` is None for a dense one."""

    about: str
    moe: MoEConfig | None
    upcycle: UpcycleConfig = PUBLISHED_UPCYCLING


def _moe(g_i: int, g_o: int, r_i: int, r_o: int, t_i: int = 1, *, shared: bool = True) -> MoEConfig:
    """Returns an MoEConfig with the paper's numbers and the routing of its training code."""
    shared_size = None if shared else 0
    return MoEConfig(
        *(g_i, g_o, r_i, r_o, t_i),
        shared_expert_intermediate_size=shared_size,
        plain_top_k=g_o == 1 and r_o > 1,  # no difference at r_o = 1
        # The HF model's softmax over one logit is constantly 1: no gradient for the router.
        pre_softmax=g_o == 1 and t_i == 1,
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "pt": Architecture("Table 1, PT: the dense model as loaded", None),
    "ct": Architecture("Table 1, CT: the dense model, trained further", None),
    "c32a2": Architecture(
        "Table 1, C32A2: sparse upcycling, 32 copies of the FFN, 2 of them active",
        _moe(1, 1, 32, 1, 2, shared=False),
    ),
    "s16a4": Architecture(
        "Table 1, S16A4: LLaMA-MoE, the FFN in 16 slices, 4 of them active",
        _moe(16, 1, 1, 1, 4, shared=False),
    ),
    "du": Architecture(
        "Table 1, DU: drop-upcycling, 8 copies of the FFN, half of each redrawn, 2 active",
        _moe(1, 1, 8, 1, 2, shared=False),
        UpcycleConfig(drop_ratio=0.5),
    ),
    "nvshard": Architecture(
        "Table 1, NVShard: 8 copies of 8 slices, 8 active, initial virtual groups",
        _moe(8, 1, 8, 1, 8, shared=False),
        UpcycleConfig(virtual_groups=True),
    ),
    "no_fg": Architecture("Table 2, No FG: whole FFNs as experts", _moe(1, 1, 1, 2, 1)),
    "inter_fg": Architecture("Table 2, Inter FG: intermediate slices", _moe(32, 1, 1, 2, 1)),
    "out_fg": Architecture("Table 2, Out FG: output slices", _moe(1, 2, 1, 2, 1)),
    "inter_out_fg": Architecture("Table 2, Inter&Out FG: FineRMoE itself", MoEConfig()),
    "separate_routers": Architecture(
        "Table 3, separate routers: a second router selects the candidate groups",
        MoEConfig(separate_routers=True),
    ),
    "add_concat_proj": Architecture(
        "Table 3, AddConcatProj: a projection after the concatenation",
        MoEConfig(concat_proj="routed"),
    ),
    "no_shared_expert": Architecture(
        "Table 3, NoShareExpert: routed experts alone", MoEConfig(shared_expert_intermediate_size=0)
    ),
}

# Upcycling variants for every architecture with a shared expert.
UPCYCLE_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "function_preserving": dict(function_preserving=True)
}

# Changes of config.moe for every architecture with experts: field and value (docs/pooling.md,
# docs/route_ahead.md).
MOE_VARIANTS: Mapping[str, tuple[str, int]] = {
    "rex2": ("experts_across", 2),
    "rex4": ("experts_across", 4),
    "ahead1": ("route_ahead", 1),
    "ahead2": ("route_ahead", 2),
    "ahead3": ("route_ahead", 3),
}

# Smallest memory per weight: bfloat16, with Adafactor's factored second moments.
LEAN_STATE: Mapping[str, Mapping[str, Any]] = {
    "optimizer": dict(name="adafactor", moment_dtype="float32"),
    "train": dict(param_dtype="bfloat16"),
}


def _lean(config: Any) -> None:
    """Fits one device of 16 GB: one short sequence per step, without gradient accumulation."""
    for group, values in LEAN_STATE.items():
        config[group].update(values)
    config.data.global_batch_size = 1
    config.data.sequence_length = min(config.data.sequence_length, 2048)
    config.train.update(remat="full", grad_accumulation=1, loss_chunk_tokens=512)


RECIPES = {"lean": _lean}


def architecture(name: str) -> Architecture:
    """Returns the architecture of a name or of the numbers G_I,G_O,R_I,R_O[,T_I].

    Raises InputError for an unknown name (with near misses) or invalid numbers.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if re.fullmatch(r"\d+(,\d+)*", name):
        numbers = [int(number) for number in name.split(",")]
        if len(numbers) not in (4, 5):
            raise InputError(
                f"{name} has {len(numbers)} numbers; an architecture needs 4 or 5: "
                "G_I,G_O,R_I,R_O[,T_I]"
            )
        return Architecture("", _moe(*numbers))
    additions = (*UPCYCLE_VARIANTS, *MOE_VARIANTS, *RECIPES)
    known = (*ARCHITECTURES, *additions)
    raise InputError(
        f"unknown variant {name!r}. {near_misses(name, known)} Or give the numbers "
        f"G_I,G_O,R_I,R_O[,T_I]; + adds {', '.join(additions[:-1])} or {additions[-1]}."
    )


def apply_variant(config: Any, variant: str) -> None:
    """Applies VARIANT of `--config=configs/NAME.py:VARIANT` to a preset in place; "" is a no-op.

    An architecture replaces config.moe and config.upcycle entirely. Raises InputError for unknown
    or empty names, for two architectures in one variant, for two values of a field, and for changes
    to the experts of a dense model.
    """
    chosen: list[str] = []
    fields: dict[str, str] = {}
    changes: list[Mapping[str, Any]] = []
    for name in variant.split("+") if variant else ():
        if name in RECIPES:
            RECIPES[name](config)
        elif name in UPCYCLE_VARIANTS:
            changes.append(UPCYCLE_VARIANTS[name])
        elif name in MOE_VARIANTS:
            other = fields.setdefault(MOE_VARIANTS[name][0], name)
            if other != name:
                raise InputError(f"variant {variant!r} asks for {other} and {name}: choose one")
        else:
            architecture(name)
            chosen.append(name)
    if len(chosen) > 1:
        raise InputError(
            f"variant {variant!r} combines the architectures {' and '.join(chosen)}; choose one"
        )
    if chosen:
        one = architecture(chosen[0])
        config.moe = one.moe and type(config)(dataclasses.asdict(one.moe), type_safe=False)
        config.upcycle.update(dataclasses.asdict(one.upcycle))
    for change in changes:
        config.upcycle.update(change)
    if fields and config.moe is None:
        raise InputError(
            f"variant {variant!r} asks for {' and '.join(fields.values())}, but the model has no "
            "experts: remove it, or choose another architecture"
        )
    for field, name in fields.items():
        config.moe.update({field: MOE_VARIANTS[name][1]})


# --- dense models and the paper's recipe ----------------------------------------------------

_QWEN: Any = dict(rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32768)

QWEN2P5 = {
    "0.5B": ModelConfig(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN,
    ),
    "1.5B": ModelConfig(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN,
    ),
    "7B": ModelConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False, **_QWEN,
    ),
}  # fmt: skip

# Not in the paper.
QWEN3 = {
    "0.6B": ModelConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        attention_bias=False, qk_norm=True, **_QWEN | {"max_position_embeddings": 40960},
    ),
}  # fmt: skip

# Global batch 2048 sequences of 8192 tokens, 50 B tokens.
_STEPS = round(50e9 / (2048 * 8192))


def qwen_config(name: str, variant: str) -> Any:
    """Returns the paper's training config for a dense model, such as Qwen2.5-0.5B or Qwen3-0.6B.

    Granularities, optimizer, schedule and batch are the defaults (config/run.py, Table 5).
    `variant` is as in `apply_variant`.
    """
    family, size = name.split("-")
    shape = dataclasses.asdict({"Qwen2.5": QWEN2P5, "Qwen3": QWEN3}[family][size])
    del shape["moe"]
    config = default_config()
    config.init_from = f"Qwen/{name}"
    config.dense = type(config)(shape)
    config.train.update(steps=_STEPS, grad_accumulation=64)
    apply_variant(config, variant)
    return config
