"""config.json of Hugging Face directories to ModelConfig and back."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from finermoe_jax.config.model import ROPE_FIELDS, ModelConfig, MoEConfig, RopeScaling
from finermoe_jax.errors import InputError

FINERMOE_TYPE, FINERMOE_ARCHITECTURE = "finer_moe", "FineRMoeForCausalLM"
# Where transformers finds the model's code inside an exported directory. Only transformers reads
# this, and runs that code only when its caller sets trust_remote_code.
AUTO_MAP = {
    "AutoConfig": "configuration_finer_moe.FineRMoeConfig",
    "AutoModel": "modeling_finer_moe.FineRMoeModel",
    "AutoModelForCausalLM": "modeling_finer_moe.FineRMoeForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """A model_type beside the others; of equal dense ones the first is exported."""

    architecture: str
    attention_bias: bool
    qk_norm: bool
    # What transformers takes where config.json is silent; key/value heads None: all heads.
    kv_heads: int | None
    positions: int
    head_dim: int | None = None


_DENSE = {
    "qwen2": _Family("Qwen2ForCausalLM", True, False, kv_heads=32, positions=32768),
    "llama": _Family("LlamaForCausalLM", False, False, kv_heads=None, positions=2048),
    "mistral": _Family("MistralForCausalLM", False, False, kv_heads=8, positions=131072),
    "qwen3": _Family("Qwen3ForCausalLM", False, True, kv_heads=32, positions=32768, head_dim=128),
}
# The published model is a Qwen2 with experts.
_FAMILIES = _DENSE | {
    FINERMOE_TYPE: _Family(FINERMOE_ARCHITECTURE, True, False, kv_heads=None, positions=32768)
}
SUPPORTED_TYPES = tuple(_FAMILIES)
# Of Mistral, and of Qwen's layers from the second number on; again where config.json is silent.
_WINDOW, _FIRST_WINDOWED_LAYER, _SWITCH = 4096, 28, "use_sliding_window"
_ORIGINAL = "original_max_position_embeddings"


class _Fields:
    """Typed access to a config.json; a missing or ill-typed key is an InputError."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.where}: {key}={value!r} must be an integer")
        if abs(value) >= 1 << 63:
            digits = len(str(abs(value)))
            raise InputError(f"{self.where}: {key} has {digits} digits; it must fit 64 bits")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{self.where}: {key}={value!r} must be a number")
        try:
            number = float(value)
        except OverflowError:  # an integer of more digits
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise InputError(f"{self.where}: {key}={value!r} must be positive and finite")
        return number

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}={value!r} must be true or false")
        return value


