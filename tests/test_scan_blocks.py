"""The CUDA scan's thread blocks, run on the host one thread after the other, against the account of the definition.

This tests the arithmetic, the division of channels and time, and what Python allocates and adds up. What only a GPU
shows is for tests/test_selective_scan_cuda.py.
"""

from __future__ import annotations

import ctypes
import math
from functools import partial
from typing import Any

import pytest
import scan_blocks
import test_selective_scan as properties
import torch
from sequences import FORMS, REFERENCE, Path, assert_same_bits, cotangents, error, make

from medgmae.ops.streams import STREAM_CODES

# Room for one block: time is not cut. For many: into spans of 16 steps, of a chunk in the backward.
PATHS = [
    Path(
        f"room for {count}",
        partial(scan_blocks.forward, room=count),
        partial(scan_blocks.backward, room=count),
    )
    for count in (1, 300)
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# The device's exponential may be off by 2 units in the last place, and the host's is made so. It is the state that
# shows it, where steps are small.
STATES = 2.5e-6


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "VALUES", STATES)
    monkeypatch.setattr(properties.check, "__defaults__", (*properties.check.__defaults__[:3], STATES))


@every_path
@both_directions
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_values_and_gradients(path: Path, forms: Any, reverse: bool) -> None:
    properties.test_values_and_gradients_are_the_definition(path, forms, reverse)


@every_path
@both_directions
@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 200])
def test_lengths(path: Path, length: int, reverse: bool) -> None:
    properties.test_lengths_around_the_chunks(path, length, reverse)


@every_path
@pytest.mark.parametrize("states", [1, 3, 4, 15, 16, 17, 33])
def test_states(path: Path, states: int) -> None:
    properties.test_numbers_of_states(path, states)


@every_path
def test_channels(path: Path) -> None:
    properties.test_numbers_of_channels(path)


@every_path
@pytest.mark.parametrize("groups", [1, 2, 20])
def test_groups(path: Path, groups: int) -> None:
    properties.test_groups_narrower_than_a_vector(path, groups)


@every_path
@both_directions
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 100])
def test_chunks(path: Path, chunk: int, reverse: bool) -> None:
    properties.test_the_steps_between_kept_states_do_not_matter(path, chunk, reverse)


@every_path
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_what_may_be_left_out(path: Path, without: tuple[str, ...], softplus: bool) -> None:
    properties.test_what_may_be_left_out(path, without, softplus)


@every_path
@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (0, 4, 0), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("forms", [("time", "time"), ("constant", "constant"), (2, "constant")], ids=str)
def test_nothing_to_scan(path: Path, shape: tuple[int, int, int], forms: Any) -> None:
    properties.test_nothing_to_scan(path, shape, forms)


@every_path
@pytest.mark.parametrize("forms", FORMS[:4], ids=str)
def test_reverse_is_flip_scan_flip(path: Path, forms: Any) -> None:
    properties.test_reverse_is_flip_scan_flip(path, forms)


@every_path
def test_properties(path: Path) -> None:
    properties.test_gradients_of_the_result_alone_and_of_the_state_alone(path)
    properties.test_softplus_is_the_identity_above_20(path)
    properties.test_a_subnormal_decay(path)
    properties.test_states_that_grow(path)
    properties.test_two_runs_give_the_same_bits(path)
    properties.test_error_of_a_long_sequence(path)


@every_path
@pytest.mark.parametrize("decay", [-1e-6, -1.0, -30.0, -87.5, -100.0, -1e4, -1e30], ids=str)
def test_states_that_keep_everything_or_nothing(path: Path, decay: float) -> None:
    properties.test_states_that_keep_everything_or_nothing(path, decay)


@every_path
def test_what_overflows_is_not_finite(path: Path) -> None:
    properties.test_what_overflows_is_not_finite(path)


@every_path
@both_directions
@pytest.mark.parametrize(("name", "value"), properties.BAD)
def test_a_bad_number_stays_in_its_channel(path: Path, name: str, value: float, reverse: bool) -> None:
    properties.test_a_bad_number_stays_in_its_channel(path, name, value, reverse)


