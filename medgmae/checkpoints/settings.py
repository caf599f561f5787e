"""Settings that no tensor shows: what weights expect of the model that they are put into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from medgmae.checkpoints.configs import described_model
from medgmae.models.encoder import Setting


def encoder_of(model: nn.Module) -> Any:
    """The encoder in a model; an encoder itself."""
    return getattr(model, "encoder", model)


def model_settings(model: nn.Module) -> dict[str, Setting]:
    """What a model says of itself, by the part's name: "encoder.norm_eps", "decoder.sigmoid"."""
    described: Any = model
    settings: Mapping[str, Setting] = described.settings()
    prefix = "encoder." if encoder_of(model) is model else ""
    return {f"{prefix}{name}": setting for name, setting in settings.items()}


def saved_settings(config: Mapping[str, Any] | None, state: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """The settings of the model that a config of ours describes; none for other configs.

    Raises:
        WeightsError: the config describes no model of this version, or not one that the tensors can be of.
    """
    if not config or not config.get("grid"):
        return {}
    model = described_model(config, state, origin)
    return {name: setting.value for name, setting in model_settings(model).items()}


class Comparison(NamedTuple):
    """How the settings that weights expect compare with a model's.

    accepted: setting to how it differs, where that is allowed; likewise ``refused``.
    """

    accepted: dict[str, str]
    refused: dict[str, str]


def compare_settings(
    settings: Mapping[str, Setting], expects: Mapping[str, Any], *, strict: bool, alone: bool
) -> Comparison:
    """Compare; what the model does not have, or the weights do not say, is not compared.

    Args:
        settings: of :func:`model_settings`.
        expects: what the weights need, by the same names.
        strict: whether the settings that may be lenient must agree too.
        alone: whether the encoder of a masked autoencoder goes on alone.
    """
    comparison = Comparison({}, {})
    for name, wanted in expects.items():
        setting = settings.get(name)
        if setting is None or setting.value == wanted:
            continue
        text = f"{wanted!r} in the file's model, {setting.value!r} in this one"
        if (setting.when == "lenient" and not strict) or (setting.when == "pretraining" and alone):
            comparison.accepted[name] = text
        elif setting.when == "lenient":
            comparison.refused[name] = f"{text}; strict=False loads what both have"
        else:
            comparison.refused[name] = f"{text}{_remedy(setting, wanted)}"
    return comparison


def _remedy(setting: Setting, wanted: object) -> str:
    return f"; build it with create_model(..., {setting.option}={wanted!r})" if setting.option else ""
