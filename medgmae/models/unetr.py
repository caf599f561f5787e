"""UNETR: dense predictions, such as a segmentation, from any encoder of this library (Hatamizadeh et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from medgmae.layers.patches import Size, input_grid, tap_indices
from medgmae.models.encoder import Encoder, Model
from medgmae.models.parts import Setting, given
from medgmae.models.primus import MEDIUM as PRIMUS_MEDIUM
from medgmae.models.primus import NANO as PRIMUS_NANO
from medgmae.models.primus import Primus
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.unetr_decoder import UNETRDecoder
from medgmae.models.vim import SMALL as VIM_SMALL
from medgmae.models.vim import TINY as VIM_TINY
from medgmae.models.vim import Vim
from medgmae.models.vit import BASE, LARGE, NANO, TINY, ViT


@register_class
class UNETR(Model):
    """An encoder and a convolutional decoder: one logit per class and voxel, at the resolution of the input.

    Any encoder of this library, for volumes or images, on any grid, with any patch. The decoder reads the tokens after
    the blocks ``taps``, as they are, and those after the encoder's last norm.

    Args:
        encoder: one that normalises its tokens, not the pooled vector.
        num_classes: channels of the logits; 0 returns the decoder's features (B, feature_size, *size).
        feature_size: width of the decoder at the voxels; it doubles with every coarser step.
        taps: blocks whose tokens the skip connections read, 0-based, shallow first. None: spread evenly, which gives
            the published 3, 6, 9 of 12 blocks with a patch of 16, and 4, 8 with one of 8.
        pooled: see :class:`UNETRDecoder`.
        slice_axis: of an encoder for volumes, the axis (0, 1, 2 of d, h, w; negative from the end) along which inputs
            are one patch thick. The decoder is then one for images and predicts their middle slice, index n // 2: the
            pseudo-3D networks of the UVA adaptation of SelfMedMAE have -1. None: predict every voxel.

    Raises:
        ValueError: an encoder that normalises the pooled vector, taps that do not exist or are not as many as the
            decoder reads, an axis that does not exist.
    """

    TASK: ClassVar[str] = "image-segmentation"
    """What the model does, as the Hugging Face hub calls it."""

    decoder: UNETRDecoder

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        feature_size: int = 16,
        taps: Sequence[int] | None = None,
        *,
        pooled: bool = False,
        slice_axis: int | None = None,
    ) -> None:
        super().__init__()
        self._built = given(locals())
        if isinstance(encoder.norm, nn.Identity):
            raise ValueError(
                "the encoder of a UNETR normalises its tokens, not the pooled vector: build it with "
                f"global_pool='token' or fc_norm=False, got global_pool={encoder.global_pool!r}"
            )
        self.encoder, self.pretrained_cfg = encoder, {}
        self.label_names: list[str] | None = None  # of the classes; a caller's to set, saved and loaded
        self.slice_axis = _axis(slice_axis, len(encoder.patch_size))
        patch = tuple(size for axis, size in enumerate(encoder.patch_size) if axis != self.slice_axis)
        decoder = UNETRDecoder(encoder.embed_dim, patch, encoder.in_chans, num_classes, feature_size, pooled)
        self.decoder, self.taps = decoder, _taps(taps, decoder.num_taps, len(encoder.blocks))

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self.decoder.num_classes

    @property
    def feature_size(self) -> int:
        """Width of the decoder at the voxels."""
        return self.decoder.feature_size

    @property
    def pooled(self) -> bool:
        """See :class:`UNETRDecoder`."""
        return self.decoder.pooled

    def settings(self) -> dict[str, Setting]:
        """Those of the encoder, and the taps."""
        own = {f"encoder.{name}": setting for name, setting in self.encoder.settings().items()}
        return {**own, "decoder.taps": Setting(self.taps, "taps")}

    __call__: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, D, H, W) of a volume (B, C, D, H, W); without that axis where there is a slice_axis.

        Raises:
            ValueError: an input of another rank, channel count or of a size that is not a multiple of the patch, or
                that is thicker than a patch along ``slice_axis``.
            TypeError: an input that is not a tensor.
        """
        grid = input_grid(x, self.in_chans, self.patch_size)
        tokens, taps = self.encoder.forward_intermediates(x, self.taps)
        last = tokens[:, self.num_prefix_tokens :].transpose(1, 2).reshape(x.shape[0], -1, *grid)
        if self.slice_axis is None:
            return self.decoder(x, taps, last)
        axis = self.slice_axis + 2
        if grid[self.slice_axis] != 1:
            raise ValueError(
                f"the input has {x.shape[axis]} voxels along axis {self.slice_axis}, of which one slice is predicted; "
                f"expected one patch, {self.patch_size[self.slice_axis]}: pass the slices one by one, each replicated"
            )
        return self.decoder(x.select(axis, x.shape[axis] // 2), [tap.squeeze(axis) for tap in taps], last.squeeze(axis))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, E) of the encoder after the last norm; see :meth:`Encoder.forward_features`."""
        return self.encoder.forward_features(x, keep)

    def get_classifier(self) -> nn.Module:
        """The last layer; an identity without classes."""
        return self.decoder.out

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one with a random start.

        Raises:
            ValueError: a number of classes that is none.
        """
        self.decoder.reset_classifier(num_classes)
        self.label_names = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both parts in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: Size) -> None:
        """Make the encoder's table of positions for another size, see :meth:`Encoder.set_input_size`."""
        self.encoder.set_input_size(img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise learning rates, in the form that ``timm.optim`` reads: the decoder is the last one."""
        patterns = self.encoder.group_matcher(coarse)
        return {name: re.sub(r"\^", r"^encoder\\.", pattern) for name, pattern in patterns.items()}


def _axis(axis: int | None, dims: int) -> int | None:
    if axis is None:
        return None
    if dims != 3 or not -dims <= axis < dims:
        raise ValueError(f"slice_axis must be None, or 0, 1 or 2 of an encoder for volumes; got {axis} of {dims} axes")
    return axis % dims


def _taps(taps: Sequence[int] | None, count: int, depth: int) -> tuple[int, ...]:
    """The blocks to tap, 0-based."""
    if taps is None:
        return tuple(depth * step // (count + 1) for step in range(1, count + 1))
    if len(taps) != count:
        raise ValueError(f"taps must name {count} blocks, one per skip connection of tokens, got {tuple(taps)}")
    return tuple(tap_indices(list(taps), depth)) if count else ()


def unetr(
    family: type[ViT] | type[Vim] | type[Primus],
    num_classes: int = 14,
    feature_size: int = 16,
    taps: Sequence[int] | None = None,
    *,
    pooled: bool = False,
    slice_axis: int | None = None,
    **encoder_options: Any,
) -> UNETR:
    """A UNETR and its encoder.

    Args:
        family: class of the encoder.
        num_classes: see :class:`UNETR`; likewise ``feature_size``, ``taps``, ``pooled`` and ``slice_axis``.
        **encoder_options: what that class takes.
    """
    return UNETR(family(**encoder_options), num_classes, feature_size, taps, pooled=pooled, slice_axis=slice_axis)


def _vit(overrides: dict[str, Any], img_size: Size, patch_size: int, size: dict[str, int], **more: Any) -> UNETR:
    tokens = {"pos_embed": "learned", "global_pool": "avg", "fc_norm": False}  # all of them normalised
    defaults = {"img_size": img_size, "patch_size": patch_size, **tokens, **size, **more}
    return build(partial(unetr, ViT), defaults, overrides)  # type: ignore[no-any-return]


def _vim(overrides: dict[str, Any], img_size: Size, patch_size: int, size: dict[str, int], **more: Any) -> UNETR:
    defaults = {"img_size": img_size, "patch_size": patch_size, **size, **more}
    return build(partial(unetr, Vim), defaults, overrides)  # type: ignore[no-any-return]


def _primus(overrides: dict[str, Any], img_size: Size, size: dict[str, int], **more: Any) -> UNETR:
    defaults = {"img_size": img_size, "patch_size": 8, **size, **more}
    return build(partial(unetr, Primus), defaults, overrides)  # type: ignore[no-any-return]


@register_model
def unetr_vit_base_patch16_96(**overrides: Any) -> UNETR:
    """UNETR on ViT-B/16, 96³ crops, 14 classes: SelfMedMAE (BTCV)."""
    return _vit(overrides, 96, 16, BASE, drop_path_rate=0.1)


@register_model
def unetr_vit_base_patch16_96_f48(**overrides: Any) -> UNETR:
    """UNETR on ViT-B/16 without a class token, 96³ crops, 48 features, 14 classes: GL-MAE's first author."""
    return _vit(overrides, 96, 16, BASE, feature_size=48, class_token=False)


@register_model
def unetr_vit_base_patch8_96(**overrides: Any) -> UNETR:
    """UNETR on ViT-B/8, 96³ crops, 14 classes: MedGMAE's encoder with the finest grid."""
    return _vit(overrides, 96, 8, BASE, drop_path_rate=0.1)


@register_model
def unetr_vit_base_patch16_128(**overrides: Any) -> UNETR:
    """UNETR on ViT-B/16, 128³ crops of four MR contrasts, the three tumour regions: SelfMedMAE (BraTS)."""
    return _vit(overrides, 128, 16, BASE, in_chans=4, num_classes=3, drop_path_rate=0.1)


@register_model
def unetr_vit_base_patch16_96x96x16(**overrides: Any) -> UNETR:
    """UNETR on ViT-B/16, 96x96x16 slabs, 14 classes: the UVA adaptation of SelfMedMAE."""
    return _vit(overrides, (96, 96, 16), 16, BASE, drop_path_rate=0.1)


@register_model
def unetr_vit_base_patch16_224x224x16_slice(**overrides: Any) -> UNETR:
    """ViT-B/16 on a slice replicated to 224x224x16, 2D decoder, 14 classes: the UVA adaptation's pseudo-3D network."""
    return _vit(overrides, (224, 224, 16), 16, BASE, slice_axis=-1, drop_path_rate=0.1)


@register_model
def unetr2d_vit_base_patch16_224(**overrides: Any) -> UNETR:
    """UNETR on a 2D ViT-B/16, 224² slices, 14 classes: the UVA adaptation's true 2D network."""
    return _vit(overrides, 224, 16, BASE, dims=2, drop_path_rate=0.1)


@register_model
def unetr_vit_large_patch16_256(**overrides: Any) -> UNETR:
    """UNETR on ViT-L/16, 256³: for TANGERINE's encoder, whose whole scan is 256³."""
    return _vit(overrides, 256, 16, LARGE)


@register_model
def unetr_vit_tiny_patch8_64(**overrides: Any) -> UNETR:
    """UNETR on ViT-Ti/8, 64³ crops, 14 classes: for a laptop, and for the demonstration weights."""
    return _vit(overrides, 64, 8, TINY)


@register_model
def unetr_vit_nano_patch8_32(**overrides: Any) -> UNETR:
    """UNETR on two narrow blocks, 32³, 4 features: for tests."""
    return _vit(overrides, 32, 8, NANO, feature_size=4)


@register_model
def unetr_vim_small_patch16_160(**overrides: Any) -> UNETR:
    """UNETR on Vim-S/16, 160³ of four MR contrasts, the three tumour regions: for 3D Mamba MAE's encoder."""
    return _vim(overrides, 160, 16, VIM_SMALL, in_chans=4, num_classes=3)


@register_model
def unetr_vim_tiny_patch8_64(**overrides: Any) -> UNETR:
    """UNETR on Vim-Ti/8, 64³ crops, 14 classes: for a laptop."""
    return _vim(overrides, 64, 8, VIM_TINY)


@register_model
def unetr_primus_m_patch8_160(**overrides: Any) -> UNETR:
    """UNETR on Primus-M/8, 160³ crops, 14 classes: for OpenMind's encoders."""
    return _primus(overrides, 160, PRIMUS_MEDIUM, drop_path_rate=0.2)


@register_model
def unetr_primus_m_patch8_192(**overrides: Any) -> UNETR:
    """UNETR on Primus-M/8 without a table of positions, 192³ crops, 14 classes: for COLIPRI's encoder."""
    return _primus(overrides, 192, PRIMUS_MEDIUM, pos_embed="none", drop_path_rate=0.2)


@register_model
def unetr_primus_nano_patch8_32(**overrides: Any) -> UNETR:
    """UNETR on two narrow Primus blocks, 32³, 4 features: for tests."""
    return _primus(overrides, 32, PRIMUS_NANO, feature_size=4)
