"""The command line of data/prepare.py."""

import os
from pathlib import Path

from absl import flags

from finermoe_jax.cli import commands
from finermoe_jax.data import text
from finermoe_jax.data.prepare import _summary, prepare
from finermoe_jax.data.token_files import verify
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find


def main() -> None:
    """The command."""

    def define() -> None:
        flag = commands.define_flag
        commands.define_path("source", f"comma-separated: files ({text.KNOWN}), globs, "
             "directories, Hugging Face datasets (owner/name or owner/name:config)",
             several=True)  # fmt: skip
        commands.define_path("target", "the directory to write; begun with the same "
             "arguments, it is completed")  # fmt: skip
        commands.define_path("tokenizer", "a directory with a tokenizer")
        flag(flags.DEFINE_integer, "processes", os.cpu_count() or 1, "that tokenise (default: one "
             "per core)")  # fmt: skip
        flag(flags.DEFINE_string, "text_field", "text", "the field or column that holds the text")
        flag(flags.DEFINE_string, "split", "train", "of Hugging Face datasets")
        flag(flags.DEFINE_integer, "shard_tokens", 1 << 27, "tokens of a shard, about")
        commands.define_path("verify", "compare a prepared directory with its checksums, "
             "and do nothing else")  # fmt: skip

    def run() -> None:
        values = flags.FLAGS
        if values.verify:
            manifest = verify(Path(values.verify))
            print(f"{values.verify}: {_summary(manifest)}, all checksums as written")
            return
        for name in ("source", "target", "tokenizer"):
            if not values[name].value:
                raise InputError(f"--{name} is needed; see --help")
        prepare(
            [s.strip() for s in values.source.split(",") if s.strip()], Path(values.target),
            find(values.tokenizer), values.processes, values.text_field, values.split,
            values.shard_tokens,
        )  # fmt: skip

    commands.run(
        "Tokenise text into memory-mapped shards: python -m finermoe_jax.cli.prepare_data "
        "--source=FILE|GLOB|DIR|owner/dataset --target=DIR --tokenizer=DIR",
        define,
        run,
    )


if __name__ == "__main__":
    main()
