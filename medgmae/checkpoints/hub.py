"""Files of the Hugging Face hub, in the cache that its own client shares.

The client says who the user is, where the hub is and what its refusals mean. The bytes come over our own requests: the
client trusts names and hashes that a server sends, and does not go on where a connection was reset.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import HUB_ORG, WeightsError
from medgmae.checkpoints.download import Item, download, verify_or_discard, writing
from medgmae.checkpoints.hashes import Digests, announced_digests, cache_root, remembered
from medgmae.checkpoints.json_files import read_json, refuse_folder
from medgmae.checkpoints.refusals import check_names, first_line, hub_errors
from medgmae.checkpoints.wire import Attempts, Interrupted, answer

HUB_PREFIX = "hf-hub:"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)  # of a commit or content, as a server may announce it

_log = logging.getLogger("medgmae")


class AbsentError(WeightsError):
    """The hub says that a repository has no such file."""


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
    def hub_cache(self) -> Path:
        """The hub client's folder."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) if self.cache_dir is None else self.root / "hub"

    def repo_id(self, repo: str) -> str:
        """A repository with its organisation."""
        return repo if "/" in repo else f"{self.hub_org}/{repo}"


@dataclass(frozen=True)
class HubFile:
    """One file of one revision of a repository."""

    repo: str
    revision: str
    file: str

    @property
    def edition(self) -> str:
        """The repository and its revision, for messages that name a path too."""
        return f"{HUB_PREFIX}{self.repo}@{self.revision}"

    def __str__(self) -> str:
        return f"{self.edition}:{self.file}"

    def folder(self, how: Fetching) -> Path:
        """The repository's folder in the cache."""
        from huggingface_hub.file_download import repo_folder_name

        return how.hub_cache / repo_folder_name(repo_id=self.repo, repo_type="model")

    def commit(self, how: Fetching) -> str:
        """The commit that the revision was last known to be."""
        with suppress(OSError, ValueError):
            return (self.folder(how) / "refs" / self.revision).read_text(encoding="ascii").strip()
        return self.revision

    def cached(self, how: Fetching, commit: str) -> Path | None:
        """Where the file of a commit is in the cache."""
        path = self.folder(how) / "snapshots" / commit / self.file
        return path if _NAME.fullmatch(commit) and path.exists() else None

    def absent(self, how: Fetching, commit: str) -> Path:
        """The mark in the cache for a file that a commit does not have."""
        return self.folder(how) / ".no_exist" / commit / self.file


@dataclass(frozen=True)
class Announced:
    """What the hub says of a file: the commit that the revision is, the name of the content, its size."""

    commit: str
    etag: str
    size: int | None

    def content(self, file: str) -> str:
        """The content's name in the cache, which a hash may be alone; other ETags repeat over files and commits."""
        if announced_digests(self.etag):
            return self.etag
        place = hashlib.sha256(f"{self.commit}/{file}".encode()).hexdigest()[:16]
        return f"{self.etag[:100]}-{place}"


def fetch_hub_file(wanted: HubFile, how: Fetching, digests: Digests | None = None) -> Path:
    """Bring one file to the cache, or find it there, and verify it.

    The file is compared with ``digests`` or, without them, with the one that the hub announces for it. A commit of 40
    digits in the cache needs no request; else the hub is asked once. Where it cannot be asked, the cache serves.

    Raises:
        AbsentError: the repository has no such file.
        WeightsError: it cannot be fetched, or is not what was announced.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    check_names(str(wanted), wanted.repo, {"revision": wanted.revision, "file": wanted.file}, how.token)
    with hub_errors(str(wanted)):
        commit = wanted.commit(how)
        path = None if how.force_download else wanted.cached(how, commit)
        known = (digests or _known_digests(path, how.root)) if path else {}
        settled = path and (known or path.is_symlink()) and _COMMIT.fullmatch(wanted.revision)
        if path and (constants.HF_HUB_OFFLINE or settled):
            return _verified(wanted, path, known, how)
        pinned_or_offline = constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(wanted.revision)
        if pinned_or_offline and not how.force_download and wanted.absent(how, commit).is_file():
            raise _absent(wanted, " (noted in the cache; force_download=True asks again)")
        try:
            announced = _announce(wanted, how, Attempts(1 if path else None))
        except (AbsentError, RevisionNotFoundError):
            raise
        except (WeightsError, HfHubHTTPError) as error:
            if path is None:
                raise
            _log.info("%s: %s; the copy in the cache is used", wanted, first_line(error))
            return _verified(wanted, path, known, how)
        digests = digests or announced_digests(announced.etag)
        path = wanted.cached(how, announced.commit)
        if path is None or how.force_download:
            path = _bring(wanted, announced, digests, how)
        with suppress(OSError):  # a cache that is only read serves as it is
            _set_reference(wanted, announced.commit, how)
        return _verified(wanted, path, digests, how)


def fetch_hub_json(wanted: HubFile, how: Fetching) -> dict[str, Any] | None:
    """A JSON object of a repository; ``None`` if the hub says, or has said, that there is none.

    Raises:
        WeightsError: it cannot be fetched, which says nothing of whether it exists, or is no JSON object.
    """
    try:
        path = fetch_hub_file(wanted, how)
    except AbsentError as error:
        _log.info("%s", error)
        return None
    return read_json(path, "; if the download was damaged, force_download=True fetches it again")


def _known_digests(path: Path, root: Path) -> Digests:
    """The digest that the hub announced for a cached file.

    The client names the content after it, and the file is a link to that content. Only the first link counts: it may
    point on to a store whose names are hashes of another kind. Where there are no links, we have remembered it.
    """
    return announced_digests(os.path.basename(os.readlink(path))) if path.is_symlink() else remembered(path, root)


def _verified(wanted: HubFile, path: Path, digests: Digests, how: Fetching) -> Path:
    if not digests:
        _log.info("%s: the hub announces no hash that its content could be compared with", wanted)
    try:
        verify_or_discard(path, digests, how.root)
    except WeightsError as error:
        raise type(error)(f"{wanted.edition}: {error}") from None
    return path


def _announce(wanted: HubFile, how: Fetching, attempts: Attempts) -> Announced:
    """Ask the hub for a file's commit and hash."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        drop = "force_download=True needs a connection, and HF_HUB_OFFLINE is set; drop one of them"
        raise WeightsError(f"{wanted}: {drop if how.force_download else _without('HF_HUB_OFFLINE is set', how)}")
    url = hf_hub_url(wanted.repo, wanted.file, revision=wanted.revision)
    while True:
        try:
            with answer("HEAD", url, _headers(how), attempts) as response:
                return _parse_announced(wanted, response.headers)
        except HfHubHTTPError as error:
            if not _says_absent(error):
                raise
            if str(error.response.url) == url:  # not where a redirect led: that may be anything
                _note_absent(wanted, error.response.headers.get("X-Repo-Commit", ""), how)
            raise _absent(wanted) from error
        except Interrupted as failure:
            try:
                attempts.failed(failure)
            except WeightsError as error:
                raise WeightsError(
                    f"{wanted}: {_without(f'{constants.ENDPOINT} does not serve it ({error})', how)}"
                ) from failure


