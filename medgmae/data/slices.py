"""Slices of a scan as 2D images, and predictions on them back in the volume.

A slice is a :class:`~medgmae.Volume` of one plane, (C, 1, H, W), whose grid says where it lies: nothing else has to be
kept to find its place again. A manifest is a CSV file with a row per slice that was written, its geometry included.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data.formats.itk import simpleitk
from medgmae.data.geometry import Grid, VolumeError, axis_maps
from medgmae.data.resizing import resize_uint8
from medgmae.data.transforms import crop_or_pad, reorient
from medgmae.data.volume import ScanLike, Volume, as_volume

Plane = Literal["axial", "coronal", "sagittal", "stored"]
PLANES: tuple[Plane, ...] = get_args(Plane)
# The places in an orientation such as "RAS" of the sides towards which columns, rows and slices grow.
_AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
_SIDES = ("RL", "AP", "IS")
COLUMNS = ("file", "plane", "index", "channel", "size", "spacing", "origin", "direction")


def take(
    scan: ScanLike,
    plane: Plane = "axial",
    indices: int | Sequence[int] | Literal["all", "middle"] = "all",
    *,
    orientation: str = "RAS",
) -> list[Volume]:
    """Slices of a scan, each a volume (C, 1, H, W) with its geometry, without interpolation; intensities are kept.

    Args:
        scan: (C, D, H, W), or what :func:`~medgmae.data.as_volume` takes; an oblique one goes to the nearest body axes.
        plane: "axial", "coronal" or "sagittal"; "stored" for the first array axis of the scan as it is.
        indices: which slices, counted from 0 in the direction of ``orientation`` (negative ones from the end); "middle"
            is n // 2.
        orientation: sides of the body towards which columns, rows and slices grow: with "RAS" the last row of an axial
            slice is anterior and its last column is on the patient's right. "LPI" is as radiologists look at pictures:
            anterior or superior at the top, the patient's right on the left. It has no say in "stored".

    Raises:
        VolumeError: an unknown plane, an orientation that is not one, or an index outside of the scan.
    """
    volume = _facing(as_volume(scan), plane, orientation)
    count = volume.size[0]
    if isinstance(indices, str):
        if indices not in ("all", "middle"):
            raise VolumeError(f"indices is {indices!r}; expected whole numbers, 'all' or 'middle'")
        wanted = list(range(count)) if indices == "all" else [count // 2]
    else:
        given: list[Any] = list(indices) if isinstance(indices, Sequence | np.ndarray) else [indices]
        outside = [i for i in given if not isinstance(i, int | np.integer) or not -count <= i < count]
        if outside:
            raise VolumeError(f"{volume.source}: no {plane} slice {outside[0]!r}; expected {-count} to {count - 1}")
        wanted = [int(i) % count for i in given]
    size = (1, *volume.size[1:])
    return [Volume(volume.data[:, i : i + 1], volume.grid.part((i, 0, 0), size), volume.source) for i in wanted]


def _facing(volume: Volume, plane: str, orientation: str) -> Volume:
    """The volume with the axis that goes through the plane as its first."""
    if plane not in PLANES:
        raise VolumeError(f"plane is {plane!r}; expected one of {', '.join(PLANES)}")
    if plane == "stored":
        return volume
    sides = [next((letter for letter in orientation.upper() if letter in pair), "") for pair in _SIDES]
    if len(orientation) != 3 or "" in sides:
        raise VolumeError(f"orientation is {orientation!r}; expected one letter each of R|L, A|P and S|I")
    return reorient(volume, "".join(sides[axis] for axis in _AXES[plane]))


def to_volume(slices: Iterable[ScanLike], like: ScanLike | Grid, *, outside: float = 0.0) -> Volume:
    """Slices put back where they were taken: (C, D, H, W) on the grid of ``like``, exactly.

    Only their geometry decides where they go, so that any plane, order, flip or subset will do.

    Args:
        slices: labels or values (C, 1, H, W), such as ``one.with_data(prediction)`` or ``record.volume(prediction)``.
        like: the scan that they were taken of, or its grid.
        outside: value of voxels that no slice holds.

    Raises:
        VolumeError: no slices, other channel counts, two slices at one place, or one that does not lie on voxels of
            ``like``: slices of a scan that was resampled go onto the resampled grid, and ``resample_like`` brings that
            onto another.
    """
    grid = like if isinstance(like, Grid) else as_volume(like).grid
    planes = [as_volume(one) for one in slices]
    if not planes:
        raise VolumeError("no slices; expected at least one")
    channels = {one.channels for one in planes}
    if len(channels) > 1:
        raise VolumeError(f"the slices have {sorted(channels)} channels; expected one number")
    kind = planes[0].data.dtype
    for one in planes[1:]:
        kind = torch.promote_types(kind, one.data.dtype)
    result = torch.full((channels.pop(), *grid.size), outside, dtype=kind)
    if kind != torch.bool and not kind.is_floating_point and float(outside) != float(result.reshape(-1)[0]):
        raise VolumeError(f"the value {outside} does not fit slices of type {kind}")
    filled = torch.zeros(grid.size, dtype=torch.bool)
    for one in planes:
        where, order = _place(one, grid)
        if filled[where].any():
            raise VolumeError(f"{one.source}: another slice has been put at the place of {one}")
        filled[where] = True
        result[:, where[0], where[1], where[2]] = one.data.detach().cpu().to(kind).permute(0, *(1 + k for k in order))
    return Volume(result, grid, planes[0].source)


def _place(one: Volume, grid: Grid) -> tuple[tuple[Tensor, ...], list[int]]:
    """The voxels of a grid that a slice fills, one open index per axis, and the slice's axes in the grid's order."""
    maps = axis_maps(grid, one.grid)
    if maps is None or not all(each.whole for each in maps):
        raise VolumeError(
            f"{one} does not lie on the voxels of the grid of {grid.size}; expected slices of that scan. Of one that "
            "was resampled: to_volume(slices, resampled), and medgmae.data.resample_like(that, scan)"
        )
    order = [next(k for k, each in enumerate(maps) if each.source == axis) for axis in range(3)]
    index = [torch.from_numpy(maps[k].positions.astype(np.int64)) for k in order]
    for axis, (positions, n) in enumerate(zip(index, grid.size, strict=True)):
        if int(positions.min()) < 0 or int(positions.max()) >= n:
            raise VolumeError(f"{one} reaches outside of the grid of {grid.size} along axis {axis}")
    shapes = [[-1 if k == axis else 1 for k in range(3)] for axis in range(3)]
    return tuple(positions.reshape(shape) for positions, shape in zip(index, shapes, strict=True)), order


def pseudo_3d(scan: ScanLike, depth: int, *, keep_geometry: bool = True) -> Volume:
    """A slice repeated ``depth`` times, as thick as its spacing says: (C, depth, H, W). A volume is left as it is.

    What the UVA adaptation of SelfMedMAE gives its 3D models of single images (lib/data/med_transforms.py). Its code
    keeps the geometry with MONAI up to 0.9.0, and with later ones takes every voxel for 1 mm along the body's axes.

    Args:
        scan: (C, 1, H, W), or (C, D, H, W).
        depth: copies, such as the model's patch.
        keep_geometry: False for what happens with MONAI from 0.9.1 on; volumes lose their geometry too then.

    Raises:
        VolumeError: a depth that is not positive.
    """
    volume = as_volume(scan)
    if depth < 1:
        raise VolumeError(f"depth is {depth}; expected a positive number of copies")
    if volume.size[0] == 1:
        grid = volume.grid.part((0, 0, 0), (depth, *volume.size[1:]))
        volume = Volume(volume.data.repeat(1, depth, 1, 1), grid, volume.source)
    if keep_geometry:
        return volume
    ras = np.array([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])  # columns: d to S, h to A, w to R
    return Volume(volume.data, Grid(volume.size, direction=ras), volume.source)


def selfmedmae_uva(scan: ScanLike) -> Volume:
    """The one slice that the UVA adaptation of SelfMedMAE trains its 2D model on: (1, 1, H, W) uint8.

    The middle of the first array axis as stored, whatever the orientation, stretched from its own least to its own
    largest intensity and cut down (not rounded) to 0..255 (lib/datasets.py). A constant slice becomes zeros.

    Raises:
        VolumeError: several channels.
    """
    volume = as_volume(scan)
    if volume.channels != 1:
        raise VolumeError(f"{volume.source}: {volume.channels} channels; expected one")
    (middle,) = take(volume, "stored", "middle")
    values = np.asarray(middle).astype(np.float32)
    least, largest = values.min(), values.max()
    stretched = (values - least) / np.float32(float(largest - least) + 1e-8) * np.float32(255)
    return middle.with_data(torch.from_numpy(stretched.astype(np.uint8)))


def selfmedmae_uva_input(
    image: ScanLike, size: int = 224, shorter: int | None = None, *, mean: float = 0.5, std: float = 0.225
) -> Tensor:
    """A slice of :func:`selfmedmae_uva` as that model takes it in validation: (1, 1, size, size) float32.

    The shorter side is resized to ``shorter`` as Pillow does it with antialiasing, the middle is cut out, and 0..255
    become (v / 255 - mean) / std.

    Args:
        image: (1, 1, H, W) uint8.
        size: pixels of a side.
        shorter: of the shorter side; int(1.15 size) by default, as published.

    Raises:
        VolumeError: another type or shape.
    """
    volume = as_volume(image)
    if volume.data.dtype != torch.uint8 or volume.shape[:2] != (1, 1):
        raise VolumeError(f"{volume} is not a slice (1, 1, H, W) of uint8; expected that of selfmedmae_uva(scan)")
    shorter = int(1.15 * size) if shorter is None else shorter
    height, width = volume.size[1:]
    longer = int(shorter * max(height, width) / min(height, width))
    target = (shorter, longer) if height <= width else (longer, shorter)
    pixels = resize_uint8(volume.data[0, 0].numpy(), target)
    # Where the middle is half a pixel off, torchvision rounds to the even one.
    first = [round((n - size) / 2) for n in target]
    cut = crop_or_pad(Volume(torch.from_numpy(pixels)[None, None]), (1, size, size), start=(0, *first))
    return (cut.data.float() / 255 - mean) / std


def write_png(one: ScanLike, path: str | os.PathLike[str], *, bits: Literal[8, 16] = 8) -> None:
    """A slice (1, 1, H, W) as a grey PNG file, which is read again to see that it holds the same.

    Args:
        one: integers are written as they are, labels say; floats from 0 to 1 are spread over all values, rounded.
        path: of the file.
        bits: 8 for 0..255, 16 for 0..65535.

    Raises:
        VolumeError: another shape, intensities outside of the range, or a file that cannot be written.
    """
    volume, path = as_volume(one), Path(path)
    if volume.shape[:2] != (1, 1):
        raise VolumeError(f"{volume} is not one plane of one channel, (1, 1, H, W); expected one of take(scan)")
    if bits not in (8, 16):
        raise VolumeError(f"bits is {bits!r}; expected 8 or 16")
    if path.suffix.lower() != ".png":
        raise VolumeError(f"{path} must end in .png")
    pixels, largest = np.asarray(volume)[0, 0], (1 << bits) - 1
    top = 1.0 if pixels.dtype.kind == "f" else largest
    slack = 1e-5 if pixels.dtype.kind == "f" else 0  # a window's float32 arithmetic can end at 1.0000001
    if not (pixels.min() >= -slack and pixels.max() <= top + slack):
        hint = "window or percentiles scale it" if pixels.dtype.kind == "f" else "bits=16 holds more"
        raise VolumeError(
            f"{volume.source}: the slice reaches from {pixels.min():g} to {pixels.max():g}; a {bits}-bit PNG holds 0 "
            f"to {top:g}: {hint}"
        )
    if pixels.dtype.kind == "f":
        pixels = np.rint(pixels.astype(np.float64).clip(0, 1) * largest)
    stored = np.ascontiguousarray(pixels.astype(np.uint8 if bits == 8 else np.uint16))
    sitk = simpleitk()
    try:
        sitk.WriteImage(sitk.GetImageFromArray(stored), str(path))
        same = np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), stored)
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be written: {str(error).strip().splitlines()[-1]}") from None
    if not same:
        raise VolumeError(f"{path}: what was written reads back as something else")


@dataclass(frozen=True)
class Record:
    """A row of a manifest: a file with a slice, or with one channel of it, and where that lies.

    file: beside the manifest or below it.
    plane, index: as :func:`take` has them; the index counts in the direction of the orientation.
    channel: of the scan; None where the file holds all of them.
    grid: of the slice, (1, H, W).
    labels: the other columns, such as the name and path of the scan.
    """

    file: Path
    plane: str
    index: int
    channel: int | None
    grid: Grid
    labels: dict[str, str]

    def volume(self, data: Tensor | NDArray[Any]) -> Volume:
        """A prediction (H, W) or (C, H, W) in the place of the slice, for :func:`to_volume`.

        Raises:
            VolumeError: another size than that of the slice.
        """
        # A copy: arrays of other programs may be read-only.
        values = data if isinstance(data, Tensor) else torch.from_numpy(np.array(data))
        values = as_volume(values[None] if values.ndim == 2 else values[:, None]).data
        if tuple(values.shape[1:]) != self.grid.size:
            raise VolumeError(
                f"{self.file}: a prediction of {tuple(data.shape)}; expected {self.grid.size[1:]} pixels, or channels "
                "of that: resize it back first"
            )
        return Volume(values, self.grid, str(self.file))


def manifest_row(one: Volume, file: str, plane: str, index: int, channel: int | None = None) -> dict[str, str]:
    """What a manifest says of a slice: the columns of ``COLUMNS``, numbers with all their digits."""
    grid = one.grid
    values = (grid.size, grid.spacing, grid.origin, grid.direction.ravel())
    texts = [" ".join(repr(value.item() if hasattr(value, "item") else value) for value in each) for each in values]
    number = "" if channel is None else str(channel)
    return dict(zip(COLUMNS, [file, plane, str(index), number, *texts], strict=True))


def read_manifest(path: str | os.PathLike[str]) -> list[Record]:
    """The rows of a manifest that ``medgmae slices`` wrote.

    Raises:
        VolumeError: not such a file; the message names the row.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
            if missing:
                raise VolumeError(f"{path}: lacks the columns {', '.join(missing)}; expected a manifest of slices")
            return [_record(path, number, row) for number, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VolumeError(f"{path}: cannot be read: {error}") from None


def _record(path: Path, number: int, row: dict[Any, Any]) -> Record:
    try:
        if None in row or None in row.values():
            raise ValueError("another number of cells than the heading")
        size = [int(text) for text in row["size"].split()]
        spacing, origin, direction = (
            [float(text) for text in row[name].split()] for name in ("spacing", "origin", "direction")
        )
        grid = Grid(size, spacing, origin, np.reshape(direction, (3, 3)))
        channel = int(row["channel"]) if row["channel"] else None
        labels = {name: cell for name, cell in row.items() if name not in COLUMNS}
        return Record(path.parent / row["file"], row["plane"], int(row["index"]), channel, grid, labels)
    except ValueError as error:
        raise VolumeError(f"{path}, row {number}: {error}; expected a row of a manifest of slices") from None
