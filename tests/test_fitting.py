"""fit_gaussians: it finds what was rendered, gets better where it should, repeats itself, and refuses nonsense."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from medgmae import (
    GaussianRenderer,
    Gaussians,
    Volume,
    create_transform,
    fit_gaussians,
    psnr,
    read_volume,
    write_volume,
)
from medgmae.data import Grid
from medgmae.gaussians.fitting import MOVED_SHARE, Rates, _Fit, draw_places


def blobs(size: tuple[int, int, int] = (20, 24, 18), count: int = 6, seed: int = 0) -> Volume:
    """A scan of a few Gaussians of 1.5 to 3 voxels, with values up to about 1."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.2 + 0.6 * torch.rand(1, count, 3, generator=generator)
    scales = (1.5 + 1.5 * torch.rand(1, count, 3, generator=generator)) / torch.tensor(size)
    quats = torch.randn(1, count, 4, generator=generator)
    truth = Gaussians(means, scales, quats, 0.3 + 0.7 * torch.rand(1, count, generator=generator))
    return Volume(GaussianRenderer(None)(truth, size)[0], Grid(size, (2.0, 1.0, 1.5)))


def score(found: Gaussians, scan: Volume, support: float = 3.0) -> float:
    rendered = GaussianRenderer(support)(found, scan.size)[0]
    return psnr(rendered, scan.data, data_range=float(scan.data.max() - scan.data.min()))


def test_it_finds_what_was_rendered() -> None:
    scan = blobs()
    told: list[tuple[int, float]] = []
    found = fit_gaussians(scan, 60, 150, callback=lambda *progress: told.append(progress))
    assert [tensor.shape for tensor in found.tensors()] == [(1, 60, 3), (1, 60, 3), (1, 60, 4), (1, 60)]
    assert not any(tensor.requires_grad for tensor in found.tensors())
    assert [done for done, _ in told] == list(range(1, 151))
    assert score(found, scan) > 38
    assert score(found, scan) == pytest.approx(told[-1][1], abs=1)
    assert score(found, scan) > told[0][1] + 15


def test_joining_and_moving_where_the_error_is_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = blobs(count=25, seed=1)
    with_rounds = score(fit_gaussians(scan, 40, 100), scan)
    monkeypatch.setattr("medgmae.gaussians.fitting.ROUNDS", 0)
    assert with_rounds > score(fit_gaussians(scan, 40, 100), scan) + 0.5


@pytest.mark.parametrize(("count", "steps"), [(1, 0), (1, 1), (1, 20), (7, 0), (7, 1), (7, 2), (7, 3), (101, 11)])
def test_exactly_as_many_as_were_asked_for(count: int, steps: int) -> None:
    scan = blobs()
    found = fit_gaussians(scan, count, steps)
    assert found.means.shape == (1, count, 3)
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors())
    assert bool((found.densities != 0).all())


def test_one_seed_one_result_and_no_other_random_numbers() -> None:
    scan, before = blobs(), torch.random.get_rng_state()
    first = fit_gaussians(scan, 30, 30)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    second = fit_gaussians(scan, 30, 30, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    other = fit_gaussians(scan, 30, 30, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.means, other.means)


def test_values_may_be_on_any_scale() -> None:
    scan = blobs()
    found, large = fit_gaussians(scan, 30, 40), fit_gaussians(scan.with_data(1000 * scan.data), 30, 40)
    assert score(large, scan.with_data(1000 * scan.data)) == pytest.approx(score(found, scan), abs=1.5)
    torch.testing.assert_close(large.densities.abs().amax() / 1000, found.densities.abs().amax(), rtol=0.3, atol=0)


def test_a_tensor_is_a_scan_of_one_millimetre_and_integers_are_values() -> None:
    data = (100 * blobs().data).to(torch.int16)
    found, as_tensor = fit_gaussians(Volume(data), 20, 5), fit_gaussians(data, 20, 5)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), as_tensor.tensors(), strict=True))


def test_the_start_is_round_in_millimetres_and_wider_where_less_happens() -> None:
    scan = blobs()
    start = fit_gaussians(scan, 200, 0)
    voxels = start.scales[0] * (torch.tensor(scan.size) - 1)
    millimetres = voxels * torch.tensor(scan.spacing)
    thin = (voxels < 0.301).any(1)  # of these, some axes were held up
    assert int(thin.sum()) < 20
    torch.testing.assert_close(millimetres[~thin].amin(1), millimetres[~thin].amax(1))
    assert float(millimetres[:, 0].max()) > 2 * float(millimetres[:, 0].median())
    spread = (voxels.prod(1) * (0.7**-3)).sum() / scan.data.numel()  # 0.7 of the spacing in each direction
    assert 0.5 < float(spread) < 2


