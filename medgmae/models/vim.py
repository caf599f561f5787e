"""Vision Mamba for volumes: the encoder of 3D Mamba MAE (Hu et al. 2024, https://arxiv.org/abs/2409.07746)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize, make_head
from medgmae.layers.mamba import MambaBlock, RMSNorm, advance, undecayed
from medgmae.layers.patches import (
    PatchEmbed,
    Shape,
    Size,
    check_multiple,
    input_grid,
    take_tokens,
    tap_indices,
    to_tuple,
)
from medgmae.layers.positions import PositionCache, sincos_pos_embed
from medgmae.layers.rope import Rope, Rotary
from medgmae.models.registry import build, register_model

ClassToken = Literal["front", "middle", "double"]
Pool = Literal["avg", "cls", "last", "max", "all"]
ScanOrder = Literal["raster", "given"]


class Vim(nn.Module):
    """A stack of bidirectional Mamba blocks over the patches of a volume: cost and memory linear in their number.

    Any input whose axes are multiples of the patch is accepted; the table of positions is resampled for its grid.

    Visible patches are scanned in raster order, though an autoencoder draws them in a random one. A state space reads
    a sequence, so the order is part of what it learns: in raster order neighbours in the scan are neighbours in space,
    and pre-training and fine-tuning see the same order. The published weights were pre-trained on the order drawn
    (``scan_order="given"``).

    Args:
        img_size: voxels per axis (d, h, w) that the table of positions is made for; an int for a cube.
        patch_size: voxels per axis of a patch.
        in_chans: input channels.
        embed_dim: token width E.
        depth: number of blocks.
        d_state: states per channel of a scan.
        expand: inner width of a block over E.
        class_token: None; "front" or "middle", where it stands in the scan; or "double", one at either end. Without
            one the patch embedding is followed by a layer norm.
        pool: pooled output: "avg" the mean of the patch tokens, "cls" the class token (the mean of two), "last" the
            last patch token, "max" the largest logit of all patches, "all" every patch, (B, N, ...).
        num_classes: width of the head; 0 for none.
        drop_path: rate of the last block; grows linearly from 0.
        pos_embed: "sincos", a fixed table, or "learned".
        rope: rotary positions of the tokens themselves, before every block. "axial": of all three axes, see
            :func:`medgmae.layers.rope.axial_angles`; "sequence" and "axial_published": what 3D Mamba MAE pre-trains and
            fine-tunes with, the place in the scan, and two of the axes; None.
        rope_residual: turn the residual stream too before every block, as the published models do.
        divide_output: a block takes the mean of its two directions instead of their sum.
        scan_order: "raster" or "given", the order of ``keep``; see above.
        norm_eps: epsilon of every norm.

    Raises:
        ValueError: sizes or options that do not fit each other; the message says which.
    """

    map_reduction: Literal["max"] = "max"
    """How a latent map of a fine-tuned model makes one number of a token."""

    def __init__(
        self,
        img_size: Size = 160,
        patch_size: Size = 16,
        in_chans: int = 1,
        embed_dim: int = 384,
        depth: int = 12,
        *,
        d_state: int = 16,
        expand: int = 2,
        class_token: ClassToken | None = None,
        pool: Pool = "avg",
        num_classes: int = 0,
        drop_path: float = 0.0,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        rope: Rope | None = "axial",
        rope_residual: bool = True,
        divide_output: bool = True,
        scan_order: ScanOrder = "raster",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_choice("pos_embed", pos_embed, ("sincos", "learned"))
        _check_choice("class_token", class_token, (None, "front", "middle", "double"))
        _check_choice("pool", pool, ("avg", "cls", "last", "max", "all"))
        _check_choice("scan_order", scan_order, ("raster", "given"))
        if pool == "cls" and class_token is None:
            raise ValueError("pool='cls' needs a class token; give class_token='front', or use pool='avg'")
        self.img_size, self.patch_size = to_tuple(img_size, 3, "img_size"), to_tuple(patch_size, 3, "patch_size")
        check_multiple(self.img_size, self.patch_size)
        self.grid: Shape = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.in_chans, self.embed_dim, self.num_features = in_chans, embed_dim, embed_dim
        self.class_token, self.pool, self.scan_order = class_token, pool, scan_order
        self.num_prefix_tokens = {None: 0, "double": 2}.get(class_token, 1)
        self.rope, self.rope_residual = rope, rope_residual
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size, None if class_token else norm_eps)
        self.cls_token = (
            nn.Parameter(torch.empty(1, self.num_prefix_tokens, embed_dim)) if self.num_prefix_tokens else None
        )
        learned = pos_embed == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim), requires_grad=learned)
        self.blocks = nn.ModuleList(
            MambaBlock(
                embed_dim,
                d_state,
                expand=expand,
                divide_output=divide_output,
                out_scale=depth**-0.5,
                norm_eps=norm_eps,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.num_classes = num_classes
        self.head = make_head(embed_dim, num_classes)
        self._positions = PositionCache()
        self._rotary = None if rope is None else Rotary(rope, embed_dim)
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the class tokens and the table of positions."""
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_pos_embed(self.embed_dim, self.grid))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, D, H, W). Logits (B, num_classes), or the pooled vector (B, E) without a head."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, (B, P + N, E): the P class tokens, then the patches in raster order.

        Args:
            x: (B, C, D, H, W), every axis a multiple of the patch.
            keep: (B, n) long, the patches to encode; they come back in this order, whatever order they are scanned in.

        Raises:
            ValueError: an input of another rank, channel count or of a size that is no multiple of the patch.
        """
        back = None
        if keep is not None and self.scan_order == "raster":
            keep, order = keep.sort(dim=1)
            back = order.argsort(dim=1)
        hidden, residual = self._scan(x, keep)
        tokens = self._taken_apart(self.norm(hidden if residual is None else hidden + residual))
        if back is None:
            return tokens
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        return torch.cat([prefix, take_tokens(patches, back)], dim=1)

    def forward_last_block(self, x: Tensor) -> Tensor:
        """What the last block's mixer returns, not yet added to the stream: (B, P + N, E), class tokens first.

        Maps of a fine-tuned model read it, see :func:`medgmae.latent_to_spatial`. x: (B, C, D, H, W).
        """
        return self._taken_apart(self._scan(x, None)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """The tokens of :meth:`forward_features` and the feature maps after chosen blocks.

        A map is the stream with the block's output added to it.

        Args:
            x: (B, C, D, H, W).
            indices: blocks to tap, 0-based, negative from the end; an int for the last that many; None for all.
            norm: apply the last norm to the maps.
            return_prefix_tokens: give pairs (map, class tokens (B, P, E)) instead of maps.

        Returns:
            tokens (B, P + N, E) and a list of maps (B, E, d, h, w) on the patch grid.

        Raises:
            ValueError: a block that does not exist.
        """
        taps = tap_indices(indices, len(self.blocks))
        grid = input_grid(x, self.in_chans, self.patch_size)
        hidden, table = self._embed(x, None)
        residual = None
        found: dict[int, Any] = {}
        for i, block in enumerate(self.blocks):
            hidden, residual = self._advance(block, hidden, residual, table)
            if i in taps:
                stream = hidden + residual
                tokens: Any = self._taken_apart(self.norm(stream) if norm else stream)
                prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                image = patches.transpose(1, 2).unflatten(2, grid)
                found[i] = (image, prefix) if return_prefix_tokens else image
        tokens = self._taken_apart(self.norm(hidden if residual is None else hidden + residual))
        return tokens, [found[i] for i in taps]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, P + N, E) and classify them; ``pre_logits`` leaves out the classifier."""
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        head = nn.Identity() if pre_logits else self.head
        if self.pool == "max":
            return head(patches).amax(1)  # type: ignore[no-any-return]
        if self.pool == "all":
            return head(patches)  # type: ignore[no-any-return]
        pooled = {"avg": patches, "cls": prefix, "last": patches[:, -1:]}[self.pool].mean(1)
        return head(pooled)  # type: ignore[no-any-return]

    def _scan(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last mixer's output and the stream that it is to be added to, (B, P + n, E) each, as they are scanned."""
        hidden, table = self._embed(x, keep)
        residual = None
        for block in self.blocks:
            hidden, residual = self._advance(block, hidden, residual, table)
        return hidden, residual

    def _embed(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sequence as it is scanned, (B, P + n, E), and its table of rotations."""
        grid = input_grid(x, self.in_chans, self.patch_size)
        positions = self._positions(self.pos_embed, self.grid, grid)  # (1, N, E)
        tokens = self.patch_embed(x, keep)  # (B, n, E)
        if keep is not None:
            if keep.shape[0] != x.shape[0]:
                raise ValueError(f"keep is for a batch of {keep.shape[0]}, the input is a batch of {x.shape[0]}")
            positions = take_tokens(positions.expand(keep.shape[0], -1, -1), keep)
        tokens = tokens + positions
        if self.cls_token is not None:
            tokens = self._put_together(self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens)
        return tokens, self._table(grid, keep, tokens)

    def _table(self, grid: Shape, keep: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Rotations of the sequence ``tokens``: (P + n, E / 2, 2), or (B, P + n, E / 2, 2) for chosen patches."""
        if self._rotary is None:
            return None
        table = self._rotary.table(grid, tokens.shape[1], tokens)
        if self.rope == "sequence":
            return table
        count = math.prod(grid)
        if keep is None and not self.num_prefix_tokens:
            return table[:count]
        places = torch.arange(count, device=table.device).unsqueeze(0) if keep is None else keep  # (1 or B, n)
        nowhere = places.new_full((places.shape[0], self.num_prefix_tokens), count)
        return table[self._put_together(nowhere, places)]

    def _put_together(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Class tokens (B, P, ...) at their places among the patches (B, n, ...)."""
        cut = self._cut(patches.shape[1])
        return torch.cat([patches[:, :cut], prefix[:, :1], patches[:, cut:], prefix[:, 1:]], dim=1)

    def _taken_apart(self, sequence: Tensor) -> Tensor:
        """The scanned sequence (B, P + n, E) with the class tokens in front."""
        if self.cls_token is None:
            return sequence
        count = sequence.shape[1] - self.num_prefix_tokens
        cut = self._cut(count)
        sizes = [cut, 1, count - cut, self.num_prefix_tokens - 1]
        before, first, behind, last = torch.split(sequence, sizes, dim=1)
        return torch.cat([first, last, before, behind], dim=1)

    def _cut(self, count: int) -> int:
        """How many of the patches stand before the (first) class token."""
        return count // 2 if self.class_token == "middle" else 0

    def _advance(
        self, block: nn.Module, hidden: Tensor, residual: Tensor | None, table: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return advance(block, hidden, residual, table, self.rope_residual, self.grad_checkpointing)

    def get_classifier(self) -> nn.Module:
        """The head; an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with a random start; what comes before it stays."""
        self.num_classes = num_classes
        head = make_head(self.embed_dim, num_classes).apply(initialize)
        self.head = head.to(self.pos_embed).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave undecayed."""
        return {"pos_embed", "cls_token"} | undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, in the form that ``timm.optim`` reads."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)",  # what matches nothing, the last norm and the head, is the last layer
        }


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, got {value!r}")


LARGE = {"embed_dim": 1024, "depth": 24}
BASE = {"embed_dim": 768, "depth": 12}
SMALL = {"embed_dim": 384, "depth": 12}
TINY = {"embed_dim": 192, "depth": 12}
NANO = {"embed_dim": 48, "depth": 2}


def _vim(overrides: dict[str, Any], img_size: Size, patch_size: int, size: dict[str, int], in_chans: int) -> Vim:
    defaults = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, **size}
    return build(Vim, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def vim_small_patch4_160(**overrides: Any) -> Vim:
    """Vim-S/4 on 160³ of four MR contrasts, 64,000 tokens: 3D Mamba MAE's classifier with the finest grid."""
    return _vim(overrides, 160, 4, SMALL, 4)


@register_model
def vim_small_patch8_160(**overrides: Any) -> Vim:
    """Vim-S/8 on 160³ of four MR contrasts."""
    return _vim(overrides, 160, 8, SMALL, 4)


@register_model
def vim_small_patch16_160(**overrides: Any) -> Vim:
    """Vim-S/16 on 160³ of four MR contrasts: 3D Mamba MAE's classifier."""
    return _vim(overrides, 160, 16, SMALL, 4)


@register_model
def vim_small_patch32_160(**overrides: Any) -> Vim:
    """Vim-S/32 on 160³ of four MR contrasts: 3D Mamba MAE's classifier with the coarsest grid."""
    return _vim(overrides, 160, 32, SMALL, 4)


@register_model
def vim_tiny_patch16_160(**overrides: Any) -> Vim:
    """Vim-Ti/16 on 160³ of four MR contrasts."""
    return _vim(overrides, 160, 16, TINY, 4)


@register_model
def vim_base_patch16_160(**overrides: Any) -> Vim:
    """Vim-B/16 on 160³ of four MR contrasts."""
    return _vim(overrides, 160, 16, BASE, 4)


@register_model
def vim_large_patch16_160(**overrides: Any) -> Vim:
    """Vim-L/16 on 160³ of four MR contrasts, 24 blocks."""
    return _vim(overrides, 160, 16, LARGE, 4)


@register_model
def vim_tiny_patch8_64(**overrides: Any) -> Vim:
    """Vim-Ti/8 on 64³ crops: small enough for a laptop."""
    return _vim(overrides, 64, 8, TINY, 1)


@register_model
def vim_nano_patch8_32(**overrides: Any) -> Vim:
    """Two narrow blocks on 32³: for tests."""
    return _vim(overrides, 32, 8, NANO, 1)
