"""`finermoe COMMAND …`, the same as `python -m finermoe_jax COMMAND …`."""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from finermoe_jax.errors import InputError, RunEnded, escape_unencodable, near_misses
from finermoe_jax.runtime.buckets import Unreachable
from finermoe_jax.runtime.install import check_versions
from finermoe_jax.runtime.preemption import redeliver_interrupts

COMMANDS = {
    "train": "upcycle and train a model, or resume a run",
    "eval": "compute the perplexity of a text and benchmark scores",
    "generate": "continue a prompt, or chat",
    "convert": "convert and upcycle Hugging Face weights to a checkpoint, or export one",
    "prepare": "tokenise text into memory-mapped shards",
    "params": "count parameters, and show how a mesh shards them",
    "aot": "compile a run for hardware you do not have, and check that it fits",
    "similarity": "measure how similar the experts of each layer are",
    "plot": "plot a run's losses and expert load, or overlay several runs",
    "compare": "compare the final losses of runs (averaged over seeds) and show how configs differ",
    "sweep": "train several configs with several seeds each, and compare them",
}


# These import JAX and Flax, for several seconds, before their first line.
_SLOW_TO_LOAD = ("train", "eval", "generate", "convert", "prepare", "aot", "similarity")


def main() -> None:
    """Runs the console command `finermoe`."""
    name, *rest = sys.argv[1:] or ["--help"]
    with report_errors():
        if name in ("-h", "--help", "help"):
            print(_overview())
            return
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}. {near_misses(name, COMMANDS)}")
    run(name, rest)


def run(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a command, with the process's arguments by default.

    Exits with code 2 and one message if the input is invalid, or with the command's own code if
    that is not 0; otherwise returns.
    """
    escape_unencodable()
    # XLA's alarm at slow compilation asks users to report a bug. What fails raises an exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with report_errors(), redeliver_interrupts():  # around the imports, which take seconds
        check_versions()
        from finermoe_jax.cli.flags import Flags

        command = importlib.import_module(f"finermoe_jax.cli.{name}").COMMAND
        sys.argv = [f"finermoe {name}", *(sys.argv[1:] if arguments is None else arguments)]
        flags = Flags()
        if not flags.read(command.define):
            usage, _, note = command.usage.partition("\n")
            about = f"{COMMANDS[name]}\n{note}".strip()
            print(f"usage: finermoe {name} {usage}\n\n{about}\n\n{flags.help()}".rstrip())
            return
        if flags.rest and not command.rest:
            raise InputError(f"unexpected argument {flags.rest[0]!r}; flags look like --name=value")
        if name in _SLOW_TO_LOAD and sys.stderr.isatty():
            print("loading JAX …", file=sys.stderr, flush=True)
        if code := command.main(flags):
            _exit(code)


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Exits with one message and an exit code instead of a traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except RunEnded as end:
        import jax

        if jax.process_index() == 0 or end.alone:
            print(f"\n{'' if end.code == 75 else 'error: '}{end}", file=sys.stderr)
        if isinstance(end, Unreachable):  # requests in flight would delay the exit
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        _exit(end.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            # A normal shutdown would block: JAX, and Orbax's threads after a failed save, wait
            # for the other processes.
            os._exit(code)
    sys.exit(code)


def _overview() -> str:
    """Returns one line for each command and preset."""
    from finermoe_jax.runtime.files import find

    presets = {
        file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        for file in sorted(find("configs").glob("*.py"))
    }
    return "\n".join(
        [
            "usage: finermoe COMMAND [--flag=value …]; finermoe COMMAND --help lists its flags",
            "\ncommands:",
            *(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
            "\npresets, for --config=NAME (in Python: finermoe_jax.preset(NAME)):",
            *(f"  {name:<14}{text}" for name, text in presets.items()),
        ]
    )
