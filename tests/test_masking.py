"""Masks and patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medgmae.layers.masking import Masking, random_masking, visible_count
from medgmae.layers.patches import check_multiple, patchify, unpatchify

AXES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=3)


@given(AXES, st.integers(1, 3), st.integers(0, 2))
def test_unpatchify_inverts_patchify(axes: list[tuple[int, int]], channels: int, batch: int) -> None:
    grid, patch = [g for g, _ in axes], [p for _, p in axes]
    size = [g * p for g, p in axes]
    x = torch.arange(batch * channels * math.prod(size)).reshape(batch, channels, *size)
    patches = patchify(x, patch)
    assert patches.shape == (batch, math.prod(grid), math.prod(patch) * channels)
    assert torch.equal(unpatchify(patches, patch, grid, channels), x)


def test_patches_come_in_raster_order_with_the_channel_fastest() -> None:
    x = torch.arange(2 * 4 * 6 * 4).reshape(1, 2, 4, 6, 4)
    patches = patchify(x, (2, 3, 2))
    row = 1 * (2 * 2) + 0 * 2 + 1  # patch (1, 0, 1) of the grid (2, 2, 2)
    expected = [x[0, c, 2 + i, j, 2 + k].item() for i in range(2) for j in range(3) for k in range(2) for c in range(2)]
    assert patches[0, row].tolist() == expected


@pytest.mark.parametrize("size", [(5, 4, 4), (4, 4, 3), (2, 4, 4), (4, 4)])
def test_sizes_that_are_no_multiple_are_refused_with_one_that_is(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of the patch") as error:
        check_multiple(size, (4, 4, 4))
    assert all(f"{-(-s // 4) * 4}" in str(error.value) for s in size)


@pytest.mark.parametrize(("shape", "grid"), [((1, 7, 16), (2, 2, 2)), ((1, 8, 15), (2, 2, 2)), ((1, 8, 16), (2, 2, 1))])
def test_patches_that_do_not_fit_the_grid_are_refused(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patches must be"):
        unpatchify(torch.zeros(shape), (2, 2, 2), grid, 2)


@given(st.integers(1, 3), st.integers(1, 40), st.floats(0, 0.97), st.integers(0, 2**31))
def test_a_masking_is_consistent(batch: int, tokens: int, ratio: float, seed: int) -> None:
    visible = visible_count(tokens, ratio)
    generator = torch.Generator().manual_seed(seed)
    if visible == 0:
        with pytest.raises(ValueError, match="leaves none visible"):
            random_masking(batch, tokens, ratio, generator=generator)
        return
    keep, restore, mask = random_masking(batch, tokens, ratio, generator=generator)
    assert keep.shape == (batch, visible)
    assert restore.shape == mask.shape == (batch, tokens)
    for row in range(batch):
        hidden = [i for i in range(tokens) if mask[row, i]]
        assert sorted(keep[row].tolist() + hidden) == list(range(tokens))
        sequence = keep[row].tolist() + [-1] * len(hidden)  # the decoder's sequence: visible, then mask tokens
        back = [sequence[i] for i in restore[row].tolist()]
        assert back == [-1 if mask[row, i] else i for i in range(tokens)]


def test_the_smallest_noise_stays_visible_in_the_order_of_the_noise() -> None:
    masking = random_masking(1, 4, 0.5, noise=torch.tensor([[0.9, 0.1, 0.5, 0.0]]))
    assert masking.keep.tolist() == [[3, 1]]
    assert masking.mask.tolist() == [[1, 0, 1, 0]]
    assert masking.restore.tolist() == [[3, 1, 2, 0]]


def test_equal_noise_gives_equal_masks_also_where_values_tie() -> None:
    noise = torch.zeros(2, 9)
    first, second = random_masking(2, 9, 0.5, noise=noise), random_masking(2, 9, 0.5, noise=noise.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.keep.tolist() == [[0, 1, 2, 3]] * 2


def test_equal_generators_give_equal_masks() -> None:
    def draw(seed: int) -> Masking:
        return random_masking(2, 27, 0.75, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3).keep, draw(3).keep)
    assert not torch.equal(draw(3).keep, draw(4).keep)


def test_every_patch_is_hidden_equally_often() -> None:
    mask = random_masking(4000, 8, 0.75).mask
    assert (mask.sum(1) == 6).all()
    assert (mask.mean(0) - 0.75).abs().max() < 0.03


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"), [(4096, 0.75, 1024), (216, 0.6, 86), (216, 0.75, 54), (10, 0.0, 10)]
)
def test_the_number_of_visible_patches_is_that_of_the_published_code(tokens: int, ratio: float, visible: int) -> None:
    assert visible_count(tokens, ratio) == visible
    assert random_masking(1, tokens, ratio).keep.shape == (1, visible)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_zero_to_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask ratio must be"):
        random_masking(1, 8, ratio)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise must be \(2, 8\)"):
        random_masking(2, 8, 0.5, noise=torch.rand(2, 9))
