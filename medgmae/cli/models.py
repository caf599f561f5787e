"""``medgmae list`` and ``medgmae info``: known models and weights, and what a name or file stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

import medgmae
from medgmae.cli.common import (
    NotRecognisedError,
    by_reason,
    by_times,
    echo_fields,
    echo_json,
    echo_table,
    megabytes,
    reports_errors,
)
from medgmae.cli.options import complete_name, json_option, per_axis, source_grid_option, token_order_option

# How weights are obtained, in the words of the table.
AVAILABILITY = {"package": "shipped", "hub": "hub", "url": "download", "page": "by hand", "none": "not published"}


@click.command("list")
@click.argument("pattern", default="*")
@click.option(
    "--pretrained", is_flag=True, help="Only weights that are shipped or downloaded without a visit to a web page."
)
@click.option("--licence", metavar="NAME", help="Only weights of this licence, or 'permissive'.")
@click.option("--modality", metavar="NAME", help="Only weights that were trained on it: CT, MR, PET.")
@click.option(
    "--region", metavar="NAME", help="Only weights that were trained on it: head, neck, chest, abdomen, pelvis, limbs."
)
@json_option
@reports_errors
def list_command(
    pattern: str, pretrained: bool, licence: str | None, modality: str | None, region: str | None, as_json: bool
) -> None:
    """List architectures and known weights whose name matches PATTERN.

    PATTERN is shell-style ('vit_*_256*'); without a wildcard it may stand anywhere in the name ('tangerine').
    'permissive' are licences that allow any use and ask for no more than a mention, such as Apache-2.0 and CC BY 4.0.
    """
    tags = medgmae.list_models(pattern, pretrained=True) if pretrained else medgmae.list_weights(pattern)
    narrowed = bool(licence or modality or region)
    if narrowed:
        tags = medgmae.choose_weights(tags, licence=licence, modality=modality, region=region) if tags else []
    names = sorted([*tags, *([] if pretrained or narrowed else medgmae.list_models(pattern))])
    rows = [_row(name) for name in names]
    if as_json:
        echo_json(rows)
        return
    if not rows:
        options = {"--licence": licence, "--modality": modality, "--region": region}
        asked = "".join(f" {name} {value}" for name, value in options.items() if value)
        raise NotRecognisedError(f"no model or weights match {pattern!r}{asked}; `medgmae list` shows all names")
    table = [("NAME", "PARAMETERS", "INPUT", "PATCH", "WEIGHTS", "LICENCE", "SIZE")]
    for row in rows:
        card = row["weights"] or {}
        table.append(
            (
                row["name"],
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['in_chans']} x {by_times(row['img_size'])}",
                by_times(row["patch_size"]),
                AVAILABILITY[card["availability"]] if card else "-",
                (card.get("license") or "-") if card else "-",
                megabytes(card.get("bytes")),
            )
        )
    echo_table(table)


@click.command("recommend")
@click.argument("scan", type=click.Path(exists=True, path_type=Path))
@click.option("--modality", metavar="NAME", help="Of the scan: CT, MR, PET. By default what its header says.")
@click.option(
    "--region",
    metavar="NAME",
    help="Of the scan: head, neck, chest, abdomen, pelvis, limbs. By default what its header says.",
)
@click.option("--licence", metavar="NAME", help="Only weights of this licence, or 'permissive'.")
@json_option
@reports_errors
def recommend_command(scan: Path, modality: str | None, region: str | None, licence: str | None, as_json: bool) -> None:
    """Say which published encoders were trained on scans like SCAN, with reasons for and against.

    SCAN is a file, a DICOM folder, or a folder with the contrasts of a case. Only its header is read. Modality and
    region stand in DICOM headers alone: give them for other formats.
    """
    found = medgmae.recommend(scan, modality=modality, region=region, licence=licence)
    if as_json:
        echo_json([dataclasses.asdict(one) for one in found])
        return
    if not found:
        raise NotRecognisedError(f"no published encoder has the licence {licence!r}; `medgmae list` shows all names")
    signs = {"yes": "suits", "perhaps": "perhaps", "no": "does not suit"}
    for one in found:
        click.echo(f"{one.tag}: {signs[one.suits]} ({AVAILABILITY[one.availability]}, {one.licence or 'no licence'})")
        for sign, reasons in (("+", one.reasons_for), ("-", one.reasons_against), ("?", one.unknown)):
            for reason in reasons:
                click.echo(f"  {sign} {reason}")


@click.command("info")
@click.argument("what", metavar="NAME|TAG|FILE", shell_complete=complete_name)
@source_grid_option
@token_order_option
@json_option
@reports_errors
def info_command(
    what: str,
    source_grid: int | tuple[int, ...] | None,
    token_order: Literal["raster", "swapped"] | None,
    as_json: bool,
) -> None:
    """Show an architecture, the card of published weights, or what a weight file holds.

    A file is only read: nothing in it is executed. Exit code 2: it is not recognised.
    """
    if what in medgmae.list_weights():
        facts = {**_architecture(what), "card": {**medgmae.weight_card(what).to_json()}}
    elif what in medgmae.list_models():
        facts = {**_architecture(what), "weights": medgmae.list_weights(f"{what}.*")}
    elif Path(what).expanduser().exists():
        facts = _file(what, source_grid, token_order)
    else:
        raise NotRecognisedError(_nothing(what))
    if as_json:
        echo_json(facts)
    elif "renamed" in facts:
        _echo_file(facts)
    else:
        echo_fields(facts)


def _nothing(what: str) -> str:
    """Why ``what`` is neither a name nor a file, with the nearest names."""
    if len(Path(what).parts) > 1 or Path(what).suffix in (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors"):
        return f"{what}: no such file or folder"
    try:
        medgmae.weight_card(what) if "." in what else medgmae.create_model(what, pretrained=False)
    except (medgmae.WeightsError, ValueError) as error:
        return f"{str(error).rstrip('.')}. No file has that name either"
    raise AssertionError(what)


def _build(name: str) -> Any:
    """The model behind a name, without storage."""
    import torch

    with torch.device("meta"):
        return medgmae.create_model(name, pretrained=False)


def _row(name: str) -> dict[str, Any]:
    model = _build(name)
    encoder = model.encoder
    card = medgmae.weight_card(name) if "." in name else None
    weights = None
    if card is not None:
        weights = {"availability": card.availability, "license": card.license, "bytes": card.bytes, "page": card.page}
    return {
        "name": name,
        "architecture": name.partition(".")[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "in_chans": encoder.in_chans,
        "img_size": list(encoder.img_size),
        "patch_size": list(encoder.patch_size),
        "weights": weights,
    }


def _architecture(name: str) -> dict[str, Any]:
    model = _build(name)
    encoder, decoder = model.encoder, getattr(model, "decoder", None)
    facts = {
        "name": name,
        "kind": "encoder" if decoder is None else "masked autoencoder",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "in_chans": encoder.in_chans,
        "img_size": list(encoder.img_size),
        "patch_size": list(encoder.patch_size),
        "grid": list(encoder.grid_size),
        "embed_dim": encoder.embed_dim,
        "num_features": encoder.num_features,
    }
    facts |= _options(encoder, facts)
    if decoder is not None:
        facts["decoder"] = {
            "parameters": sum(p.numel() for p in decoder.parameters()),
            "embed_dim": decoder.embed.out_features,
        }
        facts["decoder"] |= _options(decoder, facts["decoder"])
        if hasattr(decoder, "total_gaussians"):
            facts["decoder"]["total_gaussians"] = decoder.total_gaussians
        facts["mask_ratio"] = model.mask_ratio
        if hasattr(model, "norm_target"):
            facts["norm_target"] = model.norm_target
        if getattr(model, "fourier_frequencies", 0):
            facts["fourier_frequencies"] = model.fourier_frequencies
            facts["fourier_temperature"] = model.fourier_temperature
    return facts


def _options(part: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a part was built with, as far as the facts do not have it yet."""
    return {name: value for name, value in part.options().items() if name not in (*facts, "in_dim", "out_dim")}


