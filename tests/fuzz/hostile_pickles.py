"""Hostile pickles for checkpoint files: each is sound to read as a pickle, and means harm.

Calls with arguments that crash or take memory, tensors that lie about their memory, nesting, cycles, collisions, code.
"""

from __future__ import annotations

import io
import os
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

Push = Callable[[random.Random], bytes]

INTEGERS = (0, 1, -1, 7, 48, 255, 2**31, -(2**31), 2**40, 2**61 - 1, 2**63 - 1, 2**63, -(2**63), 2**64, 8 * 10**9)
TEXTS = (
    "",
    "O",
    "f8",
    "V2000000000",
    "S999999999",
    "U500000000",
    "(99999,99999)f8",
    "M8[ns]",
    "x" * 1000,
    "\u0000",
    "é",
)
CODECS = ("latin1", "utf-8", "hex", "bz2", "zip", "rot13", "idna", "punycode", "unicode_escape", "undefined")


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)) + data


def named(name: str) -> bytes:
    """GLOBAL."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    """A function with arguments on the stack."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def plain(rng: random.Random) -> bytes:
    """A harmless value of any kind."""
    return rng.choice(
        [b"N", b"\x88", b")", b"]", b"}", number(rng.choice(INTEGERS)), text(rng.choice(TEXTS)), b"G" + bytes(8)]
    )


def dtype(rng: random.Random) -> bytes:
    made = call("numpy.dtype", text(rng.choice(TEXTS)), number(rng.choice((0, 1))), number(1))
    state = (
        b"("
        + number(3)
        + text(rng.choice("<|>"))
        + b"NNN"
        + number(-1)
        + number(rng.choice(INTEGERS))
        + number(0)
        + b"tb"
    )
    return made + rng.choice([b"", state])


def scalar(rng: random.Random) -> bytes:
    core = rng.choice(["core", "_core"])
    value = call("_codecs.encode", text("\u0000" * rng.choice((0, 1, 8))), text(rng.choice(CODECS)))
    return call(
        f"numpy.{core}.multiarray.scalar", dtype(rng), *rng.choice([(), (value,), (plain(rng),), (value, value)])
    )


def memory(rng: random.Random) -> bytes:
    """Functions that take as much memory as they are told."""
    name = rng.choice(["builtins.bytearray", "builtins.bytes", "torch.Size", "builtins.set", "collections.Counter"])
    return call(name, rng.choice([number(rng.choice(INTEGERS)), plain(rng), text("x" * 99)]))


def odd_call(rng: random.Random) -> bytes:
    names = [
        *(
            "builtins.complex",
            "builtins.frozenset",
            "collections.OrderedDict",
            "collections.defaultdict",
            "torch.device",
        ),
        *("_codecs.encode", "torch.nn.parameter.Parameter", "torch.Tensor", "argparse.Namespace", "torch.float32"),
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "datetime.timedelta"),
        *(
            "torch.serialization._get_layout",
            "torch.FloatStorage",
            "torch.storage.UntypedStorage",
            "copyreg._reconstructor",
        ),
        *(
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_nested_tensor",
        ),
    ]
    arguments = [rng.choice([plain, odd_tensor, memory])(rng) for _ in range(rng.randrange(5))]
    made = call(rng.choice(names), *arguments)
    return made + rng.choice([b"", b"}b", plain(rng) + b"b"])


def storage(rng: random.Random) -> bytes:
    kind = rng.choice(["Float", "Double", "Long", "Untyped", "ComplexDouble", "QInt8", "Typed", "Evil"])
    parts = [text("storage"), named(f"torch.{kind}Storage"), text(rng.choice(["0", "1", "99", "../0", "data.pkl", ""]))]
    parts += [text(rng.choice(["cpu", "cuda:0", "meta", "xla:1", ""])), number(rng.choice((0, 1, 48, 4096, *INTEGERS)))]
    rng.random() < 0.1 and parts.pop(rng.randrange(len(parts)))
    return b"(" + b"".join(parts) + rng.choice([b"", b"", b"N"]) + b"tQ"


