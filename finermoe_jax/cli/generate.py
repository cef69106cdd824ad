"""`finermoe generate`, `python generate.py`."""

import sys
from collections.abc import Iterator
from typing import Any

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_checkpoint()
    flags.add("prompt", "", "text to continue; required without --chat")
    flags.add("max_new_tokens", 64, "maximum number of new tokens")
    flags.add("temperature", 0.0, "sampling temperature; 0 takes the most likely token")
    flags.add("top_k", 0, "sample from the k most likely tokens; 0 means all")
    flags.add("top_p", 1.0, "sample from the fewest tokens with this total probability")
    flags.add("repetition_penalty", 1.0, "above 1 makes previous tokens less likely")
    flags.add("seed", 0, "seed for sampling")
    stop_help = "stop before this text; may be repeated"
    flags.add("stop", (), stop_help)
    flags.add("chat", False, "chat: answer --prompt, if given, then each line of stdin")
    flags.add("system", "", "with --chat: system message")
    flags.add("int8", False, "store weights as int8, with one scale per output channel")
    flags.add(
        "experts",
        "device",
        "where the experts are: device; host (in host memory, copied to the device when chosen); "
        "host_compute (in host memory, multiplied there)",
    )


def main(flags: Flags) -> None:
    """Runs the command."""
    path = flags.need("checkpoint")
    prompt = flags.prompt if flags.chat else flags.need("prompt")
    if flags.system and not flags.chat:
        raise InputError("--system has no effect without --chat; add --chat or remove --system")
    from finermoe_jax.generation.sampling import Sampling
    from finermoe_jax.generation.text import check_prompt, conversation, stream_text
    from finermoe_jax.model.offload import check_place
    from finermoe_jax.model.quantize import check_int8_room, int8_weights
    from finermoe_jax.weights.source import open_with_tokenizer, read_model

    sampling = Sampling(*(getattr(flags, name) for name in Sampling._fields))
    sampling.check()
    source, tokenizer, ends = open_with_tokenizer(path)
    messages = [{"role": "system", "content": flags.system}] if flags.system else []
    # Check the input before reading the weights.
    first: Any = prompt
    if flags.chat:
        first = conversation(tokenizer, [*messages, {"role": "user", "content": prompt or "?"}])
    check_place(flags.experts, source.config)
    if flags.int8:
        check_int8_room(source.config, source.weights, flags.experts)
    check_prompt(source.config, tokenizer, first, flags.max_new_tokens, flags.stop)
    print(source.announcement, file=sys.stderr, flush=True)
    model = read_model(source, path, experts=flags.experts)
    if flags.int8:
        model = int8_weights(model)

    def answer(prompt: Any, prefix: str) -> str:
        limit = flags.max_new_tokens
        return _stream_out(
            stream_text(model, tokenizer, prompt, limit, sampling, flags.stop, ends), prefix
        )

    print("compiling; the first tokens take longest …", file=sys.stderr, flush=True)
    if not flags.chat:
        answer(prompt, prompt)
        return
    for line in _user_messages(prompt):
        messages.append({"role": "user", "content": line})
        reply = answer(conversation(tokenizer, messages), "")
        messages.append({"role": "assistant", "content": reply})


def _stream_out(pieces: Iterator[str], prefix: str) -> str:
    """Prints `prefix` and each piece as it arrives; returns the joined pieces."""
    words = [next(pieces, "")]  # checks the input before anything is printed
    print(prefix + words[0], end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        words.append(piece)
    print(flush=True)
    return "".join(words)


def _user_messages(first: str) -> Iterator[str]:
    """Yields `first`, then each non-empty line of stdin."""
    if first:
        yield first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not valid UTF-8 ({error}); convert it first") from None
        if line:
            yield line


COMMAND = Command("--checkpoint=DIR --prompt=TEXT [--chat]", define, main)
