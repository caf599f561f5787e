"""Hostile folders of scans, and what must come of each file in them, known by how they were made."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import dicom_files
import numpy as np
import torch

from medgmae.data import Grid, Volume

SINGLE = (".nii", ".nii.gz", ".mha", ".nrrd", ".mgz", ".NII")
PAIRED = (".mhd", ".hdr")
ODD = (
    "scan", "two words ", " lead", "new\nline", "a,b", 'q"uote', "'", "=1+1", "-x", "--out", "%n%s", "#", "üñ", "三",
    os.fsdecode(b"M\xfcller"), os.fsdecode(b"\xff\xfe"), "\\x41", "\\x0a", "x" * 200, "A", "a", "a;b", "\r", "\t",
    "$(x)", "*", "[a]", "\x01\x1b[2J", "\u2028", "pooled", "con.nii", "1.2.3", "~", "?", "__metadata__",
)  # fmt: skip
BESIDE = ("notes.txt", "t.csv", "p.png", "b.json", "x.bval", "old.npy", "m.pth", "r.PDF", "s.tif")
UNKNOWN = ("a.zip", "b.nii.gz.part", "noending", "c.bin", "d.nii.bak", "e.gz")


@dataclass
class Row:
    """A scan that must be listed; ``key`` says which of the pool it is, None where reading it must fail. ``plain`` of
    files, and of series whose folder holds nothing else."""

    path: Path
    series: str | None
    key: str | None
    plain: bool = True


@dataclass
class Tree:
    """A folder: its scans, the folders and files that must be errors, and what must be skipped, True where that is
    expected."""

    top: Path
    rows: list[Row] = field(default_factory=list)
    failed: set[Path] = field(default_factory=set)
    skipped: dict[Path, bool] = field(default_factory=dict)
    of_series: set[Path] = field(default_factory=set)  # of the skipped, those that --series may leave out before


class Pool:
    """Small sound scans, as files by format and number, and as slices by id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[Path]] = {}
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            data = torch.rand(1, 8 + number, 9, 10, generator=generator)
            volume = Volume(data, Grid(tuple(data.shape[1:]), (1.0, 1.5, 2.0), (3.0, -4.0, 5.0)))
            for ending in (*SINGLE, *PAIRED):
                path = folder / f"{number}{ending}"
                self._write(volume, path)
                self.files.setdefault(ending, []).append(path)
        self.series: dict[str, list[bytes]] = {}
        for number in range(6):
            uid = f"1.2.3.{number}"
            voxels = np.random.default_rng(number).integers(0, 500, (4 + number % 3, 8, 10)).astype(np.int16)
            where = dicom_files.write_series(folder / uid, voxels, uid=uid)
            self.series[uid] = [path.read_bytes() for path in sorted(where.iterdir())]

    @staticmethod
    def _write(volume: Volume, path: Path) -> None:
        import nibabel

        if path.suffix in (".mgz", ".hdr"):
            image = volume.to_nibabel()
            kind = nibabel.MGHImage if path.suffix == ".mgz" else nibabel.Nifti1Pair
            nibabel.save(kind(np.asarray(image.dataobj).astype(np.float32), image.affine), path)
        elif path.suffix == ".NII":
            volume.save(path.with_suffix(".tmp.nii"))
            path.with_suffix(".tmp.nii").rename(path)
        elif path.suffix == ".mhd":
            volume.save(path.with_suffix(".m.mha"))
            header = path.with_suffix(".m.mha").read_bytes().partition(b"ElementDataFile = LOCAL\n")[0]
            header = header.replace(b"CompressedData = True", b"CompressedData = False")
            raw = volume.data.numpy().astype("<f4").tobytes()
            lines = [line for line in header.splitlines(True) if b"CompressedDataSize" not in line]
            path.write_bytes(b"".join(lines) + f"ElementDataFile = {path.stem}.raw\n".encode())
            path.with_suffix(".raw").write_bytes(raw)
        else:
            volume.save(path)

    def sources(self) -> dict[str, tuple[Path, str | None]]:
        """What to read for each key."""
        files = {
            f"{ending}{number}": path for ending, all_of in self.files.items() for number, path in enumerate(all_of)
        }
        return {**{key: (path, None) for key, path in files.items()}, **{u: (self.folder / u, u) for u in self.series}}

    def place(self, ending: str, number: int, path: Path) -> None:
        """Copy a scan, with its data file, to a header of any name."""
        source = self.files[ending][number]
        if ending == ".mhd":
            path.write_bytes(source.read_bytes().replace(f"{number}.raw".encode(), f"{path.stem}.raw".encode()))
            shutil.copyfile(source.with_suffix(".raw"), path.with_suffix(".raw"))
        else:
            shutil.copyfile(source, path)
        if ending == ".hdr":
            shutil.copyfile(source.with_suffix(".img"), path.with_suffix(".img"))


