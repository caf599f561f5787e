"""The border for MedGMAE's Gaussian decoders: official names and conventions become ours.

The authors' renderer works with the transposed rotation (inverse covariance Rᵀ diag(1 / s²) R), which is ours with the
quaternion conjugated. A head's outputs are linear in its rows, so the conjugation is done once, on the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# The factor that the authors' renderer puts on every density, and its support.
DENSITY_SCALE = 0.1
SUPPORT = "box"

# Official entries that nothing is computed from.
UNUSED = {
    "mask_token": "MedGMAE's Gaussian decoder reads no mask tokens",
    "decoder_pos_embed": "MedGMAE's Gaussian decoder adds no positions",
}

_GAUSSIAN = re.compile(
    r"^(gaussian_query_tokens|decoder\.query_tokens|decoder\..*(position|scale|rotation|density)_heads?\..*)$"
)
_ROTATION = re.compile(r"^decoder\.(rotation_head|(residual|level[12])_rotation_heads\.\d+)\.(weight|bias)$")
_GROUP = re.compile(r"^decoder\.(residual|level\d|cgs\d)_")
_HEAD = re.compile(r"^decoder\.(residual|level\d|cgs\d)_position_heads\.(\d+)\.")
_NAMES = (
    (r"^gaussian_query_tokens$", "decoder.query_tokens"),
    (r"^encoder_to_decoder\.", "decoder.embed."),
    (r"^decoder\.base_decoder\.", "decoder."),
)


def holds_gaussians(names: Iterable[str]) -> bool:
    """Whether a decoder with these names, official ones or ours, makes Gaussians."""
    return any(_GAUSSIAN.match(name) for name in names)


def decoder_kind(names: Iterable[str]) -> str:
    """Kind of a Gaussian decoder by its names, official ones or ours: all but "standard" have heads of their own.

    The authors wrap the standard decoder for the other kinds and keep its names, under ``decoder.base_decoder.``.
    """
    groups = {match[1] for match in map(_GROUP.match, names) if match}
    if not groups:
        return "standard"
    return "residual" if "residual" in groups else "hierarchical" if "level1" in groups or "level2" in groups else "cgs"


def decoder_ratios(names: Iterable[str]) -> tuple[int, ...]:
    """Heads in each group of heads, which is the number of Gaussians that the group adds to every query."""
    heads = {(match[1], match[2]) for match in map(_HEAD.match, names) if match}
    groups = sorted({group for group, _ in heads})
    return tuple(sum(group == one for one, _ in heads) for group in groups)


def gaussian_name(name: str) -> str:
    """Our name of an official entry."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def turn_rotation(ours: str, tensor: Tensor) -> Tensor:
    """Conjugate the quaternions that a rotation head gives, by the signs of its rows; other tensors stay as they are.

    The rows are w, x, y and z, and the last three are negated. This is exact for every kind: the base head's output is
    only normalised; a residual or level head's is bounded by tanh, which is odd, and added to the base's before the
    normalisation, so the sum is conjugated as well.
    """
    plain = tensor.is_floating_point() and tensor.layout == torch.strided
    if not _ROTATION.match(ours) or not plain or tensor.shape[:1] != (4,):
        return tensor  # what is no such head, or cannot be one: then it does not fit the model, which says so
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # there is no arithmetic in 8 bits
    return torch.cat([wide[:1], -wide[1:]])