def _file(path: str, source_grid: int | tuple[int, ...] | None, token_order: Any) -> dict[str, Any]:
    grid = per_axis(source_grid)
    try:
        facts: dict[str, Any] = {**medgmae.inspect_checkpoint(path, source_grid=grid, token_order=token_order)}
    except medgmae.WeightsError as error:
        raise NotRecognisedError(str(error)) from error
    facts["cards"] = []
    for name in filter(None, (facts["architecture"], facts["encoder_architecture"])):
        facts["cards"] += medgmae.list_weights(f"{name}.*")
    return facts


def _echo_file(facts: dict[str, Any]) -> None:
    """Print what a file holds, names by rule rather than one by one."""
    shown = {key: facts[key] for key in ("path", "source", "container", "tensors", "parameters", "dtypes", "sizes")}
    shown |= {"bytes": megabytes(facts["bytes"]), "head": facts["head"] if facts["head"]["num_classes"] else None}
    shown["fits"] = facts["architecture"] or "no registered architecture"
    shown |= {key: facts[key] for key in ("model_args", "encoder_architecture", "cards") if facts[key]}
    shown |= {"renamed": rename_rules(facts["renamed"]), "unused": by_reason(facts["unused"])}
    more = ("other_sets", "missing", "resized", "adapted", "notes", "problem")
    shown |= {key: facts[key] for key in more if facts[key]}
    echo_fields({key: value for key, value in shown.items() if value not in (None, "", {}, [])})


def rename_rules(renamed: dict[str, str]) -> dict[str, str]:
    """Renamed entries by rule: ``{"decoder_blocks.* -> decoder.blocks.*": "96 tensors"}``."""
    rules: dict[str, int] = {}
    for theirs, ours in renamed.items():
        old, new = theirs.split("."), ours.split(".")
        common = 0
        while common < min(len(old), len(new)) and old[-1 - common] == new[-1 - common]:
            common += 1
        tail = ["*"] if common else []
        rule = f"{'.'.join([*old[: len(old) - common], *tail])} -> {'.'.join([*new[: len(new) - common], *tail])}"
        rules[rule] = rules.get(rule, 0) + 1
    return {rule: f"{count} tensors" for rule, count in rules.items()}
