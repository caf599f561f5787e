"""BM-MAE's encoder (Robinet et al. 2025), for any subset of a patient's MR sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.blocks import initialize
from medgmae.layers.patches import Shape, Size, input_grid, patchify, take_tokens
from medgmae.layers.pooling import GlobalPool
from medgmae.layers.positions import PosEmbed
from medgmae.models.parts import Setting, given
from medgmae.models.registry import build, register_class, register_model
from medgmae.models.vit import BASE, ViT

SEQUENCES = ("t1", "t1ce", "t2", "flair")

# A volume (B, M, D, H, W) with all sequences of the model, or some of them by name, each (B, 1, D, H, W).
Scans = Tensor | Mapping[str, Tensor]


class SequenceStem(nn.Module):
    """A patch embedding of its own for each sequence.

    ``proj.weight`` (E, M, *patch) holds the kernels, ``proj.bias`` (M, E) their biases.
    """

    def __init__(self, sequences: int, embed_dim: int, patch_size: Shape) -> None:
        super().__init__()
        self.in_chans, self.patch_size = sequences, patch_size
        self.proj = _Kernels(sequences, embed_dim, patch_size)

    def forward(self, x: Tensor, present: Sequence[int]) -> Tensor:
        """x: (B, m, D, H, W), ``present``: the sequences that these are. Returns (B, m N, E), sequence by sequence."""
        tokens = [
            F.linear(patchify(x[:, i : i + 1], self.patch_size), self.proj.weight[:, own].flatten(1), bias)
            for i, (own, bias) in enumerate((own, self.proj.bias[own]) for own in present)
        ]
        return torch.cat(tokens, dim=1)


class _Kernels(nn.Module):
    def __init__(self, sequences: int, embed_dim: int, patch_size: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, sequences, *patch_size))
        self.bias = nn.Parameter(torch.empty(sequences, embed_dim))

    def reset_parameters(self) -> None:
        """Initialise every kernel as a linear layer."""
        with torch.no_grad():
            for own in range(self.weight.shape[1]):
                kernel = torch.empty_like(self.weight[:, own].flatten(1))
                self.weight[:, own] = nn.init.xavier_uniform_(kernel).reshape_as(self.weight[:, own])
        nn.init.zeros_(self.bias)


@register_class
class SequenceViT(ViT):
    """A ViT that reads the patches of all sequences side by side, with a stem for each.

    The input is (B, M, D, H, W), a channel per sequence in the order of ``sequences``, or a mapping from some of these
    names to (B, 1, D, H, W): :meth:`forward` and :meth:`forward_features` take any subset. A model that is built with
    fewer ``sequences`` takes their stems from the file and works with every tool.

    Blocks see a token per patch and sequence. What leaves the encoder is their mean over the sequences, (B, P + N, E),
    as the authors' segmentation has it; :meth:`sequence_tokens` gives all of them.

    Args:
        sequences: names of the sequences, in the order of the channels.

    The other arguments are those of :class:`~medgmae.models.vit.ViT`.

    Raises:
        ValueError: no sequences, or one name twice.
    """

    FIXED_SIZES = ("embed_dim", "depth", "mlp_dim", "patch_size")

    def __init__(
        self,
        img_size: Size = 128,
        patch_size: Size = 16,
        sequences: Sequence[str] = SEQUENCES,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_ratio: float = 2.0,
        class_token: bool = True,
        global_pool: GlobalPool = "token",
        fc_norm: bool | None = None,
        num_classes: int = 0,
        head_hidden: Sequence[int] = (),
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "sincos",
        norm_eps: float = 1e-5,
    ) -> None:
        built = given(locals())
        names = [sequences] if isinstance(sequences, str) else list(sequences)
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"sequences must be different names such as {list(SEQUENCES)}, got {sequences!r}")
        super().__init__(
            img_size,
            patch_size,
            len(names),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            global_pool=global_pool,
            fc_norm=fc_norm,
            num_classes=num_classes,
            head_hidden=head_hidden,
            drop_path_rate=drop_path_rate,
            pos_embed=pos_embed,
            norm_eps=norm_eps,
        )
        self._built, self.sequences = {**built, "fc_norm": self._built["fc_norm"]}, names
        self.patch_embed: Any = SequenceStem(len(names), embed_dim, self.patch_size)
        self.patch_embed.apply(initialize)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that an encoder's tensors show; None where they have no stem per sequence."""
        bias = state.get("patch_embed.proj.bias")
        if bias is None or bias.dim() != 2:
            return None
        sizes = ViT.read_sizes({**state, "patch_embed.proj.bias": bias.flatten()})
        return sizes and {name: value for name, value in sizes.items() if name not in ("in_chans", "pre_norm", "dims")}

    def settings(self) -> dict[str, Setting]:
        """Heads, epsilon, and which sequences the stems are for."""
        own = {name: Setting(self._built[name], name) for name in ("num_heads", "norm_eps")}
        return {**own, "sequences": Setting(self.sequences, "sequences")}

    def sequence_tokens(self, x: Scans, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + m N, E) after the last norm: class tokens, then the patches, sequence by sequence.

        Args:
            x: see the class; m of its sequences.
            keep: (B, n) long, which of the m N patches to encode; they come back in this order.
        """
        return self.norm(super()._encode(x, keep)[0])  # type: ignore[arg-type, no-any-return]

    def forward_last_block(self, x: Tensor) -> Tensor:
        """The stream after the last block, before the last norm, mean over the sequences: (B, P + N, E)."""
        return self._read(self._encode(x, None)[0], norm=False)

    def _encode(
        self, x: Scans, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As in :class:`~medgmae.models.encoder.Encoder`, with an axis for the sequences behind that of the batch."""
        count = len(self._select(x)[1])
        if keep is not None:
            keep = of_every_sequence(keep, math.prod(self._grid(x)), count)
        tokens, tapped = super()._encode(x, keep, taps, depth)  # type: ignore[arg-type]
        return self._apart(tokens, count), {i: self._apart(stream, count) for i, stream in tapped.items()}

    def _apart(self, tokens: Tensor, count: int) -> Tensor:
        """(B, P + m n, E) as (B, m, P + n, E)."""
        prefix, patches = self._split(tokens)
        patches = patches.reshape(patches.shape[0], count, -1, patches.shape[2])
        return torch.cat([prefix.unsqueeze(1).expand(-1, count, -1, -1), patches], dim=2)

    def _read(self, tokens: Tensor, norm: bool = True) -> Tensor:
        return super()._read(tokens, norm).mean(1)

    def _embed(self, x: Scans, keep: Tensor | None) -> Tensor:
        volume, present = self._select(x)
        grid = self._grid(x)  # refuses what is no such input
        tokens: Tensor = self.patch_embed(volume, present)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(self.pos_embed, self.grid_size, grid).repeat(1, len(present), 1)
        if keep is not None and keep.shape[0] != tokens.shape[0]:
            raise ValueError(f"keep is for a batch of {keep.shape[0]}, the input is a batch of {tokens.shape[0]}")
        return tokens if keep is None else take_tokens(tokens, keep)

    def _grid(self, x: Scans) -> Shape:
        volume, present = self._select(x)
        return input_grid(volume, len(present), self.patch_size)

    def _select(self, x: Scans) -> tuple[Tensor, list[int]]:
        """The sequences at hand as channels, in the model's order, and their numbers."""
        if not isinstance(x, Mapping):
            return x, list(range(len(self.sequences)))
        unknown = sorted(set(x) - set(self.sequences))
        if unknown or not x:
            raise ValueError(f"expected one or more of the sequences {self.sequences}, got {sorted(x)}")
        present = [i for i, name in enumerate(self.sequences) if name in x]
        volumes = [x[self.sequences[i]] for i in present]
        shapes = {tuple(volume.shape) for volume in volumes}
        if len(shapes) > 1 or volumes[0].dim() != 5 or volumes[0].shape[1] != 1:
            raise ValueError(f"every sequence must be (B, 1, D, H, W), all of one size, got {sorted(shapes)}")
        return torch.cat(volumes, dim=1), present


def of_every_sequence(patches: Tensor, tokens: int, sequences: int) -> Tensor:
    """Numbers (B, n) of patches of one sequence with N, as those (B, M n) of the same patches of all."""
    first = tokens * torch.arange(sequences, device=patches.device)
    return (patches.unsqueeze(1) + first[:, None]).flatten(1)


def no_channels(overrides: dict[str, Any]) -> dict[str, Any]:
    """The options of an architecture, if they do not speak of channels.

    Raises:
        ValueError: they do.
    """
    if "in_chans" in overrides:
        raise ValueError(
            f"this model has a stem for each sequence: name them, as in sequences={list(SEQUENCES[:2])}, instead of "
            f"in_chans={overrides['in_chans']!r}"
        )
    return overrides


@register_model
def seqvit_base_patch16_128(**overrides: Any) -> SequenceViT:
    """ViT-B/16 with MLPs of twice the width, 128³, a stem for each of four MR sequences, any subset: BM-MAE."""
    return build(SequenceViT, dict(BASE), no_channels(overrides))  # type: ignore[no-any-return]