def shape(rng: random.Random) -> bytes:
    sizes = rng.choice(
        [(), (48,), (1, 1, 48), (2**40,), (2**31, 2**31), (0, 2**62), (-1,), (1,) * 100, (2,) * 70, (10**9, 48)]
    )
    return b"(" + b"".join(number(size) for size in sizes) + b"t"


def odd_tensor(rng: random.Random) -> bytes:
    """A tensor with any storage, offset, size and stride."""
    hooks = rng.choice([call("collections.OrderedDict"), b"N", plain(rng)])
    form = rng.choice(["_v2", "_v2", "_v2", "_v3", ""])
    parts = [storage(rng), number(rng.choice((0, 0, *INTEGERS))), shape(rng), shape(rng)]
    parts += [b"\x89", hooks] if form else []
    parts += [named(rng.choice(["torch.float8_e4m3fn", "torch.float64", "torch.bits8", "torch.nothing"]))] * (
        form == "_v3"
    )
    rng.random() < 0.1 and parts.pop(rng.randrange(len(parts)))
    return call(f"torch._utils._rebuild_tensor{form}", *parts)


def special_tensor(rng: random.Random) -> bytes:
    """A sparse, quantized, meta or subclassed one with arguments that do not fit each other."""
    indices, values = odd_tensor(rng), odd_tensor(rng)
    layout = call(
        "torch.serialization._get_layout",
        text(rng.choice(["torch.sparse_coo", "torch.sparse_csr", "torch.strided", "x"])),
    )
    return rng.choice(
        [
            call("torch._utils._rebuild_sparse_tensor", layout, b"(" + indices + values + shape(rng) + b"\x88t"),
            call(
                "torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), shape(rng), shape(rng), b"\x89"
            ),
            call("torch._tensor._rebuild_from_type_v2", named("builtins.eval"), named("torch.Tensor"), b")", b"}"),
            call(
                "torch._tensor._rebuild_from_type_v2",
                named("torch._utils._rebuild_tensor_v2"),
                named("x.Y"),
                b")",
                b"N",
            ),
            call(
                "torch._utils._rebuild_device_tensor_from_numpy",
                plain(rng),
                named("torch.float32"),
                text("cpu"),
                b"\x89",
            ),
        ]
    )


def deep(rng: random.Random) -> bytes:
    """Nesting that overflows a stack when it is hashed, compared, shown or freed by recursion."""
    depth = rng.choice([10, 1000, 30_000, 100_000, 100_000, 600_000])
    kind = rng.randrange(6)
    if kind == 0:
        return b")" + b"\x85" * depth
    if kind == 1:
        return b"]" * depth + b"N" + b"a" * depth
    if kind == 2:
        return b"(" * depth + b"t" * depth
    if kind == 3:
        return b"}" + (text("a") + b"}") * min(depth, 90_000) + b"s" * min(depth, 90_000)
    if kind == 4:
        return call("builtins.set", b"]" + b")" + b"\x85" * depth + b"a")
    depth = min(depth, 40_000)
    return named("builtins.frozenset") * depth + b")" + b"\x85R" * depth


def bomb(rng: random.Random) -> bytes:
    """Small to write, without end to walk: shared halves, cycles, keys that collide, very long numbers."""
    kind = rng.randrange(5)
    if kind == 0:
        return b")" + b"".join(b"q\xf0h\xf0\x86" for _ in range(rng.choice([20, 60, 5000])))
    if kind == 1:
        return b"]q\xf1h\xf1a" + b"}q\xf2" + text("model") + b"h\xf2s" + b"\x86"
    if kind == 2:
        keys = b"".join(number((2**61 - 1) * n) + b"N" for n in range(1, rng.choice([10, 20_000, 60_000])))
        return b"}(" + keys + b"u"
    if kind == 3:
        return number(1 << rng.choice([100, 10_000, 3_000_000]))
    return b"}q\xf3(" + b"".join(text(f"k{i}") + b"h\xf3" for i in range(rng.choice([3, 2000]))) + b"u"


