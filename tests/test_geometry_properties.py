"""Properties of volume geometry that hold whatever the sizes, spacings and directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medgmae.data import Grid, Volume, crop_or_pad, feature_map, reorient, resample, resample_like

CODES = ["".join(p) for sides in itertools.product("RL", "AP", "IS") for p in itertools.permutations(sides)]
SETTINGS = settings(deadline=None, max_examples=60)
sizes = st.tuples(*[st.integers(1, 7)] * 3)
spacings = st.tuples(*[st.floats(0.2, 8.0)] * 3)
points = st.tuples(*[st.floats(-300, 300)] * 3)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    axis = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 3))) + np.array([0, 0, 2])  # never of length zero
    rotation = sitk.VersorTransform((axis / np.linalg.norm(axis)).tolist(), draw(st.floats(0, 3.1)))
    signs = np.array(draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)))  # left-handed ones too
    direction = np.array(rotation.GetMatrix()).reshape(3, 3) * signs
    return Grid(draw(sizes), draw(spacings), draw(points), direction)


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    grid = draw(grids())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Volume(torch.randint(-1000, 1000, (2, *grid.size), generator=generator, dtype=torch.int16), grid)


def world_values(volume: Volume) -> dict[tuple[float, ...], list[int]]:
    """Voxel values by position in the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.size), indexing="ij"), -1).reshape(-1, 3)
    places = (volume.grid.world(index).round(3) + 0.0).tolist()
    values = volume.data.flatten(1).T.tolist()
    return dict(zip(map(tuple, places), values, strict=True))


@SETTINGS
@given(grids(), points)
def test_world_and_index_are_inverses_and_simpleitks(grid: Grid, point: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(grid.world(grid.index(point)), point, atol=1e-6)
    image = Volume(torch.zeros(1, *grid.size), grid).to_sitk()
    expected = image.TransformPhysicalPointToContinuousIndex(point)[::-1]
    np.testing.assert_allclose(grid.index(point), expected, atol=1e-4)


@SETTINGS
@given(volumes(), st.sampled_from(CODES))
def test_reorient_moves_no_voxel_and_is_undone(volume: Volume, code: str) -> None:
    turned = reorient(volume, code)
    assert turned.orientation == code
    assert sorted(turned.size) == sorted(volume.size)
    for place, values in world_values(turned).items():
        index = volume.grid.index(place)
        np.testing.assert_allclose(index, index.round(), atol=0.02)
        d, h, w = index.round().astype(int)
        assert volume.data[:, d, h, w].tolist() == values
    back = resample_like(turned, volume)
    assert torch.equal(back.data, volume.data)
    assert back.data.dtype == volume.data.dtype
    assert torch.equal(reorient(turned, volume.orientation).data, volume.data)


@SETTINGS
@given(volumes(), sizes, st.tuples(*[st.integers(-5, 5)] * 3))
def test_crop_or_pad_moves_no_voxel(volume: Volume, size: tuple[int, int, int], start: tuple[int, int, int]) -> None:
    cut = crop_or_pad(volume, size, value=-7, start=start)
    assert cut.size == size
    for index in itertools.product(*map(range, size)):
        old = tuple(i + s for i, s in zip(index, start, strict=True))
        inside = all(0 <= i < n for i, n in zip(old, volume.size, strict=True))
        expected = volume.data[(slice(None), *old)].tolist() if inside else [-7, -7]
        assert cut.data[(slice(None), *index)].tolist() == expected
        np.testing.assert_allclose(cut.grid.world(index), volume.grid.world(old), atol=1e-9)


@SETTINGS
@given(volumes(), sizes, st.sampled_from(CODES))
def test_pads_and_flips_come_back_exactly(volume: Volume, more: tuple[int, int, int], code: str) -> None:
    padded = crop_or_pad(volume, [n + m for n, m in zip(volume.size, more, strict=True)], value=5)
    assert torch.equal(resample_like(reorient(padded, code), volume).data, volume.data)


@SETTINGS
@given(grids(), spacings, st.sampled_from(["centered", "first_voxel"]))
def test_resampling_a_ramp_gives_the_ramp(grid: Grid, spacing: tuple[float, float, float], origin: str) -> None:
    """Linear interpolation of a linear function of position is exact wherever it does not have to repeat an edge."""
    slope = np.array([0.3, -0.2, 0.5])
    position = lambda g: g.world(np.stack(np.meshgrid(*map(np.arange, g.size), indexing="ij"), -1))  # noqa: E731
    ramp = Volume(torch.from_numpy(position(grid) @ slope)[None], grid)
    fine = [max(new, old * n / 12) for new, old, n in zip(spacing, grid.spacing, grid.size, strict=True)]
    result = resample(ramp, spacing=fine, origin=origin)  # type: ignore[arg-type]
    where = position(result.grid)
    index = grid.index(where)
    inner = ((index >= 0) & (index <= np.array(grid.size) - 1)).all(-1)
    snapped = 1e-4 * sum(grid.spacing) * np.linalg.norm(slope)  # positions this close to a voxel centre are taken as it
    np.testing.assert_allclose(result.data[0].numpy()[inner], (where @ slope)[inner], atol=1e-6 + snapped)
    old, new = np.array(grid.spacing), np.array(fine)
    gap = (grid.index(where[-1, -1, -1]) - (np.array(grid.size) - 1)) * old  # between the last centres
    gap += (new - old) / 2 * (origin == "centered")  # between the far edges
    assert (np.abs(gap) <= new / 2 + 1e-6).all()


@SETTINGS
@given(grids(), sizes)
def test_a_feature_map_covers_the_same_box(grid: Grid, patches: tuple[int, int, int]) -> None:
    volume = Volume(torch.zeros(1, *grid.size), grid)
    bigger = crop_or_pad(volume, [2 * p for p in patches])
    features = feature_map(torch.zeros(1, *patches), bigger)
    for corner in itertools.product((-0.5, 1), repeat=3):
        low = np.array(corner) == -0.5
        of_map = np.where(low, -0.5, np.array(patches) - 0.5)
        of_volume = np.where(low, -0.5, np.array(bigger.size) - 0.5)
        np.testing.assert_allclose(features.grid.world(of_map), bigger.grid.world(of_volume), atol=1e-6)


@pytest.mark.parametrize("code", CODES)
def test_axes_that_lie_between_two_body_axes_take_every_code(code: str) -> None:
    half = float(np.sqrt(0.5))
    grid = Grid((2, 3, 4), (1, 1, 1), (0, 0, 0), np.array([[half, -half, 0], [half, half, 0], [0, 0, 1]]))
    assert reorient(Volume(torch.zeros(1, 2, 3, 4), grid), code).orientation == code


@pytest.mark.parametrize("code", ["", "RA", "RAR", "XYZ", "RASP", "LRS"])
def test_a_wrong_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="one letter each"):
        reorient(Volume(torch.zeros(1, 2, 3, 4)), code)


def test_grids_are_compared_by_their_numbers() -> None:
    grid, same = Grid((4, 5, 6), 2.0), Grid((4, 5, 6), (2.0, 2.0, 2.0))
    assert grid == same
    assert len({grid, same}) == 1
    turned = Grid((4, 5, 6), 2.0, direction=np.eye(3))
    assert grid not in (turned, Grid((4, 5, 7), 2.0), Grid((4, 5, 6), 1.0), Grid((4, 5, 6), 2.0, (1, 0, 0)), "grid")
