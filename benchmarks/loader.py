"""Random crops of 512 x 512 x 320 volumes per second on one core: against MONAI, nnU-Net and raw arrays.

Three CT-like scans are made here (a body with organs and lung-like holes, white noise of 15 HU) and prepared at 1.0 x
0.7 x 0.7 mm with the window [-175, 250], so that their intensities are continuous as after any resampling. Every side
gives a float32 tensor (1, n, n, n) in this process, and but for one, no augmentation:
  ours         Crops of the prepared volumes (float16), files kept open; "reopened": the file is opened for each crop,
               as where an epoch has thousands of them; "augmented": flips, turns by 90 degrees, scale and shift
  raw float32  numpy.load(mmap_mode="r") and a copy; "reopened" likewise. Also float16, made float32
  MONAI        PersistentDataset with RandSpatialCropSamples, 1 or 4 crops of each volume that it loads
  nnU-Net      nnUNetDatasetBlosc2 (float32, its own chunks and filters) and the crop as its loader takes it, without
               that of the labels; where nnunetv2 can be imported
The sides take turns; crops are compared with those of the raw arrays. All files are in the page cache: a disk that is
slower than memory adds its time by the bytes read, which the sizes tell.

Floor, before the first run (codecs were tried): a 96^3 crop is 3.5 MB of float32, 0.3 ms at 10 GB/s, and raw
arrays take little more. Blocks of 16 x 32 x 32 that a crop touches have 2.0 times its voxels: 3.6 MB of float16 through
a decoder of 2 GB/s. Prediction: 2.2 ms with LZ4, 2.3 to 4 times the raw arrays in a quarter of their bytes; the goal of
1.3 times would be missed on the crop alone, and met only where raw files are opened anew. MONAI reads the whole volume,
336 MB at 2 GB/s: 0.17 s, 100 times as long.

Outcome, on one core of a machine that other work kept busy (load 6, real-time priority): a 96^3 crop takes 1.3 ms,
reopened 2.0, in 0.16 of the bytes; raw float32 0.40 and 0.79, nnU-Net 3.2 in 0.39 of the bytes. A 160^3 crop takes 6.7
and 8.8 ms, raw 2.4 and 2.9, nnU-Net 9.7. So the goal against raw arrays is missed by a factor of two, as foreseen. LZ4
without a filter, in 0.25 of the bytes, comes to 1.6 to 2.2 times the raw arrays where this is 2.2 to 2.9 (in one run):
not enough to meet it, and more to read where files are not in memory. LZ4HC, which was not foreseen, is read faster
than LZ4 under a shuffle, and is smaller; zstd takes 3 times as long or more for a tenth of the bytes. MONAI takes 53 ms
with 4 crops of each volume, 232 with one: nearly all of it is the kernel handing out the memory of a whole volume.
Where the allocator happens to keep that memory, as in parts of two earlier runs, 4 crops of each took 7.5 ms at 96^3
and 8.8 at 160^3, 5 and 1.6 times ours.

    python benchmarks/loader.py [--repeats 9] [--crops 12] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from renderer import cpu_name
from torch import Tensor

import medgmae
from medgmae.data import Augmentation, Crops, Grid, PreparedScan, Volume, prepare_scans

HERE = Path(__file__).parent
COUNT = 3
SIZES = (96, 160)
INPUT = {"modality": "CT", "spacing": [1.0, 0.7, 0.7], "resample": {"to": "spacing"}, "window": [-175, 250]}
# Codec, filter, level and block (d, h, w); chunks are those of the library.
CODECS = [
    *[("LZ4", kind, 5, (16, 32, 32)) for kind in ("NOFILTER", "SHUFFLE", "BITSHUFFLE")],
    *[("LZ4HC", kind, 5, (16, 32, 32)) for kind in ("NOFILTER", "SHUFFLE", "BITSHUFFLE")],
    *[("LZ4HC", "SHUFFLE", 5, block) for block in ((16, 16, 16), (16, 16, 32), (32, 32, 32), (32, 32, 64))],
    ("LZ4HC", "SHUFFLE", 9, (16, 32, 32)),
    *[("ZSTD", kind, 1, (16, 32, 32)) for kind in ("SHUFFLE", "BITSHUFFLE")],
    ("ZSTD", "SHUFFLE", 5, (16, 32, 32)),
]
AUGMENTATION = Augmentation(flip=0.5, rotate90=0.5, scale=(1.0, (-0.1, 0.1)), shift=(1.0, (-0.1, 0.1)))
# Dense bfloat16 of an H200 by its data sheet, and the share of it that training of such models is assumed to reach.
PEAK, SHARE = 989e12, 0.4
MODELS: dict[int, list[str]] = {
    96: ["mae_vit_base_patch16_96", "gmae_vit_base_patch16_96"],
    160: [],
}  # of scans the count says nothing


@dataclass(frozen=True)
class Scan:
    """A scan as a listing has it."""

    path: Path
    name: str
    series: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] | None = None


def make_scan(path: Path, seed: int) -> None:
    """An int16 CT of 448 x 448 x 256 voxels of 0.8 x 0.8 x 1.25 mm."""
    rng = np.random.default_rng(seed)
    size = (256, 448, 448)
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in size)]
    organs = 40 + 60 * np.sin(9 * x + 4 * z + seed) * np.cos(7 * y)
    hollow = np.sin(5 * x - 2 * y) * np.cos(4 * z + 3 * y + seed) > 0.75
    body = (y / 0.75) ** 2 + (x / 0.9) ** 2 + 0 * z < 1
    hu = np.where(body, np.where(hollow, -850, organs), -1000).astype(np.float32)
    hu += 15 * rng.standard_normal(size, np.float32)
    voxels = torch.from_numpy(hu.round().clip(-1024, 3071).astype(np.int16))[None]
    Volume(voxels, Grid(size, (1.25, 0.8, 0.8))).save(path)


class Sides:
    """What gives a crop of ``size`` at a position; all but MONAI at the place that ours draws there."""

    def __init__(self, folder: Path, size: int, scans: list[PreparedScan]) -> None:
        self.folder, self.scans, self.size = folder, scans, size
        self.crops = Crops(scans, (size,) * 3, per_scan=100)
        self.changed = Crops(scans, (size,) * 3, per_scan=100, augmentation=AUGMENTATION)
        samples = [self.crops[position] for position in range(len(self.crops))]
        self.places = [(sample["scan"], sample["start"]) for sample in samples]
        names = ("float32", "float16")
        self.paths = {name: [folder / f"{name}_{number}.npy" for number in range(len(scans))] for name in names}
        self.kept = {name: [np.load(path, mmap_mode="r") for path in paths] for name, paths in self.paths.items()}

    def part(self, position: int) -> tuple[int, tuple[slice, ...]]:
        """The volume and the slices of a crop."""
        place, start = self.places[position]
        return place, (slice(None), *(slice(first, first + self.size) for first in start))

    def ours(self, position: int) -> Tensor:
        """As a data loader asks."""
        return self.crops[position]["x"]

    def raw(self, name: str, position: int) -> Tensor:
        """From an array that stays mapped."""
        place, part = self.part(position)
        return torch.from_numpy(np.array(self.kept[name][place][part])).float()

    def raw_reopened(self, name: str, position: int) -> Tensor:
        """From an array that is mapped for this crop."""
        place, part = self.part(position)
        return torch.from_numpy(np.array(np.load(self.paths[name][place], mmap_mode="r")[part])).float()

    def touch(self, position: int) -> None:
        """Make the file one that is not open yet."""
        os.utime(self.scans[self.places[position][0]].path)

    def all(self) -> dict[str, Callable[[int], Tensor]]:
        """By name."""
        sides: dict[str, Callable[[int], Tensor]] = {
            "ours": self.ours,
            "ours, reopened": self.ours,
            "raw float32": lambda position: self.raw("float32", position),
            "raw float32, reopened": lambda position: self.raw_reopened("float32", position),
            "raw float16": lambda position: self.raw("float16", position),
            "raw float16, reopened": lambda position: self.raw_reopened("float16", position),
        }
        if (rival := nnunet(self)) is not None:
            sides["nnU-Net"] = rival
        return sides


def nnunet(sides: Sides) -> Callable[[int], Tensor] | None:
    """nnU-Net's data set and crop, if it is there."""
    try:
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    except ImportError:
        return None
    folder = sides.folder / f"nnunet_{sides.size}"
    if not folder.exists():
        folder.mkdir()
        for number, path in enumerate(sides.paths["float32"]):
            data = np.load(path)
            blocks, chunks = comp_blosc2_params(data.shape, (sides.size,) * 3, data.itemsize)
            labels = np.zeros((1, 8, 8, 8), np.int8)
            nnUNetDatasetBlosc2.save_case(
                data, labels, {}, str(folder / str(number)), chunks, blocks, labels.shape, labels.shape
            )
    cases = nnUNetDatasetBlosc2(str(folder), [str(number) for number in range(len(sides.scans))])

    def crop(position: int) -> Tensor:
        place, start = sides.places[position]
        data, _, _, _ = cases.load_case(str(place))
        return torch.from_numpy(crop_and_pad_nd(data, [[s, s + sides.size] for s in start], 0)).float()

    return crop


