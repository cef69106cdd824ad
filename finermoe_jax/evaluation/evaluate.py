"""Held-out loss of a run, perplexity of a file, tasks of the evaluation harness."""

import dataclasses
import functools
import itertools
import math
import os
import random
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from finermoe_jax.config.arguments import check_integer
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.data.packing import Batch, counted, masks
from finermoe_jax.data.rows import Mixture
from finermoe_jax.data.text import Piece, TextFile, tokenize
from finermoe_jax.data.tokenizers import prefix_token
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation.scoring import BATCH_TOKENS, score, windows
from finermoe_jax.layers import sharding
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.losses import cross_entropy_sum
from finermoe_jax.model.quantize import int8_weights
from finermoe_jax.runtime.install import require
from finermoe_jax.runtime.paths import local
from finermoe_jax.weights.source import open_with_tokenizer, read_model


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The evaluation harness tasks to run, and their settings.

    names, data_dir, num_fewshot, skip_missing and allow_code_execution are as in `tasks.select`.
    limit: rows per task; None: all. chat: wraps prompts in the tokenizer's chat template.
    """

    names: Sequence[str]
    data_dir: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    skip_missing: bool = False
    allow_code_execution: bool = False


def evaluate(
    checkpoint: str,
    *,
    text: Path | None = None,
    sequence_length: int = 0,
    stride: int = 0,
    tasks: Tasks | None = None,
    int8: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a text and harness tasks, on all devices.

    Args:
      checkpoint: checkpoint, workdir, HF directory or Hub id, with a tokenizer.
      text: .txt or .jsonl file. Every token of a document is scored once, given at least
        sequence_length - stride previous tokens or the document's beginning.
      sequence_length: tokens per window; 0: the model's context, at most 2048.
      stride: tokens between window starts; 0: half a window.
      tasks: harness tasks.
      int8: uses int8 weights (`quantize.int8_weights`), on one device.
      batch_tokens: tokens per batch and device, padding included.
      show_progress: shows progress bars on stderr.

    Returns:
      For text: perplexity, loss (nats per token), tokens. For tasks: tasks (name → metric →
      value), cut (number of truncated prompts) and, if any, skipped (names).

    Raises:
      InputError: before weights are read, for unreadable text, invalid windows, a missing
        tokenizer, unknown tasks, missing or unusable rows, or if the extra `eval` is not
        installed; afterwards, if log-likelihoods are not finite.
    """
    check_integer("--batch_tokens", batch_tokens, 1)
    file = TextFile(text) if text else None
    tasks = _checked(tasks) if tasks else None
    # Before the harness, which is slow to import.
    source, tokenizer, ends = open_with_tokenizer(checkpoint)
    limit = source.config.context_length
    pieces = list(file.pieces()) if file else []
    selection: Any = _select(tasks) if tasks else None
    if text:
        sequence_length, stride = _window(sequence_length, stride, limit)
    if tasks:
        _check_tasks(tasks, selection, tokenizer, limit)
    documents = _documents(pieces, tokenizer, show_progress, text)
    spread = jax.device_count() > 1 and not int8
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1)) if spread else None
    if show_progress:
        print(source.announcement, file=sys.stderr, flush=True)
    model = read_model(source, checkpoint, mesh)
    if int8:
        model = int8_weights(model)
    results: dict[str, Any] = {}
    options: dict[str, Any] = dict(batch_tokens=batch_tokens, show_progress=show_progress)
    if text:
        results |= _perplexity(model, documents, sequence_length, stride, **options)
    if tasks:
        results |= _run(model, tokenizer, tasks, selection, dict(ends=ends, **options))
    return results


def _window(length: int, stride: int, limit: int) -> tuple[int, int]:
    """Returns a window's length and stride, with defaults for 0. Raises InputError if invalid."""
    length = length or min(limit, 2048)
    stride = stride or max(1, length // 2)
    if not 1 <= length <= limit:
        raise InputError(f"--sequence_length={length} must be in 1 … {limit}, the model's context")
    if not 1 <= stride <= length:
        raise InputError(f"--stride={stride} must be in 1 … {length}, the window's length")
    return length, stride


def _documents(
    pieces: list[Piece], tokenizer: Any, show_progress: bool, text: Path | None
) -> list[tuple[int, np.ndarray]]:
    """Returns each document's prefix (or else first) token and tokens to score, int32 [N]."""
    ids, starts = tokenize(pieces, tokenizer, show_progress and bool(pieces))
    ends = [*starts[1:], len(ids)] if len(starts) else []
    prefix, closed = prefix_token(tokenizer), tokenizer.eos_token_id is not None
    documents: list[tuple[int, np.ndarray]] = []
    for start, end in zip(starts, ends, strict=True):
        own = ids[start : end - closed]
        if prefix is not None:
            documents.append((prefix, own))
        elif len(own):
            documents.append((int(own[0]), own[1:]))
    if text and not any(len(own) for _, own in documents):
        raise InputError(f"{text} contains no token to score")
    return documents


def _perplexity(
    model: Decoder,
    documents: list[tuple[int, np.ndarray]],
    length: int,
    stride: int,
    *,
    batch_tokens: int,
    show_progress: bool,
) -> dict[str, float | int]:
    total, count = 0.0, sum(len(ids) for _, ids in documents)
    parts = (part for prefix, ids in documents for part in windows(ids, prefix, length, stride))
    with tqdm(total=count, desc="scoring", unit="token", disable=not show_progress) as bar:
        # In groups: overlapping windows need many times the text's memory.
        for group in itertools.batched(parts, 512):
            scores = score(model, group, batch_tokens=batch_tokens)
            total += math.fsum(one.log_likelihood for one in scores)
            bar.update(sum(len(part.targets) for part in group))
    loss = -total / count
    # The minimum avoids overflow.
    return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "tokens": count}


