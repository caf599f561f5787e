"""Vision transformers for volumes and images: the encoder of every ViT-based system in this library."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import Block, initialize, make_head, run_block
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
from medgmae.models.registry import build, register_model

Pool = Literal["cls", "avg", "cat"]


class ViT(nn.Module):
    """A vision transformer over the patches of a volume (or, with ``dims=2``, of an image).

    Any input whose axes are multiples of the patch is accepted; the table of positions is resampled for its grid.

    Args:
        img_size: voxels per axis (d, h, w) that the table of positions is made for; an int for a cube.
        patch_size: voxels per axis of a patch.
        in_chans: input channels.
        embed_dim: token width E.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's MLP over E.
        class_token: put a learned token in front of the patches.
        pool: pooled output: "cls" the class token, "avg" the mean of the patch tokens, "cat" both, 2 E wide.
        fc_norm: normalise the pooled vector instead of the tokens. None: as in timm, for "avg" and "cat".
        num_classes: width of the head; 0 for none.
        head_hidden: widths of hidden layers in the head.
        drop_path: rate of the last block; grows linearly from 0.
        pos_embed: "sincos", a fixed table, or "learned".
        norm_eps: epsilon of every layer norm.
        pre_norm: a layer norm before the first block, as CLIP's encoders have it.
        dims: 3 for volumes, 2 for images.

    Raises:
        ValueError: sizes that do not fit each other; the message says which.
    """

    map_reduction: Literal["pca"] = "pca"
    """How a latent map of a fine-tuned model makes one number of a token: one feature is often the largest of all."""

    def __init__(
        self,
        img_size: Size = 96,
        patch_size: Size = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        pool: Pool = "cls",
        fc_norm: bool | None = None,
        num_classes: int = 0,
        head_hidden: tuple[int, ...] = (),
        drop_path: float = 0.0,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        dims: int = 3,
    ) -> None:
        super().__init__()
        if pos_embed not in ("sincos", "learned"):
            raise ValueError(f"pos_embed must be 'sincos' or 'learned', got {pos_embed!r}")
        if pool not in ("cls", "avg", "cat"):
            raise ValueError(f"pool must be 'cls', 'avg' or 'cat', got {pool!r}")
        if pool != "avg" and not class_token:
            raise ValueError(f"pool={pool!r} needs a class token; use pool='avg' with class_token=False")
        self.img_size = to_tuple(img_size, dims, "img_size")
        self.patch_size = to_tuple(patch_size, dims, "patch_size")
        check_multiple(self.img_size, self.patch_size)
        self.grid: Shape = tuple(s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_prefix_tokens, self.pool = int(class_token), pool
        self.num_features = embed_dim * (2 if pool == "cat" else 1)
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        learned = pos_embed == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim), requires_grad=learned)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, norm_eps) for rate in rates)
        if fc_norm is None:
            fc_norm = pool != "cls"
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(self.num_features, eps=norm_eps) if fc_norm else nn.Identity()
        self.num_classes, self.head_hidden = num_classes, tuple(head_hidden)
        self.head = make_head(self.num_features, num_classes, self.head_hidden)
        self._positions = PositionCache()
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the class token and the table of positions."""
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_pos_embed(self.embed_dim, self.grid))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, D, H, W). Logits (B, num_classes), or the pooled vector (B, num_features) without a head."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, (B, P + N, E): P prefix tokens, then the patches in raster order.

        Args:
            x: (B, C, D, H, W), every axis a multiple of the patch.
            keep: (B, n) long, the patches to encode; the sequence then holds these, in this order.

        Raises:
            ValueError: an input of another rank, channel count or of a size that is no multiple of the patch.
        """
        x = self._embed(x, keep)
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        return_prefix_tokens: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """The tokens of :meth:`forward_features` and the feature maps after chosen blocks.

        Args:
            x: (B, C, D, H, W).
            indices: blocks to tap, 0-based, negative from the end; an int for the last that many; None for all.
            norm: apply the last norm to the maps.
            return_prefix_tokens: give pairs (map, prefix tokens (B, P, E)) instead of maps.

        Returns:
            tokens (B, P + N, E) and a list of maps (B, E, d, h, w) on the patch grid.

        Raises:
            ValueError: a block that does not exist.
        """
        taps = tap_indices(indices, len(self.blocks))
        grid = input_grid(x, self.in_chans, self.patch_size)
        x = self._embed(x, None)
        found: dict[int, Any] = {}
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, self.grad_checkpointing)
            if i in taps:
                tokens = self.norm(x) if norm else x
                prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                image = patches.transpose(1, 2).unflatten(2, grid)
                found[i] = (image, prefix) if return_prefix_tokens else image
        return self.norm(x), [found[i] for i in taps]

    def forward_last_block(self, x: Tensor) -> Tensor:
        """What the last block returns, before the last norm: (B, P + N, E). x: (B, C, D, H, W)."""
        x = self._embed(x, None)
        for block in self.blocks:
            x = run_block(block, x, self.grad_checkpointing)
        return x

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, P + N, E) and classify them; ``pre_logits`` leaves out the classifier."""
        patches = tokens[:, self.num_prefix_tokens :]
        if self.pool == "cls":
            pooled = tokens[:, 0]
        elif self.pool == "avg":
            pooled = patches.mean(1)
        else:
            pooled = torch.cat([tokens[:, 0], patches.mean(1)], dim=1)
        pooled = self.fc_norm(pooled)
        return pooled if pre_logits else self.head(pooled)  # type: ignore[no-any-return]

    def _embed(self, x: Tensor, keep: Tensor | None) -> Tensor:
        grid = input_grid(x, self.in_chans, self.patch_size)
        positions = self._positions(self.pos_embed, self.grid, grid)  # (1, N, E)
        tokens = self.patch_embed(x, keep)  # (B, n, E)
        if keep is not None:
            if keep.shape[0] != x.shape[0]:
                raise ValueError(f"keep is for a batch of {keep.shape[0]}, the input is a batch of {x.shape[0]}")
            positions = take_tokens(positions.expand(keep.shape[0], -1, -1), keep)
        tokens = tokens + positions
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.norm_pre(tokens)  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        """The head; an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with a random start; what comes before it stays."""
        self.num_classes = num_classes
        head = make_head(self.num_features, num_classes, self.head_hidden).apply(initialize)
        self.head = head.to(self.pos_embed).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave undecayed."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, in the form that ``timm.optim`` reads."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": r"^blocks\.(\d+)",  # what matches nothing, the norms and the head, is the last layer
        }


BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
WIDE = {"embed_dim": 1536, "depth": 12, "num_heads": 16}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
NANO = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def _vit(overrides: dict[str, Any], img_size: Size, patch_size: int, size: dict[str, int], **more: Any) -> ViT:
    defaults = {"img_size": img_size, "patch_size": patch_size, **size, **more}
    return build(ViT, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def vit_base_patch16_96(**overrides: Any) -> ViT:
    """ViT-B/16 on 96³ crops: the encoder of GL-MAE, of SelfMedMAE (BTCV) and of MedGMAE base."""
    return _vit(overrides, 96, 16, BASE)


@register_model
def vit_base_patch8_96(**overrides: Any) -> ViT:
    """ViT-B/8 on 96³ crops: MedGMAE's encoder with the finest grid."""
    return _vit(overrides, 96, 8, BASE)


@register_model
def vit_large_patch16_96(**overrides: Any) -> ViT:
    """ViT-L/16 on 96³ crops: GL-MAE's large encoder."""
    return _vit(overrides, 96, 16, LARGE)


@register_model
def vit_huge_patch16_96(**overrides: Any) -> ViT:
    """ViT-H/16 on 96³ crops: GL-MAE's huge encoder."""
    return _vit(overrides, 96, 16, HUGE)


@register_model
def vit_wide_patch16_96(**overrides: Any) -> ViT:
    """MedGMAE's "large": 1536 wide, 12 blocks, patch 16, 96³ crops."""
    return _vit(overrides, 96, 16, WIDE)


@register_model
def vit_wide_patch12_96(**overrides: Any) -> ViT:
    """MedGMAE's "large" with patch 12: 1536 wide, 12 blocks, 96³ crops."""
    return _vit(overrides, 96, 12, WIDE)


@register_model
def vit_base_patch16_128(**overrides: Any) -> ViT:
    """ViT-B/16 on 128³ crops of four MR contrasts: SelfMedMAE (BraTS)."""
    return _vit(overrides, 128, 16, BASE, in_chans=4)


@register_model
def vit_base_patch16_96x96x16(**overrides: Any) -> ViT:
    """ViT-B/16 on 96x96x16 slabs: the UVA adaptation of SelfMedMAE."""
    return _vit(overrides, (96, 96, 16), 16, BASE)


@register_model
def vit_base_patch16_256(**overrides: Any) -> ViT:
    """ViT-B/16 on whole scans of 256³: TANGERINE's base encoder."""
    return _vit(overrides, 256, 16, BASE)


@register_model
def vit_large_patch16_256(**overrides: Any) -> ViT:
    """ViT-L/16 on whole scans of 256³: TANGERINE."""
    return _vit(overrides, 256, 16, LARGE)


@register_model
def vit_huge_patch14_252(**overrides: Any) -> ViT:
    """ViT-H/14 on 252³, 18³ patches: TANGERINE's huge encoder (its 256³ leaves a rim of 4 voxels unread)."""
    return _vit(overrides, 252, 14, HUGE)


@register_model
def vit_tiny_patch8_64(**overrides: Any) -> ViT:
    """ViT-Ti/8 on 64³ crops: small enough for a laptop; the demonstration weights are of this architecture."""
    return _vit(overrides, 64, 8, TINY)


@register_model
def vit_nano_patch8_32(**overrides: Any) -> ViT:
    """Two narrow blocks on 32³: for tests."""
    return _vit(overrides, 32, 8, NANO)


@register_model
def vit2d_base_patch16_224(**overrides: Any) -> ViT:
    """ViT-B/16 on 224² images with learned positions: SelfMedMAE's chest X-ray classifier."""
    return _vit(overrides, 224, 16, BASE, in_chans=3, pos_embed="learned", dims=2)
