"""What a pickle of ``torch.save`` says, as plain data: nothing in it is imported, called or given what it asks for.

``torch.load(weights_only=True)`` still calls a list of functions with arguments that a stranger chose: numpy's scalars
crash on some, ``bytearray`` takes whatever memory it is told to, deep tuples overflow the stack when they are hashed.
Here names stay names, tensors stay descriptions until someone wants their values, and dictionaries have text for keys.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from medgmae.checkpoints.meanings import (
    PYTHON2,
    DamagedError,
    Inert,
    Named,
    Storage,
    called,
    is_known,
    put_items,
    storage_of,
)

# A ViT-L with its optimiser takes 60,000 operations and 0.3 MB.
MAX_OPERATIONS = 500_000
MAX_BYTES = 64 << 20

_SHOWN = 12


class ForbiddenError(Exception):
    """A pickle names objects that are not read; the text lists them."""


class Pickled(NamedTuple):
    """What a pickle says.

    content: numbers, text, bytes, lists, tuples and dictionaries; :class:`Described` for tensors; :class:`Inert` for
        the rest.
    storages: the memory that its tensors are in, by key.
    """

    content: Any
    storages: dict[str, Storage]


def read_pickle(file: BinaryIO, limit: int = MAX_OPERATIONS) -> Pickled:
    """The next pickle in a file that holds :data:`MAX_BYTES` at most; of ``limit`` operations at most.

    Raises:
        ForbiddenError: it names classes or functions other than those of a checkpoint.
        DamagedError: it is cut, not a pickle, longer than a checkpoint's or uses operations that torch.save does not.
    """
    machine = _Machine()
    try:
        content = machine.run(file, limit)
    except Exception as error:  # pickletools raises several kinds for damaged bytes
        machine.check_names()
        text = str(error)[:200] or type(error).__name__
        raise DamagedError(f"its pickle is damaged: {text}") from error
    machine.check_names()
    return Pickled(content, machine.storages)


class _Machine:
    """The stack, the marks on it and the memo of an unpickler."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.forbidden: dict[str, None] = {}  # an ordered set

    def check_names(self) -> None:
        """Raise ForbiddenError if a name was met that is not allowed."""
        if self.forbidden:
            names = [name if name.isprintable() and len(name) < 200 else repr(name)[:200] for name in self.forbidden]
            more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            raise ForbiddenError(", ".join([*sorted(names)[:_SHOWN], *more]))

    def run(self, file: BinaryIO, limit: int) -> Any:
        for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if number > limit:
                raise DamagedError(f"more than {limit} operations; a checkpoint's has some thousands")
            if operation.name == "STOP":
                return self.pop()
            step = _STEPS.get(operation.name)
            if step is None:
                raise DamagedError(f"operation {operation.name}, which torch.save does not use")
            step(self, argument)
        raise DamagedError("it does not end")

    def skip(self, _: Any) -> None:
        """The protocol and the length of a frame."""

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise DamagedError("the stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise DamagedError("there is no mark")
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def remember(self, number: int | None) -> None:
        number = len(self.memo) if number is None else number
        if not 0 <= number <= MAX_OPERATIONS:  # numbers far apart could be chosen to collide in the memo
            raise DamagedError("a memo number out of range")
        self.memo[number] = self.top()

    def recall(self, number: int) -> None:
        if number not in self.memo:
            raise DamagedError("a memo number that stands for nothing")
        self.stack.append(self.memo[number])

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        full = f"{PYTHON2.get(module, module)}.{name}"
        if not is_known(full):
            self.forbidden[f"{module}.{name}"] = None
        self.stack.append(Named(full))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedError("the name of a class is not text")
        self.name(f"{module} {name}")

    def instance(self, argument: str) -> None:
        self.pop_to_mark()
        self.name(argument)
        self.stack.append(Inert(self.pop().name))

    def build_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, dict):
            put_items(target, items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def build_dict(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise DamagedError("a call of something that is not a function")
        self.stack.append(called(function.name, arguments))

    def new(self, _: Any) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, Named) or not isinstance(arguments, tuple):
            raise DamagedError("a new object of something that is not a class")
        self.stack.append(called(cls.name, ()))

    def new_with_names(self, _: Any) -> None:
        self.pop()
        self.new(None)

    def discard_state(self, _: Any) -> None:
        self.pop()  # attributes: of a Namespace, or the metadata of an OrderedDict
        self.top()

    def persistent(self, _: Any) -> None:
        storage = storage_of(self.pop())
        if isinstance(storage, Storage) and self.storages.setdefault(storage.key, storage) != storage:
            raise DamagedError("one storage has two sizes")
        self.stack.append(storage)

    def frozen_set(self, _: Any) -> None:
        self.pop_to_mark()
        self.stack.append(Inert("frozenset"))

    def drop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def drop_to_mark(self, _: Any) -> None:
        self.pop_to_mark()


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), _Machine.recall),
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.skip),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": _Machine.mark,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "INST": _Machine.instance,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.build_tuple(1),
    "TUPLE2": lambda machine, _: machine.build_tuple(2),
    "TUPLE3": lambda machine, _: machine.build_tuple(3),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": _Machine.build_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "EMPTY_SET": lambda machine, _: machine.push(Inert("set")),
    "ADDITEMS": _Machine.drop_to_mark,
    "FROZENSET": _Machine.frozen_set,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_names,
    "BUILD": _Machine.discard_state,
    "BINPERSID": _Machine.persistent,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_to_mark,
    "DUP": lambda machine, _: machine.push(machine.top()),
}
