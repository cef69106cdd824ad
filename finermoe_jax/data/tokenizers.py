"""Tokenizers, loaded through transformers from local files; nothing is executed."""

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.files import refuse_pointer
from finermoe_jax.runtime.hub import directory_of
from finermoe_jax.runtime.json_files import read_json, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"
_CONFIG_FILE = "tokenizer_config.json"
# Each of these makes a directory one with a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# The files that a tokenizer may consist of, and the one that says when generation ends.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_FILE,
)
# Further chat templates, each under a name of its own.
TEMPLATE_FILES = "additional_chat_templates/*.jinja"
# More tokens than any model has: for a tokenizer that is loaded without a model.
ANY_VOCABULARY = 1 << 31


def tokenizer_directory(source: str | os.PathLike) -> Path:
    """The directory of a tokenizer, or of a hub id. Raises as `directory_of`."""
    # Some tokenizers are known by their config.json alone.
    return directory_of(source, [*TOKENIZER_FILES, TEMPLATE_FILES, "config.json"])


def has_tokenizer(directory: Path) -> bool:
    """True for a directory that holds a tokenizer's vocabulary."""
    return any((directory / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(directory: Path, vocab_size: int) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory, checked against the model's vocabulary.

    Raises InputError: no tokenizer files, unreadable ones, or more tokens than vocab_size.
    """
    if not has_tokenizer(directory):
        raise InputError(
            f"{directory} holds no tokenizer ({', '.join(_VOCABULARIES)}: none is there); put the "
            "model's tokenizer files there, or in training name a directory that has them in "
            "data.tokenizer"
        )
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.is_file():
            refuse_pointer(path)
    tokenizer = _from_transformers(directory)
    largest = vocabulary(tokenizer)
    if largest > vocab_size:
        raise InputError(
            f"the tokenizer in {directory} has {largest} tokens, the model's vocab_size is "
            f"{vocab_size}; its ids would not fit the embedding: use the model's own tokenizer"
        )
    return tokenizer


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The number of ids that a tokenizer needs: one more than its largest."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))


_SAVE_ONCE = (
    "Write its tokenizer.json once, where transformers can load it: "
    "AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIRECTORY); then put the files of "
    "DIRECTORY in place of the tokenizer's"
)


def _from_transformers(directory: Path) -> "PreTrainedTokenizerBase":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missed here
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    # tokenizer.json says everything. AutoTokenizer would look at a config.json beside it and
    # rebuild the splitting rules of that model type, which are not always the file's.
    complete = (directory / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if complete else AutoTokenizer
    if not complete and not (directory / "vocab.json").is_file():
        if find_spec("sentencepiece") is None:
            raise InputError(
                f"the tokenizer in {directory} cannot be read: it is tokenizer.model alone, for "
                "which the package sentencepiece is missing: pip install sentencepiece. "
                f"Or: {_SAVE_ONCE}"
            )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every model type that it does not know
    try:
        # False, not left out: transformers would ask on the terminal whether to run foreign code.
        return kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        way_out = "" if complete else f". {_SAVE_ONCE}"
        raise InputError(f"the tokenizer in {directory} cannot be read: {error}{way_out}") from None
    finally:
        logging.set_verbosity(verbosity)


# --- apart from the model ---------------------------------------------------------------------


def kept_files(directory: Path, model: Path | None = None) -> dict[str, bytes]:
    """Names and contents of the files that keep a directory's tokenizer and its ends of text.

    They need no config.json beside them. What only config.json says is written into them: ids of
    special tokens into generation_config.json, the tokenizer's class into tokenizer_config.json.
    All else is as it is in `directory`.

    Args:
      directory: a model's, or a tokenizer's alone.
      model: where the special tokens' ids are if `directory` names no end of text.

    Raises InputError: files that cannot be read, ids that are no integers.
    """
    found = [directory / name for name in TOKENIZER_FILES]
    found += sorted(directory.glob(TEMPLATE_FILES))
    files = {
        str(path.relative_to(directory)): path.read_bytes() for path in found if path.is_file()
    }
    settings = _stated(directory)
    if model is not None and "eos_token_id" not in settings:
        settings = {key: value for key, value in _stated(model).items() if key in _IDS} | settings
    generation = _read_if_there(directory / GENERATION_FILE)
    if any(generation.get(key) is None for key in _IDS if key in settings):
        files[GENERATION_FILE] = _json(generation | settings)
    settings = _read_if_there(directory / _CONFIG_FILE)
    # Names of code that is neither run nor copied.
    kept = {key: value for key, value in settings.items() if key != "auto_map"}
    implied = "tokenizer.json" not in files and (directory / "config.json").is_file()
    if implied and has_tokenizer(directory):
        name = type(load_tokenizer(directory, ANY_VOCABULARY)).__name__
        if str(kept.get("tokenizer_class")).removesuffix("Fast") != name:
            kept["tokenizer_class"] = name
    if "tokenizer.json" in files and not kept.get("tokenizer_class"):
        # transformers 4 would look for the model's type, and knows none of a mixture's.
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if kept != settings:
        files[_CONFIG_FILE] = _json(kept)
    return files


def check_kept(directory: Path, beside: Mapping[str, str] | None = None) -> None:
    """Loads what `kept_files` makes of a directory, and compares it with the directory's own.

    Args:
      directory: a model's, or a tokenizer's alone; one without a tokenizer passes.
      beside: further files, by name, of the place where they are to be kept.

    Raises InputError: files that cannot be read, or a tokenizer that would be another one there.
    """
    files = kept_files(directory)
    if beside and "config.json" in beside:
        files["config.json"] = beside["config.json"].encode()
    if not has_tokenizer(directory):
        return
    given = _behaviour(directory)
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        try:
            made = _behaviour(Path(folder))
        except InputError:
            made = ()
    if made != given:
        raise InputError(
            f"the tokenizer in {directory} would be another one in what is made of it, which does "
            f"not have the config.json and the other files beside it. {_SAVE_ONCE}"
        )


def write_files(files: Mapping[str, bytes], target: Path) -> None:
    """Writes `kept_files` into an existing directory."""
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


# Spaces, digits, signs, letters of several scripts and lines: what tokenizers split differently.
_PROBE = "The 2nd  of 1234 tests isn't\n\n\tça naïve — 東京 Привет 🙂 <|im_end|></s> e\u0301."


def _behaviour(directory: Path) -> tuple:
    """Everything by which two tokenizers could be distinguished."""
    tokenizer = load_tokenizer(directory, ANY_VOCABULARY)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoded: Any
    try:
        encoded = tokenizer(_PROBE, verbose=False)["input_ids"]
    except Exception as error:  # of one without a token for the unknown
        encoded = str(error)
    return (
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        encoded,
    )


def _json(values: Mapping[str, Any]) -> bytes:
    return (to_json(values, indent=2) + "\n").encode()


# --- special tokens ---------------------------------------------------------------------------


def prefix_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token before a text's first: the beginning-of-text token, else the end-of-text token."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Returns the generation_config.json settings of a model with this directory's tokenizer.

    They come from the directory's own generation_config.json. Special tokens that it omits come
    from a config.json and, if neither names an end of text, from the tokenizer. Ids outside the
    vocabulary, which never come up, are left out. Empty if there are none of these files.

    Raises InputError: files that cannot be read, ids that are no integers.
    """
    settings = _stated(directory)
    if "eos_token_id" not in settings and has_tokenizer(directory):
        tokenizer = load_tokenizer(directory, vocab_size)
        own = {key: getattr(tokenizer, key) for key in _IDS}
        settings = {key: value for key, value in own.items() if value is not None} | settings
    for key in _IDS:
        value = settings.pop(key, None)
        if known := [each for each in _listed(value) if 0 <= each < vocab_size]:
            settings[key] = known if isinstance(value, list) else known[0]
    return settings


def _listed(ids: Any) -> list:
    """A setting's ids: None, one, or a list of them."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _stated(directory: Path) -> dict[str, Any]:
    """generation_config.json, and ids of special tokens that only config.json names."""
    config = _read_if_there(directory / "config.json")
    settings: dict[str, Any] = {}
    # As transformers does it: where several configs are in one, the decoder's comes second.
    parts = (config.get(name) for name in ("decoder", "generator", "text_config"))
    nested = next((part for part in parts if part and isinstance(part, dict)), {})
    for part in (nested, config):
        settings |= {key: part[key] for key in _IDS if part.get(key) is not None}
    generation = _read_if_there(directory / GENERATION_FILE)
    settings |= {key: value for key, value in generation.items() if value is not None}
    for key in _IDS:
        value = settings.get(key)
        if any(type(each) is not int for each in _listed(value)):
            raise InputError(f"{directory}: {key}={value!r} must be an integer or a list of them")
    return settings


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def end_tokens(files: Path, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json (config.json, where that is
    silent) in `files`, and the tokenizer's own."""
    stated = generation_settings(files, vocab_size).get("eos_token_id")
    return frozenset([*_listed(stated), *_listed(tokenizer.eos_token_id)])
