"""One case: its JSON, its tensors, and the bookkeeping of what has been compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Tolerance = tuple[float, float]
EXACT: Tolerance = (0.0, 0.0)


class Case:
    """A fixture: ``SYSTEM/NAME.json`` and the tensors beside it, grouped by what stands before the first slash.

    spec: the JSON.
    tmp: folder for the files that the comparison writes.
    inputs, weights, outputs: name without the group to tensor.
    """

    def __init__(self, path: Path, tmp: Path) -> None:
        self.path, self.tmp = path, tmp
        self.spec: dict[str, Any] = json.loads(path.read_text())
        file = path.with_suffix(".safetensors")
        self.tensors: dict[str, Tensor] = load_file(file) if file.exists() else {}
        listed = self.spec.get("tensors") or ()
        names = () if isinstance(listed, int) else listed  # of a manifest: their number
        lost = sorted(name for name in names if not any(re.fullmatch(_pattern(name), one) for one in self.tensors))
        assert not lost, f"{file}: lacks tensors that the JSON lists: {', '.join(lost[:6])}"
        self.inputs, self.weights, self.outputs = self.group("inputs"), self.group("weights"), self.group("outputs")
        self._left, self._compared = set(self.outputs), 0

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, named without it."""
        start = f"{prefix}/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}

    def input(self, *names: str) -> Tensor:
        """The one input that goes by any of these names."""
        found = [self.inputs[name] for name in names if name in self.inputs]
        assert len(found) == 1, f"expected one input named {' or '.join(names)}, the case has {sorted(self.inputs)}"
        return found[0]

    def tolerance(self, *keys: str, expected: Tensor | None = None) -> Tolerance:
        """(atol, rtol) that the JSON states for an output, looked up under these keys where it lists several.

        A bare number is absolute. An output that is not in the list gets the loosest entry. What is stated as a part of
        the largest value (``1e-3*max``) is taken of ``expected``.
        """
        stated = self.spec.get("tolerance", self.spec.get("suggested_tolerance"))
        assert stated is not None, "the case states no tolerance"
        peak = None if expected is None else float(expected.abs().max()) if expected.numel() else 0.0
        return _tolerance(stated, keys, peak)

    def has(self, name: str) -> bool:
        return name in self.outputs

    def offer(self, name: str, actual: Tensor, *keys: str, tolerance: Tolerance | None = None) -> None:
        """Compare a value with the output of that name, if the case has one.

        Within ``tolerance``; by default integers exactly, floats as the JSON states it for ``name`` or for the first of
        ``keys`` that it knows.
        """
        if not self.has(name):
            return
        self._left.discard(name)
        expected = self.outputs[name]
        if tolerance is None:
            tolerance = self.tolerance(name, *keys, expected=expected) if expected.is_floating_point() else EXACT
        self.equal(name, actual, expected, tolerance)

    def equal(self, what: str, actual: Tensor, expected: Tensor, tolerance: Tolerance = EXACT) -> None:
        """Compare two tensors: shapes, then values."""
        self._compared += 1
        if actual.numel() == expected.numel() == 1:
            actual = actual.reshape(expected.shape)
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        atol, rtol = tolerance
        torch.testing.assert_close(
            actual.detach().double(), expected.double(), atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}"
        )

    def same(self, what: str, actual: Any, expected: Any) -> None:
        """Compare two plain values."""
        self._compared += 1
        assert actual == expected, f"{what}: {actual!r}, expected {expected!r}"

    def close(self, what: str, actual: float, expected: float, tolerance: Tolerance) -> None:
        """Compare two numbers."""
        self.equal(what, torch.tensor(actual).double(), torch.tensor(expected).double(), tolerance)

    def finish(self) -> None:
        """Fail if an output was not looked at, or if nothing was compared at all."""
        assert not self._left, f"outputs that no adapter compared: {', '.join(sorted(self._left))}"
        assert self._compared, "nothing was compared"


