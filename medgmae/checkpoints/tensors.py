"""What every tensor of a checkpoint must be before anything is done with it, and what memory tensors share."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from medgmae.checkpoints.cards import WeightsError

# A ViT-H with a decoder has 600; names grow with the depth of modules.
MAX_TENSORS = 20_000
MAX_NAME = 512

_SHOWN = 6

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def check_names(names: Iterable[object], origin: str) -> None:
    """Raise WeightsError for names that are not text, and for more or longer ones than a checkpoint has."""
    names = list(names)
    if len(names) > MAX_TENSORS:
        raise WeightsError(
            f"{origin}: {len(names)} entries, expected {MAX_TENSORS} at most; keep the model's own state dictionary"
        )
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        kind = getattr(odd, "kind", type(odd).__name__)
        raise WeightsError(f"{origin}: the name of a weight is of type {kind}, expected text; fetch the file again")
    long = next((name for name in names if isinstance(name, str) and len(name) > MAX_NAME), None)
    odd = next((name for name in names if not name or not str(name).isprintable()), None)
    if odd is not None:
        raise WeightsError(
            f"{origin}: the name of a weight is {odd!r}, expected text that can be printed; no module has such a name, "
            "so the file is damaged or meant to deceive"
        )
    if long is not None:
        raise WeightsError(
            f"{origin}: the name of a weight has {len(long)} characters, expected {MAX_NAME} at most; rename it"
        )


def check_tensors(state: Mapping[str, Tensor | str], origin: str) -> dict[str, Tensor]:
    """The tensors, if each is plain numbers in memory of its own size.

    Args:
        state: name to tensor, or to the reason why there is none.
        origin: the file's name, for messages.

    Raises:
        WeightsError: sparse, quantized, expanded or other tensors; the message names them.
    """
    problems = {
        name: why for name, value in state.items() if (why := value if isinstance(value, str) else oddity(value))
    }
    if problems:
        raise WeightsError(f"{origin}: not read, because {listed(f'{n!r} is {why}' for n, why in problems.items())}")
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def oddity(tensor: Tensor) -> str:
    """Why a tensor is not plain numbers, and what to do; "" for one that is."""
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter):
        return f"a {kind.__name__}; save it as a plain tensor (of a distributed one its .full_tensor())"
    if tensor.is_quantized:
        return "quantized; save its .dequantize()"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "nested; save it padded" if tensor.is_nested else f"sparse ({tensor.layout}); save its .to_dense()"
    if tensor.dtype not in _FLOATS | _WHOLE:
        return f"of type {tensor.dtype}, which is not converted in silence; save it as torch.float32"
    if tensor.is_meta:
        return ""
    expanded = any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if expanded or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"expanded to {tuple(tensor.shape)} from fewer values; save its .clone()"
    return ""


def listed(texts: Iterable[str]) -> str:
    """The first of many, and how many there are beside."""
    texts = list(texts)
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return ", ".join([*texts[:_SHOWN], *more])


def not_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has NaN or infinite values, or values that are infinite in another type."""
    if tensor.is_meta or not tensor.is_floating_point():
        return False
    if dtype.is_floating_point and torch.finfo(tensor.dtype).max > torch.finfo(dtype).max:
        tensor = tensor.to(dtype)
    # One pass without a copy; what is finite may add up to infinity, so that only then every value is looked at.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).item()
    return not math.isfinite(total) and not bool(tensor.isfinite().all())


class Spans:
    """Spans of memory that tensors take; none of them overlaps another. Tensors without memory or values take none."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def is_free(self, tensor: Tensor) -> bool:
        """Whether no tensor that was taken has any of this one's memory."""
        if tensor.is_meta or not tensor.numel():
            return True
        first, last = self._touched(*span(tensor))
        return first == last

    def take(self, tensor: Tensor) -> None:
        """Note a tensor's memory."""
        if tensor.is_meta or not tensor.numel():
            return
        start, end = span(tensor)
        first, last = self._touched(start, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._ends, start)
        return first, max(first, bisect.bisect_left(self._starts, end))


def span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one behind its last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two places of a tensor may be one number in memory."""
    steps = sorted((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0
    for step, size in steps:
        if step <= reach:
            return True
        reach += step * (size - 1)
    return False
