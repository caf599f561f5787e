"""Weight cards: where a checkpoint lives, what it is, and what it expects of its input.

A card is one JSON file in the project's ``weights`` folder (installed as ``medgmae.weights``), named after its tag:
``vit_large_patch16_256.tangerine.json``. ``weights/README.md`` explains every field.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from medgmae._version import __version__
from medgmae.checkpoints.report import html_table
from medgmae.models.registry import matching

HUB_ORG = "medgmae"
"""Organisation of our own copies on the Hugging Face hub: a card's ``hub.repo`` without a slash belongs to it."""

_log = logging.getLogger("medgmae")
_TAG = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")
_HUB_FIELDS = {"repo", "revision", "file"}
_OPTIONAL = {"acceptance", "config", "features", "page_file", "redistribute", "token_order", "trained_on"}
_CHECKS = {"reconstruction": {"check", "model"}, "orientation": {"check", "model_args", "other", "decides"}}
REGIONS = ("head", "neck", "chest", "abdomen", "pelvis", "limbs")
"""Parts of the body, in the words of a card's ``trained_on``."""


class WeightsError(RuntimeError):
    """Weights cannot be found, fetched, verified, read, fitted to the model, saved or uploaded."""

    def __str__(self) -> str:
        """The message; what a file or a path smuggled into it cannot steer a terminal."""
        text = super().__str__()
        return "".join(
            char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
        )


