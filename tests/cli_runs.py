"""Runs of the command line over folders of small scans, in this process and in others that something happens to."""

from __future__ import annotations

import json
import locale
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import warm_python
from safetensors import safe_open

import medgmae
from medgmae.data import Grid, Volume

NANO = "vit_nano_patch8_32"


def saved_nano(folder: Path) -> str:
    """The name of a small model with weights."""
    torch.manual_seed(0)
    return f"local-dir:{medgmae.save_pretrained(medgmae.create_model(NANO), folder)}"


def small_scan(path: Path, seed: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = torch.rand(1, size, size, size, generator=torch.Generator().manual_seed(seed))
    Volume(data, Grid((size,) * 3, (1.0, 1.0, 1.0))).save(path)
    return path


def small_scans(folder: Path, count: int) -> Path:
    for i in range(count):
        small_scan(folder / f"{i:04}.nii", i)
    return folder


def dicom_series(folder: Path, uid: str, slices: range = range(4), description: str = "", **tags: str) -> None:
    """Slices of 16 x 16 pixels, 3 mm apart, whose values say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in slices:
        plane = sitk.GetImageFromArray(np.full((16, 16), z, np.int16) + np.arange(16, dtype=np.int16))
        for key, value in {
            "0008|0060": "CT",
            "0008|103e": description,
            "0020|000d": "1.2.3.4",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{z + 1}",
            "0020|0032": f"0\\0\\{3 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            **tags,
        }.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{z:03}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # the writer has set "C", in which later tests could read no UTF-8


def facts_of(out: Path) -> dict[str, Any]:
    with safe_open(out, "pt") as file:
        return json.loads(file.metadata()["medgmae"])


_AT_CALL = """
import os, signal, sys
import medgmae
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs inherit ignored
real, calls = medgmae.extract_features, []
def counted(*args, **options):
    calls.append(args)
    if len(calls) == {call}:
        {action}
    return real(*args, **options)
medgmae.extract_features = counted
from medgmae.cli import main
main(sys.argv[1:])
"""


def happening(call: int, action: str, *args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """``medgmae ARGS`` in a process of its own, in which ``action`` is run before scan number ``call``."""
    return warm_python.run("-c", _AT_CALL.format(call=call, action=action), *args, **options)


def limited(bytes_per_file: int) -> dict[str, int]:
    """For ``limits`` of warm_python: writing fails at this size of a file, as on a full disk."""
    return {"RLIMIT_FSIZE": bytes_per_file}
