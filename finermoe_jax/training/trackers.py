"""A run's figures in the formats of other programs; their packages are extras."""

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

        # Hides what an interrupted run logged of later steps.
        self.writer = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first + 1, flush_secs=30
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Tells of a step, by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Writes what is left; `failed`: the run ends with an error."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. It is resumed by the id in the workdir's wandb_run_id."""

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
                f"--wandb={project}: {error}\nlog in (wandb login), or set WANDB_MODE=offline and "
                "send the run later (wandb sync)"
            ) from None
        # Steps as an axis of their own: W&B's counter would drop what a resumed run logs again.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Tells of a step, by name."""
        self.run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """Writes what is left; `failed`: the run ends with an error."""
        self.run.finish(exit_code=int(failed))
