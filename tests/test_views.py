"""Views of a prepared volume: where they lie, what they hold, how they overlap, how little is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medgmae
from medgmae.data import (
    Augmentation,
    Grid,
    PreparedScan,
    View,
    ViewSampler,
    Volume,
    VolumeError,
    draws,
    list_scans,
    open_prepared,
    prepare_scans,
)

DIRECTION = np.array([[0.0, 0.6, 0.8], [0.0, 0.8, -0.6], [1.0, 0.0, 0.0]])  # turned about the body's long axis


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> PreparedScan:
    """40 x 30 x 26 voxels of which each has the LPS x of its centre as its intensity, in hundredths of a mm."""
    return prepared(tmp_path_factory.mktemp("views"), (40, 30, 26))


def prepared(folder: Path, size: tuple[int, int, int]) -> PreparedScan:
    grid = Grid(size, (3.0, 1.5, 2.0), (-20.0, 4.0, 10.0), DIRECTION)
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    x = grid.world(index)[..., 0]
    path = folder / "scan.nii.gz"
    Volume(torch.from_numpy(x[None].astype(np.float32)), grid).save(path)
    prepare_scans(list_scans([path]).scans, folder / "prepared", {}, dtype="float32", crop=(8, 8, 8))
    return open_prepared(folder / "prepared").scans[0]


def views_of(sampler: ViewSampler, scan: PreparedScan, seed: int) -> list[View]:
    return sampler(scan, draws(seed, 0, 0))


def positions(grid: Grid) -> Any:
    """LPS x of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.size), indexing="ij"), -1)
    return grid.world(index)[..., 0]


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.6, 1.3)])
def test_a_place_in_the_patient_has_its_value_in_every_view(scan: PreparedScan, scale: tuple[float, float]) -> None:
    sampler = ViewSampler((20, 16, 16), (8, 8, 10), 2, 4, scale, 0.7, augmentation=Augmentation(flip=0.5))
    mirrored = 0
    for seed in range(12):
        for view in views_of(sampler, scan, seed):
            assert view.x.shape[1:] == view.grid.size == (sampler.global_size if view.kind == "global" else (8, 8, 10))
            inside = scan.grid.index(
                view.grid.world(np.stack(np.meshgrid(*map(np.arange, view.grid.size), indexing="ij"), -1))
            )
            inside = ((inside >= 0) & (inside <= np.array(scan.size) - 1)).all(-1)
            assert inside.mean() > 0.2
            np.testing.assert_allclose(view.x[0].numpy()[inside], positions(view.grid)[inside], atol=2e-3)
            mirrored += int(np.linalg.det(view.grid.direction) * np.linalg.det(scan.grid.direction) < 0)
            factor = np.array(view.grid.spacing) / np.array(scan.spacing)
            assert np.ptp(factor) < 1e-9
            assert scale[0] - 1e-9 <= factor[0] <= scale[1] + 1e-9
    assert 10 < mirrored < 62  # of 72


def share_inside(view: View, others: list[View], scan: PreparedScan) -> float:
    """Of the places of a view, the largest share that is scanned and in one other view; counted on a fine lattice."""
    steps = [np.linspace(-0.5, n - 0.5, 8 * n + 1)[:-1] + 1 / 16 for n in view.grid.size]
    world = view.grid.world(np.stack(np.meshgrid(*steps, indexing="ij"), -1))

    def within(grid: Grid) -> Any:
        index = grid.index(world)
        return ((index > -0.5) & (index < np.array(grid.size) - 0.5)).all(-1)

    scanned = within(scan.grid)
    return max(float((within(other.grid) & scanned).mean()) for other in others)


@pytest.mark.parametrize(("scale", "overlap"), [((1.0, 1.0), 1.0), ((1.0, 1.0), 0.3), ((0.7, 1.4), 0.6)])
def test_local_views_overlap_a_global_one(scan: PreparedScan, scale: tuple[float, float], overlap: float) -> None:
    sampler = ViewSampler((20, 16, 16), (8, 8, 10), 2, 2, scale, overlap)
    shares = []
    for seed in range(15):
        views = views_of(sampler, scan, seed)
        shares += [share_inside(view, views[:2], scan) for view in views[2:]]
    assert min(shares) >= overlap - 0.02
    assert overlap == 1.0 or min(shares) < 0.97  # no more than is asked for


def test_boxes_in_millimetres_and_in_patches_of_the_others(scan: PreparedScan) -> None:
    views = views_of(ViewSampler((20, 16, 16), (8, 8, 12), 1, 1), scan, 0)
    whole, part = views
    low, high = part.box
    corners = part.grid.world(np.array([[-0.5, -0.5, -0.5], [7.5, 7.5, 11.5]]))
    assert (np.array(low) <= corners + 1e-9).all()
    assert (np.array(high) >= corners - 1e-9).all()
    first, last = part.within(whole, (4, 4, 4))
    start = whole.grid.index(part.grid.world([0, 0, 0])) / 4 + 0.5 / 4
    np.testing.assert_allclose(first, start - 0.5 / 4, atol=1e-9)
    np.testing.assert_allclose(np.array(last) - first, [2, 2, 3], atol=1e-9)
    assert min(first) >= -1e-9  # the overlap is 1: wholly inside
    assert (np.array(last) <= np.array([5, 4, 4]) + 1e-9).all()


