"""Vision transformers for volumes and images: the encoder of every ViT-based system in this library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import MlpKind, run_block, vit_block
from medgmae.layers.patches import Size, input_grid
from medgmae.layers.pooling import GlobalPool
from medgmae.layers.positions import PosEmbed, PositionCache
from medgmae.layers.projection import PrototypeHeads
from medgmae.layers.rope import Coordinates, HeadRope, Rotary
from medgmae.models.encoder import Encoder
from medgmae.models.parts import Setting, check_choice, count_blocks, drop_path_rates, given
from medgmae.models.registry import build, register_class, register_model


@register_class
class ViT(Encoder):
    """A vision transformer over the patches of a volume (or, with ``dims=2``, of an image).

    Args:
        img_size: voxels per axis (d, h, w) that the table of positions is made for; an int for a cube.
        patch_size: voxels per axis of a patch.
        in_chans: input channels.
        embed_dim: token width E.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's MLP over E.
        mlp: "gelu", or gated by a SiLU: "swiglu" (DINOv2), "swiglu_norm" with a norm inside (EVA-02).
        class_token: put a learned token in front of the patches.
        registers: further learned tokens behind it, which no pooling reads (Darcet et al. 2024).
        global_pool: from tokens to one vector, see :mod:`medgmae.layers.pooling`.
        fc_norm: normalise the pooled vector instead of the tokens. None: as in timm, for "avg", "max", "token_avg".
        num_classes: width of the head; 0 for none.
        head_hidden: widths of hidden layers in the head.
        drop_path_rate: of the last block; grows linearly from 0.
        pos_embed: "sincos", a fixed table, "learned" or "none".
        norm_eps: epsilon of every layer norm.
        pre_norm: a layer norm before the first block, as CLIP's encoders have it.
        interpolate_offset: of the table of positions on other grids, see :func:`medgmae.resample_pos_embed`: 0.1 in
            DINOv2's code and in 3DINO's.
        rope: rotary positions of queries and keys, by their coordinates, see :class:`~medgmae.layers.rope.HeadRope`:
            "unit" (DINOv3, VoxelFM), "scaled" (EVA-02) or "integer"; None for none.
        rope_base: of the rotary positions' bands.
        lifted_axis: of a model of images that reads volumes, the axis that images do not have. Rotary positions do not
            turn along it, and attention counts class tokens once for every patch along it: a volume that is constant
            along this axis has the features of its slice.
        prototypes: the heads of DINOv2's pre-training for ``extract_features(..., head="projected")``: widths of their
            layers between and of their bottleneck, and the number of prototypes, (2048, 256, 65536) in 3DINO's file;
            () for none. They read the class token: ``global_pool="token"``.
        dims: 3 for volumes, 2 for images.

    Raises:
        ValueError: sizes that do not fit each other; the message says which.
    """

    FIXED_SIZES: ClassVar[tuple[str, ...]] = ("embed_dim", "depth", "mlp_dim", "patch_size", "dims")

    # One feature is often the largest of every token.
    map_reduction: ClassVar[Literal["pca"]] = "pca"

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
        mlp: MlpKind = "gelu",
        class_token: bool = True,
        registers: int = 0,
        global_pool: GlobalPool = "token",
        fc_norm: bool | None = None,
        num_classes: int = 0,
        head_hidden: Sequence[int] = (),
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "sincos",
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        interpolate_offset: float = 0.0,
        rope: Coordinates | None = None,
        rope_base: float = 100.0,
        lifted_axis: int | None = None,
        prototypes: Sequence[int] = (),
        dims: int = 3,
    ) -> None:
        check_choice("mlp", mlp, get_args(MlpKind))
        check_choice("rope", rope, (None, *get_args(Coordinates)))
        if lifted_axis is not None and (dims != 3 or lifted_axis not in (0, 1, 2)):
            raise ValueError(f"lifted_axis must be 0, 1 or 2, of a model with dims=3, got {lifted_axis!r}, dims={dims}")
        if registers and not class_token:
            raise ValueError(f"registers={registers} stand behind a class token: they need class_token=True")
        prototypes = tuple(prototypes)
        if prototypes and (len(prototypes) != 3 or min(prototypes) < 1 or global_pool != "token"):
            raise ValueError(
                f"prototypes must be three widths of heads that read the class token, got {prototypes} with "
                f"global_pool={global_pool!r}"
            )
        if fc_norm is None:
            fc_norm = global_pool in ("avg", "max", "token_avg")
        built = given(locals())
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            dims=dims,
            class_tokens=int(class_token) + registers,
            global_pool=global_pool,
            pos_embed=pos_embed,
        )
        self._built, self._positions, self.lifted_axis = built, PositionCache(interpolate_offset), lifted_axis
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(vit_block(embed_dim, num_heads, mlp_ratio, rate, norm_eps, mlp) for rate in rates)
        turning = tuple(axis for axis in range(dims) if axis != lifted_axis)
        convention = HeadRope(rope, rope_base, axes=turning) if rope else None
        self._rotary = Rotary(convention, embed_dim // num_heads) if convention else None
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(self.num_features, eps=norm_eps) if fc_norm else nn.Identity()
        self._add_head(num_classes, head_hidden)
        self.projection = PrototypeHeads(embed_dim, *prototypes) if prototypes else None

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that an encoder's tensors show; None where they are no ViT's."""
        stem, gated = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1_g.weight")
        hidden = state.get("blocks.0.mlp.fc1.weight", gated)
        bias = state.get("patch_embed.proj.bias")
        by_sequence = bias is not None and bias.dim() != 1  # a stem per sequence: another class's
        fused = "blocks.0.attn.qkv.weight" in state
        if stem is None or hidden is None or stem.dim() not in (4, 5) or by_sequence or not fused:
            return None
        token, pooled = state.get("cls_token"), state.get("fc_norm.weight")
        class_token, registers = token is not None, 0 if token is None else token.shape[1] - 1
        normed = "blocks.0.mlp.norm.weight" in state
        pool = "token" if class_token else "avg"
        if pooled is not None:
            pool = "token_avg" if len(pooled) == 2 * len(stem) else "avg"
        return {
            "embed_dim": len(stem),
            "depth": count_blocks(state),
            "mlp_dim": len(hidden),
            "patch_size": tuple(stem.shape[2:]),
            "in_chans": stem.shape[1],
            "class_token": class_token,
            "global_pool": pool,
            "fc_norm": False if pool == "avg" and pooled is None else None,
            "pre_norm": "norm_pre.weight" in state,
            "dims": stem.dim() - 2,
            **({"registers": registers} if registers > 0 else {}),
            **({} if gated is None else {"mlp": "swiglu_norm" if normed else "swiglu"}),
            **({} if "pos_embed" in state else {"pos_embed": "none"}),
        }

    def settings(self) -> dict[str, Setting]:
        """Heads, epsilon, how the table is resampled, and what rotary positions are."""
        names = ("num_heads", "norm_eps", "interpolate_offset", "rope", "rope_base", "lifted_axis")
        return {name: Setting(self._built[name], name) for name in names}

    @property
    def num_class_tokens(self) -> int:
        """1, or 0 without a class token: registers are not read."""
        return min(self.num_prefix_tokens, 1)

    def forward_last_block(self, x: Tensor) -> Tensor:
        """The stream after the last block, before the last norm: (B, P + N, E). x: (B, C, D, H, W)."""
        return self._encode(x, None)[0]

    def _encode(
        self, x: Tensor, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        tokens = self._embed(x, keep)
        prefix = self._class_tokens(tokens)
        more = self._for_attention(x, keep, tokens)
        tokens = self.norm_pre(tokens if prefix is None else torch.cat([prefix, tokens], dim=1))
        tapped: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            if i == depth:
                break
            tokens = run_block(block, tokens, self.grad_checkpointing, *more)
            if i in taps:
                tapped[i] = tokens
        return tokens, tapped

    def _for_attention(self, x: Tensor, keep: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, ...]:
        """What attention takes beside the tokens: rotations, and what is added to the scores of every key.

        Among d copies of each patch of an image a class token counts as in the image if its score is higher by log d.
        """
        if self._rotary is None and self.lifted_axis is None:
            return ()
        grid = input_grid(x, self.in_chans, self.patch_size)
        prefix, axis = self.num_prefix_tokens, self.lifted_axis
        turns = None if self._rotary is None else self._rotary.turns(grid, prefix, keep, tokens)
        if axis is None or not prefix:
            return () if turns is None else (turns,)
        bias = tokens.new_zeros(prefix + tokens.shape[1])
        bias[:prefix] = math.log(grid[axis])
        return turns, bias


BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
WIDE = {"embed_dim": 1536, "depth": 12, "num_heads": 16}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
NANO = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def _vit(overrides: dict[str, Any], img_size: Size, patch_size: Size, size: dict[str, int], **more: Any) -> ViT:
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
def vit_base_patch14_112(**overrides: Any) -> ViT:
    """ViT-B/14, 864 wide, on 112³ of CT, rotary positions, four registers: VoxelFM."""
    more: dict[str, Any] = {"norm_eps": 1e-5, "registers": 4, "pos_embed": "none", "rope": "unit"}
    return _vit(overrides, 112, 14, {**BASE, "embed_dim": 864}, **more)


@register_model
def vit_large_patch16_112(**overrides: Any) -> ViT:
    """ViT-L/16 on 112³, learned positions: 3DINO."""
    return _vit(overrides, 112, 16, LARGE, pos_embed="learned", interpolate_offset=0.1)


@register_model
def vit_base_patch4x16x16_32x256x256(**overrides: Any) -> ViT:
    """ViT-B on 32x256x256 scans in patches of 4x16x16, learned positions: SegVol and M3D-CLIP."""
    return _vit(overrides, (32, 256, 256), (4, 16, 16), BASE, pos_embed="learned", norm_eps=1e-5)


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
