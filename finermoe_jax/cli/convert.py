"""`finermoe convert`, `python convert_hf.py`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import BucketPath, Place, locate, place
from finermoe_jax.runtime.json_files import to_json


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path(
        "source",
        "HF directory or finermoe checkpoint (local or gs://), or Hub id",
        required=True,
        buckets=True,
    )
    flags.add_path(
        "target", "new or empty directory for the result, or gs://", required=True, buckets=True
    )
    flags.add_config()
    flags.add(
        "to",
        "orbax",
        "orbax: write a checkpoint, upcycling a dense source with the config's settings (without "
        "--config: 32,2,1,2); hf: export a checkpoint to a Hugging Face directory",
    )
    flags.add("dtype", "", "float32 or bfloat16 weights (default: the source's dtype)")
    flags.add(
        "verify",
        False,
        "check every tensor of the target against the converted source; an existing target is "
        "only checked, not written",
    )
    flags.add(
        "push_to_hub",
        "",
        "with --to=hf: send the target to this new Hub repository, owner/name or name, which is "
        "created private",
    )


def main(flags: Flags) -> None:
    """Runs the command."""
    config = flags.run_config() if flags.config_name else None
    if flags.print_config:
        moe = config.moe if config else MoEConfig()
        print(to_json(dataclasses.asdict(moe) if moe else None, indent=2))
        return
    source, target = str(locate(flags.need("source"))), place(flags.need("target"))
    if flags.to not in ("orbax", "hf"):
        raise InputError(f"--to={flags.to} must be orbax or hf")
    if flags.to == "hf" and config:
        raise InputError(
            f"--to=hf exports a checkpoint unchanged and cannot apply --config={flags.config_name};"
            " remove --config, or use --to=orbax"
        )
    if flags.dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype={flags.dtype} must be float32 or bfloat16")
    pushes = flags.given("push_to_hub")
    if pushes and flags.to != "hf":
        raise InputError(
            f"--push_to_hub={flags.push_to_hub} sends a Hugging Face directory, but --to="
            f"{flags.to} writes a checkpoint: add --to=hf"
        )
    if pushes and isinstance(target, BucketPath):
        raise InputError(
            f"--push_to_hub={flags.push_to_hub} sends a local directory, but --target={target}: "
            "give a local --target"
        )
    from finermoe_jax.runtime import publish

    repository = publish.repository(flags.push_to_hub) if pushes else ""
    _convert(flags, config, source, target, repository)
    print(target)
    if repository:
        print(f"sending {target} to {repository} …", file=sys.stderr)
        assert isinstance(target, Path)
        print(publish.send(target, repository))


def _convert(
    flags: Flags, config: RunConfig | None, source: str, target: Place, repository: str
) -> None:
    """Converts and verifies, as the flags ask. Creates the repository, if one is named."""
    from finermoe_jax.runtime import publish
    from finermoe_jax.training.history import training_run
    from finermoe_jax.weights.convert import Export, convert
    from finermoe_jax.weights.hf_config import not_in_vllm, unpublished_keys
    from finermoe_jax.weights.targets import is_occupied
    from finermoe_jax.weights.verify import verify

    asked: dict[str, Any] = {
        "moe": config.moe if config else MoEConfig(),
        "upcycling": config.upcycle if config else PUBLISHED_UPCYCLING,
        "seed": config.train.seed if config else 0,
        "dtype": flags.dtype or None,
        "stated": config is not None,
    }
    there = flags.verify and is_occupied(target)
    if not there:

        def ready() -> None:
            if repository:
                publish.create(repository)

        export = Export(repository or None, training_run, ready)
        written = convert(source, target, flags.to, export=export, **asked)
        if flags.to == "hf" and written.moe is None:
            print(
                f"{source} is a dense model, and {target} is too: --to=hf does not upcycle. To "
                "upcycle, first convert with --to=orbax, then export that checkpoint with --to=hf",
                file=sys.stderr,
            )
        if flags.to == "hf" and written.moe is not None and (own := unpublished_keys(written.moe)):
            keys = ", ".join(f"{key}={value}" for key, value in own.items())
            print(
                f"{target} has {keys}: only the code in it (trust_remote_code) and this project "
                "can read it, not the authors' code",
                file=sys.stderr,
            )
        if flags.to == "hf" and (limit := not_in_vllm(written)):
            print(f"{target}: {limit}", file=sys.stderr)
    if flags.verify:
        form = flags.to if flags.given("to") or not there else None
        print(verify(source, target, form, **asked))
    if there and repository:
        publish.create(repository)


COMMAND = Command(
    "--source=DIR|hub-id --target=DIR [--config=FILE] [--to=orbax|hf] [--verify] "
    "[--push_to_hub=NAME]",
    define,
    main,
)
