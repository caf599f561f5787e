"""Random inputs for the tests of the selective scan, and a plain account of what a scan should return.

The account shares no code with the library: one token after the other in float64, softplus and the gate written out,
and gradients from torch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medgmae.ops import native_info
from medgmae.ops.scan import native, reference
from medgmae.ops.scan.inputs import ScanInputs

torch.set_num_threads(1)  # the tensors are so small that threads would only wait for each other

RUNNABLE = [name for name, runs in native_info()["cpu_variants"].items() if runs]
# Forms of B and C: one per token, so many groups of channels with their own, or one for the whole sequence.
FORMS: list[tuple[Any, Any]] = [("time", "time"), (3, 3), ("constant", "constant"), ("time", "constant")]
FORMS += [("constant", 2), (2, "time"), (2, 3)]


class Inputs(NamedTuple):
    """The tensors of a scan, as ``medgmae.ops.selective_scan`` takes them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every tensor that is there, changed."""
        return Inputs(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]

    def to(self, *where: Any) -> Inputs:
        return self.map(lambda t: t.to(*where))

    def leaves(self) -> Inputs:
        """Copies with the same strides that ask for a gradient."""
        return self.map(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())

    def present(self) -> dict[str, Tensor]:
        return {name: t for name, t in zip(self._fields, self, strict=True) if t is not None}

    def flip(self) -> Inputs:
        """The sequence backwards."""
        by_time = {name: t.flip(-1) for name, t in self.present().items() if t.dim() > 2}
        return self._replace(**by_time)


def make(
    batch: int = 2,
    channels: int = 6,
    length: int = 9,
    states: int = 4,
    dtype: torch.dtype = torch.float64,
    *,
    forms: tuple[Any, Any] = ("time", "time"),
    without: Sequence[str] = (),
    seed: int = 0,
) -> Inputs:
    """Ordinary numbers: states that forget within a few to a few dozen tokens. Channels of a token lie side by side."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def by_token() -> Tensor:
        return normal(batch, length, channels).to(dtype).transpose(1, 2)

    def matrix(form: Any) -> Tensor:
        if form == "constant":
            return normal(channels, states).to(dtype)
        if form == "time":
            return normal(batch, length, states).to(dtype).transpose(1, 2)
        return normal(batch, length, form, states).to(dtype).permute(0, 2, 3, 1)

    full = Inputs(
        u=by_token(),
        delta=by_token() * 0.5 - 0.7,
        A=-(0.5 * normal(channels, states)).exp().to(dtype),
        B=matrix(forms[0]),
        C=matrix(forms[1]),
        D=normal(channels).to(dtype),
        z=by_token(),
        delta_bias=0.3 * normal(channels).to(dtype),
    )
    return full._replace(**dict.fromkeys(without))


