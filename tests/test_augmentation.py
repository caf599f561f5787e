"""Random changes of crops: each against its definition, and the same for the same draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medgmae.data import VolumeError
from medgmae.data.augmentation import Augmentation
from medgmae.data.draws import draws

EVERYTHING = Augmentation(
    affine=(0.5, (0.9, 1.1), 10.0), flip=0.5, rotate90=0.5, scale=(0.5, (-0.1, 0.1)), shift=(0.5, (-0.1, 0.1)),
    gamma=(0.5, (-0.3, 0.3)), noise=(0.5, (0.0, 0.1)),
)  # fmt: skip


def crop(*size: int) -> Tensor:
    return torch.randn(2, *(size or (6, 8, 8)))


def changed(x: Tensor, seed: int = 0, **options: Any) -> Tensor:
    result = Augmentation(**options)(x.clone(), draws(seed))
    assert result.shape == x.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    return result


@pytest.mark.parametrize("size", [(6, 8, 8), (8, 8)])
def test_the_same_draws_give_the_same(size: tuple[int, ...]) -> None:
    x = crop(*size)
    results = [EVERYTHING(x.clone(), draws(seed)) for seed in range(20)]
    for seed, result in enumerate(results):
        assert torch.equal(result, EVERYTHING(x.clone(), draws(seed)))
    assert len({result.sum().item() for result in results}) > 15


def test_nothing_is_the_default() -> None:
    x = crop()
    assert torch.equal(changed(x), x)
    never = dict.fromkeys(("scale", "shift", "gamma", "noise"), (0.0, (0.5, 0.5)))
    assert torch.equal(changed(x, **never, affine=(0.0, (2.0, 2.0), 90.0)), x)


def test_flips_are_of_each_axis() -> None:
    x = crop()
    for axis in range(3):
        chances = tuple(float(axis == k) for k in range(3))
        assert torch.equal(changed(x, flip=chances), x.flip(axis + 1))
    assert torch.equal(changed(x, flip=1.0), x.flip(1, 2, 3))
    plane = crop(4, 5)
    assert torch.equal(changed(plane, flip=(1.0, 0.0)), plane.flip(1))
    kinds = {tuple(changed(x, seed, flip=0.5)[0, 0, 0, :3].tolist()) for seed in range(60)}
    assert len(kinds) == 8


def test_turns_are_of_the_last_two_axes() -> None:
    x = crop()
    expected = [torch.rot90(x, k, (2, 3)) for k in range(4)]
    counts = [0] * 4
    for seed in range(60):
        result = changed(x, seed, rotate90=0.75)
        counts[next(k for k in range(4) if torch.equal(result, expected[k]))] += 1
    assert min(counts) >= 5
    with pytest.raises(VolumeError, match="8 x 6 voxels"):
        changed(crop(8, 8, 6), rotate90=0.5)


def test_intensities_change_by_definition() -> None:
    x = crop()
    torch.testing.assert_close(changed(x, scale=(1.0, (0.25, 0.25))), x * 1.25)
    torch.testing.assert_close(changed(x, shift=(1.0, (-0.5, -0.5))), x - 0.5)
    gamma = changed(x, gamma=(1.0, (0.3, 0.3)))
    torch.testing.assert_close(gamma, x.sign() * x.abs() ** math.exp(0.3))
    both = changed(x, scale=(1.0, (1.0, 1.0)), shift=(1.0, (1.0, 1.0)))
    torch.testing.assert_close(both, 2 * x + 1)  # in this order


def test_numbers_are_drawn_evenly_from_their_ranges() -> None:
    x = torch.ones(1, 1, 1, 1)
    drawn = np.array([float(changed(x, seed, shift=(0.5, (-0.2, 0.6))) - 1) for seed in range(2000)])
    kept = drawn[drawn != 0]
    assert abs(len(kept) / 2000 - 0.5) < 0.05
    assert -0.2 <= kept.min() < -0.19
    assert 0.59 < kept.max() <= 0.6
    assert abs(kept.mean() - 0.2) < 0.03


def test_noise_is_normal() -> None:
    x = torch.zeros(1, 40, 40, 40)
    noise = changed(x, noise=(1.0, (0.3, 0.3)))
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float(noise.mean())) < 0.005
    assert float((noise.abs() < 0.3).float().mean()) == pytest.approx(0.6827, abs=0.01)
    deviations = [float(changed(x[:, :10], seed, noise=(1.0, (0.0, 0.4))).std()) for seed in range(200)]
    assert max(deviations) == pytest.approx(0.4, rel=0.05)
    assert abs(np.mean(deviations) - 0.2) < 0.03


def wave(size: tuple[int, ...], matrix: np.ndarray) -> Tensor:
    """A smooth function of the voxels' places from the centre, mapped by the matrix."""
    axes = [np.arange(n) - (n - 1) / 2 for n in size]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1) @ matrix.T
    weights = np.array([0.05, 0.03, -0.04])[-len(size) :]
    return torch.from_numpy(np.sin(places @ weights) + 0.01 * places[..., -1]).float()[None]