def test_joining_gaussians_lie_where_the_error_is() -> None:
    scan = blobs()
    fit = _Fit(scan, 100, 100, GaussianRenderer(3.0), Rates(), 0.3)
    fit.start(torch.Generator().manual_seed(0))
    fit.step(1)
    assert fit.active == 10
    residual = torch.zeros(scan.size)
    residual[4:7, 10:13, 3:6] = -0.5
    with torch.no_grad():
        before = fit.parameters.means.clone()
        fit._join_and_move(residual, 60)
    assert fit.active == 60
    means = fit.parameters.means.detach().clone()
    changed = torch.nonzero((means != before).any(1)).flatten()
    assert len(changed) == 50 + round(MOVED_SHARE * 10)
    assert bool(
        ((means[changed] > torch.tensor([3.4, 9.4, 2.4])) & (means[changed] < torch.tensor([6.6, 12.6, 5.6]))).all()
    )
    assert bool((fit.parameters.densities.detach()[changed] <= 0).all())
    for parameter in fit.parameters:
        assert not fit.adam.state[parameter]["exp_avg"][changed].any()
    fit.step(2)
    assert not torch.equal(fit.parameters.means[changed], means[changed])


def test_places_follow_the_weights() -> None:
    weights = torch.zeros(4, 5, 6)
    weights[0, 1, 2], weights[3, 4, 5] = 1.0, 3.0
    places = draw_places(weights, 4000, torch.Generator().manual_seed(0)).round()
    rows, counts = places.unique(dim=0, return_counts=True)
    near = [int(counts[(rows - torch.tensor(p)).abs().amax(1) == 0].sum()) for p in ([0, 1, 2.0], [3, 4, 5.0])]
    assert near == pytest.approx([1000, 3000], abs=25)
    assert float(places.min()) >= 0
    assert bool((places <= torch.tensor([3, 4, 5])).all())


@pytest.mark.parametrize("size", [(1, 16, 16), (16, 1, 1), (2, 2, 2)])
def test_thin_volumes(size: tuple[int, int, int]) -> None:
    data = torch.zeros(1, *size)
    data[0, size[0] // 2, size[1] // 2, size[2] // 2] = 1
    found = fit_gaussians(data, 5, 20)
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors())
    assert score(found, Volume(data)) > -10 * math.log10(float(data.mean()))  # better than nothing


def test_a_checkerboard_has_no_central_differences() -> None:
    d, h, w = torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")
    found = fit_gaussians(((d + h + w) % 2).float()[None], 10, 5)
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors())


def ruined(value: float) -> Tensor:
    data = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    data[0, 1, 2, 3] = value
    return data


@pytest.mark.parametrize(
    ("scan", "options", "message"),
    [
        (ruined(math.nan), {}, "1 of 64 voxels are NaN or infinite"),
        (ruined(math.inf), {}, "1 of 64 voxels are NaN or infinite"),
        (torch.ones(1, 4, 4, 4), {}, "every voxel is 1"),
        (torch.rand(2, 4, 4, 4), {}, r"expected \(1, D, H, W\)"),
        (torch.rand(4, 4, 4), {}, r"expected \(1, D, H, W\)"),
        (torch.rand(1, 0, 4, 4), {}, r"expected \(1, D, H, W\)"),
        (ruined(0.0), {"count": 0}, r"count \(=0\) must be at least 1"),
        (ruined(0.0), {"steps": -1}, r"steps \(=-1\) at least 0"),
        (ruined(0.0), {"support": -1.0}, "support must be"),
        (ruined(0.0), {"rates": Rates(densities=1e30, scales=1e3)}, "diverged at step"),
    ],
)
def test_nonsense_is_refused(scan: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_gaussians(scan, **{"count": 5, "steps": 5, **options})


@pytest.mark.parametrize("scan", [np.zeros((1, 8, 8, 8)), "scan.nii.gz"])
def test_what_is_no_volume_is_refused(scan: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a Volume .* got (ndarray|str); medgmae\.as_volume"):
        fit_gaussians(scan, 4, steps=0)


def test_the_example_writes_gaussians_volume_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example = importlib.import_module("fit_gaussians")
    path, out = tmp_path / "blobs.nii.gz", tmp_path / "out"
    write_volume(blobs().with_data(1400 * blobs().data - 1000), path)
    arguments = [str(path), "--gaussians", "40", "--steps", "40", "--out", str(out)]
    done = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = re.search(r"(\d+\.\d+) dB with 40 Gaussians after 40 steps", done.output)
    assert told is not None
    rendered = read_volume(out / "rendered.nii.gz")
    scan = create_transform(example.WINDOW, whole=True)(path)
    assert psnr(rendered.data, scan.data) == pytest.approx(float(told[1]), abs=0.01)
    assert float(told[1]) > 25
    again = GaussianRenderer(3.0)(Gaussians.load_ply(out / "gaussians.ply", "world").to_grid(rendered), rendered.size)
    assert psnr(again[0], rendered.data) > 50
    assert (out / "fit.png").stat().st_size > 10_000
