"""Transforms: against SimpleITK, MONAI's recorded outputs and the official preprocessing; geometry stays true; maps
come back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.numpy import load_file

from medgmae.data import (
    Grid,
    Volume,
    VolumeError,
    centred_start,
    crop_foreground,
    crop_or_pad,
    feature_map,
    percentiles,
    read_volume,
    reorient,
    resample,
    resample_like,
    stack_channels,
    window,
    write_volume,
    zscore,
)
from medgmae.data.geometry import axis_maps
from medgmae.factory import create_transform

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests/fixtures"
THORAX = ROOT / "examples/data/ct_thorax.nii.gz"
TANGERINE = {
    "modality": "CT", "channels": 1, "size": [256, 256, 256], "window": [-1200, 800], "range": [0, 1],
    "resample": {"to": "size", "interpolation": "bspline", "origin": "first_voxel", "outside": 0.0, "keep_dtype": True},
}  # fmt: skip
BTCV = {
    "modality": "CT", "orientation": "RAS", "axes": "xyz", "spacing": [1.5, 1.5, 2.0], "size": [6, 6, 6],
    "resample": {"to": "spacing", "interpolation": "linear", "origin": "first_voxel"},
    "window": [-175, 250], "crop": ["foreground", "center"],
}  # fmt: skip
BRATS = {
    "modality": "MR", "channels": 4, "orientation": "RAS", "axes": "xyz", "spacing": [1, 1, 1], "size": [6, 6, 6],
    "resample": {"to": "spacing", "interpolation": "linear", "origin": "first_voxel"},
    "crop": ["foreground", "center"], "normalize": "zscore_nonzero",
}  # fmt: skip


def tilted(size: tuple[int, int, int] = (5, 6, 7), channels: int = 1) -> Volume:
    matrix = np.array(sitk.VersorTransform((0.1, -0.2, 0.3), 0.5).GetMatrix()).reshape(3, 3)[:, ::-1]
    data = torch.randn(channels, *size, generator=torch.Generator().manual_seed(0))
    return Volume(data, Grid(size, (2.5, 0.8, 0.7), (10.0, -20.0, 5.0), matrix))


def by_simpleitk(volume: Volume, like: Volume, interpolator: int, outside: float) -> np.ndarray:
    image = sitk.Resample(volume.to_sitk(), like.to_sitk(), sitk.Transform(), interpolator, outside)
    return sitk.GetArrayFromImage(image)


@pytest.mark.parametrize("code", ["LPS", "RAS", "RAI", "PIR", "SAL", "ASL"])
@pytest.mark.parametrize("start", ["LPS", "RAS", "IPL"])
def test_reorient_is_simpleitks(code: str, start: str) -> None:
    volume = tilted()
    volume = reorient(volume, start)
    ours, theirs = reorient(volume, code), sitk.DICOMOrient(volume.to_sitk(), code)
    assert ours.orientation == code
    np.testing.assert_array_equal(ours.data[0].numpy(), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(ours.grid.affine, read_back(theirs), atol=1e-6)
    assert torch.equal(resample_like(ours, volume).data, volume.data)


def read_back(image: sitk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing()))[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return affine


@pytest.mark.parametrize("origin", ["centered", "first_voxel"])
@pytest.mark.parametrize(
    ("interpolation", "interpolator"),
    [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor), ("bspline", sitk.sitkBSpline)],
)
@pytest.mark.parametrize("target", [{"spacing": (1.1, 1.3, 0.33)}, {"size": (9, 5, 17)}])
def test_resample_is_simpleitks(
    origin: str, interpolation: str, interpolator: int, target: dict[str, tuple[float, ...]]
) -> None:
    volume = tilted()
    ours = resample(volume, **target, interpolation=interpolation, origin=origin, outside=-5.0)
    theirs = by_simpleitk(volume, ours, interpolator, -5.0)
    if interpolation == "nearest":  # half way between two voxels, SimpleITK goes by the last digit
        maps = axis_maps(volume.grid, ours.grid)
        assert maps is not None
        clear = [np.flatnonzero(np.abs(each.positions % 1 - 0.5) > 1e-3) for each in maps]
        assert min(map(len, clear)) >= 4
        np.testing.assert_array_equal(ours.data[0].numpy()[np.ix_(*clear)], theirs[np.ix_(*clear)])
    else:
        np.testing.assert_allclose(ours.data[0].numpy(), theirs, atol=2e-5)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize(("old", "new"), [(512, 256), (96, 32), (37, 32), (20, 8), (8, 20)])
def test_nearest_is_torchs_nearest_exact(old: int, new: int, tilt: float) -> None:
    """Halving an axis puts every voxel half way between two."""
    direction = np.array(sitk.VersorTransform((0.1, -0.2, 0.3), tilt).GetMatrix()).reshape(3, 3)
    volume = Volume(
        torch.arange(old).reshape(1, 1, 1, old), Grid((1, 1, old), (3.0, 1.1, 0.7), (-211, 17, 903), direction)
    )
    ours = resample(volume, size=(1, 1, new), interpolation="nearest")
    theirs = torch.nn.functional.interpolate(volume.data.float()[:, 0], new, mode="nearest-exact")
    assert torch.equal(ours.data[0, 0].float(), theirs[0])


def test_resample_keeps_what_it_says_it_keeps() -> None:
    volume = tilted((10, 12, 14))
    for target in ({"spacing": (1.5, 1.5, 1.5)}, {"size": (7, 9, 31)}):
        kept = resample(volume, **target)
        centre = lambda v: v.grid.world([(n - 1) / 2 for n in v.size])  # noqa: E731
        np.testing.assert_allclose(centre(kept), centre(volume), atol=1e-9)
        assert resample(volume, **target, origin="first_voxel").origin == volume.origin
    np.testing.assert_allclose(resample(volume, size=(5, 6, 7)).spacing, (5.0, 1.6, 1.4))
    integers = volume.with_data((volume.data * 100).short())
    assert resample(integers, size=(5, 6, 7)).data.dtype == torch.float32
    for interpolation in ("linear", "nearest", "bspline"):
        assert (
            resample(integers, size=(5, 6, 7), interpolation=interpolation, keep_dtype=True).data.dtype == torch.int16
        )
    with pytest.raises(VolumeError, match="exactly one"):
        resample(volume)
    with pytest.raises(VolumeError, match="positive"):
        resample(volume, spacing=(1, 0, 1))
    with pytest.raises(VolumeError, match="'cubic'"):
        resample(volume, size=(3, 3, 3), interpolation="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("interpolation", "interpolator"), [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor)]
)
def test_a_map_on_an_oblique_grid(interpolation: str, interpolator: int) -> None:
    upright = Volume(torch.zeros(1, 12, 13, 14), Grid((12, 13, 14), origin=(8.0, -22.0, 3.0)))
    ours = resample_like(tilted(channels=2), upright, interpolation=interpolation, outside=-7.0)
    for channel in range(2):
        one = tilted(channels=2)
        theirs = by_simpleitk(one.with_data(one.data[channel : channel + 1]), upright, interpolator, -7.0)
        np.testing.assert_allclose(ours.data[channel].numpy(), theirs, atol=1e-5)
    assert (ours.data == -7).any()
    assert (ours.data != -7).any()


def test_labels_return_to_the_scan() -> None:
    scan = read_volume(ROOT / "examples/data/ct_thorax_aorta_seg.nii.gz")
    model_space = resample(reorient(scan, "RAS"), spacing=(2.0, 2.0, 2.0), interpolation="nearest")
    back = resample_like(crop_or_pad(model_space, (128, 128, 128)), scan, interpolation="nearest")
    assert back.data.dtype == torch.uint8
    both = (back.data & scan.data).sum() * 2 / (back.data.sum() + scan.data.sum())
    assert both > 0.93


def test_feature_map_covers_its_patches() -> None:
    volume = tilted((8, 12, 16))
    features = feature_map(torch.randn(3, 2, 3, 4), volume)
    assert features.spacing == (10.0, 3.2, 2.8)
    np.testing.assert_allclose(features.grid.world((0, 0, 0)), volume.grid.world((1.5, 1.5, 1.5)))
    spread = resample_like(features, volume, interpolation="nearest")
    expected = features.data.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(spread.data, expected)
    for wrong in (torch.zeros(3, 3, 3, 4), torch.zeros(2, 3, 4)):
        with pytest.raises(VolumeError, match="does not divide"):
            feature_map(wrong, volume)


def test_window_and_percentiles() -> None:
    volume = Volume(torch.arange(-5, 5, dtype=torch.int16).reshape(1, 1, 2, 5))
    result = window(volume, (-2, 2), (10.0, 20.0))
    assert result.data.flatten().tolist() == [10, 10, 10, 10, 12.5, 15, 17.5, 20, 20, 20]
    assert percentiles(volume, (0, 100)) == (-5.0, 4.0)
    assert percentiles(volume.with_data(volume.data * 0), (1, 99)) == (0.0, 1.0)
    assert volume.data.min() == -5
    with pytest.raises(VolumeError, match="increasing"):
        window(volume, (3, 3))
    with pytest.raises(VolumeError, match=r"the window is \[-2\]; expected two increasing numbers \(low, high\)"):
        window(volume, -2, 2)  # type: ignore[arg-type]
    whole = window(volume, percentiles(volume, (0, 100))).data
    assert (whole.min(), whole.max()) == (0, 1)
    with pytest.raises(VolumeError, match="0 <= low < high"):
        percentiles(volume, (50, 101))
    with pytest.raises(VolumeError, match=r"percentiles are \[2\]; expected two increasing numbers \(low, high\)"):
        percentiles(volume, 2)  # type: ignore[arg-type]


def test_images_of_other_libraries_are_taken() -> None:
    volume, like = tilted((8, 12, 16)), Grid((4, 6, 8), (5.0, 1.6, 1.4), (10.0, -20.0, 5.0))
    image, other = volume.to_nibabel(), Volume(torch.zeros(1, 4, 6, 8), like).to_sitk()
    for ours, theirs in (
        (reorient(volume, "RAS"), reorient(image, "RAS")),
        (resample(volume, spacing=2), resample(image, spacing=2)),
        (resample_like(volume, like), resample_like(image, other)),
        (feature_map(torch.zeros(3, 2, 3, 4), volume), feature_map(torch.zeros(3, 2, 3, 4), image)),
        (window(volume, percentiles(volume, (1, 99))), window(image, percentiles(image, (1, 99)))),
        (zscore(volume, together=True, like=volume), zscore(image, together=True, like=volume.to_metatensor())),
        (crop_or_pad(volume, 6), crop_or_pad(image, 6)),
        (crop_foreground(volume), crop_foreground(image)),
        (stack_channels([volume, volume]), stack_channels([image, volume.to_sitk()])),
    ):
        assert torch.equal(ours.data, theirs.data)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)
    assert resample(np.ones((2, 2, 2)), size=4).spacing == (0.5, 0.5, 0.5)
    with pytest.raises(VolumeError, match=r"str is not a scan; .* For a file: read_volume\(path\)"):
        resample("scan.nii.gz", spacing=2)  # type: ignore[arg-type]


def test_one_number_stands_for_all_axes() -> None:
    volume = tilted((5, 6, 7))
    for one, three in (
        (resample(volume, spacing=2), resample(volume, spacing=(2.0, 2.0, 2.0))),
        (resample(volume, size=4), resample(volume, size=(4, 4, 4))),
        (crop_or_pad(volume, 4), crop_or_pad(volume, (4, 4, 4))),
        (crop_or_pad(volume, np.int64(8)), crop_or_pad(volume, np.array([8, 8, 8]))),
    ):
        assert torch.equal(one.data, three.data)
        np.testing.assert_array_equal(one.affine, three.affine)
    with pytest.raises(VolumeError, match=r"size is \[0, 0, 0\]; expected three positive numbers of voxels"):
        crop_or_pad(volume, 0)
    with pytest.raises(VolumeError, match=r"spacing is \[-1.0, -1.0, -1.0\] mm; expected three positive numbers"):
        resample(volume, spacing=-1)
    with pytest.raises(VolumeError, match="expected exactly one of them"):
        resample(volume, spacing=2.0, size=4)


@pytest.mark.parametrize(("n", "m", "start"), [(5, 4, 0), (4, 5, 0), (6, 3, 2), (3, 6, -2), (7, 7, 0), (9, 4, 2)])
def test_the_middle_voxel_stays_in_the_middle(n: int, m: int, start: int) -> None:
    assert centred_start([n], [m]) == [start]
    assert centred_start([m], [n]) == [-start]  # a crop undoes a pad
    cut = crop_or_pad(Volume(torch.arange(1, n + 1).reshape(1, n, 1, 1)), (m, 1, 1))
    assert cut.data[0, m // 2, 0, 0] == n // 2 + 1
    ready = create_transform({"size": [m, 1, 1], "crop": ["center"]})(
        Volume(torch.arange(1, n + 1).reshape(1, n, 1, 1))
    )
    assert torch.equal(ready.data, cut.data.float())


def test_zscore() -> None:
    data = torch.randn(2, 6, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 50
    data[:, :2] = 0
    whole, inside = zscore(Volume(data)).data, zscore(Volume(data), nonzero=True).data
    for channel in range(2):
        assert abs(whole[channel].mean()) < 1e-5
        assert abs(inside[channel, 2:].std(correction=0) - 1) < 1e-5
    assert (inside[:, :2] == 0).all()
    assert (zscore(Volume(torch.full((1, 2, 2, 2), 7.0))).data == 0).all()
    assert data.max() > 40


def test_crops_and_pads() -> None:
    volume = tilted((5, 6, 7))
    padded = crop_or_pad(volume, (9, 6, 4), value=-1)
    assert padded.size == (9, 6, 4)
    assert (padded.data[0, :2] == -1).all()
    assert torch.equal(padded.data[0, 2:7], volume.data[0, :, :, 1:5])
    np.testing.assert_allclose(padded.grid.world((2, 0, 0)), volume.grid.world((0, 0, 1)))
    assert torch.equal(crop_or_pad(crop_or_pad(volume, (8, 9, 10)), volume.size).data, volume.data)
    with pytest.raises(VolumeError, match="-1 does not fit voxels of type uint8"):
        crop_or_pad(volume.with_data(volume.data.byte()), (9, 9, 9), value=-1)
    data = torch.zeros(2, 6, 7, 8)
    data[1, 2:4, 3, 5:7] = 1
    box = crop_foreground(volume.with_data(torch.zeros(1, 5, 6, 7)).with_data(torch.ones(1, 5, 6, 7)))
    assert box.size == (5, 6, 7)
    small = crop_foreground(Volume(data))
    assert small.size == (2, 1, 2)
    np.testing.assert_allclose(small.origin, (5, 3, 2))
    assert crop_foreground(Volume(data), margin=2).size == (6, 5, 5)
    with pytest.raises(VolumeError, match="no voxel above 1; the largest is 1"):
        crop_foreground(Volume(data), threshold=1.0)


def test_official_preprocessing_of_tangerine(tmp_path: Path) -> None:
    case = json.loads((FIXTURES / "tangerine/preprocess_int16.json").read_text())
    tensors = load_file(FIXTURES / "tangerine/preprocess_int16.safetensors")
    given = case["config"]["input"]
    voxels = torch.from_numpy(tensors["inputs/voxels"])
    scan = Volume(voxels[None], Grid(voxels.shape, given["spacing_xyz"][::-1], given["origin"]))
    write_volume(scan, tmp_path / "scan.nii.gz")
    for x, y, z in case["config"]["new_sizes_xyz"]:
        key = f"x{x}_y{y}_z{z}"
        kept = resample(
            read_volume(tmp_path / "scan.nii.gz"),
            size=(z, y, x), interpolation="bspline", origin="first_voxel", outside=0.0, keep_dtype=True,
        )  # fmt: skip
        np.testing.assert_array_equal(kept.data[0].numpy(), tensors[f"outputs/resampled_{key}"])
        after = case["config"]["geometry_after"][key]
        np.testing.assert_allclose(kept.spacing[::-1], after["spacing_xyz"], atol=1e-6)
        np.testing.assert_allclose(kept.origin, after["origin"], atol=1e-6)
        ready = create_transform({**TANGERINE, "size": [z, y, x]})(tmp_path / "scan.nii.gz")
        np.testing.assert_allclose(ready.data.numpy(), tensors[f"outputs/model_input_{key}"], atol=1e-6, rtol=0)
    # Planes beyond the last voxel's edge are 0 HU, which is 0.6: the official files' own quirk.
    assert (ready.data[0, -1] == 0.6).all()


@pytest.mark.parametrize(
    ("block", "file", "whole", "key"),
    [
        (BTCV, "ct.nii.gz", True, "btcv_val_image"),
        (BTCV, "ct.nii.gz", False, "btcv_vis_image"),
        (BRATS, "mr4.nii.gz", True, "brats_val_image"),
        ({**BRATS, "crop": ["center"]}, "mr4.nii.gz", False, "brats_vis_image"),
    ],
)
def test_monai_pipelines_of_selfmedmae(block: dict[str, object], file: str, whole: bool, key: str) -> None:
    tensors = load_file(ROOT / "tests/scans/monai_val_transforms.safetensors")
    ready = create_transform(block, whole=whole)(ROOT / "tests/scans" / file)
    np.testing.assert_allclose(ready.data.numpy(), tensors[f"outputs/{key}"], atol=2e-6)


def test_sources_of_a_preparation() -> None:
    card = SimpleNamespace(input=BTCV)
    model = SimpleNamespace(pretrained_cfg={"input": BTCV})
    results = [create_transform(source)(THORAX).data for source in (BTCV, card, model)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(VolumeError, match="the model SimpleNamespace, with no input in its weight card"):
        create_transform(SimpleNamespace(pretrained_cfg={}))


def test_an_early_crop_changes_nothing() -> None:
    block = {**BTCV, "size": [40, 50, 60], "crop": ["center"]}
    early = create_transform(block)(THORAX)
    late = crop_or_pad(create_transform(block, whole=True)(THORAX), (40, 50, 60))
    np.testing.assert_allclose(early.grid.affine, late.grid.affine, atol=1e-6)
    np.testing.assert_allclose(early.data.numpy(), late.data.numpy(), atol=1e-5)
    again = create_transform(block)(read_volume(THORAX))
    assert torch.equal(again.data, early.data)
    assert early.tensor.shape == (1, 1, 40, 50, 60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, "unknown keys"),
        ({"axes": "yxz"}, "axes is 'yxz'"),
        ({"size": None}, "size is null"),
        ({"size": [1, 2]}, "three positive"),
        ({"spacing": [1, 0, 1]}, "three positive"),
        ({"window": [3, 1]}, "window"),
        ({"crop": ["random"]}, "crop"),
        ({"channels": 0}, "channels"),
        ({"resample": {"to": "spacing", "order": 3}}, "unknown keys"),
        ({"resample": {"to": "moon"}}, "to is 'moon'"),
        ({"resample": "spacing"}, "resample is 'spacing'"),
        ({"resample": {"to": "spacing", "outside": "air"}}, "outside is 'air'"),
        ({"range": 3}, "range is 3"),
        ({"range": [0]}, "two numbers"),
        ({"orientation": 3}, "three letters"),
        ({"pad": "air"}, "pad is 'air'"),
        ({"window": ["a", "b"]}, "window is"),
    ],
)
def test_a_wrong_block_says_what_is_wrong(change: dict[str, object], words: str) -> None:
    with pytest.raises(VolumeError, match=words):
        create_transform({**BTCV, **change})


def test_a_wrong_channel_count_is_said() -> None:
    with pytest.raises(VolumeError, match=r"ct_thorax.*1 channel\(s\).*expected 4"):
        create_transform(BRATS)(THORAX)
    with pytest.raises(VolumeError, match=r"1 channel\(s\); expected 4 \(MR\)"):
        create_transform(BRATS)(Volume(torch.zeros(1, 4, 4, 4)))


def test_every_shipped_card_prepares_a_scan() -> None:
    from medgmae.checkpoints.cards import list_weights, weight_card

    # the middle of a chest: cards resample to a millimetre and less, which of a whole one is most of the work
    scan = crop_or_pad(resample(read_volume(THORAX), spacing=(12.0, 12.0, 12.0)), (14, 14, 14))
    for tag in list_weights():
        block = weight_card(tag).input
        if block is None:
            with pytest.raises(VolumeError, match=f"{tag}.*says nothing about its input"):
                create_transform(tag)
            continue
        channels = dict(block).get("channels", 1)
        small = {**block, "size": [16, 16, 16]}
        ready = create_transform(small)(scan.with_data(scan.data.repeat(channels, 1, 1, 1)))
        if "multiple" in dict(block).get("crop", ()):  # the whole scan, in whole patches
            assert all(n % m == 0 for n, m in zip(ready.data.shape[1:], dict(block)["multiple"], strict=True)), tag
        else:
            assert ready.data.shape == (channels, 16, 16, 16), tag
        assert create_transform(tag).input["size"] == block.get("size"), tag
