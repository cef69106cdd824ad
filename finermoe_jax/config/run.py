"""The config of a run: model, initial weights, data, optimizer, mesh, training."""

import dataclasses
import math
import operator
from typing import Literal

from finermoe_jax.config.model import ModelConfig, MoEConfig, check_fields
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError, near_misses
from finermoe_jax.runtime.buckets import placed, placed_list


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, in rows of sequence_length tokens (docs/data.md)."""

    # Text, tokens written by `finermoe prepare` (local or gs://), a Megatron .bin/.idx pair, or a
    # mixture "path:weight,path:weight".
    path: str = ""
    # "stream": windows of the token stream, across documents. "documents": whole documents packed
    # into rows, with separate attention, positions and loss.
    packing: Literal["stream", "documents"] = "stream"
    # Directory with tokenizer files, or a Hub id; empty: the tokenizer of init_from.
    tokenizer: str = ""
    # Tokens per row.
    sequence_length: int = 8192
    # Sequences per optimizer step, over all devices.
    global_batch_size: int = 2048
    # Share of each source that is held out, taken from its end.
    eval_fraction: float = 0.05
    # A source to score instead; then nothing is held out.
    eval_path: str = ""
    # Rows scored per held-out evaluation.
    eval_windows: int = 64
    # Seed of the shuffle.
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", placed_list(self.path, "data.path"))
        for name in ("tokenizer", "eval_path"):
            object.__setattr__(self, name, placed(getattr(self, name), f"data.{name}"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. The defaults are the paper's Table 5: AdamW, cosine decay."""

    # "adafactor": factored second moments (unfactored for small arrays), no first moment. "muon":
    # orthogonalized momentum for the matrices of attention, FFNs and experts, AdamW for the rest.
    # Schedule, clipping and decay are the same for all.
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    # Dtype of AdamW's first moment and of Muon's momentum. The second moment has the weights'
    # dtype.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 1e-5  # after warm-up
    final_learning_rate: float = 1e-7  # at the last step
    # After linear warm-up, "cosine" decays until the last step. "wsd" (warmup-stable-decay) keeps
    # the rate, then decays it linearly.
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.01  # share of the steps
    decay_fraction: float = 0.1  # share of the steps in which "wsd" decays
    beta1: float = 0.9  # AdamW, also beside Muon
    beta2: float = 0.95  # AdamW, also beside Muon
    weight_decay: float = 0.1  # not on norms and biases
    clip_norm: float = 1.0  # largest norm of the whole gradient

    def check(self) -> None:
        """Raises InputError for fields that contradict each other."""
        if self.name == "adafactor" and self.moment_dtype != "float32":
            raise InputError(
                f"optimizer.moment_dtype={self.moment_dtype} applies to AdamW and Muon only, but "
                f"optimizer.name={self.name}: set moment_dtype to float32"
            )
        if self.schedule == "cosine" and self.decay_fraction != OptimizerConfig.decay_fraction:
            raise InputError(
                f"optimizer.decay_fraction={self.decay_fraction} applies to the schedule wsd only, "
                "but optimizer.schedule=cosine: set schedule to wsd, or remove decay_fraction"
            )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise InputError(
                f"optimizer.warmup_fraction={self.warmup_fraction} and optimizer.decay_fraction="
                f"{self.decay_fraction} add up to more than 1: lower one of them"
            )


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Balancing of the experts' load (docs/howto/balance.md)."""

    # "sequence": the paper's Eq. 11, a loss per sequence. "batch": Eq. 11 over the whole batch, or,
    # with train.grad_accumulation, over a microbatch and the earlier ones of its step. "bias": no
    # loss; biases that are used only to choose experts move against the load error. "none": no
    # balancing.
    kind: Literal["sequence", "batch", "bias", "none"] = "sequence"
    # Weight of the loss of "sequence" and "batch": total = mean cross-entropy + weight * sum over
    # layers. The published training code sums the cross-entropy over tokens instead, so its
    # effective weight at 8192 tokens is 0.001 / 8192.
    weight: float = 0.001
    # Weight of the router z-loss, added to any kind; 0: none.
    z_loss: float = 0.0
    # Step of an expert's bias, for "bias" only. A candidate group's is sqrt(G_I * R_I) times this.
    bias_rate: float = 0.001
    # For layers that share a pool of experts (moe.experts_across), with "sequence" and "batch":
    # "layer" balances each layer's choices, "pool" the choices of all its layers together.
    over: Literal["layer", "pool"] = "layer"


