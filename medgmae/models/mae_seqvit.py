"""BM-MAE (Robinet et al. 2025): the patches of all MR sequences of a patient masked and predicted together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.layers.masking import Masking, sequence_masking
from medgmae.layers.patches import Shape, Size, input_grid, patchify, unpatchify
from medgmae.models.autoencoder import Autoencoder, Seen
from medgmae.models.mae import MAEOutput, ViTDecoder
from medgmae.models.parts import Setting, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.seqvit import SEQUENCES, SequenceViT, no_channels, of_every_sequence
from medgmae.models.vit import BASE


@register_class
class SequenceDecoder(ViTDecoder):
    """A ViT decoder of the patches of several sequences; a token's place is the patch's and the sequence's.

    Args:
        sequences: number of sequences M.

    The other arguments are those of :class:`~medgmae.models.mae.ViTDecoder`; ``out_dim`` is of a patch of one sequence.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: Shape,
        sequences: int,
        embed_dim: int = 384,
        depth: int = 3,
        num_heads: int = 12,
        *,
        mlp_ratio: float = 4.0,
        prefix_tokens: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        built = given(locals())
        sizes = {"mlp_ratio": mlp_ratio, "prefix_tokens": prefix_tokens, "norm_eps": norm_eps}
        super().__init__(in_dim, out_dim, grid_size, embed_dim, depth, num_heads, **sizes)  # type: ignore[arg-type]
        self._built = built
        self.sequence_embed = nn.Parameter(torch.empty(1, sequences, embed_dim))
        nn.init.normal_(self.sequence_embed, std=0.02)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they have nothing per sequence."""
        if "sequence_embed" not in state:
            return None
        return ViTDecoder.read_sizes({name: value for name, value in state.items() if name != "sequence_embed"})

    def settings(self) -> dict[str, Setting]:
        """Heads and epsilon."""
        return {name: setting for name, setting in super().settings().items() if name != "sigmoid"}

    def reset_parameters(self) -> None:
        """Initialise tokens and tables."""
        super().reset_parameters()
        if hasattr(self, "sequence_embed"):
            nn.init.normal_(self.sequence_embed, std=0.02)

    def _places(self, grid: Shape) -> Tensor:
        places = super()._places(grid)
        assert places is not None  # every decoder of sequences has a table
        return (places.unsqueeze(1) + self.sequence_embed.unsqueeze(2)).flatten(1, 2)


@register_class
class SequenceAutoencoder(Autoencoder):
    """The patches of all sequences masked together, encoded together, and predicted sequence by sequence.

    Args:
        encoder: with a stem per sequence.
        decoder: takes its tokens.
        mask_ratio: share of hidden patches when ``forward`` is given neither a masking nor a ratio.
    """

    encoder: SequenceViT

    def __init__(self, encoder: SequenceViT, decoder: SequenceDecoder, mask_ratio: float = 0.75) -> None:
        built = given(locals())
        super().__init__(encoder, decoder, mask_ratio)
        self._built = built

    __call__: Callable[..., MAEOutput]

    def settings(self) -> dict[str, Setting]:
        """The settings of both parts."""
        return self._part_settings()

    def forward(self, x: Tensor, masking: Masking | None = None, mask_ratio: float | None = None) -> MAEOutput:
        """Mask, encode, decode and compare; the loss is the sum over the sequences of their masked patches' mean.

        Args:
            x: (B, M, D, H, W), all sequences of the model. One that is not at hand can be predicted from the others:
                put anything in its place and hide all of its patches.
            masking: of the M N patches, those of the first sequence first, or of N patches that are then hidden in
                every sequence; None: :func:`~medgmae.layers.masking.sequence_masking`.
            mask_ratio: share of hidden patches of a random masking; the model's own when None.

        Raises:
            ValueError: an input that does not fit the encoder, a masking for another input, or both of the last two.
        """
        output: MAEOutput = self.forward_with_tokens(x, self._masking(x, masking, mask_ratio)).output
        return output

    def forward_with_tokens(self, x: Tensor, masking: Masking, step: int | Tensor = 0) -> Seen:
        """See :class:`Autoencoder`; the loss is the same at every step."""
        whole = self._whole(masking, x)
        tokens = self.encoder.sequence_tokens(x, whole.keep)
        pred = self.decoder(tokens, whole.restore, self._grid(x))  # (B, M N, L)
        target = torch.cat([patchify(x[:, i : i + 1], self.patch_size) for i in range(self.in_chans)], dim=1)
        shape = (x.shape[0], self.in_chans, -1)
        error = (pred - target).square().mean(2).reshape(shape)
        mask = whole.mask.to(error.dtype).reshape(shape)
        loss = ((error * mask).sum((0, 2)) / mask.sum((0, 2)).clamp_min(1)).sum()
        return Seen(tokens, MAEOutput(loss, self._channels_last(pred), masking.mask))

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        masking: Masking | None = None,
        paste_visible: bool = True,
        *,
        mask_ratio: float | None = None,
    ) -> Tensor:
        """The sequences as the decoder sees them, (B, M, D, H, W) in the units of ``x``; see :meth:`forward`."""
        masking = self._masking(x, masking, mask_ratio)
        pred = unpatchify(self.forward(x, masking).pred, self.patch_size, self._grid(x), self.in_chans).to(x.dtype)
        if not paste_visible:
            return pred
        hidden = self._whole(masking, x).mask.unsqueeze(2).expand(-1, -1, math.prod(self.patch_size))
        hidden = unpatchify(self._channels_last(hidden), self.patch_size, self._grid(x), self.in_chans)
        return torch.where(hidden > 0, pred, x)

    def _channels_last(self, patches: Tensor) -> Tensor:
        """(B, M N, L), sequence by sequence, as (B, N, L M), the sequence fastest."""
        by_sequence = patches.reshape(patches.shape[0], self.in_chans, -1, patches.shape[2])
        return by_sequence.permute(0, 2, 3, 1).flatten(2)

    def _masking(self, x: Tensor, masking: Masking | None, mask_ratio: float | None) -> Masking:
        tokens = math.prod(input_grid(x, self.in_chans, self.patch_size))
        if masking is None:
            ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            return sequence_masking(x.shape[0], self.in_chans, tokens, ratio, device=x.device)
        whole = (x.shape[0], tokens * self.in_chans)
        if mask_ratio is None and hasattr(masking, "mask") and tuple(masking.mask.shape) == whole:
            return masking
        return super()._masking(x, masking, mask_ratio)

    def _whole(self, masking: Masking, x: Tensor) -> Masking:
        """A masking of the patches of all sequences."""
        tokens = math.prod(self._grid(x))
        if masking.mask.shape[1] == tokens * self.in_chans:
            return masking
        keep, hidden = (of_every_sequence(part, tokens, self.in_chans) for part in (masking.keep, masking.hidden))
        return Masking(keep, torch.cat([keep, hidden], dim=1).argsort(dim=1), masking.mask.repeat(1, self.in_chans))


def sequence_mae(
    img_size: Size = 128,
    patch_size: Size = 16,
    sequences: Sequence[str] = SEQUENCES,
    *,
    decoder_embed_dim: int = 384,
    decoder_depth: int = 3,
    decoder_num_heads: int = 12,
    mask_ratio: float = 0.75,
    norm_eps: float = 1e-5,
    **encoder_options: Any,
) -> SequenceAutoencoder:
    """A masked autoencoder of several sequences.

    Args:
        decoder_embed_dim: width of the decoder; likewise ``decoder_depth`` and ``decoder_num_heads``.
        mask_ratio: see :class:`SequenceAutoencoder`.
        **encoder_options: everything else that :class:`SequenceViT` takes.
    """
    encoder = SequenceViT(img_size, patch_size, sequences, norm_eps=norm_eps, **encoder_options)
    decoder = SequenceDecoder(
        encoder.embed_dim,
        math.prod(encoder.patch_size),
        encoder.grid_size,
        len(encoder.sequences),
        decoder_embed_dim,
        decoder_depth,
        decoder_num_heads,
        prefix_tokens=encoder.num_prefix_tokens,
        norm_eps=norm_eps,
    )
    return SequenceAutoencoder(encoder, decoder, mask_ratio)


@register_model
def mae_seqvit_base_patch16_128(**overrides: Any) -> SequenceAutoencoder:
    """MAE with a stem for each of four MR sequences, 128³, decoder 384 wide: BM-MAE."""
    return build(sequence_mae, dict(BASE), no_channels(overrides))  # type: ignore[no-any-return]
