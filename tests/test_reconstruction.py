"""Whole scans through models of Gaussians: windows, masks, frames, and the figures that say how close they came."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric
from torch import Tensor

from medgmae import Gaussians, Masking, Volume, create_model, create_transform, psnr, reconstruct_scan
from medgmae.data import Grid, crop_or_pad
from medgmae.inference.windows import blend_weights
from medgmae.ops import voxelize
from medgmae.visualize import reconstruction_figure

NANO = "gmae_vit_nano_patch8_32"
DATA = Path(__file__).parent.parent / "examples/data"
TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


def nano(**options: Any) -> Any:
    """A small model whose Gaussians depend on what it sees."""
    model: Any = create_model(NANO, **options).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def masking_of(hidden: Tensor) -> Masking:
    """The mask of the voxels (32, 32, 32) of a window, patch by patch."""
    patches = hidden[::8, ::8, ::8].flatten()
    order = torch.cat([torch.nonzero(~patches).flatten(), torch.nonzero(patches).flatten()])
    return Masking(order[None, : int((~patches).sum())], order.argsort()[None], patches[None].float())


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Oblique, of uneven spacing, no multiple of the patch of 8."""
    data = create_transform("mae_vit_tiny_patch8_64.demo", whole=True)(DATA / "mr_brain_t1.nii.gz").data
    part = data[:, 20:50, 20:63, 20:57].contiguous()
    return Volume(part, Grid(part.shape[1:], (2.0, 1.5, 3.0), (-80.0, 30.0, 55.0), TURN))


def test_one_window_is_what_the_model_gives(scan: Volume) -> None:
    model, cube = nano(support=None), crop_or_pad(scan, (32, 32, 32))  # no rim of a support to fall on either side of
    found = reconstruct_scan(model, cube, generator=drawn(3))
    hidden = found.visible.data.isnan()
    expected = model.reconstruct(cube.data[None], masking_of(hidden[0]), paste_visible=False)[0]
    assert found.apart is not None
    torch.testing.assert_close(found.apart.data, expected)
    assert float((found.predicted.data - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert int(hidden.sum()) == 48 * 8**3
    assert torch.equal(found.filled.data[~hidden], cube.data[~hidden])
    assert torch.equal(found.filled.data[hidden], found.predicted.data[hidden])


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0.5, 0.7])
def test_gaussians_of_all_windows_add_up_by_their_shares(overlap: float, scan: Volume) -> None:
    """By hand, without leaving the units of the axes: voxel start + 31 c of the scan is position c of the window."""
    model, part = nano(support=None), crop_or_pad(scan, (32, 48, 40))
    starts = [(0, i, j) for i in ([0, 16] if overlap == 0.5 else [0, 8, 16]) for j in (0, 8)]
    found = reconstruct_scan(model, part, generator=drawn(5), overlap=overlap)
    assert found.apart is not None
    total, blended, weights = torch.zeros(()), torch.zeros(part.data.shape), torch.zeros(part.data.shape)
    last = torch.tensor(part.size) - 1
    stretch = 31 / last
    weight = blend_weights((32, 32, 32))
    for start in starts:
        where = tuple(slice(s, s + 32) for s in start)
        piece = part.data[(slice(None), *where)]
        hidden = found.visible.data.isnan()[(0, *where)]
        masking = masking_of(hidden)
        blended[(slice(None), *where)] += model.reconstruct(piece[None], masking, paste_visible=False)[0] * weight
        weights[(slice(None), *where)] += weight
        g = model.gaussians(piece[None], masking)
        place = (g.means[0] * 31 + torch.tensor(start)).double()  # voxels of the scan
        share = tent(place, start) / sum(tent(place, other) for other in starts)
        means = g.means * stretch + torch.tensor(start) / last
        for m, s, q, a in zip(means[0], g.scales[0], g.quats[0], g.densities[0] * share, strict=True):
            total = total + dense(m.double(), s.double(), q.double(), a, stretch.double(), part.size)
    largest = float(total.abs().max())
    assert float((found.predicted.data[0, ::3, ::3, ::3] - total).abs().max()) < 1e-5 * largest
    torch.testing.assert_close(found.apart.data, blended / weights)
    assert float((found.predicted.data - found.apart.data).abs().max()) > 0.01 * largest
    for volume in found[:3]:
        np.testing.assert_allclose(volume.grid.affine, part.grid.affine)


def tent(place: Tensor, start: tuple[int, ...]) -> Tensor:
    """1 in the middle of a window of 32 voxels, along every axis 0 at its first and last voxel."""
    distance = (place - torch.tensor(start) - 15.5).abs() / 15.5
    return (1 - distance).clamp(min=0).prod(-1)


