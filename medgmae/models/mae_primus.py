"""Masked autoencoders of Primus encoders: OpenMind's MAE and SimMIM (Wald et al. 2025, arXiv:2412.17041)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize, run_block
from medgmae.layers.dense import PatchDecode
from medgmae.layers.masking import Masking
from medgmae.layers.patches import Shape, Size
from medgmae.layers.positions import PosEmbed
from medgmae.layers.rope import PRIMUS, Rotary
from medgmae.losses import NormTarget, patch_mse
from medgmae.models.decoder import MaskDecoder
from medgmae.models.mae import MaskedAutoencoder
from medgmae.models.parts import Part, Readable, Setting, check_choice, count_blocks, given
from medgmae.models.primus import MEDIUM, MLP_RATIO, NANO, Primus, eva_blocks
from medgmae.models.registry import build, register_class, register_model

LossPatches = Literal["hidden", "transposed"]

_HEAD = "head.convs.0.weight"


@register_class
class PrimusDecoder(MaskDecoder):
    """Blocks of the encoder's width, without a layer between, and transposed convolutions to the voxels of a patch.

    Args:
        embed_dim: width of the encoder's tokens, and its own.
        out_chans: channels that are predicted.
        patch_size: voxels per axis of a patch.
        grid_size: patch grid (d, h, w) of the table of positions.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's gated MLP over ``embed_dim``.
        prefix_tokens: tokens in front of the patches that the encoder hands over.
        pos_embed: "learned", "sincos" or "none", the table beside the rotations.
        norm_eps: epsilon of every layer norm.
    """

    FIXED_SIZES = ("decoder_depth",)

    def __init__(
        self,
        embed_dim: int,
        out_chans: int,
        patch_size: Shape,
        grid_size: Shape,
        depth: int = 2,
        num_heads: int = 12,
        *,
        mlp_ratio: float = MLP_RATIO,
        prefix_tokens: int = 0,
        pos_embed: PosEmbed = "learned",
        norm_eps: float = 1e-5,
    ) -> None:
        built = given(locals())
        super().__init__(nn.Identity(), grid_size, embed_dim, prefix_tokens, pos_embed)
        self._built = built
        self.blocks = eva_blocks(embed_dim, depth, num_heads, mlp_ratio, [0.0] * depth, norm_eps)
        self._rotary = Rotary(PRIMUS, embed_dim // num_heads)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = PatchDecode(embed_dim, out_chans, patch_size)
        self.apply(initialize)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are no Primus decoder's."""
        depth = count_blocks(state)
        return {"decoder_depth": depth} if _HEAD in state and depth else None

    def settings(self) -> dict[str, Setting]:
        """Heads and epsilon."""
        return {
            "num_heads": Setting(self._built["num_heads"], "decoder_num_heads"),
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
        }

    def _mix(self, x: Tensor, grid: Shape, levels: Sequence[Tensor]) -> Tensor:
        turns = self._rotary.turns(grid, self.num_prefix_tokens, None, x)
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing, turns)
        return x

    def _activate(self, pred: Tensor) -> Tensor:
        return pred


@register_class
class DenseDecoder(Part, Readable):
    """Transposed convolutions alone, from every token of the encoder to the voxels of its patch.

    It holds the token that stands for hidden patches in the encoder's input, as SimMIM has them (Xie et al. 2022).

    Args:
        embed_dim: width of the encoder's tokens.
        out_chans: channels that are predicted.
        patch_size: voxels per axis of a patch.
        prefix_tokens: tokens in front of the patches that the encoder hands over.
    """

    FIXED_SIZES = ()

    def __init__(self, embed_dim: int, out_chans: int, patch_size: Shape, prefix_tokens: int = 0) -> None:
        super().__init__()
        self._built = given(locals())
        self.num_prefix_tokens = prefix_tokens
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.head = PatchDecode(embed_dim, out_chans, patch_size)
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the mask token."""
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Nothing that the encoder does not show; None where the tensors are not those of this decoder."""
        return {} if _HEAD in state and not count_blocks(state) else None

    def settings(self) -> dict[str, Setting]:
        """None."""
        return {}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to compute again."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch vectors (B, N, out_dim) of the encoder's tokens (B, P + N, E)."""
        return self.head(tokens[:, self.num_prefix_tokens :])  # type: ignore[no-any-return]


@register_class
class PrimusMAE(MaskedAutoencoder):
    """OpenMind's masked autoencoder: intensities as they are, see :class:`~medgmae.MaskedAutoencoder`.

    Args:
        encoder: a :class:`~medgmae.models.primus.Primus`.
        decoder: a :class:`PrimusDecoder`.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.
        norm_target: see :class:`~medgmae.MaskedAutoencoder`.
        loss_patches: the patches that are compared. "hidden": those that the encoder did not see. "transposed": those
            whose places are hidden when the first two axes are exchanged, as OpenMind's training had it by mistake; a
            quarter of them are visible. For comparisons with that code, on grids whose first two axes are equal.
    """

    def __init__(
        self,
        encoder: Primus,
        decoder: PrimusDecoder,
        mask_ratio: float = 0.75,
        norm_target: NormTarget | None = None,
        loss_patches: LossPatches = "hidden",
    ) -> None:
        built = given(locals())
        super().__init__(encoder, decoder, mask_ratio, norm_target)
        check_choice("loss_patches", loss_patches, get_args(LossPatches))
        self._built, self.loss_patches = built, loss_patches

    def _loss(self, pred: Tensor, target: Tensor, mask: Tensor, grid: Shape) -> Tensor:
        if self.loss_patches == "transposed":
            if grid[0] != grid[1]:
                raise ValueError(
                    f"loss_patches='transposed' exchanges the first two axes of the grid, which is {grid}; expected "
                    "equal ones, or use loss_patches='hidden'"
                )
            mask = mask.unflatten(1, grid).transpose(1, 2).flatten(1)  # type: ignore[no-untyped-call]
        return patch_mse(pred, target, mask, self.norm_target)