PUBLISHED_BALANCE = BalanceConfig()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: all remaining devices.

    If all are at their defaults, the run chooses a mesh that fits the memory of its devices
    (training/mesh.py). On one device, or if the memory is unknown (CPUs), the defaults apply.
    """

    data: int = -1  # replicas
    fsdp: int = 1  # shards of weights and optimizer state, and of the batch
    expert: int = 1  # shards of the routed experts, of the batch and of dense weights
    tensor: int = 1  # shards of heads, dense FFNs, shared expert and vocabulary


# The parts of a model that train.freeze can name. KINDS in layers/parameters.py has the parameters
# of each.
PARTS = (
    "embedding",
    "attention",
    "norms",
    "dense_ffn",
    "router",
    "experts",
    "shared_expert",
    "shared_gate",
    "concat_proj",
    "lm_head",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, precision, memory use and intervals of a run."""

    # Optimizer steps.
    steps: int = 2980
    # Microbatches per optimizer step; their gradients are averaged.
    grad_accumulation: int = 1
    # Dtype of activations.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Dtype of the master weights.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Implementation of the experts (pallas_kernels) and of attention (layers/causal.py: "cpu" and
    # "reference" process blocks of queries). "auto" selects it by platform.
    kernel: Literal["auto", "reference", "cpu", "tpu", "gpu"] = "auto"
    # Exchange of rows between devices that share the experts. "ragged" sends only rows; "padded"
    # sends up to twice as many bytes. "auto" chooses by the platform (moe/exchange.py).
    exchange: Literal["auto", "ragged", "padded"] = "auto"
    # For timing only: assigns tokens to experts in turn, so that every load is even. The model does
    # not learn to route. Every line of metrics.jsonl has force_balance: true.
    force_balance: bool = False
    # Activations kept for the backward pass: "none" keeps all, "full" only each layer's input,
    # "dots" the results of matrix products. The rest is recomputed.
    remat: Literal["none", "full", "dots"] = "full"
    # Layers unrolled per iteration of the loop over layers. Unrolling all of them saves copies of
    # each layer's weights and gradients, about 10 % of a step on a CPU, but compiles longer.
    scan_unroll: int = 1
    # Tokens per device whose logits the loss computes at a time.
    loss_chunk_tokens: int = 1024
    # Steps between lines of metrics.jsonl.
    log_every: int = 1
    # Steps between records of every expert's load in expert_load.jsonl (docs/monitoring.md).
    load_every: int = 10
    # Steps between held-out evaluations.
    eval_every: int = 100
    # Steps between checkpoints.
    checkpoint_every: int = 100
    # Newest checkpoints kept.
    keep_checkpoints: int = 3
    # Checkpoints of the lowest held-out loss kept beside them.
    keep_best: int = 0
    # Steps with a non-finite loss or gradient are skipped; this many in a row end the run.
    max_skipped_steps: int = 10
    # Parts of the model that are not trained: embedding, attention, norms, dense_ffn, router,
    # experts, shared_expert, shared_gate, concat_proj, lm_head. They have neither gradients nor
    # optimizer state. On the command line, separate names by commas.
    freeze: tuple[str, ...] = ()
    # Seed of initial weights, upcycling, stochastic rounding and psr's masks.
    seed: int = 0
    # Schedule of progressive scaling of routing (ReXMoE, docs/pooling.md). It masks some experts of
    # each layer, fewer over time, and none from psr_end on. Evaluation and generation never mask.
    psr: Literal["none", "linear", "stepwise"] = "none"
    # Shares of `steps` at which psr begins to unmask experts and at which all are unmasked.
    psr_start: float = 0.2
    psr_end: float = 0.6
    # "random" masks any expert (as ReXMoE); "foreign" only those of other layers.
    psr_mask: Literal["random", "foreign"] = "random"

    def __post_init__(self) -> None:
        if isinstance(self.freeze, tuple) and all(isinstance(name, str) for name in self.freeze):
            object.__setattr__(self, "freeze", _in_order(self.freeze))


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Splits names at commas, drops repeated ones, and sorts the rest as PARTS."""
    found = {name.strip() for each in names for name in each.split(",")} - {""}
    return tuple(sorted(found, key=lambda name: (*PARTS, name).index(name)))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a training run. `run_config` makes one from a preset or a ConfigDict.

    Raises:
      InputError: a field of the wrong type or out of range, or fields that contradict each other.

    Examples:
      >>> import finermoe_jax as fm
      >>> run = fm.run_config(fm.preset("demo"))
      >>> run.data.path, run.moe.intermediate_granularity
      ('demo/pydoc_small.txt', 8)
    """

    # The dense architecture. With init_from it must match the source; None: taken from it.
    dense: ModelConfig | None = None
    # The MoE architecture to upcycle to. None: train the model of init_from unchanged.
    moe: MoEConfig | None = None
    # Initialisation of the experts.
    upcycle: UpcycleConfig = PUBLISHED_UPCYCLING
    # HF directory, Hub id or finermoe checkpoint to start from, local or gs://; empty: random
    # weights.
    init_from: str = ""
    # Prompts to continue at every evaluation, as a sample of the model's text.
    prompts: tuple[str, ...] = ()
    # New tokens per prompt.
    prompt_tokens: int = 48
    data: DataConfig = DataConfig()  # text and batches
    optimizer: OptimizerConfig = OptimizerConfig()  # AdamW, Adafactor or Muon; the schedule
    balance: BalanceConfig = PUBLISHED_BALANCE  # load of the experts
    mesh: MeshConfig = MeshConfig()  # devices
    train: TrainConfig = TrainConfig()  # steps, precision, memory, logs, checkpoints

    def __post_init__(self) -> None:
        for group in (self, self.data, self.optimizer, self.balance, self.mesh, self.train):
            check_fields(group)
        if self.balance.kind == "bias" and self.moe is not None:
            # The model config records the biases, so checkpoints with and without them differ.
            moe = dataclasses.replace(self.moe, selection_bias=True)
            object.__setattr__(self, "moe", moe)
        object.__setattr__(self, "init_from", placed(self.init_from, "init_from"))
        if self.dense is None and not self.init_from:
            raise InputError(
                "init_from and dense are both empty: set init_from (weights to start from) or "
                "dense (an architecture for random weights)"
            )
        if self.dense is not None and self.dense.moe is not None:
            raise InputError("config.dense.moe must be None: put the experts into config.moe")
        if self.moe is not None and self.dense is not None:
            dataclasses.replace(self.dense, moe=self.moe)  # checks divisibility
        self.upcycle.check(self.moe)
        for name, (low, high) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if not low <= value <= high:  # also rejects NaN
                within = f"between {low} and {high}" if high < math.inf else f"at least {low}"
                raise InputError(f"{name}={value} must be {within}")
        self._check_parts()
        self._check_contradictions()

    def _check_psr(self) -> None:
        """Raises InputError if train.psr does not fit the experts."""
        train, moe = self.train, self.moe
        if train.psr_start > train.psr_end:
            raise InputError(
                f"train.psr_start={train.psr_start} must be at most train.psr_end={train.psr_end}"
            )
        if train.psr == "none":
            return
        if moe is None:
            raise InputError(
                f"train.psr={train.psr} masks experts, but config.moe is None: set config.moe, or "
                "train.psr=none"
            )
        if self.balance.kind == "bias":
            raise InputError(
                f"balance.kind=bias would raise the biases of experts that train.psr={train.psr} "
                "masks: set balance.kind=sequence or batch, or train.psr=none"
            )
        if moe.experts_across > 1:
            return
        if train.psr_mask == "foreign":
            raise InputError(
                "train.psr_mask=foreign masks the experts of other layers, but with "
                "moe.experts_across=1 there are none: set psr_mask=random, or "
                "experts_across to 2 or more"
            )
        half = (moe.num_experts if moe.plain_top_k else moe.group_size) // 2
        if half < moe.active_per_group:
            raise InputError(
                f"train.psr={train.psr} with moe.experts_across=1 begins with {half} experts of "
                f"each group, fewer than moe.active_per_group={moe.active_per_group}: set "
                "train.psr=none, or experts_across to 2 or more"
            )

    def _check_parts(self) -> None:
        """Raises InputError for an unknown part in train.freeze, or if it names all parts."""
        for name in self.train.freeze:
            if name not in PARTS:
                raise InputError(
                    f"train.freeze: a model has no part {name!r}. {near_misses(name, PARTS)}"
                )
        if self.train.freeze == PARTS:
            raise InputError(
                f"train.freeze={','.join(PARTS)} names all parts, so nothing is trained: remove "
                "some"
            )

    def _check_contradictions(self) -> None:
        """Raises InputError for fields that contradict each other."""
        if self.balance.over == "pool" and self.balance.kind not in ("sequence", "batch"):
            raise InputError(
                f"balance.over=pool has no effect with balance.kind={self.balance.kind}: set "
                "balance.over=layer, or balance.kind=sequence or batch"
            )
        self._check_psr()
        data, train, optimizer = self.data, self.train, self.optimizer
        optimizer.check()
        if train.keep_best and not (data.eval_fraction or data.eval_path):
            raise InputError(
                f"train.keep_best={train.keep_best} needs held-out data, but data.eval_fraction="
                f"{data.eval_fraction}: raise it, set data.eval_path, or set keep_best to 0"
            )
        together = math.lcm(train.eval_every, train.checkpoint_every)
        if train.keep_best and together > train.steps:
            raise InputError(
                f"train.keep_best={train.keep_best}: none of the {train.steps} train.steps before "
                f"the last is both scored (train.eval_every={train.eval_every}) and saved "
                f"(train.checkpoint_every={train.checkpoint_every}); make one a multiple of the "
                "other"
            )
        if self.balance.kind == "bias" and "router" in train.freeze:
            raise InputError(
                "balance.kind=bias moves the biases of a router that learns, but train.freeze="
                f"{','.join(train.freeze)} freezes it: remove router from train.freeze, or set "
                "another balance.kind"
            )
        if data.global_batch_size % train.grad_accumulation:
            raise InputError(
                f"data.global_batch_size={data.global_batch_size} must be a multiple of "
                f"train.grad_accumulation={train.grad_accumulation}"
            )


_AT_LEAST_ONE = (
    "data.sequence_length",
    "data.global_batch_size",
    "data.eval_windows",
    "prompt_tokens",
    "train.steps",
    "train.grad_accumulation",
    "train.scan_unroll",
    "train.loss_chunk_tokens",
    "train.log_every",
    "train.load_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
)
# Minimum and maximum of RunConfig's fields.
_RANGES: dict[str, tuple[float, float]] = dict.fromkeys(_AT_LEAST_ONE, (1, math.inf)) | {
    "data.eval_fraction": (0, 0.999),
    "data.seed": (0, 2**32 - 1),
    "train.seed": (0, 2**32 - 1),
    "train.keep_best": (0, 1e6),
    "balance.weight": (0, 1e6),
    "balance.z_loss": (0, 1e6),
    "balance.bias_rate": (0, 1e6),
    "train.psr_start": (0, 1),
    "train.psr_end": (0, 1),
    "optimizer.warmup_fraction": (0, 1),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.clip_norm": (1e-12, 1e12),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.final_learning_rate": (0, 1e6),
}