def dense(mean: Tensor, scale: Tensor, quat: Tensor, density: Tensor, stretch: Tensor, size: tuple[int, ...]) -> Tensor:
    """One Gaussian at every third voxel of each axis, its covariance stretched as a matrix."""
    from scipy.spatial.transform import Rotation

    w, x, y, z = quat.tolist()
    turn = torch.tensor(Rotation.from_quat([x, y, z, w]).as_matrix())
    covariance = torch.diag(stretch) @ turn @ torch.diag(scale**2) @ turn.T @ torch.diag(stretch)
    axes = [torch.linspace(0, 1, n, dtype=torch.float64)[::3] for n in size]
    d = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - mean
    return (density * torch.exp(-0.5 * (d @ torch.linalg.inv(covariance) * d).sum(-1))).float()


def test_the_written_gaussians_are_the_reconstruction(scan: Volume, tmp_path: Path) -> None:
    """Without the model, from the file alone, bit for bit."""
    found = reconstruct_scan(nano(), scan, generator=drawn(6))
    assert found.gaussians is not None
    assert found.gaussians.means.shape == (1, 2 * 2 * 64, 3)
    found.gaussians.save_ply(tmp_path / "g.ply", "world")
    read = Gaussians.load_ply(tmp_path / "g.ply", "world")
    assert torch.equal(voxelize(*read.to_grid(scan).tensors(), scan.size)[0], found.predicted.data)
    index = scan.grid.index(read.means[0].numpy()) + np.array([1, 3, 2])  # in voxels of the padded scan
    assert index.min() > -1
    assert (index.max(0) < [32, 48, 40]).all()


