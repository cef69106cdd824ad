"""A run's output: logs, progress line, TensorBoard, Weights & Biases and profile.

docs/monitoring.md defines each figure. Runs on the host only and never blocks on a device.
"""

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from finermoe_jax.config.flops import training_flops
from finermoe_jax.config.hardware import peak_flops
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.moe.routing import in_groups
from finermoe_jax.runtime.install import require
from finermoe_jax.training import goodput
from finermoe_jax.training.trackers import TensorBoard, WeightsAndBiases
from finermoe_jax.training.workdir import Log

_GIB = 2**30

# Fields of metrics.jsonl that depend on time and hardware; two equal runs share all others.
MEASURED = (
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "step_seconds",
    "input_seconds",
    "pause_seconds",
    "memory_gib",
)


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """Optional output beyond the workdir's JSON-lines files. It does not change the run."""

    tensorboard: bool = False
    wandb: str = ""  # project; empty: off
    profile_steps: tuple[int, int] | None = None  # first and last traced step
    peak_flops: float | None = None  # of one device, FLOP/s; None: by its kind


NOTHING_MORE = Telemetry()


def read_steps(text: str) -> tuple[int, int] | None:
    """Parses the inclusive range "a:b" as (a, b); returns None for empty text.

    Raises InputError unless 1 <= a <= b.
    """
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(
            f"--profile_steps={text!r} must be FIRST:LAST with 1 <= FIRST <= LAST, such as 20:22"
        )
    return int(first), int(last)


def check(telemetry: Telemetry, steps: int) -> None:
    """Raises InputError for a missing package, profile steps out of range or an invalid peak."""
    for asked, package, flag in (
        (telemetry.tensorboard, "tensorboardX", "--tensorboard"),
        (bool(telemetry.wandb), "wandb", f"--wandb={telemetry.wandb}"),
    ):
        if asked:
            require(package, package.removesuffix("X").lower(), flag)
    if telemetry.profile_steps:
        begin, end = telemetry.profile_steps
        if not 0 < begin <= end <= steps:
            raise InputError(f"--profile_steps={begin}:{end} must be within this run's 1:{steps}")
    if telemetry.peak_flops is not None and not 0 < telemetry.peak_flops < math.inf:
        raise InputError(f"--peak_tflops={telemetry.peak_flops / 1e12:g} must be positive")


# --- expert load ----------------------------------------------------------------------------


class Load(NamedTuple):
    """Distribution of a step's tokens over the experts of each MoE layer."""

    aux_loss: Float[np.ndarray, " L"]  # Eq. 11; 1 if balanced
    tokens: Int[np.ndarray, "L E"]
    entropy: Float[np.ndarray, " L"]  # of the experts' shares, divided by log E; 1 if balanced
    max_over_mean: Float[np.ndarray, " L"]
    dead: Int[np.ndarray, " L"]  # number of experts that no token selected
    candidates: Float[np.ndarray, "L O R"]  # share of a slot's tokens in each candidate group
    # As above, over the experts of each candidate group.
    group_entropy: Float[np.ndarray, "L O R"]
    group_max_over_mean: Float[np.ndarray, "L O R"]
    group_dead: Int[np.ndarray, "L O R"]
    # Only for layers that share a pool.
    starved: Float[np.ndarray, " L"] | None = None  # share of experts below a tenth of the mean
    foreign: Float[np.ndarray, " L"] | None = None  # share of choices of other layers' experts


def load_of(
    tokens: Int[np.ndarray, "L E"], aux_loss: Float[np.ndarray, " L"], moe: MoEConfig
) -> Load:
    """Computes the load from the number of tokens that selected each expert of the pool."""
    across = moe.experts_across
    per_group = in_groups(tokens, moe)
    groups = per_group.sum(axis=3)
    entropy, max_over_mean, dead = _evenness(tokens)
    starved = foreign = None
    if across > 1:
        starved = (tokens < tokens.mean(axis=1, keepdims=True) / 10).mean(axis=1)
        layer = np.arange(len(tokens))
        own = tokens.reshape(len(tokens), -1, across)[layer, :, layer % across].sum(axis=1)
        foreign = (tokens.sum(axis=1) - own) / np.maximum(tokens.sum(axis=1), 1)
    return Load(
        aux_loss=aux_loss,
        tokens=tokens,
        entropy=entropy,
        max_over_mean=max_over_mean,
        dead=dead,
        candidates=groups / np.maximum(groups.sum(axis=2, keepdims=True), 1),
        **dict(zip(_OF_GROUPS, _evenness(per_group), strict=True)),
        starved=starved,
        foreign=foreign,
    )


