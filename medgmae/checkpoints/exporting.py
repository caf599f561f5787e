"""A model as one file for other programs: ONNX, or a program of torch.export; with what it needs to know beside it."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from medgmae._version import __version__
from medgmae.checkpoints.download import writing
from medgmae.checkpoints.paths import as_path
from medgmae.checkpoints.saving import model_config
from medgmae.models.parts import unwrap

Format = Literal["onnx", "torch"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
KEY = "medgmae"
"""Of the facts in an ONNX file's ``metadata_props``; in a .pt2 file they are the extra file ``medgmae.json``."""
EXTRA_FILE = f"{KEY}.json"

OPSET = 18
# What a file may differ from the model by, over the size of the outputs.
TOLERANCE = 1e-3


class Exported(NamedTuple):
    """A file that gives what the model gives.

    path: of the file; weights of more than 2 GB lie beside an ONNX file, in FILE.data.
    difference: the largest difference between its outputs and the model's, on random inputs.
    size: of the model's outputs there: the larger of their range and their largest magnitude.
    facts: what the file says of itself.
    """

    path: Path
    difference: float
    size: float
    facts: dict[str, Any]


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    size: int | Sequence[int] | None = None,
    dynamic_batch: bool = False,
    opset: int = OPSET,
) -> Exported:
    """Write an encoder, with or without a head, or a UNETR as a file that runs without this library.

    The model is written in evaluation mode, for inputs of one size. The file takes its name once ONNX Runtime, or torch
    for a .pt2 file, has given the model's own outputs for a random input with it.

    Args:
        model: an encoder or a UNETR of this library, in float32.
        path: of the file, .onnx or .pt2; one that is there is replaced.
        format: "onnx", or "torch" for a program that ``torch.export.load`` reads; None: by the ending.
        size: voxels (d, h, w) of the input, an int for a cube; None for the size that the model was built for.
        dynamic_batch: take batches of any size, instead of one input.
        opset: of ONNX.

    Returns:
        The file, how far it is from the model, and what it says of itself: ``architecture``, ``model_args``,
        ``labels``, ``output`` ("logits" or "features"), ``shape`` of an input (C, D, H, W), ``input`` (the
        preprocessing, see docs/models.md), ``tag``, ``license``, ``training_data``, ``notes`` and ``medgmae``, the
        version of this library.

    Raises:
        ImportError: packages that ONNX needs are not installed; the message says how to get them.
        TypeError: not a model of this library.
        ValueError: a masked autoencoder; a size, ending, precision or opset that is not possible; a file that does not
            give what the model gives.
        WeightsError: the file cannot be written, or nothing says how to build the model again.
    """
    path = as_path(path)
    format = _format(path, format)
    if format == "onnx":
        _check_packages(opset)
    plain = _sized(_checked(unwrap(model)), size)
    shape = (plain.in_chans, *plain.img_size)
    facts = _facts(plain, shape, dynamic_batch)
    training = [module for module in plain.modules() if module.training]
    plain.eval()
    try:
        with writing(path.parent, "choose another file"), tempfile.TemporaryDirectory(
            dir=path.parent, prefix=".exporting-"
        ) as name:  # fmt: skip
            place = Path(name, path.name)
            program = _traced(plain, shape, dynamic_batch)
            if format == "onnx":
                _write_onnx(program, place, facts, opset)
            else:
                torch.export.save(program, place, extra_files={EXTRA_FILE: json.dumps(facts)})
            difference, scale = _compare(plain, place, format, shape, dynamic_batch)
            if not difference <= TOLERANCE * scale:
                raise ValueError(
                    f"{path} was not written: the file's outputs differ from the model's by up to {difference:.3g}, "
                    f"where the outputs are {scale:.3g} in size; expected at most {TOLERANCE:g} of that. Try another "
                    "format or opset"
                )
            for file in sorted(place.parent.iterdir(), key=lambda file: file.name == path.name):  # weights beside first
                os.replace(file, path.with_name(file.name))
    finally:
        for module in training:
            module.training = True
    return Exported(path, difference, scale, facts)


