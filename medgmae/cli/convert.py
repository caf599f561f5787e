"""``medgmae convert``: an official checkpoint becomes a folder that this library opens by itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import click

import medgmae
from medgmae.cli.common import by_reason, echo_fields, echo_json, reports_errors, shown
from medgmae.cli.files import check_name
from medgmae.cli.options import (
    assignments,
    complete_name,
    json_option,
    model_with_weights,
    overwrite_option,
    per_axis,
    sizes,
    source_grid_option,
    token_order_option,
)


@click.command("convert")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--model",
    "name",
    shell_complete=complete_name,
    help="Architecture, or a tag whose card (licence, preprocessing) is written with the weights.",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    callback=assignments,
    metavar="KEY=VALUE",
    help="Option of the model, such as depth=8; may be repeated.",
)
@click.option("--patch-size", callback=sizes(), metavar="N|D,H,W", help="Resize the patches of the file to this size.")
@source_grid_option
@token_order_option
@overwrite_option
@json_option
@reports_errors
def convert_command(
    file: Path,
    out: Path,
    name: str | None,
    options: dict[str, Any],
    patch_size: int | tuple[int, ...] | None,
    source_grid: int | tuple[int, ...] | None,
    token_order: Literal["raster", "swapped"] | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert a weight FILE of a known code base into the folder OUT: config.json, model.safetensors, README.md.

    The architecture is inferred from the sizes in the file. Where no registered one fits, name the nearest with --model
    and say what differs: --model vit_base_patch16_96 --set depth=8. Open the result with
    medgmae.create_model("local-dir:OUT").
    """
    from tqdm.auto import tqdm

    check_name(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise click.UsageError(
            f"{shown(out)} is not empty; choose another folder, or --overwrite to write the model into it"
        )
    if patch_size is not None:
        options = {**options, "patch_size": patch_size}
    with tqdm(total=2, desc="converting", disable=None, leave=False) as bar:
        model = _load(file, name, options, {"source_grid": per_axis(source_grid), "token_order": token_order})
        bar.set_description("writing")
        bar.update()
        _write(model, out, overwrite)
        bar.update()
    report, card = model.load_report, model.pretrained_cfg
    architecture = model.config["architecture"]
    facts = {
        "out": shown(out),
        "architecture": architecture,
        "model_args": model.config["model_args"],
        "card": card.get("tag"),
        "source": report.source,
        "loaded": len(report.loaded),
        "resized": report.resized,
        "adapted": report.adapted,
        "missing": report.missing,
        "unused": report.unused,
    }
    if as_json:
        echo_json(facts)
        return
    echo_fields({key: value for key, value in {**facts, "unused": by_reason(report.unused)}.items() if value})
    tags = medgmae.list_weights(f"{architecture}.*")
    if not card and tags:
        click.echo(f"No card goes with it. If the file is one of {', '.join(tags)}, convert it with --model TAG.")


def _write(model: Any, out: Path, overwrite: bool) -> None:
    """The model as a folder, put in place when it opens as its users will open it and holds the same weights."""
    import torch

    path = out.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".medgmae-") as name:
        folder = medgmae.save_pretrained(model, Path(name, path.name))
        read = medgmae.create_model(f"local-dir:{folder}").state_dict()
        for key, tensor in model.state_dict().items():
            if not torch.equal(read[key], tensor.cpu()):
                raise medgmae.WeightsError(f"{shown(out)}: {key} reads back as something else; is the disk sound?")
        if path.is_dir() and overwrite:
            for file in sorted(
                folder.iterdir(), key=lambda file: file.name == "config.json"
            ):  # what is opened first, last
                os.replace(file, path / file.name)
        else:
            os.rename(folder, path)  # fails if the folder has come to hold something since


def _load(file: Path, name: str | None, options: dict[str, Any], reading: dict[str, Any]) -> Any:
    """The model with the file's weights; ``reading`` says what the file does not."""
    path = file.expanduser().resolve()
    card = None
    if name is None:
        facts: dict[str, Any] = {**medgmae.inspect_checkpoint(path, **reading)}
        name, options = _inferred(facts, options)
        card = (facts["config"] or {}).get("weight_card")
    try:
        model = model_with_weights(name, str(path), **reading, **options)
    except TypeError as error:  # an option that the architecture does not have
        raise click.BadParameter(str(error), param_hint="--set") from error
    if card is not None:
        model.pretrained_cfg = card
    return model


def _inferred(facts: dict[str, Any], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that a file was made with; what the caller set wins."""
    if facts["architecture"] is not None:
        return facts["architecture"], {**facts["model_args"], **options}
    dimensions = facts["sizes"]
    known = ", ".join(f"{key} {value}" for key, value in dimensions.items() if value is not None)
    encoder = facts["encoder_architecture"]
    hint = f" Its encoder alone is a {encoder}: --model {encoder} converts that." if encoder else ""
    raise click.UsageError(
        f"{facts['path']} ({facts['source']}): no registered architecture has its sizes ({known}).{hint} Name the "
        f"nearest one with --model and what differs with --set, for example --model vit_base_patch16_96 "
        f"--set embed_dim={dimensions['embed_dim']} --set depth={dimensions['depth']} --set num_heads=..."
    )
