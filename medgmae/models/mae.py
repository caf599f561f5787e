"""Masked autoencoders that predict voxels: an encoder on the visible patches, a small decoder on all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize, run_block, vit_block
from medgmae.layers.masking import Masking
from medgmae.layers.patches import Shape, Size, patchify, unpatchify
from medgmae.losses import (
    PATCH_EPS,
    NormTarget,
    check_fourier,
    fourier_code,
    fourier_decode,
    patch_mse,
    patch_statistics,
)
from medgmae.models.autoencoder import Autoencoder, Seen
from medgmae.models.decoder import MaskDecoder
from medgmae.models.encoder import Encoder
from medgmae.models.parts import Part, Setting, count_blocks, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.vit import BASE, HUGE, LARGE, NANO, TINY, WIDE, ViT


class MAEOutput(NamedTuple):
    """What a masked autoencoder's forward gives.

    loss: scalar.
    pred: (B, N, prod(patch) * C), raster order, channel fastest; normalised per patch when the target is. Of a model
        with K Fourier frequencies (B, N, prod(patch) * C * 2 K): K sines and K cosines of each intensity.
    mask: (B, N), 1 = masked.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


@register_class
class ViTDecoder(MaskDecoder):
    """A narrow transformer that turns visible tokens and mask tokens into patch vectors.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: length of a patch vector.
        grid_size: patch grid (d, h, w) of the table of positions.
        embed_dim: own width.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's MLP over ``embed_dim``.
        prefix_tokens: tokens in front of the patches that the encoder hands over.
        sigmoid: squash the prediction into (0, 1), as TANGERINE does.
        norm_eps: epsilon of every layer norm.
    """

    FIXED_SIZES = ("decoder_embed_dim", "decoder_depth")

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: Shape,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        *,
        mlp_ratio: float = 4.0,
        prefix_tokens: int = 1,
        sigmoid: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        built = given(locals())
        super().__init__(nn.Linear(in_dim, embed_dim), grid_size, embed_dim, prefix_tokens)
        self._built, self.sigmoid = built, sigmoid
        self.blocks = nn.ModuleList(vit_block(embed_dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, out_dim)
        self.apply(initialize)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are no ViT decoder's."""
        marks = {"mask_token", "pos_embed", "head.weight"}
        others = r"\.mixer\.|^head\.convs\.|^cross_blocks\.|^sequence_embed$"  # of other decoders
        if not marks & set(state) or any(re.search(others, name) for name in state):
            return None
        bridge = state.get("embed.weight")
        return {"decoder_embed_dim": None if bridge is None else len(bridge), "decoder_depth": count_blocks(state)}

    def settings(self) -> dict[str, Setting]:
        """Heads, epsilon and the last activation."""
        return {
            "num_heads": Setting(self._built["num_heads"], "decoder_num_heads"),
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
            "sigmoid": Setting(self.sigmoid, "sigmoid"),
        }

    def _mix(self, x: Tensor, grid: Shape, levels: Sequence[Tensor]) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        return x

    def _activate(self, pred: Tensor) -> Tensor:
        return pred.sigmoid() if self.sigmoid else pred


@register_class
class MaskedAutoencoder(Autoencoder):
    """Encoder on visible patches, decoder on all, mean squared error on the masked ones (He et al. 2022).

    Args:
        encoder: a :class:`~medgmae.ViT` whose tokens are normalised (``global_pool="token"``), or a
            :class:`~medgmae.Vim`.
        decoder: a :class:`ViTDecoder` or a :class:`~medgmae.VimDecoder`.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.
        norm_target: None predicts intensities; "unbiased" or "biased" predicts each patch normalised by its own
            statistics, see :func:`medgmae.losses.patch_statistics`.
        fourier_frequencies: K above 0 predicts each intensity as its Fourier code of 2 K numbers, see
            :func:`medgmae.losses.fourier_code`: SelfMedMAE's 2D model. The decoder's ``out_dim`` is 2 K times as long.
        fourier_temperature: of that code.

    Raises:
        ValueError: another ``norm_target``, one beside Fourier frequencies, or numbers that describe no code.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Part,
        mask_ratio: float = 0.75,
        norm_target: NormTarget | None = None,
        fourier_frequencies: int = 0,
        fourier_temperature: float = 0.01,
    ) -> None:
        built = given(locals())
        super().__init__(encoder, decoder, mask_ratio)
        if norm_target not in (None, "unbiased", "biased"):
            raise ValueError(f"norm_target must be None, 'unbiased' or 'biased', got {norm_target!r}")
        if fourier_frequencies:
            check_fourier(fourier_frequencies, fourier_temperature)
        if fourier_frequencies and norm_target is not None:
            raise ValueError(
                f"fourier_frequencies={fourier_frequencies} encodes intensities as they are; leave out "
                f"norm_target={norm_target!r}"
            )
        self._built, self.norm_target = built, norm_target
        self.fourier_frequencies, self.fourier_temperature = fourier_frequencies, fourier_temperature

    __call__: Callable[..., MAEOutput]

    def settings(self) -> dict[str, Setting]:
        """The settings of both parts, and the length of the Fourier code where there is one."""
        own = {"fourier_frequencies": Setting(self.fourier_frequencies, "fourier_frequencies")}
        return {**self._part_settings(), **(own if self.fourier_frequencies else {})}

    def forward(self, x: Tensor, masking: Masking | None = None, mask_ratio: float | None = None) -> MAEOutput:
        """Mask, encode, decode and compare.

        Args:
            x: (B, C, D, H, W), every axis a multiple of the patch.
            masking: which patches are visible; random when None.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.

        Raises:
            ValueError: an input that does not fit the encoder, a masking for another input, or both of the last two.
        """
        output: MAEOutput = self.forward_with_tokens(x, self._masking(x, masking, mask_ratio)).output
        return output

    def forward_with_tokens(self, x: Tensor, masking: Masking, step: int | Tensor = 0) -> Seen:
        """See :class:`Autoencoder`; the loss is the same at every step."""
        target = patchify(x, self.patch_size)  # (B, N, L)
        if self.fourier_frequencies:
            target = fourier_code(target, self.fourier_frequencies, self.fourier_temperature).flatten(-2)
        tokens, pred, decoded = self._predict(x, masking)
        loss = self._loss(pred, target, masking.mask, self._grid(x))
        return Seen(tokens, MAEOutput(loss, pred, masking.mask), decoded)

    def _predict(self, x: Tensor, masking: Masking) -> tuple[Tensor, Tensor, Tensor | None]:
        """The encoder's tokens (B, P + n, E) after the last norm, a vector for every patch, (B, N, L), and the
        decoder's tokens that it is made of, (B, N, E'), if there are any."""
        taps = self.decoder.taps
        tokens, levels = self.encoder._encode(x, masking.keep, taps)
        tokens = self.encoder.norm(tokens)
        decoded = self.decoder.decode(tokens, masking.restore, self._grid(x), [levels[i] for i in taps])
        return tokens, self.decoder.predict(decoded), decoded

    def _loss(self, pred: Tensor, target: Tensor, mask: Tensor, grid: Shape) -> Tensor:
        return patch_mse(pred, target, mask, self.norm_target)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        masking: Masking | None = None,
        paste_visible: bool = True,
        denormalize: Literal["exact", "reference"] = "exact",
        *,
        mask_ratio: float | None = None,
    ) -> Tensor:
        """The volume as the decoder sees it, (B, C, D, H, W) in the units of ``x``.

        A predicted Fourier code becomes the intensity between -3 and 3 whose code is nearest, see
        :func:`medgmae.losses.fourier_decode`: intensities beyond that are not found.

        Args:
            x: (B, C, D, H, W).
            masking: which patches are visible; random when None.
            paste_visible: show the true voxels where the patch was visible.
            denormalize: how a normalised prediction gets its patch's mean and spread back (which only the true patch
                knows): "exact" inverts the normalisation of the loss; "reference" multiplies by the unbiased standard
                deviation + 1e-6, as SelfMedMAE and MedGMAE do for their pictures.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.
        """
        masking = self._masking(x, masking, mask_ratio)
        target = patchify(x, self.patch_size)
        pred = self.forward(x, masking).pred.to(target.dtype)
        if self.fourier_frequencies:
            code = pred.reshape(*target.shape, 2 * self.fourier_frequencies)
            pred = fourier_decode(code, self.fourier_temperature)
        if self.norm_target is not None:
            mean, std = patch_statistics(target, self.norm_target)
            if denormalize == "reference":
                std = target.std(dim=-1, keepdim=True) + PATCH_EPS
            pred = pred * std + mean
        if paste_visible:
            pred = torch.where(masking.mask.unsqueeze(-1) > 0, pred, target)
        return unpatchify(pred, self.patch_size, self._grid(x), x.shape[1])


def masked_vit(
    img_size: Size = 96,
    patch_size: Size = 16,
    in_chans: int = 1,
    *,
    decoder_embed_dim: int = 512,
    decoder_depth: int = 8,
    decoder_num_heads: int = 16,
    sigmoid: bool = False,
    norm_target: NormTarget | None = None,
    fourier_frequencies: int = 0,
    fourier_temperature: float = 0.01,
    mask_ratio: float = 0.75,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    **encoder_options: Any,
) -> MaskedAutoencoder:
    """A masked autoencoder of a ViT encoder and a ViT decoder.

    Args:
        decoder_embed_dim: width of the decoder; likewise ``decoder_depth`` and ``decoder_num_heads``.
        sigmoid: squash predictions into (0, 1).
        norm_target: see :class:`MaskedAutoencoder`; likewise ``mask_ratio`` and what begins with ``fourier_``.
        **encoder_options: everything else that :class:`~medgmae.models.vit.ViT` takes.
    """
    encoder = ViT(img_size, patch_size, in_chans, mlp_ratio=mlp_ratio, norm_eps=norm_eps, **encoder_options)
    decoder = ViTDecoder(
        encoder.embed_dim,
        math.prod(encoder.patch_size) * in_chans * (2 * fourier_frequencies or 1),
        encoder.grid_size,
        decoder_embed_dim,
        decoder_depth,
        decoder_num_heads,
        mlp_ratio=mlp_ratio,
        prefix_tokens=encoder.num_prefix_tokens,
        sigmoid=sigmoid,
        norm_eps=norm_eps,
    )
    return MaskedAutoencoder(encoder, decoder, mask_ratio, norm_target, fourier_frequencies, fourier_temperature)


# The decoders of the published systems: width, blocks, heads.
DEC256 = {"decoder_embed_dim": 256, "decoder_depth": 8, "decoder_num_heads": 8}
DEC384 = {"decoder_embed_dim": 384, "decoder_depth": 8, "decoder_num_heads": 12}
DEC512 = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
DEC528 = {"decoder_embed_dim": 528, "decoder_depth": 8, "decoder_num_heads": 16}
DEC576 = {"decoder_embed_dim": 576, "decoder_depth": 8, "decoder_num_heads": 16}
DEC96 = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}
DEC24 = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}


def _mae(
    overrides: dict[str, Any],
    img_size: Size,
    patch_size: int,
    size: dict[str, int],
    decoder: dict[str, int],
    **more: Any,
) -> MaskedAutoencoder:
    defaults = {"img_size": img_size, "patch_size": patch_size, **size, **decoder, **more}
    return build(masked_vit, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def mae_vit_base_patch16_96(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 96³, decoder 384 wide: SelfMedMAE (BTCV) and MedGMAE's voxel baseline."""
    return _mae(overrides, 96, 16, BASE, DEC384, norm_target="biased")


