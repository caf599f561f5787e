"""The dialect of MedGMAE's Gaussian autoencoders: official names and conventions are converted to ours.

The authors' renderer works with the transposed rotation (inverse covariance Rᵀ diag(1 / s²) R), which is ours with the
quaternion conjugated. A head's outputs are linear in its rows, so the conjugation is done once, on the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from medgmae.checkpoints.dialects.entries import PLAIN_TABLE, Converted, File
from medgmae.checkpoints.dialects.mae3d import take_encoder_table
from medgmae.checkpoints.dialects.recognise import register_dialect

# The factor that the authors' renderer puts on every density, and its support.
DENSITY_SCALE = 0.1
SUPPORT = "box"

# Official entries that nothing is computed from.
UNUSED = {
    "mask_token": "MedGMAE's Gaussian decoder reads no mask tokens",
    "decoder_pos_embed": "MedGMAE's Gaussian decoder adds no positions",
}

_GAUSSIAN = re.compile(
    r"gaussian_query_tokens|decoder\.query_tokens|decoder\..*(position|scale|rotation|density)_heads?\."
)
_ROTATION = re.compile(r"decoder\.(rotation_head|(residual|level[12])_rotation_heads\.\d+)\.(weight|bias)")
_KINDS = {"residual": r"decoder\.residual_", "hierarchical": r"decoder\.level\d_", "cgs": r"decoder\.cgs\d_"}
_NAMES = (
    (r"^gaussian_query_tokens$", "decoder.query_tokens"),
    (r"^encoder_to_decoder\.", "decoder.embed."),
    (r"^decoder\.base_decoder\.", "decoder."),
)


def _is_medgmae(file: File) -> bool:
    return file.has("encoder_pos_embed") and any(_GAUSSIAN.match(name) for name in file.names)


@register_dialect("MedGMAE", order=30, matches=_is_medgmae)
def convert_medgmae(file: File) -> Converted:
    """A Gaussian decoder, whatever its kind and whether it is wrapped or not."""
    kind = _decoder_kind(file.names)
    grid, _ = take_encoder_table(file)
    for name, why in UNUSED.items():
        if file.has(name):
            file.drop(name, why)
    for name in file.names:
        place = gaussian_name(name)
        if place.startswith(("encoder.", "decoder.")):
            if place == "decoder.query_tokens" and (queries := file.tensor(name)).dim() == 3:
                # The authors' positions have no offset per query.
                file.add("decoder.position_bias", torch.zeros(1, queries.shape[1], 3))
            file.take(name, place, turn_rotation(place, file.tensor(name)))
    return file.finish(
        "MedGMAE" if kind == "standard" else f"MedGMAE, {kind} decoder",
        grid,
        expects={"decoder.kind": kind, "decoder.density_scale": DENSITY_SCALE, "renderer.support": SUPPORT},
        assumed=PLAIN_TABLE,
    )


def _decoder_kind(names: Iterable[str]) -> str:
    """Kind of a Gaussian decoder: all but "standard" have heads of their own.

    The authors wrap the standard decoder for the other kinds and keep its names, under ``decoder.base_decoder.``.
    """
    names = list(names)
    return next((kind for kind, heads in _KINDS.items() if any(re.match(heads, n) for n in names)), "standard")


def gaussian_name(name: str) -> str:
    """Our name of an official entry."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def turn_rotation(place: str, tensor: Tensor) -> Tensor:
    """Conjugate the quaternions that a rotation head gives, by the signs of its rows; other tensors stay as they are.

    The rows are w, x, y and z, and the last three are negated. This is exact for every kind: the base head's output is
    only normalised; a residual or level head's is bounded by tanh, which is odd, and added to the base's before the
    normalisation, so the sum is conjugated as well.
    """
    plain = tensor.is_floating_point() and tensor.layout == torch.strided
    if not _ROTATION.fullmatch(place) or not plain or tensor.shape[:1] != (4,):
        return tensor  # what is no such head, or cannot be one: then it does not fit the model, which says so
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # there is no arithmetic in 8 bits
    return torch.cat([wide[:1], -wide[1:]])
