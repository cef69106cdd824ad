"""`finermoe prepare`."""

import os
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.data import text
from finermoe_jax.data.prepare import prepare, summary
from finermoe_jax.data.token_files import verify


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path(
        "source",
        f"comma-separated: files ({text.KNOWN}), globs, directories, Hugging Face datasets "
        "(owner/name or owner/name:config)",
        required=True,
        several=True,
    )
    flags.add_path(
        "target",
        "the directory to write; begun with the same arguments, it is completed",
        required=True,
    )
    flags.add_path("tokenizer", "a directory with a tokenizer, or a hub id", required=True)
    flags.add_integer("processes", os.cpu_count() or 1, "that tokenise (default: one per core)")
    flags.add_text("text_field", "text", "the field or column that holds the text")
    flags.add_text("split", "train", "of Hugging Face datasets")
    flags.add_integer("shard_tokens", 1 << 27, "tokens of a shard, about")
    flags.add_path("verify", "compare a prepared directory with its checksums, and do nothing else")


def main(flags: Flags) -> None:
    """Runs the command."""
    if flags.verify:
        manifest = verify(Path(flags.verify))
        print(f"{flags.verify}: {summary(manifest)}, all checksums as written")
        return
    sources, target, tokenizer = map(flags.need, ("source", "target", "tokenizer"))
    prepare(
        [each.strip() for each in sources.split(",") if each.strip()],
        Path(target),
        tokenizer,
        flags.processes,
        flags.text_field,
        flags.split,
        flags.shard_tokens,
    )


COMMAND = Command(
    "--source=FILE|GLOB|DIR|owner/dataset --target=DIR --tokenizer=DIR|owner/model", define, main
)
