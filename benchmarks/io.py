"""File -> model-ready tensor: a 512 x 512 x 300 CT as .nii.gz, against a MONAI pipeline that does the same steps.

Steps: load, orient to RAS (x, y, z), resample to 1.5 mm (linear, first voxel kept, edges repeated), window [-175, 250]
to [0, 1], then
  whole   the whole field of view, padded or cropped to 240 x 240 x 208, for a sliding window
  crop    the 96^3 centre crop that a model takes
The scan is made here: the chest CT of examples/data enlarged, with noise so that it compresses about as badly as a
real one.

Floor, written before tuning. The voxels are 157 MB behind a gzip stream, which one core inflates at about 250 MB/s:
0.6 s that nobody avoids without another inflate library. Copying 157 MB costs 0.03 s. Linear resampling to 11.4 million
voxels in three one-dimensional passes, first along the axis that shrinks most, touches about 157 + 2 x 75 + 2 x 46 MB:
0.2 s. Prediction: 1.0 s whole and 0.75 s for the crop, of which little but the inflate is left. MONAI inflates through
nibabel, converts 78.6 million voxels to float32, and interpolates at every output voxel: 3 s or more for both.

Outcome, on two cores that other work kept busy (load 5). The inflate takes 0.8 s of processor time, 1.7 s by the clock;
the whole preparation 2.1 s and the crop 1.9 s, MONAI 8.6 and 8.2 s. The inflate was foreseen a third too cheap, the
passes were foreseen all wrong: as torch operations over the whole volume they took 10 s, with permuted memory, a gather
along the fastest axis and a barrier between threads at every step. Plane by plane in numpy, every intermediate stays in
cache and the same passes take 0.13 s. What is left is the inflate; isal and zlib-ng need 0.56 and 0.64 times zlib's
processor time, which did not seem worth a dependency. With the machine to itself: 1.0 s and 0.9 s, 0.84 s of it the
inflate; MONAI 3.8 and 3.5 s. results/io.json has the latest run.

    python benchmarks/io.py [--repeats 5] [--threads N]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgmae import create_transform

HERE = Path(__file__).parent
INPUT = {
    "modality": "CT",
    "orientation": "RAS",
    "axes": "xyz",
    "spacing": [1.5, 1.5, 1.5],
    "resample": {"to": "spacing", "interpolation": "linear", "origin": "first_voxel"},
    "window": [-175, 250],
    "crop": ["center"],
}
SIZES = {"whole": (240, 240, 208), "crop": (96, 96, 96)}


def make_scan(path: Path) -> None:
    """A deterministic 512 x 512 x 300 int16 CT of 0.7 x 0.7 x 1.0 mm."""
    import SimpleITK as sitk

    thorax = sitk.ReadImage(str(HERE.parent / "examples/data/ct_thorax.nii.gz"), sitk.sitkFloat32)
    old = np.array(thorax.GetSize()) * np.array(thorax.GetSpacing())
    size = (512, 512, 300)
    large = sitk.Resample(
        thorax,
        size,
        sitk.Transform(),
        sitk.sitkLinear,
        thorax.GetOrigin(),
        (old / size).tolist(),
        thorax.GetDirection(),
        -1000.0,
    )
    voxels = sitk.GetArrayFromImage(large) + np.random.default_rng(0).normal(0, 12, large.GetSize()[::-1]).astype(
        np.float32
    )
    image = sitk.GetImageFromArray(voxels.round().clip(-1024, 3071).astype(np.int16))
    image.SetSpacing((0.7, 0.7, 1.0))
    image.SetOrigin((-179.0, -179.0, 20.0))
    sitk.WriteImage(image, str(path), True)


def ours(size: tuple[int, int, int]) -> Callable[[Path], torch.Tensor]:
    """The library's preparation."""
    transform = create_transform({**INPUT, "size": list(size)})
    return lambda path: transform(path).tensor


def monai(size: tuple[int, int, int]) -> Callable[[Path], torch.Tensor]:
    """The same steps in MONAI, as its tutorials write them."""
    from monai import transforms as mt

    pipeline = mt.Compose(
        [
            mt.LoadImage(image_only=True, ensure_channel_first=True),
            mt.Orientation(axcodes="RAS"),
            mt.Spacing(pixdim=(1.5, 1.5, 1.5), mode="bilinear"),
            mt.ScaleIntensityRange(a_min=-175, a_max=250, b_min=0.0, b_max=1.0, clip=True),
            mt.ResizeWithPadOrCrop(size),
        ]
    )
    return lambda path: pipeline(str(path))[None].as_tensor()


def clock(run: Callable[[Path], torch.Tensor], path: Path) -> tuple[float, torch.Tensor]:
    """Seconds and result of one run, garbage collected before."""
    gc.collect()
    started = time.perf_counter()
    result = run(path)
    return time.perf_counter() - started, result


def floor(path: Path) -> float:
    """Seconds to read and inflate the file with zlib, which both sides have to do."""
    started = time.perf_counter()
    zlib.decompress(path.read_bytes(), 31, 160 << 20)
    return time.perf_counter() - started


def disagreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; an odd pad may sit on either side, so shifts of one voxel are allowed for."""
    assert one.shape == other.shape, (one.shape, other.shape)
    best = float("inf")
    for shift in np.ndindex(3, 3, 3):
        moved = torch.roll(other, tuple(s - 1 for s in shift), (2, 3, 4))
        best = min(best, float((one - moved).abs().max()))
        if best < 1e-3:
            break
    return best


def compare(path: Path, repeats: int) -> dict[str, Any]:
    """Medians and ratios per case; the two sides take turns."""
    cases: dict[str, Any] = {}
    for name, size in SIZES.items():
        sides = {"ours": ours(size), "monai": monai(size)}
        results = {side: clock(run, path)[1] for side, run in sides.items()}  # warms up imports and the file cache
        times: dict[str, list[float]] = {side: [] for side in (*sides, "inflate")}
        for _ in range(repeats):
            for side, run in sides.items():
                times[side].append(clock(run, path)[0])
            times["inflate"].append(floor(path))
        medians = {side: round(statistics.median(values), 3) for side, values in times.items()}
        ratios = [m / o for m, o in zip(times["monai"], times["ours"], strict=True)]
        cases[name] = {
            "size": size,
            "seconds": medians,
            "speedup": round(statistics.median(ratios), 2),
            "speedup_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "largest_difference": disagreement(results["ours"], results["monai"]),
        }
    return cases


def main() -> None:
    """Prints a table and writes results/io.json."""
    import monai as monai_package
    import nibabel
    import SimpleITK

    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scan", type=Path, help="keep the scan here, and take it from here when it is there")
    parser.add_argument("--out", type=Path, default=HERE / "results/io.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = options.scan or Path(folder) / "scan.nii.gz"
        if not path.exists():
            make_scan(path)
        cases = compare(path, options.repeats)
        megabytes = round(path.stat().st_size / 1e6, 1)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "monai": monai_package.__version__}
    versions |= {"nibabel": nibabel.__version__, "SimpleITK": SimpleITK.__version__, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0]}
    report = {
        "file_mb": megabytes,
        "cases": cases,
        "machine": machine,
        "versions": versions,
        "repeats": options.repeats,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, case in cases.items():
        print(f"{name:6} {case['seconds']}  MONAI / ours = {case['speedup']}")
        print(f"       largest difference {case['largest_difference']:.2e}")
    print(f"file {megabytes} MB; {machine}; {versions}", file=sys.stderr)


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
