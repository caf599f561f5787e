"""From tokens to voxels without neighbours: a small stack of transposed convolutions for each patch."""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.convolutions import stage_strides
from medgmae.layers.patches import Shape


class PatchDecode(nn.Module):
    """Transposed convolutions with kernel = stride, a channels-first layer norm and GELU between them: Primus' head.

    (B, N, E) to patch vectors (B, N, prod(patch) * out_chans), channel fastest. No step mixes patches, so each is a
    product with the tokens. With as many steps as the patch has prime factors along an axis, the widths fall from E to
    ``2 * out_chans`` by one ratio, in multiples of 8.
    """

    def __init__(self, embed_dim: int, out_chans: int, patch_size: Shape) -> None:
        super().__init__()
        strides = stage_strides(tuple(patch_size))[::-1]
        ratio = (embed_dim / (2 * out_chans)) ** (1 / len(strides))
        inner = [max(8, round(embed_dim / ratio**step / 8) * 8) for step in range(1, len(strides))]
        widths = [embed_dim, *inner, out_chans]
        kind: Any = nn.ConvTranspose3d
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(kind(*pair, stride, stride) for pair, stride in zip(pairs, strides, strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in inner)

    def reset_parameters(self) -> None:
        """Initialise the convolutions (He et al. 2015, with the slope 0.01)."""
        conv: Any
        for conv in self.convs:
            if not conv.weight.is_meta:
                nn.init.kaiming_normal_(conv.weight, a=1e-2)
                nn.init.zeros_(conv.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = tokens[:, :, None, None, None]  # (B, N, d, h, w, C) from here on
        for step, conv in enumerate(self.convs):
            x = _refine(x, conv)
            if step < len(self.norms):
                x = F.gelu(self.norms[step](x))
        return x.flatten(2)


def _refine(x: Tensor, conv: Any) -> Tensor:
    """A transposed convolution with kernel = stride: (B, N, d, h, w, C) to (B, N, d p, h q, w r, out)."""
    shape: Shape = (*x.shape[:5], *conv.weight.shape[1:])
    x = F.linear(x, conv.weight.flatten(1).mT).reshape(shape)  # (B, N, d, h, w, out, p, q, r)
    x = x.permute(0, 1, 2, 6, 3, 7, 4, 8, 5) + conv.bias
    return x.flatten(2, 3).flatten(3, 4).flatten(4, 5)
