"""CUDA's scan and convolution run on the host, one thread after the other, behind the Python side of the kernels."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any
from unittest import mock

import pytest
import torch

from medgmae.ops.conv import cuda as conv_cuda
from medgmae.ops.scan import cuda
from medgmae.ops.streams import STREAM_CODES

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]


class Stream(ctypes.Structure):
    """Stream of cuda/streams.h."""

    _fields_ = [("at", ctypes.c_void_p), ("batch", ctypes.c_int64), ("step", ctypes.c_int64), ("apart", ctypes.c_int64)]


class Matrix(ctypes.Structure):
    """ScanMatrix of cuda/scan/scan.h."""

    _fields_ = [*Stream._fields_[:3], ("of_group", ctypes.c_int64)]


class ScanCall(ctypes.Structure):
    """ScanCall of cuda/scan/scan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "states", "groups", "chunk")),
        ("softplus", ctypes.c_bool),
        *((name, Stream) for name in ("u", "delta", "z")),
        *((name, Matrix) for name in ("B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias", "kept")),
        *((name, Stream) for name in ("out", "grad", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("grad_state", "dA", "dD", "dbias", "dB", "dC")),
    ]


class ConvCall(ctypes.Structure):
    """ConvCall of cuda/conv/conv.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width")),
        ("silu", ctypes.c_bool),
        *((name, Stream) for name in ("x", "out")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, Stream) for name in ("grad", "dx")),
        ("sums", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        target, source = FilePath(folder, "scan.so"), FilePath(__file__).parent / "cuda_host/scan.cpp"
        subprocess.run([COMPILER, *FLAGS, str(source), "-o", str(target)], check=True)
        loaded = ctypes.CDLL(str(target))
    for name, structure in {"scan": ScanCall, "conv": ConvCall}.items():
        getattr(loaded, f"medgmae_{name}").restype = ctypes.c_bool
        size = getattr(loaded, f"medgmae_{name}_call_size")
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(structure)
    return loaded


def launch(call: Any, room: int) -> None:
    """What ``cuda.launch`` does, on the host."""
    fields = {name: Stream(*value) for name, value in call.streams.items()}
    fields |= {name: Matrix(*value) for name, value in call.matrices.items()}
    structure = ScanCall(**call.sizes, **fields, **{name: address for name, (address, _) in call.arrays.items()})
    codes = {torch.float32: 0, torch.float64: 1}[call.wide], STREAM_CODES[call.dtype]
    assert library().medgmae_scan(*codes, ctypes.byref(structure), ctypes.c_int64(room))


def launch_conv(call: Any) -> None:
    """What ``conv_cuda.launch`` does, on the host."""
    fields = {name: Stream(*value) for name, value in call.streams.items()}
    structure = ConvCall(**call.sizes, **fields, **{name: address for name, (address, _) in call.arrays.items()})
    codes = {torch.float32: 0, torch.float64: 1}[call.wide], STREAM_CODES[call.dtype]
    assert library().medgmae_conv(*codes, ctypes.byref(structure))


@contextmanager
def on_host(room: int) -> Iterator[None]:
    """Have the Python side of the CUDA kernels run the blocks here, as a device with room for so many blocks would."""
    with mock.patch.object(cuda, "launch", functools.partial(launch, room=room)):
        yield


def forward(*arguments: Any, room: int = 1) -> Any:
    with on_host(room):
        return cuda.forward(*arguments)


def backward(*arguments: Any, room: int = 1) -> Any:
    with on_host(room):
        return cuda.backward(*arguments)


def convolve(*arguments: Any) -> Any:
    with mock.patch.object(conv_cuda, "launch", launch_conv):
        return conv_cuda.forward(*arguments)


def differentiate(*arguments: Any) -> Any:
    with mock.patch.object(conv_cuda, "launch", launch_conv):
        return conv_cuda.backward(*arguments)
