"""Vision Mamba for volumes: the encoder of 3D Mamba MAE (Hu et al. 2024, https://arxiv.org/abs/2409.07746)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from medgmae.layers.mamba import MambaStack, RMSNorm
from medgmae.layers.patches import Shape, Size, input_grid, take_tokens
from medgmae.layers.pooling import GlobalPool
from medgmae.layers.positions import PosEmbed
from medgmae.layers.rope import Rope
from medgmae.models.encoder import Encoder
from medgmae.models.parts import Setting, check_choice, count_blocks, drop_path_rates, given
from medgmae.models.registry import build, register_class, register_model

ClassToken = Literal["front", "middle", "double"]
ScanOrder = Literal["raster", "given"]


@register_class
class Vim(Encoder):
    """A stack of bidirectional Mamba blocks over the patches of a volume: cost and memory linear in their number.

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
        global_pool: from tokens to one vector, see :mod:`medgmae.layers.pooling`.
        num_classes: width of the head; 0 for none.
        drop_path_rate: of the last block; grows linearly from 0.
        pos_embed: "sincos", a fixed table, "learned" or "none".
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

    FIXED_SIZES = ("embed_dim", "depth", "inner_dim", "patch_size")

    map_reduction: ClassVar[Literal["max"]] = "max"

    blocks: MambaStack

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
        global_pool: GlobalPool = "avg",
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "sincos",
        rope: Rope | None = "axial",
        rope_residual: bool = True,
        divide_output: bool = True,
        scan_order: ScanOrder = "raster",
        norm_eps: float = 1e-5,
    ) -> None:
        built = given(locals())
        check_choice("class_token", class_token, (None, "front", "middle", "double"))
        check_choice("scan_order", scan_order, ("raster", "given"))
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            dims=3,
            class_tokens={None: 0, "double": 2}.get(class_token, 1),
            global_pool=global_pool,
            pos_embed=pos_embed,
            stem_norm_eps=None if class_token else norm_eps,
        )
        self._built = built
        self.class_token, self.scan_order = class_token, scan_order
        self.blocks = MambaStack(
            embed_dim,
            depth,
            d_state=d_state,
            expand=expand,
            divide_output=divide_output,
            norm_eps=norm_eps,
            drop_path_rates=drop_path_rates(drop_path_rate, depth),
            rope=rope,
            rope_residual=rope_residual,
        )
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.fc_norm = nn.Identity()
        self._add_head(num_classes)

    @property
    def rope(self) -> Rope | None:
        """Rotary positions of the tokens."""
        return self.blocks.rope

    @property
    def rope_residual(self) -> bool:
        """Whether the residual stream is turned too."""
        return self.blocks.rope_residual

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that an encoder's tensors show; None where they are no Vim's.

        Where a single class token stands is not among them.
        """
        stem, states = state.get("patch_embed.proj.weight"), state.get("blocks.0.mixer.A_log")
        if stem is None or states is None or stem.dim() != 5:
            return None
        token = state.get("cls_token")
        tokens = 0 if token is None else token.shape[1]
        return {
            "embed_dim": len(stem),
            "depth": count_blocks(state),
            "inner_dim": states.shape[0],
            "d_state": states.shape[1],
            "patch_size": tuple(stem.shape[2:]),
            "in_chans": stem.shape[1],
            **({} if tokens == 1 else {"class_token": "double" if tokens else None}),
            "global_pool": "token" if tokens else "avg",
        }

    def settings(self) -> dict[str, Setting]:
        """Class token, rotations, order of the scan, and how a block puts its directions together."""
        return {
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
            "divide_output": Setting(self._built["divide_output"], "divide_output"),
            "class_token": Setting(self.class_token, "class_token"),
            "rope": Setting(self.rope, "rope", "pretraining"),
            "rope_residual": Setting(self.rope_residual, "rope_residual", "pretraining"),
            "scan_order": Setting(self.scan_order, "scan_order", "pretraining"),
        }

    def forward_last_block(self, x: Tensor) -> Tensor:
        """What the last block's mixer returns, not yet added to the stream: (B, P + N, E), class tokens first.

        Maps of a fine-tuned model read it, see :func:`medgmae.latent_to_spatial`. x: (B, C, D, H, W).
        """
        hidden, _, _ = self.blocks.scan(*self._sequence(x, None), recompute=self.grad_checkpointing)
        return self.prefix_first(hidden)

    def _encode(
        self, x: Tensor, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        order = None
        if keep is not None and self.scan_order == "raster":
            keep, order = keep.sort(dim=1)
        sequence = self._sequence(x, keep)
        hidden, residual, tapped = self.blocks.scan(*sequence, taps, depth, recompute=self.grad_checkpointing)
        tokens = self.prefix_first(hidden if residual is None else hidden + residual)
        if order is not None:
            prefix, patches = self._split(tokens)
            tokens = torch.cat([prefix, take_tokens(patches, order.argsort(dim=1))], dim=1)
        return tokens, {i: self.prefix_first(stream) for i, stream in tapped.items()}

    def _sequence(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sequence as it is scanned, (B, P + n, E), and its rotations."""
        grid = input_grid(x, self.in_chans, self.patch_size)
        tokens = self._embed(x, keep)
        prefix = self._class_tokens(tokens)
        if prefix is not None:
            tokens = self._insert_prefix(prefix, tokens)
        return tokens, self.blocks.rotations(tokens, grid, self._places(grid, keep, tokens))

    def _places(self, grid: Shape, keep: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Raster numbers of the patches in the sequence, (1 or B, P + n); None for all of them and no class token."""
        if keep is None and not self.num_prefix_tokens:
            return None
        count = math.prod(grid)
        patches = torch.arange(count, device=tokens.device).unsqueeze(0) if keep is None else keep
        nowhere = patches.new_full((patches.shape[0], self.num_prefix_tokens), count)
        return self._insert_prefix(nowhere, patches)

    def _insert_prefix(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Class tokens (B, P, ...) at their places among the patches (B, n, ...)."""
        before = self._patches_before_token(patches.shape[1])
        return torch.cat([patches[:, :before], prefix[:, :1], patches[:, before:], prefix[:, 1:]], dim=1)

    def prefix_first(self, sequence: Tensor) -> Tensor:
        """The scanned sequence (B, P + n, E), which the blocks take, with the class tokens in front."""
        if self.cls_token is None:
            return sequence
        count = sequence.shape[1] - self.num_prefix_tokens
        before = self._patches_before_token(count)
        sizes = [before, 1, count - before, self.num_prefix_tokens - 1]
        left, first, right, last = torch.split(sequence, sizes, dim=1)
        return torch.cat([first, last, left, right], dim=1)

    def _patches_before_token(self, count: int) -> int:
        """How many of the patches stand before the (first) class token."""
        return count // 2 if self.class_token == "middle" else 0


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
