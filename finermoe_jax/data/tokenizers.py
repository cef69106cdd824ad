"""Tokenizers, loaded through transformers from local files; nothing is executed."""

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finermoe_jax.errors import InputError
from finermoe_jax.runtime.buckets import BucketPath, Place
from finermoe_jax.runtime.files import refuse_pointer
from finermoe_jax.runtime.hub import directory_of
from finermoe_jax.runtime.json_files import read_json, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"
_CONFIG_FILE = "tokenizer_config.json"
# Any one of these files makes a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# All files of a tokenizer, and the one with the end-of-text tokens.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_FILE,
)
# Further, named chat templates.
TEMPLATE_FILES = "additional_chat_templates/*.jinja"
# More tokens than any model has, to load a tokenizer without a model.
ANY_VOCABULARY = 1 << 31


def tokenizer_directory(source: str | os.PathLike) -> Path:
    """Returns the directory of a tokenizer, or of a Hub id. Raises as `directory_of`."""
    # Some tokenizers are known by their config.json alone.
    return directory_of(source, [*TOKENIZER_FILES, TEMPLATE_FILES, "config.json"])


def has_tokenizer(directory: Path) -> bool:
    """True if a directory contains a tokenizer's vocabulary."""
    return any((directory / name).is_file() for name in _VOCABULARIES)


def open_tokenizer(directory: Path, vocab_size: int) -> "PreTrainedTokenizerBase":
    """Loads a directory's tokenizer and checks it against the model's vocabulary.

    Raises InputError for missing or unreadable files, or more tokens than vocab_size.
    """
    if not has_tokenizer(directory):
        raise InputError(
            f"{directory} has no tokenizer (none of {', '.join(_VOCABULARIES)}); copy the model's "
            "tokenizer files there, or for training set data.tokenizer to a directory with them"
        )
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.is_file():
            refuse_pointer(path)
    tokenizer = _from_transformers(directory)
    largest = vocabulary(tokenizer)
    if largest > vocab_size:
        raise InputError(
            f"the tokenizer in {directory} has {largest} tokens, but the model's vocab_size is "
            f"{vocab_size}: use the model's own tokenizer"
        )
    return tokenizer


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the number of ids that a tokenizer needs: its largest id plus one."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))


_SAVE_ONCE = (
    "Write its tokenizer.json where transformers can load it: "
    "AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIRECTORY); then replace the "
    "tokenizer's files by those of DIRECTORY"
)


def _from_transformers(directory: Path) -> "PreTrainedTokenizerBase":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    # tokenizer.json is complete. AutoTokenizer would also read a config.json beside it and rebuild
    # the splitting rules of that model type, which may differ from the file's.
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
    logging.set_verbosity_error()  # no warnings about unknown model types
    try:
        # Explicit False: otherwise transformers asks on the terminal whether to run remote code.
        return kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        way_out = "" if complete else f". {_SAVE_ONCE}"
        raise InputError(f"the tokenizer in {directory} cannot be read: {error}{way_out}") from None
    finally:
        logging.set_verbosity(verbosity)


# --- copies without the model -----------------------------------------------------------------


def kept_files(directory: Path, model: Path | None = None) -> dict[str, bytes]:
    """Returns names and contents of the files that preserve a directory's tokenizer.

    They need no config.json. Its special tokens' ids are written into generation_config.json and
    the tokenizer's class into tokenizer_config.json; everything else is copied unchanged. If
    `directory` names no end-of-text token, the ids come from `model`.

    Raises InputError for unreadable files, or ids that are not integers.
    """
    found = [directory / name for name in TOKENIZER_FILES]
    found += sorted(directory.glob(TEMPLATE_FILES))
    files = {
        str(path.relative_to(directory)): path.read_bytes() for path in found if path.is_file()
    }
    settings = _stated(directory)
    if model is not None and "eos_token_id" not in settings:
        settings = {key: value for key, value in _stated(model).items() if key in _IDS} | settings
    generation = _read_optional(directory / GENERATION_FILE)
    if any(generation.get(key) is None for key in _IDS if key in settings):
        files[GENERATION_FILE] = _json(generation | settings)
    settings = _read_optional(directory / _CONFIG_FILE)
    # Refers to code that is neither run nor copied.
    kept = {key: value for key, value in settings.items() if key != "auto_map"}
    implied = "tokenizer.json" not in files and (directory / "config.json").is_file()
    if implied and has_tokenizer(directory):
        name = type(open_tokenizer(directory, ANY_VOCABULARY)).__name__
        if str(kept.get("tokenizer_class")).removesuffix("Fast") != name:
            kept["tokenizer_class"] = name
    if "tokenizer.json" in files and not kept.get("tokenizer_class"):
        # transformers 4 would look up the model's type, and knows none for a mixture.
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if kept != settings:
        files[_CONFIG_FILE] = _json(kept)
    return files


