"""A transformer that turns visible tokens into 3D Gaussians: MedGMAE's decoder and its three extensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.gaussians.rendering import Gaussians
from medgmae.layers.blocks import Block, exact_linear, initialize

Kind = Literal["standard", "residual", "hierarchical", "cgs"]

# Output widths of the four heads.
HEADS = {"position": 3, "scale": 3, "rotation": 4, "density": 1}
# Published start of the biases: sigmoid(-1.386) = 0.2, sigmoid(-0.405) = 0.4.
BIAS = {"position": 0.0, "scale": -1.386, "rotation": 0.0, "density": -0.405}

# Additional Gaussians per query and group of heads. MedGMAE's command line has 13 residuals and the ratios 12 and 7;
# its dead code for "hierarchical" falls back to 3 and 16, the same number in all.
RATIOS: dict[Kind, tuple[int, ...]] = {
    "standard": (),
    "residual": (13,),
    "hierarchical": (12, 7),
    "cgs": (2, 4, 8),  # on top of level 0, which has ratio 1
}
# Names of the groups of heads in a state dictionary. Those of "residual" and "hierarchical" are MedGMAE's.
GROUPS: dict[Kind, str] = {"residual": "residual", "hierarchical": "level{}", "cgs": "cgs{}"}

# Equation 4 of the paper: how far a residual may move each quantity. It states 0.1 for the scale. Position: the same,
# half the scale that Gaussians start with. Intensity and rotation: enough to switch off a Gaussian that starts at 0.4,
# or to turn one by 50 degrees.
REACH = {"position": 0.1, "scale": 0.1, "rotation": 0.5, "density": 0.5}
# ... and by how much each group is smaller than level 0: stated for the two levels of "hierarchical".
SHRINK: dict[Kind, tuple[float, ...]] = {"residual": (0.0,), "hierarchical": (0.02, 0.05)}
# The equation can give a scale of zero or less, which nobody can render. Half a voxel of a 96³ crop.
MIN_SCALE = 0.005


class Head(nn.Module):
    """The weights of a linear layer that starts where its quantity should; the decoder applies several at once.

    Args:
        in_dim: width of the tokens.
        out_dim: width of the quantity.
        bias: first value of every bias.
        std: spread of the first weights; None for Xavier-uniform ones.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: float = 0.0, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim))
        self.first_bias, self.std = bias, std

    def reset_parameters(self) -> None:
        """Initialise weights and biases."""
        if self.std is None:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)
        nn.init.constant_(self.bias, self.first_bias)