def test_the_same_draws_give_the_same_views_and_little_is_read(
    scan: PreparedScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Any, Any]] = []
    real = PreparedScan.read

    def counted(self: PreparedScan, start: Any, size: Any) -> Any:
        read.append((np.array(start), np.array(size)))
        return real(self, start, size)

    monkeypatch.setattr(PreparedScan, "read", counted)
    sampler = ViewSampler((8, 8, 8), (6, 6, 6), 1, 2)
    views, again = views_of(sampler, scan, 3), views_of(sampler, scan, 3)
    for one, other in zip(views, again, strict=True):
        assert torch.equal(one.x, other.x)
        assert one.grid == other.grid
    assert len(read) == 2
    assert (read[0][1] <= 10).all()  # the local views lie in the global one; a voxel more on each side


def test_a_global_view_may_be_larger_than_the_scan_and_a_local_one_not(tmp_path: Path) -> None:
    flat = prepared(tmp_path, (6, 30, 26))
    sampler = ViewSampler((20, 16, 16), (8, 8, 8), 1, 1, overlap=0.7, pad=-500.0)
    whole, part = views_of(sampler, flat, 0)
    assert (whole.x[:, :7] == -500).all()
    assert (whole.x[:, 13:] == -500).all()
    assert (whole.x[:, 7:13] != -500).all()
    assert (part.x != -500).float().mean() >= 0.7
    strict = ViewSampler((20, 16, 16), (8, 8, 8), 1, 1, overlap=0.8)
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz: too small: .* it fills 75%, and overlap=0\.8"):
        strict.check(flat)
    with pytest.raises(VolumeError, match="less overlap"):
        views_of(ViewSampler((8, 8, 8), (16, 16, 16), 1, 1, overlap=0.5), flat, 0)


@pytest.mark.parametrize(("scale", "overlap"), [((1.0, 1.0), 1.0), ((0.7, 1.4), 0.6)])
def test_views_of_one_plane(scan: PreparedScan, scale: tuple[float, float], overlap: float) -> None:
    """Each sample's views lie in one plane of the first axis, and show what is there."""
    augmentation = Augmentation(flip=(0.5, 0.0))
    sampler = ViewSampler((20, 16), (8, 10), 2, 4, scale, overlap, foreground=0.5, augmentation=augmentation)
    planes, shares, mirrored = set(), [], 0
    for seed in range(12):
        views = views_of(sampler, scan, seed)
        places = {round(float(scan.grid.index(view.grid.world([0, 0, 0]))[0]), 6) for view in views}
        (plane,) = places
        assert plane == int(plane)
        planes.add(plane)
        for view in views:
            assert view.x.shape == (1, *((20, 16) if view.kind == "global" else (8, 10)))
            assert view.grid.size == (1, *view.x.shape[1:])
            factor = np.array(view.grid.spacing) / np.array(scan.spacing)
            assert factor[0] == 1
            assert np.ptp(factor[1:]) < 1e-9
            assert scale[0] - 1e-9 <= factor[1] <= scale[1] + 1e-9
            index = scan.grid.index(
                view.grid.world(np.stack(np.meshgrid(*map(np.arange, view.grid.size), indexing="ij"), -1))
            )
            inside = ((index > -1e-6) & (index < np.array(scan.size) - 1 + 1e-6)).all(-1)[0]
            np.testing.assert_allclose(view.x[0].numpy()[inside], positions(view.grid)[0][inside], atol=2e-3)
            mirrored += int(np.linalg.det(view.grid.direction) * np.linalg.det(scan.grid.direction) < 0)
        shares += [share_inside(view, views[:2], scan) for view in views[2:]]
    assert len(planes) > 4
    assert 10 < mirrored < 62  # of 72
    assert min(shares) >= overlap - 0.02
    assert overlap == 1.0 or min(shares) < 0.97


def test_a_picture_of_the_views(scan: PreparedScan) -> None:
    views = views_of(ViewSampler((20, 16, 16), (8, 8, 12), 2, 3), scan, 0)
    figure = medgmae.visualize.views_figure(scan.volume(), views)
    outlines = [[patch.get_bbox() for patch in axes.patches] for axes in figure.axes]
    assert [len(one) for one in outlines] == [2, 3] * 3
    axial = outlines[0][0]  # the axial slice of the scan has its first axis and its second or third in the picture
    sides = np.array(scan.spacing) * np.array(views[0].grid.size)
    assert {round(axial.width, 3), round(axial.height, 3)} <= {round(side, 3) for side in sides}


def test_centres_in_the_foreground(scan: PreparedScan) -> None:
    sampler = ViewSampler((8, 8, 8), (4, 4, 4), 1, 0, foreground=1.0)
    table = scan.foreground_table()
    for seed in range(6):
        (view,) = views_of(sampler, scan, seed)
        start = np.round(scan.grid.index(view.grid.world([0, 0, 0]))).astype(int)
        assert (start >= 0).all()
        assert (start + 8 <= np.array(scan.size)).all()
        assert table.counts[tuple(np.minimum(start + 4, np.array(scan.size) - 1) // 8)] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_size": (8, 8)}, r"local_size is \(8, 8, 8\); .* global and local views alike"),
        ({"global_size": (8,), "local_size": (8,)}, r"global_size is \(8,\); expected voxels"),
        ({"global_views": 0}, "0 global and 8 local"),
        ({"scale": (0.0, 1.0)}, "0 < low <= high"),
        ({"overlap": 1.5}, "overlap is 1.5"),
        ({"augmentation": Augmentation(rotate90=0.5)}, "rotate90 moves voxels"),
        ({"augmentation": Augmentation(affine=(1.0, (0.9, 1.1), 5.0))}, "affine moves voxels"),
        ({"normalize": "max"}, "normalize is 'max'"),
    ],
)
def test_options_that_make_no_views(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        ViewSampler(**{"global_size": (16, 16, 16), "local_size": (8, 8, 8), **options})
