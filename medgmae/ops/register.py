"""Registers an operator with torch: schema, kernels by device, fake tensors, autograd, autocast and vmap.

An operator is described once, by a NamedTuple of its inputs: schema, order and number of the arguments follow from it,
and every implementation takes that tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Generic, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor

from medgmae.ops.native import native_runs

# A tensor of numbers to look up: it gets no gradient.
Index = Annotated[Tensor, "no gradient"]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    Sequence[int]: "int[]",
}
# Operators that an ONNX export in progress has words for; see medgmae/ops/onnx.py.
translated: frozenset[str] = frozenset()
_LIBRARY: Any = torch.library.Library("medgmae", "FRAGMENT")  # type: ignore[no-untyped-call]

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


class Kernels(Protocol):
    """A module that computes an operator on some device.

    ``forward(inputs)`` gives the result, or a tuple of them. ``backward(grad, *grads, *further, inputs)`` gets the
    gradients of all results (that of the first is always there) and the results behind the first, and gives the
    gradients of the differentiable inputs, None for an input that is absent.
    """

    @property
    def forward(self) -> Callable[..., Any]: ...  # noqa: D102
    @property
    def backward(self) -> Callable[..., Any]: ...  # noqa: D102


# The kernels for a call whose tensors are on that device.
Choice = Callable[[torch.device], Kernels]


@dataclass(frozen=True, eq=False)
class Operator(Generic[Inputs]):
    """What torch is told of ``medgmae::name`` and of its derivative ``medgmae::name_backward``.

    Attributes:
        name: of the operator.
        inputs: NamedTuple of what it takes: differentiable tensors, then each :data:`Index`, then options.
        fake: empty results of the right shapes and dtypes for some inputs.
        results: names of the tensors that it returns. Those behind the first are kept for the backward.
        joins_batch: every tensor begins with a batch axis and its samples are independent, so a dimension that vmap
            maps over joins that axis; otherwise vmap is a loop.
    """

    name: str
    inputs: type[Inputs]
    fake: Callable[[Inputs], Tensor | tuple[Tensor, ...]]
    results: tuple[str, ...] = ("out",)
    joins_batch: bool = False

    @cached_property
    def arguments(self) -> str:
        """The inputs in the words of a schema."""
        return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(self.inputs).items())

    @cached_property
    def tensors(self) -> int:
        """Tensors among the inputs."""
        return sum(_SCHEMA_TYPES[kind].startswith("Tensor") for kind in get_type_hints(self.inputs).values())

    @cached_property
    def differentiable(self) -> int:
        """Inputs that have a gradient."""
        return self.tensors - list(get_type_hints(self.inputs, include_extras=True).values()).count(Index)

    @cached_property
    def further(self) -> tuple[str, ...]:
        """The results behind the first."""
        return self.results[1:]

    def schemas(self) -> tuple[str, str]:
        """Of the operator and of its derivative."""
        lead = [f"Tensor grad_{self.results[0]}", *(f"Tensor? grad_{name}" for name in self.further)]
        lead += [f"Tensor {name}" for name in self.further]
        return (
            f"{self.name}({self.arguments}) -> {_returns(len(self.results))}",
            f"{self.name}_backward({', '.join(lead)}, {self.arguments}) -> {_returns(self.differentiable)}",
        )

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], Inputs]:
        """The arguments of the derivative: gradients and further results, and the inputs."""
        lead = 1 + 2 * len(self.further)
        return values[:lead], self.inputs(*values[lead:])

    def forward(self, choose: Choice) -> Callable[..., Any]:
        """The operator as torch calls it."""
        inputs = self.inputs

        def run(*values: Any) -> Any:
            return choose(values[0].device).forward(inputs(*values))

        return _without_autocast(run)

    def backward(self, choose: Choice) -> Callable[..., Any]:
        """The derivative as torch calls it; what is absent gets an empty gradient."""
        split = self.split

        def run(*values: Any) -> Any:
            lead, inputs = split(values)
            gradients = choose(values[0].device).backward(*lead, inputs)
            return _alone([inputs[0].new_empty(0) if g is None else g for g in gradients])

        return _without_autocast(run)

    def fake_forward(self, *values: Any) -> Any:
        """The operator for tensors without data, which is how exporters see it."""
        if torch.onnx.is_in_onnx_export() and self.name not in translated:
            raise NotImplementedError(
                f"ONNX has no operator for {self.name}, and torch.onnx.export no other words for it; "
                "medgmae.export_model writes the scans of an encoder or a UNETR (vim_..., unetr_vim_...) as loops, and "
                "torch.export takes every model as it is"
            )
        return self.fake(self.inputs(*values))

    def fake_backward(self, *values: Any) -> Any:
        """The derivative for tensors without data."""
        inputs = self.split(values)[1]
        shapes = [0 if tensor is None else tensor.shape for tensor in inputs[: self.differentiable]]
        owners = [inputs[0] if tensor is None else tensor for tensor in inputs[: self.differentiable]]
        return _alone([owner.new_empty(shape) for owner, shape in zip(owners, shapes, strict=True)])

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep for autograd what the derivative takes."""
        if self.further:
            ctx.set_materialize_grads(False)
        kept, tensors = output[1:] if self.further else (), self.tensors
        ctx.save_for_backward(*kept, *inputs[:tensors])
        ctx.options = inputs[tensors:]

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Autograd's backward."""
        saved, options = ctx.saved_tensors, ctx.options
        # Only the last of several results was used; the first has the shape of the first input.
        grad = torch.zeros_like(saved[len(self.further)]) if grads[0] is None else grads[0]
        gradients = _overload(f"{self.name}_backward")(grad, *grads[1:], *saved, *options)
        gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
        wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
        return (*wanted, *[None] * (self.tensors - self.differentiable + len(options)))

    def refuse(self, ctx: Any, *grads: Tensor) -> None:
        """Autograd's backward of the derivative."""
        raise NotImplementedError(
            f"{self.name} has no second-order gradient: call backward() or torch.autograd.grad() without "
            "create_graph=True, or detach the gradient before it is used"
        )


