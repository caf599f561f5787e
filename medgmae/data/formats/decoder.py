"""The program that decodes compressed DICOM pixels, in a process of its own: ``python -I decoder.py SYSPATH``.

Decoders are native code, which files of strangers can crash, hang or make take all memory. What dies then is this
process, and the one that asked reports the file. It imports nothing of this library, so that it starts fast.

Requests are lines of JSON, ``{"path", "frames", "bytes"}``; an answer is the length of a line of JSON, that line, and
the decoded numbers in little endian.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any, BinaryIO

_JPEG = "1.2.840.10008.1.2.4."
_JPEG_END = b"\xff\xd9"
_SECONDS, _MEMORY = 20, 1 << 30  # for one request, beside what the pixels take


def _limit(bytes_expected: int, frames: int) -> None:
    """Ends this process where a request takes far more than it should."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + _SECONDS + frames
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    most = held + _MEMORY + 8 * bytes_expected
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _check(dataset: Any, frames: int) -> None:
    """Raises unless the pixels are ``frames`` whole frames: decoders fill in what a stream that was cut off lacks, and
    say nothing."""
    from pydicom.encaps import generate_frames

    jpeg, count = dataset.file_meta.TransferSyntaxUID.startswith(_JPEG), 0
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
        count += 1
        if jpeg and not frame.rstrip(b"\0").endswith(_JPEG_END):
            raise ValueError(f"the compressed frame {count} is truncated: it has no end")
    if count != frames:
        raise ValueError(f"{count} compressed frames; expected {frames}")


def _decoded(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    import numpy as np
    import pydicom

    try:
        if os.path.exists("/proc/self/statm"):
            _limit(request["bytes"], request["frames"])
        dataset = pydicom.dcmread(request["path"])
        _check(dataset, request["frames"])
        array = np.ascontiguousarray(dataset.pixel_array)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return {"shape": array.shape, "dtype": array.dtype.str}, array.tobytes()
    except Exception as error:  # whatever decoders raise of broken data
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": " ".join(lines)[:600] or type(error).__name__}, b""


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    warnings.simplefilter("ignore")
    for line in requests:
        head, content = _decoded(json.loads(line))
        text = json.dumps(head).encode()
        answers.write(len(text).to_bytes(8, "little") + text + content)
        answers.flush()


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    # what native code writes to standard output must not come between the answers
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _serve(sys.stdin.buffer, private)
