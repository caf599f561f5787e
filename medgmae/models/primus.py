"""Primus: a transformer for volumes with EVA-02 blocks and rotary positions (Wald et al. 2025, arXiv:2503.01835)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import eva_block, run_block
from medgmae.layers.patches import Shape, Size, input_grid
from medgmae.layers.pooling import GlobalPool
from medgmae.layers.positions import PosEmbed
from medgmae.layers.projection import Projection
from medgmae.layers.rope import PRIMUS, Rotary
from medgmae.models.encoder import Encoder
from medgmae.models.parts import Setting, count_blocks, drop_path_rates, given
from medgmae.models.registry import build, register_class, register_model

MLP_RATIO = 8 / 3


@register_class
class Primus(Encoder):
    """A transformer over the patches of a volume whose queries and keys are turned by their patches' places.

    The rotations are those of whole numbers of patches along each axis, for any grid. A learned table of positions is
    added to the patches beside them, as in OpenMind's models, or not, as in COLIPRI.

    Args:
        img_size: voxels per axis (d, h, w) that the table of positions is made for; an int for a cube.
        patch_size: voxels per axis of a patch.
        in_chans: input channels.
        embed_dim: token width E; a multiple of 6 per head.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of a block's gated MLP over E.
        registers: learned tokens in front of the patches that have no place.
        global_pool: from tokens to one vector, see :mod:`medgmae.layers.pooling`.
        num_classes: width of the head; 0 for none.
        head_hidden: widths of hidden layers in the head.
        drop_path_rate: of the last block; grows linearly from 0.
        pos_embed: "learned", "sincos" or "none", the table beside the rotations.
        norm_eps: epsilon of every layer norm.
        projection_dim: width of COLIPRI's shared space of scans and texts, for ``extract_features(..., head=
            "projected")``; 0 for no such layers.
        projection_heads: attention heads of its pooling.

    Raises:
        ValueError: sizes that do not fit each other; the message says which.
    """

    FIXED_SIZES = ("embed_dim", "depth", "patch_size")

    map_reduction: ClassVar[Literal["pca"]] = "pca"

    def __init__(
        self,
        img_size: Size = 160,
        patch_size: Size = 8,
        in_chans: int = 1,
        embed_dim: int = 864,
        depth: int = 16,
        num_heads: int = 12,
        *,
        mlp_ratio: float = MLP_RATIO,
        registers: int = 0,
        global_pool: GlobalPool = "avg",
        num_classes: int = 0,
        head_hidden: Sequence[int] = (),
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "learned",
        norm_eps: float = 1e-5,
        projection_dim: int = 0,
        projection_heads: int = 12,
    ) -> None:
        built = given(locals())
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            dims=3,
            class_tokens=registers,
            global_pool=global_pool,
            pos_embed=pos_embed,
        )
        self._built = built
        self.blocks = eva_blocks(
            embed_dim, depth, num_heads, mlp_ratio, drop_path_rates(drop_path_rate, depth), norm_eps
        )
        self._rotary = Rotary(PRIMUS, embed_dim // num_heads)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.Identity()
        self.projection = Projection(embed_dim, projection_dim, projection_heads) if projection_dim else None
        self._add_head(num_classes, head_hidden)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that an encoder's tensors show; None where they are no Primus'."""
        stem, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1_g.weight")
        if stem is None or hidden is None or stem.dim() != 5 or "blocks.0.attn.q_proj.weight" not in state:
            return None
        token = state.get("cls_token")
        usual = int(len(stem) * MLP_RATIO) == len(hidden)
        return {
            "embed_dim": len(stem),
            "depth": count_blocks(state),
            "patch_size": tuple(stem.shape[2:]),
            "in_chans": stem.shape[1],
            "registers": 0 if token is None else token.shape[1],
            **({} if usual else {"mlp_ratio": len(hidden) / len(stem)}),
            **({} if "pos_embed" in state else {"pos_embed": "none"}),
        }

    def settings(self) -> dict[str, Setting]:
        """Heads and epsilon."""
        return {
            "num_heads": Setting(self._built["num_heads"], "num_heads"),
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
        }

    def forward_last_block(self, x: Tensor) -> Tensor:
        """The stream after the last block, before the last norm: (B, P + N, E). x: (B, C, D, H, W)."""
        return self._encode(x, None)[0]

    def forward_masked(self, x: Tensor, mask: Tensor, token: Tensor) -> Tensor:
        """:meth:`forward_features` with ``token`` (1, 1, E) instead of the patches where ``mask`` (B, N) is 1."""
        grid = input_grid(x, self.in_chans, self.patch_size)
        patches = self.patch_embed(x)
        hidden = torch.where(mask.unsqueeze(-1) > 0, token.to(patches.dtype), patches)
        return self.norm(self._mix(self._add_positions(hidden, grid, None), grid, None)[0])  # type: ignore[no-any-return]

    def _encode(
        self, x: Tensor, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        grid = input_grid(x, self.in_chans, self.patch_size)
        return self._mix(self._embed(x, keep), grid, keep, taps, depth)

    def _mix(
        self, tokens: Tensor, grid: Shape, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Patches with their positions through the blocks; see :meth:`Encoder._encode`."""
        prefix = self._class_tokens(tokens)
        tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
        turns = self._rotary.turns(grid, self.num_prefix_tokens, keep, tokens)
        tapped: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            if i == depth:
                break
            tokens = run_block(block, tokens, self.grad_checkpointing, turns)
            if i in taps:
                tapped[i] = tokens
        return tokens, tapped


def eva_blocks(
    dim: int, depth: int, num_heads: int, mlp_ratio: float, rates: Sequence[float], norm_eps: float
) -> nn.ModuleList:
    """Blocks whose last layers start the smaller, the later they come: divided by sqrt(2 l) in block l, from 1."""
    return nn.ModuleList(
        eva_block(dim, num_heads, mlp_ratio, rate, norm_eps, out_scale=1 / math.sqrt(2 * (i + 1)))
        for i, rate in zip(range(depth), rates, strict=True)
    )


SMALL = {"embed_dim": 396, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 792, "depth": 12, "num_heads": 12}
MEDIUM = {"embed_dim": 864, "depth": 16, "num_heads": 12}
LARGE = {"embed_dim": 1056, "depth": 24, "num_heads": 16}
NANO = {"embed_dim": 48, "depth": 2, "num_heads": 4}


def _primus(overrides: dict[str, Any], img_size: Size, size: dict[str, int], **more: Any) -> Primus:
    defaults = {"img_size": img_size, "patch_size": 8, **size, **more}
    return build(Primus, defaults, overrides)  # type: ignore[no-any-return]


@register_model
def primus_s_patch8_160(**overrides: Any) -> Primus:
    """Primus-S/8 on 160³ crops."""
    return _primus(overrides, 160, SMALL)


@register_model
def primus_b_patch8_160(**overrides: Any) -> Primus:
    """Primus-B/8 on 160³ crops."""
    return _primus(overrides, 160, BASE)


@register_model
def primus_m_patch8_160(**overrides: Any) -> Primus:
    """Primus-M/8 on 160³ crops of head MR: the encoder of OpenMind's pre-trainings."""
    return _primus(overrides, 160, MEDIUM)


@register_model
def primus_l_patch8_160(**overrides: Any) -> Primus:
    """Primus-L/8 on 160³ crops."""
    return _primus(overrides, 160, LARGE)


@register_model
def primus_m_patch8_192(**overrides: Any) -> Primus:
    """Primus-M/8 on 192³ of chest CT without a table of positions: COLIPRI's vision tower."""
    return _primus(overrides, 192, MEDIUM, pos_embed="none")


@register_model
def primus_nano_patch8_32(**overrides: Any) -> Primus:
    """Two narrow blocks on 32³: for tests."""
    return _primus(overrides, 32, NANO)
