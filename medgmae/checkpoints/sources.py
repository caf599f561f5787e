"""From a weight card, a hub address or a path to a verified file on this machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import HUB_ORG, WeightCard, WeightsError, weight_card, weights_folder
from medgmae.checkpoints.configs import parse_config
from medgmae.checkpoints.download import after_discard, disk_message, download
from medgmae.checkpoints.hashes import HashMismatchError, cache_root, verify

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HUB_PREFIX = "hf-hub:"
LOCAL_PREFIX = "local-dir:"

_HUB_SOURCE = re.compile(r"(?P<repo>[^@:\s]+)(@(?P<revision>[^:\s]+))?(:(?P<file>\S+))?")
SUFFIXES = {".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin"}
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger("medgmae")


@dataclass(frozen=True)
class Fetching:
    """How files are brought to this machine.

    Attributes:
        cache_dir: replaces the Hugging Face cache and ours.
        hub_org: organisation of a hub repository that is named without one.
        token: hub token; ``None`` for the one that ``hf auth login`` stored, ``False`` for none.
        force_download: fetch again what is in the cache.
        progress: show a progress bar while downloading.
    """

    cache_dir: str | os.PathLike[str] | None = None
    hub_org: str = HUB_ORG
    token: str | bool | None = None
    force_download: bool = False
    progress: bool = True

    @property
    def root(self) -> Path:
        """Our own cache folder."""
        return cache_root(self.cache_dir)

    @property
    def hub_cache(self) -> Path | None:
        """The hub client's folder, ``None`` for its default."""
        return None if self.cache_dir is None else self.root / "hub"

    def repo_id(self, repo: str) -> str:
        """A repository with its organisation."""
        return repo if "/" in repo else f"{self.hub_org}/{repo}"


@dataclass(frozen=True)
class FetchedFile:
    """A verified weight file on this machine and the ``config.json`` that came with it, if any."""

    path: Path
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class ResolvedSource:
    """What a ``source`` argument stands for.

    Attributes:
        path: the weight file.
        config: the ``config.json`` beside it, if there is one.
        card: the weight card, if the source is one or a tag.
        name: the source in words, for messages.
    """

    path: Path
    config: dict[str, Any] | None
    card: WeightCard | None
    name: str


def resolve(
    source: str | os.PathLike[str] | WeightCard, architecture: str | None = None, how: Fetching | None = None
) -> ResolvedSource:
    """Find the file behind a source, fetching it when it is not on this machine yet.

    Args:
        source: a card or its tag, ``"hf-hub:org/repo[@revision][:file]"``, a weight file, a folder that
            ``save_pretrained`` wrote (also as ``"local-dir:/path"``).
        architecture: registered name that a bare tag (``"tangerine"``) is looked up for.
        how: see :class:`Fetching`.

    Raises:
        WeightsError: there is no such thing, or see :func:`fetch`.
    """
    if isinstance(source, str):
        source = _parse_source(source, architecture)
    if isinstance(source, (str, WeightCard)):
        fetched = fetch(source, how)
        card = source if isinstance(source, WeightCard) else None
        return ResolvedSource(fetched.path, fetched.config, card, card.tag if card else str(source))
    path = Path(source).expanduser()
    fetched = FetchedFile(path) if path.is_file() else read_folder(path)
    return ResolvedSource(fetched.path, fetched.config, None, str(path))


def _parse_source(source: str, architecture: str | None) -> WeightCard | Path | str:
    """A card, a path, or the unchanged hub address."""
    if source.startswith(HUB_PREFIX):
        return source
    path = Path(source.removeprefix(LOCAL_PREFIX)).expanduser()
    if source.startswith(LOCAL_PREFIX) or os.sep in source or path.suffix in SUFFIXES:
        return path
    # A tag wins over a file that happens to have its name: what "tangerine" means must not depend on the folder.
    try:
        return weight_card(source, architecture)
    except WeightsError as error:
        if path.exists():
            return path
        raise WeightsError(f"{error}. There is no file or folder of that name either") from None


def fetch(source: WeightCard | str, how: Fetching | None = None) -> FetchedFile:
    """Bring a card's weights, or those of a hub repository, to this machine and verify them.

    A card is tried in the order of its fields: the file shipped with the package, the hub, the direct address.

    Args:
        source: a card, or ``"hf-hub:org/repo[@revision][:file]"``.
        how: see :class:`Fetching`.

    Raises:
        WeightsError: it cannot be fetched, or is not what its card or the hub announces. For weights that only a person
            can get, the message says how.
    """
    how = how or Fetching()
    if isinstance(source, str):
        return _fetch_repository(source, how)
    if source.file is not None:
        return FetchedFile(_shipped(source, how.root))
    if source.hub is not None:
        repo = how.repo_id(source.hub["repo"])
        try:
            path = _from_hub(repo, source.hub["revision"], source.hub["file"], source.sha256, how)
            return FetchedFile(path)
        except HashMismatchError:
            raise
        except WeightsError as error:
            if source.url is None:
                raise
            _log.warning("%s: %s. Trying %s instead", source.tag, error, source.url)
    if source.url is not None:
        return FetchedFile(_from_url(source, how))
    raise WeightsError(_by_hand(source))


def _by_hand(card: WeightCard) -> str:
    if card.page_file is None:
        where = f" ({card.page})" if card.page else ""
        return (
            f"{card.tag}: no weights are published for this model{where}. Train it yourself, starting from "
            f"create_model({card.architecture!r}), or load a file of your own: "
            f'load_pretrained(model, "/path/to/checkpoint.pth")'
        )
    return (
        f"{card.tag}: the authors share these weights on a page without a direct address: {card.page}. "
        f'Download {card.page_file} there, then load_pretrained(model, "/path/to/{card.page_file}"), or convert it '
        f"once: medgmae convert /path/to/{card.page_file} OUT"
    )


