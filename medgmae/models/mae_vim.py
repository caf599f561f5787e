"""Masked autoencoders of Vim encoders: 3D Mamba MAE (Hu et al. 2024, https://arxiv.org/abs/2409.07746)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize
from medgmae.layers.mamba import MambaStack, RMSNorm
from medgmae.layers.patches import Shape, Size
from medgmae.layers.rope import Rope
from medgmae.losses import NormTarget
from medgmae.models.decoder import MaskDecoder
from medgmae.models.mae import MaskedAutoencoder
from medgmae.models.parts import Setting, count_blocks, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.vim import BASE, LARGE, NANO, SMALL, TINY, Vim


@register_class
class VimDecoder(MaskDecoder):
    """Narrow Mamba blocks that turn visible tokens and mask tokens, in raster order, into patch vectors.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: length of a patch vector.
        grid_size: patch grid (d, h, w) of the table of positions.
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

    FIXED_SIZES = ("decoder_embed_dim", "decoder_depth")

    blocks: MambaStack

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: Shape,
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
        built = given(locals())
        if off_by_one and prefix_tokens:
            raise ValueError(
                f"off_by_one is for encoders without class tokens, this one has {prefix_tokens}: leave it out"
            )
        super().__init__(nn.Linear(in_dim, embed_dim), grid_size, embed_dim, 1 if off_by_one else prefix_tokens)
        self._built, self.off_by_one = built, off_by_one
        self.blocks = MambaStack(
            embed_dim,
            depth,
            d_state=d_state,
            expand=expand,
            divide_output=divide_output,
            norm_eps=norm_eps,
            rope=rope,
            rope_residual=rope_residual,
        )
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, out_dim)
        self.apply(initialize)

    @property
    def rope(self) -> Rope | None:
        """Rotary positions of the sequence."""
        return self.blocks.rope

    @property
    def rope_residual(self) -> bool:
        """Whether the residual stream is turned too."""
        return self.blocks.rope_residual

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are no Vim decoder's."""
        if not any(".mixer." in name for name in state):
            return None
        bridge = state.get("embed.weight")
        return {"decoder_embed_dim": None if bridge is None else len(bridge), "decoder_depth": count_blocks(state)}

    def settings(self) -> dict[str, Setting]:
        """Rotations, how a block puts its directions together, and how visible tokens are told from the class token."""
        return {
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
            "divide_output": Setting(self._built["divide_output"], "divide_output"),
            "rope": Setting(self.rope, "rope"),
            "rope_residual": Setting(self.rope_residual, "rope_residual"),
            "off_by_one": Setting(self.off_by_one, "off_by_one"),
        }

    def _mix(self, x: Tensor, grid: Shape, levels: Sequence[Tensor]) -> Tensor:
        places = None
        if self.num_prefix_tokens:
            count = math.prod(grid)
            numbers = torch.arange(count, device=x.device)
            places = torch.cat([numbers.new_full((self.num_prefix_tokens,), count), numbers]).unsqueeze(0)
        table = self.blocks.rotations(x, grid, places)
        hidden, residual, _ = self.blocks.scan(x, table, recompute=self.grad_checkpointing)
        return hidden if residual is None else hidden + residual

    def _activate(self, pred: Tensor) -> Tensor:
        return pred


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
        encoder.grid_size,
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
