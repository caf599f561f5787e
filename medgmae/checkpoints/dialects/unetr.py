"""The dialect of MONAI's UNETR blocks: MONAI's own UNETR, SelfMedMAE's, and that of GL-MAE's first author.

The decoder's names are the same in all of them, behind ``decoder.`` in SelfMedMAE's. The encoder has timm's
names behind ``encoder.`` or ``vit.``, or the names of MONAI's ViT behind ``vit.``.
"""

from __future__ import annotations

import re

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, File
from medgmae.checkpoints.dialects.monai import NORM_EPS, rename_monai
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import convert_vit

SOURCE = "UNETR with MONAI's names"

_MARK = "encoder1.layer.conv1.conv.weight"
_INSIDE = "decoder."

# The blocks whose tokens the published decoders read, by the number of skip connections from tokens.
_TAPS = {3: (3, 6, 9), 2: (4, 8)}

_SHORTCUT = re.compile(r"\.conv3\.conv\.weight$")
_PLACES = (
    (r"encoder1\.layer\.", "stem."),
    (r"encoder(\d)\.layer\.", "skips.{0}."),
    (r"encoder(\d)\.transp_conv_init\.conv\.", "skips.{0}.up.conv."),
    (r"encoder(\d)\.blocks\.(\d+)\.0\.conv\.", "skips.{0}.stages.{1}.up.conv."),
    (r"encoder(\d)\.blocks\.(\d+)\.1\.", "skips.{0}.stages.{1}.block."),
    (r"decoder(\d)\.transp_conv\.conv\.", "stages.{0}.up.conv."),
    (r"decoder(\d)\.conv_block\.", "stages.{0}.block."),
    (r"out\.conv\.conv\.", "out."),
)
_CONVOLUTIONS = {"conv1.conv.": "conv1.", "conv2.conv.": "conv2.", "conv3.conv.": "shortcut."}


@register_dialect(SOURCE, order=33, matches=lambda file: file.has(_MARK) or file.has(_INSIDE + _MARK))
def convert_unetr(file: File) -> Converted:
    """A UNETR with its encoder."""
    taps = _take_decoder(file)
    prefix = next((p for p in ("encoder.", "vit.") if file.has_any(p)), "")
    file.strip(prefix)
    expects: dict[str, object] = {} if taps is None else {"decoder.taps": taps}
    if file.has_any("patch_embedding."):
        rename_monai(file)
        expects["encoder.norm_eps"] = NORM_EPS
        return convert_vit(file, SOURCE, expects, class_row=False)
    return convert_vit(file, SOURCE, expects)


def _take_decoder(file: File) -> tuple[int, ...] | None:
    """Move the decoder's entries; returns the blocks that it reads, where its form is a published one."""
    inside = _INSIDE if file.has(_INSIDE + _MARK) else ""
    skips = set()
    for name in file.names:
        theirs = name.removeprefix(inside)
        ours = _place(theirs) if name.startswith(inside) else None
        if ours is None:
            continue
        if ours.startswith("skips."):
            skips.add(ours.split(".")[1])
        if _SHORTCUT.search(theirs) and _is_unused(file, name):
            file.drop(name, "not used by the reference: the shortcut of a block with equal widths")
        else:
            file.take(name, f"decoder.{ours}")
    return _TAPS.get(len(skips))


def _is_unused(file: File, shortcut: str) -> bool:
    """Whether the block of a shortcut has equal widths: MONAI before 0.9 made one there, and did not use it."""
    weight = file.tensor(shortcut)
    if weight.dim() < 2:
        raise WeightsError(f"{file.origin}: {shortcut!r} has shape {tuple(weight.shape)}, expected a convolution's")
    return weight.shape[0] == weight.shape[1]


def _place(name: str) -> str | None:
    """Our decoder's name for one of MONAI's; None for what is not the decoder's."""
    for pattern, ours in _PLACES:
        match = re.match(pattern, name)
        if match:
            first, *more = [*match.groups(), ""]
            numbers = [str(int(first) - 2) if first else "", *more]
            rest = name[match.end() :]
            for theirs, own in _CONVOLUTIONS.items():
                if rest.startswith(theirs):
                    rest = own + rest.removeprefix(theirs)
            return ours.format(*numbers) + rest
    return None
