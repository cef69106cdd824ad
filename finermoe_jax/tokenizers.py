"""Tokenizers, loaded through transformers from local files; nothing is executed."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finermoe_jax.errors import InputError
from finermoe_jax.files import refuse_pointer
from finermoe_jax.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def load_tokenizer(directory: Path, vocab_size: int) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory, checked against the model's vocabulary.

    Raises InputError: no tokenizer files, unreadable ones, or more tokens than vocab_size.
    """
    if not has_tokenizer(directory):
        raise InputError(
            f"{directory} holds no tokenizer (neither tokenizer.json nor vocab.json); put the "
            "model's tokenizer files there, or in training name a directory that has them in "
            "data.tokenizer"
        )
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.is_file():
            refuse_pointer(path)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missed here
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json says everything. AutoTokenizer would look at a config.json beside it and
    # rebuild the splitting rules of that model type, which are not always the file's.
    complete = (directory / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if complete else AutoTokenizer
    try:
        # False, not left out: transformers would ask on the terminal whether to run foreign code.
        tokenizer = kind.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"the tokenizer in {directory} cannot be read: {error}") from None
    largest = max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))
    if largest > vocab_size:
        raise InputError(
            f"the tokenizer in {directory} has {largest} tokens, the model's vocab_size is "
            f"{vocab_size}; its ids would not fit the embedding: use the model's own tokenizer"
        )
    return tokenizer


def prefix_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """What the first token of a text follows: the beginning-of-text token, else the end's."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """What generation_config.json of a model with this directory's tokenizer has to say.

    The directory's own generation_config.json; for special tokens on which it is silent the ids of
    a config.json; and, if neither names an end of text, those of the tokenizer. Ids outside the
    vocabulary, which never come up, are left out. Empty when there are none of these files.

    Raises InputError: files that cannot be read, ids that are no integers.
    """
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            stated = read_json(directory / name)
            keys = _IDS if name == "config.json" else stated
            settings |= {key: stated[key] for key in keys if stated.get(key) is not None}
    if "eos_token_id" not in settings and has_tokenizer(directory):
        tokenizer = load_tokenizer(directory, vocab_size)
        settings = {key: getattr(tokenizer, key) for key in _IDS} | settings
    for key in _IDS:
        value = settings.pop(key, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(each, int) or isinstance(each, bool) for each in ids):
            raise InputError(f"{directory}: {key}={value!r} must be an integer or a list of them")
        if known := [each for each in ids if 0 <= each < vocab_size]:
            settings[key] = known if isinstance(value, list) else known[0]
    return settings
