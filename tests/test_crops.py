"""Random crops of prepared volumes: they are parts of the volumes, and depend on nothing but seed, epoch and index."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_scans import prepared_arrays
from torch.nn import functional
from torch.utils.data import DataLoader

from medgmae.data import VolumeError
from medgmae.data.augmentation import Augmentation, resized
from medgmae.data.crops import Crops
from medgmae.data.draws import draws
from medgmae.data.foreground import ForegroundTable
from medgmae.data.store import PreparedScan

SIZES = [(20, 24, 28), (16, 40, 18), (31, 17, 23)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedScan]:
    rng = np.random.default_rng(0)
    arrays = [rng.random((2, *size), np.float32).astype(np.float16).astype(np.float32) for size in SIZES]
    return prepared_arrays(tmp_path_factory.mktemp("crops"), arrays, crop=8).scans


def samples(crops: Crops, positions: Any, **options: Any) -> dict[int, dict[str, Any]]:
    loader = DataLoader(crops, batch_size=None, sampler=list(positions), **options)
    return {int(sample["position"]): sample for sample in loader}


def same(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a["x"], other[key]["x"]) and (a["scan"], a["start"]) == (other[key]["scan"], other[key]["start"])
        for key, a in one.items()
    )


def test_draws_keep_counters_apart() -> None:
    seeds = [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (1,), (0, 0, 1), (0, 1, 0)]
    firsts = [int(draws(*seed).integers(1 << 62)) for seed in seeds]
    assert len(set(firsts)) == len(seeds)
    assert firsts == [int(draws(*seed).integers(1 << 62)) for seed in seeds]


def test_crops_are_parts_of_the_volumes(scans: list[PreparedScan]) -> None:
    crops = Crops(scans, (8, 9, 10), per_scan=4, seed=3)
    assert len(crops) == 12
    volumes = [scan.volume().data for scan in scans]
    seen = set()
    for position in range(24):
        sample = crops[position]
        d, h, w = sample["start"]
        assert sample["position"] == position
        assert sample["x"].shape == (2, 8, 9, 10)
        assert sample["x"].dtype == torch.float32
        assert sample["x"].is_contiguous()
        assert torch.equal(sample["x"], volumes[sample["scan"]][:, d : d + 8, h : h + 9, w : w + 10])
        seen.add((sample["scan"], sample["start"]))
    assert len(seen) > 20


def test_every_place_is_reached(scans: list[PreparedScan]) -> None:
    crops = Crops([scans[1]], (14, 39, 17), per_scan=300)
    starts = {crops[position]["start"] for position in range(300)}
    assert starts == {(d, h, w) for d in range(3) for h in range(2) for w in range(2)}


def test_an_epoch_is_a_permutation(scans: list[PreparedScan]) -> None:
    crops = Crops(scans, (8, 8, 8), per_scan=5, seed=1)
    epochs = [[crops[15 * epoch + index]["scan"] for index in range(15)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [0] * 5 + [1] * 5 + [2] * 5
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Crops(scans, (8, 8, 8), per_scan=5, seed=2)[index]["scan"] for index in range(15)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_and_orders_change_nothing(scans: list[PreparedScan], context: str) -> None:
    augmentation = Augmentation(flip=0.5, rotate90=0.5, noise=(0.5, (0.0, 0.1)))
    crops = Crops(scans, (8, 8, 8), per_scan=3, foreground=0.5, augmentation=augmentation, seed=7)
    positions = list(range(4, 22))
    here = samples(crops, positions)
    assert same(here, samples(crops, reversed(positions)))
    assert same(here, samples(crops, positions, num_workers=2, multiprocessing_context=context))
    assert same(here, samples(pickle.loads(pickle.dumps(crops)), positions))
    assert not same(here, samples(Crops(scans, (8, 8, 8), per_scan=3, seed=8), positions))


def test_small_volumes_are_padded(scans: list[PreparedScan]) -> None:
    volume = scans[0].volume().data
    sample = Crops([scans[0]], (25, 8, 30), pad=-2.0)[0]
    d, h, w = sample["start"]
    assert (d, w) == (-2, -1)
    expected = functional.pad(volume[:, :, h : h + 8], (1, 1, 0, 0, 2, 3), value=-2.0)
    assert torch.equal(sample["x"], expected)


def test_planes(scans: list[PreparedScan]) -> None:
    crops = Crops(scans, (12, 30), per_scan=20, pad=-1.0)
    planes = set()
    for position in range(len(crops)):
        sample = crops[position]
        volume = functional.pad(scans[sample["scan"]].volume().data, (15, 15, 15, 15), value=-1.0)
        d, h, w = sample["start"]
        assert sample["x"].shape == (2, 12, 30)
        assert torch.equal(sample["x"], volume[:, d, h + 15 : h + 27, w + 15 : w + 45])
        planes.add((sample["scan"], d))
    assert len(planes) > 30


def test_rectangles_of_planes_are_resized(scans: list[PreparedScan]) -> None:
    augmentation = Augmentation(resized_crop=(0.2, 1.0))
    crops = Crops(scans, (16, 16), per_scan=4, augmentation=augmentation, seed=5)
    for position in range(len(crops)):
        sample = crops[position]
        scan = scans[sample["scan"]]
        d, h, w = sample["start"]
        rng = draws(5, 0, position)
        (top, left), (height, width) = augmentation.rectangle(scan.size[1:], rng)
        assert (top, left) == (h, w)
        part = scan.read((d, h, w), (1, height, width))[:, 0]
        assert torch.equal(sample["x"], resized(part, (16, 16)))
    areas, aspects = [], []
    for index in range(400):
        (top, left), (height, width) = augmentation.rectangle((100, 120), draws(0, index))
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 120 - width
        areas.append(height * width / 12000)
        aspects.append(width / height)
    assert 0.19 < min(areas) < 0.23
    assert max(areas) > 0.9
    assert 0.72 < min(aspects) < 0.78
    assert 1.28 < max(aspects) < 1.36
    start, size = Augmentation(resized_crop=(1.0, 1.0)).rectangle((10, 100), draws(0))
    assert (start, size) == ((0, 43), (10, 13))  # no rectangle of that area: the middle


def test_crops_are_normalised(scans: list[PreparedScan]) -> None:
    plain = Crops(scans, (8, 8, 8))[0]["x"].double()
    for normalize, axes, correction in [("zscore", (1, 2, 3), 0), ("zscore_all", (0, 1, 2, 3), 1)]:
        x = Crops(scans, (8, 8, 8), normalize=normalize)[0]["x"]
        std, mean = torch.std_mean(plain, axes, correction=correction, keepdim=True)
        torch.testing.assert_close(x, ((plain - mean) / std).float())
    x = Crops(scans, (8, 8), normalize="zscore")[0]["x"]
    assert x.shape == (2, 8, 8)
    torch.testing.assert_close(x.mean((1, 2)), torch.zeros(2), atol=1e-6, rtol=0)


def test_foreground_shares(tmp_path: Path) -> None:
    """A box of whole cells: every centre is of the kind that was drawn."""
    array = np.zeros((32, 48, 64), np.float32)
    array[8:16, 16:32, 24:32] = 1
    (scan,) = prepared_arrays(tmp_path, [array]).scans
    assert scan.foreground == pytest.approx(array.mean())
    for share in (0.0, 0.5, 0.75, 1.0):
        crops = Crops([scan], (1, 1, 1), per_scan=2000, foreground=share)
        found = float(np.mean([float(crops[position]["x"]) for position in range(2000)]))
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 2000) + 1e-9
    centres = [Crops([scan], (5, 5, 5), per_scan=200, foreground=1.0)[position] for position in range(200)]
    assert all(float(sample["x"][0, 2, 2, 2]) == 1 for sample in centres)
    corner = np.zeros((32, 48, 64), np.float32)
    corner[:8, :8, :8] = 1
    (scan,) = prepared_arrays(tmp_path / "corner", [corner]).scans
    starts = {Crops([scan], (20, 20, 20), foreground=1.0, seed=seed)[0]["start"] for seed in range(20)}
    assert starts == {(0, 0, 0)}, "moved into the volume"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_volumes_of_one_kind_are_drawn_from_evenly(tmp_path: Path, value: float) -> None:
    (scan,) = prepared_arrays(tmp_path, [np.full((10, 10, 10), value, np.float32)]).scans
    crops = Crops([scan], (9, 9, 9), per_scan=400, foreground=0.75)
    starts = np.array([crops[position]["start"] for position in range(400)])
    assert (abs(starts.mean(0) - 0.5) < 0.1).all()


def test_the_table_counts_and_draws() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((19, 8, 35)) < 0.3
    table = ForegroundTable.of(mask)
    assert table.counts.shape == (3, 1, 5)
    assert table.counts[2, 0, 4] == mask[16:, :, 32:].sum()
    assert table.counts.sum() == mask.sum()
    again = ForegroundTable.from_bytes(table.to_bytes(), mask.shape)
    assert np.array_equal(again.counts, table.counts)
    counts = np.zeros(table.counts.shape)
    for _ in range(4000):
        voxel = table.draw(rng, inside=False)
        assert all(0 <= v < n for v, n in zip(voxel, mask.shape, strict=True))
        counts[tuple(v // 8 for v in voxel)] += 1
    expected = ForegroundTable.of(~mask).counts / (~mask).sum()
    assert abs(counts / 4000 - expected).max() < 4 * np.sqrt(expected.max() / 4000)
    assert ForegroundTable.of(np.zeros((3, 3, 3), bool)).draw(rng, inside=True) is None
    assert ForegroundTable.of(np.ones((3, 3, 3), bool)).draw(rng, inside=False) is None


def test_bad_options_say_so(scans: list[PreparedScan], tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="no prepared volumes"):
        Crops([], (8, 8, 8))
    for options, text in [
        ({"per_scan": 0}, "per_scan is 0"),
        ({"foreground": 75}, "foreground is 75"),
        ({"normalize": "minmax"}, "normalize is 'minmax'"),
        ({"size": (8,)}, r"size is \(8,\)"),
        ({"size": (8, 0, 8)}, "size is"),
        ({"size": (8, 8, 9), "augmentation": Augmentation(rotate90=0.5)}, "8 x 9 voxels there"),
        ({"augmentation": Augmentation(resized_crop=(0.5, 1.0))}, "is for planes"),
        ({"size": (8, 8), "augmentation": Augmentation(flip=(0.5, 0.5, 0.5))}, "expected one probability, or 2"),
    ]:
        with pytest.raises(VolumeError, match=text):
            Crops(scans, **{"size": (8, 8, 8), **options})
    with pytest.raises(VolumeError, match=r"several numbers of channels: 2 in .*, 1 in"):
        Crops([scans[0], replace(scans[1], channels=1)], (8, 8, 8))
    with pytest.raises(VolumeError, match="reaches beyond the volume"):
        scans[0].read((0, 0, 20), (8, 8, 9))
    gone = Crops([replace(scans[0], path=tmp_path / "gone.b2nd")], (8, 8, 8))
    with pytest.raises(VolumeError, match=r"gone\.b2nd: cannot be read: No such file"):
        gone[0]
    with pytest.raises(IndexError):
        Crops(scans, (8, 8, 8))[-1]
