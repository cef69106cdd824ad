"""Text generation: prompts, streamed or in batches, and chat."""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from finermoe_jax.config.arguments import check_integer, is_integer
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError
from finermoe_jax.generation.decode import check, stream
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.model.decoder import Decoder

GREEDY = Sampling()


def stream_text(
    model: Decoder,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    ends: Collection[int] | None = None,
) -> Iterator[str]:
    """Yields the continuation of one prompt, piece by piece.

    Args:
      model: any decoder.
      tokenizer: the model's tokenizer.
      prompt: text or token ids.
      max_new_tokens: maximum number of new tokens.
      sampling: sampling settings; greedy by default.
      stop: a string or strings; the text ends before the first of them.
      ends: end-of-text token ids; default: the tokenizer's.

    Raises InputError, at the call, for arguments of the wrong type, an empty prompt, or one that
    does not fit (`generate`).
    """
    ids = _encode(tokenizer, prompt)
    text = _Text(tokenizer, ids, stop, ends)
    tokens = stream(model, np.asarray([ids], np.int32), None, max_new_tokens, sampling)

    def pieces() -> Iterator[str]:
        for token in tokens:
            if piece := text.add(int(token[0])):
                yield piece
            if text.ended:
                return
        if piece := text.rest():
            yield piece

    return pieces()


