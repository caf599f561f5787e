"""What masked autoencoders share, whatever their decoder predicts: parts, masks, the encoder's features."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from medgmae.layers.masking import Masking, random_masking
from medgmae.layers.patches import Shape, Size, grid_of, input_grid
from medgmae.models.encoder import Encoder, Model
from medgmae.models.parts import Setting


class Seen(NamedTuple):
    """What a masked autoencoder makes of volumes.

    tokens: (B, P + n, E), the encoder's of what is visible, after the last norm.
    output: what ``forward`` gives.
    decoded: (B, N, E'), the decoder's of all patches, after its last norm; None of a decoder that has none.
    """

    tokens: Tensor
    output: Any
    decoded: Tensor | None = None


class Autoencoder(Model):
    """An encoder on the visible patches, and a decoder.

    Args:
        encoder: one that normalises its tokens, not the pooled vector.
        decoder: takes its tokens.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.

    Raises:
        ValueError: an encoder that normalises the pooled vector.
    """

    def __init__(self, encoder: Encoder, decoder: Any, mask_ratio: float) -> None:
        super().__init__()
        if isinstance(encoder.norm, nn.Identity):
            raise ValueError(
                "the encoder of a masked autoencoder normalises its tokens, not the pooled vector: build it with "
                f"global_pool='token' or fc_norm=False, got global_pool={encoder.global_pool!r}"
            )
        self.encoder, self.decoder, self.mask_ratio = encoder, decoder, mask_ratio
        self.pretrained_cfg = {}

    @abstractmethod
    def reconstruct(
        self,
        x: Tensor,
        masking: Masking | None = None,
        paste_visible: bool = True,
        *,
        mask_ratio: float | None = None,
    ) -> Tensor:
        """The volume as the decoder sees it, (B, C, D, H, W) in the units of ``x``, without gradients.

        Args:
            x: (B, C, D, H, W).
            masking: which patches are visible; random when None.
            paste_visible: show the true voxels where the patch was visible.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.
        """

    @abstractmethod
    def forward_with_tokens(self, x: Tensor, masking: Masking, step: int | Tensor = 0) -> Seen:
        """What ``forward`` gives, and the tokens that it is made of.

        Args:
            x: (B, C, D, H, W), every axis a multiple of the patch.
            masking: which patches are visible.
            step: training steps so far.
        """

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, E) of the encoder after the last norm; see :meth:`Encoder.forward_features`."""
        return self.encoder.forward_features(x, keep)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both parts in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def _part_settings(self) -> dict[str, Setting]:
        """The settings of both parts, under their names."""
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{part}.{name}": value for part, own in parts.items() for name, value in own.settings().items()}

    def set_input_size(self, img_size: Size) -> None:
        """Make the tables of positions of both parts for another size, see :meth:`Encoder.set_input_size`."""
        self.encoder.set_input_size(img_size)
        if hasattr(self.decoder, "set_grid_size"):
            self.decoder.set_grid_size(self.encoder.grid_size)

    def _masking(self, x: Tensor, masking: Masking | None, mask_ratio: float | None) -> Masking:
        """The masking given, checked against the input, or one drawn at the ratio given, or at the model's own.

        Raises:
            TypeError: an input that is not a tensor, or a masking that is none.
            ValueError: an input that does not fit the encoder; a masking for another batch or grid, or beside a ratio.
        """
        grid = input_grid(x, self.in_chans, self.patch_size)
        expected = (x.shape[0], math.prod(grid))  # len(x) would fix the batch in an exported program
        if masking is None:
            ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            return random_masking(*expected, ratio=ratio, device=x.device)
        if not hasattr(masking, "keep"):
            raise TypeError(f"masking is a {type(masking).__name__}; expected a Masking, or mask_ratio={masking!r}")
        if mask_ratio is not None:
            raise ValueError(f"masking says which patches are hidden: leave out mask_ratio (={mask_ratio})")
        shape = tuple(masking.mask.shape)
        if shape != expected:
            raise ValueError(f"the masking is for {shape} (batch, patches), the input has {expected}")
        return masking

    def _grid(self, x: Tensor) -> Shape:
        return grid_of(x.shape[2:], self.patch_size)