class Monai:
    """PersistentDataset with RandSpatialCropSamples; its cache holds the volume as it is before the crops."""

    def __init__(self, sides: Sides, samples: int) -> None:
        from monai.data import NumpyReader, PersistentDataset
        from monai.transforms import Compose, LoadImage, RandSpatialCropSamples

        self.sides, self.samples = sides, samples
        load = LoadImage(reader=NumpyReader(channel_dim=0), image_only=True, ensure_channel_first=True)
        self.random = RandSpatialCropSamples((sides.size,) * 3, samples, random_size=False)
        self.random.set_random_state(0)
        paths = [str(path) for path in sides.paths["float32"]]
        self.data = PersistentDataset(paths, Compose([load, self.random]), sides.folder / "monai")
        for position in range(len(paths)):
            self(position)
        os.sync()

    def __call__(self, position: int) -> Tensor:
        """All crops of one volume, at places of its own."""
        return torch.stack([torch.as_tensor(crop) for crop in self.data[position % len(self.sides.scans)]])

    def differs(self) -> float:
        """Largest difference of a crop from the raw array, at the place where one of its voxels is found."""
        crop, volume = self(1)[-1].numpy(), self.sides.kept["float32"][1]
        voxel = np.argwhere((crop > 0.3) & (crop < 0.7))[0]
        places = np.argwhere(volume == crop[tuple(voxel)]) - voxel
        parts = [volume[tuple(slice(a, a + n) for a, n in zip(place, crop.shape, strict=True))] for place in places]
        return min(float(np.abs(crop - part).max()) for part in parts if part.shape == crop.shape)


