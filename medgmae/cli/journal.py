"""What a run over many scans has done so far, on disk after each scan, so that a run that ended early goes on.

OUT.partial is a folder beside --out: run.json says what the results are of, and every scan that is done is a
.safetensors file with its tensors and, in the metadata entry "medgmae", its facts. It is removed when OUT is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import medgmae
from medgmae.cli.common import shown
from medgmae.cli.files import locked

if TYPE_CHECKING:
    from torch import Tensor, nn

_RUN, _LOCK = "run.json", "lock"


class Journal:
    """The folder beside ``out``. An entry is the facts and tensors of a scan."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.begun = False

    def begin(self, description: Mapping[str, Any], overwrite: bool) -> None:
        """Say what the results are of. Those of an earlier run of the same are kept.

        Raises:
            click.UsageError: the folder holds those of another run, and ``overwrite`` does not discard them.
        """
        text = json.dumps(description, indent=2, sort_keys=True)
        run = self.folder / _RUN
        others = [path for path in self.folder.iterdir() if path.name not in (_RUN, _LOCK)]
        if others and (not run.exists() or run.read_bytes() != text.encode()):
            if not overwrite or not run.exists():
                raise click.UsageError(
                    f"{shown(self.folder)} holds results of another run ({len(others)} file(s): other weights, options "
                    "or version); finish that run, choose another --out, or remove the folder"
                    + (", or --overwrite to discard it" if run.exists() else "")
                )
            for path in others:
                path.unlink()
        _write(run, text.encode())
        self.begun = True

    def facts(self, scan: medgmae.data.Scan) -> dict[str, Any] | None:
        """The facts that were kept of a scan, if it is the scan that is there now."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(scan), "pt") as file:
                kept = json.loads(file.metadata()["medgmae"])
                return kept["facts"] if kept["state"] == state_of(scan) else None
        except (OSError, SafetensorError, ValueError, TypeError, KeyError):  # none, or cut off with the machine's power
            return None

    def tensors(self, scan: medgmae.data.Scan) -> dict[str, Tensor]:
        """The tensors of a scan that is done, in order of their names."""
        from safetensors.torch import load_file

        return dict(sorted(load_file(self._file(scan)).items()))

    def keep(
        self, scan: medgmae.data.Scan, make: Callable[[], tuple[dict[str, Any], Mapping[str, Tensor]]]
    ) -> dict[str, Any]:
        """Facts of a scan, which are kept with the tensors that ``make`` gives beside them.

        Raises:
            OSError: the scan was changed meanwhile.
        """
        state = state_of(scan)
        facts, tensors = make()
        if state_of(scan) != state:
            raise OSError(f"{scan.path} was changed while it was read; expected it to stay as it is")
        self.put(scan, state, facts, tensors)
        return facts

    def put(
        self, scan: medgmae.data.Scan, state: list[int], facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep what came of a scan, whose state was that before it was read; it is on disk when this returns."""
        from safetensors.torch import save

        kept = json.dumps({"facts": facts, "state": state})
        contiguous = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        _write(self._file(scan), save(contiguous, {"medgmae": kept}))

    def _file(self, scan: medgmae.data.Scan) -> Path:
        return self.folder / f"{key_of(scan)}.safetensors"

    def forget(self, scan: medgmae.data.Scan) -> None:
        """Remove what was kept of a scan."""
        self._file(scan).unlink(missing_ok=True)

    def kept(self) -> int:
        """How many scans are done."""
        return sum(path.suffix == ".safetensors" for path in self.folder.iterdir())


@contextmanager
def journal_of(out: Path) -> Iterator[Journal]:
    """The journal of ``out``, for this process alone. Left without an error, it is done with; else, what is in it
    stays."""
    journal = Journal(out)
    try:
        journal.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{shown(out)} cannot be written: {error.strerror or error}") from error
    with locked(journal.folder / _LOCK, out):
        try:
            yield journal
        except BaseException:
            if not journal.kept():
                shutil.rmtree(journal.folder)
            elif journal.begun:
                click.echo(
                    f"Stopped. {journal.kept()} scans are kept in {shown(journal.folder)}; the same command goes on "
                    "from there.",
                    err=True,
                )
            raise
        shutil.rmtree(journal.folder)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and through to the disk."""
    partial = path.with_suffix(".writing")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def key_of(scan: medgmae.data.Scan) -> str:
    """What stands for a scan, whatever it holds: the digest of its paths and its series."""
    key = b"\0".join([*(os.fsencode(path.absolute()) for path in scan.paths), (scan.series or "").encode()])
    return hashlib.sha256(key).hexdigest()[:24]


def state_of(scan: medgmae.data.Scan) -> list[int]:
    """What changes when a scan is replaced: number, bytes and latest time of its files."""
    states = [file.stat() for file in scan.all_files() if file.is_file()]
    return [len(states), sum(one.st_size for one in states), max((one.st_mtime_ns for one in states), default=0)]


def weights_digest(model: nn.Module) -> str:
    """A digest of all weights: the same name may stand for others tomorrow."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
