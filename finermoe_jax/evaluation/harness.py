"""Adapter for EleutherAI's lm-evaluation-harness. Needs the extra `eval`."""

import itertools
import sys
from collections.abc import Collection, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from finermoe_jax.data.tokenizers import prefix_token
from finermoe_jax.errors import InputError, first_line
from finermoe_jax.evaluation.scoring import BATCH_TOKENS, Continuation, Score, score, windows
from finermoe_jax.evaluation.tasks import examples
from finermoe_jax.generation.decode import bucket
from finermoe_jax.generation.sampling import Sampling
from finermoe_jax.generation.text import continue_all
from finermoe_jax.model.decoder import Decoder

NEW_TOKENS = 256  # the harness's default


class HarnessModel(TemplateLM):
    """A decoder and its tokenizer as the harness's `LM`.

    Tokenises like the harness's Hugging Face model: with the tokenizer's default special tokens,
    and a beginning-of-text (or else end-of-text) token in place of an empty context.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        ends: Collection[int] | None = None,
        batch_tokens: int = BATCH_TOKENS,
        show_progress: bool = False,
    ):
        """`ends` is as in `text.complete`, the others as in `scoring.score`.

        `cut` counts truncated prompts.

        Raises InputError if the tokenizer has neither of the two tokens.
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.ends, self.batch_tokens, self.show_progress = ends, batch_tokens, show_progress
        self.prefix = required_prefix(tokenizer)
        self.cut = 0

    @property
    def max_length(self) -> int:
        """The model's context length in tokens."""
        return self.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, or else the prefix."""
        end: int | None = self.tokenizer.eos_token_id
        return self.prefix if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokenises a text, without duplicating a beginning-of-text token."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(
            string, add_special_tokens=add_special_tokens, verbose=False
        )
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _scores(self, parts: list[Continuation], disable_tqdm: bool) -> list[Score]:
        show = self.show_progress and not disable_tqdm
        return score(self.model, parts, batch_tokens=self.batch_tokens, show_progress=show)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        parts = [Continuation(context, targets) for _, context, targets in requests]
        self._count_cut(sum(len(c) + len(t) - 1 > self.max_length for c, t in parts), len(parts))
        found = self._scores(parts, disable_tqdm)
        for (texts, _, _), one in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [(one.log_likelihood, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Returns log-likelihoods of whole texts, in windows of the model's context length.

        Windows do not overlap, except the last, which has as much context as fits.
        """
        parts: list[Continuation] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            found = list(windows(ids, self.prefix, self.max_length, self.max_length))
            parts += found
            owners += [index] * len(found)
        sums = [0.0] * len(requests)
        for index, one in zip(owners, self._scores(parts, disable_tqdm), strict=True):
            sums[index] += one.log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Generates continuations up to the stop strings, which are excluded.

        Batches have at least eight prompts, or more if batch_tokens allows. Prompts that leave no
        room for the new tokens are truncated on the left.

        Raises InputError if the new tokens alone fill the model's context.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            settings = normalize_gen_kwargs(requests[indices[0]].args[1], NEW_TOKENS)
            stop = [text for text in settings["until"] if text]
            new, sampling = settings["max_gen_toks"], _sampling(settings)
            room = _room(self.max_length, new)
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            prompts = [prompt or [self.prefix] for prompt in prompts]
            self._count_cut(sum(len(prompt) > room for prompt in prompts), len(prompts), new)
            prompts = [prompt[-room:] for prompt in prompts]
            length = bucket(max(map(len, prompts)) + new)
            found = continue_all(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=new,
                sampling=sampling,
                stop=stop,
                ends=self.ends,
                batch_size=8 * max(1, self.batch_tokens // (8 * length)),
                show_progress=self.show_progress and not disable_tqdm,
            )
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _count_cut(self, count: int, of: int, new: int = 0) -> None:
        """Adds to `cut` and logs it; `new`: number of tokens to generate."""
        self.cut += count
        most = f"the model's context of {self.max_length} tokens"
        if new:
            most = f"{self.max_length - new} tokens ({self.max_length} minus {new} to generate)"
        if count:
            print(
                f"{count} of {of} prompts exceed {most} and are truncated on the left, as in the "
                "harness",
                file=sys.stderr,
            )


def required_prefix(tokenizer: Any) -> int:
    """Returns the token for an empty context. Raises InputError if the tokenizer has none."""
    prefix = prefix_token(tokenizer)
    if prefix is None:
        raise InputError(
            "the tokenizer has neither a beginning-of-text nor an end-of-text token, which scoring "
            "without a context needs; set eos_token in its tokenizer_config.json"
        )
    return prefix


def _room(limit: int, new: int) -> int:
    """Returns the maximum prompt length. Raises InputError if it is 0."""
    if new >= limit:
        raise InputError(
            f"max_gen_toks={new} leaves no room for a prompt in the model's "
            f"context of {limit} tokens; omit this task"
        )
    return limit - new


def _sampling(settings: dict[str, Any]) -> Sampling:
    known = ["repetition_penalty"]
    if settings.get("do_sample"):
        known += ["temperature", "top_k", "top_p", "seed"]
    return Sampling(**{name: settings[name] for name in known if settings.get(name) is not None})


def check_limits(tasks: Sequence[Any], limit: int) -> None:
    """Raises InputError for tasks that exceed the context, or need images or beam search."""
    for task in tasks:
        if getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"task {task.task_name} needs images, but the model reads text only; omit it"
            )
        if task.get_config("output_type") == "generate_until":
            settings = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, NEW_TOKENS)
            if (settings.get("num_beams") or 1) != 1:
                raise InputError(
                    f"task {task.task_name} needs num_beams={settings['num_beams']}, but beam "
                    "search is not supported; omit it"
                )
            try:
                _room(limit, settings["max_gen_toks"])
            except InputError as error:
                raise InputError(f"task {task.task_name}: {error}") from None


