"""The scans of a run: prepared once, those that are held out set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgmae.data import (
    PreparedFolder,
    PreparedScan,
    VolumeError,
    draws,
    is_prepared,
    list_scans,
    open_prepared,
    prepare_scans,
)
from medgmae.training.settings import Settings
from medgmae.training.tables import TrainingError, expect

if TYPE_CHECKING:
    from accelerate import Accelerator

_SPLIT = (0, 0, 2)  # counters of a draw that no crop, mask or epoch has


@dataclass(frozen=True)
class Corpus:
    """Prepared scans.

    folder: where they are.
    scans: all of them.
    input: the block by which they were prepared.
    sources: what the user named.
    broken: files that were left out, with the reason.
    """

    folder: Path
    scans: Sequence[PreparedScan]
    input: dict[str, Any]
    sources: Sequence[str | Path]
    broken: Sequence[Any] = field(default_factory=tuple)


def corpus_of(
    block: dict[str, Any],
    data: Sequence[str | Path],
    size: Sequence[int],
    folder: Path,
    skip_broken: bool,
    accelerator: Accelerator,
    dtype: str = "float16",
) -> Corpus:
    """The prepared scans of a source; the first process prepares them in ``folder``, as the input ``block`` says,
    unless they are prepared already.

    Raises:
        TrainingError: no scans, or some that cannot be prepared.
    """
    try:
        if len(data) == 1 and is_prepared(data[0]):
            return _checked(open_prepared(data[0]), data)
        if accelerator.is_main_process:
            _prepare(block, data, size, folder, skip_broken, dtype)
        accelerator.wait_for_everyone()
        return _checked(open_prepared(folder), data)
    except (VolumeError, ImportError) as error:
        raise TrainingError(str(error)) from error


def _prepare(
    block: dict[str, Any], data: Sequence[str | Path], size: Sequence[int], folder: Path, skip_broken: bool, dtype: str
) -> None:
    listing = list_scans(data, block.get("contrasts"), arrays=True)
    problems = [one["error"] for one in listing.errors]
    expect(
        not problems or skip_broken,
        f"{len(problems)} scans cannot be read: {'; '.join(problems[:5])}; --skip-broken leaves them out",
    )
    expect(bool(listing.scans), f"no scans in {', '.join(map(str, data))}")
    crop = tuple(size) if len(size) == 3 else (1, *size)
    workers = listing.processes
    prepare_scans(listing.scans, folder, block, workers=workers, skip_broken=skip_broken, dtype=dtype, crop=crop)


def _checked(folder: PreparedFolder, data: Sequence[str | Path]) -> Corpus:
    expect(bool(folder.scans), f"{folder.folder} holds no prepared scan")
    return Corpus(Path(folder.folder), folder.scans, folder.input, data, tuple(folder.broken))


def split(scans: Sequence[PreparedScan], settings: Settings) -> tuple[list[PreparedScan], list[PreparedScan]]:
    """Scans to train on, and scans that are held out, drawn by the seed or named by a column of the table.

    A share is rounded to a number of scans; of ten or more it is at least one.

    Raises:
        TrainingError: nothing is left to train on, or no scan has the column.
    """
    held_out = settings.held_out
    if isinstance(held_out, str):
        column, _, value = held_out.partition("=")
        expect(
            any(column in scan.labels for scan in scans),
            f"held_out={held_out!r}: the scans have no column {column!r}; they come with one from a CSV table",
        )
        chosen = {i for i, scan in enumerate(scans) if scan.labels.get(column) == value}
        expect(bool(chosen), f"held_out={held_out!r}: no scan has that value")
    else:
        count = round(held_out * len(scans)) or int(held_out > 0 and len(scans) >= 10)
        order = draws(settings.training.seed, *_SPLIT).permutation(len(scans))
        chosen = set(order[:count].tolist())
    training = [scan for i, scan in enumerate(scans) if i not in chosen]
    expect(bool(training), f"held_out={held_out!r} leaves nothing of {len(scans)} scans to train on")
    return training, [scans[i] for i in sorted(chosen)]
