"""`finermoe eval`, `python eval.py`."""

import os
from pathlib import Path

from finermoe_jax.cli.flags import Command, Flags, writable
from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import find, write
from finermoe_jax.runtime.json_files import to_json

# Flags that need --text, and flags that need --tasks.
_TEXT_FLAGS = ("sequence_length", "stride")
_TASK_FLAGS = (
    "limit", "num_fewshot", "data_dir", "skip_missing", "apply_chat_template",
    "allow_code_execution",
)  # fmt: skip


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_checkpoint()
    flags.add_path("text", "compute the perplexity of this .txt or .jsonl file")
    flags.add(
        "sequence_length", 0, "with --text: window size (default: the model's context, max. 2048)"
    )
    flags.add("stride", 0, "with --text: tokens between windows (default: half a window)")
    flags.add(
        "tasks",
        [],
        "comma-separated lm-evaluation-harness tasks, such as arc_easy,hellaswag; finermoe stands "
        "for the paper's ten benchmarks and their mean",
    )
    flags.add("limit", int, "with --tasks: rows scored per task (default: all)")
    flags.add("num_fewshot", int, "with --tasks: examples per prompt (default: the task's)")
    flags.add_path("data_dir", "with --tasks: local rows (docs/evaluation.md); downloads nothing")
    flags.add("skip_missing", False, "with --tasks: skip tasks that have no rows in --data_dir")
    flags.add("apply_chat_template", False, "with --tasks: use the chat template, for chat models")
    flags.add(
        "allow_code_execution",
        False,
        "with --tasks: let tasks such as MBPP run programs that the model writes, with your "
        "permissions; cruxeval and longproc ignore this package's limits on time and memory",
    )
    flags.add("int8", False, "store weights as int8, with one scale per output channel")
    flags.add("batch_tokens", 2048, "tokens per batch and device, padding included")
    flags.add_path("output", "also write the results to this JSON file")


def main(flags: Flags) -> None:
    """Runs the command."""
    path = flags.need("checkpoint")
    _check(flags)
    output = writable(flags.output)
    if flags.data_dir:
        # The libraries read these at import.
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
    print(result, flush=True)  # first: writing the file may fail
    if output:
        write(output, result + "\n")


def _check(flags: Flags) -> None:
    """Raises InputError for incompatible flags."""
    if not flags.text and not flags.tasks:
        raise InputError("nothing to evaluate: give --text or --tasks; see --help")
    for needed, names in {"text": _TEXT_FLAGS, "tasks": _TASK_FLAGS}.items():
        for name in names:
            flag = flags.values[name]
            if not flags.values[needed].value and flag.value != flag.default:
                raise InputError(f"--{name}={flag.value} has no effect without --{needed}")


COMMAND = Command(
    "--checkpoint=DIR [--text=FILE.txt] [--tasks=arc_easy,hellaswag] [--output=FILE.json]",
    define,
    main,
)
