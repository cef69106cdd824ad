"""Records steps with a non-finite loss or gradient; stops the run after too many in a row."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finermoe_jax.config.run import RunConfig
from finermoe_jax.data import batches as data
from finermoe_jax.data.rows import Mixture
from finermoe_jax.errors import RunEnded
from finermoe_jax.runtime import files
from finermoe_jax.runtime.json_files import to_json


class Guard:
    """Counts the steps that train_step skipped, records their batches, and stops the run.

    Attributes:
      skipped: steps skipped since the start of the run, across resumptions.
      in_a_row: steps skipped directly before now, across resumptions.
    """

    def __init__(
        self,
        config: RunConfig,
        windows: Mixture,
        workdir: Path,
        skipped: int,
        in_a_row: int,
        say: Callable[[str], None],
    ):
        self.config, self.windows, self.workdir, self.say = config, windows, workdir, say
        self.skipped, self.in_a_row = skipped, in_a_row

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Checks one step's metrics. Call it for every step, in order; it may be delayed.

        Raises RunEnded, on all processes, after train.max_skipped_steps in a row.
        """
        if not metrics["skipped"]:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        limit = self.config.train.max_skipped_steps
        folder = self.workdir / "nonfinite"
        self.say(
            f"WARNING: step {step} was skipped: loss {float(metrics['loss']):g}, gradient norm "
            f"{float(metrics['grad_norm']):g}; {self.in_a_row} in a row, {limit} end the run. Its "
            f"batch: {folder / f'step-{step}.json'}"
        )
        if jax.process_index() == 0:
            self._write(folder, step, metrics, with_tokens=self.in_a_row >= limit)
        if self.in_a_row >= limit:
            first = step - limit + 1
            raise RunEnded(
                f"the loss or gradient was not finite in {limit} steps in a row, {first} … {step}: "
                f"the run ends (train.max_skipped_steps={limit}). The weights are those before "
                f"step {first}. "
                f"{folder} contains the last batch's tokens (step-{step}.npz) and each step's rows "
                "(step-N.json). Resuming replays the same batches; to resume with a lower "
                "--config.optimizer.learning_rate add --allow_changes=optimizer.learning_rate"
            )

    def _write(
        self, folder: Path, step: int, metrics: Mapping[str, Any], with_tokens: bool
    ) -> None:
        files.make_directory(folder)
        values = {name: float(metrics[name]) for name in ("loss", "aux_loss", "grad_norm")}
        text = {
            "step": step,
            **{
                name: value if math.isfinite(value) else str(value)
                for name, value in values.items()
            },
            "rows": data.batch_identity(self.windows, self.config.data, step),
        }
        files.write(folder / f"step-{step}.json", to_json(text) + "\n")
        if with_tokens:
            rows = range(self.config.data.global_batch_size)
            batch = next(data.train_batches(self.windows, self.config.data, step - 1, rows))
            arrays = {name: array for name, array in batch._asdict().items() if array is not None}
            content = io.BytesIO()
            np.savez(content, **arrays)
            files.write(folder / f"step-{step}.npz", content.getvalue())