class GaussianDecoder(nn.Module):
    """Learned queries read the visible tokens and become Gaussians (MedGMAE, equations 3 to 5).

    The sequence is: prefix tokens, K queries, visible patches in the order of ``Masking.keep``. No position is added
    to it: the patches carry the encoder's. Heads on the K queries give, for level 0,

    - means = sigmoid, scales = sigmoid, quats = normalised, densities = density_scale · sigmoid.

    The other kinds add groups of heads, of which each makes one more Gaussian of every query:

    - "residual": one group of 13, relative to level 0 by equation 4 without its shrinking, from the same queries.
    - "hierarchical": groups of 12 and 7, equation 4: with r = tanh of a head, scale s₀ + 0.1 r - Δ with Δ = 0.02 and
      0.05, position μ₀ + 0.1 r, intensity I₀ + 0.5 r, rotation normalised φ₀ + 0.5 r; always relative to level 0.
      The paper leaves the reach of all but the scale open, and the ratios, see RATIOS and REACH in this module.
      Scales are kept at 0.005 or more; one that is held there still gets the gradient, so that it can grow again.
      A centre may lie up to 0.1 outside of the volume, and an intensity may be negative.
    - "cgs": groups of 2, 4 and 8 with activations as level 0. MedGMAE names blocks 2, 5, 8, 11 and ratios 1, 2, 4, 8
      and nothing else; our reading is coarse to fine: level 0 reads the queries after the first quarter of the blocks,
      each group after a further quarter, all through the last norm.

    Level 0 starts as published, with smaller weights of the density in the other kinds. What these add starts dim, so
    that the whole is about twice as bright at most.

    Args:
        in_dim: width of the encoder's tokens.
        num_gaussians: number of queries K; the number of Gaussians is K · (1 + sum(ratios)).
        embed_dim: own width.
        depth: number of blocks.
        num_heads: attention heads per block.
        kind: "standard", "residual", "hierarchical" or "cgs".
        ratios: Gaussians per query and group; None for those above.
        density_scale: factor of the density; MedGMAE's renderer has 0.1.
        spread: start with positions that fill the volume evenly, by a learned offset ``position_bias`` for each
            Gaussian that is not relative to another. As published, all positions begin near one point.
        mlp_ratio: hidden width of a block's MLP over ``embed_dim``.
        prefix_tokens: tokens in front of the patches that the encoder hands over.
        norm_eps: epsilon of every layer norm.

    Raises:
        ValueError: an unknown kind, ratios that it does not have, fewer blocks than "cgs" reads, or no Gaussians.
    """

    def __init__(
        self,
        in_dim: int,
        num_gaussians: int = 512,
        embed_dim: int = 384,
        depth: int = 8,
        num_heads: int = 12,
        *,
        kind: Kind = "standard",
        ratios: Sequence[int] | None = None,
        density_scale: float = 0.1,
        spread: bool = False,
        mlp_ratio: float = 4.0,
        prefix_tokens: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_gaussians < 1:
            raise ValueError(f"num_gaussians must be positive, got {num_gaussians}")
        self.kind, self.ratios = kind, _check_ratios(kind, ratios)
        self.num_gaussians, self.total_gaussians = num_gaussians, num_gaussians * (1 + sum(self.ratios))
        self.density_scale, self.prefix_tokens = density_scale, prefix_tokens
        self.taps = self._taps(depth)
        self.embed = nn.Linear(in_dim, embed_dim)
        self.query_tokens = nn.Parameter(torch.empty(1, num_gaussians, embed_dim))
        anchors = self.total_gaussians if kind == "cgs" else num_gaussians  # residuals are placed by their base
        self.position_bias = nn.Parameter(torch.empty(1, anchors, 3)) if spread else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for what in HEADS:
            setattr(self, f"{what}_head", self._head(what, embed_dim, group=False))
            for group, count in zip(self._groups(), self.ratios, strict=True):
                made = (self._head(what, embed_dim, group=True) for _ in range(count))
                setattr(self, f"{group}_{what}_heads", nn.ModuleList(made))
        self.apply(initialize)

    def reset_parameters(self) -> None:
        """Initialise the queries and, where they have any, their places."""
        nn.init.normal_(self.query_tokens, std=0.02)
        if self.position_bias is not None:
            with torch.no_grad():
                self.position_bias.copy_(even_points(self.position_bias.shape[1]).logit().unsqueeze(0))

    def forward(self, tokens: Tensor) -> Gaussians:
        """Decode.

        Args:
            tokens: (B, P + n, in_dim), prefix tokens, then visible patches in any order.

        Returns:
            K · (1 + sum(ratios)) Gaussians per sample, in float32 or, for a model in it, float64: those of level 0,
            then those of each head of each group in turn, K each in the order of the queries.
        """
        x = self.embed(tokens)
        queries = self.query_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([x[:, : self.prefix_tokens], queries, x[:, self.prefix_tokens :]], dim=1)  # (B, P + K + n, E)
        levels: list[Gaussians] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            wanted = [level for level, tap in enumerate(self.taps) if tap == i]
            if wanted:
                queries = self.norm(x[:, self.prefix_tokens : self.prefix_tokens + self.num_gaussians])
                for level in wanted:
                    levels.append(self._level(level, queries, levels))
        means, scales, quats, densities = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return Gaussians(means, scales, quats, densities * self.density_scale)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave undecayed."""
        return {"query_tokens", "position_bias"}

    def _level(self, level: int, queries: Tensor, levels: list[Gaussians]) -> Gaussians:
        """Gaussians of one level from the queries (B, K, E); 0 is the base, the others are the groups."""
        count = self.ratios[level - 1] if level else 1
        raw = self._apply_heads(queries, level, count)
        if level == 0 or self.kind == "cgs":
            if self.position_bias is not None:
                first = self.num_gaussians * (1 + sum(self.ratios[: level - 1]) if level else 0)
                raw["position"] = raw["position"] + self.position_bias[:, first : first + self.num_gaussians * count]
            return _activate(raw)
        return _displace(levels[0], raw, count, SHRINK[self.kind][level - 1])

    def _apply_heads(self, queries: Tensor, level: int, count: int) -> dict[str, Tensor]:
        """The outputs (B, count * K, width) of a level's heads, by one product; in float32 at least."""
        heads: list[Any] = []
        for what in HEADS:
            if level:
                group = getattr(self, f"{self._groups()[level - 1]}_{what}_heads")
                heads += [group[i] for i in range(count)]  # torch 2.6 compiles this, not `heads += group`
            else:
                heads.append(getattr(self, f"{what}_head"))
        weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        # bfloat16 would put a centre a fifth of a voxel of a 96³ crop off.
        values = exact_linear(queries, weight, bias)  # (B, K, 11 * count)
        values = values if values.dtype == torch.float64 else values.float()
        parts = torch.split(values, [count * width for width in HEADS.values()], dim=-1)
        return {
            what: part.reshape(*part.shape[:2], count, width).transpose(1, 2).flatten(1, 2)
            for (what, width), part in zip(HEADS.items(), parts, strict=True)
        }

    def _groups(self) -> list[str]:
        return [GROUPS[self.kind].format(i + 1) for i in range(len(self.ratios))] if self.ratios else []

    def _head(self, what: str, embed_dim: int, group: bool) -> Head:
        """A head of level 0 or of a group, with its start."""
        bias, residual = BIAS[what], group and self.kind != "cgs"
        # Small weights leave the scale, and positions that are spread, where their biases put them.
        small = what == "scale" or (what == "position" and self.position_bias is not None)
        std = 0.01 if small else None
        if residual:
            bias, std = 0.0, None
        if self.ratios and what == "density":
            # 20 Gaussians in the place of one would be 20 times too bright. Residuals start around an intensity of 0,
            # the groups of "cgs" so that they are together as bright as level 0.
            std, level0 = 0.001, 1 / (1 + math.exp(-BIAS[what]))
            share = level0 / sum(self.ratios)
            if group:
                bias = math.atanh(-level0 / REACH[what]) if residual else math.log(share / (1 - share))
        return Head(embed_dim, HEADS[what], bias, std)

    def _taps(self, depth: int) -> tuple[int, ...]:
        """For each level the block after which its heads read."""
        levels = 1 + len(self.ratios)
        if self.kind != "cgs":
            return (depth - 1,) * levels
        if depth < levels:
            raise ValueError(
                f"kind='cgs' reads after {levels} different blocks: depth must be that or more, got {depth}"
            )
        return tuple((i + 1) * depth // levels - 1 for i in range(levels))


def _check_ratios(kind: Any, ratios: Sequence[int] | None) -> tuple[int, ...]:
    if kind not in RATIOS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    default = RATIOS[kind]
    found = default if ratios is None else tuple(ratios)
    if len(found) != len(default) or any(ratio < 1 for ratio in found):
        raise ValueError(
            f"ratios of kind={kind!r} must be {len(default)} positive numbers (default {default}), got {found}"
        )
    return found


def even_points(count: int) -> Tensor:
    """(count, 3) float32 points in the open unit cube that fill it evenly, the same every time.

    The additive sequence k · (1/g, 1/g², 1/g³) modulo 1 with g⁴ = g + 1 (M. Roberts, "The unreasonable effectiveness of
    quasirandom sequences", 2018): unlike a lattice it takes any count.
    """
    g = 1.2207440846057596
    step = torch.tensor([g**-1, g**-2, g**-3], dtype=torch.float64, device="cpu")
    points = (0.5 + torch.arange(count, dtype=torch.float64, device="cpu").unsqueeze(1) * step) % 1
    return points.clamp(1e-3, 1 - 1e-3).float()


def _activate(raw: dict[str, Tensor]) -> Gaussians:
    return Gaussians(
        raw["position"].sigmoid(),
        raw["scale"].sigmoid(),
        F.normalize(raw["rotation"], dim=-1, eps=1e-12),
        raw["density"].squeeze(-1).sigmoid(),
    )


def _displace(base: Gaussians, raw: dict[str, Tensor], count: int, shrink: float) -> Gaussians:
    """Equation 4 of the paper: ``count`` Gaussians near each of level 0."""
    moved = {what: REACH[what] * value.tanh() for what, value in raw.items()}
    means, scales, quats = (value.repeat(1, count, 1) for value in (base.means, base.scales, base.quats))
    scales = scales + moved["scale"] - shrink
    scales = scales + (scales.clamp(min=MIN_SCALE) - scales).detach()  # the value is held, the gradient is not
    return Gaussians(
        means + moved["position"],
        scales,
        F.normalize(quats + moved["rotation"], dim=-1, eps=1e-12),
        base.densities.repeat(1, count) + moved["density"].squeeze(-1),
    )
