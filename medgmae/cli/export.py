"""``medgmae export``: a model as one file for programs without this library."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click

import medgmae
from medgmae.cli.common import echo_result, megabytes, reports_errors, shown
from medgmae.cli.options import (
    Machine,
    ModelChoice,
    file_option,
    json_option,
    model_argument,
    open_model,
    overwrite_option,
    sizes,
    threads_option,
    use_threads,
)


@click.command("export")
@model_argument
@click.option("--format", type=click.Choice(["onnx", "torch"]), help="[by the ending of FILE: .onnx, .pt2]")
@file_option("--out", (".onnx", ".pt2"), "FILE: the model.", required=True)
@overwrite_option
@click.option("--opset", type=int, default=18, help="Of ONNX.")
@click.option("--size", callback=sizes(), metavar="N|D,H,W", help="Voxels of the input. [the model's]")
@click.option("--dynamic-batch", is_flag=True, help="Take batches of any size, instead of one input.")
@threads_option
@json_option
@reports_errors
def export_command(
    choice: ModelChoice,
    format: Literal["onnx", "torch"] | None,
    out: Path,
    overwrite: bool,
    opset: int,
    size: int | tuple[int, ...] | None,
    dynamic_batch: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write MODEL as one file: ONNX, or a program of torch.export.

    MODEL is the folder of a fine-tuned run or of a saved model, architecture.tag or hf-hub:org/repo: an encoder with or
    without a head, or a UNETR.

    The file takes inputs (B, C, D, H, W) that have been prepared as its facts say, which are JSON under the key
    "medgmae" of ONNX's metadata, or the extra file medgmae.json of a .pt2 file. It is written once it has given the
    model's own outputs, within a thousandth of their size; the largest difference is printed.
    """
    start = time.perf_counter()
    use_threads(threads)
    model, weights = open_model(choice, Machine("cpu", threads))
    _refuse_autoencoder(model, choice.name)
    try:
        done = medgmae.export_model(model, out, format=format, size=size, dynamic_batch=dynamic_batch, opset=opset)
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    facts: dict[str, Any] = {
        "out": shown(out),
        "bytes": sum(file.stat().st_size for file in (out, Path(f"{out}.data")) if file.exists()),
        "weights": weights,
        "difference": done.difference,
        "output_size": done.size,
        "opset": opset if out.suffix.lower() == ".onnx" else None,
        "seconds": round(time.perf_counter() - start, 3),
        "metadata": done.facts,
    }
    words = {
        "bytes": megabytes(facts["bytes"]),
        "difference": f"{done.difference:.2g} of outputs {done.size:.3g} in size",
        "output_size": None,
        "metadata": f"{done.facts['output']} of {' x '.join(map(str, done.facts['shape']))}, "
        + (f"labels {', '.join(map(shown, done.facts['labels']))}" if done.facts["labels"] else "no labels"),
    }
    echo_result(facts, as_json, **words)


def _refuse_autoencoder(model: Any, name: str) -> None:
    if hasattr(model, "mask_ratio"):
        kind, _, encoder = model.config["architecture"].partition("_")
        encoder = encoder if kind in ("mae", "gmae", "mae2d") else "ENCODER"  # of one that was built by its class
        raise click.UsageError(
            f"{shown(name)} is a masked autoencoder, whose mask is drawn at random; export its encoder: medgmae export "
            f"{encoder} --weights {shown(name)}"
        )
