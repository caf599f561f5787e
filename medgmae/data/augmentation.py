"""Random changes of a crop, as a recipe writes them: each with its probability, all drawn from the generator given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medgmae.data.geometry import VolumeError

Range = tuple[float, float]
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a crop (C, D, H, W), or of a plane (C, H, W): the same for all channels, in this order.

    Attributes:
        resized_crop: least and largest share (low, high) of the plane's area: a rectangle of it, of an aspect from 3:4
            to 4:3, is resized to the crop (bilinear, antialiased), as torchvision's RandomResizedCrop does. For planes
            only; :class:`~medgmae.data.crops.Crops` reads the rectangle in place of the crop.
        affine: (probability, (least, largest) zoom, largest degrees about each axis): trilinear about the centre, in
            voxels; what comes from outside repeats the border.
        flip: probability for each axis (d, h, w), or (h, w) of a plane; one number is for all.
        rotate90: probability of a turn by 90, 180 or 270 degrees of the last two axes.
        scale: (probability, (low, high)) of u: x * (1 + u).
        shift: (probability, (low, high)) of u: x + u.
        gamma: (probability, (low, high)) of u: sign(x) * abs(x) ** exp(u), which is TorchIO's RandomGamma.
        smooth: (probability, (low, high)) of the standard deviations, in voxels and one for each axis, of a Gaussian
            that the crop is convolved with, cut off at four of them.
        contrast: (probability, (low, high)) of the exponent of intensities between the least and the largest of the
            crop, which stay: MONAI's RandAdjustContrast.
        noise: (probability, (low, high)) of the standard deviation of normal noise.

    Raises:
        VolumeError: not probabilities and ranges of this form.
    """

    resized_crop: Range | None = None
    affine: tuple[float, Range, float] | None = None
    flip: float | tuple[float, ...] = 0.0
    rotate90: float = 0.0
    scale: tuple[float, Range] | None = None
    shift: tuple[float, Range] | None = None
    gamma: tuple[float, Range] | None = None
    smooth: tuple[float, Range] | None = None
    contrast: tuple[float, Range] | None = None
    noise: tuple[float, Range] | None = None

    def __post_init__(self) -> None:
        flips = self.flip if isinstance(self.flip, tuple) else (self.flip,)
        if not (len(flips) in (1, 2, 3) and all(map(_probability, flips))):
            raise _wrong("flip", self.flip, "a probability, or one for each axis")
        if not _probability(self.rotate90):
            raise _wrong("rotate90", self.rotate90, "a probability")
        for name in ("scale", "shift", "gamma", "smooth", "contrast", "noise"):
            value = getattr(self, name)
            if value is not None and not (_tuple(value, 2) and _probability(value[0]) and _range(value[1])):
                raise _wrong(name, value, "(probability, (low, high))")
        for name in ("smooth", "contrast", "noise"):
            if getattr(self, name) is not None and getattr(self, name)[1][0] < 0:
                raise _wrong(name, getattr(self, name), "a range of 0 or more")
        if self.affine is not None:
            value = self.affine
            if not (_tuple(value, 3) and _probability(value[0]) and _range(value[1], 0.0) and _number(value[2])):
                raise _wrong("affine", value, "(probability, (least, largest) zoom above 0, degrees)")
        if self.resized_crop is not None and not (_range(self.resized_crop, 0.0) and self.resized_crop[1] <= 1):
            raise _wrong("resized_crop", self.resized_crop, "shares 0 < low <= high <= 1 of the plane")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Augmentation:
        """From the table of a recipe, whose lists stand for tuples.

        Raises:
            VolumeError: unknown keys, or values of another form.
        """
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(table) - set(known))
        if unknown:
            raise VolumeError(f"the augmentation has unknown keys {unknown}; expected some of {known}")
        return cls(**{key: _tuples(value) for key, value in table.items()})

    def check(self, size: Sequence[int]) -> None:
        """Whether this goes with crops of ``size``, (d, h, w) or (h, w) of planes.

        Raises:
            VolumeError: it does not.
        """
        if isinstance(self.flip, tuple) and len(self.flip) not in (1, len(size)):
            raise _wrong("flip", self.flip, f"one probability, or {len(size)} for a crop of {tuple(size)}")
        if self.rotate90 and size[-1] != size[-2]:
            raise VolumeError(
                f"augmentation.rotate90 turns the last two axes, and the crop has {size[-2]} x {size[-1]} voxels "
                "there; expected a square, or rotate90 = 0"
            )
        if self.resized_crop is not None and len(size) != 2:
            raise VolumeError(f"augmentation.resized_crop is for planes (h, w), and the crop is {tuple(size)}")

    def rectangle(self, plane: Sequence[int], rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
        """Start and size (h, w) of the part of a plane that becomes the crop, where there is ``resized_crop``."""
        height, width = plane
        low, high = cast(Range, self.resized_crop)
        for _ in range(_TRIES):
            area = height * width * rng.uniform(low, high)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))), (h, w)
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # a plane longer than 4:3
        return ((height - h) // 2, (width - w) // 2), (h, w)

    def __call__(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """The crop (C, D, H, W) or (C, H, W) changed, of the same size, contiguous. ``x`` itself may be changed too:
        fresh memory for every step would take longer than the steps."""
        self.check(x.shape[1:])
        if self.affine is not None and rng.random() < self.affine[0]:
            x = _affine(x, self.affine[1], self.affine[2], rng)
        chances = self.flip if isinstance(self.flip, tuple) else (self.flip,)
        chances = chances * (x.ndim - 1) if len(chances) == 1 else chances
        if flipped := [axis for axis, chance in enumerate(chances, 1) if rng.random() < chance]:
            x = x.flip(flipped)
        if rng.random() < self.rotate90:
            x = torch.rot90(x, int(rng.integers(1, 4)), (-2, -1)).contiguous()
        if (u := _drawn(self.scale, rng)) is not None:
            x.mul_(1 + u)
        if (u := _drawn(self.shift, rng)) is not None:
            x.add_(u)
        if (u := _drawn(self.gamma, rng)) is not None:
            x = x.abs().pow_(math.exp(u)).copysign_(x)
        if self.smooth is not None and rng.random() < self.smooth[0]:
            x = _smoothed(x, [rng.uniform(*self.smooth[1]) for _ in x.shape[1:]])
        if (u := _drawn(self.contrast, rng)) is not None:
            low, span = x.min(), x.max() - x.min()
            x = ((x - low) / (span + 1e-7)).pow_(u).mul_(span).add_(low)
        if (u := _drawn(self.noise, rng)) is not None:
            x.add_(torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32)), alpha=u)
        return x


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A plane (C, H, W) at another size, bilinear and antialiased."""
    return functional.interpolate(x[None], tuple(size), mode="bilinear", antialias=True, align_corners=False)[0]


def _smoothed(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Convolved with a Gaussian, each of whose weights is its integral over a voxel; zeros beyond the border."""
    for axis, sigma in enumerate(sigmas, 1):
        tail = max(1, round(4 * sigma)) if sigma > 0 else 0
        edges = (torch.arange(-tail, tail + 2) - 0.5) / (max(sigma, 1e-6) * math.sqrt(2))
        weights = torch.erf(edges).diff() / 2
        lines = x.movedim(axis, -1)
        smoothed = functional.conv1d(lines.reshape(-1, 1, lines.shape[-1]), weights.reshape(1, 1, -1), padding=tail)
        x = smoothed.reshape(lines.shape).movedim(-1, axis)
    return x.contiguous()


