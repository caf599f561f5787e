"""Masked autoencoders of Vim encoders: 3D Mamba MAE (Hu et al. 2024, https://arxiv.org/abs/2409.07746)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize
from medgmae.layers.mamba import MambaBlock, RMSNorm, advance
from medgmae.layers.patches import Shape, Size, take_tokens
from medgmae.layers.positions import PositionCache, sincos_pos_embed
from medgmae.layers.rope import Rope, Rotary
from medgmae.losses import NormTarget
from medgmae.models.mae import MaskedAutoencoder
from medgmae.models.registry import build, register_model
from medgmae.models.vim import BASE, LARGE, NANO, SMALL, TINY, Vim


class VimDecoder(nn.Module):
    """Narrow Mamba blocks that turn visible tokens and mask tokens, in raster order, into patch vectors.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: length of a patch vector.
        grid: patch grid (d, h, w) of the table of positions.
        embed_dim: own width.
        depth: number of blocks.
        prefix_tokens: class tokens in front of the patches that the encoder hands over.
        off_by_one: decode as the published weights were trained, for an encoder without a class token. The reference
            takes its first visible token for one: that token goes in front of the sequence and is dropped at the end,
            every other visible token stands for the patch that was drawn before it, and the patch that was drawn last
            gets a mask token.
        d_state: states per channel of a scan.
        expand: inner width of a block over ``embed_dim``.
        rope: rotary positions of the sequence, see :class:`~medgmae.models.vim.Vim`; likewise ``rope_residual`` and
            ``divide_output``.
        norm_eps: epsilon of every norm.

    Raises:
        ValueError: ``off_by_one`` with class tokens, for which the reference decodes as everybody does.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Shape,
        embed_dim: int = 192,
        depth: int = 8,
        *,
        prefix_tokens: int = 0,
        off_by_one: bool = False,
        d_state: int = 16,
        expand: int = 2,
        rope: Rope | None = "axial",
        rope_residual: bool = True,
        divide_output: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if off_by_one and prefix_tokens:
            raise ValueError(
                f"off_by_one is for encoders without class tokens, this one has {prefix_tokens}: leave it out"
            )
        self.grid, self.off_by_one, self.rope, self.rope_residual = grid, off_by_one, rope, rope_residual
        self.prefix_tokens = 1 if off_by_one else prefix_tokens  # of the decoder's own sequence
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), embed_dim), requires_grad=False)
        self.prefix_pos_embed = nn.Parameter(torch.empty(1, self.prefix_tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            MambaBlock(
                embed_dim,
                d_state,
                expand=expand,
                divide_output=divide_output,
                out_scale=depth**-0.5,
                norm_eps=norm_eps,
            )
            for _ in range(depth)
        )
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, out_dim)
        self._positions = PositionCache()
        self._rotary = None if rope is None else Rotary(rope, embed_dim)
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the mask token and the tables of positions."""
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.prefix_pos_embed)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed(self.pos_embed.shape[2], self.grid))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward(self, tokens: Tensor, restore: Tensor | None = None, grid: Shape | None = None) -> Tensor:
        """Predict every patch.

        Args:
            tokens: (B, P + n, in_dim), class tokens, then visible patches in the order of ``Masking.keep``.
            restore: (B, N) long from :class:`~medgmae.layers.masking.Masking`; None for all patches in raster order.
            grid: patch grid of the input; None for the grid of the table.

        Returns:
            (B, N, out_dim) in raster order.
        """
        grid = grid or self.grid
        tokens = self.embed(tokens)
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        hidden = math.prod(grid) - patches.shape[1]
        if hidden:
            masks = self.mask_token.to(patches.dtype).expand(patches.shape[0], hidden, -1)
            patches = torch.cat([patches, masks], dim=1)
        if restore is not None:
            patches = take_tokens(patches, restore)
        patches = patches + self._positions(self.pos_embed, self.grid, grid)
        x = torch.cat([prefix + self.prefix_pos_embed, patches], dim=1) if self.prefix_tokens else patches
        x = self._mix(x, self._table(grid, x))
        return self.head(self.norm(x[:, self.prefix_tokens :]))  # type: ignore[no-any-return]

    def _mix(self, hidden: Tensor, table: Tensor | None) -> Tensor:
        residual = None
        for block in self.blocks:
            hidden, residual = advance(block, hidden, residual, table, self.rope_residual, self.grad_checkpointing)
        return hidden if residual is None else hidden + residual

    def _table(self, grid: Shape, x: Tensor) -> Tensor | None:
        """Rotations of the sequence, (P + N, E / 2, 2)."""
        if self._rotary is None:
            return None
        table = self._rotary.table(grid, x.shape[1], x)
        if self.rope == "sequence":
            return table
        patches, still = table[:-1], table[-1:]
        return torch.cat([still.expand(self.prefix_tokens, -1, -1), patches]) if self.prefix_tokens else patches


def masked_vim(
    img_size: Size = 160,
    patch_size: Size = 16,
    in_chans: int = 1,
    *,
    decoder_embed_dim: int = 192,
    decoder_depth: int = 8,
    off_by_one: bool = False,
    norm_target: NormTarget | None = None,
    mask_ratio: float = 0.75,
    d_state: int = 16,
    expand: int = 2,
    rope: Rope | None = "axial",
    rope_residual: bool = True,
    divide_output: bool = True,
    norm_eps: float = 1e-5,
    **encoder_options: Any,
) -> MaskedAutoencoder:
    """A masked autoencoder of a Vim encoder and a Vim decoder.

    Args:
        decoder_embed_dim: width of the decoder; likewise ``decoder_depth``.
        off_by_one: see :class:`VimDecoder`; what published weights need.
        norm_target: see :class:`~medgmae.MaskedAutoencoder`; likewise ``mask_ratio``.
        rope: of both parts, see :class:`~medgmae.models.vim.Vim`; likewise every other option that both parts have.
        **encoder_options: everything else that :class:`~medgmae.models.vim.Vim` takes.
    """
    shared: dict[str, Any] = {
        "d_state": d_state,
        "expand": expand,
        "rope": rope,
        "rope_residual": rope_residual,
        "divide_output": divide_output,
        "norm_eps": norm_eps,
    }
    encoder = Vim(img_size, patch_size, in_chans, **shared, **encoder_options)
    decoder = VimDecoder(
        encoder.embed_dim,
        math.prod(encoder.patch_size) * in_chans,
        encoder.grid,
        decoder_embed_dim,
        decoder_depth,
        prefix_tokens=encoder.num_prefix_tokens,
        off_by_one=off_by_one,
        **shared,
    )
    return MaskedAutoencoder(encoder, decoder, mask_ratio, norm_target)


# The decoders of the published models, and smaller ones.
DEC512 = {"decoder_embed_dim": 512, "decoder_depth": 8}
DEC192 = {"decoder_embed_dim": 192, "decoder_depth": 8}
DEC96 = {"decoder_embed_dim": 96, "decoder_depth": 4}
DEC24 = {"decoder_embed_dim": 24, "decoder_depth": 1}


def _mae(
    overrides: dict[str, Any],
    img_size: Size,
    patch_size: int,
    size: dict[str, int],
    decoder: dict[str, int],
    in_chans: int,
) -> MaskedAutoencoder:
    defaults = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, **size, **decoder}
    return build(masked_vim, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def mae_vim_small_patch4_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-S/4 on 160³ of four MR contrasts, decoder 192 wide on 64,000 tokens: 3D Mamba MAE's finest grid."""
    return _mae(overrides, 160, 4, SMALL, DEC192, 4)


