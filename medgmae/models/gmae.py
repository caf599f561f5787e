"""MedGMAE: a masked autoencoder that predicts 3D Gaussians, compared with the scan after rendering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.layers.masking import Masking
from medgmae.layers.patches import Size, patchify, take_tokens, unpatchify
from medgmae.losses import image_norm, scale_penalty, ssim3d, uniformity
from medgmae.models.autoencoder import Autoencoder, Seen
from medgmae.models.encoder import Encoder
from medgmae.models.gaussian_decoder import GaussianDecoder
from medgmae.models.parts import Setting, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.vit import BASE, NANO, TINY, WIDE, ViT

Loss = Literal["paper", "reference"]
TERMS = ("mse", "l1", "ssim", "scale", "uniformity")


class GaussianMAEOutput(NamedTuple):
    """What a Gaussian autoencoder's forward gives.

    loss: scalar, the weighted sum of the terms.
    volume: (B, 1, D, H, W), the rendered Gaussians. With the paper's loss only the voxels that count are rendered, and
        the visible ones are 0; ``reconstruct`` renders all.
    gaussians: (B, K, ...), in units of the input's axes.
    mask: (B, N), 1 = masked.
    terms: the unweighted terms of the loss by name, those that have a weight.
    """

    loss: Tensor
    volume: Tensor
    gaussians: Gaussians
    mask: Tensor
    terms: dict[str, Tensor]


@register_class
class GaussianMAE(Autoencoder):
    """Encoder on visible patches, a decoder that makes Gaussians of them, a renderer, and a loss on voxels.

    The loss compares the rendering with the scan, in which visible voxels are set to 0:

    - loss="paper": over the masked voxels. Only their patches are rendered, so visible voxels cost nothing; where a
      term needs a whole volume ("ssim", ``image_norm``), visible voxels are 0 in the rendering too.
    - loss="reference": over all voxels of the whole rendering, as MedGMAE's released code does. It so teaches to render
      nothing where the scan is visible.

    Terms of the loss, each with a weight in ``loss_weights``:

    - "mse", "l1": mean squared and absolute error over these voxels.
    - "ssim": 1 - SSIM of the whole volumes, see :func:`medgmae.losses.ssim3d`.
    - "scale": :func:`medgmae.losses.scale_penalty` above ``max_scale``; its weight falls as 0.1^(step / 1000).
    - "uniformity": :func:`medgmae.losses.uniformity` of the centres.

    MedGMAE trains with "mse" alone; in its code the weights 0.4, 0.4, 0.2 of the first three are commented out, and the
    last two are logged.

    Where nothing is masked every voxel counts, as in MedGMAE: a plain autoencoder.

    Args:
        encoder: a :class:`~medgmae.models.vit.ViT` for volumes of one channel whose tokens are normalised.
        decoder: a :class:`~medgmae.models.gaussian_decoder.GaussianDecoder`.
        renderer: a :class:`~medgmae.gaussians.rendering.GaussianRenderer`.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.
        loss: "paper" or "reference".
        image_norm: for "mse", normalise rendering and scan over the whole crop, see :func:`medgmae.losses.image_norm`.
        loss_weights: weight by term.
        max_scale: scale above which the penalty begins, in units of the axis.

    Raises:
        ValueError: an encoder of another kind, an unknown loss or an unknown term.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: GaussianDecoder,
        renderer: GaussianRenderer,
        *,
        mask_ratio: float = 0.75,
        loss: Loss = "paper",
        image_norm: bool = False,
        loss_weights: Mapping[str, float] | None = None,
        max_scale: float = 0.5,
    ) -> None:
        built = given(locals())
        _check_encoder(encoder)
        super().__init__(encoder, decoder, mask_ratio)
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be 'paper' or 'reference', got {loss!r}")
        weights = {"mse": 1.0} if loss_weights is None else dict(loss_weights)
        if not weights or not set(weights) <= set(TERMS):
            raise ValueError(f"loss_weights must have terms of {', '.join(TERMS)}, got {sorted(weights)}")
        self._built = {**built, "loss_weights": weights}
        self.renderer, self.loss, self.image_norm = renderer, loss, image_norm
        self.loss_weights, self.max_scale = weights, max_scale

    __call__: Callable[..., GaussianMAEOutput]

    def settings(self) -> dict[str, Setting]:
        """The settings of both parts, and the renderer's support."""
        return {
            **self._part_settings(),
            "renderer.support": Setting(self.renderer.support, "support", "lenient"),
        }

    def forward(
        self,
        x: Tensor,
        masking: Masking | None = None,
        mask_ratio: float | None = None,
        *,
        step: int | Tensor = 0,
    ) -> GaussianMAEOutput:
        """Mask, encode, decode, render and compare.

        Args:
            x: (B, 1, D, H, W), every axis a multiple of the patch.
            masking: which patches are visible; random when None.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.
            step: training steps so far; only the weight of the "scale" term depends on it.

        Raises:
            ValueError: an input that does not fit the encoder, a masking for another input, or one beside a ratio.
        """
        output: GaussianMAEOutput = self.forward_with_tokens(x, self._masking(x, masking, mask_ratio), step).output
        return output

    def forward_with_tokens(self, x: Tensor, masking: Masking, step: int | Tensor = 0) -> Seen:
        """See :class:`Autoencoder`."""
        tokens = self.encoder.forward_features(x, keep=masking.keep)
        gaussians = self.decoder(tokens)
        counted = masking.hidden
        if counted.shape[1] == 0:
            counted = masking.keep
        size, patch = x.shape[2:], self.patch_size
        if self.loss == "paper":
            volume = self._place(self.renderer(gaussians, size, counted, patch), counted, x)
        else:
            volume = self.renderer(gaussians, size)
        target = self._place(take_tokens(patchify(x, patch), counted), counted, x).to(volume.dtype)
        terms = self._terms(volume, target, gaussians, counted)
        loss = torch.stack([self._weight(name, step) * value for name, value in terms.items()]).sum()
        return Seen(tokens, GaussianMAEOutput(loss, volume, gaussians, masking.mask, terms))

    def gaussians(self, x: Tensor, masking: Masking | None = None, *, mask_ratio: float | None = None) -> Gaussians:
        """The Gaussians that the decoder makes of what is visible of ``x`` (B, 1, D, H, W); see :meth:`forward`."""
        masking = self._masking(x, masking, mask_ratio)
        return self.decoder(self.encoder.forward_features(x, keep=masking.keep))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        masking: Masking | None = None,
        paste_visible: bool = True,
        *,
        mask_ratio: float | None = None,
    ) -> Tensor:
        """The whole rendering, (B, 1, D, H, W) in the units of ``x``.

        Args:
            x: (B, 1, D, H, W).
            masking: which patches are visible; random when None.
            paste_visible: show the true voxels where the patch was visible.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.
        """
        masking = self._masking(x, masking, mask_ratio)
        volume: Tensor = self.renderer(self.gaussians(x, masking), x.shape[2:])
        if not paste_visible:
            return volume
        patch, hidden = self.patch_size, masking.hidden
        rendered = self._place(take_tokens(patchify(volume, patch), hidden), hidden, x)
        return rendered + self._place(take_tokens(patchify(x, patch), masking.keep), masking.keep, x)

    def _place(self, patches: Tensor, where: Tensor, x: Tensor) -> Tensor:
        """A volume (B, 1, D, H, W) as large as ``x``, 0 but for the patches (B, m, L) with numbers (B, m)."""
        grid = self._grid(x)
        every = patches.new_zeros(patches.shape[0], math.prod(grid), patches.shape[2])
        every = every.scatter(1, where.unsqueeze(-1).expand_as(patches), patches)
        return unpatchify(every, self.patch_size, grid, 1)

    def _terms(self, volume: Tensor, target: Tensor, gaussians: Gaussians, counted: Tensor) -> dict[str, Tensor]:
        compared = image_norm(volume) - image_norm(target) if self.image_norm else volume - target
        compute = {
            "mse": lambda: self._voxels(compared, counted).square().mean(),
            "l1": lambda: self._voxels(volume - target, counted).abs().mean(),
            "ssim": lambda: 1 - ssim3d(volume, target).mean(),
            "scale": lambda: scale_penalty(gaussians.scales, self.max_scale),
            "uniformity": lambda: uniformity(gaussians.means),
        }
        return {name: compute[name]() for name in self.loss_weights}

    def _voxels(self, volume: Tensor, counted: Tensor) -> Tensor:
        """The voxels over which the loss takes its mean."""
        if self.loss == "reference":
            return volume
        return take_tokens(patchify(volume, self.patch_size), counted)

    def _weight(self, name: str, step: int | Tensor) -> Any:
        return self.loss_weights[name] * (0.1 ** (step / 1000) if name == "scale" else 1)