class Maker:
    """Fills a tree with things drawn at random; ``closed`` of a user from whom files can be shut."""

    def __init__(self, rng: random.Random, folder: Path, pool: Pool, closed: bool) -> None:
        self.rng, self.folder, self.pool, self.closed = rng, folder, pool, closed
        self.tree = Tree(folder / rng.choice(("scans", "in put", os.fsdecode(b"s\xe9"), "s.nii", "x.partial", "l\nb")))
        self.tree.top.mkdir()
        self.folders, self.count = [self.tree.top], 0
        self.uids = rng.sample(sorted(pool.series), len(pool.series))
        self.dicom: list[Path] = []  # folders of whole series, to which another may be added

    def name(self, plain: bool = False) -> str:
        """A name that was not given yet."""
        self.count += 1
        return f"v{self.count}" if plain else f"{self.rng.choice(ODD)}{self.count}"

    def new_folder(self, parent: Path | None = None) -> Path:
        path = (parent or self.rng.choice(self.folders)) / self.name()
        path.mkdir()
        return path

    def slices(self, uid: str, folder: Path, numbers: list[int] | None = None) -> list[Path]:
        """Slices of a series under names of any kind."""
        paths = []
        for k in numbers if numbers is not None else range(len(self.pool.series[uid])):
            paths.append(folder / f"{self.name()}{self.rng.choice(('.dcm', '', '.IMA', '.1'))}")
            paths[-1].write_bytes(self.pool.series[uid][k])
        return paths

    def make(self) -> Tree:
        kinds: list[Callable[[], None]] = [
            self.single, self.single, self.single, self.pair, self.one_series, self.one_series, self.split, self.copies,
            self.doubled, self.broken, self.broken, self.broken_slice, self.beside, self.beside, self.links,
            self.special, self.hidden, self.flat, self.no_image, self.subfolder, self.empty, self.torn_copies,
        ]  # fmt: skip
        kinds += [self.shut] * 4 if self.closed else []
        for _ in range(self.rng.randint(2, 9)):
            self.rng.choice(kinds)()
        self.single()
        self.tree.skipped.update({folder: False for folder in self.folders if not any(folder.iterdir())})
        return self.tree

    def single(self) -> None:
        ending, number = self.rng.choice(SINGLE), self.rng.randrange(4)
        path = self.rng.choice(self.folders) / f"{self.name()}{ending}"
        self.pool.place(ending, number, path)
        self.tree.rows.append(Row(path, None, f"{ending}{number}"))

    def pair(self) -> None:
        ending, number = self.rng.choice(PAIRED), self.rng.randrange(4)
        path = self.rng.choice(self.folders) / f"{self.name(plain=ending == '.mhd')}{ending}"
        self.pool.place(ending, number, path)
        self.tree.rows.append(Row(path, None, f"{ending}{number}"))
        self.tree.skipped[path.with_suffix(".raw" if ending == ".mhd" else ".img")] = True

    def one_series(self) -> None:
        if not self.uids:
            return
        uid = self.uids.pop()
        folder = self.rng.choice(self.dicom) if self.dicom and self.rng.random() < 0.4 else self.new_folder()
        self.dicom.append(folder)
        self.slices(uid, folder)
        self.tree.rows.append(Row(folder, uid, uid))

    def split(self) -> None:
        """Parts of a series in folders of their own, one of them perhaps behind a link."""
        if not self.uids:
            return
        uid, parent = self.uids.pop(), self.new_folder()
        one, two = self.new_folder(parent), self.new_folder(parent)
        if self.rng.random() < 0.5:
            two.rmdir()
            outside = self.folder / f"outside{self.count}"
            outside.mkdir()
            two.symlink_to(outside)
        if self.rng.random() < 0.3:
            one.rmdir()
            one = parent
        numbers = list(range(len(self.pool.series[uid])))
        self.rng.shuffle(numbers)
        at = self.rng.randint(1, len(numbers) - 1)
        self.slices(uid, one, numbers[:at])
        self.slices(uid, two, numbers[at:])
        self.tree.rows.append(Row(parent, uid, uid, plain=False))

    def copies(self) -> None:
        """A series twice, beside or below itself."""
        if not self.uids:
            return
        uid, one = self.uids.pop(), self.new_folder()
        for folder in (one, self.new_folder(one if self.rng.random() < 0.5 else None)):
            self.slices(uid, folder)
            self.tree.rows.append(Row(folder, uid, uid, plain=False))

    def torn_copies(self) -> None:
        """A copy of a series that is not whole."""
        if not self.uids:
            return
        uid, parent = self.uids.pop(), self.new_folder()
        self.slices(uid, self.new_folder(parent))
        self.slices(uid, self.new_folder(parent), list(range(3)))
        self.tree.failed.add(parent)
        self.tree.of_series.add(parent)

    def doubled(self) -> None:
        """A slice twice in one folder."""
        if not self.uids:
            return
        uid, folder = self.uids.pop(), self.new_folder()
        self.slices(uid, folder)
        self.slices(uid, folder, [self.rng.randrange(3)])
        self.tree.rows.append(Row(folder, uid, None, plain=False))

    def broken(self) -> None:
        """A file that is named as a scan and is none."""
        ending = self.rng.choice(SINGLE)
        path = self.rng.choice(self.folders) / f"{self.name()}{ending}"
        whole = self.pool.files[ending][0].read_bytes()
        how = self.rng.choice(("cut", "empty", "noise", "text", "zip"))
        content = {
            "cut": whole[: self.rng.randrange(1, len(whole) - 8)],
            "empty": b"",
            "noise": self.rng.randbytes(400),
            "text": b"no scan\n",
            "zip": b"PK\3\4" + bytes(300),
        }
        path.write_bytes(content[how])
        self.tree.rows.append(Row(path, None, None))

    def broken_slice(self) -> None:
        """A slice that cannot be read may be of any series of its folder."""
        folder = self.new_folder()
        if self.uids:
            self.slices(self.uids.pop(), folder)
        content = self.rng.choice(
            (b"", b"x" * 300, bytes(128) + b"DICM", next(iter(self.pool.series.values()))[0][:-30])
        )
        (folder / f"{self.name()}.dcm").write_bytes(content)
        self.tree.failed.add(folder)

    def beside(self) -> None:
        expected = self.rng.random() < 0.6
        path = self.rng.choice(self.folders) / f"{self.name()}{self.rng.choice(BESIDE if expected else UNKNOWN)}"
        path.write_bytes(self.rng.choice((b"", b"x" * 200, b"\0" * 500)))
        self.tree.skipped[path] = expected

    def links(self) -> None:
        """Links in a circle, to nowhere, and to a scan and a folder elsewhere."""
        path = self.rng.choice(self.folders) / self.name()
        how = self.rng.choice(("loop", "self", "nowhere", "long", "file", "folder"))
        if how in ("loop", "self", "nowhere", "long"):
            target = {"loop": self.tree.top, "self": path.name, "nowhere": "gone.nii", "long": "y" * 300}[how]
            path.symlink_to(target)
            if how != "loop":
                self.tree.skipped[path] = False
            return
        outside = self.folder / f"outside{self.count}"
        outside.mkdir()
        scan = outside / f"far{self.count}.mha"
        self.pool.place(".mha", 1, scan)
        path = path.with_name(f"{path.name}.mha") if how == "file" else path
        path.symlink_to(scan if how == "file" else outside)
        self.tree.rows.append(Row(path if how == "file" else path / scan.name, None, ".mha1"))

    def special(self) -> None:
        path = self.rng.choice(self.folders) / f"{self.name()}{self.rng.choice(('', '.nii', '.dcm', '.txt'))}"
        os.mknod(path, 0o600 | self.rng.choice((stat.S_IFIFO, stat.S_IFSOCK)))
        self.tree.skipped[path] = False

    def hidden(self) -> None:
        path = self.rng.choice(self.folders + self.dicom) / f".{self.name()}"
        if self.rng.random() < 0.5:
            path.mkdir()
            self.slices(self.rng.choice(sorted(self.pool.series)), path)
        else:
            path.write_bytes(b"x")
        self.tree.skipped[path] = True

    def flat(self) -> None:
        """A series of one picture."""
        if self.uids:
            file = self.slices(self.uids.pop(), self.new_folder(), [0])[0]
            self.tree.skipped[file] = False
            self.tree.of_series.add(file)

    def no_image(self) -> None:
        """A directory of DICOM files, or a report."""
        uid = self.rng.choice((b"1.2.840.10008.1.3.10", b"1.2.840.10008.5.1.4.1.1.88.11", b"1.3.12.2.1107.5.9.1"))
        uid += b"\0" * (len(uid) % 2)
        path = self.rng.choice(self.folders + self.dicom) / self.rng.choice((f"DICOMDIR{self.name()}", self.name()))
        path.write_bytes(bytes(128) + b"DICM\2\0\2\0UI" + len(uid).to_bytes(2, "little") + uid)
        self.tree.skipped[path] = True

    def subfolder(self) -> None:
        for _ in range(self.rng.choice((1, 2, 30))):
            self.folders.append(self.new_folder(self.folders[-1] if len(str(self.folders[-1])) < 2000 else None))
        self.single()

    def empty(self) -> None:
        self.tree.skipped[self.new_folder()] = False

    def shut(self) -> None:
        """A file or folder that this user may not open."""
        how, folder = self.rng.choice(("scan", "unknown", "folder", "no entry")), self.new_folder()
        file = folder / f"{self.name()}{'' if how == 'unknown' else '.nii'}"
        self.pool.place(".nii", 0, file)
        (folder if how in ("folder", "no entry") else file).chmod(0o400 if how == "no entry" else 0)
        if how == "scan":
            self.tree.rows.append(Row(file, None, None))
        else:
            self.tree.failed.add(file if how == "no entry" else folder)