def _pattern(name: str) -> str:
    """A listed name as a regular expression: "weights/*", "outputs/hidden_i", "outputs/rope_hd<H>_<grid>", "..."."""
    parts = re.split(r"(\*|\.\.\.|<\w+>|(?<=_)i$)", name)
    return "".join(".+" if index % 2 else re.escape(part) for index, part in enumerate(parts))


_NUMBER = r"[0-9.]+(?:[eE][+-]?\d+)?"
_PART_OF_MAX = re.compile(rf"({_NUMBER})\s*\*\s*max")


def _tolerance(stated: Any, keys: tuple[str, ...], peak: float | None = None) -> Tolerance:
    if isinstance(stated, int | float):
        return float(stated), 0.0
    if isinstance(stated, str):
        labelled = re.findall(r"(.*?)\(([a-z_]+)\)", stated)  # "atol 1e-5 (values), 1e-3*max (gradients)"
        if labelled:
            return _tolerance({label: text for text, label in labelled}, keys, peak)
        relative = _PART_OF_MAX.search(stated)
        found = dict(re.findall(rf"\b(atol|rtol)\s*=?\s*({_NUMBER})", _PART_OF_MAX.sub("", stated)))
        assert found or relative or "exact" in stated, f"no tolerance understood in {stated!r}"
        assert relative is None or peak is not None, f"{stated!r} is about the largest value, which is not known here"
        part = float(relative[1]) * peak if relative and peak is not None else 0.0
        return float(found.get("atol", 0)) + part, float(found.get("rtol", 0))
    if {"atol", "rtol"} & set(stated):
        return float(stated.get("atol", 0)), float(stated.get("rtol", 0))
    for key in keys:
        if key in stated:
            return _tolerance(stated[key], (), peak)
    return max(_tolerance(value, (), peak) for value in stated.values())


class Options:
    """The settings of a case, taken one by one, so that one which nobody understands is noticed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._left = dict(settings)

    def __call__(self, name: str, *default: Any) -> Any:
        assert default or name in self._left, f"the case does not say {name!r}"
        return self._left.pop(name, *default)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def require(self, **values: Any) -> None:
        """These settings have these values if they are there at all: nothing else is supported."""
        for name, value in values.items():
            found = self._left.pop(name, value)
            assert found == value, f"{name}={found!r} is not supported, only {value!r}"

    def ignore(self, *names: str) -> None:
        """These say nothing that matters here."""
        for name in names:
            self._left.pop(name, None)

    def norm_eps(self) -> float:
        """Epsilon of the layer norms: a number under ``norm_eps``, or in a text such as "LayerNorm eps 1e-05"."""
        text = str(self("norm", ""))
        eps = self("norm_eps", None)
        if eps is not None:
            return float(eps)
        found = re.search(r"eps\s*=?\s*([0-9.]+(?:[eE][+-]?\d+)?)", text)
        assert found or not text, f"no epsilon understood in {text!r}"
        return float(found[1]) if found else 1e-6  # what every published factory uses

    def done(self) -> None:
        assert not self._left, f"settings that are not supported: {self._left}"


def triple(size: Any, dims: int = 3) -> tuple[int, ...]:
    """An int for every axis, or one per axis."""
    return (int(size),) * dims if isinstance(size, int) else tuple(int(v) for v in size)


def whole_patches(size: Any, patch_size: Any) -> tuple[int, ...]:
    """The voxels per axis that patches cover; the references leave a rim at the far side unread."""
    patch = triple(patch_size, len(size) if not isinstance(size, int) else 3)
    return tuple(s // p * p for s, p in zip(triple(size, len(patch)), patch, strict=True))


def crop(x: Tensor, patch_size: Any) -> Tensor:
    """Cut the unread rim off an input (B, C, *size)."""
    size = whole_patches(tuple(x.shape[2:]), patch_size)
    return x[(..., *(slice(0, s) for s in size))]


def grids(text: str) -> list[tuple[int, ...]]:
    """The grids in a text such as "(4, 4, 4) to (2, 4, 4)"."""
    return [tuple(int(v) for v in found.split(",")) for found in re.findall(r"\(([\d, ]+)\)", text)]
