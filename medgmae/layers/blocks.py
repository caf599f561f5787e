"""Building blocks of the transformers: attention, the block, heads, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medgmae.layers.rope import rotate
from medgmae.ops.precision import full_precision

# Of a block: two layers with a GELU, or gated ones, with a norm inside or without.
MlpKind = Literal["gelu", "swiglu", "swiglu_norm"]


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (query, key, value, each head by head), scale d^-1/2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (B, N, E), each (B, heads, N, d); see :meth:`forward` for ``turns``."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if turns is None:
            return queries, keys, values
        return rotate(queries, turns).to(values.dtype), rotate(keys, turns).to(values.dtype), values

    def forward(self, x: Tensor, turns: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, N, E) to (B, N, E).

        Args:
            x: tokens.
            turns: rotations of queries and keys, (N, d / 2, 2) or (B, 1, N, d / 2, 2), see
                :meth:`medgmae.layers.rope.Rotary.turns`.
            bias: added to the scores of every key, (N).
        """
        queries, keys, values = self.heads(x, turns)
        mask = None if bias is None else bias.to(queries.dtype).expand(1, 1, 1, -1)
        x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class EvaAttention(nn.Module):
    """Multi-head self-attention as EVA-02 has it (Fang et al. 2023): queries and keys are turned by rotary positions.

    Queries, keys and values have linear layers of their own, the one of the keys without bias, and a layer norm over
    all heads stands before the projection out.
    """

    def __init__(self, dim: int, num_heads: int, norm_eps: float = 1e-5, out_scale: float = 1.0) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.out_scale = num_heads, out_scale
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Initialise the linear layers, as in EVA-02."""
        _reset_linear(self, self.proj, self.out_scale)

    def heads(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values, of tokens (B, N, E), each (B, heads, N, d)."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (one(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in layers)
        return rotate(queries, turns).to(values.dtype), rotate(keys, turns).to(values.dtype), values

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E); turns: (N, d / 2, 2) or (B, 1, N, d / 2, 2), see :class:`~medgmae.layers.rope`."""
        x = F.scaled_dot_product_attention(*self.heads(x, turns))
        return self.proj(self.norm(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless ``dim`` channels can be shared out over so many heads."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a whole number from 1, got {num_heads!r}")
    if dim % num_heads:
        raise ValueError(f"embed_dim (={dim}) must be divisible by num_heads (={num_heads})")


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """A linear layer gated by the SiLU of another, a layer norm, and a linear layer (Shazeer 2020; EVA-02).

    Without a norm where ``norm_eps`` is None, as in DINOv2.
    """

    def __init__(self, dim: int, hidden: int, norm_eps: float | None = 1e-5, out_scale: float = 1.0) -> None:
        super().__init__()
        self.out_scale = out_scale
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, dim)

    def reset_parameters(self) -> None:
        """Initialise the linear layers, as in EVA-02."""
        _reset_linear(self, self.fc2, self.out_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))  # type: ignore[no-any-return]


def _reset_linear(branch: nn.Module, last: nn.Linear, scale: float) -> None:
    """Normal weights of deviation 0.02 in every linear layer of a branch, and ``scale`` times that in the last."""
    for layer in branch.children():
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            nn.init.trunc_normal_(layer.weight, std=0.02 * (scale if layer is last else 1))


class DropPath(nn.Module):
    """Drop a residual branch per sample with probability ``p`` while training, scaling the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...)."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm1 x), then x + mlp(norm2 x). Parameter names are timm's.

    Args:
        dim: token width E.
        attn: takes tokens (B, N, E), and what else ``forward`` is given.
        mlp: takes tokens.
        drop_path: see :class:`DropPath`.
        norm_eps: epsilon of the two norms.
        layer_scale: initial value of a learned factor per channel on each branch; None for no such factors.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_eps(norm_eps)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.layer_scale = layer_scale
        scaled = layer_scale is not None
        self.gamma_1 = nn.Parameter(torch.empty(dim)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.empty(dim)) if scaled else None

    def reset_parameters(self) -> None:
        """Initialise the factors."""
        if self.gamma_1 is not None and self.gamma_2 is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma_1, self.layer_scale)
            nn.init.constant_(self.gamma_2, self.layer_scale)

    def forward(self, x: Tensor, *more: Tensor | None) -> Tensor:
        """(B, N, E) to (B, N, E); ``more`` is for the attention."""
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x), *more), self.gamma_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))  # type: ignore[no-any-return]


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors


def vit_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    norm_eps: float = 1e-6,
    mlp: MlpKind = "gelu",
) -> Block:
    """The block of a plain ViT (Dosovitskiy et al. 2021); takes rotations too."""
    hidden = int(dim * mlp_ratio)
    inner = Mlp(dim, hidden) if mlp == "gelu" else SwiGLU(dim, hidden, norm_eps if mlp == "swiglu_norm" else None)
    return Block(dim, Attention(dim, num_heads), inner, drop_path=drop_path, norm_eps=norm_eps)


def eva_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float = 8 / 3,
    drop_path: float = 0.0,
    norm_eps: float = 1e-5,
    layer_scale: float = 0.1,
    out_scale: float = 1.0,
) -> Block:
    """The block of EVA-02 with norms inside its branches, as Primus has it (Wald et al. 2025); takes rotations too.

    out_scale: factor on the initial weights of the last layers of both branches.
    """
    check_eps(norm_eps)
    attn = EvaAttention(dim, num_heads, norm_eps, out_scale)
    parts = attn, SwiGLU(dim, int(dim * mlp_ratio), norm_eps, out_scale)
    return Block(dim, *parts, drop_path=drop_path, norm_eps=norm_eps, layer_scale=layer_scale)


def check_eps(eps: float) -> None:
    """Raise ValueError unless this can be the epsilon of a norm."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ValueError(f"norm_eps must be a small number from 0, got {eps!r}")


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in the precision of the weight, autocast or not."""
    with full_precision(weight):
        return F.linear(x.to(weight.dtype), weight, bias)


def run_block(block: Callable[..., Tensor], x: Tensor, recompute: bool, *more: Tensor | None) -> Tensor:
    """``block(x, *more)``, which is run again in the backward pass, instead of keeping its activations, if asked."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, *more, use_reentrant=False)
    return block(x, *more)


def make_head(features: int, num_classes: int, hidden: Sequence[int] = ()) -> nn.Module:
    """Classifier head: identity for 0 classes, else a linear layer after any hidden ones.

    A hidden layer is Linear, LeakyReLU(0.01), BatchNorm1d, as in TANGERINE's ``power_2`` models.
    """
    if num_classes == 0:
        return nn.Identity()
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(features, width), nn.LeakyReLU(0.01), nn.BatchNorm1d(width)]
        features = width
    last = nn.Linear(features, num_classes)
    return nn.Sequential(*layers, last) if layers else last


def initialize(module: nn.Module) -> None:
    """Set the parameters that ``module`` itself owns, for ``nn.Module.apply``: MAE's scheme (He et al. 2022).

    Xavier-uniform for linear and patch-embedding weights, zero biases, unit norms. A module with tokens or tables
    brings a ``reset_parameters`` of its own. What is on the meta device has nothing to set.
    """
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # and torch would import its compiler to learn that: over a second when a model is built to be loaded
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
