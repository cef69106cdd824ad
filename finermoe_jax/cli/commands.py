"""The four commands. Each reads its flags, calls the library, and turns a user's mistake into one
message on stderr and exit code 2."""

import contextlib
import dataclasses
import datetime
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from finermoe_jax.config.model import PUBLISHED_START, MoEConfig
from finermoe_jax.config.parse import find_config, preset
from finermoe_jax.config.run import RunConfig, run_config
from finermoe_jax.errors import InputError, RunEnded, print_anything
from finermoe_jax.runtime.files import find, write
from finermoe_jax.runtime.json_files import to_json
from finermoe_jax.runtime.paths import local, local_list
from finermoe_jax.runtime.preemption import interrupts_arrive

FLAGS = flags.FLAGS


# --- flags and errors -----------------------------------------------------------------------


def run(usage: str, define: Callable[[], None], main: Callable[[], None]) -> None:
    """A command: parses the flags, runs main, exits with 0 only when the work is done."""
    print_anything()
    with _clear_errors(), interrupts_arrive():
        flags.DEFINE_bool("help", False, "show this help", short_name="h", allow_override=True)
        try:
            define()
            if any(a in ("-h", "--help", "-help", "--helpfull", "--helpshort") for a in sys.argv):
                print(usage)
                print(_help())
                return
            rest = FLAGS(sys.argv)[1:]
        except InputError:
            raise
        except Exception as error:  # of absl and ml_collections, many unrelated types
            raise InputError(_flag_message(error)) from None
        if rest:
            raise InputError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
        main()


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say.
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


def _flag_message(error: Exception) -> str:
    """A flag's error in one line: ml_collections puts tracebacks and nested quotes into them."""
    message = str(error)
    if miss := re.search(r'Did you mean \W*"(\w+)\W*" instead of \W*"(\w+)', message):
        return f"--config has no field {miss[2]!r}. Did you mean {miss[1]!r}?"
    if isinstance(error, (KeyError, AttributeError)):
        name = message.strip("\"'\\")
        return f"--config has no field {name!r}; --print_config shows those it has"
    return " ".join(message.replace("\\n", " ").split())


def _help() -> str:
    own = [name for name in FLAGS if name in _OWN_FLAGS]
    return "\n".join(f"  --{name}  {FLAGS[name].help}" for name in sorted(own))


_OWN_FLAGS: list[str] = []


def _flag(define: Callable[..., Any], name: str, default: Any, text: str) -> None:
    define(name, default, text)
    _OWN_FLAGS.append(name)


def define_flag(define: Callable[..., Any], name: str, default: Any, text: str) -> None:
    """Defines a flag that --help shows, for the `python -m` tools."""
    _flag(define, name, default, text)


class _PathParser(flags.ArgumentParser):
    """Parses the value of a flag by paths.local or paths.local_list."""

    def __init__(self, read: Callable[[str], str]):
        self.read = read

    def parse(self, argument: str) -> str:
        """Returns the path; raises InputError, a ValueError, for an address."""
        return self.read(argument)


def define_path(name: str, text: str, several: bool = False) -> None:
    """Defines a flag that names a path, or several with commas between; a hub id may stand in."""
    flags.DEFINE(_PathParser(local_list if several else local), name, "", text)
    _OWN_FLAGS.append(name)


def define_config(default: str | None) -> str:
    """Defines --config and --print_config, reads the config file, and returns a name for it.

    FLAGS.config is None where there is neither --config nor a default. --config leaves sys.argv,
    in which ml_collections looks for overrides, --config.FIELD=VALUE.
    """
    name = _take_config() or default
    text = (
        "a preset (demo), or FILE.py; :VARIANT may follow; --config.FIELD=VALUE overrides a field"
    )
    if name is None:
        flags.DEFINE_string("config", None, text)
    else:
        config_flags.DEFINE_config_dict("config", preset(name), text)
    _OWN_FLAGS.append("config")
    _flag(flags.DEFINE_bool, "print_config", False, "print the resolved config and exit")
    if name is None:
        return ""
    file, variant = find_config(name)
    return re.sub(r"[:/]", "-", f"{file.stem}-{variant}" if variant else file.stem)


def _take_config() -> str | None:
    """Takes `--config=NAME` and `--config NAME` out of sys.argv; the last one's value."""
    given, rest = None, []
    arguments = iter(FLAGS.read_flags_from_files(sys.argv))
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            rest.append(argument)
        elif not (given := value if equals else next(arguments, "")):
            raise InputError("--config needs a value: a preset, such as demo, or a config file")
    sys.argv = rest
    return given


