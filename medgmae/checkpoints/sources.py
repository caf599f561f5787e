"""From a weight card, a hub address or a path to a verified file on this machine."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightCard, WeightsError, weight_card, weights_folder
from medgmae.checkpoints.download import Item, download
from medgmae.checkpoints.hashes import HashMismatchError, verify
from medgmae.checkpoints.hub import HUB_PREFIX, AbsentError, Fetching, HubFile, fetch_hub_file, fetch_hub_json
from medgmae.checkpoints.json_files import read_json
from medgmae.checkpoints.paths import as_path
from medgmae.checkpoints.refusals import check_endpoint
from medgmae.checkpoints.sharded import INDEX_SUFFIX, shard_names

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"model{INDEX_SUFFIX}"
CONFIG_FILE = "config.json"
LOCAL_PREFIX = "local-dir:"

AGAIN = "if the download was damaged, force_download=True fetches it again"
_HUB_SOURCE = re.compile(r"(?P<repo>[^@:\s]+)(@(?P<revision>[^:\s]+))?(:(?P<file>\S+))?")
SUFFIXES = {".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin"}

_log = logging.getLogger("medgmae")


@dataclass(frozen=True)
class FetchedFile:
    """A verified weight file on this machine, the ``config.json`` that came with it, and whether it was downloaded."""

    path: Path
    config: dict[str, Any] | None = None
    fetched: bool = False


@dataclass(frozen=True)
class ResolvedSource:
    """What a ``source`` argument stands for.

    Attributes:
        path: the weight file.
        config: the ``config.json`` beside it, if there is one.
        card: the weight card, if the source is one or a tag.
        name: the source in words, for messages.
        fetched: whether the file was downloaded, now or before.
    """

    path: Path
    config: dict[str, Any] | None
    card: WeightCard | None
    name: str
    fetched: bool = False


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
        return ResolvedSource(fetched.path, fetched.config, card, card.tag if card else str(source), fetched.fetched)
    path = as_path(source)
    fetched = FetchedFile(path) if path.is_file() else read_folder(path)
    return ResolvedSource(fetched.path, fetched.config, None, str(path))


def _parse_source(source: str, architecture: str | None) -> WeightCard | Path | str:
    """A card, a path, or the unchanged hub address."""
    if source.startswith(HUB_PREFIX):
        return source
    if source.startswith(LOCAL_PREFIX) or not source or "\0" in source or "://" in source:
        return as_path(source.removeprefix(LOCAL_PREFIX))
    path = Path(source)
    if os.sep in source or source.startswith("~") or path.name.endswith((*SUFFIXES, INDEX_SUFFIX)):
        return as_path(source)
    # A tag wins over a file that happens to have its name: what "tangerine" means must not depend on the folder.
    try:
        return weight_card(source, architecture)
    except WeightsError as error:
        if os.path.exists(source):
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
    check_endpoint()
    how = how or Fetching()
    if isinstance(source, str):
        return _fetch_repository(source, how)
    if source.file is not None:
        return FetchedFile(_shipped(source, how.root))
    if source.hub is not None:
        wanted = HubFile(how.repo_id(source.hub["repo"]), source.hub["revision"], source.hub_file[0])
        try:
            digests = {"sha256": source.sha256} if source.sha256 else None
            return FetchedFile(fetch_hub_file(wanted, how, digests), fetched=True)
        except HashMismatchError:
            raise
        except WeightsError as error:
            if source.url is None:
                raise
            _log.warning("%s: %s. Trying %s instead", source.tag, error, source.url)
    if source.url is not None:
        return FetchedFile(_from_url(source, how), fetched=True)
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
        verify(path, {"sha256": card.sha256} if card.sha256 else {}, root)
    except HashMismatchError as error:
        raise HashMismatchError(f"{card.tag}: {error}; install medgmae again") from None
    return path


def _from_url(card: WeightCard, how: Fetching) -> Path:
    from huggingface_hub.errors import HfHubHTTPError  # what a refusal is, from whichever server

    url = str(card.url)
    md5, sha256 = card.url_hashes()
    digests = {name: digest for name, digest in (("md5", md5), ("sha256", sha256)) if digest}
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2]) or "weights"
    # The hash in the path keeps two editions of one address apart, and lets two cards share one download.
    target = how.root / "url" / str(md5 or sha256)[:16] / name
    item = Item(url, target, digests, size=None if card.hub or card.file else card.bytes)
    try:
        return download(item, how.root, progress=how.progress, again=how.force_download)
    except HfHubHTTPError as error:
        answer = f"{error.response.status_code} {error.response.reason_phrase}"
        raise WeightsError(f"{url}: the server answers {answer}; look at {card.page or url} in a browser") from error


def _fetch_repository(source: str, how: Fetching) -> FetchedFile:
    match = _HUB_SOURCE.fullmatch(source.removeprefix(HUB_PREFIX))
    if not source.startswith(HUB_PREFIX) or match is None:
        raise WeightsError(f"{source!r} is not a hub address; expected 'hf-hub:org/repo[@revision][:file]'")
    wanted = HubFile(how.repo_id(match["repo"]), match["revision"] or "main", match["file"] or WEIGHTS_FILE)
    try:
        path = fetch_hub_file(wanted, how)
    except AbsentError as absent:
        if match["file"]:
            raise WeightsError(str(absent)) from absent
        wanted = replace(wanted, file=INDEX_FILE)
        try:
            path = fetch_hub_file(wanted, how)
        except AbsentError:
            raise WeightsError(str(absent)) from absent
    # All else from the commit that the weights came from, so that a push in between cannot mix two editions.
    edition = replace(wanted, revision=path.parents[wanted.file.count("/")].name)
    if path.name.endswith(INDEX_SUFFIX):
        folder = wanted.file.removesuffix(path.name)
        for name in shard_names(path, f"; {AGAIN}"):
            fetch_hub_file(replace(edition, file=folder + name), how)
    return FetchedFile(path, fetch_hub_json(replace(edition, file=CONFIG_FILE), how), fetched=True)


def read_folder(folder: Path) -> FetchedFile:
    """The weights and configuration in a folder that ``save_pretrained`` wrote.

    Raises:
        WeightsError: no such folder, no ``model.safetensors`` in it, or ``config.json`` is not readable.
    """
    if not folder.is_dir():
        special = folder.exists()
        raise WeightsError(f"{folder}: " + ("neither a file nor a folder" if special else "no such file or folder"))
    config = folder / CONFIG_FILE
    weights = next((folder / name for name in (WEIGHTS_FILE, INDEX_FILE) if (folder / name).is_file()), None)
    if weights is None:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise WeightsError(
            f"{folder}: expected {WEIGHTS_FILE} in this folder, found {names}; or name the weight file "
            f"(weights in several files need {INDEX_FILE})"
        )
    return FetchedFile(weights, read_json(config) if config.exists() else None)