def _checked(tasks: Tasks) -> Tasks:
    """Resolves data_dir. Raises InputError for errors that need no model."""
    data_dir = None if tasks.data_dir is None else Path(local(tasks.data_dir))
    if not tasks.names:
        raise InputError(
            "--tasks is empty: name tasks, such as arc_easy,hellaswag, or finermoe for the paper's "
            "ten"
        )
    for name, value, least in (("limit", tasks.limit, 1), ("num_fewshot", tasks.num_fewshot, 0)):
        if value is not None:
            check_integer(f"--{name}", value, least)
    if tasks.skip_missing and tasks.data_dir is None:
        raise InputError("--skip_missing has no effect without --data_dir; add --data_dir")
    for package in ("lm_eval", "datasets"):
        require(package, "eval", "--tasks")
    return dataclasses.replace(tasks, data_dir=data_dir)


def _select(tasks: Tasks) -> Any:
    """Loads the harness's tasks and their rows."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing PyTorch
    from finermoe_jax.evaluation.tasks import select

    return select(
        tasks.names,
        tasks.data_dir,
        num_fewshot=tasks.num_fewshot,
        skip_missing=tasks.skip_missing,
        allow_code_execution=tasks.allow_code_execution,
    )


def _check_tasks(tasks: Tasks, selection: Any, tokenizer: Any, limit: int) -> None:
    """Checks tasks and rows against model and tokenizer. Raises InputError."""
    from finermoe_jax.evaluation.harness import check_limits, check_rows, required_prefix

    required_prefix(tokenizer)
    if tasks.chat and not tokenizer.chat_template:
        raise InputError(
            "--apply_chat_template: the tokenizer has no chat template; omit the flag for a base "
            "model"
        )
    check_limits(selection.tasks, limit)
    check_rows(selection.tasks, tasks.limit, tasks.num_fewshot)


def _run(
    model: Decoder, tokenizer: Any, tasks: Tasks, selection: Any, options: dict[str, Any]
) -> dict[str, Any]:
    import lm_eval

    from finermoe_jax.evaluation.harness import HarnessModel, metrics_of
    from finermoe_jax.evaluation.tasks import ALL_TEN, TEN

    harness = HarnessModel(model, tokenizer, **options)
    random.seed(0)  # few-shot examples have the harness's own fixed seeds
    with redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=selection.objects,
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            apply_chat_template=tasks.chat,
            confirm_run_unsafe_code=tasks.allow_code_execution,
            log_samples=False,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )
    metrics = {name: metrics_of(values) for name, values in found["results"].items()}
    if ALL_TEN in tasks.names:
        values = [metrics[name][metric] for name, metric in TEN.items() if name in metrics]
        metrics[ALL_TEN] = {"mean": math.fsum(values) / len(values), "benchmarks": len(values)}
    warn_non_finite(metrics)
    skipped = {"skipped": selection.skipped} if selection.skipped else {}
    return {"tasks": metrics, "cut": harness.cut} | skipped


def warn_non_finite(metrics: dict[str, dict[str, float]]) -> None:
    """Warns on stderr about each task's metric that is NaN or infinite."""
    for task, values in metrics.items():
        for name, value in values.items():
            if not math.isfinite(value):
                print(
                    f"WARNING: {task}: {name} is not finite ({value}) and becomes null in JSON",
                    file=sys.stderr,
                )


def held_out_loss(model: Decoder, rows: Mixture, count: int, chunk_tokens: int) -> float:
    """Returns the mean cross-entropy of `count` rows, in nats per counted target.

    The sources contribute in proportion to their weights. Sums in float64 on the host.
    """
    graphdef, state = nnx.split(model)
    state = sharding.as_kernels_read(state)
    indices = rows.in_order(count)
    size = batch_rows(len(indices), model.placement.mesh)
    total, targets = 0.0, 0
    for start in range(0, len(indices), size):
        part = rows.read(indices[start : start + size])
        real = np.arange(size) < len(part.tokens)
        targets += int(np.asarray(counted(part)).sum())
        missing = ((0, size - len(part.tokens)), (0, 0))
        batch = jax.tree.map(functools.partial(np.pad, pad_width=missing), part)
        total += float(summed_loss(graphdef, state, batch, real, chunk_tokens))
    return total / max(1, targets)


def batch_rows(count: int, mesh: Mesh | None) -> int:
    """Returns the held-out loss's batch size for `count` rows: a multiple of the mesh's parts."""
    parts = sharding.batch_parts(mesh) if mesh else 1
    return -(-min(16, count) // parts) * parts


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk_tokens"))
def summed_loss(
    graphdef: Any, state: Any, batch: Batch, real: Array, chunk_tokens: int
) -> Float[Array, ""]:
    """Sums the cross-entropy of the counted targets in the rows where `real` is True."""
    model = nnx.merge(graphdef, state)
    hidden = model.features(batch.tokens[:, :-1], **masks(batch)).hidden
    targets = batch.tokens[:, 1:]
    mask = counted(batch) & real[:, None]
    return cross_entropy_sum(model, hidden, targets, mask, chunk_tokens)
