"""`finermoe COMMAND …`, which is `python -m finermoe_jax COMMAND …`."""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from finermoe_jax.errors import InputError, RunEnded, near_misses, print_anything
from finermoe_jax.runtime.install import check_versions
from finermoe_jax.runtime.preemption import interrupts_arrive

COMMANDS = {
    "train": "upcycle and train, or go on with a run",
    "eval": "perplexity of a text, scores of benchmarks",
    "generate": "continue a prompt, or converse",
    "convert": "Hugging Face weights to a checkpoint, upcycled on the way; or back",
    "prepare": "tokenise text into memory-mapped shards",
    "params": "parameter counts, and how a mesh splits the parameters",
    "aot": "compile a run's programs for hardware that is not there: do they fit?",
    "similarity": "how alike a layer's experts are",
    "plot": "pictures of a run, beside another one's losses",
}


def main() -> None:
    """The console command `finermoe`."""
    name, *rest = sys.argv[1:] or ["--help"]
    with errors_told():
        if name in ("-h", "--help", "help"):
            print(_overview())
            return
        if name not in COMMANDS:
            raise InputError(f"{name!r} is no command. {near_misses(name, COMMANDS)}")
    run(name, rest)


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a command, with the process's arguments by default.

    Ends the process with exit code 2 and one message where the input is wrong, with the command's
    own code where that is not 0; returns where the work is done.
    """
    print_anything()
    with errors_told(), interrupts_arrive():  # the imports of a command take seconds
        check_versions()
        from finermoe_jax.cli.flags import Flags

        command = importlib.import_module(f"finermoe_jax.cli.{name}").COMMAND
        sys.argv = [f"finermoe {name}", *(sys.argv[1:] if arguments is None else arguments)]
        flags = Flags()
        if not flags.read(command.define):
            print(f"usage: finermoe {name} {command.usage}\n\n{COMMANDS[name]}\n\n{flags.help()}")
            return
        if flags.rest and not command.rest:
            raise InputError(f"unexpected argument {flags.rest[0]!r}; flags look like --name=value")
        if code := command.main(flags):
            _exit(code)


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the process with one message and an exit code instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        # The reader of the output has gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except RunEnded as end:
        import jax

        if jax.process_index() == 0 or end.alone:
            print(f"\n{'' if end.code == 75 else 'error: '}{end}", file=sys.stderr)
        _exit(end.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            # One of several processes: at the interpreter's shutdown JAX, and Orbax's threads
            # after a failed save, would wait for the others, which may never come.
            os._exit(code)
    sys.exit(code)


def _overview() -> str:
    """The commands and the presets, with a line each."""
    from finermoe_jax.runtime.files import find

    presets = {
        file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        for file in sorted(find("configs").glob("*.py"))
    }
    return "\n".join(
        [
            "usage: finermoe COMMAND [--flag=value …]; finermoe COMMAND --help shows its flags",
            "\ncommands:",
            *(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
            "\npresets, for --config; finermoe_jax.preset(NAME) in Python:",
            *(f"  {name:<14}{text}" for name, text in presets.items()),
        ]
    )
