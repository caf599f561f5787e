"""Whole scans through models of Gaussians: windows, masks, frames, and the figures that say how close they came."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric
from torch import Tensor

from medgmae import (
    Gaussians,
    Masking,
    Volume,
    create_model,
    create_transform,
    psnr,
    random_masking,
    reconstruct_scan,
)
from medgmae.data import crop_or_pad
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


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Oblique, of uneven spacing, no multiple of the patch: four windows of 32³."""
    data = create_transform("mae_vit_tiny_patch8_64.demo", whole=True)(DATA / "mr_brain_t1.nii.gz").data
    part = data[:, 20:50, 20:63, 20:57].contiguous()
    return Volume(part, (2.0, 1.5, 3.0), (-80.0, 30.0, 55.0), TURN)


def test_one_window_is_what_the_model_gives(scan: Volume) -> None:
    model, cube = nano(support=None), crop_or_pad(scan, (32, 32, 32))  # no rim of a support to fall on either side of
    found = reconstruct_scan(model, cube, generator=drawn(3))
    masking = random_masking(1, 64, 0.75, generator=drawn(3))
    expected = model.reconstruct(cube.data[None], masking)[0]
    assert found.apart is not None
    assert torch.equal(found.apart.data, expected)
    assert float((found.predicted.data - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    hidden = found.visible.data.isnan()
    assert int(hidden.sum()) == 48 * 8**3
    assert torch.equal(hidden[0, ::8, ::8, ::8].flatten().float(), masking.mask[0])
    assert torch.equal(found.filled.data[~hidden], cube.data[~hidden])
    assert torch.equal(found.filled.data[hidden], found.predicted.data[hidden])


def windows_of(model: Any, scan: Volume, seed: int) -> list[tuple[tuple[int, int, int], Gaussians]]:
    """First voxel of each window in the scan, and its Gaussians: by hand."""
    size = [-(n // -32) * 32 for n in scan.size]
    before = [m // 2 - n // 2 for n, m in zip(scan.size, size, strict=True)]
    padding = [p for b, n, m in zip(before, scan.size, size, strict=True) for p in (b, m - n - b)]
    padding = [*padding[4:], *padding[2:4], *padding[:2]]
    x = torch.nn.functional.pad(scan.data[None], padding, mode="replicate")
    starts = [(i, j, k) for i in range(0, size[0], 32) for j in range(0, size[1], 32) for k in range(0, size[2], 32)]
    masks = random_masking(len(starts), 64, 0.75, generator=drawn(seed))
    found = []
    for n, (i, j, k) in enumerate(starts):
        piece = x[:, :, i : i + 32, j : j + 32, k : k + 32]
        gaussians = model.gaussians(piece, Masking(*(t[n : n + 1] for t in masks)))
        found.append(((i - before[0], j - before[1], k - before[2]), gaussians))
    return found


def rendered_inside(gaussians: Gaussians, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """On a scan of ``size`` voxels, a window's Gaussians at ``start``: its own voxels computed, all else 0."""
    volume = torch.zeros(1, *size)
    own = voxelize(*gaussians, (32, 32, 32), support=None)[0]
    inner = [slice(max(s, 0), min(s + 32, n)) for s, n in zip(start, size, strict=True)]
    outer = [slice(i.start - s, i.stop - s) for i, s in zip(inner, start, strict=True)]
    volume[(slice(None), *inner)] = own[(slice(None), *outer)]
    return volume


@torch.no_grad()
def test_windows_tile_the_scan_and_their_gaussians_add_up(scan: Volume) -> None:
    model = nano(support=None)
    found = reconstruct_scan(model, scan, generator=drawn(5), batch_size=3)
    assert found.apart is not None
    assert found.gaussians is not None
    by_hand = windows_of(model, scan, 5)
    assert len(by_hand) == 4
    inside = sum(rendered_inside(g, start, scan.size) for start, g in by_hand)
    torch.testing.assert_close(found.apart.data, inside)
    # All at once: without leaving the units of the axes. Voxel start + 31 c of the scan is position c of the window.
    last = torch.tensor(scan.size) - 1
    total = torch.zeros(())
    for start, g in by_hand:
        stretch = 31 / last
        means = g.means * stretch + torch.tensor(start) / last
        for m, s, q, a in zip(means[0], g.scales[0], g.quats[0], g.densities[0], strict=True):
            total = total + dense(m.double(), s.double(), q.double(), a, stretch.double(), scan.size)
    largest = float(total.abs().max())
    assert float((found.predicted.data[0, ::3, ::3, ::3] - total).abs().max()) < 1e-5 * largest
    assert float((found.predicted.data - found.apart.data).abs().max()) > 0.01 * largest  # neighbours reach over
    for part in found[:3]:
        np.testing.assert_allclose(part.grid.affine, scan.grid.affine)


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
    assert found.gaussians.means.shape == (1, 4 * 64, 3)
    found.gaussians.save_ply(tmp_path / "g.ply", "world")
    read = Gaussians.load_ply(tmp_path / "g.ply", "world")
    assert torch.equal(voxelize(*read.to_grid(scan), scan.size)[0], found.predicted.data)
    index = scan.grid.index(read.means[0].numpy()) + np.array([1, 11, 14])  # in voxels of the padded scan
    assert index.min() > -1
    assert (index.max(0) < [32, 64, 64]).all()


def test_every_window_is_masked_as_in_training_by_the_generator(scan: Volume) -> None:
    model = nano()
    first, again, other = (
        reconstruct_scan(model, scan, generator=drawn(s), batch_size=b) for s, b in [(1, 1), (1, 4), (2, 1)]
    )
    assert torch.equal(first.visible.data.isnan(), again.visible.data.isnan())
    assert not torch.equal(first.visible.data.isnan(), other.visible.data.isnan())
    torch.testing.assert_close(first.predicted.data, again.predicted.data, rtol=1e-4, atol=1e-6)
    whole = crop_or_pad(scan, (32, 64, 32))
    hidden = reconstruct_scan(model, whole, mask_ratio=0.5, generator=drawn(1)).visible.data.isnan()
    assert [int(part.sum()) for part in hidden[0].split(32, dim=1)] == [32 * 512, 32 * 512]


def test_hidden_voxels_have_no_say(scan: Volume) -> None:
    model = nano()
    found = reconstruct_scan(model, scan, generator=drawn(7))
    hidden = found.visible.data.isnan()
    # Not at the rim, which is repeated into patches of the padding that may be visible.
    hidden[:, [0, -1]] = hidden[:, :, [0, -1]] = hidden[:, :, :, [0, -1]] = False
    changed = scan.with_data(torch.where(hidden, torch.rand(scan.data.shape), scan.data))
    assert torch.equal(reconstruct_scan(model, changed, generator=drawn(7)).predicted.data, found.predicted.data)
    seen = scan.with_data(torch.where(hidden, scan.data, torch.rand(scan.data.shape)))
    assert not torch.equal(reconstruct_scan(model, seen, generator=drawn(7)).predicted.data, found.predicted.data)


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
    masking = random_masking(1, 64, 0.75, generator=drawn(0))
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
        ({}, {"overlap": 0.5}, r"overlap \(=0.5\) must be 0 for Gaussians"),
        ({}, {"mask_ratio": 1.0}, r"got 1\.0 and 0\.0"),
        ({}, {"mask_ratio": 0.999}, r"leaves none visible"),
        ({}, {"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_reconstructed(options: Any, arguments: Any, message: str, scan: Volume) -> None:
    with pytest.raises(ValueError, match=message):
        reconstruct_scan(nano(**options), scan, **arguments)


def test_channels_must_fit(scan: Volume) -> None:
    double = scan.with_data(scan.data.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"has 2 channel.*one density"):
        reconstruct_scan(nano(), double)
    with pytest.raises(ValueError, match="has 2 channel"):
        reconstruct_scan(create_model("mae_vit_nano_patch8_32"), double)
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
    place = Volume(data, (3.0, 1.0, 2.0), (5.0, -7.0, 9.0), np.eye(3)[:, ::-1] * [1, -1, 1])
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
