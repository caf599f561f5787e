"""The ``input`` block of a weight card: its keys, their defaults and forms, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from medgmae.data.geometry import Centering, Origin, Rounding, VolumeError
from medgmae.data.intensities import Counted
from medgmae.data.sampling import Interpolation

ORDER = ("resample", "window", "foreground", "center", "normalize")
_RESAMPLE: dict[str, Any] = {
    "to": "spacing", "interpolation": "linear", "origin": "centered", "rounding": "round", "outside": None,
    "keep_dtype": False, "least": 0.0, "equal": "resample", "patches": None,
}  # fmt: skip
_FOREGROUND: dict[str, Any] = {"above": 0.0, "within": 1}
DEFAULTS: dict[str, Any] = {
    "modality": "any", "channels": 1, "contrasts": None, "orientation": None, "axes": "zyx", "spacing": None,
    "size": None, "multiple": None, "resample": None, "window": None, "range": (0.0, 1.0), "crop": (),
    "foreground": _FOREGROUND, "centering": "middle", "normalize": "none", "pad": 0.0, "order": ORDER,
}  # fmt: skip
_CHOICES = {"axes": ("zyx", "xyz"), "centering": get_args(Centering)}
_RESAMPLE_CHOICES = {
    "to": ("spacing", "size", "isotropic"), "interpolation": get_args(Interpolation), "origin": get_args(Origin),
    "rounding": get_args(Rounding), "keep_dtype": (False, True, "truncate"), "equal": ("resample", "keep"),
}  # fmt: skip
_NORMALIZE = ("none", "zscore", "zscore_nonzero", "zscore_all")


def merged_block(given: Mapping[str, Any]) -> dict[str, Any]:
    """A block with every key, those that were left out or null with their default.

    Raises:
        VolumeError: an unknown key, a value of another form, or a key that lacks what it needs of another.
    """
    block = _merged("input", given, DEFAULTS, _CHOICES)
    for key, (valid, expected) in _FORMS.items():
        if not valid(block[key]):
            raise VolumeError(f"input.{key} is {block[key]!r}; expected {expected}")
    if block["resample"] is not None:
        block["resample"] = _merged("input.resample", block["resample"], _RESAMPLE, _RESAMPLE_CHOICES)
    block["foreground"] = _merged("input.foreground", block["foreground"], _FOREGROUND, {})
    for name, forms in (("resample", _RESAMPLE_FORMS), ("foreground", _FOREGROUND_FORMS)):
        for key, (valid, expected) in forms.items():
            if block[name] is not None and not valid(block[name][key]):
                raise VolumeError(f"input.{name}.{key} is {block[name][key]!r}; expected {expected}")
    _check_needs(block)
    return block


def steps(block: Mapping[str, Any], whole: bool) -> list[str]:
    """The steps that a block asks for, in their order; of the ``whole`` field of view none that cuts its centre."""
    asked = {
        "resample": block["resample"] is not None,
        "window": block["window"] is not None,
        "foreground": "foreground" in block["crop"],
        "center": bool({"center", "multiple"} & set(block["crop"])) and not whole,
        "normalize": block["normalize"] != "none",
    }
    return [step for step in block["order"] if asked[step]]


def ends_normalized(block: Mapping[str, Any]) -> bool:
    """Whether nothing but padding follows the normalisation, so that it can be done apart from the other steps."""
    return "normalize" not in steps(merged_block(block), whole=False)[:-1]


def uncut(block: Mapping[str, Any]) -> list[str]:
    """What a block crops beside the centre."""
    return [one for one in block.get("crop") or () if one not in ("center", "multiple")]


def padding(block: Mapping[str, Any]) -> float:
    """The intensity beyond a scan, whatever scan it is: of "minimum" the lowest that the window gives."""
    pad = block.get("pad") or 0.0
    if pad != "minimum":
        return float(pad)
    rule = block.get("range") or DEFAULTS["range"]
    return float(block["window"][0] if rule == "same" else rule[0])


def _merged(
    name: str, given: Mapping[str, Any], defaults: dict[str, Any], choices: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise VolumeError(f"{name} has unknown keys {unknown}; expected some of {sorted(defaults)}")
    left_out = {key for key in defaults if given.get(key) is None and not (key == "above" and key in given)}
    merged = {key: default if key in left_out else given[key] for key, default in defaults.items()}
    for key, allowed in choices.items():
        if merged[key] not in allowed:
            raise VolumeError(f"{name}.{key} is {merged[key]!r}; expected one of {list(allowed)}")
    return merged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(value: Any, count: int, least: float = -math.inf) -> bool:
    sequence = isinstance(value, (list, tuple)) and len(value) == count
    return sequence and all(_number(v) and v > least for v in value)


def _window(value: Any) -> bool:
    pair: Any = value
    if isinstance(value, Mapping):
        valid = set(value) <= {"percentiles", "per", "of"} and value.get("per", "scan") in ("scan", "channel")
        pair = value.get("percentiles") if valid and value.get("of", "all") in get_args(Counted) else None
    return value is None or (_numbers(pair, 2) and pair[0] < pair[1])


def _normalize(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value in _NORMALIZE
    if set(value) == {"of"}:
        return value["of"] in get_args(Counted)
    return set(value) == {"mean", "std"} and all(map(_number, value.values())) and value["std"] > 0


def _contrasts(value: Any) -> bool:
    names = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    return value is None or (names and len(set(value)) == len(value) > 0)


def _sizes(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_whole, value)))


def _crop(value: Any) -> bool:
    known = isinstance(value, (list, tuple)) and all(c in ("foreground", "center", "multiple") for c in value)
    return known and not {"center", "multiple"} <= set(value)


def _order(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) and sorted(value) == sorted(ORDER)
    )


# What the value of a key must be, and how an error says so.
_Forms = dict[str, tuple[Callable[[Any], bool], str]]
_FORMS: _Forms = {
    "channels": (_whole, "a number of channels"),
    "contrasts": (_contrasts, "null or a list of different names, one per channel"),
    "orientation": (lambda v: v is None or isinstance(v, str), "null or three letters such as 'RAS'"),
    "spacing": (lambda v: v is None or _numbers(v, 3, 0), "null or three positive numbers (d, h, w) in mm"),
    "size": (_sizes, "null or three positive whole numbers (d, h, w)"),
    "multiple": (_sizes, "null or three positive whole numbers (d, h, w)"),
    "resample": (lambda v: v is None or isinstance(v, Mapping), "null or an object with 'to' and so on"),
    "window": (
        _window,
        "null, [low, high] or {'percentiles': [low, high], 'per': 'scan' or 'channel', 'of': one of "
        f"{list(get_args(Counted))}}}",
    ),
    "range": (lambda v: v == "same" or _numbers(v, 2), "two numbers [a, b] or 'same'"),
    "crop": (_crop, "a list of 'foreground' and one of 'center' and 'multiple'"),
    "foreground": (lambda v: isinstance(v, Mapping), "an object with 'above' and 'within'"),
    "normalize": (
        _normalize,
        f"one of {list(_NORMALIZE)}, {{'mean': m, 'std': s}} or {{'of': one of {list(get_args(Counted))}}}",
    ),
    "pad": (lambda v: v == "minimum" or _number(v), "a number or 'minimum'"),
    "order": (_order, f"all of {list(ORDER)}, in an order of their own"),
}
_RESAMPLE_FORMS: _Forms = {
    "outside": (lambda v: v is None or _number(v), "null or a number"),
    "least": (lambda v: _number(v) and v >= 0, "millimetres, 0 or more"),
    "patches": (lambda v: v is None or _whole(v), "null or a number of patches"),
}
_FOREGROUND_FORMS: _Forms = {
    "above": (lambda v: v is None or _number(v), "a number, or null for all that is not 0"),
    "within": (lambda v: _whole(v) and v % 2 == 1 and v < 40, "an odd number of voxels, 1 to 39"),
}


def _check_needs(block: Mapping[str, Any]) -> None:
    """What one key needs of another."""
    contrasts, resample = block["contrasts"], block["resample"]
    if contrasts is not None and len(contrasts) != block["channels"]:
        raise VolumeError(f"input.contrasts names {list(contrasts)}, and input.channels is {block['channels']}")
    needed = [resample["to"]] if resample and resample["to"] != "isotropic" else []
    needed += ["multiple"] if resample and resample["patches"] else []
    needed += ["size"] if "center" in block["crop"] else []
    needed += ["multiple"] if "multiple" in block["crop"] else []
    missing = [key for key in needed if block[key] is None]
    if missing:
        raise VolumeError(f"input.{missing[0]} is null, and resample or crop need it")
    if block["pad"] == "minimum" and (block["window"] is None or block["normalize"] != "none"):
        raise VolumeError("input.pad is 'minimum'; expected a number, or a window and normalize 'none'")
    if block["pad"] == "minimum" and block["range"] == "same" and isinstance(block["window"], Mapping):
        raise VolumeError("input.pad is 'minimum' and input.range 'same'; expected a window [low, high] or a range")
