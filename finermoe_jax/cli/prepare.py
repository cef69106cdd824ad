"""`finermoe prepare`."""

import os
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.data import text
from finermoe_jax.data.bucket_tokens import refuse_unknown, upload_prepared
from finermoe_jax.data.prepare import prepare, summary
from finermoe_jax.data.token_files import verify
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import place


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path(
        "source",
        f"comma-separated files ({text.KNOWN}), globs, directories or Hugging Face datasets "
        "(owner/name or owner/name:config)",
        required=True,
        several=True,
    )
    flags.add_path("target", "output directory; rerun the same command to resume", required=True)
    flags.add_path(
        "tokenizer",
        "directory with a tokenizer (local or gs://), or a Hub id",
        required=True,
        buckets=True,
    )
    flags.add_path("upload", "then copy the result to this gs:// URL", buckets=True)
    flags.add("processes", os.cpu_count() or 1, "worker processes (default: one per core)")
    flags.add("text_field", "text", "field or column that contains the text")
    flags.add("split", "train", "split of Hugging Face datasets")
    flags.add("shard_tokens", 1 << 27, "approximate tokens per shard")
    flags.add_path("verify", "only check this prepared directory against its checksums")


def main(flags: Flags) -> None:
    """Runs the command."""
    if flags.verify:
        manifest = verify(Path(flags.verify))
        print(f"{flags.verify}: {summary(manifest)}, all checksums match")
        return
    sources, target, tokenizer = map(flags.need, ("source", "target", "tokenizer"))
    upload = place(flags.upload) if flags.upload else None
    if isinstance(upload, Path):
        raise InputError(f"--upload={upload} must be a gs:// URL; --target names the directory")
    if upload:
        refuse_unknown(upload, Path(target))  # before the work of hours
    prepare(
        [each.strip() for each in sources.split(",") if each.strip()],
        Path(target),
        tokenizer,
        flags.processes,
        flags.text_field,
        flags.split,
        flags.shard_tokens,
    )
    if upload:
        upload_prepared(Path(target), upload, print)


COMMAND = Command(
    "--source=FILE|GLOB|DIR|owner/dataset --target=DIR --tokenizer=DIR|owner/model "
    "[--upload=gs://…]",
    define,
    main,
)