def model_config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture of a config.json (qwen2, qwen3, llama, mistral or finer_moe).

    A silent key gets the value that transformers takes for the family. Raises InputError for other
    architectures, for features this decoder does not compute (rotary embeddings of other types than
    RopeType, sliding windows, biases of o_proj or the FFN, other activations), and for numbers that
    contradict each other, naming both.
    """
    fields = _Fields(values, where)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in SUPPORTED_TYPES:
        raise InputError(
            f"{where}: model_type={kind!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_TYPES)}"
        )
    family = _FAMILIES[kind]
    _refuse_unsupported(fields, kind)
    theta, scaling = _rope(fields)
    heads = fields.integer("num_attention_heads")
    kv_heads = heads
    if values.get("num_key_value_heads", 0) is not None:  # null: as many
        kv_heads = fields.integer("num_key_value_heads", family.kv_heads or heads)
    moe = _moe_config(fields) if kind == FINERMOE_TYPE else None
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings", family.positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=family.attention_bias if moe is None else fields.flag("qkv_bias", True),
        qk_norm=family.qk_norm if moe is None else fields.flag("qk_norm", False),
        head_dim=family.head_dim if values.get("head_dim") is None else fields.integer("head_dim"),
        rope_scaling=scaling,
        moe=moe,
    )
    if moe is not None:
        size = fields.integer("moe_intermediate_size", config.expert_intermediate_size)
        if size != config.expert_intermediate_size:
            raise InputError(
                f"{where}: moe_intermediate_size={size}, but intermediate_size="
                f"{config.intermediate_size} / G_I={moe.intermediate_granularity} = "
                f"{config.expert_intermediate_size}"
            )
    return config


def _refuse_unsupported(fields: _Fields, kind: str) -> None:
    """Raises InputError for features that this decoder does not compute."""
    activation = fields.values.get("hidden_act", "silu")
    for key, value, unsupported in (
        ("hidden_act", activation, activation not in ("silu", "swish")),  # two names of one
        ("mlp_bias", True, fields.flag("mlp_bias", False)),
    ):
        if unsupported:
            raise InputError(f"{fields.where}: {key}={value!r} is not supported")
    _refuse_windows(fields, kind)
    # Of Qwen2 the key is not read: it has biases always, and never on o_proj.
    if kind != "qwen2" and fields.flag("attention_bias", False):
        raise InputError(
            f"{fields.where}: attention_bias=True is not supported: with it o_proj has a bias, too"
        )


def _refuse_windows(fields: _Fields, kind: str) -> None:
    """Raises InputError where a layer's attention reaches back a window only."""
    kinds = fields.values.get("layer_types")
    kinds = [] if kinds is None else kinds
    if not isinstance(kinds, list) or any(layer != "full_attention" for layer in kinds):
        raise InputError(f"{fields.where}: layer_types={kinds!r} is not supported")
    window, why = fields.values.get("sliding_window", _WINDOW), ""
    if kind == "llama" or window is None:  # Llama has none, whatever its keys say
        return
    if kind != "mistral":
        layers, switched = fields.integer("num_hidden_layers"), fields.flag(_SWITCH, False)
        first = fields.integer("max_window_layers", _FIRST_WINDOWED_LAYER)
        if not switched or kinds or first >= layers:
            return
        why = f" in the layers from max_window_layers={first} on ({_SWITCH}=True)"
    raise InputError(f"{fields.where}: sliding_window={window!r}{why} is not supported")


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of rotary embeddings.

    Raises InputError for what is not known of them, since it may change the computation.
    """
    stated, rope = _stated_rope(fields)
    kind = rope.pop("rope_type", "default")
    fit = [*itertools.chain(*ROPE_FIELDS[kind])] if kind in list(ROPE_FIELDS) else []
    beside = fields.values.get(_ORIGINAL)
    if beside is not None and _ORIGINAL in fit and rope.setdefault(_ORIGINAL, beside) != beside:
        raise InputError(
            f"{fields.where}: {_ORIGINAL}={beside!r} and {stated} contradict each other: leave out "
            "the one that the model was not trained with"
        )
    whole = rope.pop("partial_rotary_factor", 1) == 1
    strange = {name: rope[name] for name in rope if name not in ("rope_theta", *fit)}
    if kind not in ["default", *ROPE_FIELDS] or strange or not whole:
        what = f" with {strange!r}" if strange else ""
        raise InputError(
            f"{fields.where}: {stated}: rotary embeddings of rope_type={kind!r}{what} are not "
            f"supported; supported are the types default, {', '.join(ROPE_FIELDS)}, over the whole "
            "head"
        )
    theta = _Fields({"rope_theta": 10000.0, **rope}, fields.where).number("rope_theta")
    read = _Fields(rope, f"{fields.where}: {stated}")
    if kind == "default":
        return theta, None
    # What is not stated stays so: versions of transformers differ in what that means.
    numbers: dict[str, Any] = {
        name: read.integer(name) if name == _ORIGINAL else read.number(name)
        for name in fit
        if name != "truncate" and (name in rope or name in ROPE_FIELDS[kind][0])
    }
    truncate = read.flag("truncate", True) if "truncate" in rope else None
    return theta, RopeScaling(rope_type=kind, truncate=truncate, **numbers)


def _stated_rope(fields: _Fields) -> tuple[str, dict[str, Any]]:
    """Every value that is stated of rotary embeddings, as it stands there and by its name.

    Published files carry rope_theta and rope_scaling, transformers 5 writes rope_parameters. Raises
    InputError where they contradict each other.
    """
    keys = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
    given = {key: fields.values[key] for key in keys if fields.values.get(key) is not None}
    stated = ", ".join(f"{key}={value!r}" for key, value in given.items())
    rope: dict[str, Any] = {}
    for key, value in given.items():
        for name, one in value.items() if isinstance(value, Mapping) else [(key, value)]:
            name = "rope_type" if name == "type" else name
            if one is not None and rope.setdefault(name, one) != one:
                raise InputError(
                    f"{fields.where}: {stated} state both {name}={rope[name]!r} and {one!r}: leave "
                    "out the one that the model was not trained with"
                )
    return stated, rope


def _moe_config(fields: _Fields) -> MoEConfig:
    slots = fields.integer("G_O")
    active = fields.integer("num_experts_per_tok")
    if slots < 1 or active < 1 or active % slots:
        raise InputError(
            f"{fields.where}: num_experts_per_tok={active} must be a positive multiple of "
            f"G_O={slots}"
        )
    layers = fields.values.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f"{fields.where}: mlp_only_layers={layers!r} must be a list of integers")
    moe = MoEConfig(
        intermediate_granularity=fields.integer("G_I"),
        output_granularity=slots,
        intermediate_expansion=fields.integer("R_I"),
        output_expansion=fields.integer("R_O"),
        active_per_group=active // slots,
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size", 0),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        concat_proj="routed" if fields.flag("moe_concat_proj", False) else "none",
        decoder_sparse_step=fields.integer("decoder_sparse_step", 1),
        mlp_only_layers=tuple(layers),
    )
    stated = fields.integer("num_experts", moe.num_experts)
    if stated != moe.num_experts:
        raise InputError(
            f"{fields.where}: num_experts={stated}, but G_O*R_O*R_I*G_I = "
            f"{moe.output_granularity}*{moe.output_expansion}*{moe.intermediate_expansion}*"
            f"{moe.intermediate_granularity} = {moe.num_experts}"
        )
    return moe


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model: the authors' keys for FineRMoE, those of its family for a dense one.

    A FineRMoE with q/k norm has the further key "qk_norm". Raises InputError for variants that
    neither the published HF model nor a dense family can express.
    """
    values: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.head_dim is not None:
        values["head_dim"] = config.head_dim
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        values["rope_scaling"] = {"rope_type": scaling.rope_type, **scaling.stated}
    moe = config.moe
    if moe is None:
        return _dense_to_hf(config, values)
    _refuse_inexpressible(moe)
    if not config.attention_bias:
        values["qkv_bias"] = False
    if config.qk_norm:
        values["qk_norm"] = True
    return {
        "architectures": [FINERMOE_ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": FINERMOE_TYPE,
        **values,
        "G_I": moe.intermediate_granularity,
        "G_O": moe.output_granularity,
        "R_I": moe.intermediate_expansion,
        "R_O": moe.output_expansion,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_active,
        "moe_intermediate_size": config.expert_intermediate_size,
        "shared_expert_intermediate_size": config.shared_expert_size,
        "moe_concat_proj": moe.concat_proj == "routed",
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": moe.decoder_sparse_step,
        "mlp_only_layers": list(moe.mlp_only_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _refuse_inexpressible(moe: MoEConfig) -> None:
    """Raises InputError for variants that the published HF model has no keys for."""
    inexpressible = [
        f"{name}={getattr(moe, name)!r}"
        for name, hf in (
            ("plain_top_k", (False,)),
            ("pre_softmax", (False,)),
            ("separate_routers", (False,)),
            ("concat_proj", ("none", "routed")),
            ("router_dtype", ("float32",)),
        )
        if getattr(moe, name) not in hf
    ]
    if inexpressible:
        raise InputError(
            "the published HF model cannot express " + ", ".join(inexpressible) + "; keep the "
            "checkpoint in Orbax form"
        )


def _dense_to_hf(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    for kind, dense in _DENSE.items():
        # transformers wants Llama's width to be a multiple of its heads, even with a head_dim.
        if kind == "llama" and config.hidden_size % config.num_attention_heads:
            continue
        if (dense.attention_bias, dense.qk_norm) == (config.attention_bias, config.qk_norm):
            break
    else:
        raise InputError(
            f"no dense HF model has attention_bias={config.attention_bias} together with qk_norm="
            f"{config.qk_norm}; keep the checkpoint in Orbax form"
        )
    if kind == "mistral":
        values["sliding_window"] = None
    if kind == "qwen3":
        values |= {"head_dim": config.attention_head_dim, "attention_bias": False}
    return {"architectures": [dense.architecture], "model_type": kind, **values}