@register_class
class SimMIM(MaskedAutoencoder):
    """A masked autoencoder whose encoder sees a learned token in the place of every hidden patch (Xie et al. 2022).

    Args:
        encoder: a :class:`~medgmae.models.primus.Primus`.
        decoder: a :class:`DenseDecoder`.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.
        norm_target: see :class:`~medgmae.MaskedAutoencoder`.
    """

    encoder: Primus

    def __init__(
        self,
        encoder: Primus,
        decoder: DenseDecoder,
        mask_ratio: float = 0.75,
        norm_target: NormTarget | None = None,
    ) -> None:
        built = given(locals())
        super().__init__(encoder, decoder, mask_ratio, norm_target)
        self._built = built

    def _predict(self, x: Tensor, masking: Masking) -> tuple[Tensor, Tensor, None]:
        tokens = self.encoder.forward_masked(x, masking.mask, self.decoder.mask_token)
        return tokens, self.decoder(tokens), None


def masked_primus(
    img_size: Size = 160,
    patch_size: Size = 8,
    in_chans: int = 1,
    *,
    decoder_depth: int = 2,
    decoder_num_heads: int = 12,
    mask_ratio: float = 0.75,
    norm_target: NormTarget | None = None,
    loss_patches: LossPatches = "hidden",
    mlp_ratio: float = MLP_RATIO,
    pos_embed: PosEmbed = "learned",
    norm_eps: float = 1e-5,
    **encoder_options: Any,
) -> PrimusMAE:
    """A masked autoencoder of a Primus encoder and a Primus decoder of the same width.

    Args:
        decoder_depth: blocks of the decoder; likewise ``decoder_num_heads``.
        mask_ratio: see :class:`PrimusMAE`; likewise ``norm_target`` and ``loss_patches``.
        pos_embed: of both parts, see :class:`~medgmae.models.primus.Primus`; likewise ``mlp_ratio``, ``norm_eps``.
        **encoder_options: everything else that :class:`~medgmae.models.primus.Primus` takes.
    """
    shared: dict[str, Any] = {"mlp_ratio": mlp_ratio, "pos_embed": pos_embed, "norm_eps": norm_eps}
    encoder = Primus(img_size, patch_size, in_chans, **shared, **encoder_options)
    decoder = PrimusDecoder(
        encoder.embed_dim,
        in_chans,
        encoder.patch_size,
        encoder.grid_size,
        decoder_depth,
        decoder_num_heads,
        prefix_tokens=encoder.num_prefix_tokens,
        **shared,
    )
    return PrimusMAE(encoder, decoder, mask_ratio, norm_target, loss_patches)


def simmim_primus(*, mask_ratio: float = 0.75, norm_target: NormTarget | None = None, **encoder_options: Any) -> SimMIM:
    """A SimMIM of a Primus encoder.

    Args:
        mask_ratio: see :class:`SimMIM`; likewise ``norm_target``.
        **encoder_options: what :class:`~medgmae.models.primus.Primus` takes.
    """
    encoder = Primus(**encoder_options)
    decoder = DenseDecoder(encoder.embed_dim, encoder.in_chans, encoder.patch_size, encoder.num_prefix_tokens)
    return SimMIM(encoder, decoder, mask_ratio, norm_target)


@register_model
def mae_primus_m_patch8_160(**overrides: Any) -> PrimusMAE:
    """MAE with Primus-M/8 on 160³ crops of head MR, decoder of two blocks: OpenMind."""
    return build(masked_primus, {"img_size": 160, **MEDIUM}, overrides)  # type: ignore[no-any-return]


@register_model
def mae_primus_nano_patch8_32(**overrides: Any) -> PrimusMAE:
    """Two narrow blocks on 32³ and one in the decoder: for tests."""
    defaults = {"img_size": 32, **NANO, "decoder_depth": 1, "decoder_num_heads": 4}
    return build(masked_primus, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def simmim_primus_m_patch8_160(**overrides: Any) -> SimMIM:
    """SimMIM with Primus-M/8 on 160³ crops of head MR: OpenMind."""
    return build(simmim_primus, {"img_size": 160, **MEDIUM}, overrides)  # type: ignore[no-any-return]


@register_model
def simmim_primus_nano_patch8_32(**overrides: Any) -> SimMIM:
    """Two narrow blocks on 32³: for tests."""
    return build(simmim_primus, {"img_size": 32, **NANO}, overrides)  # type: ignore[no-any-return]
