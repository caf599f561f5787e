"""The operators of state spaces in ONNX's words, for an export: a convolution, and a scan token by token.

Only an export imports this module, since it needs onnxscript.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from onnxscript import graph, opset18, script

import medgmae.ops.conv.operator
import medgmae.ops.scan.operator  # noqa: F401 - they register what is translated
from medgmae.ops import register

if TYPE_CHECKING:
    Numbers = Any
else:
    from onnxscript import FLOAT

    Numbers = FLOAT[...]  # of any shape

op: Any = opset18
_FORTH, _BACK = 0, 1


@contextmanager
def translations() -> Iterator[dict[Callable[..., Any], Callable[..., Any]]]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``; while this is open, the operators in it do not
    refuse an export."""
    table: dict[str, Callable[..., Any]] = {"selective_scan": _selective_scan, "causal_conv1d": _causal_conv1d}
    before, register.translated = register.translated, register.translated | table.keys()
    try:
        yield {getattr(torch.ops.medgmae, name).default: function for name, function in table.items()}
    finally:
        register.translated = before


@script()
def _scan(
    start: Numbers,
    steps: Numbers,
    u: Numbers,
    A: Numbers,
    B: Numbers,
    C: Numbers,
    ways: Sequence[int],
    way: Sequence[int],
) -> tuple[Numbers, Numbers]:
    """Steps and u (B, L, D), A (D, N), B and C (B, L, N) to the last state (B, D, N) and y (B, L, D).

    The (B, L, D, N) tensors of the scan are never there: a step computes its own decay.
    """

    @graph()
    def step(h: Numbers, s: Numbers, x: Numbers, b: Numbers, c: Numbers) -> tuple[Numbers, Numbers]:
        last = op.Constant(value_ints=[-1])
        middle = op.Constant(value_ints=[1])
        decay = op.Exp(op.Unsqueeze(s, last) * A)
        after = decay * h + op.Unsqueeze(s * x, last) * op.Unsqueeze(b, middle)
        y = op.ReduceSum(after * op.Unsqueeze(c, middle), last, keepdims=0)
        return after, y

    h, out = op.Scan(
        start,
        steps,
        u,
        B,
        C,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
        scan_input_directions=ways,
        scan_output_directions=way,
    )
    return h, out


def _selective_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, softplus: bool, reverse: bool, chunk: int
) -> tuple[Any, Any]:
    """See :class:`~medgmae.ops.scan.inputs.ScanInputs`; the second result is the state after the last step."""
    for name, weights in (("B", B), ("C", C)):
        if len(weights.shape) != 4 or weights.shape[2] != 1:
            raise NotImplementedError(f"{name} of a scan is {weights.shape}; in ONNX it must be (batch, L, 1, N)")
    steps = delta if bias is None else op.Add(delta, bias)
    if softplus:
        steps = op.Softplus(steps)
    group = op.Constant(value_ints=[2])
    batch = op.Slice(op.Shape(u), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    start = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, op.Shape(A), axis=0))
    way = [_BACK if reverse else _FORTH]
    h, y = _scan(start, steps, u, A, op.Squeeze(B, group), op.Squeeze(C, group), ways=way * 4, way=way)
    if D is not None:
        y = op.Add(y, op.Mul(D, u))
    if z is not None:
        y = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return y, op.Unsqueeze(op.Transpose(h, perm=[0, 2, 1]), op.Constant(value_ints=[1]))


def _causal_conv1d(x: Any, weight: Any, bias: Any, silu: bool, reverse: bool) -> Any:
    """See :class:`~medgmae.ops.conv.inputs.ConvInputs`."""
    channels, width = weight.shape
    taps = weight
    if reverse:
        whole = [op.Constant(value_ints=[n]) for n in (-1, -width - 1, 1, -1)]  # start, end, axis, step
        taps = op.Slice(weight, *whole)
    pads = [0, width - 1] if reverse else [width - 1, 0]
    taps = op.Unsqueeze(taps, op.Constant(value_ints=[1]))
    y = op.Conv(op.Transpose(x, perm=[0, 2, 1]), taps, bias, group=channels, pads=pads)
    y = op.Transpose(y, perm=[0, 2, 1])
    return op.Mul(y, op.Sigmoid(y)) if silu else y
