"""Settings that no tensor shows: what weights expect of the model that they are put into."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medgmae.checkpoints.cards import WeightsError
from medgmae.models.registry import model_builder

# Settings that change what the weights compute, as dotted attributes in our language.
SETTINGS = (
    "encoder.blocks.0.attn.num_heads",
    "encoder.blocks.0.norm1.eps",
    "encoder.blocks.0.norm.eps",
    "encoder.blocks.0.mixer.divide_output",
    "encoder.class_token",
    "encoder.rope",
    "encoder.rope_residual",
    "encoder.scan_order",
    "decoder.blocks.0.attn.num_heads",
    "decoder.blocks.0.norm1.eps",
    "decoder.blocks.0.norm.eps",
    "decoder.blocks.0.mixer.divide_output",
    "decoder.rope",
    "decoder.rope_residual",
    "decoder.off_by_one",
    "decoder.sigmoid",
    "decoder.kind",
    "decoder.density_scale",
    "renderer.support",
)

# Settings that may differ when ``strict`` is False: a decoder of Gaussians of another kind shares its base part, and
# another support changes where a Gaussian ends.
LENIENT = ("decoder.kind", "renderer.support")

# Settings of masked pre-training that an encoder which goes on alone may have otherwise: the authors of the 3D Mamba
# MAE fine-tune with another rotation, and without hidden patches there is one order to scan in.
OF_PRETRAINING = ("encoder.rope", "encoder.rope_residual", "encoder.scan_order")

# The option of ``create_model`` that decides a setting.
OPTIONS = {
    "encoder.class_token": "class_token",
    "encoder.rope": "rope",
    "encoder.rope_residual": "rope_residual",
    "encoder.scan_order": "scan_order",
    "encoder.blocks.0.mixer.divide_output": "divide_output",
    "decoder.rope": "rope",
    "decoder.rope_residual": "rope_residual",
    "decoder.off_by_one": "off_by_one",
    "decoder.sigmoid": "sigmoid",
}

ABSENT = object()
"""What :func:`setting` gives where the model has no such part."""


def setting(model: nn.Module, path: str) -> Any:
    """Value of a dotted attribute in our language; ``ABSENT`` where the model has no such part."""
    value: Any = model
    for part in (path if hasattr(model, "decoder") else path.removeprefix("encoder.")).split("."):
        value = getattr(value, part, ABSENT)
    return value


def saved_settings(config: dict[str, Any] | None, origin: str) -> dict[str, Any]:
    """The settings of the model that a config of ours describes; none for other configs.

    Raises:
        WeightsError: the config describes no model of this version.
    """
    if not config or not config.get("grid"):
        return {}
    try:
        with torch.device("meta"):
            model = model_builder(config["architecture"])(**config["model_args"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{origin}: its config describes no model of this version of the library ({error})"
        ) from error
    found = {path: setting(model, path) for path in SETTINGS}
    return {path: value for path, value in found.items() if value is not ABSENT}


def remedy(path: str, wanted: Any) -> str:
    """The option of ``create_model`` that gives a setting this value, as the end of a message; "" if there is none."""
    option = OPTIONS.get(path)
    return f"; build it with create_model(..., {option}={wanted!r})" if option else ""