def read_config() -> RunConfig:
    """The config file with its overrides, checked."""
    return run_config(FLAGS.config.to_dict())


def print_config(config: RunConfig) -> None:
    """Writes the resolved config to stdout, as JSON."""
    print(to_json(dataclasses.asdict(config), indent=2))


def _require(name: str) -> Any:
    value = FLAGS[name].value
    if value in (None, ""):
        raise InputError(f"--{name} is needed; see --help")
    return value


# --- the commands ---------------------------------------------------------------------------


def train() -> None:
    """train.py"""

    name = ""

    def define() -> None:
        nonlocal name
        name = define_config("demo")
        define_path("workdir", "where the run lives; it is resumed from there "
              "(default: a new directory under runs/)")  # fmt: skip
        _flag(flags.DEFINE_list, "allow_changes", [],
              "fields or groups of the config that may differ from those that the workdir's run "
              "began with: train.steps,optimizer.learning_rate")  # fmt: skip
        _flag(flags.DEFINE_float, "heartbeat_seconds", 60.0,
              "of several processes: how long one may be silent until all end")  # fmt: skip
        _flag(flags.DEFINE_float, "start_timeout", 300.0,
              "of several processes: seconds to wait for all to start")  # fmt: skip
        _flag(flags.DEFINE_bool, "tensorboard", False,
              "also write TensorBoard event files, into the workdir's tensorboard/")  # fmt: skip
        _flag(flags.DEFINE_string, "wandb", "",
              "also tell Weights & Biases; the value is the project")  # fmt: skip
        _flag(flags.DEFINE_string, "profile_steps", "",
              "A:B traces steps A to B, for xprof and Perfetto, into profile/ in the "
              "workdir")  # fmt: skip
        _flag(flags.DEFINE_float, "peak_tflops", None,
              "what one device can do, in TFLOP/s, for MFU (default: the bfloat16 peak of a known "
              "TPU or GPU; no MFU elsewhere)")  # fmt: skip

    def main() -> None:
        config = read_config()
        if FLAGS.print_config:
            print_config(config)
            return
        heartbeat = FLAGS.heartbeat_seconds
        if not 1 <= heartbeat <= 3600:
            raise InputError(f"--heartbeat_seconds={heartbeat} must lie in 1 … 3600")
        start_timeout = FLAGS.start_timeout
        if not 1 <= start_timeout <= 86400:
            raise InputError(f"--start_timeout={start_timeout} must lie in 1 … 86400")
        from finermoe_jax.runtime import distributed, host_memory
        from finermoe_jax.training import monitor as metrics
        from finermoe_jax.training import run as training
        from finermoe_jax.training.workdir import way_on

        watch = metrics.Watch(
            FLAGS.tensorboard,
            FLAGS.wandb,
            metrics.read_steps(FLAGS.profile_steps),
            None if FLAGS.peak_tflops is None else FLAGS.peak_tflops * 1e12,
        )
        host_memory.keep_freed()
        distributed.initialize(heartbeat, start_timeout)
        workdir = FLAGS.workdir
        if not workdir:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            workdir = distributed.exchange(f"runs/{name}-{stamp}")[0]
        with distributed.watched(heartbeat, lambda: way_on(Path(workdir))):
            training.train(config, Path(workdir), watch=watch, allow_changes=FLAGS.allow_changes)

    run("Upcycle and train: python train.py --config=configs/demo.py [--workdir=DIR]", define,
         main)  # fmt: skip


