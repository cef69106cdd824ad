"""Conversion between config.json of Hugging Face directories and ModelConfig."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from finermoe_jax.config.model import (
    GRANULARITIES,
    ROPE_FIELDS,
    ModelConfig,
    MoEConfig,
    RopeScaling,
)
from finermoe_jax.config.parse import from_dict, typed
from finermoe_jax.errors import InputError

FINERMOE_TYPE, FINERMOE_ARCHITECTURE = "finer_moe", "FineRMoeForCausalLM"
# Tells transformers where the model's code is inside an exported directory. It runs only if the
# caller sets trust_remote_code.
AUTO_MAP = {
    "AutoConfig": "configuration_finer_moe.FineRMoeConfig",
    "AutoModel": "modeling_finer_moe.FineRMoeModel",
    "AutoModelForCausalLM": "modeling_finer_moe.FineRMoeForCausalLM",
}
# Head sizes of the attention in vLLM's CPU build.
VLLM_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclasses.dataclass(frozen=True)
class _Family:
    """The fixed properties of a model_type. Among equal dense families the first is exported."""

    architecture: str
    attention_bias: bool
    qk_norm: bool
    # Defaults of transformers for keys missing in config.json; kv_heads None: all heads.
    kv_heads: int | None
    positions: int
    head_dim: int | None = None


_DENSE = {
    "qwen2": _Family("Qwen2ForCausalLM", True, False, kv_heads=32, positions=32768),
    "llama": _Family("LlamaForCausalLM", False, False, kv_heads=None, positions=2048),
    "mistral": _Family("MistralForCausalLM", False, False, kv_heads=8, positions=131072),
    "qwen3": _Family("Qwen3ForCausalLM", False, True, kv_heads=32, positions=32768, head_dim=128),
}
# The published FineRMoE models are Qwen2 with experts.
_FAMILIES = _DENSE | {
    FINERMOE_TYPE: _Family(FINERMOE_ARCHITECTURE, True, False, kv_heads=None, positions=32768)
}
SUPPORTED_TYPES = tuple(_FAMILIES)
# Defaults of transformers: Mistral's window, and the first windowed layer of Qwen models.
_WINDOW, _FIRST_WINDOWED_LAYER, _SWITCH = 4096, 28, "use_sliding_window"
_ORIGINAL = "original_max_position_embeddings"
# Keys with the same name in config.json and ModelConfig.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAME = (
    *(*_SIZES, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "tie_word_embeddings"),
)
# FineRMoE's keys and MoEConfig's fields; config.json states T_I through num_experts_per_tok.
_GRANULARITIES = {key: field for key, field in GRANULARITIES.items() if key != "T_I"}


def model_config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the architecture of a config.json (qwen2, qwen3, llama, mistral or finer_moe).

    Missing keys get the family's defaults in transformers. `where` names the file in messages.

    Raises InputError for other architectures, for features that this decoder does not compute
    (other types of rotary embeddings than RopeType, sliding windows, biases of o_proj or the FFN,
    other activations), and for numbers that contradict each other, naming both.
    """
    try:
        return _model_config(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read(values: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Returns a key's value. Raises InputError if it is missing or of the wrong type."""
    return typed(values.get(key, default), (kind,), key)


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in SUPPORTED_TYPES:
        raise InputError(
            f"model_type={kind!r} is not supported; supported are {', '.join(SUPPORTED_TYPES)}"
        )
    family = _FAMILIES[kind]
    _refuse_unsupported(values, kind)
    theta, scaling = _rope(values)
    sizes = {key: _read(values, key, int) for key in (*_SIZES, "vocab_size")}
    heads = sizes["num_attention_heads"]
    kv_heads = heads
    if values.get("num_key_value_heads", 0) is not None:  # null: as many as heads
        kv_heads = _read(values, "num_key_value_heads", int, family.kv_heads or heads)
    head_dim = values.get("head_dim")
    moe = _moe_config(values) if kind == FINERMOE_TYPE else None
    config = ModelConfig(
        **sizes,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        rms_norm_eps=_read(values, "rms_norm_eps", float, 1e-6),
        max_position_embeddings=_read(values, "max_position_embeddings", int, family.positions),
        tie_word_embeddings=_read(values, "tie_word_embeddings", bool, False),
        attention_bias=_read(values, "qkv_bias", bool, True) if moe else family.attention_bias,
        qk_norm=_read(values, "qk_norm", bool, False) if moe else family.qk_norm,
        head_dim=family.head_dim if head_dim is None else _read(values, "head_dim", int),
        rope_scaling=scaling,
        moe=moe,
    )
    if moe is not None:
        size = _read(values, "moe_intermediate_size", int, config.expert_intermediate_size)
        if size != config.expert_intermediate_size:
            raise InputError(
                f"moe_intermediate_size={size}, but intermediate_size={config.intermediate_size} / "
                f"G_I={moe.intermediate_granularity} = {config.expert_intermediate_size}"
            )
    return config


def _refuse_unsupported(values: Mapping[str, Any], kind: str) -> None:
    for key, default, computed in (
        ("hidden_act", "silu", ("silu", "swish")),  # synonyms
        ("mlp_bias", False, (False,)),
    ):
        if (value := values.get(key, default)) not in computed:
            raise InputError(f"{key}={value!r} is not supported")
    _refuse_windows(values, kind)
    # Qwen2 ignores this key: q, k and v always have biases, o_proj never.
    if kind != "qwen2" and _read(values, "attention_bias", bool, False):
        raise InputError("attention_bias=True is not supported: it adds a bias to o_proj")


def _refuse_windows(values: Mapping[str, Any], kind: str) -> None:
    """Raises InputError if a layer has sliding-window attention."""
    kinds = values.get("layer_types")
    kinds = [] if kinds is None else kinds
    if not isinstance(kinds, list) or any(layer != "full_attention" for layer in kinds):
        raise InputError(f"layer_types={kinds!r} is not supported")
    window, why = values.get("sliding_window", _WINDOW), ""
    if kind == "llama" or window is None:  # Llama ignores the key
        return
    if kind != "mistral":
        first = _read(values, "max_window_layers", int, _FIRST_WINDOWED_LAYER)
        switched = _read(values, _SWITCH, bool, False)
        if not switched or kinds or first >= _read(values, "num_hidden_layers", int):
            return
        why = f" in the layers from max_window_layers={first} on ({_SWITCH}=True)"
    raise InputError(f"sliding_window={window!r}{why} is not supported")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary embeddings. Raises InputError for unknown settings."""
    stated, rope = _stated_rope(values)
    kind = rope.pop("rope_type", "default")
    fit = [*itertools.chain(*ROPE_FIELDS[kind])] if kind in list(ROPE_FIELDS) else []
    beside = values.get(_ORIGINAL)
    if beside is not None and _ORIGINAL in fit and rope.setdefault(_ORIGINAL, beside) != beside:
        raise InputError(
            f"{_ORIGINAL}={beside!r} and {stated} contradict each other: remove the one that "
            "the model was not trained with"
        )
    whole = rope.pop("partial_rotary_factor", 1) == 1
    strange = {name: rope[name] for name in rope if name not in ("rope_theta", *fit)}
    if kind not in ["default", *ROPE_FIELDS] or strange or not whole:
        what = f" with {strange!r}" if strange else ""
        raise InputError(
            f"{stated}: rotary embeddings of rope_type={kind!r}{what} are not supported; supported "
            f"types are default, {', '.join(ROPE_FIELDS)}, over the whole head"
        )
    theta = _read(rope, "rope_theta", float, 10000.0)
    if kind == "default":
        return theta, None
    # Numbers that are not stated stay None: versions of transformers differ in their defaults.
    numbers = {name: rope[name] for name in fit if name in rope}
    return theta, from_dict(RopeScaling, {"rope_type": kind, **numbers}, stated)


def _stated_rope(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns every stated value of the rotary embeddings by name, and the text for messages.

    Published files have rope_theta and rope_scaling; transformers 5 writes rope_parameters.
    """
    keys = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
    given = {key: values[key] for key in keys if values.get(key) is not None}
    stated = ", ".join(f"{key}={value!r}" for key, value in given.items())
    rope: dict[str, Any] = {}
    for key, value in given.items():
        for name, one in value.items() if isinstance(value, Mapping) else [(key, value)]:
            name = "rope_type" if name == "type" else name
            if one is not None and rope.setdefault(name, one) != one:
                raise InputError(
                    f"{stated} state both {name}={rope[name]!r} and {one!r}: remove the one "
                    "that the model was not trained with"
                )
    return stated, rope


def _moe_config(values: Mapping[str, Any]) -> MoEConfig:
    slots, active = (_read(values, key, int) for key in ("G_O", "num_experts_per_tok"))
    if slots < 1 or active < 1 or active % slots:
        raise InputError(f"num_experts_per_tok={active} must be a positive multiple of G_O={slots}")
    layers = values.get("mlp_only_layers") or []
    moe = MoEConfig(
        **{field: _read(values, key, int) for key, field in _GRANULARITIES.items()},
        active_per_group=active // slots,
        shared_expert_intermediate_size=_read(values, "shared_expert_intermediate_size", int, 0),
        norm_topk_prob=_read(values, "norm_topk_prob", bool, False),
        concat_proj="routed" if _read(values, "moe_concat_proj", bool, False) else "none",
        experts_across=_read(values, "experts_across", int, 1),
        pooled_as=values.get("pooled_as", "copies"),
        route_ahead=_read(values, "route_ahead", int, 0),
        selection_bias=_read(values, "selection_bias", bool, False),
        decoder_sparse_step=_read(values, "decoder_sparse_step", int, 1),
        mlp_only_layers=typed(layers, (tuple[int, ...],), "mlp_only_layers"),
    )
    stated = _read(values, "num_experts", int, moe.num_experts)
    if stated != moe.num_experts:
        raise InputError(
            f"num_experts={stated}, but G_O*R_O*R_I*G_I = "
            f"{moe.output_granularity}*{moe.output_expansion}*{moe.intermediate_expansion}*"
            f"{moe.intermediate_granularity} = {moe.num_experts}"
        )
    return moe


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns config.json: the published keys for FineRMoE, the family's keys for a dense model.

    A FineRMoE with q/k norm has the additional key "qk_norm", one with selection biases
    "selection_bias". A model with pools has "experts_across" and "pooled_as", one that routes ahead
    "route_ahead"; only the exported code reads them. Raises InputError for variants that neither
    the published HF model nor a dense family can express.
    """
    values: dict[str, Any] = {
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in _SAME},
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
    values |= unpublished_keys(moe)
    if moe.selection_bias:
        values["selection_bias"] = True
    return {
        "architectures": [FINERMOE_ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "model_type": FINERMOE_TYPE,
        **values,
        **{key: getattr(moe, field) for key, field in _GRANULARITIES.items()},
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


def not_in_vllm(config: ModelConfig) -> str | None:
    """Returns a sentence if vLLM cannot serve the export of this model on a CPU, else None."""
    if config.attention_head_dim in VLLM_HEADS:
        return None
    return (
        f"vLLM on a CPU cannot serve it: head_dim={config.attention_head_dim} is not one of "
        f"{', '.join(map(str, VLLM_HEADS))}; use transformers (docs/howto/serve.md)"
    )


def unpublished_keys(moe: MoEConfig) -> dict[str, Any]:
    """Returns the keys of config.json that the exported code reads and the authors' does not."""
    values: dict[str, Any] = {}
    if moe.experts_across > 1:
        values |= {"experts_across": moe.experts_across, "pooled_as": moe.pooled_as}
    if moe.route_ahead:
        values["route_ahead"] = moe.route_ahead
    return values


def _refuse_inexpressible(moe: MoEConfig) -> None:
    inexpressible = [
        f"{name}={getattr(moe, name)!r}"
        for name, hf in (
            ("plain_top_k", (False,)),
            ("pre_softmax", (False,)),
            ("separate_routers", (False,)),
            ("concat_proj", ("none", "routed")),
            ("router_dtype", ("float32",)),
            ("depth_vector", (False,)),
        )
        if getattr(moe, name) not in hf
    ]
    if inexpressible:
        raise InputError(
            "the published HF model cannot express " + ", ".join(inexpressible) + "; keep the "
            "model as an Orbax checkpoint"
        )


def _dense_to_hf(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    for kind, dense in _DENSE.items():
        # transformers requires Llama's width to be a multiple of its heads, even with a head_dim.
        if kind == "llama" and config.hidden_size % config.num_attention_heads:
            continue
        if (dense.attention_bias, dense.qk_norm) == (config.attention_bias, config.qk_norm):
            break
    else:
        raise InputError(
            f"no dense HF model has attention_bias={config.attention_bias} together with qk_norm="
            f"{config.qk_norm}; keep the model as an Orbax checkpoint"
        )
    if kind == "mistral":
        values["sliding_window"] = None
    if kind == "qwen3":
        values |= {"head_dim": config.attention_head_dim, "attention_bias": False}
    return {"architectures": [dense.architecture], "model_type": kind, **values}
