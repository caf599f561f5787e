"""What the hub's client raises, as errors of ours that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.download import disk_message


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the hub client's errors into :class:`WeightsError` that say what to do; ``what`` opens the message."""
    from huggingface_hub import constants, errors

    login = "log in with 'hf auth login' or pass token="
    try:
        yield
    except errors.GatedRepoError as error:
        remedy = f"accept its terms on {constants.ENDPOINT}, then {login}"
        raise WeightsError(f"{what}: the repository is gated; {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"no such repository on {constants.ENDPOINT}, or no access to it"
        raise WeightsError(f"{what}: {problem}; check the name; if it is private, {login}") from error
    except errors.RevisionNotFoundError as error:
        remedy = "give a branch, a tag or a commit that it has"
        raise WeightsError(f"{what}: the repository has no such revision; {remedy}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{what}: not the name of a repository ({first_line(error)}); expected org/name") from error
    except errors.HfHubHTTPError as error:
        remedy = f"; {login}" if error.response.status_code in (401, 403) else ""
        raise WeightsError(f"{what}: {constants.ENDPOINT} does not serve it ({first_line(error)}){remedy}") from error
    except errors.OfflineModeIsEnabled as error:
        raise WeightsError(f"{what}: HF_HUB_OFFLINE is set; unset it and call again") from error
    except errors.LocalTokenNotFoundError as error:
        raise WeightsError(f"{what}: no token on this machine; {login}") from error
    except OSError as error:
        problem = first_line(error) if error.errno is None else disk_message(Path(error.filename or "cache"), error)
        raise WeightsError(f"{what}: {problem}") from error


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
