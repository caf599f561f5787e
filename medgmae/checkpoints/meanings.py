"""What the names in a checkpoint's pickle stand for: tensors, their memory, dictionaries, things of no interest."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch


class DamagedError(Exception):
    """The bytes are not those of a file that torch.save wrote."""


class ForeignError(Exception):
    """A sound file of another kind than those that are read; the text says of which, and what to do."""


class Named(NamedTuple):
    """A class or function by its name: "torch.FloatStorage"."""

    name: str


class Inert:
    """Something whose kind is known and whose value nobody needs: a numpy scalar, a Namespace, a number as a key."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Storage(NamedTuple):
    """Memory of tensors in the file: its place by key, and so many values of a dtype."""

    key: str
    dtype: torch.dtype
    values: int


class Described(NamedTuple):
    """A tensor as the pickle describes it; what its fields hold is not checked.

    refused: why it cannot be read whatever its values, "" otherwise.
    """

    storage: Any = None
    offset: Any = 0
    size: Any = ()
    stride: Any = ()
    dtype: Any = None
    refused: str = ""


_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}
_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
}
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")

# Tensors of these kinds have no plain values in the file.
REFUSED = {
    "torch._utils._rebuild_sparse_tensor": "sparse; save its .to_dense()",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse; save its .to_dense()",
    "torch._utils._rebuild_nested_tensor": "nested; save it padded",
    "torch._utils._rebuild_qtensor": "quantized; save its .dequantize()",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (saved on the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "of a subclass of Tensor; save it as a plain tensor",
    "torch._utils._rebuild_device_tensor_from_numpy": "in the layout of another device; save its .cpu()",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "in the layout of another device; save its .cpu()",
    "torch._utils._rebuild_xla_tensor": "in the layout of another device; save its .cpu()",
}

_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
_REBUILDS = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TYPED = "torch._tensor._rebuild_from_type_v2"

# What training code puts beside the weights. None of it is built: :class:`Inert` takes its place.
_HARMLESS = {
    *("argparse.Namespace", "_codecs.encode", "torch.Size", "torch.device", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch.torch.Size"),
    *(f"builtins.{kind}" for kind in ("bytearray", "bytes", "complex", "frozenset", "set")),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *("numpy.dtype", "datetime.timedelta", "copyreg._reconstructor", "builtins.object"),
    *(f"torch.per_{what}" for what in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric")),
    "torch.per_channel_affine_float_qparams",
}
_DTYPE_CLASS = re.compile(r"numpy\.dtypes\.\w+DType|numpy\.dtype\[\w+\]")
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def is_known(name: str) -> bool:
    """Whether a class or function may be named in a checkpoint."""
    known = name in _DTYPES or name in REFUSED or name in _DICTIONARIES or name in _REBUILDS or name in _PARAMETERS
    return (
        known or name == _TYPED or name in _HARMLESS or bool(_STORAGE.fullmatch(name) or _DTYPE_CLASS.fullmatch(name))
    )


def put_items(target: dict[Any, Any], items: list[Any]) -> None:
    """Keys and values in turn; a key that is not text becomes inert, for its hash may cost any amount of time."""
    if len(items) % 2:
        raise DamagedError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key if type(key) is str else Inert(type(key).__name__)] = value


def storage_of(identity: Any) -> Storage | Inert:
    """What a persistent id stands for: ("storage", type, key, location, count), in old files with a view behind."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        return Inert("an object of another code base")
    kind, key, location, count = identity[1:5]
    match = _STORAGE.fullmatch(kind.name) if isinstance(kind, Named) else None
    view = len(identity) == 6 and identity[5] is not None
    if match is None or type(key) is not str or type(count) is not int or count < 0 or view:
        return Inert("a storage of an unknown kind")
    if match[1] not in _STORAGES or location == "meta":
        return Inert("a storage without values")
    return Storage(key, _STORAGES[match[1]], count)


def called(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call gives, as far as it matters: dictionaries and tensors."""
    if name in _DICTIONARIES:
        target: dict[Any, Any] = {}
        if arguments and isinstance(pairs := arguments[-1], list):  # how Python 2 writes an OrderedDict
            if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                raise DamagedError("a dictionary of something that is not pairs")
            put_items(target, [item for pair in pairs for item in pair])
        return target
    if name in REFUSED:
        return Described(refused=REFUSED[name])
    if name in _REBUILDS:
        return _tensor(name, arguments)
    if name in _PARAMETERS and arguments and isinstance(arguments[0], Described):
        return arguments[0]
    if name == _TYPED and len(arguments) == 4 and isinstance(arguments[0], Named) and isinstance(arguments[2], tuple):
        return called(arguments[0].name, arguments[2])
    return Inert(name)


def _tensor(name: str, arguments: tuple[Any, ...]) -> Described:
    if len(arguments) < 4:
        raise DamagedError("a tensor without its size")
    storage, offset, size, stride = arguments[:4]
    dtype = storage.dtype if isinstance(storage, Storage) else None
    metadata = arguments[6] if len(arguments) > 6 else None
    if name.endswith("_v3"):
        dtype = _DTYPES.get(metadata.name) if isinstance(metadata, Named) else None
        metadata = arguments[7] if len(arguments) > 7 else None
    refused = ""
    if isinstance(storage, Inert):
        refused = f"in {storage.kind}"
    elif metadata:
        refused = "marked as conjugated or negated; save its .resolve_conj().resolve_neg()"
    return Described(storage, offset, size, stride, dtype, refused)
