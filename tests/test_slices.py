"""Slices of scans and back: planes, geometry, PNG files, manifests, the published recipes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgmae.data import Grid, Volume, VolumeError, label_channels, resample, resample_like, slices, window
from medgmae.data.resizing import resize_uint8
from medgmae.data.slices import PLANES, Plane, manifest_row, read_manifest, take, to_volume, write_png

TURN = np.linalg.qr(np.array([[0.9, 0.3, -0.2], [-0.3, 0.95, 0.1], [0.2, -0.1, 1.0]]))[0]
GRIDS = {
    "plain": Grid((5, 6, 7)),
    "anisotropic": Grid((5, 6, 7), (5.0, 0.7, 0.8), (-12.5, 30.25, 7.0)),
    "flipped": Grid((5, 6, 7), (2.0, 1.0, 1.5), (3, 2, 1), np.eye(3)[:, ::-1] * [1, -1, -1]),
    "sagittal": Grid((5, 6, 7), (4.0, 1.0, 1.1), (3, 2, 1), np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])),
    "oblique": Grid((5, 6, 7), (3.0, 0.9, 1.2), (100.1, -20.3, 5.7), TURN),
}


def scan_on(grid: Grid, channels: int = 1) -> Volume:
    count = channels * int(np.prod(grid.size))
    return Volume(torch.arange(count, dtype=torch.int32).reshape(channels, *grid.size), grid, "scan")


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("orientation", ["RAS", "LPI"])
@pytest.mark.parametrize("name", GRIDS)
def test_slices_go_back_exactly(name: str, plane: Plane, orientation: str) -> None:
    scan = scan_on(GRIDS[name], channels=2)
    every = take(scan, plane, orientation=orientation)
    back = to_volume(reversed(every), scan)
    assert torch.equal(back.data, scan.data)
    assert back.data.dtype == torch.int32
    assert back.grid is scan.grid
    for one in every:  # and each voxel has its place in the patient
        assert torch.equal(resample_like(scan, one, interpolation="nearest").data, one.data)


def test_each_plane_faces_as_it_should() -> None:
    x, y, z = np.meshgrid(np.arange(7), np.arange(6), np.arange(5), indexing="ij")  # towards R, A and S
    codes = torch.from_numpy(100 * x + 10 * y + z).permute(2, 1, 0)[None]
    ras = Grid((5, 6, 7), direction=np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]))
    scan = Volume(codes, ras)
    (axial,), (coronal,), (sagittal,) = (take(scan, plane, 1) for plane in PLANES[:3])
    assert axial.data[0, 0].tolist() == [[100 * i + 10 * j + 1 for i in range(7)] for j in range(6)]
    assert coronal.data[0, 0].tolist() == [[100 * i + 10 + k for i in range(7)] for k in range(5)]
    assert sagittal.data[0, 0].tolist() == [[100 + 10 * j + k for j in range(6)] for k in range(5)]
    (seen,) = take(scan, "coronal", 1, orientation="LPI")  # the last but one from the front
    assert seen.data[0, 0].tolist() == [[100 * i + 40 + k for i in range(6, -1, -1)] for k in range(4, -1, -1)]


def test_which_slices() -> None:
    scan = scan_on(GRIDS["plain"])
    every = take(scan)
    assert len(every) == 5
    assert [one.data.min() for one in take(scan, indices=[0, -1])] == [every[0].data.min(), every[4].data.min()]
    assert torch.equal(take(scan, "axial", "middle")[0].data, every[2].data)
    with pytest.raises(VolumeError, match="no axial slice 5; expected -5 to 4"):
        take(scan, indices=[1, 5])
    with pytest.raises(VolumeError, match="plane is 'diagonal'; expected one of axial"):
        take(scan, "diagonal")  # type: ignore[arg-type]
    for wrong in ("RAR", "XYZ", "RASS"):
        with pytest.raises(VolumeError, match="one letter each"):
            take(scan, orientation=wrong)
    with pytest.raises(VolumeError, match="'all' or 'middle'"):
        take(scan, indices="last")  # type: ignore[arg-type]


def test_what_no_slice_holds_is_outside() -> None:
    scan = scan_on(GRIDS["oblique"])
    back = to_volume(take(scan, "coronal", [0, 2]), scan, outside=-1)
    held = back.data != -1
    assert torch.equal(back.data[held], scan.data[held])
    assert int(held.sum()) == 2 * take(scan, "coronal", 0)[0].data.numel()


def test_slices_of_another_place_are_refused() -> None:
    scan = scan_on(GRIDS["plain"])
    one = take(scan, indices=2)[0]
    with pytest.raises(VolumeError, match="another slice has been put at the place"):
        to_volume([one, one], scan)
    with pytest.raises(VolumeError, match="no slices"):
        to_volume([], scan)
    with pytest.raises(VolumeError, match="reaches outside"):
        to_volume([Volume(one.data, scan.grid.part((7, 0, 0), one.size))], scan)
    with pytest.raises(VolumeError, match="resample_like"):
        to_volume([Volume(one.data, scan.grid.part((0.5, 0, 0), one.size))], scan)
    with pytest.raises(VolumeError, match="resample_like"):
        to_volume(take(scan_on(GRIDS["oblique"])), scan)
    with pytest.raises(VolumeError, match=r"\[1, 2\] channels"):
        to_volume([one, take(scan_on(GRIDS["plain"], 2), indices=0)[0]], scan)
    with pytest.raises(VolumeError, match="does not fit"):
        to_volume([one.with_data(one.data.to(torch.uint8))], scan, outside=-1)


def test_slices_of_a_resampled_scan_come_back_by_way_of_its_grid() -> None:
    scan = Volume(torch.rand(1, 6, 8, 10), Grid((6, 8, 10), (3.0, 1.0, 1.0)))
    fine = resample(scan, spacing=1.0, origin="first_voxel")
    back = resample_like(to_volume(take(fine), fine), scan)
    torch.testing.assert_close(back.data, scan.data)


@pytest.mark.parametrize("bits", [8, 16])
def test_png_files(bits: Any, tmp_path: Path) -> None:
    scan = Volume(torch.linspace(0, 1, 60).reshape(1, 1, 6, 10), Grid((1, 6, 10)))
    write_png(scan, tmp_path / "a.png", bits=bits)
    stored = np.asarray(Image.open(tmp_path / "a.png"))  # an independent reader
    assert stored.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert np.array_equal(stored, np.rint(scan.data[0, 0].double().numpy() * (2**bits - 1)))
    write_png(scan.with_data(scan.data * 1.0000002 - 1e-7), tmp_path / "c.png", bits=bits)  # rounding of a window
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c.png")), stored)
    labels = scan.with_data(torch.arange(60).reshape(1, 1, 6, 10))
    write_png(labels, tmp_path / "b.png", bits=bits)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), labels.data[0, 0])


def test_what_a_png_cannot_hold_is_refused(tmp_path: Path) -> None:
    one = Volume(torch.full((1, 1, 2, 2), 256))
    with pytest.raises(VolumeError, match=r"8-bit PNG holds 0 to 255: bits=16"):
        write_png(one, tmp_path / "a.png")
    for values in (torch.tensor(1.5), torch.tensor(-0.1), torch.tensor(float("nan"))):
        with pytest.raises(VolumeError, match="holds 0 to 1: window or percentiles"):
            write_png(one.with_data(values.expand(1, 1, 2, 2)), tmp_path / "a.png")
    with pytest.raises(VolumeError, match="one plane of one channel"):
        write_png(Volume(torch.zeros(1, 2, 2, 2)), tmp_path / "a.png")
    with pytest.raises(VolumeError, match=r"must end in \.png"):
        write_png(one, tmp_path / "a.jpg", bits=16)
    with pytest.raises(VolumeError, match="cannot be written"):
        write_png(one, tmp_path / "none" / "a.png", bits=16)
    with pytest.raises(VolumeError, match="expected 8 or 16"):
        write_png(one, tmp_path / "a.png", bits=12)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_predictions_go_back_by_a_manifest(tmp_path: Path) -> None:
    scan = scan_on(GRIDS["oblique"])
    every = take(scan, "sagittal")
    rows = [manifest_row(one, f"s/{i}.png", "sagittal", i) | {"name": "s"} for i, one in enumerate(every)]
    write_rows(tmp_path / "slices.csv", rows)
    records = read_manifest(tmp_path / "slices.csv")
    assert [(r.file, r.index, r.channel, r.labels) for r in records[:1]] == [
        (tmp_path / "s/0.png", 0, None, {"name": "s"})
    ]
    back = to_volume([r.volume(one.data[:, 0]) for r, one in zip(records, every, strict=True)], scan)
    assert torch.equal(back.data, scan.data)
    flat = to_volume([r.volume(one.data[0, 0].numpy()) for r, one in zip(records, every, strict=True)], scan)
    assert torch.equal(flat.data, scan.data)
    with pytest.raises(VolumeError, match="resize it back first"):
        records[0].volume(torch.zeros(3, 3))


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "slices.csv"
    row = manifest_row(take(scan_on(GRIDS["plain"]), indices=0)[0], "a.png", "axial", 0)
    for change in ({"size": "1 6"}, {"spacing": "1 0 1"}, {"direction": "1 0"}, {"index": "x"}, {"origin": "nan 0 0"}):
        write_rows(file, [row | change])
        with pytest.raises(VolumeError, match=r"slices.csv, row 2: .*expected a row of a manifest"):
            read_manifest(file)
    file.write_text("file,plane\na,b\n")
    with pytest.raises(VolumeError, match="lacks the columns channel, direction"):
        read_manifest(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(VolumeError, match="cannot be read"):
        read_manifest(file)
    with pytest.raises(VolumeError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")


def test_a_slice_becomes_a_volume() -> None:
    one = take(scan_on(GRIDS["anisotropic"]), "axial", "middle")[0]
    deep = slices.pseudo_3d(one, 4)
    assert deep.shape == (1, 4, 6, 7)
    assert deep.spacing == one.spacing
    assert bool((deep.data == one.data).all())
    assert deep.origin == one.origin
    lost = slices.pseudo_3d(one, 4, keep_geometry=False)
    assert (lost.spacing, lost.origin, lost.orientation) == ((1, 1, 1), (0, 0, 0), "RAS")
    scan = scan_on(GRIDS["flipped"])
    assert slices.pseudo_3d(scan, 4) is scan
    assert slices.pseudo_3d(scan, 4, keep_geometry=False).spacing == (1, 1, 1)
    with pytest.raises(VolumeError, match="positive number of copies"):
        slices.pseudo_3d(one, 0)


def test_the_published_slice_is_cut_not_rounded() -> None:
    data = torch.tensor([[0, 1], [2, 3]], dtype=torch.int16).expand(1, 2, 2, 2)
    one = slices.selfmedmae_uva(Volume(data.contiguous()))
    assert one.data[0, 0].tolist() == [[0, 85], [170, 255]]
    assert one.data.dtype == torch.uint8
    assert slices.selfmedmae_uva(Volume(torch.full((1, 3, 4, 4), 7))).data.max() == 0
    with pytest.raises(VolumeError, match="2 channels; expected one"):
        slices.selfmedmae_uva(scan_on(GRIDS["plain"], 2))
    with pytest.raises(VolumeError, match="of uint8"):
        slices.selfmedmae_uva_input(scan_on(GRIDS["plain"]))
    x = slices.selfmedmae_uva_input(Volume(torch.full((1, 1, 30, 40), 255, dtype=torch.uint8)), 16)
    assert x.shape == (1, 1, 16, 16)
    torch.testing.assert_close(x, torch.full_like(x, 0.5 / 0.225))


@pytest.mark.parametrize("size", [(5, 7), (16, 9), (23, 40), (64, 64), (31, 1), (1, 3)])
def test_resizing_is_pillows(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for height, width in ((13, 11), (40, 23), (7, 64), (1, 5)):
        pixels = generator.integers(0, 256, (height, width), dtype=np.uint8)
        # One axis at a time: Pillow 13 takes the rows first where they shrink far more than the columns.
        wide = Image.fromarray(pixels).resize((size[1], height), Image.Resampling.BILINEAR)
        expected = wide.resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.array_equal(resize_uint8(pixels, size), np.asarray(expected))


def test_label_channels() -> None:
    labels = Volume(torch.tensor([0, 1, 2, 3]).reshape(1, 1, 2, 2))
    found = label_channels(labels, [(2, 3), (1, 2, 3), 2])
    assert found.data.flatten(1).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert found.grid is labels.grid
    with pytest.raises(VolumeError, match="groups is empty"):
        label_channels(labels, [])
    with pytest.raises(VolumeError, match="not whole numbers"):
        label_channels(labels.with_data(labels.data / 2), [1])


def test_intensities_are_windowed_before_they_are_written(tmp_path: Path) -> None:
    scan = Volume(torch.linspace(-1000, 1000, 60).reshape(1, 3, 4, 5))
    (one,) = take(window(scan, (-175, 250)), "axial", "middle")
    write_png(one, tmp_path / "a.png")
    stored = np.asarray(Image.open(tmp_path / "a.png"))
    assert (stored.min(), stored.max()) == (0, 255)
