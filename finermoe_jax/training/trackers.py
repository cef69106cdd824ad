"""TensorBoard and Weights & Biases output. Their packages are extras."""

import dataclasses
import secrets
from collections.abc import Mapping
from pathlib import Path

from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.runtime import files


class TensorBoard:
    """Event files in the workdir's tensorboard/."""

    def __init__(self, workdir: Path, first: int):
        from tensorboardX import SummaryWriter

        # purge_step hides later steps of an interrupted run.
        self.writer = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first + 1, flush_secs=30
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a step's values by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Flushes and closes the files."""
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, resumed by the id in the workdir's wandb_run_id.

    Raises InputError if the service cannot be reached.
    """

    def __init__(self, project: str, workdir: Path, config: RunConfig):
        import wandb

        path = workdir / "wandb_run_id"
        if not path.is_file():
            files.write(path, secrets.token_hex(4) + "\n")
        try:
            self.run = wandb.init(
                project=project,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(workdir),
                name=workdir.name,
                config=dataclasses.asdict(config),
                settings=wandb.Settings(console="off", quiet=True),
            )
        except (wandb.Error, OSError) as error:
            raise InputError(
                f"--wandb={project}: {error}\nLog in (wandb login), or set WANDB_MODE=offline and "
                "upload the run later (wandb sync)"
            ) from None
        # A separate step axis: W&B's own counter would drop steps that a resumed run logs again.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a step's values by name."""
        self.run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """Finishes the run; `failed` marks it as crashed."""
        self.run.finish(exit_code=int(failed))
