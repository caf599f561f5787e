"""Ways to damage a checkpoint: each changes the bytes of a file in place.

Bits flipped, bytes overwritten, cut, inserted; zip entries dropped, renamed, swapped, compressed, doubled; pickle bytes
mutated and code injected, with checksums that are right again; safetensors headers edited.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """One to eight bits."""
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[_position(data, rng)] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    """A run of bytes with zeros, ones or noise."""
    start, length = _position(data, rng), rng.choice([1, 4, 8, 64, 512])
    end = min(len(data), start + length)
    data[start:end] = rng.choice([bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)])


def cut(data: bytearray, rng: random.Random) -> None:
    """Drop the end."""
    del data[_position(data, rng) :]


def shift(data: bytearray, rng: random.Random) -> None:
    """Insert or delete bytes in the middle."""
    start, length = _position(data, rng), rng.choice([1, 8, 100])
    data[start : start + rng.choice([0, length])] = rng.randbytes(rng.choice([0, length]))


def _position(data: bytearray, rng: random.Random) -> int:
    """Anywhere, but often near the ends, where headers are."""
    edge = min(len(data) - 1, 2000)
    return rng.choice([rng.randrange(len(data)), rng.randrange(edge), len(data) - 1 - rng.randrange(edge)])


def tamper_zip(data: bytearray, rng: random.Random) -> None:
    """Drop, rename, swap, cut, empty, compress or double entries; sums are right again."""
    entries = _entries(data)
    names = list(entries)
    one, two = rng.choice(names), rng.choice(names)
    action = rng.choice(["drop", "rename", "swap", "cut", "grow", "compress", "double"])
    if action == "drop":
        del entries[one]
    elif action == "rename":
        entries[rng.choice([one + "x", two, one.replace("data/", "data/1"), "../" + one])] = entries.pop(one)
    elif action == "swap":
        entries[one], entries[two] = entries[two], entries[one]
    elif action == "cut":
        entries[one] = entries[one][: rng.randrange(len(entries[one]) + 1)]
    elif action == "grow":
        entries[one] += rng.randbytes(64)
    _write_entries(data, entries, action == "compress", one if action == "double" else None)


def mutate_pickle(data: bytearray, rng: random.Random) -> None:
    """Change bytes of the pickle, opcodes included, and make the sums right again."""
    entries = _entries(data)
    name = next(n for n in entries if n.endswith("data.pkl"))
    content = bytearray(entries[name])
    for _ in range(rng.choice([1, 1, 2, 5])):
        spot = rng.randrange(len(content))
        action = rng.choice(["byte", "opcode", "delete", "repeat"])
        if action == "byte":
            content[spot] = rng.randrange(256)
        elif action == "opcode":
            content[spot] = rng.choice(b".()0Q}]tuRbaseX\x85\x86\x87\x88\x89\x8cqhrjKJMGNcio\x93\x94\x8a\x8bIL")
        elif action == "delete":
            del content[spot : spot + rng.choice([1, 2, 9])]
        else:
            content[spot:spot] = content[spot : spot + rng.choice([1, 5, 40])]
    entries[name] = bytes(content)
    _write_entries(data, entries)


def inject_code(data: bytearray, rng: random.Random) -> None:
    """Calls that would leave a file behind, in front of what the pickle builds."""
    canary = os.environ["FUZZ_CANARY"].encode()
    calls = [
        b"cos\nsystem\n(Vtouch " + canary + b"\ntR0",
        b"cbuiltins\nopen\n(V" + canary + b"\nVw\ntR0",
        b"(Vtouch " + canary + b"\nios\nsystem\n0",
        b"csubprocess\ngetoutput\n(Vtouch " + canary + b"\ntR0",
        b"cbuiltins\neval\n(Vopen('" + canary + b"','w')\ntR0",
        b"ctorch\nload\n(V" + canary + b"\ntR0",
        b"ctorch.serialization\nload\n(V" + canary + b"\ntR0",
    ]
    call = rng.choice(calls)
    if zipfile.is_zipfile(io.BytesIO(data)):
        entries = _entries(data)
        name = next(n for n in entries if n.endswith("data.pkl"))
        entries[name] = entries[name][:2] + call + entries[name][2:]
        _write_entries(data, entries)
    else:
        spot = data.find(b"\x80\x02", rng.choice([0, 1, 20]))
        data[spot + 2 : spot + 2] = call


def _entries(data: bytes | bytearray) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write_entries(
    data: bytearray, entries: dict[str, bytes], compress: bool = False, double: str | None = None
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)
        if double is not None:
            archive.NameToInfo.clear()  # zipfile would warn of what is meant here
            archive.writestr(zipfile.ZipInfo(double), entries[double][::-1])
    data[:] = buffer.getvalue()


def edit_header(data: bytearray, rng: random.Random) -> None:
    """Change a name, dtype, shape, offset or the metadata in a safetensors header, or its length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(bytes(data[8 : 8 + length]))
    names = [name for name in header if name != "__metadata__"]
    one, two = rng.choice(names), rng.choice(names)
    action = rng.choice(["name", "dtype", "shape", "offset", "swap", "config", "drop", "length"])
    if action == "name":
        header[rng.choice([one[:-1], two, f"{one}.x", ""])] = header.pop(one)
    elif action == "dtype":
        header[one]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U32", "F8_E4M3", "BOOL", "x"])
    elif action == "shape":
        header[one]["shape"] = rng.choice([header[one]["shape"][::-1], [], [1 << 40], [0], [-1], header[two]["shape"]])
    elif action == "offset":
        header[one]["data_offsets"] = rng.choice([[0, 48], header[two]["data_offsets"], [1 << 50, 1 << 51], [48, 0]])
    elif action == "swap":
        header[one], header[two] = header[two], header[one]
    elif action == "config":
        config = json.loads(header["__metadata__"]["medgmae"])
        config[rng.choice(list(config))] = rng.choice([None, 3, [1, 2], {}, "x", [2, 2, 2], [0, 0, 0]])
        header["__metadata__"]["medgmae"] = rng.choice([json.dumps(config), "[]", "null", "{"])
    elif action == "drop":
        del header[one]
    text = json.dumps(header).encode()
    claimed = rng.choice([0, 1, len(text) - 1, 1 << 40, (1 << 64) - 1]) if action == "length" else len(text)
    data[:] = struct.pack("<Q", claimed) + text + data[8 + length :]


RAW: list[Callable[[bytearray, random.Random], None]] = [flip_bits, flip_bits, overwrite, cut, shift]
STRUCTURED = {
    "zip": [tamper_zip, mutate_pickle, mutate_pickle, inject_code],
    "legacy": [inject_code],
    "safetensors": [edit_header],
}


def payload(data: bytes, kind: str) -> list[tuple[int, int]]:
    """Where the bytes of tensors are in a sound file; everywhere, for the legacy kind."""
    if kind == "legacy":
        return [(0, len(data))]
    if kind == "safetensors":
        return [(8 + struct.unpack("<Q", data[:8])[0], len(data))]
    spans = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
                start = info.header_offset + 30 + name + extra
                spans.append((start, start + info.file_size))
    return spans
