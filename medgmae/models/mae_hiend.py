"""Hi-End-MAE (Tang et al. 2025): a masked autoencoder whose decoder reads several depths of the encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.blocks import Attention, Mlp, initialize, run_block, vit_block
from medgmae.layers.patches import Shape, Size
from medgmae.losses import NormTarget
from medgmae.models.decoder import MaskDecoder
from medgmae.models.mae import DEC528, MaskedAutoencoder
from medgmae.models.parts import Setting, count_blocks, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.vit import WIDE, ViT


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, scale d^-1/2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, N, E), memory: (B, M, E). Returns (B, N, E)."""
        query = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        key, value = self.kv(memory).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossBlock(nn.Module):
    """Pre-norm block with self-attention, attention to a memory, and an MLP, one after the other."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim, eps=norm_eps)
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, N, E), memory: (B, M, E). Returns (B, N, E)."""
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


@register_class
class HiEndDecoder(MaskDecoder):
    """Self-attention blocks, then one block with cross-attention for each depth of the encoder that is read.

    Args:
        taps: blocks of the encoder, 0-based, that the cross-attention blocks read, in their order. What they gave is
            not normalised; it goes through a linear layer of its own, ``bridges``, before.
        depth: number of blocks before the cross-attention blocks.

    The other arguments are those of :class:`~medgmae.models.mae.ViTDecoder`.
    """

    FIXED_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_cross_depth")

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: Shape,
        embed_dim: int = 528,
        depth: int = 2,
        num_heads: int = 16,
        *,
        taps: Sequence[int] = (9, 6, 3),
        mlp_ratio: float = 4.0,
        prefix_tokens: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        built = given(locals())
        super().__init__(nn.Linear(in_dim, embed_dim), grid_size, embed_dim, prefix_tokens)
        self._built, self.taps = built, tuple(taps)
        self.blocks = nn.ModuleList(vit_block(embed_dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth))
        self.bridges = nn.ModuleList(nn.Linear(in_dim, embed_dim) for _ in taps)
        self.cross_blocks = nn.ModuleList(CrossBlock(embed_dim, num_heads, mlp_ratio, norm_eps) for _ in taps)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, out_dim)
        self.apply(initialize)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are none of Hi-End-MAE."""
        cross = len({name.split(".")[1] for name in state if name.startswith("cross_blocks.")})
        if not cross:
            return None
        bridge = state.get("embed.weight")
        width = None if bridge is None else len(bridge)
        return {"decoder_embed_dim": width, "decoder_depth": count_blocks(state), "decoder_cross_depth": cross}

    def settings(self) -> dict[str, Setting]:
        """Heads, epsilon and the depths of the encoder that are read."""
        return {
            "num_heads": Setting(self._built["num_heads"], "decoder_num_heads"),
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
            "taps": Setting(self.taps),
        }

    def _mix(self, x: Tensor, grid: Shape, levels: Sequence[Tensor]) -> Tensor:
        if len(levels) != len(self.taps):
            raise ValueError(
                f"this decoder reads the encoder's blocks {self.taps}, got {len(levels)} levels; call the whole model"
            )
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        for block, bridge, level in zip(self.cross_blocks, self.bridges, levels, strict=True):
            x = run_block(block, x, self.grad_checkpointing, bridge(level))
        return x

    def _activate(self, pred: Tensor) -> Tensor:
        return pred


def hiend_mae(
    img_size: Size = 96,
    patch_size: Size = 12,
    in_chans: int = 1,
    *,
    decoder_embed_dim: int = 528,
    decoder_depth: int = 2,
    decoder_cross_depth: int = 3,
    decoder_num_heads: int = 16,
    norm_target: NormTarget | None = "biased",
    mask_ratio: float = 0.75,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    **encoder_options: Any,
) -> MaskedAutoencoder:
    """A masked autoencoder of a ViT encoder and a :class:`HiEndDecoder`.

    Args:
        decoder_depth: blocks before those with cross-attention.
        decoder_cross_depth: blocks with cross-attention, which read the encoder at as many depths, the deepest first:
            3 of 12 blocks read after the blocks 9, 6 and 3, 0-based.
        norm_target: see :class:`~medgmae.models.mae.MaskedAutoencoder`; likewise ``mask_ratio``.
        **encoder_options: everything else that :class:`~medgmae.models.vit.ViT` takes.
    """
    encoder = ViT(img_size, patch_size, in_chans, mlp_ratio=mlp_ratio, norm_eps=norm_eps, **encoder_options)
    steps, depth = decoder_cross_depth + 1, len(encoder.blocks)
    decoder = HiEndDecoder(
        encoder.embed_dim,
        math.prod(encoder.patch_size) * in_chans,
        encoder.grid_size,
        decoder_embed_dim,
        decoder_depth,
        decoder_num_heads,
        taps=[depth * (steps - i) // steps for i in range(1, steps)],
        mlp_ratio=mlp_ratio,
        prefix_tokens=encoder.num_prefix_tokens,
        norm_eps=norm_eps,
    )
    return MaskedAutoencoder(encoder, decoder, mask_ratio, norm_target)


@register_model
def mae_hiend_vit_wide_patch12_96(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT 1536 wide, patch 12, on 96³, a decoder 528 wide that reads four depths of it: Hi-End-MAE."""
    defaults = {"img_size": 96, "patch_size": 12, **WIDE, **DEC528, "decoder_depth": 2}
    return build(hiend_mae, defaults, overrides)  # type: ignore[no-any-return]
