"""A small data set for fine-tuning whose labels come from real anatomy: crops of the three example scans, and a table.

    python examples/anatomy_labels.py --out build/anatomy        # a minute; then
    medgmae finetune --model vit_tiny_patch8_64.demo --data build/anatomy/cases.csv --label side ...

Each scan is brought to RAS and 2 mm and divided into cells, blocks that share no voxel and end at the body's midline.
Every crop lies in one cell, and all crops of a cell are in one fold: what is tested overlaps nothing that is learned
from. It is still the same three people on both sides: what can be measured is whether a model finds anatomy in parts
that it has no label of, and not whether it would in another patient.

cases.csv, and aorta.csv with the crops of which the label maps say whether they hold the aorta, have the columns

    path, id    of the crop, .nii.gz in intensities of the scan (HU, or those of the MR)
    scan        which of the three, and so which patient
    cell, fold  see above
    region      scan and half of it: abdomen_upper, abdomen_lower, chest_upper, ... brain_lower
    side        left or right of the midline
    aorta       1 or 0 by the label maps; empty where no map says
    height      of the crop's centre, mm above the lowest plane of its scan
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from medgmae import Volume, read_volume, write_volume
from medgmae.data import reorient, resample, resample_like

ROOT = Path(__file__).parent.parent
SPACING = 2.0  # mm; what the demonstration weights were trained with
ROOM = 3  # voxels by which a cell is longer than a crop, at least: where crops of a cell may differ
BODY = 0.25  # least share of a crop that is body
ENOUGH = 64  # voxels of aorta (half a cubic centimetre) in a crop that contains it; with fewer and not none: no label
TRIES = 20

Place = tuple[int, int, int]  # of a voxel: z, y, x


class Source(NamedTuple):
    """A scan, and what is known of it.

    body: intensity above which a voxel is of the body.
    bone: intensity of bone, whose median in the back half is the midline; None: the plane x = 0 of the brain's atlas.
    labels: file with the aorta, its number there, and the first slice of the scan that the file has.
    """

    scan: str
    region: str
    body: float
    bone: float | None
    labels: tuple[str, int, int] | None


SOURCES = (
    Source("ct_abdomen", "abdomen", -300.0, 250.0, ("ct_abdomen_seg", 52, 82)),
    Source("ct_thorax", "chest", -300.0, 250.0, ("ct_thorax_aorta_seg", 1, 0)),
    Source("mr_brain_t1", "brain", 0.0, None, None),
)


class Cell(NamedTuple):
    """A block of a scan: first voxels and ends."""

    first: Place
    end: Place


class Anatomy:
    """A scan at 2 mm, its midline and its aorta.

    Args:
        source: which one.
        size: voxels of a crop along each axis.
    """

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        file = read_volume(ROOT / f"examples/data/{source.scan}.nii.gz")
        self.scan = resample(reorient(file, "RAS"), spacing=SPACING)
        self.body = self.scan.data[0] > source.body
        self.midline = self._midline()
        self.aorta, self.known = self._aorta(file)

    def _midline(self) -> int:
        """Number of the first plane to the right of it; x grows from left to right."""
        if self.source.bone is None:
            return int(np.ceil(self.scan.grid.index((0.0, 0.0, 0.0))[2]))
        back = self.scan.data[0, :, : self.scan.size[1] // 2]  # y grows from back to front
        return int((back > self.source.bone).nonzero()[:, 2].median())

    def _aorta(self, file: Volume) -> tuple[Tensor | None, range]:
        """Where it is, and the planes of which the labels say so."""
        if self.source.labels is None:
            return None, range(0)
        name, number, first = self.source.labels
        labels = read_volume(ROOT / f"examples/data/{name}.nii.gz")
        labels = Volume(labels.data, file.grid.part((first, 0, 0), labels.size))  # one file says another place
        covered = labels.with_data(labels.data.new_ones(labels.data.shape))
        planes = resample_like(covered, self.scan, interpolation="nearest").data[0].flatten(1).any(1).nonzero()
        mask = resample_like(labels, self.scan, interpolation="nearest").data[0] == number
        return mask, range(int(planes[0]), int(planes[-1]) + 1)

    def cells(self) -> list[Cell]:
        """As many as fit, on either side of the midline."""
        depth, height, width = self.scan.size
        z, y = self._cuts(0, depth), self._cuts(0, height)
        x = [*self._cuts(0, self.midline), *self._cuts(self.midline, width)]
        return [Cell((a[0], b[0], c[0]), (a[1], b[1], c[1])) for a in z for b in y for c in x]

    def _cuts(self, first: int, end: int) -> list[tuple[int, int]]:
        count = (end - first) // (self.size + ROOM)
        ends = np.linspace(first, end, count + 1).round().astype(int).tolist()
        return list(itertools.pairwise(ends))

    def draw(self, cell: Cell, taken: set[Place], rng: np.random.Generator) -> Place | None:
        """Where a crop of a cell begins that has not been taken and is body enough; None where none was found."""
        for _ in range(TRIES):
            free = (int(rng.integers(b - a - self.size + 1)) for a, b in zip(cell.first, cell.end, strict=True))
            z, y, x = (a + n for a, n in zip(cell.first, free, strict=True))
            if (z, y, x) not in taken and float(self._part(self.body, (z, y, x)).float().mean()) >= BODY:
                return z, y, x
        return None

    def crop(self, at: Place) -> Volume:
        """A crop where it lies in the patient, in whole intensities."""
        whole = torch.uint8 if self.source.bone is None else torch.int16
        data = self._part(self.scan.data[0], at).round().to(whole)
        return Volume(data[None], self.scan.grid.part(at, data.shape))

    def labels(self, at: Place) -> dict[str, Any]:
        """What is so of a crop."""
        middle = at[0] + (self.size - 1) / 2
        upper = "upper" if middle > (self.scan.size[0] - 1) / 2 else "lower"
        return {
            "region": f"{self.source.region}_{upper}",
            "side": "left" if at[2] < self.midline else "right",
            "aorta": self._has_aorta(at),
            "height": round(SPACING * middle, 1),
        }

    def _has_aorta(self, at: Place) -> int | str:
        if self.aorta is None:
            return ""
        voxels = int(self._part(self.aorta, at).sum())
        if voxels >= ENOUGH:
            return 1
        whole = at[0] in self.known and at[0] + self.size - 1 in self.known
        return 0 if whole and voxels == 0 else ""

    def _part(self, data: Tensor, at: Place) -> Tensor:
        return data[tuple(slice(a, a + self.size) for a in at)]


def crops(anatomy: Anatomy, per_cell: int, rng: np.random.Generator) -> Iterator[tuple[int, Place]]:
    """Number of a cell and where a crop of it begins; cells that are hardly body have none."""
    for number, cell in enumerate(anatomy.cells()):
        taken: set[Place] = set()
        while len(taken) < per_cell:
            at = anatomy.draw(cell, taken, rng)
            if at is None:
                break
            taken.add(at)
            yield number, at


def deal(rows: Sequence[dict[str, Any]], folds: int, rng: np.random.Generator) -> None:
    """Give every row the fold of its cell: cells with aorta, of each scan and side, are dealt in turn, then others."""
    kinds: dict[str, tuple[bool, str, str]] = {}
    for row in rows:
        aorta = kinds.get(row["cell"], (False,))[0] or row["aorta"] == 1
        kinds[row["cell"]] = aorta, row["scan"], row["side"]
    order = sorted(rng.permutation(list(kinds)).tolist(), key=lambda cell: kinds[cell])
    fold = {cell: turn % folds for turn, cell in enumerate(order)}
    for row in rows:
        row["fold"] = fold[row["cell"]]


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the data set.")
@click.option("--per-cell", type=click.IntRange(1), default=3, show_default=True, help="Crops of each cell.")
@click.option("--size", type=click.IntRange(8), default=32, show_default=True, help="Voxels of 2 mm along each axis.")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of places and folds.")
def main(out: Path, per_cell: int, size: int, folds: int, seed: int) -> None:
    """Cut crops out of the example scans and write them with a table of labels to OUT."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        anatomy = Anatomy(source, size)
        for number, at in crops(anatomy, per_cell, rng):
            name = f"{source.region}_{len(rows):03d}"
            write_volume(anatomy.crop(at), out / f"{name}.nii.gz")
            place = {"path": f"{name}.nii.gz", "id": name, "scan": source.scan, "cell": f"{source.scan}_{number}"}
            rows.append({**place, "fold": "", **anatomy.labels(at)})
    deal(rows, folds, rng)
    for table, chosen in (("cases.csv", rows), ("aorta.csv", [row for row in rows if row["aorta"] != ""])):
        with (out / table).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(chosen)
    click.echo(f"{len(rows)} crops of {len({row['cell'] for row in rows})} cells, {folds} folds: {out / 'cases.csv'}")


if __name__ == "__main__":
    main()