def complete(
    model: Decoder,
    tokenizer: Any,
    text: str | Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """Continues a text, or each of several.

    Args:
      model: any decoder.
      tokenizer: the model's (`load_tokenizer`).
      text: a text, or a list of texts.
      max_new_tokens: maximum number of new tokens per text.
      temperature: 0 takes the most likely token; otherwise samples from
        softmax(logits / temperature).
      top_k: samples from the k most likely tokens; 0 means all.
      top_p: samples from the fewest tokens with this total probability.
      repetition_penalty: above 1 makes tokens that already occurred less likely.
      seed: seed of the sampling.
      stop: a string or strings; the continuation ends before the first of them.

    Returns:
      The continuation without the text itself; for a list of texts, their continuations in order.

    Raises:
      InputError: an argument of the wrong type or out of range, an empty text, or more tokens than
        the model has positions.

    Examples:
      >>> import finermoe_jax as fm
      >>> model = fm.load_hf("demo/model")
      >>> tokenizer = fm.load_tokenizer("demo/model")
      >>> fm.complete(model, tokenizer, "Return the", max_new_tokens=4)
      '\\n  :class'
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    if isinstance(text, str):
        return "".join(stream_text(model, tokenizer, text, max_new_tokens, sampling, stop))
    return continue_all(
        model, tokenizer, text, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
    )


def continue_all(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    ends: Collection[int] | None = None,
    batch_size: int = 8,
    show_progress: bool = False,
) -> list[str]:
    """Returns the continuation of every prompt, in order; arguments as in `complete`.

    Batches contain prompts of similar length, so that few programs are compiled. Raises InputError
    before any prompt runs.
    """
    check_integer("batch_size", batch_size, 1)
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r} is a string: give a list of strings")
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    for prompt_ids in encoded:
        _check_ids(model.config, prompt_ids, max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    texts = [_Text(tokenizer, ids, stop, ends) for ids in encoded]
    with tqdm(total=len(order), unit="prompt", disable=not show_progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # Fill up the last batch: another size would be compiled separately.
            filled = [encoded[i] for i in rows] + [encoded[rows[-1]]] * (batch_size - len(rows))
            longest = max(map(len, filled))
            padded = np.zeros((batch_size, longest), np.int32)
            mask = np.zeros_like(padded)
            for row, prompt_ids in enumerate(filled):
                padded[row, : len(prompt_ids)], mask[row, : len(prompt_ids)] = prompt_ids, 1
            for new in stream(model, padded, mask, max_new_tokens, sampling):
                for i, token in zip(rows, new, strict=False):
                    texts[i].add(int(token))
                if all(texts[i].ended for i in rows):
                    break
            bar.update(len(rows))
    for text in texts:
        text.rest()
    return [text.shown for text in texts]


def check_prompt(
    config: ModelConfig,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    stop: str | Sequence[str],
) -> None:
    """Raises InputError if `complete` would; needs no weights."""
    ids = _encode(tokenizer, prompt)
    _check_ids(config, ids, max_new_tokens)
    _Text(tokenizer, ids, stop, None)


def _check_ids(config: ModelConfig, ids: list[int], max_new_tokens: int) -> None:
    prompt = np.asarray([ids])
    check(config, prompt, np.ones(prompt.shape, bool), max_new_tokens)


def conversation(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Returns the tokens of a conversation up to the next answer, by the chat template.

    messages are {"role": "system" | "user" | "assistant", "content": text}. transformers renders
    the template in a sandbox. Raises InputError if there is no template or it fails.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, so its model is not a chat model: omit --chat, or "
            "put chat_template.jinja next to the tokenizer"
        )
    for message in messages:
        _check_text(message["content"], f"a message of the {message['role']}")
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template may raise anything
        raise InputError(f"the tokenizer's chat template failed: {error}") from None


def _encode(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        ids = _integers("a prompt", prompt)
    else:
        _check_text(prompt, "a prompt")
        # With the tokenizer's special tokens, as in pretraining and evaluation.
        begins = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not begins)["input_ids"] if prompt else []
    if not ids:
        raise InputError("a prompt is empty: give at least one character")
    return ids


def _integers(what: str, values: Any) -> list[int]:
    try:
        values = [values] if isinstance(values, bytes) else list(values)
        wrong = [each for each in values if not is_integer(each)]
    except TypeError:
        wrong = [values]
    if wrong:
        raise InputError(f"{what} contains {wrong[0]!r}; token ids must be integers")
    return [int(each) for each in values]


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid UTF-8 at character {error.start}; convert it first"
        ) from None


class _Text:
    """The decoded text of a prompt's new tokens, as far as later tokens cannot change it."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: str | Sequence[str],
        ends: Collection[int] | None,
    ):
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if wrong := [each for each in self.stop if not isinstance(each, str)]:
            raise InputError(f"stop contains {wrong[0]!r}; it must be a string or strings")
        if "" in self.stop:
            raise InputError("a stop string is empty and would end every text at once: remove it")
        self.tokenizer = tokenizer
        self.ends = frozenset([tokenizer.eos_token_id] if ends is None else _integers("ends", ends))
        # Decoded together with the prompt's last tokens, from a whole character on: some tokenizers
        # drop the space before a text's first word.
        begin = max(0, len(prompt) - 8)
        while begin and tokenizer.decode(prompt[begin:]).startswith("\ufffd"):
            begin -= 1
        self.context = list(prompt[begin:])
        self.before = tokenizer.decode(self.context)
        self.tokens: list[int] = []
        self.shown = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Adds a token and returns the new certain text; ignores tokens after the end."""
        if self.ended:
            return ""
        if token in self.ends:
            return self.rest()
        self.tokens.append(token)
        text = self._decoded()
        found = [place for s in self.stop if (place := text.find(s)) >= 0]
        if found:
            self.ended = True
            return self._show(text[: min(found)])
        # Hold back an incomplete UTF-8 sequence, which decodes to the replacement character, and
        # the beginning of a stop string.
        whole = text.rstrip("\ufffd")
        begun = (size for s in self.stop for size in range(1, len(s)) if whole.endswith(s[:size]))
        return self._show(whole[: len(whole) - max(begun, default=0)])

    def rest(self) -> str:
        """Ends the text and returns what was held back."""
        if self.ended:
            return ""
        self.ended = True
        return self._show(self._decoded())

    def _decoded(self) -> str:
        text = self.tokenizer.decode(self.context + self.tokens)
        # A prompt of token ids may end inside a character, which new tokens complete.
        kept = os.path.commonprefix([self.before, text])  # noqa: RUF071  (of characters)
        return text[len(kept) :]

    def _show(self, text: str) -> str:
        piece = text[len(self.shown) :]
        self.shown += piece
        return piece
