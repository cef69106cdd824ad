"""The model's config: frozen dataclasses, their validation and a glossary of symbols.

Symbols of the paper (arXiv 2603.13364):

    h    hidden_size                  model width
    H    intermediate_size            width of the dense FFN, and of the shared expert
    G_I  intermediate_granularity     slices along the intermediate width
    G_O  output_granularity           slots along the output width, concatenated
    R_I  intermediate_expansion       copies of each slice inside a group
    R_O  output_expansion             candidate groups per slot
    T_I  active_per_group             experts active in the chosen group
    N    num_experts                  G_O * R_O * R_I * G_I
    r    experts_across               neighbouring MoE layers that share a pool of experts
    H_e  expert_intermediate_size     H / G_I
    h_e  expert_output_size           h / G_O

Letters of array axes, in einsums and shape annotations:

    B batch   T tokens   D model width   N query heads   K kv heads   H head dim   S keys
    L layers  V vocabulary  E experts    F expert intermediate   W expert output width
    O slots   R candidates  G experts in a group   A active experts per token   M routed rows
"""

import dataclasses
import functools
import itertools
import math
import types
import typing
from typing import Any, Literal

from finermoe_jax.errors import InputError


def check_fields(config: Any) -> None:
    """Raises InputError for a dataclass field with a value of the wrong type.

    An int is accepted as a float, a bool as neither. For configs built in Python; parse.from_dict
    converts those from files.
    """
    for name, kinds in field_kinds(config.__class__).items():
        check_kind(name, getattr(config, name), kinds)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "None",
}


def check_kind(name: str, value: Any, kinds: tuple) -> None:
    """Raises InputError if the value has none of these types."""
    if not any(_is_of(value, kind) for kind in kinds):
        raise InputError(f"{name}={value!r} must be {' or '.join(map(_in_words, kinds))}")


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a tuple, in files a list"
    return _WORDS.get(kind, kind.__name__)


