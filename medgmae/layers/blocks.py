"""Building blocks of the transformers: attention, the block, heads, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medgmae.ops.precision import full_precision


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (query, key, value, each head by head), scale d^-1/2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be a whole number from 1, got {num_heads!r}")
        if dim % num_heads:
            raise ValueError(f"embed_dim (={dim}) must be divisible by num_heads (={num_heads})")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


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
    """Pre-norm transformer block: x + attention(norm1 x), then x + mlp(norm2 x). Parameter names are timm's."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_eps(norm_eps)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def check_eps(eps: float) -> None:
    """Raise ValueError unless this can be the epsilon of a norm."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ValueError(f"norm_eps must be a small number from 0, got {eps!r}")


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in the precision of the weight, autocast or not."""
    with full_precision(weight):
        return F.linear(x.to(weight.dtype), weight, bias)


def run_block(block: Callable[..., Tensor], x: Tensor, recompute: bool, *more: Tensor) -> Tensor:
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
