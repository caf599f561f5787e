"""CUDA's causal convolution, run on the host thread after thread: the tests of every path, and half precision."""

from __future__ import annotations

import math

import pytest
import scan_blocks
import test_causal_conv1d as properties
import torch
from test_causal_conv1d import Path, both_directions, make, with_silu

BLOCKS = Path("blocks", scan_blocks.convolve, scan_blocks.differentiate)


@with_silu
@both_directions
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_values_and_gradients(width: int, silu: bool, reverse: bool) -> None:
    properties.test_values_and_gradients_are_the_definition(BLOCKS, width, silu, reverse)
    properties.check(BLOCKS, make(1, 2, 70, width), silu, reverse)


@both_directions
@pytest.mark.parametrize("length", [1, 3, 5, 31, 32, 33, 35, 64, 129])
def test_lengths(length: int, reverse: bool) -> None:
    properties.test_lengths(BLOCKS, length, reverse)


@both_directions
@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (0, 4, 0)], ids=str)
def test_nothing_to_filter(shape: tuple[int, int, int], reverse: bool) -> None:
    properties.test_nothing_to_filter(BLOCKS, shape, reverse)


@both_directions
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_reaches_as_far_as_the_taps(value: float, reverse: bool) -> None:
    properties.test_a_bad_number_reaches_as_far_as_the_taps(BLOCKS, value, reverse)


def test_large_arguments_of_silu() -> None:
    properties.test_large_arguments_of_silu(BLOCKS)


@with_silu
def test_reverse_is_flip_filter_flip(silu: bool) -> None:
    properties.test_reverse_is_flip_filter_flip(BLOCKS, silu)


@both_directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_only(dtype: torch.dtype, reverse: bool) -> None:
    x, weight, bias = make(length=70, dtype=torch.float32)
    x, grad = x.to(dtype), torch.randn(2, 6, 70).to(dtype)
    found = BLOCKS.run([x, weight, bias], grad, True, reverse)
    wanted = BLOCKS.run([x.float(), weight, bias], grad.float(), True, reverse)
    for got, exact, kind in zip(found, wanted, (dtype, dtype, torch.float32, torch.float32), strict=True):
        assert got.dtype == kind
        assert torch.equal(got, exact.to(kind))


@both_directions
def test_any_strides(reverse: bool) -> None:
    x, weight, bias = make(length=40, dtype=torch.float32)
    tokens = torch.cat([x.mT, torch.full_like(x.mT, math.nan)], -1)
    grad = torch.randn(2, 6, 1).expand(-1, -1, 40)
    found = BLOCKS.run([tokens[..., :6].mT, weight, bias], grad, True, reverse)
    wanted = BLOCKS.run([x.contiguous(), weight, bias], grad.contiguous(), True, reverse)
    assert all(torch.equal(got, exact) for got, exact in zip(found, wanted, strict=True))
