"""Which scans lie below folders: files, DICOM series and cases of several contrasts, and what is left out, and why."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medgmae.data.contrasts import find_contrasts
from medgmae.data.formats.arrays import ENDINGS as ARRAY_ENDINGS
from medgmae.data.formats.arrays import rank_of_array
from medgmae.data.formats.dicom import find_series
from medgmae.data.geometry import VolumeError
from medgmae.data.listing import Listing, Scan
from medgmae.data.names import SCAN_ENDINGS, shown, unique_names

_STUDY, _PATIENT = 0x0020000D, 0x00100020
# What lies beside scans and is none, by the ending of its name: no reason for --strict to complain.
_BESIDE = {
    "a table or text": ".csv .tsv .xls .xlsx .ods .json .jsonl .txt .md .rst .xml .yaml .yml .ini .cfg .toml .html "
    ".pdf .doc .docx .log .bval .bvec .bvals .bvecs .md5 .sha1 .sha256 .py .sh .ipynb",
    "a picture": ".png .jpg .jpeg .gif .bmp .svg .webp .tif .tiff .eps",
    "arrays, features or weights": ".npy .npz .safetensors .parquet .pt .pth .ckpt .h5 .hdf5 .mat .ply",
    "voxels that belong to a header": ".raw .zraw .img .img.gz",
}


def find_scans(
    arguments: Sequence[Path],
    contrasts: Sequence[str] | None = None,
    series: Sequence[str] = (),
    arrays: bool = False,
) -> Listing:
    """Scans in the order given, each once, with names that set them apart.

    Folders are searched to their ends. A folder that holds files of several ``contrasts`` is one case; every DICOM
    series is a scan of its own, or with ``series``, each whose id or description matches one of these patterns. Files
    of numpy are scans with ``arrays``, those of three or four axes.

    Raises:
        VolumeError: no series matches ``series``.
    """
    search = _Search(Listing(), contrasts, [pattern.lower() for pattern in series], arrays)
    for path in arguments:
        before = len(search.listing.errors), search.met
        if os.path.isdir(path):
            search.folder(path)
            if before == (len(search.listing.errors), search.met):
                search.listing.fail(path, "no scan in this folder")
        else:
            search.argument(path)
    if series and not search.chosen:
        known = "\n  ".join(search.series[:20]) or "there are no DICOM series"
        raise VolumeError(f"series {', '.join(series)} matches none of these:\n  {known}")
    listing = search.listing
    listing.scans = _named(search.joined())
    if not listing.scans and not listing.errors:
        for path in arguments:
            listing.fail(path, f"{_beside(path) or 'nothing that was chosen'}; expected a scan")
    return listing


@dataclass(frozen=True)
class _Part:
    """What one folder holds of a series, below the folder ``top`` that was named; ``file`` is its only 2-D slice."""

    top: Path
    places: frozenset[tuple[float, ...] | None]
    file: Path | None


class _Search:
    """A walk through folders. ``met`` counts the scans met, those met before or not chosen included."""

    def __init__(
        self, listing: Listing, contrasts: Sequence[str] | None, patterns: Sequence[str], arrays: bool
    ) -> None:
        self.listing, self.contrasts, self.patterns, self.arrays = listing, contrasts, patterns, arrays
        self.scans: dict[tuple[Path, str | None], Scan] = {}
        self.parts: dict[tuple[Path, str], _Part] = {}
        self.series: list[str] = []
        self.visited: set[tuple[int, int]] = set()
        self.met = self.chosen = 0

    def add(self, scan: Scan) -> None:
        self.met += 1
        self.scans.setdefault((scan.path, scan.series), scan)

    def argument(self, path: Path) -> None:
        """A file that was named: what is known not to be a scan is left, all else is tried."""
        if problem := unreachable(path):
            self.listing.fail(path, problem)
        elif not path.is_file():
            self.listing.fail(path, "not a regular file")
        elif _is_text_or_picture(path):
            self.listing.skip(path, _beside(path), expected=True)
        else:
            self.add(Scan(path))

    def folder(self, top: Path) -> None:
        """Everything below a folder; what a folder holds comes before what its subfolders hold."""
        from tqdm.auto import tqdm

        waiting = [top]
        with tqdm(desc="looking for scans", unit=" files", disable=None, leave=False) as bar:
            while waiting:
                folder = waiting.pop()
                try:
                    state = folder.stat()
                    entries = sorted(folder.iterdir())
                except OSError as error:
                    self.listing.fail(folder, f"cannot be searched: {error.strerror or error}")
                    continue
                if (state.st_dev, state.st_ino) in self.visited:  # a link back, or the folder was named twice
                    self.met += 1
                    continue
                self.visited.add((state.st_dev, state.st_ino))
                waiting += reversed(self._inside(top, folder, entries))
                bar.update(len(entries))

    def _inside(self, top: Path, folder: Path, entries: list[Path]) -> list[Path]:
        """Take up the scans of a folder; returns its subfolders."""
        case = _case(folder, self.contrasts or ())
        if len(case) >= min(2, len(self.contrasts or ())) > 0:  # reading it says what is missing or there twice
            self.add(Scan(folder))
            for path in entries:
                if path not in case:
                    self.listing.skip(path, "in the folder of a case, none of its contrasts", expected=True)
            return []
        subfolders: list[Path] = []
        dicom: list[Path] = []
        for path in entries:
            name = path.name.lower()
            if name.startswith("."):
                self.listing.skip(path, "hidden", expected=True)
            elif problem := unreachable(path):
                if os.path.islink(path):  # Path.is_symlink fails in a folder that is closed
                    self.listing.skip(path, "a link to nowhere")
                else:
                    self.listing.fail(path, problem)
            elif path.is_dir():
                if name.endswith(".partial") and any(os.path.exists(path / file) for file in ("run.json", "lock")):
                    self.listing.skip(path, "results of a run that is not finished", expected=True)
                else:
                    subfolders.append(path)
            elif not path.is_file():
                self.listing.skip(path, "not a regular file")
            elif name.endswith(SCAN_ENDINGS):
                self.add(Scan(path))
            elif self.arrays and name.endswith(ARRAY_ENDINGS):
                if problem := _other_array(path):
                    self.listing.skip(path, problem, expected=True)
                else:
                    self.add(Scan(path))
            elif _is_text_or_picture(path):
                self.listing.skip(path, _beside(path), expected=True)
            elif _is_dicom(path):
                dicom.append(path)
            else:
                self.listing.skip(path, _beside(path) or "not recognised as a scan", expected=bool(_beside(path)))
        if dicom:
            self._add_series(top, folder, dicom)
        if not entries:
            self.listing.skip(folder, "an empty folder")
        return subfolders

    def _add_series(self, top: Path, folder: Path, files: list[Path]) -> None:
        try:
            all_series = find_series(folder, recursive=False)
        except (VolumeError, OSError) as error:  # a slice that cannot be read may be of any of them
            reason = str(error).removeprefix(f"{folder}: ")
            if isinstance(error, OSError) and error.filename:
                reason = f"{Path(error.filename).name} cannot be read: {error.strerror}"
            self.met += 1
            self.listing.fail(folder, reason)
            return
        images = {one.path for series in all_series for one in series.slices}
        for path in files:
            if path not in images:
                self.listing.skip(path, "a DICOM object that is no image", expected=True)
        for series in all_series:
            about = shown(f"{series.modality} {series.description}".strip())
            self.series.append(f"{shown(series.uid)}  {about}  {len(series.slices)} file(s) in {shown(folder)}")
            if self.patterns and not any(
                fnmatch.fnmatchcase(text.lower(), pattern)
                for text in (series.uid, shown(series.uid), series.description)
                for pattern in self.patterns
            ):
                self.met += 1
                self.listing.skip(folder, f"series {shown(series.uid)} ({about}) is not chosen", expected=True)
                continue
            self.chosen += 1
            flat = len(series.slices) == 1 and not series.slices[0].enhanced
            places = frozenset(one.position for one in series.slices)
            first = series.slices[0].data
            study, patient = first.text(_STUDY) or None, first.text(_PATIENT) or None
            slices = tuple(one.path for one in series.slices)
            self.add(Scan(folder, series.uid, about=about, files=slices, study=study, patient=patient))
            self.parts[folder, series.uid] = _Part(top, places, series.slices[0].path if flat else None)

    def joined(self) -> list[Scan]:
        """The scans. A series whose slices lie in several folders, each at places of its own, is one scan of the folder
        above them; copies of a series share their places, and stay apart; where only some places are shared, nobody
        can tell which slices are one scan. A single 2-D image is no scan."""
        keys_of: dict[tuple[Path, str], list[tuple[Path, str]]] = {}
        for key, part in self.parts.items():
            keys_of.setdefault((part.top, key[1]), []).append(key)
        for (_, uid), keys in keys_of.items():
            places = [self.parts[key].places for key in keys]
            together, folder = frozenset().union(*places), Path(os.path.commonpath([path for path, _ in keys]))
            if uid and len(together) < sum(map(len, places)) and any(one != together for one in places):
                where = ", ".join(shown(path) for path, _ in keys[:5])
                self.listing.fail(
                    folder,
                    f"series {uid} lies in {len(keys)} folders that have some of its slices in common, and others not: "
                    f"{where}; expected copies, or parts that share nothing",
                )
                for key in keys:
                    del self.scans[key]
                continue
            if uid and len(keys) > 1 and len(together) == sum(map(len, places)):
                files = [file for key in keys for file in self.scans[key].files or ()]
                self.scans[keys[0]] = replace(self.scans[keys[0]], path=folder, files=tuple(files))
                for key in keys[1:]:
                    del self.scans[key]
                continue
            for key in keys:
                if (file := self.parts[key].file) is not None:
                    about = self.scans.pop(key).about
                    self.listing.skip(file, f"series {shown(uid)} ({about}) is one 2-D image")
        return list(self.scans.values())


def _case(folder: Path, contrasts: Sequence[str]) -> set[Path]:
    """The files of one case's contrasts, where a folder holds one file of a contrast."""
    files: set[Path] = set()
    for name in contrasts:
        with contextlib.suppress(VolumeError):
            files.update(find_contrasts(folder, [name]).values())
    return files