@register_model
def mae_vim_small_patch8_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-S/8 on 160³ of four MR contrasts, decoder 192 wide: 3D Mamba MAE with patch 8."""
    return _mae(overrides, 160, 8, SMALL, DEC192, 4)


@register_model
def mae_vim_small_patch16_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-S/16 on 160³ of four MR contrasts, decoder 192 wide: 3D Mamba MAE."""
    return _mae(overrides, 160, 16, SMALL, DEC192, 4)


@register_model
def mae_vim_small_patch32_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-S/32 on 160³ of four MR contrasts, decoder 192 wide: 3D Mamba MAE's coarsest grid."""
    return _mae(overrides, 160, 32, SMALL, DEC192, 4)


@register_model
def mae_vim_base_patch16_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-B/16 on 160³ of four MR contrasts, decoder 512 wide: 3D Mamba MAE base."""
    return _mae(overrides, 160, 16, BASE, DEC512, 4)


@register_model
def mae_vim_large_patch16_160(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-L/16 on 160³ of four MR contrasts, decoder 512 wide: 3D Mamba MAE large."""
    return _mae(overrides, 160, 16, LARGE, DEC512, 4)


@register_model
def mae_vim_tiny_patch8_64(**overrides: Any) -> MaskedAutoencoder:
    """MAE with Vim-Ti/8 on 64³ crops, decoder 96 wide: small enough for a laptop."""
    return _mae(overrides, 64, 8, TINY, DEC96, 1)


@register_model
def mae_vim_nano_patch8_32(**overrides: Any) -> MaskedAutoencoder:
    """Two narrow blocks on 32³ and one in the decoder: for tests."""
    return _mae(overrides, 32, 8, NANO, DEC24, 1)