def convert_hf() -> None:
    """convert_hf.py"""

    def define() -> None:
        define_config(None)
        define_path("source", "HF directory, hub id, or a checkpoint of ours")
        define_path("target", "new or empty directory to write")
        _flag(flags.DEFINE_string, "to", "orbax",
              "orbax: a checkpoint of ours, a dense source upcycled as the config says (default "
              "32,2,1,2); hf: a Hugging Face directory")  # fmt: skip
        _flag(flags.DEFINE_string, "dtype", "",
              "float32 or bfloat16 weights in the target (default: as in the source)")  # fmt: skip
        _flag(flags.DEFINE_bool, "verify", False,
              "compare every tensor of the target with what the source becomes; a target that is "
              "there already is only compared, in either form unless --to is given")  # fmt: skip

    def main() -> None:
        config = read_config() if FLAGS.config is not None else None
        if FLAGS.print_config:
            moe = config.moe if config else MoEConfig()
            print(to_json(dataclasses.asdict(moe) if moe else None, indent=2))
            return
        source, target = str(find(_require("source"))), Path(_require("target"))
        if FLAGS.to not in ("orbax", "hf"):
            raise InputError(f"--to={FLAGS.to} must be orbax or hf")
        if FLAGS.to == "hf" and config:
            raise InputError(
                "--to=hf exports a checkpoint as it is; --config belongs to --to=orbax"
            )
        if FLAGS.dtype not in ("", "float32", "bfloat16"):
            raise InputError(f"--dtype={FLAGS.dtype} must be float32 or bfloat16")
        from finermoe_jax.weights.convert import convert
        from finermoe_jax.weights.verify import verify

        asked: dict[str, Any] = {
            "moe": config.moe if config else MoEConfig(),
            "start": config.upcycle if config else PUBLISHED_START,
            "seed": config.train.seed if config else 0,
            "dtype": FLAGS.dtype or None,
            "stated": config is not None,
        }
        there = FLAGS.verify and target.is_dir() and any(target.iterdir())
        if not there:
            written = convert(source, target, FLAGS.to, **asked)
            if FLAGS.to == "hf" and written.moe is None:
                print(
                    f"{source} is a dense model, and so is {target}: --to=hf upcycles nothing. To "
                    "upcycle, convert with --to=orbax first, then that checkpoint with --to=hf",
                    file=sys.stderr,
                )
        if FLAGS.verify:
            form = FLAGS.to if FLAGS["to"].present or not there else None
            print(verify(source, target, form, **asked))
        print(target)

    run("Convert: python convert_hf.py --source=DIR|hub-id --target=DIR [--config=FILE] "
         "[--to=orbax|hf] [--verify]", define, main)  # fmt: skip


def evaluate() -> None:
    """eval.py"""

    def define() -> None:
        define_path("checkpoint", "checkpoint, workdir, HF directory or hub id")
        define_path("text", "perplexity of a .txt or .jsonl file")
        _flag(flags.DEFINE_integer, "sequence_length", 0,
              "--text: tokens per window (default: the model's limit, at most 2048)")  # fmt: skip
        _flag(flags.DEFINE_integer, "stride", 0,
              "--text: tokens from one window to the next (default: half a window)")  # fmt: skip
        _flag(flags.DEFINE_list, "tasks", [],
              "tasks of the lm-evaluation-harness: arc_easy,hellaswag; finermoe: the paper's "
              "ten and their mean")  # fmt: skip
        _flag(flags.DEFINE_integer, "limit", None, "--tasks: rows of each task (default: all)")
        _flag(flags.DEFINE_integer, "num_fewshot", None,
              "--tasks: examples per prompt (default: as each task says)")  # fmt: skip
        define_path("data_dir",
              "--tasks: local rows, docs/evaluation.md; nothing is fetched then")  # fmt: skip
        _flag(flags.DEFINE_bool, "skip_missing", False,
              "--tasks: leave out tasks of a group of which data_dir has no rows")  # fmt: skip
        _flag(flags.DEFINE_bool, "apply_chat_template", False,
              "--tasks: prompts as conversations, for chat models")  # fmt: skip
        _flag(flags.DEFINE_bool, "allow_code_execution", False,
              "--tasks: MBPP and its like may run programs that the model writes, with your "
              "rights; some tasks (cruxeval, longproc) do so in ways of their own")  # fmt: skip
        _flag(flags.DEFINE_bool, "int8", False,
              "weights as int8 with a scale for each output channel")  # fmt: skip
        _flag(flags.DEFINE_integer, "batch_tokens", 2048,
              "tokens that a device computes together, padding included")  # fmt: skip
        define_path("output", "also write the results as JSON to this file")

    def main() -> None:
        path = _require("checkpoint")
        if not FLAGS.text and not FLAGS.tasks:
            raise InputError("--text or --tasks is needed; see --help")
        for half, names in {
            "text": ["sequence_length", "stride"],
            "tasks": ["limit", "num_fewshot", "data_dir", "skip_missing", "apply_chat_template",
                      "allow_code_execution"],
        }.items():  # fmt: skip
            for name in names:
                if not FLAGS[half].value and FLAGS[name].value != FLAGS[name].default:
                    raise InputError(f"--{name} is about --{half}, which is not given")
        if FLAGS.output and not Path(FLAGS.output).absolute().parent.is_dir():
            raise InputError(f"--output={FLAGS.output}: its directory does not exist")
        if FLAGS.output and Path(FLAGS.output).is_dir():
            raise InputError(f"--output={FLAGS.output} is a directory; name a file in it")
        if FLAGS.data_dir:
            # Read when the libraries are imported.
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        from finermoe_jax.evaluation.evaluate import Tasks, evaluate

        tasks = Tasks(
            names=[name.strip() for name in FLAGS.tasks if name.strip()],
            data_dir=Path(FLAGS.data_dir) if FLAGS.data_dir else None,
            limit=FLAGS.limit,
            num_fewshot=FLAGS.num_fewshot,
            chat=FLAGS.apply_chat_template,
            skip_missing=FLAGS.skip_missing,
            allow_code_execution=FLAGS.allow_code_execution,
        )
        result = to_json(
            evaluate(
                path,
                text=find(FLAGS.text) if FLAGS.text else None,
                sequence_length=FLAGS.sequence_length,
                stride=FLAGS.stride,
                tasks=tasks if FLAGS.tasks else None,
                int8=FLAGS.int8,
                batch_tokens=FLAGS.batch_tokens,
            ),
            indent=2,
        )
        # Hours of work are not lost where the file cannot be written.
        print(result, flush=True)
        if FLAGS.output:
            write(Path(FLAGS.output), result + "\n")

    run("Evaluate: python eval.py --checkpoint=DIR [--text=FILE.txt] [--tasks=arc_easy,hellaswag] "
         "[--data_dir=DIR] [--output=FILE.json]", define, main)  # fmt: skip


