"""Bidirectional Mamba on sequences of tokens, channels last: norm, rotary positions, mixer and block.

The mixer is Vision Mamba's "v2" (Zhu et al. 2024, https://arxiv.org/abs/2401.09417) as 3D Mamba MAE uses it (Hu et al.
2024, https://arxiv.org/abs/2409.07746), with the parameter names of its published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medgmae.layers.blocks import DropPath, check_eps, initialize
from medgmae.layers.patches import Shape
from medgmae.layers.rope import Rope, Rotary, rotate, widened
from medgmae.ops import causal_conv1d, selective_scan


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis, with statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        check_eps(eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """A norm starts with unit weights."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in the dtype of the weight."""
        x = widened(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


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


class MambaStack(nn.ModuleList):
    """Mamba blocks one after the other, with rotary positions before each: what a Vim and its decoder share.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        d_state: states per channel; likewise ``expand`` and ``divide_output``, see :class:`BidirectionalMamba`.
        norm_eps: epsilon of the norms.
        drop_path_rates: of the blocks; None for 0.
        rope: rotary positions, see :class:`~medgmae.layers.rope.Rotary`; None for none.
        rope_residual: turn the residual stream too before every block.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        divide_output: bool = True,
        norm_eps: float = 1e-5,
        drop_path_rates: Sequence[float] | None = None,
        rope: Rope | None = "axial",
        rope_residual: bool = True,
    ) -> None:
        super().__init__(
            MambaBlock(
                dim,
                d_state,
                expand=expand,
                divide_output=divide_output,
                out_scale=depth**-0.5,
                norm_eps=norm_eps,
                drop_path=rate,
            )
            for rate in drop_path_rates or [0.0] * depth
        )
        self.rope, self.rope_residual = rope, rope_residual
        self._rotary = None if rope is None else Rotary(rope, dim)

    def rotations(self, tokens: Tensor, grid: Shape, places: Tensor | None) -> Tensor | None:
        """Rotations of a sequence (B, L, dim): (L, dim / 2, 2) or, where samples differ, (B, L, dim / 2, 2).

        Args:
            tokens: the sequence.
            grid: of the patches.
            places: (1 or B, L) long, raster number of each token's patch, prod(grid) for a token without a place; None
                for all patches in raster order.
        """
        if self._rotary is None:
            return None
        table = self._rotary.table(grid, tokens.shape[1], tokens)
        if self.rope == "sequence":
            return table
        return table[:-1] if places is None else table[places]

    def scan(
        self,
        tokens: Tensor,
        table: Tensor | None,
        taps: Sequence[int] = (),
        depth: int | None = None,
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Run the blocks over a sequence (B, L, dim).

        Args:
            tokens: the sequence.
            table: its :meth:`rotations`.
            taps: numbers of blocks.
            depth: how many blocks to run; None for all.
            recompute: run the blocks again in the backward pass instead of keeping their activations.

        Returns:
            what the last mixer returns; the stream that it is still to be added to (None without blocks); and the
            streams, with the block's output added, after the blocks ``taps``.
        """
        hidden, residual = tokens, None
        tapped: dict[int, Tensor] = {}
        for i, block in enumerate(self):
            if i == depth:
                break
            if residual is not None and (self.rope_residual or table is None):
                # A rotation is linear: one of the sum instead of two. And the backward pass keeps one tensor, not two.
                hidden, residual = hidden + residual, None
            if recompute and torch.is_grad_enabled():
                hidden, residual = checkpoint(_turn_and_run, block, hidden, residual, table, use_reentrant=False)
            else:
                hidden, residual = _turn_and_run(block, hidden, residual, table)
            if i in taps:
                tapped[i] = hidden + residual
        return hidden, residual, tapped


def _turn_and_run(
    block: nn.Module, hidden: Tensor, residual: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    hidden = hidden if table is None else rotate(hidden, table)
    return block(hidden, residual)  # type: ignore[no-any-return]