def _shipped(card: WeightCard, root: Path) -> Path:
    path = weights_folder() / str(card.file)
    if not path.is_file():
        raise WeightsError(f"{card.tag}: {path} should come with the package and is not there; install medgmae again")
    try:
        verify(path, root=root, sha256=card.sha256)
    except HashMismatchError as error:
        raise HashMismatchError(f"{card.tag}: {error}; install medgmae again") from None
    return path


def _from_url(card: WeightCard, how: Fetching) -> Path:
    url = str(card.url)
    md5, sha256 = card.url_hashes()
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2]) or "weights"
    # The hash in the path keeps two editions of one address apart, and lets two cards share one download.
    target = how.root / "url" / str(md5 or sha256)[:16] / name
    size = None if card.hub or card.file else card.bytes
    return download(
        url,
        target,
        root=how.root,
        md5=md5,
        sha256=sha256,
        size=size,
        progress=how.progress,
        again=how.force_download,
    )


def _fetch_repository(source: str, how: Fetching) -> FetchedFile:
    match = _HUB_SOURCE.fullmatch(source.removeprefix(HUB_PREFIX))
    if not source.startswith(HUB_PREFIX) or match is None:
        raise WeightsError(f"{source!r} is not a hub address; expected 'hf-hub:org/repo[@revision][:file]'")
    repo, file = how.repo_id(match["repo"]), match["file"] or WEIGHTS_FILE
    path = _from_hub(repo, match["revision"] or "main", file, None, how)
    # The commit that the weights came from, so that a push in between cannot mix two editions.
    snapshot = path.parents[file.count("/")].name
    return FetchedFile(path, _hub_config(repo, snapshot, how))


def _from_hub(repo: str, revision: str, file: str, sha256: str | None, how: Fetching) -> Path:
    from huggingface_hub import constants, hf_hub_download

    what = f"{HUB_PREFIX}{repo}@{revision}:{file}"
    if how.force_download and constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{what}: force_download=True needs a connection, and HF_HUB_OFFLINE is set; drop one of them"
        )
    with hub_errors(what), _bars(how.progress):
        path = Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                cache_dir=how.hub_cache,
                token=how.token,
                force_download=how.force_download,
            )
        )
    try:
        verify(path, root=how.root, sha256=sha256 or _announced_sha256(path))
    except HashMismatchError as error:
        raise HashMismatchError(f"{HUB_PREFIX}{repo}@{revision}: {error}; {after_discard(path)}") from None
    return path


def _announced_sha256(path: Path) -> str | None:
    """The digest that the hub announced for a large file: the client names the cached content after it.

    Only the first link counts: it may point on to a store whose names are hashes of another kind.
    """
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _hub_config(repo: str, revision: str, how: Fetching) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(repo, CONFIG_FILE, cache_dir=how.hub_cache, revision=revision)
    if cached is not None and not isinstance(cached, str):  # the hub said before that there is none
        return None
    try:
        return _read_json(_from_hub(repo, revision, CONFIG_FILE, None, how))
    except WeightsError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        _log.info("%s", error)
        return None


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the hub client's errors into :class:`WeightsError` that say what to do; ``what`` opens the message."""
    from huggingface_hub import constants, errors

    http_error: Any = vars(errors)["HTTPError"]  # of httpx or httpx2, whichever this client is built on
    try:
        yield
    except errors.GatedRepoError as error:
        remedy = f"accept its terms on {constants.ENDPOINT}, then log in with 'hf auth login' or pass token="
        raise WeightsError(f"{what}: the repository is gated; {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"no such repository on {constants.ENDPOINT}, or no access to it"
        remedy = "check the name; if it is private, log in with 'hf auth login' or pass token="
        raise WeightsError(f"{what}: {problem}; {remedy}") from error
    except errors.RevisionNotFoundError as error:
        remedy = "give a branch, a tag or a commit that it has"
        raise WeightsError(f"{what}: the repository has no such revision; {remedy}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        answer = f"{constants.ENDPOINT} does not serve it ({_first_line(error.__cause__ or error)})"
        problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else answer
        remedy = "download it once with a connection, or point HF_HOME to a cache that has it"
        raise WeightsError(f"{what}: not in the cache, and {problem}; {remedy}") from error
    except errors.EntryNotFoundError as error:
        remedy = "name another file as 'hf-hub:org/repo@revision:file'"
        raise WeightsError(f"{what}: the repository has no such file; {remedy}") from error
    except (errors.HFValidationError, http_error) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "; log in with 'hf auth login' or pass token=" if status in (401, 403) else ""
        raise WeightsError(f"{what}: {_first_line(error)}{remedy}") from error
    except OSError as error:
        problem = _first_line(error) if error.errno is None else disk_message(Path(error.filename or "cache"), error)
        raise WeightsError(f"{what}: {problem}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_folder(folder: Path) -> FetchedFile:
    """The weights and configuration in a folder that ``save_pretrained`` wrote.

    Raises:
        WeightsError: no such folder, no ``model.safetensors`` in it, or ``config.json`` is not readable.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such file or folder")
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if not weights.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise WeightsError(f"{folder}: expected {WEIGHTS_FILE} in this folder, found {names}; or name the weight file")
    return FetchedFile(weights, _read_json(config) if config.is_file() else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return parse_config(content, str(path))