@pytest.mark.parametrize("size", [(20, 32, 24), (32, 24)])
def test_zooms_magnify_about_the_centre(size: tuple[int, ...]) -> None:
    axes = len(size)
    x = wave(size, np.eye(axes))
    result = changed(x, affine=(1.0, (1.25, 1.25), 0.0))
    torch.testing.assert_close(result, wave(size, np.eye(axes) / 1.25), atol=2e-3, rtol=0)
    assert torch.allclose(changed(x, affine=(1.0, (1.0, 1.0), 0.0)), x, atol=1e-5)
    shrunk = changed(torch.full((1, *size), 3.0), affine=(1.0, (0.5, 0.5), 30.0))
    torch.testing.assert_close(shrunk, torch.full((1, *size), 3.0))  # the border is repeated


@pytest.mark.parametrize("size", [(24, 32, 28), (32, 24)])
def test_turns_are_rotations_in_voxels(size: tuple[int, ...]) -> None:
    """The function turned is the function of turned places: by one rotation, whatever the edges of the crop."""
    x = wave(size, np.eye(len(size)))
    middle = (slice(None), *(slice(n // 4, -(n // 4)) for n in size))
    angles = []
    for seed in range(5):
        result = changed(x, seed, affine=(1.0, (1.0, 1.0), 20.0))
        rng = draws(seed)
        rng.random(), rng.uniform(1.0, 1.0)
        matrix = np.eye(len(size))
        for one, other in [(1, 2), (0, 2), (0, 1)] if len(size) == 3 else [(0, 1)]:
            angle = math.radians(rng.uniform(-20, 20))
            angles.append(angle)
            turn = np.eye(len(size))
            turn[one, one] = turn[other, other] = math.cos(angle)
            turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        torch.testing.assert_close(result[middle], wave(size, matrix)[middle], atol=2e-3, rtol=0)
    assert max(map(abs, angles)) > math.radians(10)


def test_tables_of_recipes() -> None:
    table = {"flip": [0.5, 0.5, 0.0], "scale": [0.1, [-0.1, 0.1]], "affine": [0.2, [0.9, 1.1], 15]}
    read = Augmentation.of(table)
    assert read == Augmentation(flip=(0.5, 0.5, 0.0), scale=(0.1, (-0.1, 0.1)), affine=(0.2, (0.9, 1.1), 15))
    assert Augmentation.of({}) == Augmentation()
    for wrong, text in [
        ({"flips": 1}, r"unknown keys \['flips'\]; expected some of"),
        ({"flip": 2}, "augmentation.flip is 2; expected a probability"),
        ({"flip": [0.5] * 4}, "augmentation.flip"),
        ({"rotate90": [1]}, "augmentation.rotate90"),
        ({"scale": 0.1}, "augmentation.scale is 0.1"),
        ({"scale": [0.1, 0.1]}, "augmentation.scale"),
        ({"shift": [0.1, [0.2, 0.1]]}, "augmentation.shift"),
        ({"gamma": [1.1, [0.1, 0.2]]}, "augmentation.gamma"),
        ({"noise": [1.0, [-0.1, 0.2]]}, "augmentation.noise"),
        ({"affine": [1.0, [0.0, 1.0], 1]}, "augmentation.affine"),
        ({"affine": [1.0, [0.9, 1.1]]}, "augmentation.affine"),
        ({"affine": 1}, "augmentation.affine"),
        ({"resized_crop": [0.2, 1.5]}, "augmentation.resized_crop"),
    ]:
        with pytest.raises(VolumeError, match=text):
            Augmentation.of(wrong)


def test_smoothing_and_contrast_are_those_of_monai() -> None:
    from monai.transforms import AdjustContrast, GaussianSmooth

    x = torch.rand(2, 9, 12, 10)
    smoothed = Augmentation(smooth=(1.0, (0.8, 0.8)))(x.clone(), np.random.default_rng(0))
    torch.testing.assert_close(smoothed, GaussianSmooth(sigma=0.8)(x).as_tensor(), atol=1e-6, rtol=0)
    contrasted = Augmentation(contrast=(1.0, (1.2, 1.2)))(x.clone(), np.random.default_rng(0))
    torch.testing.assert_close(contrasted, AdjustContrast(gamma=1.2)(x).as_tensor())
    constant = torch.full((1, 4, 4, 4), 3.0)
    assert torch.equal(Augmentation(contrast=(1.0, (0.5, 2.0)))(constant.clone(), np.random.default_rng(0)), constant)
    with pytest.raises(VolumeError, match="smooth"):
        Augmentation(smooth=(0.5, (-1.0, 1.0)))
