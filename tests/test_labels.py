"""Labels on the patch grid: against a loop over label voxels, and as a user would get them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medgmae
from medgmae.data import Grid, Volume, VolumeError, crop_or_pad, feature_map, patch_labels, reorient, resample


def by_hand(labels: Volume, patches: Grid, share: int | None = None) -> np.ndarray:
    """(d, h, w): a loop over label voxels, then one over the patches that no voxel's centre lies in."""
    votes: dict[tuple[int, ...], Counter[int]] = {place: Counter() for place in np.ndindex(*patches.size)}
    for index in np.ndindex(*labels.size):
        place = tuple(int(i) for i in np.floor(patches.index(labels.grid.world(index)) + 0.5001))
        if place in votes:
            votes[place][int(labels.data[(0, *index)])] += 1
    for place, counter in votes.items():
        if not counter:
            nearest = np.floor(labels.grid.index(patches.world(place)) + 0.5001)
            if ((nearest >= 0) & (nearest < labels.size)).all():
                counter[int(labels.data[(0, *nearest.astype(int))])] += 1
    result = np.zeros(patches.size)
    for place, counter in votes.items():
        if share is not None:
            result[place] = counter[share] / sum(counter.values()) if counter else np.nan
        else:
            result[place] = min(counter, key=lambda label: (-counter[label], label)) if counter else -1
    return result


