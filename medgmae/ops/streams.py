"""What the kernels of sequences share: tensors (batch, L, channels) that they read and write, and where these lie."""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES

# StreamType of cuda/half.h: what streams hold.
STREAM_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LARGE = 8 << 20  # bytes of an output from which on large pages are worth asking for


def common_dtype(wide: torch.dtype, *streams: Tensor | None) -> torch.dtype:
    """What CUDA kernels that compute in ``wide`` read streams as: half precision that all share as it is."""
    dtypes = {stream.dtype for stream in streams if stream is not None}
    half = dtypes in ({torch.bfloat16}, {torch.float16})
    return dtypes.pop() if half and wide == torch.float32 else wide


def room(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor for a kernel to write, of the shape and on the device of another."""
    assert _C is not None
    tensor = like.new_empty(like.shape, dtype=dtype)
    if tensor.nbytes >= LARGE and tensor.device.type == "cpu":
        _C.prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class Streams:
    """Where the tensors of one call lie; holds them while it lives.

    A stream is (batch, L, channels) with the channels of a token side by side; a reversed one begins at its last token.

    Attributes:
        turns: whether the kernels also read streams in which the steps of a channel lie side by side.
        dtype: of what is a stream.
        wide: dtype of the parameters and of the computation.
        sizes, streams, arrays: what the kernel is given, by its own names.
    """

    def __init__(self, dtype: torch.dtype, wide: torch.dtype, length: int, reverse: bool, turns: bool = False) -> None:
        if wide not in DTYPE_CODES:
            raise TypeError(f"the parameters are {wide}: expected float32 or float64, in which the kernels compute")
        self.dtype, self.wide, self.length, self.reverse, self.turns = dtype, wide, length, reverse, turns
        self.held: list[Tensor] = []
        self.sizes: dict[str, int] = {}
        self.streams: dict[str, tuple[int, int, int, int]] = {}
        self.arrays: dict[str, tuple[int, int]] = {}

    @property
    def device(self) -> torch.device:
        """Of all the tensors."""
        return self.held[0].device

    def stream(self, name: str, tensor: Tensor) -> None:
        """Add a stream; one that is read is copied where it has another dtype or layout than the kernels take."""
        ready = tensor.to(self.dtype)
        by_channel = self.turns and ready.stride(1) == 1
        ready = ready if ready.stride(2) == 1 or by_channel else ready.contiguous()
        self.streams[name] = (self.start(ready), ready.stride(0), self.step(ready), ready.stride(2))

    def array(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, dense and in the dtype of the computation; the kernel refuses another count of numbers."""
        self.held.append(tensor.to(self.wide).contiguous())
        self.arrays[name] = self.held[-1].data_ptr(), tensor.numel()

    def start(self, tensor: Tensor) -> int:
        """Address of the first token, in the order of the call."""
        self.held.append(tensor)
        last = (self.length - 1) * tensor.stride(1) * tensor.element_size() if self.reverse else 0
        return tensor.data_ptr() + last

    def step(self, tensor: Tensor) -> int:
        """Elements from one token to the next, in the order of the call."""
        return -tensor.stride(1) if self.reverse else tensor.stride(1)