def check_rows(tasks: Sequence[Any], limit: int | None, num_fewshot: int | None) -> None:
    """Raises InputError for an unusable row, or too few rows for the few-shot examples.

    Checks the first `limit` rows of each task; None: all.
    """
    for task in tasks:
        _check_examples(task, num_fewshot)
        for number, row in enumerate(itertools.islice(task.eval_docs, limit)):
            try:
                _use(task, row)
            except Exception as error:  # of jinja, or a task's own code
                raise InputError(
                    f"task {task.task_name}, row {number} is unusable: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from None


def _use(task: Any, row: Any) -> None:
    """Evaluates a row as the harness will, and raises if the result is unusable."""
    text, target = task.doc_to_text(row), task.doc_to_target(row)
    if not isinstance(text, str | int):
        raise TypeError(f"its text is {text!r}")
    if task.get_config("output_type") != "multiple_choice":
        return
    choices = task.doc_to_choice(row)
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"its choices are {choices!r}")
    for index in target if isinstance(target, list) else [target]:
        # The harness would count it as a wrong answer.
        if isinstance(index, int) and not 0 <= index < len(choices):
            raise ValueError(f"its answer {index} is not in 0 … {len(choices) - 1}, its choices")


def _check_examples(task: Any, num_fewshot: int | None) -> None:
    count = examples(task.get_config("num_fewshot"), num_fewshot)
    if not count or not hasattr(task, "fewshot_cfg"):
        return
    rows = len(task.sampler.fewshot_docs()) if hasattr(task, "sampler") else 0
    # If examples come from the test split, the harness excludes the scored row.
    have = rows - (task.fewshot_cfg.split == task.config.test_split)
    if count > have:
        raise InputError(
            f"task {task.task_name} needs {count} examples per prompt but has {max(0, have)} rows "
            "for them; lower --num_fewshot, or give more rows"
        )


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """Extracts a task's numeric metrics from the harness's results.

    "rows" is the number of scored rows; a metric of a named filter is "metric,filter".
    """
    found = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
    return found | {"rows": values.get("sample_len", 0)}
