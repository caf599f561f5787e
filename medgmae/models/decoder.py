"""What the decoders of masked autoencoders of voxels share: from visible tokens to a vector for every patch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medgmae.layers.patches import Shape, take_tokens
from medgmae.layers.positions import PosEmbed, PositionCache, make_table, reset_table
from medgmae.models.parts import Part, Readable


class MaskDecoder(Part, Readable):
    """Mask tokens in the places of hidden patches, positions, blocks, and a layer from tokens to patch vectors.

    Args:
        embed: from the encoder's tokens to those of the decoder.
        grid_size: patch grid (d, h, w) of the table of positions.
        embed_dim: own width.
        num_prefix_tokens: tokens in front of the patches that the encoder hands over.
        pos_embed: "sincos", a fixed table, "learned" or "none".

    A family builds ``blocks``, ``norm`` and ``head`` after the constructor of this class, and says in :meth:`_mix` how
    the sequence goes through the blocks.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    pos_embed: nn.Parameter | None
    taps: Sequence[int] = ()
    """Blocks of the encoder, 0-based, whose tokens the decoder reads beside the last ones."""

    def __init__(
        self,
        embed: nn.Module,
        grid_size: Shape,
        embed_dim: int,
        num_prefix_tokens: int,
        pos_embed: PosEmbed = "sincos",
    ) -> None:
        super().__init__()
        self.grid_size, self.num_prefix_tokens = tuple(grid_size), num_prefix_tokens
        self.grad_checkpointing = False
        self.embed = embed
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_parameter("pos_embed", make_table(pos_embed, grid_size, embed_dim))
        # Position of the prefix tokens: zero in every published recipe, but GL-MAE's files can hold another value.
        self.prefix_pos_embed = nn.Parameter(torch.empty(1, num_prefix_tokens, embed_dim), requires_grad=False)
        self._positions = PositionCache()

    def reset_parameters(self) -> None:
        """Initialise the mask token and the tables of positions."""
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.prefix_pos_embed)
        reset_table(self.pos_embed, self.grid_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward(
        self,
        tokens: Tensor,
        restore: Tensor | None = None,
        grid_size: Shape | None = None,
        levels: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predict every patch.

        Args:
            tokens: (B, P + n, in_dim), prefix tokens, then visible patches in the order of ``Masking.keep``.
            restore: (B, N) long from :class:`~medgmae.Masking`; None for all patches in raster order.
            grid_size: patch grid of the input; None for the grid of the table.
            levels: what the encoder's blocks ``taps`` gave, each as ``tokens``.

        Returns:
            (B, N, out_dim) in raster order.
        """
        return self.predict(self.decode(tokens, restore, grid_size, levels))

    def predict(self, decoded: Tensor) -> Tensor:
        """The vectors (B, N, out_dim) of patches whose tokens :meth:`decode` gives."""
        return self._activate(self.head(decoded))

    def decode(
        self,
        tokens: Tensor,
        restore: Tensor | None = None,
        grid_size: Shape | None = None,
        levels: Sequence[Tensor] = (),
    ) -> Tensor:
        """The tokens of all patches after the last norm, (B, N, E) in raster order; arguments as of :meth:`forward`."""
        grid = grid_size or self.grid_size
        tokens = self.embed(tokens)
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        places = self._places(grid)
        hidden = (math.prod(grid) if places is None else places.shape[1]) - patches.shape[1]
        if hidden:
            masks = self.mask_token.to(patches.dtype).expand(patches.shape[0], hidden, -1)
            patches = torch.cat([patches, masks], dim=1)
        if restore is not None:
            patches = take_tokens(patches, restore)
        if places is not None:
            patches = patches + places
        x = torch.cat([prefix + self.prefix_pos_embed, patches], dim=1) if self.num_prefix_tokens else patches
        x = self._mix(x, grid, levels)
        decoded: Tensor = self.norm(x[:, self.num_prefix_tokens :])
        return decoded

    def set_grid_size(self, grid_size: Shape) -> None:
        """Make the table of positions for another patch grid, resampled from the present one."""
        self.pos_embed = self._positions.resized(self.pos_embed, self.grid_size, grid_size)
        self.grid_size = grid_size

    def _places(self, grid: Shape) -> Tensor | None:
        """What is added to the patch tokens, (1, N, E), if anything."""
        return None if self.pos_embed is None else self._positions(self.pos_embed, self.grid_size, grid)

    @abstractmethod
    def _mix(self, x: Tensor, grid: Shape, levels: Sequence[Tensor]) -> Tensor:
        """The sequence (B, P + N, E) through the blocks; ``levels`` as in :meth:`forward`."""

    @abstractmethod
    def _activate(self, pred: Tensor) -> Tensor:
        """What is done to the output (B, N, out_dim) of the last layer."""
