"""What the models of this library share: the abstract model, and the abstract encoder over patches.

A family of encoders is a class below :class:`Encoder` that says how tokens are mixed; everything around that is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize, make_head
from medgmae.layers.patches import PatchEmbed, Shape, Size, grid_of, input_grid, take_tokens, tap_indices, to_tuple
from medgmae.layers.pooling import GlobalPool, check_pool, make_pool, pool_tokens, pooled_width
from medgmae.layers.positions import PosEmbed, PositionCache, make_table, reset_table
from medgmae.models.parts import OutputFormat, Pair, Part, Readable, Report, Taps, check_choice, check_classes
from medgmae.models.parts import Setting as Setting


class Model(Part):
    """Every model of this library: an encoder, alone or as a part of a masked autoencoder.

    ``create_model`` adds ``config`` (architecture, model_args), ``pretrained_cfg`` (the weight card as a dictionary,
    empty without one) and, where weights were loaded, ``load_report``.
    """

    encoder: Encoder
    config: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    load_report: Report

    @property
    def img_size(self) -> Shape:
        """Voxels per axis (d, h, w) that the table of positions is made for."""
        return self.encoder._img_size

    @property
    def patch_size(self) -> Shape:
        """Voxels per axis of a patch."""
        return self.encoder.patch_embed.patch_size

    @property
    def grid_size(self) -> Shape:
        """Patches per axis of the table of positions."""
        return grid_of(self.img_size, self.patch_size)

    @property
    def in_chans(self) -> int:
        """Input channels."""
        return self.encoder.patch_embed.in_chans

    @property
    def embed_dim(self) -> int:
        """Width E of a token of the encoder."""
        return len(self.encoder.patch_embed.proj.weight)

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens P in front of the patch tokens."""
        return 0 if self.encoder.cls_token is None else self.encoder.cls_token.shape[1]

    @property
    def num_class_tokens(self) -> int:
        """How many of the class tokens are read, from the first: all but a ViT's registers."""
        return self.num_prefix_tokens

    @property
    def num_features(self) -> int:
        """Width F of the encoder's pooled vector."""
        return pooled_width(self.embed_dim, self.encoder.global_pool)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For every block of the encoder: ``module`` (its name), ``num_chs`` (E) and ``reduction`` (the patch)."""
        prefix = "" if self.encoder is self else "encoder."
        return [
            {"module": f"{prefix}blocks.{i}", "num_chs": self.embed_dim, "reduction": self.patch_size}
            for i in range(len(self.encoder.blocks))
        ]

    @abstractmethod
    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, E) of the encoder after the last norm; see :meth:`Encoder.forward_features`."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""


class Encoder(Model, Readable):
    """A stack of blocks over the patches of a volume: stem, positions, class tokens, pooling and head.

    A family builds its blocks and says in :meth:`_encode` how tokens go through them. Any multiple of the patch is a
    size; the table of positions is resampled for it.

    Args:
        global_pool: see :mod:`medgmae.layers.pooling`; the other arguments are those of the families.
    """

    map_reduction: ClassVar[Literal["max", "pca"]]
    """How a latent map of a fine-tuned model makes one number of a token, by default."""

    blocks: nn.ModuleList
    norm: nn.Module
    fc_norm: nn.Module
    attn_pool: nn.Module
    head: nn.Module
    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    projection: nn.Module | None  # what extract_features reads with head="projected"; most models have none

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        embed_dim: int,
        *,
        dims: int,
        class_tokens: int,
        global_pool: GlobalPool,
        pos_embed: PosEmbed,
        stem_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("pos_embed", pos_embed, get_args(PosEmbed))
        check_pool(global_pool, class_tokens)
        self._img_size = to_tuple(img_size, dims, "img_size")
        patch = to_tuple(patch_size, dims, "patch_size")
        grid = grid_of(self._img_size, patch)
        self.global_pool: GlobalPool = global_pool
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch, stem_norm_eps)
        self.cls_token = nn.Parameter(torch.empty(1, class_tokens, embed_dim)) if class_tokens else None
        self.register_parameter("pos_embed", make_table(pos_embed, grid, embed_dim))
        self._positions = PositionCache()
        self.projection = None
        self.pretrained_cfg = {}

    def _add_head(self, num_classes: int, head_hidden: Sequence[int] = ()) -> None:
        """The head, after the blocks; then initialise everything."""
        if head_hidden and self.global_pool in ("none", "max_logit"):
            raise ValueError(f"head_hidden needs a pooled vector, got global_pool={self.global_pool!r}")
        check_classes(num_classes)
        self.num_classes, self.head_hidden = num_classes, tuple(head_hidden)
        self.label_names: list[str] | None = None  # of the classes; a caller's to set, saved and loaded
        self.attn_pool = make_pool(self.global_pool, self.embed_dim)
        self.head = make_head(self.num_features, num_classes, self.head_hidden)
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the class tokens and the table of positions."""
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        reset_table(self.pos_embed, self.grid_size)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]  # an encoder is its own encoder
        """This model itself: what takes an encoder or a masked autoencoder reads ``model.encoder``."""
        return self

    @abstractmethod
    def _encode(
        self, x: Tensor, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens before the last norm, and those after the blocks ``taps``, all (B, P + n, E), class tokens first.

        Args:
            x: (B, C, D, H, W).
            keep: (B, n) long, the patches to encode; None for all. Tokens come back in this order.
            taps: numbers of blocks.
            depth: how many blocks to run; None for all.
        """

    @abstractmethod
    def forward_last_block(self, x: Tensor) -> Tensor:
        """What the last block itself returns for every token, (B, P + N, E), class tokens first. x: (B, C, D, H, W)."""

    __call__: Callable[..., Tensor]

    def prefix_first(self, sequence: Tensor) -> Tensor:
        """What the blocks take, (B, P + n, E), with the class tokens in front."""
        return sequence

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, D, H, W). Logits (B, num_classes), or the pooled vector (B, F) without a head."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, (B, P + N, E): P class tokens, then the patches in raster order.

        Args:
            x: (B, C, D, H, W), every axis a multiple of the patch.
            keep: (B, n) long, the patches to encode, in this order.

        Raises:
            ValueError: an input of another rank or channel count, or a size that is not a multiple of the patch.
            TypeError: an input that is not a tensor.
        """
        return self._read(self._encode(x, keep)[0])

    def _read(self, tokens: Tensor, norm: bool = True) -> Tensor:
        """Tokens as they leave the encoder, of those that :meth:`_encode` gives."""
        return self.norm(tokens) if norm else tokens

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: Taps = ..., *, return_prefix_tokens: Literal[False] = ..., norm: bool = ...,
        stop_early: bool = ..., output_fmt: OutputFormat = ..., intermediates_only: Literal[False] = ...
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: Taps = ..., *, return_prefix_tokens: Literal[False] = ..., norm: bool = ...,
        stop_early: bool = ..., output_fmt: OutputFormat = ..., intermediates_only: Literal[True]
    ) -> list[Tensor]: ...  # fmt: skip

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: Taps = ..., *, return_prefix_tokens: Literal[True], norm: bool = ...,
        stop_early: bool = ..., output_fmt: OutputFormat = ..., intermediates_only: Literal[False] = ...
    ) -> tuple[Tensor, list[Pair]]: ...  # fmt: skip

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: Taps = ..., *, return_prefix_tokens: Literal[True], norm: bool = ...,
        stop_early: bool = ..., output_fmt: OutputFormat = ..., intermediates_only: Literal[True]
    ) -> list[Pair]: ...  # fmt: skip

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Taps = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutputFormat = "NCDHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The tokens of :meth:`forward_features` and the feature maps after chosen blocks. Arguments are timm's.

        Args:
            x: (B, C, D, H, W).
            indices: blocks to tap, 0-based, negative from the end; an int for the last that many; None for all.
            return_prefix_tokens: give pairs (map, class tokens (B, P, E)) instead of maps.
            norm: apply the last norm to the maps.
            stop_early: run no block after the last one tapped; the tokens are then what comes out of that one.
            output_fmt: "NCDHW" (or "NCHW") for maps (B, E, d, h, w) on the patch grid, "NLC" for tokens (B, N, E).
            intermediates_only: return the list of maps alone.

        Returns:
            tokens (B, P + N, E) and a list of maps in the order of ``indices``.

        Raises:
            ValueError: a block that does not exist, or another format.
        """
        check_choice("output_fmt", output_fmt, get_args(OutputFormat))
        grid = input_grid(x, self.in_chans, self.patch_size)
        taps = tap_indices(indices, len(self.blocks))
        tokens, tapped = self._encode(x, None, taps, max(taps) + 1 if stop_early else None)
        maps: list[Any] = []
        for i in taps:
            prefix, patches = self._split(self._read(tapped[i], norm))
            image = patches if output_fmt == "NLC" else patches.transpose(1, 2).reshape(x.shape[0], -1, *grid)
            maps.append((image, prefix) if return_prefix_tokens else image)
        return maps if intermediates_only else (self._read(tokens), maps)

    @overload
    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = ..., reshape: bool = ..., return_class_token: Literal[False] = ...,
        norm: bool = ...,
    ) -> tuple[Tensor, ...]: ...  # fmt: skip

    @overload
    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = ..., reshape: bool = ..., *, return_class_token: Literal[True],
        norm: bool = ...,
    ) -> tuple[Pair, ...]: ...  # fmt: skip

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens of the last ``n`` blocks, or of the blocks ``n``, in DINO's words.

        Args:
            x: (B, C, D, H, W).
            n: how many of the last blocks, or which blocks, 0-based.
            reshape: maps (B, E, d, h, w) instead of tokens (B, N, E).
            return_class_token: give pairs with the class token (B, E), the mean of several.
            norm: apply the last norm.

        Raises:
            ValueError: a block that does not exist, or a class token of an encoder that has none.
        """
        if return_class_token and not self.num_prefix_tokens:
            raise ValueError(f"this {type(self).__name__} has no class token; leave out return_class_token")
        fmt: OutputFormat = "NCDHW" if reshape else "NLC"
        layers = self.forward_intermediates(
            x, n, return_prefix_tokens=True, norm=norm, stop_early=True, output_fmt=fmt, intermediates_only=True
        )
        read = slice(self.num_class_tokens)
        return tuple((image, prefix[:, read].mean(1)) if return_class_token else image for image, prefix in layers)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, P + N, E) and classify them; ``pre_logits`` leaves out the classifier.

        Returns: (B, num_classes) or (B, F); with ``global_pool="none"`` one such row per patch, (B, N, ...).
        """
        prefix, patches = self._split(tokens)
        prefix = prefix[:, : self.num_class_tokens]
        if self.global_pool == "max_logit":
            patches = self.fc_norm(patches)
            return (patches if pre_logits else self.head(patches)).amax(1)  # type: ignore[no-any-return]
        pooled = self.fc_norm(self.attn_pool(pool_tokens(prefix, patches, self.global_pool)))
        return pooled if pre_logits else self.head(pooled)  # type: ignore[no-any-return]

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, P, E) and patch tokens (B, n, E)."""
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    def _embed(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Patches with their positions, (B, n, E)."""
        grid = input_grid(x, self.in_chans, self.patch_size)
        if keep is not None and keep.shape[0] != x.shape[0]:
            raise ValueError(f"keep is for a batch of {keep.shape[0]}, the input is a batch of {x.shape[0]}")
        return self._add_positions(self.patch_embed(x, keep), grid, keep)

    def _add_positions(self, tokens: Tensor, grid: Shape, keep: Tensor | None) -> Tensor:
        """Patches (B, n, E) with their positions, if there is a table of them."""
        if self.pos_embed is None:
            return tokens
        positions = self._positions(self.pos_embed, self.grid_size, grid)  # (1, N, E)
        if keep is not None:
            positions = take_tokens(positions.expand(keep.shape[0], -1, -1), keep)
        return tokens + positions

    def _class_tokens(self, like: Tensor) -> Tensor | None:
        """The class tokens (B, P, E) of a batch of tokens."""
        return None if self.cls_token is None else self.cls_token.expand(like.shape[0], -1, -1).to(like.dtype)

    def get_classifier(self) -> nn.Module:
        """The head; an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a new, random one and, if given, the pooling before it; norms stay where they are.

        Raises:
            ValueError: no number of classes, or a pooling that does not exist or does not fit the tokens or norm.
        """
        check_classes(num_classes)
        pool = self.global_pool if global_pool is None else global_pool
        check_pool(pool, self.num_class_tokens)
        normed = not isinstance(self.fc_norm, nn.Identity)
        if normed and (pool == "token_avg") != (self.global_pool == "token_avg"):
            raise ValueError(
                f"the pooled vector is normalised over {self.num_features} features, which global_pool={pool!r} "
                f"changes; build the model with create_model(..., global_pool={pool!r})"
            )
        head = make_head(pooled_width(self.embed_dim, pool), num_classes, self.head_hidden).apply(initialize)
        like = self.patch_embed.proj.weight
        self.head = head.to(like).train(self.training)
        if pool != self.global_pool:
            self.attn_pool = make_pool(pool, self.embed_dim).apply(initialize).to(like).train(self.training)
        self.num_classes, self.global_pool, self.label_names = num_classes, pool, None

    def set_input_size(self, img_size: Size) -> None:
        """Make the table of positions for another size, resampled from the present one.

        Not needed to run another size; it changes the default of windows, and that of a saved model.

        Args:
            img_size: voxels per axis (d, h, w), multiples of the patch (else a ValueError); one number for a cube.
        """
        size = to_tuple(img_size, len(self.patch_size), "img_size")
        self.pos_embed = self._positions.resized(self.pos_embed, self.grid_size, grid_of(size, self.patch_size))
        self._img_size = size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise learning rates, in the form that ``timm.optim`` reads."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": r"^blocks\.(\d+)",  # what matches nothing, the norms and the head, is the last layer
        }
