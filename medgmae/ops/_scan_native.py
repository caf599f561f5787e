"""The native kernels of the scan and the convolution: checks tensors, allocates what they write, calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Kernel = Callable[..., Any]


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward of every native implementation that is compiled in."""
    yield from ()