@register_model
def mae_vit_base_patch16_96_dec512(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 96³, decoder 512 wide: the decoder in GL-MAE's released class."""
    return _mae(overrides, 96, 16, BASE, DEC512)


@register_model
def mae_vit_base_patch16_96_dec576(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 96³, decoder 576 wide, mask ratio 0.6: MAE3D of GL-MAE's first author."""
    return _mae(overrides, 96, 16, BASE, DEC576, norm_target="unbiased", mask_ratio=0.6)


@register_model
def mae_vit_wide_patch16_96(**overrides: Any) -> MaskedAutoencoder:
    """MedGMAE's voxel baseline "large": 1536 wide, patch 16, decoder 528 wide."""
    return _mae(overrides, 96, 16, WIDE, DEC528, norm_target="biased")


@register_model
def mae_vit_wide_patch12_96(**overrides: Any) -> MaskedAutoencoder:
    """MedGMAE's voxel baseline "large" with patch 12: 1536 wide, decoder 528 wide."""
    return _mae(overrides, 96, 12, WIDE, DEC528, norm_target="biased")


@register_model
def mae_vit_base_patch16_128(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 128³ crops of four MR contrasts, decoder 384 wide: SelfMedMAE (BraTS)."""
    return _mae(overrides, 128, 16, BASE, DEC384, in_chans=4, norm_target="biased")


@register_model
def mae_vit_base_patch16_96x96x16(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 96x96x16 slabs, decoder 384 wide: the UVA adaptation of SelfMedMAE."""
    return _mae(overrides, (96, 96, 16), 16, BASE, DEC384, norm_target="biased")


@register_model
def mae_vit_base_patch16_256(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 256³, decoder 512 wide with sigmoid: TANGERINE base."""
    return _mae(overrides, 256, 16, BASE, DEC512, sigmoid=True)


@register_model
def mae_vit_large_patch16_256(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-L/16 on 256³, decoder 512 wide with sigmoid: TANGERINE."""
    return _mae(overrides, 256, 16, LARGE, DEC512, sigmoid=True)


@register_model
def mae_vit_huge_patch14_252(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-H/14 on 252³, decoder 512 wide with sigmoid: TANGERINE huge."""
    return _mae(overrides, 252, 14, HUGE, DEC512, sigmoid=True)


@register_model
def mae_vit_tiny_patch8_64(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-Ti/8 on 64³, decoder 96 wide: the demonstration weights are of this architecture."""
    return _mae(overrides, 64, 8, TINY, DEC96)


@register_model
def mae_vit_nano_patch8_32(**overrides: Any) -> MaskedAutoencoder:
    """Two narrow blocks on 32³ and one in the decoder: for tests."""
    return _mae(overrides, 32, 8, NANO, DEC24)


@register_model
def mae2d_vit_base_patch16_224(**overrides: Any) -> MaskedAutoencoder:
    """MAE with ViT-B/16 on 224² images, decoder 256 wide of Fourier codes: SelfMedMAE's 2D pre-training."""
    return _mae(overrides, 224, 16, BASE, DEC256, in_chans=3, dims=2, fourier_frequencies=4)


@register_model
def mae2d_vit_nano_patch8_32(**overrides: Any) -> MaskedAutoencoder:
    """Two narrow blocks on 32² images and one in the decoder of Fourier codes: for tests."""
    return _mae(overrides, 32, 8, NANO, DEC24, dims=2, fourier_frequencies=4)