def code(rng: random.Random) -> bytes:
    """A call that would leave a file behind."""
    canary = os.environ["FUZZ_CANARY"]
    name, argument = rng.choice(
        [
            *(
                ("os.system", f"touch {canary}"),
                ("posix.system", f"touch {canary}"),
                ("builtins.exec", f"open({canary!r}, 'w')"),
            ),
            *(("builtins.open", canary), ("subprocess.getoutput", f"touch {canary}"), ("torch.load", canary)),
            *(("numpy.load", canary), ("pickle.loads", "x"), ("builtins.getattr", "x"), ("torch.hub.load", canary)),
        ]
    )
    stack = text(name.rpartition(".")[0]) + text(name.rpartition(".")[2]) + b"\x93(" + text(argument) + b"tR"
    instance = b"(" + text(argument) + f"i{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode()
    return rng.choice([call(name, text(argument)), stack, instance])


def odd_operations(rng: random.Random) -> bytes:
    """Operations that torch.save does not use, and stacks that do not add up."""
    return rng.choice(
        [
            *(
                b"\x82\x01",
                b"\x83\x01\x00",
                b"\x84\x01\x00\x00\x00",
                b"(N1",
                b"N2",
                b"0",
                b"t",
                b"(",
                b"u",
                b"Q",
                b"NQ",
                b"P7\n",
            ),
            *(b"p99999999999\n", b"Np4294967295\n", b"r\xff\xff\xff\xff", b"g5000\n", b"j\xff\xff\xff\xff", b"h\xff"),
            *(
                b"\x8b\xff\xff\xff\x7f",
                b"X\xff\xff\xff\xff",
                b"B\xff\xff\xff\x7f",
                b"\x8d" + b"\xff" * 8,
                b"\x8e" + b"\xff" * 8,
            ),
            *(
                b"\x95" + b"\xff" * 8,
                b"\x8f(N\x90",
                b"(N\x91",
                b"I" + b"9" * 5000 + b"\n",
                b"F1e999\n",
                b"S'\\x'\n",
                b"Vx\\ud800\n",
            ),
            *(
                b"N" * 400_000 + b"(" + b"1",
                b"N0" * 300_000 + b"N",
                b"\x97",
                b"\x98",
                b"}}N",
                b"]N\x85R",
                b"c\n\nR",
                b"}(Nu",
            ),
        ]
    )


PUSHES: tuple[Push, ...] = (
    *(scalar, dtype, memory, odd_call, odd_tensor, odd_tensor, special_tensor, deep, bomb, code, odd_operations, plain),
)


def hostile_value(rng: random.Random) -> tuple[str, bytes]:
    """The name of a kind and the bytes that push one such value."""
    push = rng.choice(PUSHES)
    return push.__name__, push(rng)


def inject(data: bytes, place: str, name: str, value: bytes) -> bytes:
    """A file of torch.save with a hostile value in its pickle.

    Args:
        data: the sound file, whose content is a dictionary.
        place: "value" under ``name``, "key", "first" (pushed and left before all), or "whole".
        name: key of the value.
        value: what pushes it.
    """
    item = {"value": text(name) + value + b"s", "key": value + b"K\x01s"}.get(place, b"")
    whole = {"whole": b"\x80\x02" + value + b".", "first": b""}.get(place)

    def changed(pickle: bytes) -> bytes:
        if place == "first":
            return pickle[:2] + value + b"0" + pickle[2:]
        return whole or pickle[:-1] + item + b"."

    if data[:2] != b"PK":
        start = _end(data, 3)
        end = start + _end(data[start:], 1)
        return data[:start] + changed(data[start:end]) + data[end:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as copy:
        for entry in archive.namelist():
            content = archive.read(entry)
            copy.writestr(entry, changed(content) if entry.endswith("data.pkl") else content)
    return buffer.getvalue()


def _end(data: bytes, pickles: int) -> int:
    """The length of the first pickles in some bytes."""
    file = io.BytesIO(data)
    for _ in range(pickles):
        for _ in pickletools.genops(file):
            pass
    return file.tell()