_OF_GROUPS = ("group_entropy", "group_max_over_mean", "group_dead")


def _evenness(tokens: Int[np.ndarray, "*L E"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns entropy, fullest over mean and the number of dead experts along the last axis.

    Without any token the first two are 0.
    """
    share = tokens / np.maximum(tokens.sum(axis=-1, keepdims=True), 1)
    surprise = np.log(share, out=np.zeros_like(share), where=share > 0)
    experts = tokens.shape[-1]
    entropy = -(share * surprise).sum(axis=-1) / math.log(experts) if experts > 1 else share[..., 0]
    return entropy, share.max(axis=-1) * experts, (tokens == 0).sum(axis=-1)


# --- the progress line ----------------------------------------------------------------------


class _Lines:
    """Output stream for tqdm outside a terminal: writes each update as a separate line."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def _progress(steps: int, first: int) -> tqdm:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=steps,
        initial=first,
        desc="training",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.5 if terminal else 20,
        miniters=1,
        smoothing=0,  # average speed, so that the remaining time includes evaluations and saves
        dynamic_ncols=terminal,
        bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} "
        "[{elapsed}<{remaining}]{postfix}",
        disable=jax.process_index() > 0,
    )


def memory_gib() -> float:
    """Returns the peak memory in GiB of the fullest local device, or else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class Monitor:
    """Writes one run's finished steps to all outputs.

    All processes must make the same calls; only the first one writes. `profile` is the first and
    the last traced step, (0, 0) without a profile.
    """

    def __init__(
        self,
        workdir: Path,
        config: RunConfig,
        model: ModelConfig,
        telemetry: Telemetry,
        first: int,
        devices: int,
        started: float | None = None,
    ):
        """`first` is the last finished step, `devices` the number of devices.

        Raises InputError if Weights & Biases cannot be reached.
        """
        self.log, self.config, self.moe, self.devices = Log(workdir), config, model.moe, devices
        # A resumed run traces the remaining steps, so that the same command can resume.
        begin, end = telemetry.profile_steps or (0, 0)
        traces = end > first and jax.process_index() == 0
        self.profile = (max(begin, first + 1), end) if traces else (0, 0)
        self.profile_directory = workdir / "profile"
        peak = telemetry.peak_flops or peak_flops(jax.devices()[0].device_kind)
        needed = training_flops(model, config.data.sequence_length, config.train.freeze)
        self.mfu_per_speed = None if peak is None else needed / (devices * peak)
        self.held_out: float | None = None
        self.writers: list[TensorBoard | WeightsAndBiases] = []
        self.bar: tqdm | None = None
        self.line: dict[str, Any] | None = None  # last line of metrics.jsonl
        self.tracing = False
        self.started, self.recorded = started, 0.0
        if jax.process_index() == 0:
            if telemetry.tensorboard:
                self.writers.append(TensorBoard(workdir, first))
            if telemetry.wandb:
                self.writers.append(WeightsAndBiases(telemetry.wandb, workdir, config))
        self.begin(first)

    # --- time -------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Restarts the clock after `step` steps."""
        self.clock, self.since = time.perf_counter(), step
        self.waited = self.paused = self.tokens = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the time that the loop waits for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes time from step_seconds: an evaluation, a save or a profile."""
        began = time.perf_counter()
        if self.bar is not None:
            self.bar.clear()
        yield
        self.paused += time.perf_counter() - began

    @contextlib.contextmanager
    def spending(self, kind: str, step: int) -> Iterator[None]:
        """Records time outside steps, of one of goodput.KINDS, into time.jsonl."""
        began = time.perf_counter()
        yield
        self.record(kind, step, time.perf_counter() - began)

    def record(self, kind: str, step: int, seconds: float) -> None:
        """Adds a record to time.jsonl."""
        self.recorded += seconds
        self.log.append(goodput.LOG, {"step": step, "kind": kind, "seconds": round(seconds, 3)})

    # --- output -----------------------------------------------------------------------------

    def show_progress(self, first: int) -> None:
        """Shows the progress line and starts the clock."""
        if self.started is not None:
            whole = time.perf_counter() - self.started
            self.record("starting", first, whole - self.recorded)
        self.bar = _progress(self.config.train.steps, first)
        self.begin(first)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs a finished step. Call it once per step, in order, with train_step's metrics."""
        train = self.config.train
        last = step == train.steps
        self.tokens += float(values["tokens"])
        load = None
        if self.moe is not None and len(values["expert_tokens"]):
            load = load_of(values["expert_tokens"], values["layer_aux_loss"], self.moe)
        if step % train.log_every == 0 or last:
            self._log(step, values, load)
        if load is not None and (step % train.load_every == 0 or step == 1 or last):
            self.log.append("expert_load.jsonl", {"step": step, **_plain(load)})
            self._write(step, _load_scalars(load))
        if self.bar is not None:
            self.bar.update()

    def _log(self, step: int, values: Mapping[str, Any], load: Load | None) -> None:
        now, steps = time.perf_counter(), step - self.since
        seconds = (now - self.clock - self.paused) / steps
        speed = self.tokens / steps / seconds
        line: dict[str, Any] = {
            **{name: float(value) for name, value in values.items() if np.ndim(value) == 0},
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.devices,
            "mfu": None if self.mfu_per_speed is None else speed * self.mfu_per_speed,
            "step_seconds": seconds,
            "input_seconds": self.waited / steps,
            "pause_seconds": self.paused,
            "memory_gib": memory_gib(),
        }
        if self.config.train.force_balance:
            line["force_balance"] = True
        if load is not None:
            line |= {
                "load_entropy": float(load.entropy.min()),
                "load_max_over_mean": float(load.max_over_mean.max()),
                "dead_experts": int(load.dead.sum()),
            }
            if load.foreign is not None:
                line["foreign_share"] = float(load.foreign.mean())
        self.begin(step)
        self.log.append("metrics.jsonl", {"step": step, **line})
        self._write(step, {f"train/{k}": v for k, v in line.items() if v is not None})
        self.line = line
        self._show()

    def _show(self) -> None:
        """Updates the progress line, most important figures first: terminals cut the rest."""
        if self.bar is None or self.line is None:
            return
        line = self.line
        parts = ["force_balance"] if self.config.train.force_balance else []
        parts.append(f"loss {line['loss']:.3f}")
        if self.held_out is not None:
            parts.append(f"held-out {self.held_out:.3f}")
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{line['tokens_per_second_per_device']:,.0f}/device")
        if line["mfu"] is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        parts.append(f"{line['memory_gib']:.1f} GiB")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)

    def evaluation(self, name: str, step: int, loss: float) -> None:
        """Logs the held-out loss of the model `name`."""
        self.log.append("evals.jsonl", {"name": name, "step": step, "loss": loss})
        if name.startswith("step"):
            self.held_out = loss
            self._write(step, {"held_out/loss": loss})
            self._show()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    # --- profile ----------------------------------------------------------------------------

    def start_profile(self) -> None:
        """Starts tracing this process and its devices."""
        jax.profiler.start_trace(self.profile_directory, create_perfetto_trace=True)
        self.tracing = True

    def stop_profile(self) -> None:
        """Stops tracing; writes the trace to the workdir's profile/."""
        self.tracing = False
        jax.profiler.stop_trace()

    def close(self, failed: bool) -> None:
        """Closes the progress line, the profile and the trackers."""
        if self.tracing:
            self.stop_profile()
        if self.bar is not None:
            self.bar.close()
        for writer in self.writers:
            writer.close(failed)


def _plain(load: Load) -> dict[str, Any]:
    """Converts to JSON types; rounds shares and ratios to four digits."""
    return {
        name: value.tolist() if value.dtype.kind in "iu" else np.round(value, 4).tolist()
        for name, value in load._asdict().items()
        if value is not None
    }


def _load_scalars(load: Load) -> dict[str, float]:
    """Returns each layer's figures under separate names. Layers count MoE layers only."""
    scalars = {}
    for layer in range(len(load.tokens)):
        for name in ("aux_loss", "entropy", "max_over_mean", "dead", "starved", "foreign"):
            if (values := getattr(load, name)) is not None:
                scalars[f"load_{name}/layer_{layer:02}"] = float(values[layer])
        for (slot, candidate), share in np.ndenumerate(load.candidates[layer]):
            group = f"load_slot_{slot}_candidate_{candidate}"
            scalars[f"{group}/layer_{layer:02}"] = float(share)
            for name in _OF_GROUPS:
                value = getattr(load, name)[layer, slot, candidate]
                scalars[f"{group}_{name.removeprefix('group_')}/layer_{layer:02}"] = float(value)
    return scalars
