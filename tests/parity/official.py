"""Files as the reference code bases write them: containers, prefixes, and whatever lies beside the weights."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.case import Case

WEIGHT_ENTRIES = ("student", "state_dict", "model", "model_state", "model_state_dict")


def write_file(case: Case, state: Mapping[str, Tensor], name: str = "checkpoint.pth") -> Path:
    """Write ``state`` in the container and with the prefix that the case's JSON describes."""
    entries, prefix = layout(case.spec)
    if prefix and not any(key.startswith(prefix) for key in state):
        state = {prefix + key: value for key, value in state.items()}
    content: Any = OrderedDict(state)
    if entries:
        holders = [entry for entry in entries if entry in WEIGHT_ENTRIES]
        assert holders, f"no entry for the weights among {list(entries)}"
        content = {entry: beside(case, entry, what) for entry, what in entries.items()}
        content[holders[0]] = OrderedDict(state)
    path = case.tmp / name
    torch.save(content, path)
    return path


def layout(spec: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Top-level entries to what is in them (none for a bare state dictionary), and the prefix of the names."""
    container = spec.get("container") or spec.get("checkpoint_container") or {}
    config = spec.get("config") or {}
    if isinstance(container, str):
        saved = re.search(r"\{(.*?)\}", container)
        entries: dict[str, Any] = dict(re.findall(r"'(\w+)': ([^,]+)", saved[1])) if saved else {}
        found = re.search(r"prefixed '([\w.]+)'", container)
        prefix = found[1] if found else ""
    else:
        kind = str(container.get("kind", ""))
        inner = container.get("layout") or container.get("keys") or container.get("torch.save")
        entries = dict(inner or ({} if kind else container))
        entries.pop("key_prefix", None)
        prefix = container.get("key_prefix", "")
    if "container_key" in config:
        others = {k: v for k, v in entries.items() if k not in WEIGHT_ENTRIES}
        entries = {config["container_key"]: "weights/*", **others} if config["container_key"] else {}
    return entries, config.get("key_prefix_in_file", prefix) or ""


def beside(case: Case, entry: str, what: Any) -> Any:
    """Something like what training code puts under ``entry``, beside the weights."""
    if not isinstance(what, str):
        return what
    if group := re.search(r"(extra/[\w/]+)/\*", what):
        return case.group(group[1])
    if entry == "optimizer":
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        return optimizer.state_dict()
    known = {
        "epoch": 7,
        "arch": "vit_base",
        "phase": "finetune",
        "args": argparse.Namespace(lr=1e-4, model="vit", input_size=256),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "metric": np.float32(0.5),
    }
    return known.get(entry, what)


def random_state(shapes: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """Random tensors of these shapes."""
    return OrderedDict((name, torch.randn(*shape)) for name, shape in shapes.items())


def timm_shapes(
    embed_dim: int,
    *,
    patch: tuple[int, ...],
    rows: int,
    in_chans: int = 1,
    depth: int = 1,
    class_token: bool = True,
    decoder_dim: int = 0,
    decoder_rows: int | None = None,
    decoder_depth: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a ViT (TANGERINE's and GL-MAE's spelling), with a decoder if it has a width.

    rows: rows of the table, class row included.
    """
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, embed_dim)} if class_token else {}
    shapes["pos_embed"] = (1, rows, embed_dim)
    shapes["patch_embed.proj.weight"] = (embed_dim, in_chans, *patch)
    shapes["patch_embed.proj.bias"] = (embed_dim,)
    for i in range(depth):
        shapes |= _block(f"blocks.{i}", embed_dim)
    shapes |= {"norm.weight": (embed_dim,), "norm.bias": (embed_dim,)}
    if decoder_dim:
        length = in_chans * int(np.prod(patch))
        shapes |= {
            "mask_token": (1, 1, decoder_dim),
            "decoder_pos_embed": (1, decoder_rows or rows, decoder_dim),
            "decoder_embed.weight": (decoder_dim, embed_dim),
            "decoder_embed.bias": (decoder_dim,),
            "decoder_norm.weight": (decoder_dim,),
            "decoder_norm.bias": (decoder_dim,),
            "decoder_pred.weight": (length, decoder_dim),
            "decoder_pred.bias": (length,),
        }
        for i in range(decoder_depth):
            shapes |= _block(f"decoder_blocks.{i}", decoder_dim)
    return shapes


def _block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    weights = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    weights |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, shape in weights.items():
        shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes
