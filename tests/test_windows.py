"""One layout of windows: what the models see through every function that reads a whole scan."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import medgmae
from medgmae.data import crop_or_pad
from medgmae.inference.features import dense_features
from medgmae.inference.windows import WindowMean, batches, blend_weights, cut, lay_out

NANO = "mae_vit_nano_patch8_32"
WINDOWS = [(64, 8), (96, 16), (32, 8), (48, 8)]  # voxels of a window and of a patch
SIZES, OVERLAPS = (112, 161, 256), (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8)


def watched(**options: Any) -> tuple[Any, list[Tensor]]:
    """A masked autoencoder, and a list of the windows (1, D, H, W) that its encoder is shown from now on."""
    model: Any = medgmae.create_model(NANO, **options).eval()
    shown: list[Tensor] = []
    model.encoder.patch_embed.register_forward_pre_hook(lambda module, args: shown.extend(args[0]))
    return model, shown


def numbered(*size: int) -> medgmae.Volume:
    """A scan whose voxels are all different and greater than 0."""
    count = torch.Size(size).numel()
    return medgmae.Volume(1.0 + torch.arange(count).reshape(1, *size))


@pytest.mark.parametrize(("window", "patch"), WINDOWS)
def test_features_and_reconstruction_read_the_same_windows(window: int, patch: int) -> None:
    """In 84 geometries: the same windows in the same order, whatever each makes of what lies beyond the scan."""
    model, shown = watched(img_size=(window, patch, patch), patch_size=patch)
    for size, overlap in itertools.product(SIZES, OVERLAPS):
        scan = numbered(size, patch, patch)
        medgmae.extract_features(model, scan, overlap=overlap, outside=0.0)
        features = shown.copy()
        shown.clear()
        medgmae.reconstruct_scan(model, scan, overlap=overlap, mask_ratio=0.0)
        assert len(features) == len(shown), (size, overlap)
        for one, other in zip(features, shown, strict=True):
            assert torch.equal(one, torch.where(one > 0, other, 0.0)), (size, overlap)
        shown.clear()


def test_windows_have_at_least_the_overlap_that_is_asked_for() -> None:
    model, shown = watched(img_size=(64, 8, 8))
    for run in (medgmae.extract_features, medgmae.reconstruct_scan):
        shown.clear()
        run(model, numbered(112, 8, 8), overlap=0.3)
        assert [(int(window.min()) - 1) // 64 for window in shown] == [0, 24, 48]


@pytest.mark.parametrize("size", [(33, 24, 21), (9, 31, 32), (40, 47, 17), (5, 6, 7)])
def test_crop_or_pad_undoes_the_padding(size: tuple[int, int, int]) -> None:
    """Each puts the scan where crop_or_pad has it, be its sizes odd or even."""
    model, shown = watched(img_size=[-(n // -8) * 8 for n in size])
    scan = numbered(*size)

    def latent(model: Any, scan: medgmae.Volume) -> Any:
        return medgmae.latent_to_spatial(model, scan, mode="finetuned")

    def dense(model: Any, scan: medgmae.Volume) -> Any:
        return dense_features(model, scan, steps=1)

    for run in (medgmae.extract_features, medgmae.reconstruct_scan, latent, dense):
        shown.clear()
        run(model, scan)
        assert len(shown) == 1
        assert torch.equal(crop_or_pad(medgmae.Volume(shown[0]), size).data, scan.data), run
    shown.clear()
    medgmae.extract_features(model, scan, outside=-1.0)
    assert torch.equal(shown[0], crop_or_pad(scan, shown[0].shape[1:], -1.0).data)


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 90)] * 3),
    patch=st.tuples(*[st.integers(1, 9)] * 3),
    tokens=st.tuples(*[st.integers(1, 6)] * 3),
    overlap=st.floats(0, 0.99),
)
@example(size=(112, 112, 112), patch=(8, 8, 8), tokens=(8, 8, 8), overlap=0.3)
def test_windows_cover_every_patch(
    size: tuple[int, ...], patch: tuple[int, ...], tokens: tuple[int, ...], overlap: float
) -> None:
    window = tuple(t * p for t, p in zip(tokens, patch, strict=True))
    layout = lay_out(size, patch, window, overlap)
    assert layout.window_size == window
    for axis in range(3):
        starts, grid, width = layout.starts[axis], layout.grid[axis], tokens[axis]
        assert starts[0] == 0
        assert starts[-1] + width == grid
        longest = max(1.0, width * (1 - overlap) + 1e-5)
        assert all(0 < b - a <= longest for a, b in itertools.pairwise(starts))
        padded = grid * patch[axis]
        assert padded - size[axis] < patch[axis] or grid == width
        assert layout.before[axis] + size[axis] // 2 == padded // 2
        kept = layout.inside[axis]
        edges = kept.start * patch[axis] - layout.before[axis], kept.stop * patch[axis] - layout.before[axis]
        assert -patch[axis] < edges[0] <= 0
        assert size[axis] <= edges[1] < size[axis] + patch[axis]


@pytest.mark.parametrize("outside", ["rim", -3.0])
def test_batches_are_the_windows_of_the_padded_scan(outside: Any) -> None:
    """Cut out one by one, they are what they would be if the whole scan were padded first."""
    data = torch.rand(2, 11, 5, 20)
    layout = lay_out((11, 5, 20), (4, 2, 3), (8, 8, 12), 0.5)
    assert layout.padded_size == (12, 8, 21)
    places = [torch.arange(m) - b for m, b in zip(layout.padded_size, layout.before, strict=True)]
    d, h, w = (place.clamp(0, n - 1) for place, n in zip(places, layout.size, strict=True))
    padded = data[:, d][:, :, h][..., w]
    if outside != "rim":
        beyond = [(place < 0) | (place >= n) for place, n in zip(places, layout.size, strict=True)]
        padded[:, beyond[0][:, None, None] | beyond[1][:, None] | beyond[2]] = outside
    read = list(batches(data, layout, outside, batch_size=4))
    assert [start for starts, _ in read for start in starts] == layout.windows()
    assert [len(batch) for _, batch in read] == [4, 2]
    for starts, batch in read:
        for start, window in zip(starts, batch, strict=True):
            assert torch.equal(window, padded[(slice(None), *layout.voxels(start))])
    assert torch.equal(padded[(slice(None), *layout.scan)], data)


def test_windows_are_cut_without_a_copy_of_the_scan() -> None:
    data = torch.rand(1, 16, 16, 16)
    assert cut(data, (4, 0, 8), (8, 16, 8), 0.0).data_ptr() == data[:, 4:, :, 8:].data_ptr()


def test_the_patch_grid_lies_on_the_scan() -> None:
    scan = medgmae.Volume(torch.rand(1, 30, 43, 37))
    layout = lay_out(scan.size, (8, 6, 4), None, 0)
    for parts in (1, 2):
        grid = layout.patch_grid(scan.grid, parts)
        assert grid.size == tuple(parts * n for n in layout.grid)
        assert grid.spacing == tuple(p / parts for p in layout.patch)
        for index in [(0, 0, 0), (1, 3, 5)]:
            steps = [p // parts for p in layout.patch]
            first = [i * s - b for i, s, b in zip(index, steps, layout.before, strict=True)]
            late = [(p - s) % 2 / 2 for p, s in zip(layout.patch, steps, strict=True)]
            middle = [f + (s - 1) / 2 + half for f, s, half in zip(first, steps, late, strict=True)]
            assert scan.grid.index(grid.world(index)).tolist() == pytest.approx(middle)


def test_the_mean_weighs_windows() -> None:
    weight = blend_weights((2, 2, 4))
    mean = WindowMean((2, 2, 6), weight)
    with pytest.raises(RuntimeError, match="no window"):
        mean.result()
    first, second = torch.rand(3, 2, 2, 4), torch.rand(3, 2, 2, 4)
    mean.add((slice(0, 2), slice(0, 2), slice(0, 4)), first)
    mean.add((slice(0, 2), slice(0, 2), slice(2, 6)), second)
    both = (first[..., 2:] * weight[..., 2:] + second[..., :2] * weight[..., :2]) / (weight[..., 2:] + weight[..., :2])
    torch.testing.assert_close(mean.result(), torch.cat([first[..., :2], both, second[..., 2:]], dim=-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"overlap": -0.1}, "got -0.1"),
        ({"overlap": float("nan")}, "got nan"),
    ],
)
def test_one_check_of_the_overlap(options: Any, message: str) -> None:
    model, _ = watched()
    for run in (medgmae.extract_features, medgmae.reconstruct_scan, dense_features):
        with pytest.raises(ValueError, match=message):
            run(model, numbered(32, 32, 32), **options)


@pytest.mark.parametrize("window", [20, (32, 32), 0, (8, 8, 12), "whole"])
def test_windows_are_whole_patches(window: Any) -> None:
    with pytest.raises(ValueError, match=r"in multiples of the patch \(8, 8, 8\), got"):
        lay_out((32, 32, 32), (8, 8, 8), window, 0.5)


def test_only_scans_are_read() -> None:
    model, _ = watched()
    latent: Any = medgmae.latent_to_spatial
    for run in (medgmae.extract_features, medgmae.reconstruct_scan, dense_features, latent):
        with pytest.raises(TypeError, match=r"must have been prepared .*create_transform.*got the path 'scan.nii.gz'"):
            run(model, "scan.nii.gz")
        with pytest.raises(TypeError, match=r"must be a Volume, or what medgmae\.as_volume takes; got dict"):
            run(model, {})


def test_scans_of_other_libraries_are_read() -> None:
    model, _ = watched()
    scan = medgmae.Volume(torch.rand(1, 12, 16, 10), medgmae.Grid((12, 16, 10), (2.0, 1.0, 1.5), (5.0, -7.0, 3.0)))
    expected = medgmae.extract_features(model, scan)
    for image in (scan.to_sitk(), scan.to_nibabel(), scan.to_metatensor()):
        features = medgmae.extract_features(model, image)
        torch.testing.assert_close(features.pooled, expected.pooled)
        assert features.map is not None
        assert expected.map is not None
        torch.testing.assert_close(features.map.data, expected.map.data)
        np.testing.assert_allclose(features.map.affine, expected.map.affine, atol=1e-4)


def test_compiled_and_wrapped_models_are_read() -> None:
    plain = medgmae.create_model("mae_vit_nano_patch8_32")
    scan = medgmae.Volume(torch.rand(1, 32, 32, 40))
    wrapped: Any = torch.compile(plain, backend="eager")
    torch.testing.assert_close(
        medgmae.extract_features(wrapped, scan).pooled, medgmae.extract_features(plain, scan).pooled
    )
    again = torch.nn.DataParallel(plain)
    for model in (wrapped, again):
        filled = [
            medgmae.reconstruct_scan(m, scan, generator=torch.Generator().manual_seed(0)).predicted.data
            for m in (model, plain)
        ]
        torch.testing.assert_close(*filled)
        assert medgmae.latent_map_defaults(model) == ("pretrained", "max")
        maps = [
            medgmae.latent_to_spatial(m, scan, generator=torch.Generator().manual_seed(0)).data for m in (model, plain)
        ]
        torch.testing.assert_close(*maps)


def test_a_model_in_half_precision_reconstructs() -> None:
    model = medgmae.create_model("mae_vit_nano_patch8_32").bfloat16()
    scan = medgmae.Volume(torch.rand(1, 32, 32, 40))
    assert medgmae.reconstruct_scan(model, scan).predicted.data.dtype == torch.float32