@functools.cache
def field_kinds(cls: type) -> dict[str, tuple]:
    """Returns the types of every dataclass field, with unions split."""
    return {
        name: typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
        for name, hint in typing.get_type_hints(cls).items()
    }


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_is_of(item, item_kind) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One FineRMoE layer. The defaults are the published models' settings.

    The first five fields are the paper's granularities and expansions. Each other field sets a
    point in which the published HF model, the published training code, the paper and its ablations
    differ. The defaults are those of the published HF model.

    Raises:
      InputError: a field of the wrong type or out of range, or fields that contradict each other.

    Examples:
      >>> import finermoe_jax as fm
      >>> moe = fm.MoEConfig(intermediate_granularity=8, active_per_group=2)
      >>> moe.num_experts, moe.num_active
      (32, 4)
    """

    # G_I: slices of the intermediate width.
    intermediate_granularity: int = 32
    # G_O: output slots.
    output_granularity: int = 2
    # R_I: copies of each slice in a group.
    intermediate_expansion: int = 1
    # R_O: candidate groups per slot.
    output_expansion: int = 2
    # T_I: active experts per slot.
    active_per_group: int = 1
    # Width of the shared expert. None: the dense FFN's width; 0: no shared expert.
    shared_expert_intermediate_size: int | None = None
    # The training code's rule for G_O = 1: top-k over all logits, ignoring candidate groups.
    plain_top_k: bool = False
    # The training code's rule for one active expert in total: softmax over all experts.
    pre_softmax: bool = False
    # Also divides the weights by their sum (HF key of the same name).
    norm_topk_prob: bool = False
    # Ablation AddConcatProj. "routed": proj(routed) + shared, the HF model;
    # "all": proj(routed + shared), the training code with shared-expert overlap.
    concat_proj: Literal["none", "routed", "all"] = "none"
    # Ablation of Table 3: a second router selects the candidate group of each slot.
    separate_routers: bool = False
    # Biases that change which experts are chosen, not their weights. Runs with balance.kind="bias"
    # set it and update them (moe/balance.py).
    selection_bias: bool = False
    # Dtype of the router's logits and of the selection.
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    # Every n-th layer is an MoE layer; n is this value (HF key of the same name).
    decoder_sparse_step: int = 1
    # Layers, from 0, that stay dense (HF key of the same name).
    mlp_only_layers: tuple[int, ...] = ()
    # Number of neighbouring MoE layers whose experts form a pool. Each of these layers routes to
    # the whole pool (ReXMoE, docs/pooling.md). 1: each layer routes to its own experts.
    experts_across: int = 1
    # "copies": the other layers' experts are further members of each candidate group.
    # "candidates": they are further candidate groups of each slot. New runs with experts_across=1
    # refuse it, since it would have no effect.
    pooled_as: Literal["copies", "candidates"] = "copies"
    # Adds a learned vector per layer, initially zero, to the input of router and routed experts.
    depth_vector: bool = False
    # k: the router of layer l reads the FFN input of layer l - k, or of layer 0 if there is none
    # (Pre-gated MoE, docs/route_ahead.md). 0: its own layer's.
    route_ahead: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.experts_across < 1:
            raise InputError(
                f"experts_across={self.experts_across} must be at least 1; 1 means that no layers "
                "share their experts"
            )
        if self.route_ahead < 0:
            raise InputError(
                f"route_ahead={self.route_ahead} must be at least 0; 0 means that each router "
                "reads its own layer's input"
            )
        for name in GRANULARITIES.values():
            value = getattr(self, name)
            if value < 1:
                raise InputError(
                    f"{name}={value} must be at least 1. (The published training code reads 0 as "
                    '"equal to the granularity": write that number here.)'
                )
        if self.active_per_group > self.group_size and not self.plain_top_k:
            raise InputError(
                f"active_per_group={self.active_per_group} exceeds the {self.group_size} experts "
                f"of a group (intermediate_granularity={self.intermediate_granularity} * "
                f"intermediate_expansion={self.intermediate_expansion})"
            )
        if self.plain_top_k and self.output_granularity != 1:
            raise InputError(
                f"plain_top_k=True needs output_granularity=1, not {self.output_granularity}: it "
                "selects from all experts of a single slot"
            )
        if self.plain_top_k and self._more_candidates:
            raise InputError(
                "plain_top_k=True ignores the candidate groups that pooled_as=candidates adds; "
                "set plain_top_k=False or pooled_as=copies"
            )
        if self.plain_top_k and self.active_per_group > self.num_experts:
            raise InputError(
                f"active_per_group={self.active_per_group} exceeds the {self.num_experts} experts"
            )
        if self.pre_softmax and self.norm_topk_prob:
            raise InputError(
                "pre_softmax=True and norm_topk_prob=True contradict each other: dividing by the "
                "sum undoes the softmax over all experts; set one to False"
            )
        if self.plain_top_k and self.separate_routers:
            raise InputError(
                "plain_top_k=True ignores the candidate groups that separate_routers=True would "
                "select; set one to False"
            )
        if (shared := self.shared_expert_intermediate_size) is not None and shared < 0:
            raise InputError(
                f"shared_expert_intermediate_size={shared} must be 0 (none) or positive"
            )
        if self.decoder_sparse_step < 1:
            raise InputError(
                f"decoder_sparse_step={self.decoder_sparse_step} must be at least 1; for a dense "
                "model set moe=None"
            )

    @property
    def group_size(self) -> int:
        """Experts of one candidate group: G_I * R_I."""
        return self.intermediate_granularity * self.intermediate_expansion

    @property
    def num_groups(self) -> int:
        """Candidate groups of all slots: G_O * R_O."""
        return self.output_granularity * self.output_expansion

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer: N = G_O * R_O * R_I * G_I."""
        return self.num_groups * self.group_size

    @property
    def pool_size(self) -> int:
        """Experts that a layer's router scores: r * N, those of the pool."""
        return self.experts_across * self.num_experts

    @property
    def pool_candidates(self) -> int:
        """Candidate groups of a slot among the pool's experts."""
        return self.output_expansion * (self.experts_across if self._more_candidates else 1)

    @property
    def pool_group_size(self) -> int:
        """Experts in a candidate group of the pool."""
        return self.group_size * (1 if self._more_candidates else self.experts_across)

    @property
    def _more_candidates(self) -> bool:
        return self.pooled_as == "candidates"

    @property
    def num_active(self) -> int:
        """Active experts per token: G_O * T_I."""
        return self.output_granularity * self.active_per_group


GRANULARITIES = {
    "G_I": "intermediate_granularity",
    "G_O": "output_granularity",
    "R_I": "intermediate_expansion",
    "R_O": "output_expansion",
    "T_I": "active_per_group",
}

