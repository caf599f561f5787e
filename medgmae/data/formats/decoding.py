"""Compressed DICOM pixels, decoded by pydicom's plugins in another process (see ``decoder.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.geometry import VolumeError

REMEDY = "pip install 'medgmae[dicom]'"

_PROGRAM = Path(__file__).with_name("decoder.py")


class Decoder:
    """The other process, started at the first image and used for all images of a scan."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _start(self, path: Path) -> subprocess.Popen[bytes]:
        try:
            import pydicom  # noqa: F401  the other process imports it, and cannot say well that it is missing
        except ImportError:
            raise VolumeError(f"{path}: the pixels are compressed; to read them: {REMEDY}") from None
        command = [sys.executable, "-I", str(_PROGRAM), json.dumps(sys.path)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=1 << 16
        )

    def decode(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The stored numbers of all frames of a file, of the shape (frames, rows, columns) and type that its header
        says.

        Raises:
            VolumeError: no decoder, broken data, or other pixels than the header says.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._start(path)
        frames, size = shape[0], int(np.prod(shape, dtype=object)) * dtype.itemsize
        request = {"path": str(path.absolute()), "frames": frames, "bytes": size}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            head = json.loads(stdout.read(int.from_bytes(stdout.read(8), "little")) or b"{}")
        except BrokenPipeError:
            head = {}
        if "error" in head or not head:
            why = head.get("error") or f"the decoder ended with code {self._process.wait()}"
            raise VolumeError(
                f"{path}: cannot be read: the compressed pixels cannot be decoded: {why}; expected an intact image, "
                f"and the decoders of {REMEDY}"
            )
        given = tuple(head["shape"])
        if given != (shape if frames > 1 else shape[1:]) or np.dtype(head["dtype"]) != dtype.newbyteorder("<"):
            raise VolumeError(
                f"{path}: the compressed pixels are {given} of {np.dtype(head['dtype'])}; expected {shape} of {dtype}, "
                "as the header says"
            )
        pixels = np.empty(shape, dtype)
        view = pixels.reshape(-1).view(np.uint8).data
        at = 0
        while at < len(view):
            read = stdout.readinto(view[at:])  # type: ignore[attr-defined]
            if not read:
                raise VolumeError(f"{path}: cannot be read: the decoder ended before its last pixel")
            at += read
        return pixels
