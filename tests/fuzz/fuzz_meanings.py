"""Scans that attack what headers mean, through ``read_volume``: each is right or refused.

    python tests/fuzz/fuzz_meanings.py --count 10000 --seed 0 [text gzip series frames]

Every case is read in a process of its own, with limits of memory and time. Outcomes other than a right volume or a
``VolumeError`` that names the path are counted as crash, hang, memory, foreign exception or silent difference. What is
right is known by how the case was made, and by independent readers: SimpleITK for headers that nothing was done to,
nibabel for NIfTI and MGH, pydicom for the pixels of a series.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from meaning_dicom import frames_case, series_case
from meaning_text import Case, gzip_case, text_case

MEMORY = 4 << 30  # bytes that a case may take
SECONDS, PATIENCE = 10, 60.0  # of work, and of waiting on a machine that does other things too
KINDS: dict[str, Callable[[random.Random, Path], Case]] = {
    "text": text_case, "gzip": gzip_case, "series": series_case, "frames": frames_case,
}  # fmt: skip


def _same(volume: Any, voxels: np.ndarray, affine: np.ndarray | None) -> str:
    """What differs between a volume and what it should be; empty for nothing."""
    data = volume.data.double().numpy()
    if data.shape != voxels.shape or not np.allclose(data, voxels, rtol=1e-6, atol=1e-4):
        apart = np.abs(data - voxels).max() if data.shape == voxels.shape else "shapes"
        return f"other voxels: {data.shape} for {voxels.shape}, {volume.dtype}, apart by {apart}"
    if affine is not None and not np.allclose(volume.affine[:, [2, 1, 0, 3]], affine, atol=1e-4):
        return f"another place: {volume.affine[:, [2, 1, 0, 3]].tolist()} for {affine.tolist()}"
    return ""


def _other_readers(case: Case, volume: Any) -> str:
    """What differs from independent readers."""
    if case.path.suffix in (".mhd", ".nhdr"):
        import SimpleITK as sitk

        image = sitk.ReadImage(str(case.path))
        array, affine = sitk.GetArrayFromImage(image).astype(np.float64), np.eye(4)
        array = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        return _same(volume, array, affine)
    if case.path.suffix in (".gz", ".mgz", ".hdr"):
        import nibabel

        image = nibabel.load(case.path)
        return _same(
            volume, np.asarray(image.dataobj).astype(np.float64).T[None], np.diag([-1.0, -1, 1, 1]) @ image.affine
        )
    return ""


def _judge(case: Case) -> str:
    """``volume``, ``refused``, or what is wrong."""
    from medgmae.data import VolumeError, read_volume

    try:
        volume = read_volume(case.path)
    except VolumeError as error:
        clear = str(case.path) in str(error) and "(0x" not in str(error)
        return "refused" if clear else f"foreign: an unclear message: {error}"
    except BaseException as error:
        return f"foreign: {type(error).__name__}: {error}"
    if case.refuse:
        return f"silent: read, and had to be refused: {volume}"
    wrong = "" if case.voxels is None else _same(volume, case.voxels, case.affine)
    if not wrong and not case.alone:
        try:
            wrong = _other_readers(case, volume)
        except Exception:  # a file that only we read: nothing to compare with
            wrong = ""
        wrong = wrong and f"another reader has {wrong}"
    return f"silent: {wrong}" if wrong else "volume"


def _run(case: Case, pipe: int) -> None:
    """Judges a case in this process, which ends with it."""
    try:
        with open("/proc/self/statm") as statm:
            held = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            verdict = _judge(case)
        except BaseException:
            verdict = f"broken judge: {traceback.format_exc()}"
        os.write(pipe, verdict.encode("utf-8", "replace")[:4000])
    finally:
        os._exit(0)


def judged(case: Case) -> str:
    """The verdict of a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(case, writer)
    os.close(writer)
    ready = select.select([reader], [], [], PATIENCE)[0]
    verdict = os.read(reader, 4000).decode() if ready else "hang"
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if verdict:
        return verdict
    code = os.waitstatus_to_exitcode(status)
    return "hang" if code == -signal.SIGXCPU else f"crash: code {code}"


def fuzz(kinds: list[str], count: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` cases by kind and verdict, and a line for every wrong one."""
    import logging
    import warnings

    import highdicom  # noqa: F401  imported before the processes part
    import nibabel  # noqa: F401
    import SimpleITK  # noqa: F401

    import medgmae.data  # noqa: F401

    logging.getLogger("medgmae").setLevel(logging.ERROR)
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:  # what is imported at the first use is so before the processes part
            (first := Path(name) / kind).mkdir()
            _judge(KINDS[kind](random.Random("first"), first))
        for number in range(count):
            kind, folder = kinds[number % len(kinds)], Path(name) / f"case{number}"
            folder.mkdir()
            case = KINDS[kind](random.Random(f"{seed}-{number}"), folder)
            verdict = judged(case)
            outcomes[f"{kind} {verdict.split(':')[0]}"] += 1
            if verdict not in ("volume", "refused"):
                bad.append(f"case {number} of seed {seed} ({case.what}): {verdict}")
                if keep is not None:
                    shutil.copytree(
                        folder, keep / f"case{number}", symlinks=True, ignore=shutil.ignore_patterns("pipe")
                    )
            shutil.rmtree(folder)
    return outcomes, bad


def main(arguments: list[str] | None = None) -> int:
    """Runs the fuzzer; exit code 1 when any outcome was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all by default")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the cases with a wrong outcome")
    options: Any = parser.parse_args(arguments)
    started = time.perf_counter()
    outcomes, bad = fuzz(options.kinds or list(KINDS), options.count, options.seed, options.keep)
    for line in [*(f"{key:24} {number}" for key, number in sorted(outcomes.items())), *bad]:
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"{options.count} cases, {len(bad)} wrong outcomes, {time.perf_counter() - started:.0f} s\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