def _beside(path: Path) -> str:
    """What a file is that lies beside scans; empty when its ending does not say it."""
    name = path.name.lower()
    ending = ".img.gz" if name.endswith(".img.gz") else path.suffix.lower()
    return next((what for what, endings in _BESIDE.items() if ending in endings.split()), "")


def unreachable(path: Path) -> str:
    """Why nothing can be said of a path: it is not there, a folder above it is closed, its name is too long. Empty when
    it is there."""
    try:
        path.stat()
    except FileNotFoundError:
        return "no such file or folder"
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return ""


def _is_text_or_picture(path: Path) -> bool:
    return path.suffix != "" and _beside(path) in ("a table or text", "a picture")


def _other_array(path: Path) -> str:
    """What an array is that is not a volume; empty for one that is, and for a file that reading will refuse."""
    with contextlib.suppress(VolumeError, OSError):
        if (rank := rank_of_array(path)) not in (3, 4):
            return f"an array of {rank} axes, not 3 or 4"
    return ""


def _is_dicom(path: Path) -> bool:
    """By content, or by name: a broken slice is not another kind of file, nor is one that cannot be opened."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return True


def _named(scans: Sequence[Scan]) -> list[Scan]:
    """The scans with their names: a series goes by its folder's, and by its own id where the folder has several."""
    count: dict[Path, int] = {}
    for scan in scans:
        count[scan.path] = count.get(scan.path, 0) + 1
    paths = [scan.path / scan.series if scan.series and count[scan.path] > 1 else scan.path for scan in scans]
    return [replace(scan, name=name) for scan, name in zip(scans, unique_names(paths), strict=True)]
