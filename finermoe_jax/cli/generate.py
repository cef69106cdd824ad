"""`finermoe generate`, `python generate.py`."""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags as absl_flags

from finermoe_jax.cli.flags import Command, Flags
from finermoe_jax.errors import InputError


def define(flags: Flags) -> None:
    """Defines the flags."""
    flags.add_path("checkpoint", "checkpoint, workdir, HF directory or hub id", required=True)
    flags.add_text("prompt", "", "text to continue; needed unless --chat")
    flags.add_integer("max_new_tokens", 64, "tokens to add, at most")
    flags.add_number("temperature", 0.0, "0: most likely token; else sample")
    flags.add_integer("top_k", 0, "sample from so many of the likeliest (0: all)")
    flags.add_number(
        "top_p", 1.0, "sample from the likeliest tokens that together have this probability"
    )
    flags.add_number(
        "repetition_penalty", 1.0, "above 1 makes tokens that are there already less likely"
    )
    flags.add_integer("seed", 0, "of the sampling")
    flags.add(
        absl_flags.DEFINE_multi_string,
        "stop",
        [],
        "end before this text; may be given several times",
    )
    flags.add_boolean(
        "chat",
        "converse: --prompt, if given, then lines from stdin, in the tokenizer's chat template",
    )
    flags.add_text("system", "", "a system message to --chat with")
    flags.add_boolean("int8", "weights as int8 with a scale for each output channel")


def main(flags: Flags) -> None:
    """Runs the command."""
    path = flags.need("checkpoint")
    prompt = flags.prompt if flags.chat else flags.need("prompt")
    if flags.system and not flags.chat:
        raise InputError("--system is of a conversation; it needs --chat")
    from finermoe_jax.generation.sampling import Sampling
    from finermoe_jax.generation.text import check_prompt, complete, conversation
    from finermoe_jax.model.quantize import int8_weights
    from finermoe_jax.weights.source import open_with_tokenizer, read_model

    sampling = Sampling(*(getattr(flags, name) for name in Sampling._fields))
    sampling.check()
    source, tokenizer, ends = open_with_tokenizer(path)
    messages = [{"role": "system", "content": flags.system}] if flags.system else []
    # What can be refused is refused before the weights are read.
    first: Any = prompt
    if flags.chat:
        first = conversation(tokenizer, [*messages, {"role": "user", "content": prompt or "?"}])
    check_prompt(source.config, tokenizer, first, flags.max_new_tokens, flags.stop)
    model = read_model(source, path)
    if flags.int8:
        model = int8_weights(model)

    def answer(prompt: Any, shown: str) -> str:
        limit = flags.max_new_tokens
        return _printed(
            complete(model, tokenizer, prompt, limit, sampling, flags.stop, ends), shown
        )

    if not flags.chat:
        answer(prompt, prompt)
        return
    for line in _said(prompt):
        messages.append({"role": "user", "content": line})
        said = answer(conversation(tokenizer, messages), "")
        messages.append({"role": "assistant", "content": said})


def _printed(pieces: Iterator[str], shown: str) -> str:
    """Prints `shown` and the pieces as they come; the pieces as one text."""
    words = [next(pieces, "")]  # the input is checked before anything is printed
    print(shown + words[0], end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        words.append(piece)
    print(flush=True)
    return "".join(words)


def _said(first: str) -> Iterator[str]:
    """Yields a user's messages: `first`, then line by line from stdin, without the empty ones."""
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


COMMAND = Command("--checkpoint=DIR --prompt=TEXT [--chat]", define, main)
