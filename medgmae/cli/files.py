"""Files that commands write: whole or not at all, readable, never over an input, over another file when told to."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

import medgmae
from medgmae.cli.common import shown

if TYPE_CHECKING:
    from torch import Tensor


def check_name(path: Path) -> None:
    """Raise a usage error for the name of an output that the readers of safetensors and SimpleITK could not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{shown(path)} is not a name in UTF-8; choose another for what is written") from None


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise a usage error for a file that is there, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise click.UsageError(f"{shown(path)} exists; choose another name, or --overwrite to replace it")


def keep_inputs(inputs: Sequence[Path], outputs: Sequence[Path | None]) -> None:
    """Raise a usage error where an output is one of the inputs, which --overwrite must not replace."""
    for output in outputs:
        for one in inputs:
            if output is not None and os.path.exists(output) and os.path.exists(one) and output.samefile(one):
                raise click.UsageError(f"{shown(output)} is an input; choose another name for the output")


@contextmanager
def complete(path: Path, overwrite: bool) -> Iterator[Path]:
    """A place to write ``path`` in, with what belongs to it: the files take their names when the block has ended.

    Raises:
        click.ClickException: the block or the disk fails, or ``path`` has come to be since: ``path`` is as it was.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".medgmae-") as name:
            folder = Path(name)
            try:
                yield folder / path.name
                _move(folder, path, overwrite)
            except (OSError, ValueError, RuntimeError) as error:
                text = shown(str(error).replace(f"{folder}{os.sep}", f"{path.parent}{os.sep}"), keep="\n")
                raise click.ClickException(f"{shown(path)} was not written: {text}") from error
    except OSError as error:
        raise click.ClickException(f"{shown(path)} cannot be written: {error.strerror or error}") from error


def _move(folder: Path, path: Path, overwrite: bool) -> None:
    """Give the files in ``folder`` their names beside ``path``; the one of that name, which may need others, last."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name == path.name, file.name))
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        if os.path.lexists(path.with_name(file.name)) and not overwrite:
            raise FileExistsError(f"{shown(path.with_name(file.name))} exists; --overwrite replaces it")
    for file in files:
        os.replace(file, path.with_name(file.name))


def write_volume(volume: medgmae.Volume, path: Path, overwrite: bool) -> None:
    """A scan's file, which reads back as the same voxels."""
    with complete(path, overwrite) as place:
        medgmae.write_volume(volume, place)
        channels = volume.channels if volume.channels > 1 else None
        _same(medgmae.read_volume(place, channels=channels).data, volume.data)


def write_gaussians(gaussians: medgmae.Gaussians, path: Path, overwrite: bool) -> None:
    """A PLY file in world coordinates, which reads back as the same Gaussians."""
    with complete(path, overwrite) as place:
        gaussians.save_ply(place, "world")
        for read, written in zip(medgmae.Gaussians.load_ply(place).tensors(), gaussians.tensors(), strict=True):
            _same(read, written)


def write_figure(figure: object, path: Path, overwrite: bool) -> None:
    """A picture of matplotlib's as a PNG file that has its end."""
    with complete(path, overwrite) as place:
        figure.savefig(place)  # type: ignore[attr-defined]
        if b"IEND" not in place.read_bytes()[-12:]:
            raise OSError("the picture was cut off")


def _same(read: Tensor, written: Tensor) -> None:
    import torch

    if not torch.equal(read.float(), written.detach().float().cpu()):
        raise OSError("what was written reads back as something else")


@contextmanager
def locked(file: Path, path: Path) -> Iterator[None]:
    """Hold ``file`` for this process alone while it writes ``path``; the lock ends with the process, however it ends.

    Raises:
        click.ClickException: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise click.ClickException(
                f"another run is writing {shown(path)}; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            click.echo(f"Note: {shown(path.parent)} has no locks ({error.strerror}): start one run at a time", err=True)
        if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
            break
        os.close(handle)  # another run has ended and removed the file in between
        file.parent.mkdir(exist_ok=True)
    try:
        yield
    finally:
        os.close(handle)
