"""Tensors and configs that mean harm: odd memory, odd types, values that are no numbers, sizes that lie."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Sub(Tensor):
    """A subclass without any behaviour."""


def _quantized(value: Tensor, _: random.Random) -> Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


def _with(value: Tensor, rng: random.Random) -> Tensor:
    value = value.clone()
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return value


# Ways to change one tensor; the answer is a refusal, or the float32 of its values.
TENSORS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "sparse": lambda value, rng: value.to_sparse(),
    "csr": lambda value, rng: value.reshape(len(value), -1).to_sparse_csr(),
    "quantized": _quantized,
    "fp8": lambda value, rng: value.to(rng.choice([torch.float8_e4m3fn, torch.float8_e5m2])),
    "complex": lambda value, rng: value.to(torch.complex64),
    "conjugate": lambda value, rng: value.to(torch.complex64).conj(),
    "negated": lambda value, rng: torch.view_as_real(torch.zeros(*value.shape, dtype=torch.complex64).conj())[..., 1],
    "whole": lambda value, rng: value.to(rng.choice([torch.int64, torch.int8, torch.bool, torch.uint8, torch.int16])),
    "wide": lambda value, rng: value.double() * rng.choice([1.0, 1e300]),
    "half": lambda value, rng: value.to(rng.choice([torch.float16, torch.bfloat16])),
    "not finite": _with,
    "expanded": lambda value, rng: value.view(-1)[:1].expand(rng.choice([value.numel(), 10**9, 10**12])),
    "expanded alike": lambda value, rng: value[:1].expand(value.shape),
    "windows": lambda value, rng: torch.ones(value.numel() * 2).as_strided(value.shape, [1] * value.dim()),
    "transposed": lambda value, rng: value.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda value, rng: torch.cat([torch.ones(7), value.flatten()])[7:].view(value.shape),
    "empty": lambda value, rng: value[:0],
    "number": lambda value, rng: value.view(-1)[0],
    "meta": lambda value, rng: value.to("meta"),
    "longer": lambda value, rng: torch.cat([value, value]),
    "subclass": lambda value, rng: value.as_subclass(Sub),
    "list": lambda value, rng: value.flatten().tolist(),
}

# Names of one more tensor: what steers a terminal, cannot be seen, or looks like an address of something else.
NAMES = ("norm.\x1b[2J", "norm.\u202eweight", "norm.weight\0", "blocks.0.x\nfine", "", "..", "reg_token\r", "a" * 600)

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 1e6, 1e30, 10**6, 3 * 10**7, 2**31, 2**62, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-320, 1e308),
    *(
        None,
        True,
        False,
        "",
        "x",
        "3",
        [],
        {},
        [3],
        [1, 2],
        [1, 2, 3],
        [4, 4, 4],
        [2**40] * 3,
        [0, 0, 0],
        [8] * 3000,
        [1] * 40,
    ),
    *(
        {"class": "ViT"},
        {"class": 3},
        {"class": "nothing"},
        {"class": {"class": []}},
        {"a": {"b": [1, {"c": 2}]}},
        "\ud800",
        "\0",
    ),
    *(float("inf"), float("nan"), [[[[[[1]]]]]], "avg", "token", "sincos", "learned"),
)


def hostile_config(config: dict[str, Any], rng: random.Random) -> bytes:
    """The text of a config with one to three lies in it, or one that is hardly JSON."""
    config = json.loads(json.dumps(config))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        model_args = config.get("model_args")
        place = model_args if isinstance(model_args, dict) and rng.random() < 0.7 else config
        inner = [value for value in place.values() if isinstance(value, dict)]
        if inner and rng.random() < 0.4:
            place = rng.choice(inner)
        if not isinstance(place, dict):
            break
        names = [
            *place,
            "depth",
            "num_heads",
            "embed_dim",
            "patch_size",
            "img_size",
            "head_hidden",
            "num_classes",
            "in_chans",
        ]
        names += [
            "mlp_ratio",
            "drop_path_rate",
            "norm_eps",
            "dims",
            "decoder_depth",
            "num_gaussians",
            "ratios",
            "class",
            "x",
        ]
        place[rng.choice(names)] = copy.deepcopy(rng.choice(NUMBERS))
    text = json.dumps(config)
    raw = rng.random()
    if raw < 0.85:
        return text.encode()
    deep = rng.choice([50, 1000, 100_000])
    return rng.choice(
        [
            *(
                b"\xff\xfe" + text.encode("utf-16-le"),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("latin-1")[:-3],
                b"",
                b"\0",
            ),
            *(
                b"[" * deep,
                b"[" * deep + b"]" * deep,
                b'{"a":' * deep + b"1" + b"}" * deep,
                b"null",
                b"3",
                b'"x"',
                b"[1]",
            ),
            *(
                text[:-1].encode() + b', "grid": [4, 4, 4], "grid": [8, 8, 1]}',
                b'{"a": ' + b"9" * 5000 + b"}",
                b" " * 2_000_000,
            ),
            text[:-1].encode() + b', "x": ' + b"[" * deep + b"]" * deep + b"}",
        ]
    )


def hostile_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header names two tensors twice, swapped, or is padded out of measure."""
    length = struct.unpack("<Q", data[:8])[0]
    header, values = data[8 : 8 + length].rstrip(), data[8 + length :]
    if rng.random() < 0.5:
        header = header.ljust(rng.choice([9 << 20, 60 << 20]))
    else:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        one, two = rng.sample(list(entries), 2)
        swapped = json.dumps({one: entries[two], two: entries[one]}).encode()
        header = header[:-1] + b", " + swapped[1:]
    return struct.pack("<Q", len(header)) + header + values


def with_metadata(data: bytes, text: bytes) -> bytes:
    """A safetensors file with another config in its header; text that is not UTF-8 is taken as Latin-1."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["medgmae"] = text.decode("latin-1")
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + data[8 + length :]
