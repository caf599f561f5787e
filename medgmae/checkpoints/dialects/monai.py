"""The dialect of MONAI's ViT, alone: SegVol's image encoder, M3D-CLIP's, BrainIAC's.

The norms have an epsilon of 1e-5, the table of positions has no row for a class token, and the projections of queries,
keys and values may have no bias. What lies beside the encoder, such as M3D-CLIP's language model, is left out.
"""

from __future__ import annotations

import re

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, File
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import convert_vit

SOURCE = "ViT with MONAI's names"
NORM_EPS = 1e-5

_TABLE = "patch_embedding.position_embeddings"
_NAMES = (
    (_TABLE, "pos_embed"),
    ("patch_embedding.patch_embeddings.1.", "patch_embed.proj."),  # "perceptron": behind a rearrangement
    ("patch_embedding.patch_embeddings.", "patch_embed.proj."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.linear1.", ".mlp.fc1."),
    (".mlp.linear2.", ".mlp.fc2."),
)
_UNUSED = re.compile(r"\.(norm_cross_attn|cross_attn)\.|^patch_embedding\.cls_token$")

# M3D-CLIP's projection of every token into the space that images and texts share.
_PROJECTION = "mm_vision_proj."


@register_dialect("ViTs with MONAI's names", order=45, matches=lambda file: any(n.endswith(_TABLE) for n in file.names))
def convert_monai(file: File) -> Converted:
    """The one encoder in a file, under whatever prefix.

    Raises:
        WeightsError: several encoders.
    """
    prefixes = [name.removesuffix(_TABLE) for name in file.names if name.endswith(_TABLE)]
    if len(prefixes) > 1:
        raise WeightsError(
            f"{file.origin}: has several encoders, under {', '.join(map(repr, prefixes))}; save the one to load alone"
        )
    for name in file.names:
        if name.startswith(_PROJECTION):
            file.take(name, f"encoder.head.{name.removeprefix(_PROJECTION)}")
    if prefixes[0]:
        file.enter(prefixes[0])
    rename_monai(file)
    return convert_vit(file, SOURCE, {"encoder.norm_eps": NORM_EPS}, class_row=False)


def rename_monai(file: File) -> None:
    """MONAI's names of a ViT as timm's."""
    for name in file.names:
        if _UNUSED.search(name):
            file.drop(name, "not used by the reference")
            continue
        for theirs, ours in _NAMES:
            if theirs in name:
                file.rename(name, name.replace(theirs, ours))
                break