def generate() -> None:
    """generate.py"""

    def define() -> None:
        define_path("checkpoint", "checkpoint, workdir, HF directory or hub id")
        _flag(flags.DEFINE_string, "prompt", "", "text to continue")
        _flag(flags.DEFINE_integer, "max_new_tokens", 64, "tokens to add, at most")
        _flag(flags.DEFINE_float, "temperature", 0.0, "0: most likely token; else sample")
        _flag(flags.DEFINE_integer, "top_k", 0, "sample from so many of the likeliest (0: all)")
        _flag(flags.DEFINE_float, "top_p", 1.0,
              "sample from the likeliest tokens that together have this probability")  # fmt: skip
        _flag(flags.DEFINE_float, "repetition_penalty", 1.0,
              "above 1 makes tokens that are there already less likely")  # fmt: skip
        _flag(flags.DEFINE_integer, "seed", 0, "of the sampling")
        _flag(flags.DEFINE_multi_string, "stop", [],
              "end before this text; may be given several times")  # fmt: skip
        _flag(flags.DEFINE_bool, "chat", False,
              "converse: --prompt, if given, then lines from stdin, in the tokenizer's chat "
              "template")  # fmt: skip
        _flag(flags.DEFINE_string, "system", "", "a system message to --chat with")
        _flag(flags.DEFINE_bool, "int8", False,
              "weights as int8 with a scale for each output channel")  # fmt: skip

    def main() -> None:
        path = _require("checkpoint")
        prompt = FLAGS.prompt if FLAGS.chat else _require("prompt")
        if FLAGS.system and not FLAGS.chat:
            raise InputError("--system is of a conversation; it needs --chat")
        from finermoe_jax.generation.sampling import Sampling
        from finermoe_jax.generation.text import (
            check_prompt,
            complete,
            conversation,
        )
        from finermoe_jax.model.quantize import int8_weights
        from finermoe_jax.weights.checkpoint import open_with_tokenizer, read_model

        sampling = Sampling(*map(FLAGS.__getattr__, Sampling._fields))
        sampling.check()
        source, tokenizer, ends = open_with_tokenizer(path)
        config = source.config
        messages = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
        # What can be refused is refused before the weights are read.
        first: Any = prompt
        if FLAGS.chat:
            first = conversation(tokenizer, [*messages, {"role": "user", "content": prompt or "?"}])
        check_prompt(config, tokenizer, first, FLAGS.max_new_tokens, FLAGS.stop)
        model = read_model(source, path)
        if FLAGS.int8:
            model = int8_weights(model)

        def answer(prompt: Any, shown: str) -> str:
            pieces = complete(
                model, tokenizer, prompt, FLAGS.max_new_tokens, sampling, FLAGS.stop, ends
            )
            first = next(pieces, "")  # the input is checked before anything is printed
            print(shown + first, end="", flush=True)
            words = [first]
            for piece in pieces:
                print(piece, end="", flush=True)
                words.append(piece)
            print(flush=True)
            return "".join(words)

        if not FLAGS.chat:
            answer(prompt, prompt)
            return
        for line in _said(prompt):
            messages.append({"role": "user", "content": line})
            said = answer(conversation(tokenizer, messages), "")
            messages.append({"role": "assistant", "content": said})

    run("Generate: python generate.py --checkpoint=DIR --prompt=TEXT [--chat]", define, main)


def _said(first: str) -> Iterator[str]:
    """What a user says: `first`, then line by line from stdin, without the empty ones."""
    if first:
        yield first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is no valid UTF-8: {error}") from None
        if line:
            yield line