def _affine(x: Tensor, zooms: Range, degrees: float, rng: np.random.Generator) -> Tensor:
    """Turned about the centre and magnified."""
    axes = x.ndim - 1
    zoom = rng.uniform(*zooms)
    turns = [math.radians(rng.uniform(-degrees, degrees)) for _ in range(3 if axes == 3 else 1)]
    matrix = np.eye(axes)
    planes = [(1, 2), (0, 2), (0, 1)] if axes == 3 else [(0, 1)]
    for turn, (one, other) in zip(turns, planes, strict=True):
        rotation = np.eye(axes)
        rotation[[one, other], [one, other]] = math.cos(turn)
        rotation[one, other], rotation[other, one] = -math.sin(turn), math.sin(turn)
        matrix = matrix @ rotation
    # grid_sample counts from -1 to 1 along each axis, and names the last axis first
    half = np.array(x.shape[1:]) / 2
    theta = (matrix / zoom * half[None, :] / half[:, None])[::-1, ::-1].copy()
    whole = torch.zeros(1, axes, axes + 1, dtype=x.dtype)
    whole[0, :, :axes] = torch.from_numpy(theta)
    grid = functional.affine_grid(whole, [1, *x.shape], align_corners=False)
    return functional.grid_sample(x[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _drawn(rule: tuple[float, Range] | None, rng: np.random.Generator) -> float | None:
    """A number of the range, with the probability; else None."""
    return rng.uniform(*rule[1]) if rule is not None and rng.random() < rule[0] else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tuple(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count


def _probability(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _range(value: Any, above: float = -math.inf) -> bool:
    return _tuple(value, 2) and all(map(_number, value)) and above < value[0] <= value[1]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _wrong(key: str, value: Any, expected: str) -> VolumeError:
    return VolumeError(f"augmentation.{key} is {value!r}; expected {expected}")
