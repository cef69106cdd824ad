"""Sends a finished directory to the Hugging Face Hub as a model repository.

`repository` checks everything that can be checked before the directory exists, `create` makes the
repository, and `send` uploads.
"""

import shlex
from pathlib import Path
from typing import Any, NoReturn

from finermoe_jax.errors import InputError, RunEnded, first_line
from finermoe_jax.runtime.preemption import INTERRUPTED

_FLAG = "--push_to_hub"
# The Hub adds it to every new repository.
_EMPTY = {".gitattributes"}
_LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token that can write"


def repository(name: str) -> str:
    """Returns the full id, owner/name, of a repository that can be sent to.

    Args:
      name: owner/name, or a name alone, whose owner is the token's user.

    Raises InputError if the name is malformed, there is no usable token, the user may not write for
    that owner, the repository has files already, or the Hub cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{_FLAG}={name} is no Hub id: give owner/name, or a name alone. {first_line(error)}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{_FLAG}={name} needs the Hub, but HF_HUB_OFFLINE is set: unset it")
    user = _user(name)
    owner, _, rest = name.rpartition("/")
    full = name if owner else f"{user['name']}/{rest}"
    _check_rights(user, full)
    if files := _files(full):
        shown = ", ".join(sorted(files)[:3])
        raise InputError(
            f"{_FLAG}={full} already has {len(files)} files ({shown}): nothing is overwritten; "
            "give another name"
        )
    return full


def _user(name: str) -> dict[str, Any]:
    """Returns the Hub's answer on the token's user."""
    from huggingface_hub import HfApi, get_token

    try:
        if not get_token():
            raise InputError(f"{_FLAG}={name} needs a Hugging Face token: {_LOGIN}")
        return HfApi().whoami()
    except InputError:
        raise
    except Exception as error:
        if _status(error) in (401, 403):
            raise InputError(
                f"{_FLAG}={name}: the Hub does not accept the token ({first_line(error)}): {_LOGIN}"
            ) from None
        _unreachable(name, error)


def _check_rights(user: dict[str, Any], repository: str) -> None:
    """Raises InputError if the token can only read, or the owner is neither the user nor theirs."""
    role = (user.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(f"{_FLAG}={repository}: this token can only read: {_LOGIN}")
    organisations = user.get("orgs") or []
    writable = [each["name"] for each in organisations if each.get("roleInOrg") != "read"]
    owner = repository.partition("/")[0]
    if owner.lower() not in {each.lower() for each in (user["name"], *writable)}:
        owners = ", ".join([user["name"], *sorted(writable)])
        raise InputError(
            f"{_FLAG}={repository}: this token cannot write for {owner}, only for {owners}: give "
            "another owner, or another token"
        )


def _files(repository: str) -> set[str]:
    """Returns the files of a repository; none if it does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return set(HfApi().list_repo_files(repository)) - _EMPTY
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set()
    except Exception as error:
        _unreachable(repository, error)


def create(repository: str) -> None:
    """Creates a private repository; a no-op if it exists. Raises InputError if the Hub refuses."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
    except Exception as error:
        if _status(error) is None:
            _unreachable(repository, error)
        raise InputError(
            f"{_FLAG}={repository}: the Hub refuses to create this repository "
            f"({first_line(error)}): give a name that this token can write to"
        ) from None


def send(directory: Path, repository: str) -> str:
    """Uploads all files of a directory, with progress bars. Returns the repository's address.

    Raises RunEnded if that fails or is interrupted. The directory stays as it is.
    """
    from huggingface_hub import HfApi, constants

    try:
        HfApi().upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload by finermoe-jax"
        )
    except KeyboardInterrupt:
        raise _unsent(directory, repository, "interrupted", INTERRUPTED) from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _unsent(directory, repository, first_line(cause).rstrip(".")) from None
    return f"{constants.ENDPOINT}/{repository}"


def _unsent(directory: Path, repository: str, reason: str, code: int = 1) -> RunEnded:
    again = shlex.join(["hf", "upload", repository, str(directory), "."])
    return RunEnded(
        f"{directory} is complete, but it was not sent to {repository}: {reason}. Send it with "
        f"`{again}`",
        code,
    )


def _status(error: Exception) -> int | None:
    """Returns the HTTP status of a Hub error; None if the Hub gave no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _unreachable(name: str, error: Exception) -> NoReturn:
    raise InputError(
        f"{_FLAG}={name}: the Hub does not answer as expected ({first_line(error)}): try again "
        "later, or convert without it and send the directory with `hf upload`"
    ) from None