def _check_encoder(encoder: Encoder) -> None:
    if encoder.in_chans != 1 or len(encoder.patch_size) != 3:
        raise ValueError(
            "a Gaussian has one intensity and lies in a volume: the encoder must have in_chans=1 and dims=3, got "
            f"in_chans={encoder.in_chans} and dims={len(encoder.patch_size)}; for several channels use a mae_* model"
        )


register_class(GaussianRenderer)


def gaussian_vit(
    img_size: Size = 96,
    patch_size: Size = 16,
    in_chans: int = 1,
    *,
    num_gaussians: int = 512,
    decoder_embed_dim: int = 384,
    decoder_depth: int = 8,
    decoder_num_heads: int = 12,
    kind: str = "standard",
    ratios: tuple[int, ...] | None = None,
    density_scale: float = 0.1,
    spread: bool = False,
    support: Literal["box"] | float | None = 4.0,
    mask_ratio: float = 0.75,
    loss: Loss = "paper",
    image_norm: bool = False,
    loss_weights: Mapping[str, float] | None = None,
    max_scale: float = 0.5,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    **encoder_options: Any,
) -> GaussianMAE:
    """A Gaussian autoencoder of a ViT encoder, a Gaussian decoder and a renderer.

    Args:
        num_gaussians: see :class:`~medgmae.models.gaussian_decoder.GaussianDecoder`, likewise ``kind``, ``ratios``,
            ``density_scale``, ``spread`` and, without their prefix, the options that begin with ``decoder_``.
        support: see :class:`~medgmae.gaussians.rendering.GaussianRenderer`.
        mask_ratio: see :class:`GaussianMAE`, likewise ``loss``, ``image_norm``, ``loss_weights``, ``max_scale``.
        **encoder_options: everything else that :class:`~medgmae.models.vit.ViT` takes.
    """
    encoder = ViT(img_size, patch_size, in_chans, mlp_ratio=mlp_ratio, norm_eps=norm_eps, **encoder_options)
    decoder = GaussianDecoder(
        encoder.embed_dim,
        num_gaussians,
        decoder_embed_dim,
        decoder_depth,
        decoder_num_heads,
        kind=kind,  # type: ignore[arg-type]  # checked by the decoder
        ratios=ratios,
        density_scale=density_scale,
        spread=spread,
        mlp_ratio=mlp_ratio,
        prefix_tokens=encoder.num_prefix_tokens,
        norm_eps=norm_eps,
    )
    return GaussianMAE(
        encoder,
        decoder,
        GaussianRenderer(support),
        mask_ratio=mask_ratio,
        loss=loss,
        image_norm=image_norm,
        loss_weights=loss_weights,
        max_scale=max_scale,
    )