def direction(draw: st.DrawFn) -> np.ndarray:
    angle = draw(st.sampled_from((0.0, 0.0, 0.3, 1.1)))  # half of them along the axes of the body
    turn = np.array(sitk.VersorTransform((0.3, -0.5, 0.8), angle).GetMatrix()).reshape(3, 3)
    return turn[:, draw(st.permutations(range(3)))] * draw(st.tuples(*[st.sampled_from((-1, 1))] * 3))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids that overlap near the origin, of any orientation; steps from below a millimetre to a patch."""
    size = draw(st.tuples(*[st.integers(1, 6)] * 3))
    spacing = draw(st.tuples(*[st.sampled_from((0.5, 0.7, 1.0, 2.0, 3.3))] * 3))
    return Grid(size, spacing, draw(st.tuples(*[st.integers(-4, 4)] * 3)), direction(draw))


@given(grids(), grids(), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_the_same_as_a_loop_over_label_voxels(of_labels: Grid, patches: Grid, seed: int) -> None:
    data = torch.randint(-1, 4, (1, *of_labels.size), generator=torch.Generator().manual_seed(seed))
    labels = Volume(data.to(torch.int16), of_labels)
    majority = patch_labels(labels, patches)
    assert majority.grid is patches
    assert majority.data.dtype == torch.int64
    np.testing.assert_array_equal(majority.data[0].numpy(), by_hand(labels, patches))
    share = patch_labels(labels, patches, share=2)
    assert share.data.dtype == torch.float32
    np.testing.assert_array_equal(share.data[0].numpy(), by_hand(labels, patches, share=2).astype(np.float32))


def scan_and_labels() -> tuple[Volume, Volume]:
    """A scan in an oblique place, and a label per patch of 4 x 3 x 2 voxels, spread over its voxels."""
    turn = np.array(sitk.VersorTransform((0.3, -0.5, 0.2), 0.6).GetMatrix()).reshape(3, 3)[:, ::-1]
    grid = Grid((12, 12, 12), (2.5, 0.8, 0.7), (10.0, -20.0, 5.0), turn)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 9, (1, 3, 4, 6), generator=generator)
    data = truth.repeat_interleave(4, 1).repeat_interleave(3, 2).repeat_interleave(2, 3).short()
    return Volume(torch.rand(1, 12, 12, 12, generator=generator), grid), Volume(data, grid)


def test_aligned_flipped_cropped_and_resampled_labels() -> None:
    scan, labels = scan_and_labels()
    patches = feature_map(torch.zeros(5, 3, 4, 6), scan)
    truth = labels.data[:, ::4, ::3, ::2].long()
    for code in ("LPS", "RAS", "SAR", "PIL"):
        assert torch.equal(patch_labels(reorient(labels, code), patches).data, truth)
    finer = resample(labels, size=(24, 24, 24), interpolation="nearest")
    assert torch.equal(patch_labels(finer, patches).data, truth)
    for other in (labels.with_data(labels.data.float()), labels.to_sitk(), labels.to_nibabel(), labels.to_metatensor()):
        assert torch.equal(patch_labels(other, patches).data, truth)
    part = patch_labels(crop_or_pad(labels, (8, 12, 12), start=(4, 0, 0)), patches).data
    assert (part[:, 0] == -1).all()
    assert torch.equal(part[:, 1:], truth[:, 1:])
    share = patch_labels(crop_or_pad(labels, (8, 12, 12), start=(4, 0, 0)), patches, share=3).data
    assert share[:, 0].isnan().all()
    assert torch.equal(share[:, 1:], (truth[:, 1:] == 3).float())


def test_a_map_finer_than_the_labels() -> None:
    _, labels = scan_and_labels()
    grid = labels.grid.with_size((36, 24, 12))
    finer = patch_labels(labels, grid).data
    assert torch.equal(finer, labels.data.long().repeat_interleave(3, 1).repeat_interleave(2, 2))
    assert patch_labels(labels, grid, share=3).data.isnan().sum() == 0


def test_shares_of_mixed_patches() -> None:
    labels = Volume(torch.tensor([0, 1, 1, 1, 2, 2, 1, 1]).reshape(1, 1, 1, 8))
    patches = Grid((1, 1, 2), (1.0, 1.0, 4.0), (1.5, 0.0, 0.0))
    assert patch_labels(labels, patches).data.flatten().tolist() == [1, 1]  # of a tie, the smaller label
    assert patch_labels(labels, patches, share=2).data.flatten().tolist() == [0, 0.5]
    assert patch_labels(labels, patches, share=1).data.flatten().tolist() == [0.75, 0.5]
    assert patch_labels(labels.with_data(labels.data == 1), patches).data.flatten().tolist() == [1, 0]


def test_labels_of_features() -> None:
    """The labels of a scan meet the feature map of its preparation, whatever lies between."""
    scan, labels = scan_and_labels()
    prepare = medgmae.create_transform(
        {"orientation": "RAS", "axes": "xyz", "spacing": [1, 1, 1], "resample": {}}, whole=True
    )
    ready = prepare(scan)
    model = medgmae.create_model("vit_nano_patch8_32").eval()
    features = medgmae.extract_features(model, ready)
    assert features.map is not None
    assert torch.equal(patch_labels(labels, features).data, patch_labels(labels, features.map).data)
    found = patch_labels(labels, features.map)
    assert found.size == features.map.size
    np.testing.assert_array_equal(found.data[0].numpy(), by_hand(labels, features.map.grid))


def test_the_share_of_several_labels_is_that_of_their_union() -> None:
    _, labels = scan_and_labels()
    grid = labels.grid.with_size((3, 3, 3))
    parts = [patch_labels(labels, grid, share=label).data for label in (1, 2, 7)]
    torch.testing.assert_close(patch_labels(labels, grid, share=[1, 2, 7]).data, sum(parts))
    assert torch.equal(patch_labels(labels, grid, share=[2]).data, parts[1])
    assert torch.equal(patch_labels(labels, grid, share=np.int16(2)).data, parts[1])  # type: ignore[arg-type]
    for wrong in ("tumour", 0.5, [], [1, 2.5], True):
        with pytest.raises(VolumeError, match=r"expected a label, such as share=1, or several, such as share=\[1, 2\]"):
            patch_labels(labels, grid, share=wrong)  # type: ignore[arg-type]


def test_labels_and_maps_need_their_geometry() -> None:
    scan, labels = scan_and_labels()
    patches = feature_map(torch.zeros(5, 3, 4, 6), scan)
    for bare in (labels.data, labels.data[0], labels.data[0].numpy()):
        with pytest.raises(
            VolumeError, match=r"without a geometry, .* expected scan\.with_data\(labels\) of shape \(1,"
        ):
            patch_labels(bare, patches)
    for image in (patches.to_sitk(), patches.to_nibabel(), patches.to_metatensor()):
        assert torch.equal(patch_labels(labels, image).data, patch_labels(labels, patches).data)
    with pytest.raises(
        VolumeError, match=r"Tensor without a geometry; expected features\.map, or .*feature_map\(tensor"
    ):
        patch_labels(labels, patches.data)
    model = medgmae.create_model("vit_nano_patch8_32").eval()
    with pytest.raises(VolumeError, match=r"no map \(map=None\); expected .*want_map=True"):
        patch_labels(labels, medgmae.extract_features(model, scan, want_map=False))
    with pytest.raises(VolumeError, match="ViT is not a scan"):
        patch_labels(labels, model)  # type: ignore[arg-type]


def test_what_are_no_labels() -> None:
    _, labels = scan_and_labels()
    with pytest.raises(VolumeError, match="have 2 channels; expected one"):
        patch_labels(labels.with_data(labels.data.repeat(2, 1, 1, 1)), labels.grid)
    with pytest.raises(VolumeError, match="not whole numbers; expected one label per voxel"):
        patch_labels(labels.with_data(labels.data + 0.5), labels.grid)
    with pytest.raises(VolumeError, match="not whole numbers"):
        patch_labels(labels.with_data(labels.data * float("nan")), labels.grid)
