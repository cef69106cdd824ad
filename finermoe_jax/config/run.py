"""The config of a run: model, start, data, optimizer, mesh, training."""

import dataclasses
import math
import operator
from typing import Literal

from finermoe_jax.config.model import ModelConfig, MoEConfig, check_fields
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.paths import local, local_list


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, in rows of sequence_length tokens (docs/data.md)."""

    # Text, a directory of finermoe_jax.prepare_data, a Megatron .bin/.idx pair, or a mixture
    # "path:weight,path:weight".
    path: str = ""
    # "stream": windows of the token stream, across documents. "documents": whole documents in a
    # row, each on its own in attention, positions and loss.
    packing: Literal["stream", "documents"] = "stream"
    # A directory with a tokenizer, or a hub id; empty: the tokenizer of init_from.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", local_list(self.path, "data.path"))
        for name in ("tokenizer", "eval_path"):
            object.__setattr__(self, name, local(getattr(self, name), f"data.{name}"))


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
    # Implementation of the experts (pallas_kernels) and of attention (layers/causal.py: "cpu" and
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
    # A step whose loss or gradient is not finite is skipped; so many in a row end the run.
    max_skipped_steps: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything train.py needs; configs/*.py make one through `default_config`."""

    # The dense architecture. With init_from it must agree with the source; None: as the source.
    dense: ModelConfig | None = None
    # How the FFNs become experts; None trains the model as init_from holds it.
    moe: MoEConfig | None = None
    # The start of those experts.
    upcycle: UpcycleConfig = PUBLISHED_UPCYCLING
    # HF directory, hub id or finermoe checkpoint to start from; empty: random weights.
    init_from: str = ""
    # Prompts whose continuations are shown before and after training.
    prompts: tuple[str, ...] = ()
    prompt_tokens: int = 48
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        for group in (self, self.data, self.optimizer, self.mesh, self.train):
            check_fields(group)
        object.__setattr__(self, "init_from", local(self.init_from, "init_from"))
        if self.dense is None and not self.init_from:
            raise InputError("a run needs init_from (weights to start from) or dense (a shape)")
        if self.dense is not None and self.dense.moe is not None:
            raise InputError("config.dense states the dense shape; the experts go into config.moe")
        if self.moe is not None and self.dense is not None:
            dataclasses.replace(self.dense, moe=self.moe)  # divisibility, before any work
        self.upcycle.check(self.moe)
        for name, (low, high) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if not low <= value <= high:  # also refuses NaN
                within = (
                    f"lie between {low} and {high}" if high < math.inf else f"be at least {low}"
                )
                raise InputError(f"{name}={value} must {within}")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        """Raises InputError for fields that are right alone, and not together."""
        data, train, optimizer = self.data, self.train, self.optimizer
        if optimizer.name != "adamw" and optimizer.moment_dtype != "float32":
            raise InputError(
                f"optimizer.moment_dtype={optimizer.moment_dtype} is AdamW's, and optimizer.name="
                f"{optimizer.name} keeps no first moment: leave it at float32"
            )
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
# The smallest and the largest values of a RunConfig's fields.
_RANGES: dict[str, tuple[float, float]] = dict.fromkeys(_AT_LEAST_ONE, (1, math.inf)) | {
    "data.eval_fraction": (0, 0.999),
    "data.seed": (0, 2**32 - 1),
    "train.seed": (0, 2**32 - 1),
    "train.keep_best": (0, 1e6),
    "train.aux_loss_weight": (0, 1e6),
    "optimizer.warmup_fraction": (0, 1),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.clip_norm": (1e-12, 1e12),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.final_learning_rate": (0, 1e6),
}
