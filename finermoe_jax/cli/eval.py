"""`finermoe eval`, `python eval.py`."""

import os
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find, write
from finermoe_jax.runtime.json_files import to_json

# Flags that are about one half of the work.
_OF_TEXT = ("sequence_length", "stride")
_OF_TASKS = (
    "limit", "num_fewshot", "data_dir", "skip_missing", "apply_chat_template",
    "allow_code_execution",
)  # fmt: skip


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path("checkpoint", "checkpoint, workdir, HF directory or hub id", required=True)
    flags.add_path("text", "perplexity of a .txt or .jsonl file")
    flags.add_integer(
        "sequence_length", 0, "--text: tokens per window (default: the model's limit, at most 2048)"
    )
    flags.add_integer(
        "stride", 0, "--text: tokens from one window to the next (default: half a window)"
    )
    flags.add_names(
        "tasks",
        "tasks of the lm-evaluation-harness: arc_easy,hellaswag; finermoe: the paper's ten and "
        "their mean",
    )
    flags.add_integer("limit", None, "--tasks: rows of each task (default: all)")
    flags.add_integer(
        "num_fewshot", None, "--tasks: examples per prompt (default: as each task says)"
    )
    flags.add_path("data_dir", "--tasks: local rows, docs/evaluation.md; nothing is fetched then")
    flags.add_boolean(
        "skip_missing", "--tasks: leave out tasks of a group of which data_dir has no rows"
    )
    flags.add_boolean("apply_chat_template", "--tasks: prompts as conversations, for chat models")
    flags.add_boolean(
        "allow_code_execution",
        "--tasks: MBPP and its like may run programs that the model writes, with your rights; some "
        "tasks (cruxeval, longproc) do so in ways of their own",
    )
    flags.add_boolean("int8", "weights as int8 with a scale for each output channel")
    flags.add_integer(
        "batch_tokens", 2048, "tokens that a device computes together, padding included"
    )
    flags.add_path("output", "also write the results as JSON to this file")


def main(flags: Flags) -> None:
    """Runs the command."""
    path = flags.need("checkpoint")
    _check(flags)
    if flags.data_dir:
        # Read when the libraries are imported.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from finermoe_jax.evaluation.evaluate import Tasks, evaluate

    tasks = Tasks(
        names=[name.strip() for name in flags.tasks if name.strip()],
        data_dir=Path(flags.data_dir) if flags.data_dir else None,
        limit=flags.limit,
        num_fewshot=flags.num_fewshot,
        chat=flags.apply_chat_template,
        skip_missing=flags.skip_missing,
        allow_code_execution=flags.allow_code_execution,
    )
    found = evaluate(
        path,
        text=find(flags.text) if flags.text else None,
        sequence_length=flags.sequence_length,
        stride=flags.stride,
        tasks=tasks if flags.tasks else None,
        int8=flags.int8,
        batch_tokens=flags.batch_tokens,
    )
    result = to_json(found, indent=2)
    # Hours of work are not lost where the file cannot be written.
    print(result, flush=True)
    if flags.output:
        write(Path(flags.output), result + "\n")


def _check(flags: Flags) -> None:
    """Raises InputError for flags that do not go together, or an output that cannot be."""
    if not flags.text and not flags.tasks:
        raise InputError("--text or --tasks is needed; see --help")
    for half, names in {"text": _OF_TEXT, "tasks": _OF_TASKS}.items():
        for name in names:
            flag = flags.values[name]
            if not flags.values[half].value and flag.value != flag.default:
                raise InputError(f"--{name} is about --{half}, which is not given")
    output = flags.output
    if output and not Path(output).absolute().parent.is_dir():
        raise InputError(f"--output={output}: its directory does not exist")
    if output and Path(output).is_dir():
        raise InputError(f"--output={output} is a directory; name a file in it")


COMMAND = Command(
    "--checkpoint=DIR [--text=FILE.txt] [--tasks=arc_easy,hellaswag] [--data_dir=DIR] "
    "[--output=FILE.json]",
    define,
    main,
)