LayerKind = Literal["dense", "moe"]
_MAX_LAYERS = 1024  # keeps layer_runs within seconds for any mixture of layers
_MAX_POSITIONS = 1e15  # above, float32 positions a million apart coincide
RopeType = Literal["linear", "llama3", "yarn"]
# Required and optional fields of each type.
ROPE_FIELDS: dict[RopeType, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary embeddings for longer contexts. Fields follow HF; None: not given.

    linear divides every frequency by factor. llama3 (Llama 3.1) divides the frequencies that turn
    fewer than low_freq_factor times within the original context, keeps those that turn more than
    high_freq_factor times, and interpolates in between. yarn (arXiv 2309.00071) does the same
    between beta_slow and beta_fast turns, interpolates by pair index, and also scales the rotated
    queries and keys. finermoe_jax/layers/basic.py implements all three.

    Raises InputError for missing, superfluous or invalid fields.
    """

    factor: float  # new context length over the original one
    low_freq_factor: float | None = None  # llama3 only
    high_freq_factor: float | None = None  # llama3 only
    # None: the model's max_position_embeddings.
    original_max_position_embeddings: int | None = None
    rope_type: RopeType = "llama3"  # linear, llama3 or yarn
    # Scales the rotated queries and keys. None: computed from factor, mscale and mscale_all_dim.
    attention_factor: float | None = None
    beta_fast: float | None = None  # yarn only
    beta_slow: float | None = None  # yarn only
    mscale: float | None = None  # yarn only
    mscale_all_dim: float | None = None  # yarn only
    # Rounds the pairs at which yarn's ramp begins and ends to whole numbers. None: True.
    truncate: bool | None = None

    def __post_init__(self) -> None:
        needed, optional = ROPE_FIELDS[self.rope_type]
        for name, value in self.stated.items():
            if name not in (*needed, *optional):
                raise InputError(
                    f"rope_scaling: rope_type={self.rope_type} does not take {name}={value}; "
                    "remove it"
                )
            if not (value is False or 0 < value < _MAX_POSITIONS):  # also rejects NaN
                raise InputError(
                    f"rope_scaling: {name}={value} must be positive and below {_MAX_POSITIONS:g}"
                )
        for name in needed:
            if getattr(self, name) is None:
                raise InputError(f"rope_scaling: rope_type={self.rope_type} needs {name}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise InputError(
                f"rope_scaling: high_freq_factor={high} must be above low_freq_factor={low}"
            )

    @property
    def stated(self) -> dict[str, float]:
        """Fields that are not None, without rope_type."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k != "rope_type" and v is not None}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Qwen2, Qwen3 or Llama decoder; `moe` is None for a dense model.

    Field names follow Hugging Face's config.json.

    Raises:
      InputError: a field of the wrong type or out of range, or sizes that do not divide.

    Examples:
      >>> import dataclasses
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model").config
      >>> config = dataclasses.replace(dense, moe=fm.MoEConfig(intermediate_granularity=8))
      >>> config.expert_intermediate_size, config.expert_output_size
      (64, 64)
    """

    vocab_size: int
    hidden_size: int  # model width
    intermediate_size: int  # width of the dense FFN
    num_hidden_layers: int
    num_attention_heads: int  # query heads
    num_key_value_heads: int
    rope_theta: float  # base of the rotary frequencies
    rms_norm_eps: float
    max_position_embeddings: int  # longest sequence, in tokens
    tie_word_embeddings: bool  # the output layer shares the embedding's weights
    # Bias of q, k and v (Qwen2: yes, Llama: no). The output projection never has one.
    attention_bias: bool = True
    # RMSNorm over head_dim of q and k, before rotation (Qwen3).
    qk_norm: bool = False
    # None: hidden_size / num_attention_heads.
    head_dim: int | None = None
    # None: plain rotary embeddings.
    rope_scaling: RopeScaling | None = None
    # Standard deviation of random weights when training from scratch (Table 5).
    initializer_range: float = 0.008
    # None: a dense model.
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, kinds in field_kinds(ModelConfig).items():
            if kinds == (int,) and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_hidden_layers > _MAX_LAYERS:
            raise InputError(
                f"num_hidden_layers={self.num_hidden_layers} must be at most {_MAX_LAYERS}"
            )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:  # also rejects NaN
                raise InputError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.rope_scaling is not None:
            if self.max_position_embeddings >= _MAX_POSITIONS:
                raise InputError(
                    f"max_position_embeddings={self.max_position_embeddings} must be below "
                    f"{_MAX_POSITIONS:g} with rope_scaling"
                )
            if self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
                raise InputError(
                    f"rope_theta={self.rope_theta} must be above 1 with rope_type=yarn"
                )
        _check_divides(self, "num_attention_heads", self, "num_key_value_heads")
        if self.head_dim is not None and self.head_dim < 1:
            raise InputError(f"head_dim={self.head_dim} must be at least 1, or omitted")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                f"{self.num_attention_heads}, or head_dim must be given"
            )
        if self.attention_head_dim % 2:
            raise InputError(
                f"head_dim={self.attention_head_dim} must be even for rotary embeddings"
            )
        if self.moe is not None:
            _check_divides(self, "intermediate_size", self.moe, "intermediate_granularity")
            _check_divides(self, "hidden_size", self.moe, "output_granularity")
            for layer in self.moe.mlp_only_layers:
                if not 0 <= layer < self.num_hidden_layers:
                    raise InputError(
                        f"mlp_only_layers contains {layer}, but layers are 0 … "
                        f"{self.num_hidden_layers - 1} (num_hidden_layers={self.num_hidden_layers})"
                    )
            self._check_pools(self.moe.experts_across)
            count = self.layer_kinds.count("moe")
            if self.moe.route_ahead >= max(count, 1):
                raise InputError(
                    f"route_ahead={self.moe.route_ahead} must be less than the number of MoE "
                    f"layers, which is {count}: use at most {max(count - 1, 0)}"
                )

    def _check_pools(self, across: int) -> None:
        """Raises InputError unless `across` divides the MoE layers of every run of neighbours."""
        counts = [pattern.count("moe") * repeats for pattern, repeats in self._kind_runs]
        counts = [count for count in counts if count]
        if all(count % across == 0 for count in counts) and (counts or across == 1):
            return
        largest = math.gcd(*counts)
        fit = [str(n) for n in range(2, largest + 1) if largest % n == 0]
        runs = " and ".join(map(str, counts)) or "no"
        raise InputError(
            f"experts_across={across} must divide the number of MoE layers in each run of "
            f"neighbours, but these have {runs} (num_hidden_layers={self.num_hidden_layers}, "
            f"decoder_sparse_step, mlp_only_layers): use {', '.join(['1', *fit])}, or change the "
            "layers that stay dense"
        )

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """Maximum number of positions: max_position_embeddings, extended by rope_scaling.

        With llama3 scaling max_position_embeddings is the extended context; with linear and yarn
        it usually is the original one.
        """
        scaling, longest = self.rope_scaling, self.max_position_embeddings
        if scaling is None or scaling.rope_type == "llama3":
            return longest
        original = scaling.original_max_position_embeddings or longest
        return max(longest, int(scaling.factor * original))

    @property
    def expert_intermediate_size(self) -> int:
        """Intermediate width of one expert: H_e = H / G_I."""
        assert self.moe is not None
        return self.intermediate_size // self.moe.intermediate_granularity

    @property
    def expert_output_size(self) -> int:
        """Output width of one expert: h_e = h / G_O."""
        assert self.moe is not None
        return self.hidden_size // self.moe.output_granularity

    @property
    def shared_expert_size(self) -> int:
        """Width of the shared expert; 0 without one."""
        assert self.moe is not None
        width = self.moe.shared_expert_intermediate_size
        return self.intermediate_size if width is None else width

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer, by HF's rule for decoder_sparse_step and mlp_only_layers."""

        def kind(layer: int) -> LayerKind:
            if self.moe is None or layer in self.moe.mlp_only_layers:
                return "dense"
            return "dense" if (layer + 1) % self.moe.decoder_sparse_step else "moe"

        return tuple(kind(layer) for layer in range(self.num_hidden_layers))

    @property
    def layer_runs(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers as runs (pattern, repeats). Each run is compiled once and scanned.

        An all-MoE model is one run of a one-layer pattern; decoder_sparse_step=2 is one run of
        (dense, moe). With experts_across=r, a pattern is repeated until its number of MoE layers is
        a multiple of r, so that all layers of a pool are in one pattern.
        """
        across = self.moe.experts_across if self.moe else 1
        runs = []
        for pattern, repeats in self._kind_runs:
            times = across // math.gcd(pattern.count("moe"), across)  # 1 if all are dense
            runs.append((pattern * times, repeats // times))
        return tuple(runs)

    def pool_places(self, pattern: tuple[LayerKind, ...]) -> tuple[int | None, ...]:
        """Returns each MoE layer's place among the r layers of its pool; None for dense layers."""
        across, moe = self.moe.experts_across if self.moe else 1, itertools.count()
        return tuple(next(moe) % across if kind == "moe" else None for kind in pattern)

    @property
    def _kind_runs(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers as runs of a pattern of kinds.

        Greedy: each run takes the repeating pattern that covers most layers.
        """
        kinds, runs, start = self.layer_kinds, [], 0
        while start < len(kinds):
            best = (kinds[start : start + 1], 1)
            for period in range(1, (len(kinds) - start) // 2 + 1):
                pattern = kinds[start : start + period]
                repeats = 1
                while kinds[start + period * repeats :][:period] == pattern:
                    repeats += 1
                if repeats > 1 and period * repeats > len(best[0]) * best[1]:
                    best = (pattern, repeats)
                if len(best[0]) * best[1] == len(kinds) - start:
                    break
            runs.append(best)
            start += len(best[0]) * best[1]
        return tuple(runs)


def _check_divides(model: ModelConfig, size: str, of: ModelConfig | MoEConfig, name: str) -> None:
    whole, parts = getattr(model, size), getattr(of, name)
    if whole % parts:
        raise InputError(
            f"{size}={whole} must be a multiple of {name}={parts}; the remainder is {whole % parts}"
        )
