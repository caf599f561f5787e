"""Corrupted scans through ``read_volume``: every outcome must be a valid Volume or a VolumeError.

    python tests/fuzz/fuzz_volumes.py --count 10000 --seed 0

Files are small NIfTI, MetaImage, NRRD and DICOM volumes with bytes flipped, cut, repeated or overwritten, headers
above all. They are read in a worker process with a memory limit, so that a crash, a hang or a huge allocation of a
native reader is caught, counted and shown with its file. A damaged file that still is a valid one (a flipped voxel of
a format without a checksum) may load; it must then have finite voxels and a proper geometry. Files whose checksum
covers the voxels (.nii.gz) must not load with other voxels.
"""

from __future__ import annotations

import argparse
import locale
import multiprocessing
import multiprocessing.connection
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 3 << 30  # bytes that the worker may hold beyond what its imports take
PATIENCE = 20.0  # seconds for one file
SERIES = "-series"  # a folder of slices, the last of which is damaged
SLICES = 5
VOXELS = ((np.arange(6 * 8 * 10).reshape(6, 8, 10) * 7) % 500).astype(np.int16)
SEALED = "sealed"  # name of files whose checksum covers what was damaged
SUFFIXES = (".nii", ".nii.gz", ".mha", "-zip.mha", ".nrrd", "-raw.nrrd", ".dcm", SERIES)


