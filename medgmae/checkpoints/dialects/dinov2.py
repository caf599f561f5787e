"""The dialect of DINOv2's training code, 3DINO's among it: blocks in chunks, heads of the pre-training beside them.

The number behind that of a chunk counts the blocks of the whole model. LayerScale and the class token's row of the
table are folded into other tensors, as for every ViT with timm's names.
"""

from __future__ import annotations

import re

from medgmae.checkpoints.dialects.entries import STEM, Converted, File
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import convert_vit

SOURCE = "DINOv2's training code"
OFFSET = 0.1

_BACKBONE = "backbone."
_CHUNKED = re.compile(r"((?:backbone\.)?blocks\.)\d+\.(\d+\.\w+\.)")


@register_dialect(SOURCE, order=44, matches=lambda file: any(_CHUNKED.match(name) for name in file.names))
def convert_dinov2(file: File) -> Converted:
    """The backbone, which may lie beside its heads."""
    for head in ("dino", "ibot"):
        _take_head(file, f"{head}_head.", f"encoder.projection.{head}.")
    if file.has_any(_BACKBONE):
        file.enter(_BACKBONE)
    for name in file.names:
        if _CHUNKED.match(name):
            file.rename(name, _CHUNKED.sub(r"\1\2", name, count=1))
    if file.has("mask_token"):
        file.drop("mask_token", "stands for hidden patches in the pre-training")
    volumes = file.has(STEM) and file.tensor(STEM).dim() == 5
    return convert_vit(file, SOURCE, {"encoder.interpolate_offset": OFFSET} if volumes else {})


def _take_head(file: File, theirs: str, ours: str) -> None:
    """One of the heads; a linear layer whose rows are directions times lengths holds its prototypes."""
    for name in file.names:
        if not name.startswith(theirs):
            continue
        part = name.removeprefix(theirs)
        if part == "last_layer.weight_v":
            file.take(name, f"{ours}prototypes")
        elif part == "last_layer.weight_g":
            file.take(name, f"{ours}lengths", file.tensor(name).flatten())
        elif part.startswith("mlp."):
            file.take(name, f"{ours}{part}")
        else:
            file.drop(name, "head of the pre-training")