def differences(sides: Sides) -> dict[str, float]:
    """Largest difference of each side from the raw float32 arrays, over a few crops."""
    return {
        name: max(float((run(position) - sides.raw("float32", position)).abs().max()) for position in range(0, 300, 40))
        for name, run in sides.all().items()
    }


def measure(sides: Sides, repeats: int, crops: int) -> dict[str, Any]:
    """Seconds per crop, by side."""
    runs = sides.all()
    monai = {f"MONAI, {count} of each": Monai(sides, count) for count in (1, 4)}
    differ = {**differences(sides), **{name: run.differs() for name, run in monai.items()}}
    if max(value for name, value in differ.items() if "16" in name or "ours" in name) > 2**-11 or max(
        value for name, value in differ.items() if "16" not in name and "ours" not in name
    ):
        raise SystemExit(f"the sides disagree: {differ}")
    runs["ours, augmented"] = lambda position: sides.changed[position]["x"]
    times: dict[str, list[float]] = {name: [] for name in (*runs, *monai)}
    for repeat in range(repeats):
        positions = range(repeat * crops, (repeat + 1) * crops)
        for name, run in runs.items():
            spent = 0.0
            for position in positions:
                if name == "ours, reopened":
                    sides.touch(position)
                begin = time.perf_counter()
                run(position)
                spent += time.perf_counter() - begin
            times[name].append(spent / crops)
        for name, rival in monai.items():
            rival(repeat)  # the memory of a volume is then at hand, which it is not in a process that does more
            begin = time.perf_counter()
            rival(repeat)
            times[name].append((time.perf_counter() - begin) / rival.samples)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "crops_per_second": {name: round(1 / value, 1) for name, value in medians.items()},
        "milliseconds": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "times_ours": {name: round(value / medians["ours"], 2) for name, value in medians.items()},
        "times_ours_reopened": {name: round(value / medians["ours, reopened"], 2) for name, value in medians.items()},
        "largest_difference": differ,
    }