def register(operator: Operator[Any], reference: Kernels, native: Kernels, cuda: Kernels) -> Callable[..., Any]:
    """Define an operator and its derivative; return the operator. Which kernels run is decided at every call.

    Args:
        operator: what it is.
        reference: in plain torch, for every device.
        native: for CPU tensors.
        cuda: for CUDA tensors.
    """
    forward, backward = operator.name, f"{operator.name}_backward"
    for schema in operator.schemas():
        _LIBRARY.define(schema)
    for key, choose in choices(reference, native, cuda).items():
        _LIBRARY.impl(forward, operator.forward(choose), key)
        _LIBRARY.impl(backward, operator.backward(choose), key)
    library = torch.library
    library.register_fake(f"medgmae::{forward}", operator.fake_forward, lib=_LIBRARY)
    library.register_fake(f"medgmae::{backward}", operator.fake_backward, lib=_LIBRARY)
    library.register_autograd(f"medgmae::{forward}", operator.differentiate, setup_context=operator.save, lib=_LIBRARY)
    library.register_autograd(f"medgmae::{backward}", operator.refuse, lib=_LIBRARY)
    for name, lead in ((forward, 0), (backward, 1 + 2 * len(operator.further))):
        mapped = _joined(name, lead + operator.tensors) if operator.joins_batch else _looped(name)
        library.register_vmap(f"medgmae::{name}", mapped, lib=_LIBRARY)
    return _explaining(forward)


def choices(reference: Kernels, native: Kernels, cuda: Kernels) -> dict[str, Choice]:
    """Which kernels run, for each of torch's dispatch keys."""
    return {
        "CompositeExplicitAutograd": lambda _: reference,
        "CPU": lambda device: native if native_runs(device) else reference,
        "CUDA": lambda device: cuda if native_runs(device) else reference,
    }


def _explaining(name: str) -> Callable[..., Any]:
    """The operator, with a way out where torch has none."""
    operator = _overload(name)

    def call(*arguments: Any) -> Any:
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            raise NotImplementedError(
                f"torch.func.grad, vjp and jacrev do not take operators that are registered from Python, as {name} is; "
                "use torch.autograd.grad: of the sum of a torch.vmap for the gradient of every sample, with "
                "is_grads_batched=True for many cotangents"
            ) from error

    return call


def _overload(name: str) -> Callable[..., Any]:
    overload: Callable[..., Any] = getattr(torch.ops.medgmae, name).default
    return overload


def _alone(results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One tensor as itself, several as a tuple: so torch wants them."""
    return results[0] if len(results) == 1 else tuple(results)


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The precision of an operator is that of its inputs, so torch's functions inside it must not lower it."""

    def undisturbed(*values: Any) -> Any:
        device = values[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*values)
        with torch.autocast(device, enabled=False):
            return run(*values)

    return undisturbed


def _looped(name: str) -> Callable[..., Any]:
    """vmap as a loop: some inputs have no batch axis that a mapped dimension could join."""
    operator = _overload(name)

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        count = info.batch_size

        def one(value: Any, dim: int | None, i: int) -> Any:
            if dim is None or not isinstance(value, Tensor):  # of a list torch gives a dimension for each entry
                return value
            return value.select(dim, i) if count else value.sum(dim)  # of nothing: zeros, whose result tells the shapes

        calls = [[one(a, dim, i) for a, dim in zip(arguments, in_dims, strict=True)] for i in range(max(count, 1))]
        results = [operator(*call) for call in calls]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:count], 0
        return tuple(torch.stack(parts)[:count] for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return run


def _joined(name: str, tensors: int) -> Callable[..., Any]:
    """vmap by joining the mapped dimension with the batch axis of all the tensors."""
    operator = _overload(name)

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        mapped = [
            value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
            for value, dim in zip(arguments[:tensors], in_dims, strict=False)
        ]
        lead = mapped[0].shape[:2]
        out = operator(*(value.flatten(0, 1) for value in mapped), *arguments[tensors:])
        if isinstance(out, Tensor):
            return out.reshape(*lead, *out.shape[1:]), 0
        return tuple(t.reshape(*lead, *t.shape[1:]) for t in out), (0,) * len(out)

    return run
