"""Bidirectional Mamba on sequences of tokens, channels last: norm, rotary positions, mixer and block.

The mixer is Vision Mamba's "v2" (Zhu et al. 2024, https://arxiv.org/abs/2401.09417) as 3D Mamba MAE uses it (Hu et al.
2024, https://arxiv.org/abs/2409.07746), with the parameter names of its published checkpoints.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medgmae.layers import DropPath, Grid, axis_widths, initialize
from medgmae.ops import causal_conv1d, selective_scan

Rope = Literal["sequence", "axial", "axial_published"]

# The axial rotations of a volume, whatever its grid, run from 0 to this angle (in the fastest pair of channels).
EXTENT = 14.0


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis, with statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """A norm starts with unit weights."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in the dtype of the weight."""
        x = widened(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def sequence_angles(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (length, dim // 4) float32 of a sequence's tokens: token t turns pair j by t 10000^(-2j / (dim // 2)).

    They are for the first half of the channels, as the reference's pre-training has it (models_vim_mae.py). The product
    is taken in float32: at 64,000 tokens another order of rounding would be another angle.
    """
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), _frequencies(dim // 2, device))


def axial_angles(grid: Grid, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (prod(grid), dim // 2) float32 of patches in raster order; the pairs are shared out over all axes.

    Patch i of g along an axis lies at (i + 1/2) / g * 14, so that the place in the volume decides and not the grid, as
    it does where a table of positions is resampled. Pair j of an axis with n pairs turns by that times 10000^(-j / n).
    """
    columns = []
    for axis, pairs in enumerate(axis_widths(dim // 2, len(grid))):
        t = (torch.arange(grid[axis], dtype=torch.float32, device=device) + 0.5) / grid[axis] * EXTENT
        columns.append(_over_grid(torch.outer(t, _frequencies(2 * pairs, device)), axis, grid))
    return torch.cat(columns, dim=1)


def published_axial_angles(grid: Grid, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (prod(grid), 2 * (dim // 4)) float32 of the reference's classifier: the first axis does not enter.

    Patch i of g along an axis lies at i / g * 14. The first half of the channels follows the second axis, the other
    half the third one (rope.py, whose index drops the part for the first axis).
    """
    columns = []
    for axis in (1, 2):
        t = torch.arange(grid[axis], dtype=torch.float32, device=device) / grid[axis] * EXTENT
        columns.append(_over_grid(torch.outer(t, _frequencies(dim // 2, device)), axis, grid))
    return torch.cat(columns, dim=1)


def _frequencies(dim: int, device: torch.device | None) -> Tensor:
    """10000^(-2j / dim) for the dim // 2 pairs of ``dim`` channels."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device)[: dim // 2] / max(dim, 1)
    return 1.0 / (10000.0**exponents)


def _over_grid(rows: Tensor, axis: int, grid: Grid) -> Tensor:
    """Rows (g, n) for the coordinates along one axis, given to every patch of the grid: (prod(grid), n)."""
    shape = [1] * len(grid) + [rows.shape[1]]
    shape[axis] = grid[axis]
    return rows.reshape(shape).expand(*grid, -1).reshape(-1, rows.shape[1])


class Rotary:
    """Tables for :func:`rotate`, made once per grid and kept beside the model, not in its state.

    Args:
        kind: "sequence", "axial" or "axial_published", see the functions above.
        dim: width of the tokens, even.

    Raises:
        ValueError: an unknown kind, or an odd width.
    """

    def __init__(self, kind: Rope, dim: int) -> None:
        if kind not in ("sequence", "axial", "axial_published"):
            raise ValueError(f"rope must be None, 'sequence', 'axial' or 'axial_published', got {kind!r}")
        if dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels: embed_dim must be even, got {dim}")
        self.kind, self.dim = kind, dim
        self._held: tuple[object, Tensor] | None = None

    def table(self, grid: Grid, length: int, like: Tensor) -> Tensor:
        """Cosine and sine for every pair of channels, (rows, dim / 2, 2), for tokens of the kind of ``like``.

        "sequence" has ``length`` rows. The axial kinds have one row per patch of the grid, and a last one that turns
        nothing, for tokens without a place. Pairs without an angle stay as they are.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling():
            return self._make(grid, length, like.device).to(dtype)
        key = (length if self.kind == "sequence" else grid, dtype, like.device, type(like))
        held = self._held
        if held is None or held[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                held = self._held = (key, self._make(grid, length, like.device).to(dtype))
        return held[1]

    def _make(self, grid: Grid, length: int, device: torch.device) -> Tensor:
        if self.kind == "sequence":
            angles, still = sequence_angles(length, self.dim, device), 0
        else:
            make = axial_angles if self.kind == "axial" else published_axial_angles
            angles, still = make(grid, self.dim, device), 1
        angles = F.pad(angles, (0, self.dim // 2 - angles.shape[1], 0, still))
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def __deepcopy__(self, memo: object) -> Rotary:
        return Rotary(self.kind, self.dim)

    def __reduce__(self) -> tuple[type[Rotary], tuple[Rope, int]]:
        return (Rotary, (self.kind, self.dim))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of channels (0, 1), (2, 3), ... of x (B, L, E) by a table (L, E / 2, 2) or (B, L, E / 2, 2).

    Returns float32, or float64 for float64.
    """
    pairs = widened(x).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    if torch.compiler.is_compiling():  # what a compiler fuses; complex numbers it hands back to torch
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    # As a product of complex numbers it is one pass over memory; with the formula above it takes five times as long.
    turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2)


class BidirectionalMamba(nn.Module):
    """A selective state space over a sequence, scanned both ways: (B, L, dim) to (B, L, dim).

    The two directions share the projections into and out of the inner width and the gate; convolution, step sizes,
    B, C, A and D are their own (``_b`` for the one that scans backwards). dt_proj's bias is added inside the scan.

    Args:
        dim: width of the tokens.
        d_state: states N per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner width over ``dim``.
        dt_rank: rank of the step sizes; None for ceil(dim / 16).
        divide_output: take the mean of the two directions instead of their sum.
        out_scale: factor on the initial weights of the projection out; 1 / sqrt(depth) keeps the sum of many blocks
            at the size of one.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        divide_output: bool = True,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.d_state, self.dt_rank, self.divide_output, self.out_scale = d_state, rank, divide_output, out_scale
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        initialize(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what has a scheme of its own (Gu & Dao 2023), alike in both directions.

        A = -1 ... -N, D = 1, steps between 0.001 and 0.1, evenly in their logarithm. (The reference's own start leaves
        the backward direction's steps, and in pre-training both, at softplus(0) = 0.69.)
        """
        states = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        for log, skip, steps in ((self.A_log, self.D, self.dt_proj), (self.A_b_log, self.D_b, self.dt_proj_b)):
            log.copy_(states.log().expand_as(log))
            nn.init.ones_(skip)
            nn.init.uniform_(steps.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = torch.empty_like(steps.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            steps.bias.copy_(dt + (-torch.expm1(-dt)).log())  # the inverse of softplus
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.mul_(self.out_scale)

    def no_weight_decay(self) -> set[str]:
        """Decay would pull A towards -1 and cut the skip connection."""
        return {"A_log", "D", "A_b_log", "D_b"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) to (B, L, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, inner) each
        forth = self._direction(x, z, self.A_log, self.D, self.conv1d, self.x_proj, self.dt_proj, False)
        back = self._direction(x, z, self.A_b_log, self.D_b, self.conv1d_b, self.x_proj_b, self.dt_proj_b, True)
        out = self.out_proj(forth + back)
        return out * 0.5 if self.divide_output else out  # type: ignore[no-any-return]

    def _direction(
        self,
        x: Tensor,
        z: Tensor,
        log: Tensor,
        skip: Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        reverse: bool,
    ) -> Tensor:
        """One direction, gated: (B, L, inner)."""
        u = causal_conv1d(x.transpose(1, 2), conv.weight.squeeze(1), conv.bias, "silu", reverse)
        dt, b, c = x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y: Tensor = selective_scan(
            u,
            F.linear(dt, dt_proj.weight).transpose(1, 2),
            -widened(log).exp(),
            b.transpose(1, 2),
            c.transpose(1, 2),
            D=skip,
            z=z.transpose(1, 2),
            delta_bias=dt_proj.bias,
            delta_softplus=True,
            reverse=reverse,
        )
        return y.transpose(1, 2)


class MambaBlock(nn.Module):
    """Add, norm, mix: the tokens go out beside the stream that they are still to be added to, which stays float32.

    Args:
        dim: width of the tokens.
        d_state: states per channel; likewise ``d_conv``, ``expand``, ``divide_output`` and ``out_scale``, see
            :class:`BidirectionalMamba`.
        norm_eps: epsilon of the norm.
        drop_path: rate at which the mixer's output is dropped. (The reference drops it where the next block adds it,
            which is why its list of rates is shifted by one and one more stands before the last norm.)
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        divide_output: bool = True,
        out_scale: float = 1.0,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.mixer = BidirectionalMamba(dim, d_state, d_conv, expand, divide_output=divide_output, out_scale=out_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, dim) and the stream, None for an empty one; returns the mixer's output and the stream."""
        residual = widened(hidden if residual is None else hidden + residual)
        return self.drop_path(self.mixer(self.norm(residual))), residual


def advance(
    block: nn.Module,
    hidden: Tensor,
    residual: Tensor | None,
    table: Tensor | None,
    rope_residual: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate by ``table``, then run a :class:`MambaBlock`; ``recompute`` both in the backward pass if asked.

    With ``rope_residual`` the stream is turned as well, before every block anew.
    """
    if residual is not None and (rope_residual or table is None):
        # A rotation is linear: one of the sum instead of two. And for the backward pass one tensor is kept, not two.
        hidden, residual = hidden + residual, None
    if recompute and torch.is_grad_enabled():
        return checkpoint(_turn_and_run, block, hidden, residual, table, use_reentrant=False)
    return _turn_and_run(block, hidden, residual, table)


def _turn_and_run(
    block: nn.Module, hidden: Tensor, residual: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    hidden = hidden if table is None else rotate(hidden, table)
    return block(hidden, residual)  # type: ignore[no-any-return]


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters of a model's mixers that optimisers leave undecayed."""
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, BidirectionalMamba)}
    return {f"{name}.{parameter}" for name, mixer in mixers.items() for parameter in mixer.no_weight_decay()}
