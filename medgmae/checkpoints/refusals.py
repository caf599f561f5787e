"""What the hub and its client refuse, and what we do not even ask for: errors that say what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.download import disk_message

_LOGIN = "log in with 'hf auth login' or pass token="
_FULL = {402, 413, 507}  # how servers say that a quota is used up
_LATER = {408, 425, 429, 500, 502, 503, 504}
_DISABLED = "the hub has disabled the repository"
_PAGE = "look at the repository's page on the hub"
_NO_HUB = "check HF_ENDPOINT, and whether a proxy answers in its place"


def check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that is no address: the hub's client fails on some of them while it is imported.

    Raises:
        WeightsError: it is set, and not to the address of a server.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is None:
        return
    if "@" in endpoint:  # every message would show it
        raise WeightsError("HF_ENDPOINT holds a name or a password; write them into ~/.netrc and leave them out")
    with suppress(ValueError):
        parts = urlsplit(endpoint)
        plain = parts.hostname and parts.port != 0 and not parts.query + parts.fragment
        if parts.scheme in ("http", "https") and plain and re.fullmatch("[!-~]+", endpoint):
            return
    example = "https://huggingface.co"
    raise WeightsError(f"HF_ENDPOINT is {endpoint[:200]!r}, expected an address such as {example}; correct or unset it")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the hub client's errors into :class:`WeightsError` that say what to do; ``what`` opens the message."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{what.removeprefix('hf-hub:').partition('@')[0]}"
        remedy = f"accept its terms on {page}, then {_LOGIN}"
        raise WeightsError(f"{what}: the repository is gated; {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"no such repository on {constants.ENDPOINT}, or no access to it"
        raise WeightsError(f"{what}: {problem}; check the name; if it is private, {_LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        remedy = "give a branch, a tag or a commit that it has"
        raise WeightsError(f"{what}: the repository has no such revision; {remedy}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{what}: not the name of a repository ({first_line(error)}); expected org/name") from error
    except errors.DisabledRepoError as error:
        raise WeightsError(f"{what}: {_DISABLED} ({_said(error)}); {_PAGE}") from error
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        remedy = _LOGIN if refused else f"call again later; if it stays so, {_NO_HUB}"
        raise WeightsError(f"{what}: {constants.ENDPOINT} does not serve it ({_said(error)}); {remedy}") from error
    except errors.OfflineModeIsEnabled as error:
        raise WeightsError(f"{what}: HF_HUB_OFFLINE is set; unset it and call again") from error
    except errors.LocalTokenNotFoundError as error:
        raise WeightsError(f"{what}: no token on this machine; {_LOGIN}") from error
    except OSError as error:
        problem = first_line(error) if error.errno is None else disk_message(Path(error.filename or "cache"), error)
        raise WeightsError(f"{what}: {problem}") from error


@contextmanager
def push_errors(what: str, endpoint: str) -> Iterator[None]:
    """The same for an upload, where the client raises many kinds; ``what`` opens the message."""
    from huggingface_hub import errors

    try:
        yield
    except WeightsError:
        raise
    except errors.OfflineModeIsEnabled as error:
        remedy = "unset it, or write a folder with save_pretrained(model, FOLDER) and upload it later"
        raise WeightsError(f"{what}: HF_HUB_OFFLINE is set; {remedy}") from error
    except Exception as error:
        # "Error while uploading" is all that the client says itself of a refusal in between.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, errors.HfHubHTTPError):
            text = _said(cause)
        else:
            text = re.sub("You need to.*", "", " ".join(str(cause).split()))  # its own advice
        text = text.strip(" .") or type(cause).__name__
        raise WeightsError(f"{what}: not uploaded to {endpoint}: {text}; {_push_remedy(cause, text)}") from error


def _push_remedy(error: BaseException, text: str) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _FULL or any(word in text.lower() for word in ("quota", "storage limit", "exceeded")):
        return "free some of the account's storage on the hub, or push to another account"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return _LOGIN
    if isinstance(error, errors.HFValidationError):
        return "expected org/name"
    if isinstance(error, errors.DisabledRepoError):
        return f"{_DISABLED}: {_PAGE}"
    if isinstance(error, (json.JSONDecodeError, LookupError, AttributeError, TypeError)):
        return f"this is not how a hub answers: {_NO_HUB}"
    if status == 404 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such address: {_NO_HUB}"
    if status in (403, 404):
        return f"the token needs the right to write there: {_LOGIN}, or push to a repository of your own"
    if "README.md" in text:
        return (
            "the hub does not accept the model card: correct model.pretrained_cfg (its license, say), or write a "
            "folder with save_pretrained(model, FOLDER), correct its README.md and run 'hf upload REPO FOLDER'"
        )
    if status in (409, 412):
        return "someone else has changed the repository meanwhile: look at its page on the hub and call again"
    if status is None or status in _LATER:
        return "check the connection and call again; what is there already is not sent twice"
    return _PAGE


def check_names(what: str, repo: str, names: Mapping[str, str], token: str | bool | None) -> None:
    """Refuse what leads out of a folder, or into a header, before anything is made of it.

    Args:
        what: opens the message.
        repo: name of a repository.
        names: what is named ("file", "revision") to its name in the repository.
        token: as the user passed it.

    Raises:
        WeightsError: one is not a name.
    """
    from huggingface_hub import utils

    client: Any = utils
    with hub_errors(what):
        client.validate_repo_id(repo)
    if not repo.isascii():  # some versions of the client let other letters pass
        raise WeightsError(f"{what}: not the name of a repository; expected org/name in plain letters")
    for kind, name in names.items():
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name:
            raise WeightsError(f"{what}: {name!r} is not the name of a {kind} in a repository")
    if isinstance(token, str) and not (token.isascii() and token.isprintable()):
        raise WeightsError(f"{what}: token= holds characters that no hub token has; copy it again")


def _said(error: Any) -> str:
    """The status of a refusal, and what the server says of it."""
    status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
    return f"{status}: {' '.join(error.server_message.split())}" if error.server_message else status


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
