"""Whether published weights are what their card says: names and shapes, hash, and whether they fill the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from medgmae.checkpoints.cards import WeightCard, WeightsError, weight_card, weights_folder
from medgmae.checkpoints.hashes import file_hashes
from medgmae.checkpoints.hub import Fetching, HubFile, fetch_hub_file
from medgmae.checkpoints.json_files import read_json
from medgmae.checkpoints.loading import rehearse
from medgmae.checkpoints.opening import open_source
from medgmae.checkpoints.paths import as_path
from medgmae.checkpoints.reading import SET_MARK
from medgmae.checkpoints.report import LoadReport, html_table
from medgmae.checkpoints.sources import fetch
from medgmae.checkpoints.tensors import listed
from medgmae.checkpoints.training_config import compare_config
from medgmae.models.registry import model_builder

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")


@dataclass(frozen=True, repr=False)
class Verification:
    """What :func:`verify_weights` found; ``print`` gives the whole text, a notebook shows a table.

    Attributes:
        card: of the weights, with size, hash and commit of the file filled in.
        path: the file.
        missing: names of the manifest that the file lacks.
        shapes: name to the shapes of the manifest and of the file, where they differ.
        unlisted: number of the file's tensors that the manifest does not name.
        manifest: whether there is a manifest to compare with.
        config: what the configuration beside the weights says otherwise than the card; None where none was compared.
        report: what loading into the model of the card does.
        problems: what speaks against the file; empty: it is what the card says.
    """

    card: WeightCard
    path: Path
    missing: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    unlisted: int = 0
    manifest: bool = False
    config: list[str] | None = None
    report: LoadReport | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the file."""
        return not self.problems

    def facts(self) -> dict[str, str]:
        """The findings in words, by name."""
        compared = "no manifest to compare with"
        if self.manifest:
            compared = f"{len(self.missing)} missing, {len(self.shapes)} of another shape, {self.unlisted} not listed"
        commit = self.card.hub["revision"] if self.card.hub else "-"
        return {
            "tag": self.card.tag,
            "file": str(self.path),
            "bytes": str(self.card.bytes),
            "sha256": str(self.card.sha256),
            "commit": commit if _COMMIT.fullmatch(commit) else f"{commit} (no commit known)",
            "names and shapes": compared,
            **({"configuration": self._configuration()} if self.card.config else {}),
            "loading": "-" if self.report is None else str(self.report),
            "problems": "; ".join(self.problems) or "none",
        }

    def _configuration(self) -> str:
        if self.config is None:
            return f"not compared: {(self.card.config or {})['file']} of the repository is not beside the file"
        return "; ".join(self.config) or "as the card says"

    def __repr__(self) -> str:
        return f"Verification({self.card.tag!r}, passed={self.passed}, problems={len(self.problems)})"

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.facts().items())

    def _repr_html_(self) -> str:
        return html_table(self.facts().items())


def verify_weights(
    tag: str | WeightCard,
    *,
    file: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Verification:
    """Download the weights of a card, and compare them with it: hash, names and shapes, configuration, and the model.

    Nothing of the file is executed, and no model is given storage.

    Args:
        tag: "vit_large_patch16_256.tangerine", or a card.
        file: the weights, if they are on this machine already; a card's configuration is then compared if it lies where
            it does in the repository.
        cache_dir: see :func:`~medgmae.load_pretrained`; likewise ``token`` and ``progress``.

    Raises:
        WeightsError: no such card, or a file that cannot be fetched or read, or that has another hash than the card's.
    """
    card = tag if isinstance(tag, WeightCard) else weight_card(tag)
    how = Fetching(cache_dir=cache_dir, token=token, progress=progress)
    path, commit = _file_of(card, file, how)
    problems: list[str] = []
    own = bool(card.hub or card.file)  # else what the card says is about the file behind its address
    digests = file_hashes(path, ("md5", "sha256"))
    for name, expected in (("sha256", card.sha256), ("md5", None if own else card.md5)):
        if expected and digests[name] != expected:
            problems.append(f"{name} is {digests[name]}, the card's {expected}")
    filled = replace(card, bytes=path.stat().st_size, sha256=digests["sha256"])
    if card.hub is not None and commit:
        filled = replace(filled, hub={**card.hub, "revision": commit})
    wanted = card.hub_file[1]
    opened = open_source(Path(f"{path}{SET_MARK}{wanted}") if wanted else path)
    shapes = {_WRAPPERS.sub("", name): list(tensor.shape) for name, tensor in opened.checkpoint.state.items()}
    expected_shapes = manifest_of(card.tag)
    missing, differing = _compared(expected_shapes or {}, shapes)
    if missing:
        problems.append(f"{len(missing)} tensors of the manifest are missing: {listed(missing)}")
    if differing:
        shown = [f"{name}: {what}" for name, what in differing.items()]
        problems.append(f"{len(differing)} tensors have other shapes: {listed(shown)}")
    differing_config = _compare_config(card, path, commit, how)
    problems += [f"{(card.config or {})['file']}: {said}" for said in differing_config or []]
    report = None
    try:
        with torch.device("meta"):
            model = model_builder(card.architecture)(**card.model_args)
        report = rehearse(model, opened, token_order=card.token_order).report
        # A norm over the pooled vector starts at identity: published files of pre-training have none.
        random = [name for name in report.missing if not name.startswith("fc_norm.")]
        if random:
            problems.append(f"{len(random)} parameters would stay random: {listed(random)}")
    except (WeightsError, ValueError, TypeError) as error:
        problems.append(f"it does not load into {card.architecture}: {error}")
    unlisted = len(set(shapes) - set(expected_shapes or shapes))
    listed_there = expected_shapes is not None
    return Verification(filled, path, missing, differing, unlisted, listed_there, differing_config, report, problems)


def manifest_of(tag: str) -> dict[str, list[int]] | None:
    """Names and shapes of a card's official file, by the code that wrote it; None where there is no such list."""
    path = weights_folder() / "manifests" / f"{tag}.json"
    if not path.is_file():
        return None
    tensors: dict[str, list[int]] = read_json(path)["tensors"]
    return {_WRAPPERS.sub("", name): shape for name, shape in tensors.items()}


def _file_of(card: WeightCard, file: str | os.PathLike[str] | None, how: Fetching) -> tuple[Path, str | None]:
    """The file, and the commit of the hub that it came from."""
    if file is not None:
        return as_path(file), None
    path = fetch(card, how).path
    if card.hub is None:
        return path, None
    commit = path.parents[card.hub["file"].count("/")].name  # the client keeps files by commit
    return path, commit if _COMMIT.fullmatch(commit) else None


def _compare_config(card: WeightCard, path: Path, commit: str | None, how: Fetching) -> list[str] | None:
    """See :attr:`Verification.config`."""
    if card.config is None or card.hub is None:
        return None
    name = card.config["file"]
    if commit is not None:
        where = HubFile(how.repo_id(card.hub["repo"]), commit, name)
        return compare_config(fetch_hub_file(where, how), card.config["expected"])
    beside = path.parent / os.path.relpath(name, os.path.dirname(card.hub_file[0]) or ".")
    return compare_config(beside, card.config["expected"]) if beside.is_file() else None


def _compared(expected: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> tuple[list[str], dict[str, str]]:
    """Names that are missing, and what differs in shape."""
    missing = [name for name in expected if name not in found]
    differing = {
        name: f"{json.dumps(shape)} in the manifest, {json.dumps(found[name])} in the file"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    }
    return missing, differing