# MedGMAE's decoders: width, blocks, heads; its weights mean what they mean under its box.
DEC384: dict[str, Any] = {"decoder_embed_dim": 384, "decoder_depth": 8, "decoder_num_heads": 12, "support": "box"}
DEC528: dict[str, Any] = {"decoder_embed_dim": 528, "decoder_depth": 8, "decoder_num_heads": 16, "support": "box"}
# New ones start with their Gaussians spread out and have round supports.
DEC96: dict[str, Any] = {"decoder_embed_dim": 96, "decoder_depth": 4, "decoder_num_heads": 3, "spread": True}
DEC24: dict[str, Any] = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2, "spread": True}


def _gmae(
    overrides: dict[str, Any],
    img_size: int,
    patch_size: int,
    size: dict[str, int],
    decoder: dict[str, Any],
    **more: Any,
) -> GaussianMAE:
    defaults = {"img_size": img_size, "patch_size": patch_size, **size, **decoder, **more}
    return build(gaussian_vit, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def gmae_vit_base_patch16_96(**overrides: Any) -> GaussianMAE:
    """MedGMAE base: ViT-B/16 on 96³, decoder 384 wide, 512 Gaussians."""
    return _gmae(overrides, 96, 16, BASE, DEC384)


@register_model
def gmae_vit_base_patch8_96(**overrides: Any) -> GaussianMAE:
    """MedGMAE base with patch 8: ViT-B/8 on 96³, decoder 384 wide, 512 Gaussians."""
    return _gmae(overrides, 96, 8, BASE, DEC384)


@register_model
def gmae_vit_wide_patch16_96(**overrides: Any) -> GaussianMAE:
    """MedGMAE "large": 1536 wide, patch 16, decoder 528 wide, 512 Gaussians."""
    return _gmae(overrides, 96, 16, WIDE, DEC528)


@register_model
def gmae_vit_wide_patch12_96(**overrides: Any) -> GaussianMAE:
    """MedGMAE "large" with patch 12: 1536 wide, decoder 528 wide, 512 Gaussians."""
    return _gmae(overrides, 96, 12, WIDE, DEC528)


@register_model
def gmae_vit_base_patch16_96_residual(**overrides: Any) -> GaussianMAE:
    """MedGMAE base with its residual decoder: 512 Gaussians and 13 relative to each."""
    return _gmae(overrides, 96, 16, BASE, DEC384, kind="residual")


@register_model
def gmae_vit_base_patch16_96_hierarchical(**overrides: Any) -> GaussianMAE:
    """MedGMAE* base: the paper's hierarchical decoder, 512 Gaussians and 12 + 7 finer ones relative to each."""
    return _gmae(overrides, 96, 16, BASE, DEC384, kind="hierarchical")


@register_model
def gmae_vit_base_patch16_96_cgs(**overrides: Any) -> GaussianMAE:
    """MedGMAE base with its cgs decoder as we read it: 12 blocks, 512 · (1 + 2 + 4 + 8) Gaussians, coarse to fine."""
    return _gmae(overrides, 96, 16, BASE, DEC384, kind="cgs", decoder_depth=12)


@register_model
def gmae_vit_tiny_patch8_64(**overrides: Any) -> GaussianMAE:
    """Gaussian MAE with ViT-Ti/8 on 64³, decoder 96 wide, 256 Gaussians spread out from the start."""
    return _gmae(overrides, 64, 8, TINY, DEC96, num_gaussians=256)


@register_model
def gmae_vit_nano_patch8_32(**overrides: Any) -> GaussianMAE:
    """Two narrow blocks on 32³, one in the decoder, 64 Gaussians: for tests."""
    return _gmae(overrides, 32, 8, NANO, DEC24, num_gaussians=64)