def check_kept(directory: Path, beside: Mapping[str, str] | None = None) -> None:
    """Compares the tokenizer that `kept_files` writes with the directory's own.

    `beside` are other files, by name, of the target. A directory without a tokenizer passes.

    Raises InputError if files cannot be read or the copied tokenizer would behave differently.
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
            f"the tokenizer in {directory} would behave differently when copied without the "
            f"config.json and other files beside it. {_SAVE_ONCE}"
        )


def write_files(files: Mapping[str, bytes], target: Place) -> None:
    """Writes `kept_files` into an existing directory, or into a bucket."""
    for name, content in files.items():
        if isinstance(target, BucketPath):
            (target / name).write(content)
        else:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)


# Spaces, digits, signs, scripts and line ends, which tokenizers split differently.
_PROBE = "The 2nd  of 1234 tests isn't\n\n\tça naïve — 東京 Привет 🙂 <|im_end|></s> e\u0301."


def _behaviour(directory: Path) -> tuple:
    """Returns everything that can distinguish two tokenizers."""
    tokenizer = open_tokenizer(directory, ANY_VOCABULARY)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoded: Any
    try:
        encoded = tokenizer(_PROBE, verbose=False)["input_ids"]
    except Exception as error:  # no token for unknown text
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
    """Returns the token before a text: the beginning-of-text token, else the end-of-text token."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Returns the generation_config.json settings of a model with this directory's tokenizer.

    They come from the directory's own generation_config.json. Missing special tokens come from
    config.json or, if neither names an end-of-text token, from the tokenizer. Omits ids outside the
    vocabulary. Empty without any of these files.

    Raises InputError for unreadable files, or ids that are not integers.
    """
    settings = _stated(directory)
    if "eos_token_id" not in settings and has_tokenizer(directory):
        tokenizer = open_tokenizer(directory, vocab_size)
        own = {key: getattr(tokenizer, key) for key in _IDS}
        settings = {key: value for key, value in own.items() if value is not None} | settings
    for key in _IDS:
        value = settings.pop(key, None)
        if known := [each for each in _listed(value) if 0 <= each < vocab_size]:
            settings[key] = known if isinstance(value, list) else known[0]
    return settings


def _listed(ids: Any) -> list:
    """Returns a setting's ids as a list; the setting is None, an id or a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _stated(directory: Path) -> dict[str, Any]:
    """Returns generation_config.json, and special tokens' ids that only config.json states."""
    config = _read_optional(directory / "config.json")
    settings: dict[str, Any] = {}
    # As in transformers, a nested decoder's config has lower priority.
    parts = (config.get(name) for name in ("decoder", "generator", "text_config"))
    nested = next((part for part in parts if part and isinstance(part, dict)), {})
    for part in (nested, config):
        settings |= {key: part[key] for key in _IDS if part.get(key) is not None}
    generation = _read_optional(directory / GENERATION_FILE)
    settings |= {key: value for key, value in generation.items() if value is not None}
    for key in _IDS:
        value = settings.get(key)
        if any(type(each) is not int for each in _listed(value)):
            raise InputError(f"{directory}: {key}={value!r} must be an integer or a list of them")
    return settings


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def end_tokens(files: Path, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Returns the ids that end a text: those stated in `files` and the tokenizer's own."""
    stated = generation_settings(files, vocab_size).get("eos_token_id")
    return frozenset([*_listed(stated), *_listed(tokenizer.eos_token_id)])
