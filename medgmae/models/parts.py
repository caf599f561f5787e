"""Parts that models are built of, which say what they were built with and what their weights need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

OutputFormat = Literal["NCDHW", "NCHW", "NLC"]
Taps = int | Sequence[int] | None
Pair = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """Something that no tensor shows and that weights need of the model they are put into.

    value: as it is in the model.
    option: of ``create_model``, that decides it; "" for none.
    when: "always"; "lenient": may differ under ``strict=False``; "pretraining": may differ when an encoder goes on
        without the decoder that it was pre-trained with.
    """

    value: Any
    option: str = ""
    when: Literal["always", "lenient", "pretraining"] = "always"


class Part(nn.Module, ABC):
    """A module that can say what it was built with: an encoder, a decoder, a whole model."""

    _built: dict[str, Any]

    def options(self) -> dict[str, Any]:
        """The arguments of the constructor that give this module again, as they are now."""
        current: dict[str, Any] = {}
        for name, built in self._built.items():
            value = getattr(self, name, built)
            if hasattr(value, "described"):
                current[name] = value.described()
            else:  # a table of positions, or none, has the name of the option that says of which kind it is
                current[name] = built if isinstance(value, Tensor | nn.Module) or name in self._parameters else value
        return current

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave undecayed: tables of positions, tokens, and what blocks name."""
        names = {name for name, _ in self.named_parameters(recurse=False)}
        for name, module in self.named_modules():
            if name and callable(undecayed := getattr(module, "no_weight_decay", None)):
                names |= {f"{name}.{parameter}" for parameter in undecayed()}
        return names

    @abstractmethod
    def settings(self) -> dict[str, Setting]:
        """What weights need of this module though no tensor shows it, by name."""

    def described(self) -> dict[str, Any]:
        """:meth:`options` with the name of the class, for the options of a model that this is a part of."""
        return {"class": type(self).__name__, **self.options()}


class Readable(ABC):
    """A part whose options can be read off a state dictionary, as far as tensors show them."""

    FIXED_SIZES: ClassVar[tuple[str, ...]]
    """Keys of :meth:`read_sizes` that make an architecture; the others are its options."""

    @classmethod
    @abstractmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a state dictionary of this class shows; None for one of another class."""


class Report(Protocol):
    """What loading weights did; :class:`~medgmae.LoadReport` has it all."""

    source: str
    loaded: list[str]
    resized: dict[str, str]
    adapted: dict[str, str]
    unused: dict[str, str]
    missing: list[str]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """How many blocks a state dictionary has entries of."""
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, from the ``locals()`` of its first line."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, got {value!r}")


def check_classes(num_classes: int) -> None:
    """Raise ValueError unless this is a number of classes, 0 for none."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 0:
        raise ValueError(f"num_classes must be a whole number, 0 for no head, got {num_classes!r}")


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of the blocks, growing linearly from 0 to that of the last one.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """
    if not isinstance(last, Real) or not 0 <= last <= 1:
        raise ValueError(f"drop_path_rate must be between 0 and 1, got {last!r}")
    return [last * i / max(depth - 1, 1) for i in range(depth)]
