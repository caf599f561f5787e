"""Building blocks of the transformers: tables of positions, patch embedding, the block, heads, initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medgmae.masking import check_multiple, patchify

Size = int | Sequence[int]
Grid = tuple[int, ...]


def to_tuple(size: Size, dims: int, what: str = "size") -> Grid:
    """An int for every axis, or one value per axis, as a tuple of ``dims`` positive ints; ValueError otherwise."""
    values = (size,) * dims if isinstance(size, int) else tuple(int(v) for v in size)
    if len(values) != dims or any(v < 1 for v in values):
        raise ValueError(f"{what} must be one positive int or {dims} of them, got {size!r}")
    return values


def sincos_pos_embed(dim: int, grid: Sequence[int], *, reversed_mesh: bool = False) -> Tensor:
    """Fixed sine-cosine table of positions, (1, prod(grid), dim) float32, rows in raster order.

    The channels are shared out over the axes in order, the remainder going to the last axes. A block of width b
    holds, for the integer coordinate t along its axis, sin(t w_j), cos(t w_j) with w_j = 10000^(-j / (b // 2)), and
    sin(t / 10000) in one last channel when b is odd. For widths divisible by 2 * len(grid) this is the usual MAE
    table; the rule for the other widths is TANGERINE's (util/pos_embed.py).

    ``reversed_mesh`` reproduces TANGERINE's order on non-cubic grids: row n gets the coordinates that n has in the
    reversed grid. The files that were trained with it carry their table, so it is needed for comparison only.
    """
    shape = tuple(grid)[::-1] if reversed_mesh else tuple(grid)
    coordinates = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    widths = axis_widths(dim, len(shape))
    blocks = [_axis_table(t.reshape(-1, 1), width) for t, width in zip(coordinates, widths, strict=True)]
    return torch.cat(blocks, dim=1).unsqueeze(0)


def axis_widths(dim: int, axes: int) -> list[int]:
    """``dim`` channels shared out over the axes in order, the remainder going to the last ones."""
    return [dim // axes + int(axis >= axes - dim % axes) for axis in range(axes)]


def _axis_table(t: Tensor, width: int) -> Tensor:
    """Channels for the coordinates ``t`` (n, 1) along one axis: (n, width)."""
    half = width // 2
    # The published tables were computed by numpy in float32, whose power rounds differently from torch's.
    exponents = np.arange(half, dtype=np.float32) / np.float32(max(half, 1))
    omega = torch.tensor(np.float32(1) / np.power(np.float32(10000), exponents))
    odd = [(t * 1e-4).sin()] if width % 2 else []
    return torch.cat([(t * omega).sin(), (t * omega).cos(), *odd], dim=1)


def sincos_grid(table: Tensor, axes: int) -> tuple[int, ...] | None:
    """The grid for which :func:`sincos_pos_embed` gives this table (1, N, E); None when it is another kind of table.

    Read off the rows along each axis in turn, the last first: its channels begin anew where the coordinate is 0 again.
    """
    rows, dim = table.shape[1:]
    if table.is_meta or dim < 2 * axes or not rows:
        return None
    grid: list[int] = []
    end, stride = dim, 1
    for width in reversed(axis_widths(dim, axes)):
        block = table[0, ::stride, end - width : end].float().cpu()
        again = (block[1:] - block[:1]).abs().amax(1) < 1e-3
        size = int(again.int().argmax()) + 1 if bool(again.any()) else len(block)
        expected = _axis_table(torch.arange(size, dtype=torch.float32).unsqueeze(1), width)
        if not torch.allclose(block[:size], expected, rtol=0, atol=2e-3):  # room for float16
            return None
        grid, end, stride = [size, *grid], end - width, stride * size
    return tuple(grid) if stride == rows else None


def resample_pos_embed(table: Tensor, source_grid: Sequence[int], target_grid: Sequence[int]) -> Tensor:
    """Resample a table of patch positions to another grid: (1, N, E) to (1, N', E).

    Linear along every axis, align_corners False, no antialiasing, computed in float32: what the published loaders
    do on cubic grids, on the true grids here.

    Raises:
        ValueError: the table does not have prod(source_grid) rows, or the grids differ in their number of axes.
    """
    source, target = tuple(source_grid), tuple(target_grid)
    if table.shape[1] != math.prod(source) or len(source) != len(target):
        raise ValueError(f"a table of {table.shape[1]} rows on grid {source} cannot be resampled to grid {target}")
    if source == target:
        return table
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(source)]
    image = table.float().transpose(1, 2).reshape(1, table.shape[2], *source)
    image = F.interpolate(image, size=target, mode=mode, align_corners=False)
    return image.flatten(2).transpose(1, 2).to(table.dtype)


class PositionCache:
    """A table of positions for the grid at hand, resampled once per grid as long as the table does not change.

    A table that is learning is resampled every time. A change is seen unless it goes through ``.data``, which hides it
    from torch: use ``copy_`` under ``torch.no_grad()`` instead.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._value: Tensor | None = None

    def __call__(self, table: Tensor, source_grid: Grid, grid: Grid) -> Tensor:
        """``table`` (1, N, E) of ``source_grid`` on ``grid``, in the table's dtype and device."""
        if grid == source_grid:
            return table
        learning = table.requires_grad and torch.is_grad_enabled()
        if learning or torch.compiler.is_compiling() or table.is_inference():
            return resample_pos_embed(table, source_grid, grid)
        # An in-place change of the table bumps its version, a new tensor has another address.
        key = (grid, source_grid, table.data_ptr(), table._version, table.dtype, table.device)
        if self._value is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._key, self._value = key, resample_pos_embed(table.detach(), source_grid, grid)
        return self._value

    def __deepcopy__(self, memo: object) -> PositionCache:
        return PositionCache()

    def __reduce__(self) -> tuple[type[PositionCache], tuple[()]]:
        return (PositionCache, ())


class PatchEmbed(nn.Module):
    """Cut an input into patches and project each: (B, C, *size) to (B, N, E) in raster order.

    The weight is a convolution's, (E, C, *patch), with kernel = stride = patch. It is applied as a product with the
    unfolded patches, so that only the visible ones are computed when ``keep`` is given. With ``norm_eps`` a layer norm
    of that epsilon follows.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int], norm_eps: float | None = None) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(self.patch_size)]
        self.proj = conv(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep``: (B, n) long, the patches to embed, (B, n, E) then."""
        patches = patchify(x, self.patch_size)  # (B, N, prod(patch) * C)
        if keep is not None:
            patches = take_tokens(patches, keep)
        weight = self.proj.weight.movedim(1, -1).flatten(1)  # (E, prod(patch) * C), a view for one channel
        return self.norm(F.linear(patches, weight, self.proj.bias))  # type: ignore[no-any-return]


def input_grid(x: Tensor, in_chans: int, patch_size: Grid) -> Grid:
    """Patch grid of an input (B, C, *size), after checking its rank, channels and size.

    Raises:
        ValueError: an input of another rank or channel count, or of a size that is no multiple of the patch.
    """
    dims = len(patch_size)
    if x.dim() != dims + 2 or x.shape[1] != in_chans:
        axes = "D, H, W" if dims == 3 else "H, W"
        raise ValueError(
            f"input must be (B, {in_chans}, {axes}), got {tuple(x.shape)}; build the model with "
            f"in_chans={x.shape[1] if x.dim() == dims + 2 else '...'} for another channel count"
        )
    check_multiple(x.shape[2:], patch_size)
    return tuple(s // p for s, p in zip(x.shape[2:], patch_size, strict=True))


def tap_indices(indices: int | list[int] | None, depth: int) -> list[int]:
    """Blocks to tap, 0-based: negative ones count from the end, an int means the last that many, None all.

    Raises:
        ValueError: a block that does not exist.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        wanted = list(range(depth - indices, depth)) or [depth]  # none at all is as wrong as too many
    else:
        wanted = [i + depth if i < 0 else i for i in indices]
    if not all(0 <= i < depth for i in wanted):
        raise ValueError(f"indices {indices} reach outside the {depth} blocks; valid: {-depth} to {depth - 1}")
    return wanted


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens (B, N, E) at ``indices`` (B, n) along the sequence: (B, n, E)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (query, key, value, each head by head), scale d^-1/2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
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
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """``block(x)``, which is run again in the backward pass, instead of keeping its activations, if asked."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]
    return block(x)  # type: ignore[no-any-return]


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
