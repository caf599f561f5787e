"""The decoder's norm with its activation, and its convolutions: gradients of the plain forms, in every surrounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.convolutions import ResidualBlock, UpBlock, convolution
from medgmae.layers.norms import EPS, SLOPE, norm_activate, norm_add_activate, plain_norm_activate
from medgmae.models.unetr_decoder import UNETRDecoder

Maps = Callable[[Tensor, Tensor], Tensor]


def plain_norm(x: Tensor) -> Tensor:
    axes = tuple(range(2, x.dim()))
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + EPS).sqrt()


FORMS: dict[str, tuple[Maps, Maps]] = {
    "alone": (lambda x, _: norm_activate(x), lambda x, _: F.leaky_relu(plain_norm(x), SLOPE)),
    "shortcut": (
        lambda x, s: norm_add_activate(x, s, False),
        lambda x, s: F.leaky_relu(plain_norm(x) + s, SLOPE),
    ),
    "normed shortcut": (
        lambda x, s: norm_add_activate(x, s, True),
        lambda x, s: F.leaky_relu(plain_norm(x) + plain_norm(s), SLOPE),
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, shortcut = (3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64) + 1).to(dtype)
    return x.requires_grad_(), shortcut.requires_grad_()


def pulled(run: Maps, x: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of a sum with uneven weights."""
    result = run(x, shortcut)
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape).square()
    return result.detach(), *torch.autograd.grad((result * weights).sum(), [x, shortcut], materialize_grads=True)


@forms
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 3), (1, 4, 3, 5), (2, 1, 2, 1, 1), (3, 2, 1, 1)], ids=str)
def test_values_and_gradients_are_the_definition(form: str, shape: tuple[int, ...]) -> None:
    ours, plain = FORMS[form]
    x, shortcut = maps(shape)
    torch.testing.assert_close(pulled(ours, x, shortcut), pulled(plain, x, shortcut), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, (x, shortcut))


@forms
def test_what_other_devices_compute_is_the_same(form: str) -> None:
    shared, norm_shortcut = form != "alone", form == "normed shortcut"
    x, shortcut = maps((2, 3, 4, 2, 3))
    wanted = pulled(FORMS[form][1], x, shortcut)
    found = pulled(lambda x, s: plain_norm_activate(x, s if shared else None, norm_shortcut), x, shortcut)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@forms
@pytest.mark.parametrize("last", [False, True])
def test_the_layout_in_memory_changes_nothing(form: str, last: bool) -> None:
    x, shortcut = maps((2, 4, 3, 5, 4))
    turned = x.detach().to(memory_format=torch.channels_last_3d).requires_grad_() if last else x
    ours, plain = FORMS[form]
    torch.testing.assert_close(pulled(ours, turned, shortcut), pulled(plain, x, shortcut), rtol=1e-9, atol=1e-9)


@forms
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_half_precision_is_as_exact_as_its_numbers(form: str, dtype: torch.dtype, error: float) -> None:
    """Also where sums reach beyond the largest number of float16."""
    x, shortcut = maps((1, 2, 48, 48, 48), dtype)
    exact = (x.detach().double().requires_grad_(), shortcut.detach().double().requires_grad_())
    for found, wanted in zip(pulled(FORMS[form][0], x, shortcut), pulled(FORMS[form][1], *exact), strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= error * wanted.norm()


def test_what_went_in_is_not_kept() -> None:
    kept: list[Tensor] = []
    x, shortcut = maps((1, 2, 4, 4, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one = norm_activate(x)
        two = norm_add_activate(x, shortcut, True)
    whole = [t.data_ptr() for t in kept if t.numel() == x.numel()]
    assert len(whole) == 3  # the results, and the one norm that the sum hides
    assert {one.data_ptr(), two.data_ptr()} < set(whole)
    assert not {x.data_ptr(), shortcut.data_ptr()} & set(whole)


def test_a_second_derivative_is_refused_in_words() -> None:
    x, shortcut = maps((1, 2, 4, 4, 4))
    (first,) = torch.autograd.grad(norm_add_activate(x, shortcut, True).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_several_maps_are_their_concatenation(dims: int, kernel: int) -> None:
    torch.manual_seed(0)
    conv = convolution(dims, 5, 4, kernel, bias=True).double()
    parts = [torch.rand(2, width, *(3, 4, 5)[:dims], dtype=torch.float64, requires_grad=True) for width in (2, 3)]
    plain = {2: F.conv2d, 3: F.conv3d}[dims](torch.cat(parts, 1), conv.weight, conv.bias, padding=kernel // 2)
    inputs = [*parts, conv.weight, conv.bias]
    torch.testing.assert_close(conv(*parts), plain)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(conv(*parts).square().sum(), inputs), wanted)


def up_block() -> tuple[UpBlock, Tensor, Tensor]:
    torch.manual_seed(0)
    block = UpBlock(4, 3, (2, 2, 2), skip=True).double()
    x = torch.rand(2, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    return block, x, torch.rand(2, 3, 5, 4, 6, dtype=torch.float64, requires_grad=True)  # one odd: the map is cut


def slopes(run: Callable[..., Tensor], block: nn.Module, *inputs: Any) -> tuple[Tensor, ...]:
    x, skip = inputs[:2]
    return torch.autograd.grad(run(*inputs).square().sum().sin(), [x, skip, *block.parameters()])


def test_a_block_computed_again_has_the_same_gradients() -> None:
    block, x, skip = up_block()
    assert torch.equal(block(x, skip, True), block(x, skip))
    wanted = slopes(block, block, x, skip)
    torch.testing.assert_close(slopes(block, block, x, skip, True), wanted, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x, skip: block(x, skip, True), (x, skip), fast_mode=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_is_copied_and_compiled(recompute: bool) -> None:
    block, x, skip = up_block()
    wanted = slopes(block, block, x, skip)
    twin = copy.deepcopy(block)
    compiled: Any = torch.compile(block, backend="aot_eager")
    for run, owner in ((twin, twin), (compiled, block)):
        torch.testing.assert_close(slopes(run, owner, x, skip, recompute), wanted, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_function() -> None:
    residual = ResidualBlock(3, 2, 2).double()
    x = torch.rand(1, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(residual(x).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda y: residual(y).square().sum())(x.detach()), wanted)


def test_training_keeps_no_map_of_the_finest_step_but_three() -> None:
    """On the CPU: the skip connection, one norm and the result; without it there are a dozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = UNETRDecoder(8, (4, 4, 4), 1, 2, feature_size=4)
    image, tap, last = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 8, 4, 4, 4), torch.rand(1, 8, 4, 4, 4)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        decoder(image, [tap], last)
    assert sum(t.numel() == 4 * 16**3 for t in kept.values()) == 3
