"""What a model and a run are: frozen dataclasses, their validation, the glossary of symbols.

Symbols of the paper (arXiv 2603.13364) and their names here:

    h    hidden_size                  model width
    H    intermediate_size            width of the dense FFN, and of the shared expert
    G_I  intermediate_granularity     slices along the intermediate width
    G_O  output_granularity           slots along the output width, concatenated
    R_I  intermediate_expansion       copies of each slice inside a group
    R_O  output_expansion             candidate groups per slot
    T_I  active_per_group             experts active in the chosen group
    N    num_experts                  G_O * R_O * R_I * G_I
    H_e  expert_intermediate_size     H / G_I
    h_e  expert_output_size           h / G_O

Letters of array axes, in einsums and shape annotations:

    B batch   T tokens   D model width   N query heads   K kv heads   H head dim   S keys
    L layers  V vocabulary  E experts    F expert intermediate   W expert output width
    O slots   R candidates  G experts in a group   A active experts per token   M routed rows
"""

import dataclasses
import math
import runpy
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from finermoe_jax.errors import InputError, near_misses
from finermoe_jax.files import find


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One FineRMoE layer. The defaults are the published models' settings.

    The first five fields are the paper's granularities and expansions; the rest names each point
    where the published HF model, the published training code, the paper and its ablations differ.
    The default of each is the published HF model's behaviour.
    """

    intermediate_granularity: int = 32
    output_granularity: int = 2
    intermediate_expansion: int = 1
    output_expansion: int = 2
    active_per_group: int = 1
    # Width of the shared expert: None is the dense FFN's full width, 0 means no shared expert.
    shared_expert_intermediate_size: int | None = None
    # Training code at G_O = 1: top-k over all logits, candidate groups ignored.
    plain_top_k: bool = False
    # Training code at one active expert in total: its weight is the softmax over all experts.
    pre_softmax: bool = False
    # Divide the weights once more by their sum (HF key of the same name).
    norm_topk_prob: bool = False
    # Ablation AddConcatProj. "routed": proj(routed) + shared, the HF model;
    # "all": proj(routed + shared), the training code with shared-expert overlap.
    concat_proj: Literal["none", "routed", "all"] = "none"
    # Ablation of Table 3: a second router chooses the candidate group of each slot.
    separate_routers: bool = False
    # Arithmetic of the router's logits and of the selection.
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    # Which layers are MoE layers (HF keys of the same names).
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _GRANULARITIES:
            value = getattr(self, name)
            if value < 1:
                raise InputError(
                    f"{name}={value} must be at least 1. (In the published training code 0 means "
                    '"the same as the granularity"; write that number out.)'
                )
        if self.active_per_group > self.group_size and not self.plain_top_k:
            raise InputError(
                f"active_per_group={self.active_per_group} exceeds the {self.group_size} experts "
                f"of a group (intermediate_granularity={self.intermediate_granularity} * "
                f"intermediate_expansion={self.intermediate_expansion})"
            )
        if self.plain_top_k and self.output_granularity != 1:
            raise InputError(
                "plain_top_k selects over all experts of one slot and needs output_granularity=1, "
                f"not {self.output_granularity}"
            )
        if self.plain_top_k and self.active_per_group > self.num_experts:
            raise InputError(
                f"active_per_group={self.active_per_group} exceeds the {self.num_experts} experts"
            )
        if self.pre_softmax and self.norm_topk_prob:
            raise InputError(
                "pre_softmax=True with norm_topk_prob=True contradict each other: dividing by the "
                "sum undoes the softmax over all experts; set one of them to False"
            )
        if self.plain_top_k and self.separate_routers:
            raise InputError("plain_top_k has no candidate groups for separate_routers to choose")
        if self.shared_expert_intermediate_size is not None:
            if self.shared_expert_intermediate_size < 0:
                raise InputError(
                    "shared_expert_intermediate_size="
                    f"{self.shared_expert_intermediate_size} must be 0 (none) or positive"
                )
        if self.decoder_sparse_step < 1:
            raise InputError(
                f"decoder_sparse_step={self.decoder_sparse_step} must be at least 1; leave the "
                "MoE settings away for a dense model"
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
        """N, the routed experts of a layer."""
        return self.num_groups * self.group_size

    @property
    def num_active(self) -> int:
        """Active experts per token: G_O * T_I."""
        return self.output_granularity * self.active_per_group


_GRANULARITIES = (
    "intermediate_granularity",
    "output_granularity",
    "intermediate_expansion",
    "output_expansion",
    "active_per_group",
)

LayerKind = Literal["dense", "moe"]
# Finding the runs of the strangest mixture of layer kinds then still takes seconds.
_MOST_LAYERS = 1024


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary embeddings (rope_type "llama3"). Field names follow HF's.

    Frequencies that turn fewer than low_freq_factor times within the original context are divided
    by factor, those that turn more than high_freq_factor times stay; linear in between.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"rope_scaling: {name}={value} must be positive and finite")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise InputError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} must be finite and above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of Qwen2's, Llama's or Qwen3's kind; `moe` is None for a dense model.

    Field names follow HF's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    # Bias of q, k and v: Qwen2 has it, Llama has not. The output projection never has one.
    attention_bias: bool = True
    # RMSNorm over head_dim of q and k, before they are rotated: Qwen3 has it.
    qk_norm: bool = False
    # None: hidden_size / num_attention_heads.
    head_dim: int | None = None
    # None: plain rotary embeddings.
    rope_scaling: RopeScaling | None = None
    # Standard deviation of what is drawn when training from scratch (Table 5).
    initializer_range: float = 0.008
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise InputError(
                f"num_hidden_layers={self.num_hidden_layers} must be at most {_MOST_LAYERS}"
            )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise InputError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise InputError(f"head_dim={self.head_dim} must be at least 1, or left away")
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
                        f"mlp_only_layers names layer {layer}, but num_hidden_layers="
                        f"{self.num_hidden_layers}"
                    )

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_intermediate_size(self) -> int:
        """H_e, the intermediate width of one expert."""
        assert self.moe is not None
        return self.intermediate_size // self.moe.intermediate_granularity

    @property
    def expert_output_size(self) -> int:
        """h_e, the output width of one expert."""
        assert self.moe is not None
        return self.hidden_size // self.moe.output_granularity

    @property
    def shared_expert_size(self) -> int:
        """Width of the shared expert; 0 when there is none."""
        assert self.moe is not None
        width = self.moe.shared_expert_intermediate_size
        return self.intermediate_size if width is None else width

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Each layer's kind, by HF's rule for decoder_sparse_step and mlp_only_layers."""

        def kind(layer: int) -> LayerKind:
            if self.moe is None or layer in self.moe.mlp_only_layers:
                return "dense"
            return "dense" if (layer + 1) % self.moe.decoder_sparse_step else "moe"

        return tuple(kind(layer) for layer in range(self.num_hidden_layers))

    @property
    def layer_runs(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers as (pattern, repeats) runs; each run is compiled once and scanned.

        All-MoE is one run of a one-layer pattern; decoder_sparse_step=2 is one run of the
        pattern (dense, moe). At each layer the repeating pattern that covers most layers wins.
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


def _check_divides(model: ModelConfig, size: str, moe: MoEConfig, granularity: str) -> None:
    whole, parts = getattr(model, size), getattr(moe, granularity)
    if whole % parts:
        raise InputError(
            f"{size}={whole} must be a multiple of {granularity}={parts}; it leaves a remainder "
            f"of {whole % parts}"
        )


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How a dense FFN becomes experts, where the architecture alone does not say it.

    The defaults are the published start: copies of slices, everything new from normal(0, 0.02).
    finermoe_jax/upcycle.py computes it, docs/architectures.md states the formulas.
    """

    # Drop-upcycling: share of the intermediate channels that each expert redraws.
    drop_ratio: float = 0.0
    # NVShard: one router row for all slices of a copy, so that whole copies are chosen.
    virtual_groups: bool = False
    # Starts at the dense model's logits: the shared expert alone speaks, with its gate's 1/2
    # made good, and every routed down-projection is zero.
    function_preserving: bool = False
    # Standard deviation of concat_proj; 0 gives zeros.
    concat_proj_std: float = 0.02

    def __post_init__(self) -> None:
        for name, number, high in (
            ("drop_ratio", self.drop_ratio, 1),
            ("concat_proj_std", self.concat_proj_std, 1e6),
        ):
            if not 0 <= number <= high:  # also refuses NaN
                raise InputError(f"upcycle.{name}={number} must lie between 0 and {high}")
        if self.drop_ratio and self.function_preserving:
            raise InputError(
                f"upcycle.drop_ratio={self.drop_ratio} redraws down-projections that "
                "upcycle.function_preserving=True starts at zero; set one of them to its default"
            )
        if self.function_preserving and not self.concat_proj_std:
            raise InputError(
                f"upcycle.concat_proj_std={self.concat_proj_std} with "
                "upcycle.function_preserving=True: projection and experts' outputs would both be "
                "zero, and stay so, since each one's gradient is a multiple of the other; set one "
                "of them to its default"
            )

    def check(self, moe: MoEConfig | None) -> None:
        """Raises InputError, naming both values, where `moe` cannot start as this says."""
        against: dict[str, list[str]] = {field.name: [] for field in dataclasses.fields(self)}
        if moe is None:
            for reasons in against.values():
                reasons.append("moe=None, a dense model")
        else:
            shared = moe.shared_expert_intermediate_size
            if moe.concat_proj == "none":
                against["concat_proj_std"].append("moe.concat_proj=none")
            if moe.concat_proj == "all":
                against["function_preserving"].append(
                    "moe.concat_proj=all, which projects the shared expert's output, too"
                )
            if shared == 0:
                against["function_preserving"].append(
                    "moe.shared_expert_intermediate_size=0; it needs a shared expert"
                )
            else:
                against["virtual_groups"].append(
                    f"moe.shared_expert_intermediate_size={shared}; it needs 0"
                )
            if moe.output_granularity != 1:
                against["virtual_groups"].append(
                    f"moe.output_granularity={moe.output_granularity}; it needs 1"
                )
            if moe.active_per_group % moe.intermediate_granularity:
                against["virtual_groups"].append(
                    f"moe.active_per_group={moe.active_per_group}; it needs a multiple of "
                    f"moe.intermediate_granularity={moe.intermediate_granularity}"
                )
            for name in ("pre_softmax", "separate_routers"):
                if getattr(moe, name):
                    against["virtual_groups"].append(f"moe.{name}=True; it needs False")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and against[field.name]:
                raise InputError(
                    f"upcycle.{field.name}={value} does not go with {against[field.name][0]}"
                )


PUBLISHED_START = UpcycleConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, in rows of sequence_length tokens (docs/data.md)."""

    # Text, a directory of finermoe_jax.prepare_data, a Megatron .bin/.idx pair, or a mixture
    # "path:weight,path:weight".
    path: str = ""
    # "stream": windows of the token stream, across documents. "documents": whole documents in a
    # row, each on its own in attention, positions and loss.
    packing: Literal["stream", "documents"] = "stream"
    # A directory with tokenizer files; empty: the tokenizer of init_from.
    tokenizer: str = ""
    sequence_length: int = 8192
    # Sequences per optimizer step, over all devices.
    global_batch_size: int = 2048
    # Share of each source, taken from its end, that is held out; and the rows scored of it.
    # With eval_path that source is scored, and nothing held out.
    eval_fraction: float = 0.05
    eval_path: str = ""
    eval_windows: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay. The defaults are the paper's Table 5."""

    # "adafactor": second moments kept as sums over either of an array's two largest axes (small
    # ones whole), no first moment; same
    # schedule, clipping and decay. beta1, beta2 and moment_dtype are AdamW's alone.
    name: Literal["adamw", "adafactor"] = "adamw"
    # AdamW's first moment. The second keeps the weights' dtype: Optax has no option for it.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 1e-5
    final_learning_rate: float = 1e-7
    warmup_fraction: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    # Only embedding, routers, experts and norms train; attention, the FFNs of dense layers and
    # lm_head stay as they were upcycled, and have neither gradients nor moments.
    freeze_backbone: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "the rest of the devices"."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, precision, memory and rhythm of a run."""

    steps: int = 2980
    # Microbatches per optimizer step; their gradients are averaged.
    grad_accumulation: int = 1
    # Weight of the load-balancing loss: total = mean cross-entropy + aux_loss_weight * sum over
    # layers of Eq. 11. The published training code sums the cross-entropy over tokens instead,
    # so its effective weight at 8192 tokens is 0.001 / 8192.
    aux_loss_weight: float = 0.001
    # Activations' and master weights' dtypes.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Implementation of the experts (pallas_kernels) and of attention (flash.py: "cpu" and
    # "reference" take blocks of queries); "auto" goes by the platform.
    kernel: Literal["auto", "reference", "cpu", "tpu", "gpu"] = "auto"
    # What the backward pass recomputes: "none" keeps all, "full" keeps each layer's input only,
    # "dots" keeps the results of matrix products.
    remat: Literal["none", "full", "dots"] = "full"
    # Layers written out per turn of the loop over layers. With all of them there is no loop, and
    # no copy of each layer's weights and gradients out of and into their stacks: a tenth of a
    # step on a CPU, for a compile time that grows with depth.
    scan_unroll: int = 1
    # Tokens whose logits exist at one time in the loss, on each device.
    loss_chunk_tokens: int = 1024
    # Steps between lines of metrics.jsonl, and between records of every expert's load in
    # expert_load.jsonl (docs/monitoring.md says how large they are).
    log_every: int = 1
    load_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    # The newest so many are kept and, beside them, those of the lowest held-out loss.
    keep_checkpoints: int = 3
    keep_best: int = 0
    # A step whose loss or gradient is not finite is left out; so many in a row end the run.
    max_skipped_steps: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything train.py needs; configs/*.py make one through `default_config`."""

    # The dense architecture. With init_from it must agree with the source; None: as the source.
    model: ModelConfig | None = None
    # How the FFNs become experts; None trains the model as init_from holds it.
    moe: MoEConfig | None = None
    # What those experts start from.
    upcycle: UpcycleConfig = PUBLISHED_START
    # HF directory, hub id or checkpoint of ours to start from; empty: random weights.
    init_from: str = ""
    # Prompts whose continuations are shown before and after training.
    prompts: tuple[str, ...] = ()
    prompt_tokens: int = 48
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if self.model is None and not self.init_from:
            raise InputError("a run needs init_from (weights to start from) or model (a shape)")
        if self.model is not None and self.model.moe is not None:
            raise InputError("config.model states the dense shape; the experts go into config.moe")
        if self.moe is not None and self.model is not None:
            dataclasses.replace(self.model, moe=self.moe)  # divisibility, before any work
        self.upcycle.check(self.moe)
        data, train, optimizer = self.data, self.train, self.optimizer
        for name, value in (
            ("data.sequence_length", data.sequence_length),
            ("data.global_batch_size", data.global_batch_size),
            ("data.eval_windows", data.eval_windows),
            ("prompt_tokens", self.prompt_tokens),
            ("train.steps", train.steps),
            ("train.grad_accumulation", train.grad_accumulation),
            ("train.scan_unroll", train.scan_unroll),
            ("train.loss_chunk_tokens", train.loss_chunk_tokens),
            ("train.log_every", train.log_every),
            ("train.load_every", train.load_every),
            ("train.eval_every", train.eval_every),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.keep_checkpoints", train.keep_checkpoints),
            ("train.max_skipped_steps", train.max_skipped_steps),
        ):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if optimizer.name != "adamw" and optimizer.moment_dtype != "float32":
            raise InputError(
                f"optimizer.moment_dtype={optimizer.moment_dtype} is AdamW's, and optimizer.name="
                f"{optimizer.name} keeps no first moment: leave it at float32"
            )
        for name, number, low, high in (
            ("data.eval_fraction", data.eval_fraction, 0, 0.999),
            ("data.seed", data.seed, 0, 2**32 - 1),
            ("train.seed", train.seed, 0, 2**32 - 1),
            ("train.keep_best", train.keep_best, 0, 1e6),
            ("train.aux_loss_weight", train.aux_loss_weight, 0, 1e6),
            ("optimizer.warmup_fraction", optimizer.warmup_fraction, 0, 1),
            ("optimizer.beta1", optimizer.beta1, 0, 0.999999),
            ("optimizer.beta2", optimizer.beta2, 0, 0.999999),
            ("optimizer.weight_decay", optimizer.weight_decay, 0, 1e6),
            ("optimizer.clip_norm", optimizer.clip_norm, 1e-12, 1e12),
            ("optimizer.learning_rate", optimizer.learning_rate, 0, 1e6),
            ("optimizer.final_learning_rate", optimizer.final_learning_rate, 0, 1e6),
        ):
            if not low <= number <= high:  # also refuses NaN
                raise InputError(f"{name}={number} must lie between {low} and {high}")
        if train.keep_best and not (data.eval_fraction or data.eval_path):
            raise InputError(
                f"train.keep_best={train.keep_best} ranks by held-out loss, and data.eval_fraction="
                f"{data.eval_fraction} holds nothing out; set one of them otherwise"
            )
        together = math.lcm(train.eval_every, train.checkpoint_every)
        if train.keep_best and together > train.steps:
            raise InputError(
                f"train.keep_best={train.keep_best}: of train.steps={train.steps} none is both "
                f"scored (train.eval_every={train.eval_every}) and saved (train.checkpoint_every="
                f"{train.checkpoint_every}) before the last; make one a multiple of the other"
            )
        if data.global_batch_size % train.grad_accumulation:
            raise InputError(
                f"data.global_batch_size={data.global_batch_size} must be a multiple of "
                f"train.grad_accumulation={train.grad_accumulation}"
            )


def default_config() -> Any:
    """An ml_collections ConfigDict holding every field of RunConfig at its default.

    `moe` holds the published settings; `config.moe = None` gives a dense run. `model` is None.
    """
    from ml_collections import ConfigDict  # the library itself runs without it

    config = ConfigDict(
        {
            field.name: dataclasses.asdict(field.default)  # type: ignore[arg-type]
            if dataclasses.is_dataclass(field.default)
            else field.default
            for field in dataclasses.fields(RunConfig)
        },
        type_safe=False,
    )
    config.moe = ConfigDict(dataclasses.asdict(MoEConfig()), type_safe=False)
    return config


def preset(name: str) -> Any:
    """The ConfigDict of `configs/NAME.py` or `configs/NAME.py:VARIANT`, as --config reads it.

    `run_config` makes a RunConfig of it. Raises InputError where there is no such file.
    """
    path, _, variant = name.partition(":")
    if not find(path).is_file():
        raise InputError(f"config file {path} does not exist")
    get_config = runpy.run_path(str(find(path)))["get_config"]
    return get_config(variant) if variant else get_config()


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from a plain nested mapping, such as `preset(NAME).to_dict()`.

    Raises InputError naming an unknown field (with near misses) or a value of the wrong type.
    """
    return from_dict(RunConfig, values, "config")


def from_dict(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """Builds dataclass `cls` from nested mappings, strictly: every key known, every type right."""
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"{where} has no field {key!r}. {near_misses(key, hints)}")
        kwargs[key] = _coerce(hints[key], value, f"{where}.{key}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - kwargs.keys()):
        raise InputError(f"{where} lacks {', '.join(missing)}")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or InputError. Ints serve as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _coerce(hint, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise InputError(f"{where}={value!r} must be one of {', '.join(map(str, args))}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}={value!r} must be a list")
        return tuple(_coerce(args[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}={value!r} must be a group of fields")
        return from_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**1000:
            raise InputError(f"{where}={value!r} is too large")
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}={value!r} must be of type {hint.__name__}")
    return value