def test_the_mask_comes_from_the_generator(scan: Volume) -> None:
    model = nano()
    first, again, other = (reconstruct_scan(model, scan, generator=drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.predicted.data, again.predicted.data)
    assert not torch.equal(first.visible.data.isnan(), other.visible.data.isnan())
    few = reconstruct_scan(model, crop_or_pad(scan, (32, 48, 40)), mask_ratio=0.999, generator=drawn(1))
    assert int((~few.visible.data.isnan()).sum()) == 8**3  # one patch of all; most windows see nothing
    assert few.predicted.data.isfinite().all()


def test_shares_flatten_the_seams(scan: Volume) -> None:
    """Windows that all give one wide Gaussian per place: summed they would be brightest where they overlap."""
    model: Any = create_model(NANO, support=None).eval()
    with torch.no_grad():
        model.decoder.scale_head.weight.zero_()
        model.decoder.density_head.weight.zero_()
    found = reconstruct_scan(model, crop_or_pad(scan, (32, 96, 32)), mask_ratio=0.0)
    along = found.predicted.data[0].mean((0, 2))[16:-16]
    assert found.gaussians is not None
    everything = replace(found.gaussians, densities=torch.full_like(found.gaussians.densities, 0.04))
    inside = everything.to_grid(found.predicted).tensors()
    summed = voxelize(*inside, (32, 96, 32), support=None)[0, 0].mean((0, 2))[16:-16]
    assert float(along.std() / along.mean()) < 0.06
    assert float(summed.mean() / along.mean()) > 1.5


@pytest.mark.parametrize("size", [(30, 43, 37), (19, 32, 7)])
def test_hidden_voxels_have_no_say(size: tuple[int, int, int], scan: Volume) -> None:
    """Nor have their copies in the padding around a scan that is smaller than a window."""
    model, scan = nano(), crop_or_pad(scan, size)
    found = reconstruct_scan(model, scan, generator=drawn(7))
    hidden = found.visible.data.isnan()
    changed = scan.with_data(torch.where(hidden, torch.rand(scan.data.shape), scan.data))
    assert torch.equal(reconstruct_scan(model, changed, generator=drawn(7)).predicted.data, found.predicted.data)
    seen = scan.with_data(torch.where(hidden, scan.data, torch.rand(scan.data.shape)))
    assert not torch.equal(reconstruct_scan(model, seen, generator=drawn(7)).predicted.data, found.predicted.data)


def test_dropped_paths_are_off_and_every_part_gets_its_mode_back(scan: Volume) -> None:
    model = nano(drop_path_rate=0.9)
    expected = reconstruct_scan(model, scan, generator=drawn(3))
    model.train().encoder.blocks[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    found = reconstruct_scan(model, scan, generator=drawn(3))
    assert torch.equal(found.predicted.data, expected.predicted.data)
    assert [module.training for module in model.modules()] == modes


def test_nothing_hidden(scan: Volume) -> None:
    found = reconstruct_scan(nano(), scan, mask_ratio=0.0)
    assert torch.equal(found.visible.data, scan.data)
    assert torch.equal(found.filled.data, scan.data)
    assert not torch.equal(found.predicted.data, scan.data)


def test_training_is_what_brings_the_scan_back(scan: Volume) -> None:
    cube = crop_or_pad(scan, (32, 32, 32))
    model: Any = create_model(NANO)
    before = reconstruct_scan(model, cube, generator=drawn(0)).predicted
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    masking = masking_of(reconstruct_scan(model, cube, generator=drawn(0)).visible.data[0].isnan())
    for _ in range(60):
        optimizer.zero_grad()
        model(cube.tensor, masking).loss.backward()
        optimizer.step()
    found = reconstruct_scan(model, cube, generator=drawn(0))
    hidden = found.visible.data.isnan()
    gain = psnr(found.predicted.data, cube.data, where=hidden) - psnr(before.data, cube.data, where=hidden)
    flat = psnr(torch.full_like(cube.data, float(cube.data[hidden].mean())), cube.data, where=hidden)
    assert gain > 2
    assert psnr(found.predicted.data, cube.data, where=hidden) > flat + 1


def test_published_box_is_nearly_the_same_after_the_move(scan: Volume) -> None:
    """It belongs to the window's grid; on a scan of one window its planes differ by rounding only."""
    found = reconstruct_scan(nano(support="box"), crop_or_pad(scan, (32, 32, 32)), generator=drawn(1))
    assert found.apart is not None
    assert psnr(found.predicted.data, found.apart.data) > 60


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"image_norm": True}, {}, r"image_norm=True"),
        ({}, {"mask_ratio": 1.0}, r"mask_ratio must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_what_cannot_be_reconstructed(options: Any, arguments: Any, message: str, scan: Volume) -> None:
    with pytest.raises(ValueError, match=message):
        reconstruct_scan(nano(**options), scan, **arguments)


def test_channels_must_fit(scan: Volume) -> None:
    double = scan.with_data(scan.data.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"has 2 channel\(s\), the model takes 1"):
        reconstruct_scan(nano(), double)
    found = reconstruct_scan(create_model("mae_vit_nano_patch8_32", in_chans=2).eval(), double)
    assert found.predicted.data.shape == double.data.shape


def test_psnr_is_what_monai_computes() -> None:
    true, found = torch.rand(1, 4, 5, 6), torch.rand(1, 4, 5, 6)
    expected = PSNRMetric(max_val=2.0)(found[None], true[None])
    assert psnr(found, true, data_range=2.0) == pytest.approx(float(expected), rel=1e-6)
    where = torch.rand(4, 5, 6) < 0.3
    same = torch.where(where, found, true)
    share = float(where.float().mean())
    assert psnr(same, true, where=where) == pytest.approx(psnr(same, true) + 10 * math.log10(share), abs=1e-4)
    assert psnr(true, true) == math.inf
    with pytest.raises(ValueError, match="one shape and a positive data_range"):
        psnr(true, true[:, :2])
    with pytest.raises(ValueError, match="one shape and a positive data_range"):
        psnr(true, true, data_range=0.0)
    with pytest.raises(ValueError, match="psnr of no voxels"):
        psnr(true, found, where=torch.zeros(4, 5, 6, dtype=torch.bool))


def test_the_fourth_column_shows_where_gaussians_are(scan: Volume, tmp_path: Path) -> None:
    """A dot lies on the bright voxel of the slice beside it, in all three planes."""
    data = torch.zeros(1, 9, 11, 13)
    data[0, 2, 8, 3] = 1.0
    place = Volume(data, Grid(data.shape[1:], (3.0, 1.0, 2.0), (5.0, -7.0, 9.0), np.eye(3)[:, ::-1] * [1, -1, 1]))
    centre = torch.tensor(place.grid.world([2, 8, 3]), dtype=torch.float32)[None, None]
    one = Gaussians(centre, torch.ones(1, 1, 3), torch.ones(1, 1, 4), torch.ones(1, 1))
    found = reconstruct_scan(nano(), scan)._replace(visible=place, filled=place, predicted=place, gaussians=one)
    figure = reconstruction_figure(place, found)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "scan",
        "visible patches",
        "rendered Gaussians",
        "Gaussian centres",
    ]
    for axes in figure.axes[3::4]:
        picture = np.asarray(axes.images[0].get_array())
        left, right, bottom, top = axes.images[0].get_extent()
        row, column = np.argwhere(picture == 1.0)[0]
        expected = [(column + 0.5) * right / picture.shape[1], (row + 0.5) * top / picture.shape[0]]
        np.testing.assert_allclose(axes.collections[0].get_offsets()[0], expected, atol=1e-4)
        assert (left, bottom) == (0, 0)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
