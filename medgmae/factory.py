"""One verb: a name becomes a model, with weights if they are asked for; and what prepares its input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args, overload

import torch

from medgmae.checkpoints.adapt import Inflate
from medgmae.checkpoints.cards import HUB_ORG, WeightCard, WeightsError, list_weights, weight_card
from medgmae.checkpoints.choosing import Recommendation, ScanFacts, Seen, choose_weights, judged
from medgmae.checkpoints.configs import described_model, label_names
from medgmae.checkpoints.dialects.entries import TokenOrder
from medgmae.checkpoints.loading import load_pretrained, materialize
from medgmae.checkpoints.opening import OpenSource, Source, open_source
from medgmae.checkpoints.paths import check_source
from medgmae.data.contrasts import Scan
from medgmae.data.geometry import VolumeError
from medgmae.data.preparation import Preparation
from medgmae.data.scan_header import read_header
from medgmae.models.encoder import Encoder, Model
from medgmae.models.gmae import GaussianMAE
from medgmae.models.mae import MaskedAutoencoder
from medgmae.models.names import EncoderName, GaussianName, SegmenterName, VoxelName
from medgmae.models.registry import is_registered, matching, model_builder, model_names
from medgmae.models.unetr import UNETR

FOLDER_PREFIXES = ("hf-hub:", "local-dir:")


def list_models(pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """Names of architectures; with ``pretrained``, names with a tag for which weights are published.

    Args:
        pattern: shell-style, such as ``"vit_*_256*"``; without a wildcard it may stand anywhere in the name
            (``"vit"``). Several patterns give the names that match any of them.
        pretrained: list ``"architecture.tag"`` of the weights that can be had.
    """
    if not pretrained:
        return model_names(pattern)
    return matching([tag for tag in list_weights() if _published(weight_card(tag))], pattern)


@overload
def create_model(name: EncoderName, pretrained: bool | Source | None = ..., **options: Any) -> Encoder: ...


@overload
def create_model(name: VoxelName, pretrained: bool | Source | None = ..., **options: Any) -> MaskedAutoencoder: ...


@overload
def create_model(name: GaussianName, pretrained: bool | Source | None = ..., **options: Any) -> GaussianMAE: ...


@overload
def create_model(name: SegmenterName, pretrained: bool | Source | None = ..., **options: Any) -> UNETR: ...


@overload
def create_model(name: str | os.PathLike[str], pretrained: bool | Source | None = ..., **options: Any) -> Model: ...


def create_model(
    name: str | os.PathLike[str],
    pretrained: bool | Source | None = None,
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    strict: bool = True,
    source_grid: tuple[int, ...] | None = None,
    token_order: TokenOrder | None = None,
    inflate: Inflate = "average",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    hub_org: str = HUB_ORG,
    progress: bool = True,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> Model:
    """Build a model by name.

    ``"vit_large_patch16_256"`` has random weights; with a tag, ``"vit_large_patch16_256.tangerine"``, it has those.
    ``"hf-hub:org/repo[@revision]"``, ``"local-dir:/path"`` and ``Path("/path")`` open what
    :func:`~medgmae.save_pretrained` wrote.

    Args:
        name: as above.
        pretrained: False leaves the weights random even if the name has a tag. True takes the one published checkpoint
            of the architecture. Else a tag, or any source that :func:`~medgmae.load_pretrained` takes; the tag may be
            another architecture's, such as that of a UNETR's encoder, and its preprocessing then applies.
        checkpoint_path: a file or folder of weights, timm's word for ``pretrained=path``. A tag in ``name`` then says
            what they are: its card's options and preprocessing apply.
        strict: see :func:`~medgmae.load_pretrained`; likewise ``source_grid``, ``token_order`` and ``inflate``.
        cache_dir: see :func:`~medgmae.load_pretrained`; likewise ``token``, ``force_download``, ``hub_org``,
            ``progress`` and ``allow_nonfinite``.
        **overrides: options of the architecture: img_size, in_chans, num_classes, global_pool, drop_path_rate ...

    Returns:
        The model in training mode, on torch's default device, with ``config`` (architecture, model_args),
        ``pretrained_cfg`` (the weight card, or an empty dictionary) and, where weights were loaded, ``load_report``. On
        the CPU the parameters are then mapped from the file, which is quick and takes its size in memory once: do not
        write over that file in place, nor cut it, while the model lives. A file that is cut after it was opened ends
        the process (SIGBUS) when the lost part is used; ``load_pretrained`` into a model that exists copies instead.
        :func:`~medgmae.save_pretrained` replaces files safely.

    Raises:
        ValueError: unknown name.
        TypeError: unknown option.
        WeightsError: the weights cannot be had or do not fit.
    """
    fetching: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "hub_org": hub_org, "progress": progress}
    fetching["force_download"] = force_download
    loading = {"strict": strict, "source_grid": source_grid, "token_order": token_order, "inflate": inflate, **fetching}
    loading["allow_nonfinite"] = allow_nonfinite
    if checkpoint_path:
        check_source(checkpoint_path)
    if isinstance(name, os.PathLike):
        check_source(name)
        name = f"local-dir:{os.fspath(name)}"
    if not isinstance(name, str):
        raise TypeError(f"the name of a model is text or a path, got {name!r}; list_models() gives the names")
    if name.startswith(FOLDER_PREFIXES):
        if checkpoint_path:
            raise ValueError(f"{name} brings its own weights; drop checkpoint_path={os.fspath(checkpoint_path)!r}")
        return _from_saved(name, pretrained, overrides, loading, fetching)
    if "://" in name:
        raise ValueError(f"{name!r} is an address, not a model name; expected 'hf-hub:org/repo' or 'local-dir:FOLDER'")
    if "/" in name or os.sep in name:
        raise ValueError(f"{name!r} is not a model name; did you mean {_meant(name)}?")
    architecture, dot, tag = name.partition(".")
    if not is_registered(architecture) and os.path.isdir(name):
        raise ValueError(f"{name!r} is not a model name, but a folder; did you mean {_meant(name)}?")
    model_builder(architecture)
    if dot and not tag:
        raise ValueError(f"{name!r} ends without a tag; known weights: {list_weights(f'{architecture}.*') or 'none'}")
    if checkpoint_path and pretrained not in (None, False):  # timm's default of checkpoint_path is ""
        raise ValueError(f"checkpoint_path and pretrained={pretrained!r} both name weights; leave one out")
    card, source = _choose(architecture, tag, pretrained)
    source = os.fspath(checkpoint_path) if checkpoint_path else source
    model_args = dict(card.model_args) if card and card.architecture == architecture else {}
    return _build(architecture, {**model_args, **overrides}, card, source, loading)


def _meant(name: str) -> str:
    """The spellings of a model that has been saved somewhere, for what a user typed."""
    if name.startswith("hf_hub:"):  # timm's former prefix
        return repr(name.replace("hf_hub:", "hf-hub:", 1))
    local = repr(f"local-dir:{name}")
    return local if name.startswith(("/", "~", ".")) or os.path.exists(name) else f"{local} or 'hf-hub:{name}'"


def _choose(architecture: str, tag: str, pretrained: bool | Source | None) -> tuple[WeightCard | None, Any]:
    """The card that applies and the source to load, None for random weights."""
    if tag:
        if pretrained not in (None, True, False):
            raise ValueError(f"the tag {tag!r} names the weights already; drop it or pretrained={pretrained!r}")
        card = weight_card(f"{architecture}.{tag}")
        return card, None if pretrained is False else card
    if pretrained is None or pretrained is False:
        return None, None
    if pretrained is True:
        card = _only_published(architecture)
        return card, card
    if isinstance(pretrained, str):
        known = [tag for tag in (pretrained, f"{architecture}.{pretrained}") if tag in list_weights()]
        pretrained = weight_card(known[0]) if known else pretrained
    if not pretrained or not isinstance(pretrained, str | os.PathLike | WeightCard | Mapping | OpenSource):
        got = repr(pretrained) if isinstance(pretrained, str | int | float) else type(pretrained).__name__
        raise TypeError(f"pretrained must be True, False, a tag, a file, a folder or weights, got {got}")
    return pretrained if isinstance(pretrained, WeightCard) else None, pretrained


def _only_published(architecture: str) -> WeightCard:
    tags = list_models(f"{architecture}.*", pretrained=True)
    if len(tags) != 1:
        choices = ", ".join(tags) or "none; pass a file or hub repository as pretrained=..."
        raise WeightsError(
            f"pretrained=True needs exactly one published checkpoint of {architecture}; there are: {choices}"
        )
    return weight_card(tags[0])


def _published(card: WeightCard) -> bool:
    return card.availability in ("package", "hub", "url")


def _from_saved(
    name: str,
    pretrained: bool | Source | None,
    overrides: dict[str, Any],
    loading: dict[str, Any],
    fetching: dict[str, Any],
) -> Model:
    if pretrained not in (None, True, False):
        raise ValueError(
            f"{name} brings its own weights; drop pretrained={pretrained!r}, or name the architecture itself"
        )
    opened = open_source(name, **fetching)
    config = opened.config or {}
    if "architecture" not in config:
        raise WeightsError(f"{name}: has no config.json with an 'architecture'; save it with medgmae.save_pretrained")
    described_model(config, opened.checkpoint.state, name)  # raises before anything is built from a stranger's numbers
    saved_card = config.get("weight_card")
    card = WeightCard.from_saved(saved_card, name, config.get("library_version")) if saved_card else None
    model_args = {**config.get("model_args", {}), **overrides}
    names = label_names(config, name)
    if names is not None and config.get("num_classes") != len(names):
        raise WeightsError(
            f"{name}: the config has {len(names)} names in id2label and num_classes {config.get('num_classes')!r}; "
            "correct the one that is wrong"
        )
    model = _build(config["architecture"], model_args, card, None if pretrained is False else opened, loading)
    if names is not None and len(names) == getattr(model, "num_classes", 0):  # else num_classes= made a new head
        setattr(model, "label_names", names)  # noqa: B010 - not every Model has classes
    report = getattr(model, "load_report", None)
    if report and not overrides and loading["strict"] and (report.missing or report.unused):
        lost = ", ".join([*report.missing, *report.unused][:6])
        raise WeightsError(f"{name}: the weights are not those of the model that its config describes: {lost}")
    return model


def _build(
    architecture: str, model_args: dict[str, Any], card: WeightCard | None, source: Any, loading: dict[str, Any]
) -> Model:
    builder = model_builder(architecture)
    # Without storage there is nothing to initialise and nothing to copy: the tensors of the file become the parameters.
    with torch.device("meta") if source is not None else nullcontext():
        model: Any = builder(**model_args)
    model.pretrained_cfg = card.to_json() if card else {}
    model.config = {
        "architecture": architecture,
        "model_args": model_args,
    }
    if source is not None:
        order = loading["token_order"] or (card.token_order if card else None)
        model.load_report = load_pretrained(model, source, **{**loading, "token_order": order})
        materialize(model, model.load_report.loaded)
        device = torch.get_default_device()
        if device.type not in ("cpu", "meta"):
            model.to(device)
    return model  # type: ignore[no-any-return]


def card_input(source: Any) -> Mapping[str, Any]:
    """The ``input`` block of a tag, a weight card or a model that was built from one, or the block itself.

    Raises:
        VolumeError: there is none.
    """
    if isinstance(source, Mapping):
        return source["input"] or {} if "tag" in source and "input" in source else source  # a card, as pretrained_cfg
    what = repr(source)
    if isinstance(source, str):
        source = weight_card(source)
    card = getattr(source, "pretrained_cfg", None)
    if isinstance(card, Mapping):
        what, block = f"the model {type(source).__name__}, with no input in its weight card,", card.get("input")
    else:
        what, block = getattr(source, "tag", what), getattr(source, "input", None)
    if not isinstance(block, Mapping):
        raise VolumeError(
            f"{what} says nothing about its input; expected a tag, a card or a model that does, or an input block"
        )
    return block


def create_transform(source: Any, *, whole: bool = False) -> Preparation:
    """The preparation that a checkpoint was trained with, as a callable ``path | Volume -> Volume``; see
    ``Preparation``.

    A card that names several contrasts takes them by name, in files or volumes, or as the folder of a case::

        prepare = create_transform("vim_small_patch16_160.mamba_mae")
        prepare({"t1": "a_t1.nii.gz", "t2": "a_t2.nii.gz", "t1ce": "a_t1ce.nii.gz", "flair": "a_flair.nii.gz"})
        prepare("BraTS_0001/")

    Args:
        source: a tag (``"vit_large_patch16_256.tangerine"``), a weight card, a model whose weights have a card, or an
            ``input`` block.
        whole: keep the whole field of view for a sliding window, instead of the card's centre crop.

    Raises:
        VolumeError: the source has no ``input`` block, or the block is not valid.
    """
    return Preparation(card_input(source), whole=whole)


def recommend(
    scan: Scan | Mapping[str, Scan],
    *,
    modality: str | None = None,
    region: str | None = None,
    licence: str | None = None,
) -> list[Recommendation]:
    """Published encoders for a scan, the best first, with what speaks for and against each: whether they were trained
    on its modality and region, take its channels, and what spacing and field of view leave of it.

    Only headers are read, and only cards are compared: nothing is learned, and nothing is known of what you want to do.

    Args:
        scan: a file, a DICOM folder, an image in memory, or a case of several contrasts as a mapping or a folder.
        modality: of the scan, "CT", "MR", ...; by default what its header says, which only DICOM does.
        region: of the scan: head, neck, chest, abdomen, pelvis or limbs; by default what its header says.
        licence: see :func:`~medgmae.choose_weights`.

    Raises:
        VolumeError: the header cannot be read.
        WeightsError: another region.
    """
    header = read_header(scan)
    facts = ScanFacts(
        header.channels, header.grid.spacing, header.grid.size, modality or header.modality, region or header.region
    )
    found = []
    for tag in choose_weights(licence=licence):
        card = weight_card(tag)
        if card.availability == "none" or card.input is None or card.architecture not in get_args(EncoderName):
            continue
        stored, prepared = Preparation(card.input).grids(header.grid)
        found.append(judged(card, facts, Seen(stored.spacing, prepared.spacing, prepared.size)))
    return sorted(found, key=lambda one: one.rank)
