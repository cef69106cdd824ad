"""A run's checkpoints: asynchronous saves, retention, and failed saves."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from finermoe_jax.errors import RunEnded, first_line
from finermoe_jax.model.decoder import Decoder, parameter_kinds
from finermoe_jax.runtime import disk, distributed
from finermoe_jax.runtime.buckets import Place, Unreachable
from finermoe_jax.runtime.json_files import read_json
from finermoe_jax.training.storage import LocalStorage, Storage, files_of
from finermoe_jax.weights import lazy, orbax_files
from finermoe_jax.weights.checkpoint import (
    ASYNC,
    CONFIG,
    OPTIMIZER,
    PARAMS,
    TOKENIZER,
    TokenizerSave,
    committing,
    described,
    durable,
    readable,
    registry,
)
from finermoe_jax.weights.integrity import saved_steps
from finermoe_jax.weights.model_card import UNKNOWN, Origin
from finermoe_jax.weights.orbax_files import save_errors


class TrainingCheckpoints:
    """A workdir's checkpoints/, saved asynchronously through Orbax's manager.

    Keeps the `keep` newest and, in addition, the `keep_best` with the lowest held-out loss. Each
    one states the `origin` of the run's initial weights.
    """

    def __init__(
        self,
        directory: Place,
        keep: int,
        keep_best: int = 0,
        origin: Origin = UNKNOWN,
        storage: Storage | None = None,
    ):
        """`storage` of a run in a bucket is asked before each save and before each commit."""
        self.directory, self.keep_best, self.origin = directory.absolute(), keep_best, origin
        self.storage = storage or LocalStorage(Path(directory).parent)
        self._step, self._committed = -1, saved_steps(self.directory)
        self.arrays = orbax_files.ArrayHandler()
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_held_out_loss,
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self.manager = ocp.CheckpointManager(
            os.fspath(self.directory),
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                best_fn=_held_out_loss if keep_best else None,
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                async_options=ASYNC,
                temporary_path_class=self._temporary_path(),
            ),
            handler_registry=registry(self.arrays),
        )
        # Collects the failed saves that Orbax's threads log.
        self._listening = contextlib.ExitStack()
        self.failures = self._listening.enter_context(save_errors())

    def _temporary_path(self) -> Any:
        if isinstance(self.directory, Path):
            return durable()

        def after(name: str) -> None:
            self._committed.append(int(name))

        return committing(self.directory, self.storage.before_commit, after)

    def latest_step(self) -> int | None:
        """Returns the newest complete step; None in a new workdir."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the kept step with the lowest held-out loss; None without keep_best."""
        return self.manager.best_step() if self.keep_best else None

    def save(
        self,
        step: int,
        model: Decoder,
        params: dict,
        optimizer: Any,
        tokenizer: Path | None,
        loss: float | None = None,
        logged: Mapping[str, int] | None = None,
        skipped_in_a_row: int = 0,
    ) -> None:
        """Starts an asynchronous save of this step. It is complete when `wait` returns.

        `loss` is the held-out loss for keep_best, `logged` the size of each log in bytes,
        `skipped_in_a_row` the number of steps skipped directly before this save.

        Raises RunEnded if the disk is full, the previous save failed, or another run has taken the
        bucket's lock.
        """
        if step in self.manager.all_steps():
            return
        self.wait()
        self._step = step
        self._refuse_full(step, params, optimizer)
        weights = model.embed.weight.dtype
        config = described(model.config, model.dtype, weights, self.origin) | {
            "step": step,
            "logged": dict(logged or {}),
            "skipped_in_a_row": skipped_in_a_row,
        }
        items = {
            CONFIG: ocp.args.JsonSave(config),
            PARAMS: ocp.args.PyTreeSave(params, save_args=_chunks(model, params)),
            TOKENIZER: TokenizerSave(tokenizer),
            OPTIMIZER: ocp.args.PyTreeSave(optimizer),
        }
        metrics = {"loss": loss} if loss is not None and math.isfinite(loss) else {}
        with self._saving():
            self.storage.before_save()
            self.manager.save(
                step, args=ocp.args.Composite(**items), metrics=metrics if self.keep_best else None
            )

    def check(self) -> None:
        """Raises RunEnded if the save in progress or the storage has failed; does not block."""
        self.storage.check()
        if self.failures:
            raise self._ended(self.failures[0])

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises as `save` does."""
        try:
            with self._saving():
                self.manager.wait_until_finished()
        finally:
            self._settle()

    def _settle(self) -> None:
        """Blocks until no write is in flight; after an outage Orbax may retry for minutes."""
        if not any(map(self.storage.is_outage, self.failures)):
            self.arrays.settle()

    def restore(self, step: int, params: dict, optimizer: Any) -> tuple[dict, Any]:
        """Restores weights and optimizer state of a step, with the shardings of the targets.

        Raises InputError if the checkpoint cannot be read.
        """
        directory = self.directory / str(step)
        with readable(directory):
            return (
                orbax_files.restore(directory / PARAMS, params),
                orbax_files.restore(directory / OPTIMIZER, optimizer),
            )

    def close(self) -> None:
        """Waits for a save in progress; raises as `save` does, once."""
        try:
            if not self.failures:
                self.wait()
        finally:
            self._settle()
            # After a failure the manager would wait forever for the other processes' parts.
            if not self.failures or (
                jax.process_count() == 1 and not any(map(self.storage.is_outage, self.failures))
            ):
                with contextlib.suppress(Exception):  # repeats the failure
                    self.manager.wait_until_finished()
                self.manager.close()
            self._listening.close()

    def _refuse_full(self, step: int, *trees: Any) -> None:
        """Raises RunEnded, on all processes, if the disk has no room for these arrays."""
        if not isinstance(self.directory, Path):
            return  # a bucket has room
        leaves = jax.tree.leaves(trees)
        size, files = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), 0
        if known := saved_steps(self.directory):
            newest = list((self.directory / str(known[-1])).rglob("*"))
            size, files = sum(path.stat().st_size for path in newest), len(newest)
        full = not disk.has_room(self.directory, size, files)
        if distributed.exchange("full" if full else "")[0]:
            raise RunEnded(
                f"step {step} was not saved: a checkpoint needs about {disk.format_bytes(size)} "
                f"and {files} files, but {self._full()}"
            )

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Converts Orbax's errors for a failed save to RunEnded."""
        try:
            yield
        except Exception as error:
            self.failures.append(error)
            ended = self._ended(error)
            if ended is error:
                raise
            raise ended from error

    @contextlib.contextmanager
    def ending_when_full(self) -> Iterator[None]:
        """Converts errors due to a full disk to RunEnded; others pass through."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RunEnded) or not disk.is_full(error):
                raise
            raise self._ended(error) from error

    def _ended(self, error: Exception) -> RunEnded:
        if self.storage.is_outage(error):
            reason = error.reason if isinstance(error, Unreachable) else first_line(error)
            # tensorstore's names the cause at its end
            reason = reason if len(reason) < 200 else f"… {reason[-150:]}"
            return Unreachable(
                f"step {self._step} was not saved: {self.directory}", reason, self._complete()
            )
        if isinstance(error, RunEnded):
            return error
        if disk.is_full(error):
            return RunEnded(f"a checkpoint could not be written: {self._full()}", alone=True)
        return RunEnded(
            f"a checkpoint could not be written to {self.directory}: {first_line(error)}. "
            f"{self._complete()}. Fix the cause, then run the same command again",
            alone=True,
        )

    def _full(self) -> str:
        # Of a run in a bucket, the scratch directory's.
        here = self.directory
        place = here if isinstance(here, Path) else files_of(self.storage.workdir)
        return (
            f"the disk of {place} is full ({disk.free_text(place)}). "
            f"{self._complete()}. Free some space, then run the same command again"
        )

    def _complete(self) -> str:
        # A bucket may be out of reach; of its steps only the newest is certain not to be pruned.
        local = isinstance(self.directory, Path)
        known = saved_steps(self.directory) if local else self._committed[-1:]
        return (
            f"Complete checkpoints: step {', '.join(map(str, known))}"
            if known
            else "There is no complete checkpoint"
        )


def _held_out_loss(metrics: dict[str, float]) -> float:
    """Returns the loss that ranks checkpoints; infinity if it is missing or NaN."""
    loss = metrics.get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _chunks(model: Decoder, params: dict) -> Any:
    """Returns save arguments that set how weights are chunked on disk."""
    kinds = parameter_kinds(model.config)

    def chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
        # One chunk per expert, so that a reader of some experts need not decompress them all.
        # Orbax splits shard_axes down to single rows.
        kind = kinds.get(tuple(key.key for key in path))
        bank = kind is not None and kind.bank
        outer = (0, 1) if bank and leaf.shape[0] * leaf.shape[1] > 1 else ()
        return ocp.SaveArgs(chunk_byte_size=lazy.BLOCK_BYTES, shard_axes=outer)

    return jax.tree_util.tree_map_with_path(chunks, params)


def logged_bytes(checkpoint: Place) -> dict[str, int]:
    """Returns each log's size in bytes at the save; empty for older checkpoints without it."""
    logged = read_json(checkpoint / CONFIG / "metadata").get("logged")
    return logged if isinstance(logged, dict) else {}


def skipped_in_a_row(checkpoint: Place) -> int:
    """Returns the steps skipped directly before the save; 0 for older checkpoints without it."""
    return int(read_json(checkpoint / CONFIG / "metadata").get("skipped_in_a_row", 0))