def write_series(folder: Path) -> list[Path]:
    """A DICOM series of ``SLICES`` CT slices, 2.5 mm apart."""
    import SimpleITK as sitk

    paths = [folder / f"{k}.dcm" for k in range(SLICES)]
    for k, path in enumerate(paths):
        plane = sitk.GetImageFromArray((np.arange(80, dtype=np.int16).reshape(8, 10) * 7 + k) % 500 - 100)
        tags = {
            "0008|0060": "CT",
            "0018|0050": "2.5",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(k),
            "0020|0032": f"10\\-20\\{5 + 2.5 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.Execute(plane)
    return paths


def make_seeds(folder: Path) -> dict[str, bytes]:
    """One small intact file per format, as bytes by suffix; the intact slices of the series stay in ``folder /
    SERIES``."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((10.0, -20.0, 5.0))
    kinds = {".nii": sitk.sitkFloat32, "-raw.nrrd": sitk.sitkFloat32, ".dcm": sitk.sitkUInt16}
    seeds = {}
    for suffix in SUFFIXES[:-1]:
        path = folder / f"seed{suffix}"
        zipped = suffix in (".nii.gz", "-zip.mha", ".nrrd")
        sitk.WriteImage(sitk.Cast(image, kinds.get(suffix, sitk.sitkInt16)), str(path), useCompression=zipped)
        seeds[suffix] = path.read_bytes()
    (folder / SERIES).mkdir()
    seeds[SERIES] = write_series(folder / SERIES)[-1].read_bytes()
    return seeds


def _header_length(content: bytes, suffix: str) -> int:
    if suffix in (".nii", ".nii.gz"):
        return 352
    if suffix in (".dcm", SERIES):
        return min(len(content), 1600)
    end = re.search(rb"ElementDataFile = LOCAL\n|\n\n", content)
    return end.end() if end else 400


def _damage(content: bytes, header: int, rng: random.Random) -> bytes:
    """One to three kinds of damage, two in three of them within the header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        limit = header if rng.random() < 0.67 else len(data)
        at = rng.randrange(max(1, min(limit, len(data))))
        kind = rng.choice(("bits", "bytes", "cut", "insert", "number", "zero", "repeat", "digits"))
        if kind == "bits":
            data[at : at + 1] = bytes([(data[at] if data else 0) ^ (1 << rng.randrange(8))])
        elif kind == "bytes":
            data[at : at + 4] = rng.randbytes(4)
        elif kind == "cut":
            del data[rng.choice((at, rng.randrange(len(data) + 1))) :]
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == "number":
            value = rng.choice((0, 1, -1, 100_000, 2**31 - 1, float("nan"), float("inf"), -0.5, 1e30))
            packed = (
                struct.pack("<f", value)
                if isinstance(value, float)
                else struct.pack(rng.choice(("<i", "<q", ">i")), value)
            )
            at -= at % 4
            data[at : at + len(packed)] = packed
        elif kind == "zero":
            data[at : at + rng.randrange(1, 32)] = bytes(rng.randrange(1, 32))
        elif kind == "repeat":
            data[at:at] = data[at : at + rng.randrange(1, 128)]
        else:  # numbers in a text header
            found = list(re.finditer(rb"-?\d+\.?\d*", bytes(data[:header])))
            if found:
                spot = rng.choice(found)
                data[spot.start() : spot.end()] = rng.choice(
                    (b"0", b"-1", b"100000", b"99999999999", b"nan", b"inf", b"1e400", b"x", b"")
                )
        if not data:
            break
    return bytes(data)


def make_case(seeds: dict[str, bytes], number: int, seed: int) -> tuple[str, str, bytes]:
    """Name, suffix and content of a damaged file; the same for the same numbers."""
    import gzip

    rng = random.Random(f"{seed}-{number}")
    suffix = SUFFIXES[number % len(SUFFIXES)]
    content = seeds[suffix]
    if suffix == ".nii.gz" and rng.random() < 0.5:  # a valid gzip of a damaged file
        return f"case{number}", suffix, gzip.compress(_damage(gzip.decompress(content), 352, rng), 1)
    name = f"{SEALED}{number}" if suffix == ".nii.gz" else f"case{number}"
    return name, suffix, _damage(content, _header_length(content, suffix), rng)


def judge(path: Path) -> str:
    """``"volume"`` or ``"error"``; anything else than these two outcomes is returned in words."""
    import torch

    from medgmae.data.io import VolumeError, read_volume
    from medgmae.data.volume import Volume

    try:
        volume = read_volume(path)
    except VolumeError as error:
        return "error" if str(path) in str(error) and "(0x" not in str(error) else f"unclear message: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if not isinstance(volume, Volume) or not torch.isfinite(volume.data.double()).all():
        return "a volume that is not valid"
    if path.name.startswith(SEALED) and not np.array_equal(volume.data[0].numpy(), VOXELS):
        return f"other voxels than those that the checksum covers: {volume}"
    if path.is_dir() and volume.size[0] != SLICES:
        return f"a slice was lost in silence: {volume}"
    turned = np.abs(volume.direction.T @ volume.direction - np.eye(3)).max()
    return "volume" if min(volume.spacing) > 0 and turned < 1e-2 else f"a geometry that is not valid: {volume}"


def _work(pipe: multiprocessing.connection.Connection) -> None:
    import SimpleITK  # noqa: F401  imported before memory is limited

    import medgmae.data  # noqa: F401

    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (path := pipe.recv()) is not None:
        pipe.send(judge(path))


class Worker:
    """A process that reads files for us and may die."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, path: Path) -> str:
        """The verdict on a file; ``"crash ..."`` or ``"hang"`` when the process did not live to tell."""
        self.pipe.send(path)
        try:
            if self.pipe.poll(PATIENCE + 40.0):  # the first file waits for the imports
                return str(self.pipe.recv())
            self.process.kill()
            verdict = "hang"
        except EOFError:
            verdict = "crash"
        self.process.join()
        if verdict == "crash":
            verdict = f"crash with exit code {self.process.exitcode}"
        self._start()
        return verdict

    def close(self) -> None:
        """Ends the process."""
        self.pipe.send(None)
        self.process.join(10)


def fuzz(count: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` files by suffix and verdict, and a line for every file with a wrong outcome."""
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = locale.setlocale(locale.LC_ALL)
        seeds = make_seeds(folder)
        locale.setlocale(locale.LC_ALL, kept)  # writing DICOM leaves the process in the C locale
        worker = Worker()
        for number in range(count):
            stem, suffix, content = make_case(seeds, number, seed)
            file = folder / (f"{SERIES}/{SLICES - 1}.dcm" if suffix == SERIES else f"{stem}{suffix}")
            path = file.parent if suffix == SERIES else file
            file.write_bytes(content)
            started = time.perf_counter()
            verdict = worker.read(path)
            seconds = time.perf_counter() - started
            if number and seconds > PATIENCE:
                verdict = f"slow: {seconds:.0f} s"
            outcomes[f"{suffix} {verdict if verdict in ('volume', 'error') else 'BAD'}"] += 1
            if verdict not in ("volume", "error"):
                bad.append(f"case {number} of seed {seed} ({suffix}): {verdict}")
                if keep is not None:
                    (keep / f"case{number}{suffix}").write_bytes(content)
            file.unlink()
        worker.close()
    return outcomes, bad


def main(arguments: list[str] | None = None) -> int:
    """Runs the fuzzer; exit code 1 when any outcome was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files with a wrong outcome")
    options: Any = parser.parse_args(arguments)
    started = time.perf_counter()
    outcomes, bad = fuzz(options.count, options.seed, options.keep)
    for line in [*(f"{key:24} {count}" for key, count in sorted(outcomes.items())), *bad]:
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"{options.count} files, {len(bad)} wrong outcomes, {time.perf_counter() - started:.0f} s\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