@every_path
@pytest.mark.parametrize("name", ["B", "C"])
def test_a_bad_number_for_all_channels_stays_in_its_sample(path: Path, name: str) -> None:
    properties.test_a_bad_number_for_all_channels_stays_in_its_sample(path, name)


@every_path
def test_the_result_is_as_exact_as_stated(path: Path) -> None:
    inputs = make(1, 40, 300, 16, torch.float32)
    out, _ = path.scan(inputs)
    assert error(out, REFERENCE.scan(inputs.to(torch.float64))[0]) <= 1e-6


@every_path
@both_directions
def test_any_strides(path: Path, reverse: bool) -> None:
    """Streams as halves of wider tokens, B and C as parts of one projection, a gradient that is expanded."""
    inputs = make(2, 6, 30, 4, torch.float32)
    wide = torch.randn(2, 30, 17)
    views = inputs._replace(
        u=wide[..., :6].transpose(1, 2),
        z=wide[..., 6:12].transpose(1, 2),
        B=wide[..., 3:7].transpose(1, 2),
        C=wide[..., 13:17].transpose(1, 2),
        delta=inputs.delta[:1].expand(2, -1, -1),
    )
    grad, grad_state = torch.randn(2, 6, 1).expand(-1, -1, 30), torch.randn(2, 6, 4)
    copies = views.map(lambda t: t.contiguous())
    found = path.run(views, grad, grad_state, reverse=reverse)
    assert_same_bits(found, path.run(copies, grad.contiguous(), grad_state, reverse=reverse))


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forms", [("time", "time"), (2, "time")], ids=str)
def test_half_precision_is_read_and_written_only(path: Path, dtype: torch.dtype, forms: Any) -> None:
    """The result is that of float32, rounded once."""
    single = make(2, 6, 70, 4, torch.float32, forms=forms)
    half = single._replace(**{n: t.to(dtype) for n, t in single.present().items() if t.dim() > 2 and n != "A"})
    single = half.map(lambda t: t.float())
    grad, grad_state = cotangents(single)
    grad = grad.to(dtype)
    found, wanted = path.run(half, grad, grad_state), path.run(single, grad.float(), grad_state)
    assert (found.out.dtype, found.state.dtype) == (dtype, torch.float32)
    for name, tensor in found.named().items():
        if name.startswith("d "):
            assert tensor.dtype == half.present()[name[2:]].dtype
        exact = wanted.named()[name].to(tensor.dtype)
        torch.testing.assert_close(tensor, exact, rtol=0, atol=0)


def test_conversions_of_half_precision() -> None:
    """Every number, and halfway between every two."""
    library = scan_blocks.library()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)

    def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.equal(got.float().nan_to_num(7.0, 8e38, -8e38), wanted.float().nan_to_num(7.0, 8e38, -8e38))

    def convert(function: Any, code: int, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        target = torch.empty(len(source), dtype=dtype)
        function(code, len(source), ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()))
        return target

    for code, dtype in [(STREAM_CODES[d], d) for d in (torch.bfloat16, torch.float16)]:
        numbers = bits.view(dtype)
        assert same(convert(library.medgmae_widen, code, bits, torch.float32), numbers)
        finite = numbers.float()[numbers.isfinite()].sort().values
        middles = (finite[1:].double() / 2 + finite[:-1].double() / 2).float()
        around = [middles, middles.nextafter(torch.tensor(math.inf)), middles.nextafter(torch.tensor(-math.inf))]
        ends = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 65519.9, 65520.0, 1e-45])
        values = torch.cat([finite, *around, ends])
        assert same(convert(library.medgmae_narrow, code, values, torch.int16).view(dtype), values.to(dtype))


def test_spans_are_whole_chunks_and_fill_the_device() -> None:
    """Far more blocks than a device holds cut nothing; few are cut; the results agree."""
    inputs = make(1, 3, 330, 16)
    grad, grad_state = cotangents(inputs)
    results = [
        Path("", partial(scan_blocks.forward, room=n), partial(scan_blocks.backward, room=n)).run(
            inputs, grad, grad_state
        )
        for n in (0, 1, 5, 10, 40, 5000)
    ]
    for result in results[1:]:
        for name, tensor in result.named().items():
            torch.testing.assert_close(tensor, results[0].named()[name], rtol=1e-10, atol=1e-12)
