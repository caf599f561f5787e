"""SiLU in the kernels, as the gate of a scan and behind a convolution: torch's values and gradients at any input."""

from __future__ import annotations

import math

import pytest
import scan_blocks
import torch
import torch.nn.functional as F
from sequences import NATIVE, Path
from torch import Tensor

from medgmae.ops.conv import native
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.scan.inputs import ScanInputs

PATHS = [*NATIVE, Path("blocks", scan_blocks.forward, scan_blocks.backward)]
LARGE = (math.inf, 3e38, 1e37, 1e4, 104.0, 89.0, 88.5, 88.0, 87.5, 87.34, 87.3, 87.0, 86.5, 50.0, 20.0, 5.0, 1.0, 1e-3)
GRID = [*sorted([*(-x for x in LARGE), *LARGE, 0.0, *torch.linspace(-90, 10, 333).tolist()]), math.nan]
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def expected(values: Tensor) -> tuple[Tensor, Tensor]:
    leaf = values.clone().requires_grad_()
    out = F.silu(leaf)
    return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]


def assert_silu(found: tuple[Tensor, Tensor], values: Tensor) -> None:
    """NaN and infinity in the same places; what is subnormal in torch may be 0. Without FMA it is less exact."""
    for got, wanted in zip(found, expected(values), strict=True):
        torch.testing.assert_close(got.flatten(), wanted, rtol=6e-6, atol=2e-36, equal_nan=True)


@each
@each_dtype
def test_gate_of_a_scan(path: Path, dtype: torch.dtype) -> None:
    """A scan whose B is 0 and whose skip connection is 1: it gives silu(z)."""
    z = torch.tensor(GRID, dtype=dtype)
    one, matrix = torch.ones(1, len(z), 1, dtype=dtype), torch.zeros(1, len(z), 1, 1, dtype=dtype)
    A, D = -torch.ones(1, 1, dtype=dtype), torch.ones(1, dtype=dtype)
    inputs = ScanInputs(one, one, A, matrix, matrix, D, z.view(1, -1, 1), None, False, False, 64)
    out, states = path.forward(inputs)
    assert_silu((out, path.backward(one, None, states, inputs)[6]), z)  # type: ignore[arg-type]


@each
@each_dtype
def test_activation_of_a_convolution(path: Path, dtype: torch.dtype) -> None:
    x = torch.tensor(GRID, dtype=dtype)
    for shape in ((len(x), 1, 1), (1, 1, len(x))):  # a token each, or side by side in vectors
        inputs = ConvInputs(x.view(shape), torch.ones(shape[2], 1, dtype=dtype), None, True, False)
        grad = torch.ones_like(inputs.x)
        if path.name == "blocks":
            found = scan_blocks.convolve(inputs), scan_blocks.differentiate(grad, inputs)[0]
        else:
            options = {"variant": path.name}
            found = native.forward(inputs, **options), native.backward(grad, inputs, **options)[0]
        assert_silu(found, x)