@dataclass(frozen=True, repr=False)
class WeightCard:
    """What the library knows about one checkpoint; a notebook shows it as a table.

    Attributes:
        tag: ``<architecture>.<name>``, equal to the stem of the card's file.
        model_args: arguments that the architecture needs to fit the checkpoint, such as
            ``{"global_pool": "token_avg"}``.
        hub: ``{"repo", "revision", "file"}`` on the Hugging Face hub; a repo without a slash belongs to ``HUB_ORG``. A
            file of several sets of weights is named with the one to take, ``"last.pth::teacher"``.
        url: direct address of the official file.
        page: page where a person finds the file or its description.
        page_file: name of the file that the page offers, when there is no direct address.
        file: name of a weight file that ships inside the package.
        md5: hash of the file behind ``url``.
        sha256: hash of ``file`` or of the hub's file; of the file behind ``url`` when there is neither.
        bytes: size of the file that ``sha256`` is about; ``None`` when not known exactly.
        license: licence of the weights as the hub spells it (``cc-by-nc-4.0``); ``unknown`` when none is stated.
        redistribute: whether the licence allows to pass on the weights, converted or not; ``None`` when not known. With
            ``False`` ``push_to_hub`` refuses a public repository.
        training_data: what the weights were trained on, in words.
        trained_on: the same for choosing: ``{"modalities", "regions", "scans"}``, as in ``{"modalities": ["CT"],
            "regions": ["chest"], "scans": 98000}``; ``scans`` is ``None`` when not known, regions are of ``REGIONS``.
        citation: how to cite the weights.
        input: modality, channels and their contrasts, size, spacing, orientation and intensity rule of the input: the
            keys of :class:`~medgmae.data.preparation.Preparation`.
        notes: anything else a user should know before use.
        token_order: "raster" or "swapped", of weights of a Primus, see :func:`~medgmae.load_pretrained`.
        acceptance: what ``medgmae verify`` runs on a scan, beside comparing names and shapes; weights/README.md has the
            kinds.
        config: a configuration in the hub's repository, and what ``medgmae verify`` expects in it, of which the weights
            show nothing: ``{"file": "vitb/config.yaml", "expected": {"student.num_heads": 12}}``.
        features: a few numbers of the features of the example scans, as ``medgmae verify`` finds them, ``{"tolerance":
            0.001, "scans": {"ct_thorax.nii.gz": {...}}}``.

    Raises:
        WeightsError: a field has the wrong form.
    """

    tag: str
    model_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    hub: Mapping[str, str] | None = field(default=None, hash=False)
    url: str | None = None
    page: str | None = None
    page_file: str | None = None
    file: str | None = None
    md5: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    license: str | None = None
    redistribute: bool | None = None
    training_data: str | None = None
    trained_on: Mapping[str, Any] | None = field(default=None, hash=False)
    citation: str | None = None
    input: Mapping[str, Any] | None = field(default=None, hash=False)
    notes: str | None = None
    token_order: Literal["raster", "swapped"] | None = None
    acceptance: Mapping[str, Any] | None = field(default=None, hash=False)
    config: Mapping[str, Any] | None = field(default=None, hash=False)
    features: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self._expect("tag", _is_match(_TAG, self.tag), "'<architecture>.<name>' in a-z, 0-9 and _")
        self._expect("model_args", _is_object(self.model_args), "an object of named arguments")
        if self.hub is not None:
            valid = _is_object(self.hub) and set(self.hub) == _HUB_FIELDS and all(map(_is_text, self.hub.values()))
            self._expect("hub", valid, "null or {repo, revision, file}, all of them text")
        for name in ("url", "page"):
            value = getattr(self, name)
            valid = value is None or (_is_text(value) and value.startswith(("https://", "http://")))
            self._expect(name, valid, "null or an address that starts with https://")
        for name in ("file", "page_file"):
            value = getattr(self, name)
            self._expect(name, value is None or (_is_text(value) and Path(value).name == value), "null or a file name")
        for name, digits in (("md5", 32), ("sha256", 64)):
            value = getattr(self, name)
            valid = value is None or _is_match(re.compile(f"[0-9a-f]{{{digits}}}"), value)
            self._expect(name, valid, f"null or {digits} lower-case hexadecimal digits")
        valid = self.bytes is None or (type(self.bytes) is int and self.bytes > 0)
        self._expect("bytes", valid, "null or a positive whole number")
        self._expect(
            "redistribute", self.redistribute is None or isinstance(self.redistribute, bool), "null, true or false"
        )
        for name in ("license", "training_data", "citation", "notes"):
            value = getattr(self, name)
            self._expect(name, value is None or _is_text(value), "null or text")
        self._expect(
            "trained_on",
            self.trained_on is None or _is_domain(self.trained_on),
            f"null or {{modalities: ['CT', ...], regions: some of {list(REGIONS)}, scans: a number or null}}",
        )
        self._expect("input", self.input is None or _is_object(self.input), "null or an object")
        self._expect("token_order", self.token_order in (None, "raster", "swapped"), "null, 'raster' or 'swapped'")
        for name, valid, form in (
            ("acceptance", _is_check(self.acceptance), f"null or the fields of one of {sorted(_CHECKS)}"),
            ("config", _is_config(self.config), "null or {file, expected: {name: value}}"),
            ("features", _is_digest(self.features), "null or {tolerance: a number, scans: {file: {name: numbers}}}"),
        ):
            self._expect(name, valid, form)
        if self.url is not None and not any(self.url_hashes()):
            raise WeightsError(f"weight card {self.tag!r}: a 'url' needs the hash of its file: add 'md5' (or 'sha256')")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            value = getattr(self, name)
            raise WeightsError(f"weight card {self.tag!r}: field {name!r} is {value!r}, expected {expected}")

    def __repr__(self) -> str:
        return f"WeightCard({self.tag!r}, availability={self.availability!r}, license={self.license!r})"

    def _repr_html_(self) -> str:
        stated = {name: value for name, value in self.to_json().items() if value not in (None, {})}
        rows = {name: value if isinstance(value, str) else json.dumps(value) for name, value in stated.items()}
        return html_table({**rows, "availability": self.availability}.items())

    @property
    def architecture(self) -> str:
        """The model's registered name: the tag up to the dot."""
        return self.tag.partition(".")[0]

    @property
    def availability(self) -> str:
        """Where the weights come from first: ``package``, ``hub``, ``url``, ``page`` (by hand) or ``none``."""
        if self.file:
            return "package"
        if self.hub:
            return "hub"
        if self.url:
            return "url"
        return "page" if self.page_file else "none"

    @property
    def hub_file(self) -> tuple[str, str]:
        """The hub's file, and which set of weights in it to take, "" for the usual one."""
        name, _, wanted = (self.hub or {"file": ""})["file"].partition("::")
        return name, wanted

    def url_hashes(self) -> tuple[str | None, str | None]:
        """``(md5, sha256)`` of the file behind ``url``; ``sha256`` is about our own copy where there is one."""
        return self.md5, None if self.hub or self.file else self.sha256

    @classmethod
    def from_saved(cls, data: Mapping[str, Any], source: str, version: object) -> WeightCard:
        """Card from the JSON object in a saved model, which another version of the library may have written.

        Fields that this version does not know are left out, with a warning that names ``version``, the writer's; those
        that it misses are ``null``.

        Raises:
            WeightsError: see :meth:`from_json`.
        """
        if not _is_object(data):
            return cls.from_json(data, source)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            _log.warning(
                "%s: its card was written by medgmae %s; fields %s, unknown to this version, %s, are ignored",
                source,
                str(version or "(version unknown)")[:40],
                str(unknown)[:200],
                __version__,
            )
        blank = dict.fromkeys(known - {"model_args"}) | {"model_args": {}}
        return cls.from_json({**blank, **{name: value for name, value in data.items() if name in known}}, source)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str = "weight card") -> WeightCard:
        """Card from its JSON object, where every field is spelled out (``null`` for what does not apply).

        Raises:
            WeightsError: fields are missing, unknown or malformed; ``source`` says where.
        """
        if not _is_object(data):
            raise WeightsError(f"{source}: expected a JSON object, got {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        missing = [name for name in known if name not in data and name not in _OPTIONAL]
        if unknown or missing:
            raise WeightsError(
                f"{source}: missing fields {missing}, unknown fields {unknown}; a card has {known}, null where unused"
            )
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """The card as a JSON object with every field."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def list_weights(pattern: str | Sequence[str] = "*") -> list[str]:
    """Tags of the known weights, sorted; includes those that no one has published.

    Args:
        pattern: shell-style; without a wildcard it may stand anywhere in the tag. Several: those that match any.
    """
    return matching(_cards(), pattern)


def weight_card(tag: str, architecture: str | None = None) -> WeightCard:
    """The card of a tag.

    Args:
        tag: ``"vit_large_patch16_256.tangerine"``, or its part after the dot when ``architecture`` is given.
        architecture: registered model name that a bare tag is looked up for.

    Raises:
        WeightsError: no such card; the message names the nearest.
    """
    cards = _cards()
    full = tag if "." in tag or architecture is None else f"{architecture}.{tag}"
    if full in cards:
        return cards[full]
    same_name = [known for known in cards if known.partition(".")[2] == full.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(full, cards, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "list_weights() names all of them"
    raise WeightsError(f"no weights are known as {full!r}; {hint}")


def weights_folder() -> Path:
    """The folder of cards and shipped weight files: the installed package, or ``weights/`` of a checkout."""
    try:
        return Path(str(importlib.resources.files("medgmae.weights")))
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / "weights"


@functools.cache
def _cards() -> dict[str, WeightCard]:
    cards: dict[str, WeightCard] = {}
    for entry in weights_folder().iterdir():
        if entry.name.endswith(".json"):
            card = _read_card(entry)
            cards[card.tag] = card
    return dict(sorted(cards.items()))


def _read_card(entry: Path) -> WeightCard:
    try:
        data = json.loads(entry.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{entry}: not valid JSON: {error}") from error
    card = WeightCard.from_json(data, source=str(entry))
    if entry.name != f"{card.tag}.json":
        raise WeightsError(f"{entry}: holds the tag {card.tag!r}, so the file must be named '{card.tag}.json'")
    return card


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_match(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_domain(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"modalities", "regions", "scans"}:
        return False
    lists = [value["modalities"], value["regions"]]
    if not all(isinstance(one, (list, tuple)) and all(map(_is_text, one)) for one in lists) or not lists[0]:
        return False
    scans = value["scans"]
    counted = scans is None or (type(scans) is int and scans > 0)
    return counted and set(lists[1]) <= set(REGIONS) and all(one == one.upper() for one in lists[0])


def _is_check(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and set(value) == _CHECKS.get(str(value.get("check")), {})


def _is_config(value: object) -> bool:
    if value is None:
        return True
    whole = isinstance(value, Mapping) and set(value) == {"file", "expected"}
    return whole and _is_text(value["file"]) and _is_object(value["expected"])  # type: ignore[index]


def _is_digest(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or set(value) != {"tolerance", "scans"} or not _is_object(value["scans"]):
        return False
    return isinstance(value["tolerance"], float) and all(map(_is_object, value["scans"].values()))


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as the dict and list that JSON knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