def codecs(folder: Path, size: int, repeats: int) -> list[dict[str, Any]]:
    """Bytes, and milliseconds of a crop, of one volume by codec, filter, level and block."""
    import blosc2

    rows = []
    for dtype in ("float16", "float32"):
        voxels = np.load(folder / f"{dtype}_0.npy")
        for codec, kind, level, block in CODECS:
            chunk = [min(n, -(-size // b) * b) for n, b in zip(voxels.shape[1:], block, strict=True)]
            options = {"codec": blosc2.Codec[codec], "filters": [blosc2.Filter[kind]], "clevel": level, "nthreads": 1}
            begin = time.perf_counter()
            array = blosc2.asarray(voxels, chunks=(1, *chunk), blocks=(1, *block), cparams=options)
            content = array.to_cframe()
            seconds = time.perf_counter() - begin
            path = folder / "codec.b2nd"
            path.write_bytes(content)
            stored = blosc2.open(str(path), mmap_mode="r", dparams={"nthreads": 1})
            rng, times = np.random.default_rng(0), []
            for _ in range(8 * repeats):
                start = [int(rng.integers(n - size + 1)) for n in voxels.shape[1:]]
                crop = np.empty((1, size, size, size), dtype)
                begin = time.perf_counter()
                stored.get_slice_numpy(crop, ((0, *start), (1, *(first + size for first in start))))
                times.append(time.perf_counter() - begin)
            rows.append(
                {
                    "dtype": dtype,
                    "codec": codec,
                    "filter": kind,
                    "level": level,
                    "block": block,
                    "share_of_float32": round(len(content) / voxels.size / 4, 4),
                    "compress_seconds": round(seconds, 2),
                    "crop_milliseconds": round(1e3 * statistics.median(times), 3),
                }
            )
            path.unlink()
    return rows


def needs(size: int, crops_per_second: float) -> dict[str, Any]:
    """An estimate, nothing measured on a GPU: the most crops per second that an H200 can train, by the floating-point
    operations that torch counts in a forward pass (times 3 for a step; renderers, which are not in the count, make it
    fewer), and the cores that cut as many, augmented."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = {}
    for name in MODELS[size]:
        model = medgmae.create_model(name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.rand(1, 1, size, size, size))
        rate = PEAK * SHARE / (3 * counter.get_total_flops())
        rows[name] = {
            "forward_gflop": round(counter.get_total_flops() / 1e9, 1),
            "estimated_most_crops_per_second": round(rate),
            "estimated_cores": math.ceil(rate / crops_per_second),
        }
    return rows


@contextmanager
def files(given: Path | None) -> Iterator[Path]:
    """Where the volumes are: they stay in a folder that is given."""
    if given is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        given.mkdir(exist_ok=True, parents=True)
        yield given


def prepared(folder: Path, size: int) -> tuple[list[PreparedScan], float]:
    """The scans, prepared for crops of ``size``, and the seconds it took."""
    scans = [Scan(folder / f"{number}.nii", str(number)) for number in range(COUNT)]
    for number, scan in enumerate(scans):
        if not scan.path.exists():
            make_scan(scan.path, number)
    begin = time.perf_counter()
    done = prepare_scans(scans, folder / f"prepared_{size}", INPUT, crop=size, progress=False)
    seconds = time.perf_counter() - begin
    transform = medgmae.create_transform(INPUT, whole=True)
    for number, scan in enumerate(scans):
        if not (folder / f"float32_{number}.npy").exists():
            volume = transform(scan.path).data.numpy()
            np.save(folder / f"float32_{number}.npy", volume)
            np.save(folder / f"float16_{number}.npy", volume.astype(np.float16))
    return done.scans, seconds


def megabytes(folder: Path) -> dict[str, float]:
    """Size on disk of a volume, by kind."""
    kinds = {"raw float32": "float32_*", "raw float16": "float16_*", "ours, for 96": "prepared_96/*.b2nd"}
    kinds |= {"ours, for 160": "prepared_160/*.b2nd", "MONAI": "monai/*.pt", "nnU-Net, for 96": "nnunet_96/?.b2nd"}
    sizes = {name: [path.stat().st_size for path in folder.glob(pattern)] for name, pattern in kinds.items()}
    return {name: round(statistics.mean(values) / 1e6, 1) for name, values in sizes.items() if values}


def main() -> None:
    """Print a table and write results/loader.json."""
    import blosc2
    import monai

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--crops", type=int, default=12, help="in a turn")
    parser.add_argument("--folder", type=Path, help="keep the volumes here (4 GB), and take them from here")
    parser.add_argument("--out", type=Path, default=HERE / "results/loader.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with files(options.folder) as folder:
        cases, seconds = {}, {}
        for size in SIZES:
            scans, seconds[size] = prepared(folder, size)
            sides = Sides(folder, size, scans)
            sides.all()
            os.sync()  # else the disk is still busy with what was written
            cases[size] = measure(sides, options.repeats, options.crops)
            cases[size]["estimate_for_an_h200"] = needs(size, cases[size]["crops_per_second"]["ours, augmented"])
            for name, rate in cases[size]["crops_per_second"].items():
                print(f"{size}^3  {name:24} {rate:8.1f} crops/s   {cases[size]['times_ours'][name]:8.2f} x ours")
        table = codecs(folder, SIZES[0], options.repeats)
        sizes = megabytes(folder)
    report = {
        "volume": {"size": list(scans[0].size), "spacing": list(scans[0].spacing), "foreground": scans[0].foreground},
        "cases": cases,
        "megabytes_per_volume": sizes,
        "share_of_raw_float32": {name: round(value / sizes["raw float32"], 3) for name, value in sizes.items()},
        "seconds_to_prepare_a_scan": {size: round(value / COUNT, 2) for size, value in seconds.items()},
        "codecs": table,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        | {"blosc2": blosc2.__version__, "monai": monai.__version__},
        "repeats": options.repeats,
        "crops": options.crops,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report["megabytes_per_volume"], report["seconds_to_prepare_a_scan"])


if __name__ == "__main__":
    main()