def textbook(inputs: Inputs, softplus: bool = True, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The result (B, D, L) and the state (B, D, N) after the last scanned token, from the definition in float64."""
    out, states = walk(inputs, softplus, reverse)
    return out, states[-1]


def walk(inputs: Inputs, softplus: bool = True, reverse: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The result, and the state before the first and after every token, in the order of the scan."""
    u, delta, A, B, C, skip, z, bias = inputs.to(torch.float64)
    batch, channels, length = u.shape

    def at(weights: Tensor, t: int) -> Tensor:
        if weights.dim() == 2:
            return weights[None]
        if weights.dim() == 3:
            return weights[:, None, :, t]
        return weights[:, [d // (channels // weights.shape[1]) for d in range(channels)], :, t]

    states, columns = [u.new_zeros(batch, *A.shape)], [u.new_zeros(batch, channels)] * length
    for t in range(length)[::-1] if reverse else range(length):
        step = delta[:, :, t] if bias is None else delta[:, :, t] + bias
        if softplus:
            step = torch.where(step > 20, step, torch.log(1 + torch.exp(step.clamp(max=21))))
        h = torch.exp(step[:, :, None] * A) * states[-1] + (step * u[:, :, t])[:, :, None] * at(B, t)
        states.append(h)
        y = (at(C, t) * h).sum(-1)
        if skip is not None:
            y = y + skip * u[:, :, t]
        columns[t] = y if z is None else y * z[:, :, t] / (1 + torch.exp(-z[:, :, t]))
    return (torch.stack(columns, -1) if length else u.new_zeros(u.shape)), states


class Results(NamedTuple):
    """What a scan gives: the result, the last state, and gradients by the names of the inputs."""

    out: Tensor
    state: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {"out": self.out, "state": self.state, **{f"d {name}": g for name, g in self.gradients.items()}}


def cotangents(inputs: Inputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    """For the result and for the last state."""
    random = torch.Generator().manual_seed(seed)
    batch, channels, length = inputs.u.shape
    grad = torch.randn(batch, length, channels, generator=random, dtype=torch.float64).transpose(1, 2)
    state = torch.randn(batch, channels, inputs.A.shape[1], generator=random, dtype=torch.float64)
    return grad.to(inputs.u.dtype), state.to(inputs.A.dtype)


def remembered(function: Callable[..., Results]) -> Callable[..., Results]:
    """What a function gave for the same numbers before: every path of a test asks for one and the same account."""
    known: dict[Any, Results] = {}

    def key(value: Any) -> Any:
        if isinstance(value, Tensor):
            dense = value.detach().clone(memory_format=torch.contiguous_format).flatten()
            return value.shape, value.dtype, dense.view(torch.uint8).numpy().tobytes()
        return tuple(map(key, value)) if isinstance(value, tuple) else value

    def run(*arguments: Any, **options: Any) -> Results:
        numbers = key((arguments, tuple(sorted(options.items()))))
        if numbers not in known:
            known[numbers] = function(*arguments, **options)
        return known[numbers]

    return run


@remembered
def expected(inputs: Inputs, grad: Tensor, grad_state: Tensor | None, softplus: bool, reverse: bool) -> Results:
    """The account and its gradients."""
    leaves = inputs.to(torch.float64).leaves()
    out, state = textbook(leaves, softplus, reverse)
    names = leaves.present()
    loss = (out * grad.double()).sum() + (0 if grad_state is None else (state * grad_state.double()).sum())
    loss = loss + sum(0 * t.sum() for t in names.values())  # an empty sequence depends on nothing
    gradients = torch.autograd.grad(loss, list(names.values()))
    return Results(out.detach(), state.detach(), dict(zip(names, gradients, strict=True)))


class Path(NamedTuple):
    """One implementation: what the registration of ``medgmae::selective_scan`` takes."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]

    def scan(
        self, inputs: Inputs, softplus: bool = True, reverse: bool = False, chunk: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Result (B, D, L) and last state (B, D, N)."""
        out, states = self.forward(operands(inputs, softplus, reverse, chunk))
        return out.transpose(1, 2), last(states, inputs)

    def run(
        self,
        inputs: Inputs,
        grad: Tensor,
        grad_state: Tensor | None = None,
        softplus: bool = True,
        reverse: bool = False,
        chunk: int = 64,
    ) -> Results:
        """Forward and backward."""
        given = operands(inputs, softplus, reverse, chunk)
        out, states = self.forward(given)
        gradients = self.backward(grad.transpose(1, 2), of_last(grad_state, states), states, given)
        assert [g is None for g in gradients] == [t is None for t in inputs]
        turned = [public(g, t) for g, t in zip(gradients, inputs, strict=True) if g is not None and t is not None]
        return Results(out.transpose(1, 2), last(states, inputs), dict(zip(inputs.present(), turned, strict=True)))


def arguments(inputs: Inputs) -> list[Tensor | None]:
    """The same tensors as the operators take them: (B, L, D), (B, L, G, N)."""
    turned = []
    for name, t in zip(Inputs._fields, inputs, strict=True):
        if t is not None and t.dim() > 2:
            t = t.transpose(1, 2) if t.dim() == 3 else t.permute(0, 3, 1, 2)
            t = t.unsqueeze(2) if name in "BC" and t.dim() == 3 else t
        turned.append(t)
    return turned


def operands(inputs: Inputs, softplus: bool = True, reverse: bool = False, chunk: int = 64) -> ScanInputs:
    """The inputs of the operator."""
    return ScanInputs(*arguments(inputs), softplus, reverse, chunk)  # type: ignore[arg-type]


def of_last(grad_state: Tensor | None, states: Tensor) -> Tensor | None:
    """The gradient of the last state (B, D, N) as one of all kept states; nobody may read that of the others."""
    if grad_state is None:
        return None
    gradient = torch.full_like(states, torch.nan)
    gradient[:, -1:] = grad_state.transpose(1, 2)[:, None]
    return gradient


def public(gradient: Tensor, argument: Tensor) -> Tensor:
    """A gradient of an operator's argument, in the form of the public function's."""
    if argument.dim() == 3:
        return (gradient.squeeze(2) if gradient.dim() == 4 else gradient).transpose(1, 2)
    return gradient.permute(0, 2, 3, 1) if argument.dim() == 4 else gradient


def last(states: Tensor, inputs: Inputs) -> Tensor:
    """The state after the last scanned token, (B, D, N), out of those that are kept."""
    if states.shape[1]:
        return states[:, -1].transpose(1, 2)
    return states.new_zeros(states.shape[0], *inputs.A.shape)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest absolute value."""
    if not wanted.numel():
        return 0.0
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


def assert_close(got: Results, wanted: Results, values: float, gradients: float) -> None:
    """Every tensor within its bound, relative to its largest value."""
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, tensor in got.named().items():
        exact = wanted.named()[name]
        assert tensor.shape == exact.shape, name
        difference = error(tensor, exact)
        assert difference <= (gradients if name.startswith("d ") else values), f"{name}: {difference:.2e}"


def assert_same_bits(got: Results, wanted: Results) -> None:
    for name, tensor in got.named().items():
        torch.testing.assert_close(tensor, wanted.named()[name], rtol=0, atol=0, equal_nan=True, msg=name)


REFERENCE = Path("reference", reference.forward, reference.backward)
reference_of = remembered(REFERENCE.run)
NATIVE = [
    Path(name, partial(native.forward, variant=name), partial(native.backward, variant=name)) for name in RUNNABLE
]
PATHS = [REFERENCE, *NATIVE]
