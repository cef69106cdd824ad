"""Everything that a command imports, and no thread: what tests.support.processes forks."""

import importlib
import os

os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # torch is not missed here

from finermoe_jax.cli.main import COMMANDS

for name in [f"finermoe_jax.cli.{command}" for command in COMMANDS] + [
    "finermoe_jax.training.run",
    "finermoe_jax.evaluation.evaluate",
    "matplotlib.pyplot",
    "orbax.checkpoint",
    "transformers",
]:
    importlib.import_module(name)