def _format(path: Path, format: Format | None) -> Format:
    """The format that a name and an option agree on."""
    if format not in (None, *SUFFIXES):
        raise ValueError(f"format must be 'onnx' or 'torch', got {format!r}")
    for one, ending in SUFFIXES.items():
        if path.suffix.lower() == ending and format in (None, one):
            return one
    wanted = SUFFIXES[format] if format else ".onnx, or in .pt2 for a program of torch.export"
    raise ValueError(f"{path} must end in {wanted}")


def _check_packages(opset: int) -> None:
    if opset < OPSET:
        raise ValueError(f"opset must be {OPSET} or more, got {opset}: torch writes no older ones")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"exporting to ONNX needs {', '.join(missing)}, not installed here: pip install 'medgmae[onnx]'"
        )


def _checked(model: Any) -> Any:
    """The model, which can be exported."""
    kind = type(model).__name__
    if not hasattr(model, "img_size"):
        raise TypeError(f"export_model needs a model of this library, got {kind}")
    if hasattr(model, "decoder") and not hasattr(model, "num_classes"):
        raise ValueError(
            f"{kind} is a masked autoencoder, whose mask is drawn at random; export its encoder: build the encoder "
            "with the autoencoder's file or folder as its weights"
        )
    precisions = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if precisions:
        raise ValueError(f"the model has weights in {', '.join(map(str, precisions))}; expected float32: model.float()")
    return model


def _sized(model: Any, size: int | Sequence[int] | None) -> Any:
    """The model, or a copy of it for inputs of another size."""
    if size is None:
        return model
    wanted = (size,) * len(model.img_size) if isinstance(size, int) else tuple(size)
    if wanted == tuple(model.img_size):
        return model
    model = copy.deepcopy(model)
    model.set_input_size(wanted)
    return model


def _facts(model: Any, shape: tuple[int, ...], dynamic_batch: bool) -> dict[str, Any]:
    """What a program that runs the file has to know."""
    config = model_config(model)
    card = config["weight_card"] or {}
    return {
        "architecture": config["architecture"],
        "model_args": config["model_args"],
        "labels": list(config["id2label"].values()) if config["id2label"] else None,
        "output": "logits" if config["num_classes"] else "features",
        "shape": list(shape),
        "dynamic_batch": dynamic_batch,
        "input": card.get("input"),
        **{name: card.get(name) for name in ("tag", "license", "training_data", "notes")},
        "medgmae": __version__,
    }


def _traced(model: Any, shape: tuple[int, ...], dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The model as a program, without the paths of files that torch notes of every step."""
    device = next(model.parameters()).device
    x = torch.zeros(2 if dynamic_batch else 1, *shape, device=device)
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own tracing
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, Any], opset: int) -> None:
    from medgmae.ops.onnx import translations

    try:
        with translations() as table, torch.no_grad(), _quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["scan"],
                output_names=[facts["output"]],
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:  # what the exporter raises has many classes, and its text ends in the reason
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path.name}: torch {torch.__version__} cannot write this model in ONNX's opset {opset}: "
            f"{reason[-1] if reason else type(error).__name__}; opset {OPSET} or a .pt2 file may do"
        ) from error
    assert written is not None
    found = written.model.opset_imports.get("")
    if found != opset:
        raise ValueError(f"opset {opset} is not possible for this model, which came out as {found}; use that")
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    written.model.metadata_props[KEY] = json.dumps(facts)
    written.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on single steps."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _compare(
    model: Any, path: Path, format: Format, shape: tuple[int, ...], dynamic_batch: bool
) -> tuple[float, float]:
    """The largest difference between a file's outputs and the model's, and the size of the outputs."""
    device = next(model.parameters()).device
    x = torch.rand(3 if dynamic_batch else 1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x.to(device)).cpu()
        found = _run_onnx(path, x) if format == "onnx" else torch.export.load(path).module()(x.to(device)).cpu()
    if found.shape != expected.shape:
        return math.inf, 0.0
    scale = max(float(expected.max() - expected.min()), float(expected.abs().max()))
    return float((found - expected).abs().max()), scale


def _run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    except Exception as error:  # its classes have no common base but this
        raise ValueError(f"{path.name} was not written: ONNX Runtime cannot run it: {error}") from error
    return torch.from_numpy(found)
