"""The decoder of a UNETR: from maps of tokens and the image to a map of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.blocks import initialize, run_block
from medgmae.layers.convolutions import ResidualBlock, SkipPath, UpBlock, convolution, stage_strides
from medgmae.layers.norms import channels_last
from medgmae.layers.patches import Shape
from medgmae.models.parts import Part, Readable, Setting, check_classes, given
from medgmae.models.registry import register_class


@register_class
class UNETRDecoder(Part, Readable):
    """From maps of tokens at several depths and the image to a map of logits, step by step finer.

    The steps are those of :func:`medgmae.layers.convolutions.stage_strides`; widths double from ``feature_size`` at
    the voxels on. At every step the map is refined, joined with a skip connection and mixed by a residual block. The
    skip connection of the finest step comes from the image, the others from tapped tokens.

    Args:
        embed_dim: width E of the tokens.
        patch_size: voxels per axis of a patch, as many axes as the predicted map has.
        in_chans: channels of the image.
        num_classes: channels of the logits; 0 returns the features (B, feature_size, *size).
        feature_size: width at the voxels.
        pooled: begin one step coarser than the tokens, from their mean over 3 places at every second place, and take
            one tap more, at the tokens' own resolution: SelfMedMAE's "UNETRx8_decoderv2".
    """

    FIXED_SIZES = ()
    CAN_START_FRESH: ClassVar[bool] = True

    def __init__(
        self,
        embed_dim: int,
        patch_size: Shape,
        in_chans: int,
        num_classes: int,
        feature_size: int = 16,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self._built = given(locals())
        del self._built["embed_dim"], self._built["patch_size"], self._built["in_chans"]
        check_classes(num_classes)
        if feature_size < 1:
            raise ValueError(f"feature_size must be at least 1, got {feature_size}")
        strides = stage_strides(tuple(patch_size))
        dims = len(patch_size)
        self.pooled, self.grad_checkpointing = pooled, False
        self.num_classes, self.feature_size = num_classes, feature_size
        widths = [feature_size * 2**level for level in range(len(strides) + pooled)]
        self.stem = ResidualBlock(dims, in_chans, feature_size)
        skips: list[nn.Module] = [
            SkipPath(embed_dim, width, strides[:level:-1]) for level, width in enumerate(widths[1 : len(strides)])
        ]
        if pooled:
            skips.append(ResidualBlock(dims, embed_dim, widths[-1]))
            strides = [*strides, (2,) * dims]
        self.skips = nn.ModuleList(skips)
        self.stages = nn.ModuleList(
            UpBlock(coarser, width, stride, skip=True)
            for coarser, width, stride in zip([*widths[1:], embed_dim], widths, strides, strict=True)
        )
        self.out: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self.apply(initialize)

    @property
    def num_taps(self) -> int:
        """How many maps of tokens it takes beside the last one."""
        return len(self.skips)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are no UNETR decoder's."""
        stem, out = state.get("stem.conv1.weight"), state.get("out.weight")
        if stem is None:
            return None
        return {
            "feature_size": len(stem),
            "num_classes": 0 if out is None else len(out),
            "pooled": any(name.startswith("skips.") and name.split(".")[2] == "conv1" for name in state),
        }

    def settings(self) -> dict[str, Setting]:
        """None: its tensors show everything."""
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one with a random start; 0 for none."""
        check_classes(num_classes)
        self.num_classes = num_classes
        like = next(self.stem.parameters())
        dims = like.dim() - 2
        out = convolution(dims, self.feature_size, num_classes, 1, bias=True) if num_classes else nn.Identity()
        self.out = out.apply(initialize).to(like)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    __call__: Callable[..., Tensor]

    def forward(self, image: Tensor, taps: Sequence[Tensor], last: Tensor) -> Tensor:
        """Logits (B, num_classes, *size).

        Args:
            image: (B, C, *size).
            taps: as many maps (B, E, *grid) as ``num_taps``, shallow ones first.
            last: the map (B, E, *grid) after the encoder's last norm.
        """
        image, x = channels_last(image), last
        if self.pooled:
            pool = F.avg_pool3d if last.dim() == 5 else F.avg_pool2d
            x = pool(F.pad(last, (1, 1) * (last.dim() - 2)), 3, stride=2)  # whose own padding refuses thin maps
        # Each skip connection is made where it is needed, so that no two fine ones are held at once.
        for level in reversed(range(1, len(self.stages))):
            skip = run_block(self.skips[level - 1], taps[level - 1], self.grad_checkpointing)
            x = run_block(self.stages[level], x, self.grad_checkpointing, skip)
        # Kept, the maps of the finest step would be most of what training takes. A CPU computes them again in a twelfth
        # of a step's time; elsewhere that is for the user to choose.
        recompute = self.grad_checkpointing or image.device.type == "cpu"
        x = self.stages[0](x, run_block(self.stem, image, recompute), recompute and torch.is_grad_enabled())
        return self.out(x)  # type: ignore[no-any-return]