def _without(problem: str, how: Fetching) -> str:
    return (
        f"not in the cache, and {problem}; download it once with a connection, on any machine, and copy that cache to "
        f"{how.hub_cache} (or point HF_HOME to it), or load a file by its path"
    )


def _parse_announced(wanted: HubFile, headers: Any) -> Announced:
    """The headers that matter, when their values can be names of files."""
    commit = headers.get("X-Repo-Commit", "")
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    for name, value in (("X-Repo-Commit", commit), ("ETag", etag)):
        if not _NAME.fullmatch(value) or ".." in value:
            raise WeightsError(
                f"{wanted}: the server's header {name} is {value[:80]!r}, not what a hub sends; check HF_ENDPOINT, and "
                "whether a proxy answers in its place"
            )
    if _COMMIT.fullmatch(wanted.revision) and commit != wanted.revision:
        raise WeightsError(f"{wanted}: the server answers with another commit, {commit}; check HF_ENDPOINT")
    size = headers.get("X-Linked-Size") or ("" if "Location" in headers else headers.get("Content-Length", ""))
    return Announced(commit, etag, int(size) if re.fullmatch("[0-9]{1,18}", size) else None)


def _says_absent(error: Any) -> bool:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    return isinstance(error, RemoteEntryNotFoundError)  # a bare 404 may be a proxy's, or another server's


def _absent(wanted: HubFile, noted: str = "") -> AbsentError:
    remedy = "name another file as 'hf-hub:org/repo@revision:file'"
    return AbsentError(f"{wanted}: the repository has no such file{noted}; {remedy}")


def _note_absent(wanted: HubFile, commit: str, how: Fetching) -> None:
    """Remember in the cache, as the client does, that a commit has no such file."""
    if not _NAME.fullmatch(commit):
        return
    marker = wanted.absent(how, commit)
    with suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        _set_reference(wanted, commit, how)


def _headers(how: Fetching) -> dict[str, str]:
    from huggingface_hub import utils

    client: Any = utils
    headers: dict[str, str] = client.build_hf_headers(token=how.token, library_name="medgmae")
    return headers


def _bring(wanted: HubFile, announced: Announced, digests: Digests, how: Fetching) -> Path:
    """Download into the layout of the client's cache: a link in the snapshot to a content named after its hash."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import are_symlinks_supported

    folder = wanted.folder(how)
    blob = folder / "blobs" / announced.content(wanted.file)
    path = folder / "snapshots" / announced.commit / wanted.file
    refuse_folder(path)
    refuse_folder(blob)
    with writing(how.hub_cache):
        linked = are_symlinks_supported(how.hub_cache)
    item = Item(
        url=hf_hub_url(wanted.repo, wanted.file, revision=announced.commit),  # the branch may have moved on since
        target=blob if linked else path,
        digests=digests,
        size=announced.size,
        headers=_headers(how),
        part=blob.with_name(f"{blob.name}.incomplete"),  # the client's name, which its tools clean up
        lock=how.hub_cache / ".locks" / folder.name / f"{blob.name}.lock",
        answered=True,
    )
    try:
        download(item, how.root, progress=how.progress, again=how.force_download)
    except WeightsError as error:
        raise type(error)(f"{wanted.edition}: {error}") from error
    if linked:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{uuid.uuid4().hex}")
            new.symlink_to(os.path.relpath(blob, path.parent))
            os.replace(new, path)
    return path


def _set_reference(wanted: HubFile, commit: str, how: Fetching) -> None:
    """Note which commit a branch or tag is, for when the hub cannot be asked."""
    reference = wanted.folder(how) / "refs" / wanted.revision
    if wanted.revision == commit or (reference.is_file() and reference.read_text() == commit):
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    new = reference.with_name(f"{reference.name}.{uuid.uuid4().hex}.tmp")
    new.write_text(commit)
    os.replace(new, reference)
