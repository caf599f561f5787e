"""A transformer that turns visible tokens into 3D Gaussians: MedGMAE's decoder and its three extensions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.gaussians.rendering import Gaussians
from medgmae.layers.blocks import exact_linear, initialize, run_block, vit_block
from medgmae.models.parts import Part, Readable, Setting, count_blocks, given
from medgmae.models.registry import register_class

Kind = Literal["standard", "residual", "hierarchical", "cgs"]

# Output widths of the four heads.
HEADS = {"position": 3, "scale": 3, "rotation": 4, "density": 1}
# Published start of the biases: sigmoid(-1.386) = 0.2, sigmoid(-0.405) = 0.4.
SCALE_BIAS = -1.386
DENSITY_BIAS = -0.405

_HEAD = re.compile(rf"(?:(\w+?\d*)_)?(?:{'|'.join(HEADS)})_heads?\.(\d+)?")

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


class HeadGroup(NamedTuple):
    """How many heads of each kind a level has, and their names in a state dictionary.

    name: of the group; None for level 0, which has one head of each kind.
    heads: of each kind.
    """

    name: str | None
    heads: int

    def attribute(self, what: str) -> str:
        """Where the decoder keeps the heads that give ``what``."""
        return f"{what}_head" if self.name is None else f"{self.name}_{what}_heads"


def head_groups(kind: Kind, ratios: Sequence[int]) -> tuple[HeadGroup, ...]:
    """Level 0 and the groups that a kind adds, with ``ratios`` heads each."""
    added = (HeadGroup(GROUPS[kind].format(i + 1), count) for i, count in enumerate(ratios))
    return (HeadGroup(None, 1), *added)


class Start(NamedTuple):
    """bias: first value of every bias of a head. std: spread of its first weights; None for Xavier-uniform ones."""

    bias: float
    std: float | None = None


def first_values(kind: Kind, ratios: Sequence[int], spread: bool) -> list[dict[str, Start]]:
    """The starts of every level's heads, level 0 first. Small weights leave a quantity where its bias puts it."""
    place = 0.01 if spread else None
    level0 = {
        "position": Start(0.0, place),
        "scale": Start(SCALE_BIAS, 0.01),
        "rotation": Start(0.0),
        "density": Start(DENSITY_BIAS, 0.001 if ratios else None),
    }
    if not ratios:
        return [level0]
    # 20 Gaussians in the place of one would be 20 times too bright.
    brightness = 1 / (1 + math.exp(-DENSITY_BIAS))
    if kind == "cgs":  # together as bright as level 0
        share = brightness / sum(ratios)
        group = {**level0, "density": Start(math.log(share / (1 - share)), 0.001)}
    else:  # around an intensity of 0
        group = dict.fromkeys(HEADS, Start(0.0))
        group["density"] = Start(math.atanh(-brightness / REACH["density"]), 0.001)
    return [level0, *(group for _ in ratios)]


@register_class
class GaussianDecoder(Part, Readable):
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

    FIXED_SIZES = ("decoder_embed_dim", "decoder_depth", "kind")

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
        built = given(locals())
        super().__init__()
        if num_gaussians < 1:
            raise ValueError(f"num_gaussians must be positive, got {num_gaussians}")
        self._built = built
        self.kind, self.ratios = kind, _check_ratios(kind, ratios)
        self.num_gaussians, self.total_gaussians = num_gaussians, num_gaussians * (1 + sum(self.ratios))
        self.density_scale, self.num_prefix_tokens = density_scale, prefix_tokens
        self.grad_checkpointing = False
        self.groups = head_groups(kind, self.ratios)
        self.taps = self._taps(depth)
        self.embed = nn.Linear(in_dim, embed_dim)
        self.query_tokens = nn.Parameter(torch.empty(1, num_gaussians, embed_dim))
        anchors = self.total_gaussians if kind == "cgs" else num_gaussians  # residuals are placed by their base
        self.position_bias = nn.Parameter(torch.empty(1, anchors, 3)) if spread else None
        self.blocks = nn.ModuleList(vit_block(embed_dim, num_heads, mlp_ratio, norm_eps=norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for what, width in HEADS.items():
            for group, starts in zip(self.groups, first_values(kind, self.ratios, spread), strict=True):
                heads = [Head(embed_dim, width, *starts[what]) for _ in range(group.heads)]
                self.add_module(group.attribute(what), heads[0] if group.name is None else nn.ModuleList(heads))
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
        x = torch.cat(
            [x[:, : self.num_prefix_tokens], queries, x[:, self.num_prefix_tokens :]], dim=1
        )  # (B, P + K + n, E)
        levels: list[Gaussians] = []
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, self.grad_checkpointing)
            wanted = [level for level, tap in enumerate(self.taps) if tap == i]
            if wanted:
                queries = self.norm(x[:, self.num_prefix_tokens : self.num_prefix_tokens + self.num_gaussians])
                for level in wanted:
                    levels.append(self._level(level, queries, levels))
        means, scales, quats, densities = Gaussians.concat(levels).tensors()
        return Gaussians(means, scales, quats, densities * self.density_scale)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The options that a decoder's tensors show; None where they are no Gaussian decoder's."""
        heads = [match for name in state if (match := _HEAD.match(name))]
        if "query_tokens" not in state and not heads:
            return None
        groups = {(match[1], match[2] or "") for match in heads if match[1]}
        first = min(groups)[0] if groups else "standard"
        kind = "hierarchical" if first.startswith("level") else "cgs" if first.startswith("cgs") else first
        ratios = [sum(group == name for group, _ in groups) for name in sorted({group for group, _ in groups})]
        bridge, queries = state.get("embed.weight"), state.get("query_tokens")
        return {
            "decoder_embed_dim": None if bridge is None else len(bridge),
            "decoder_depth": count_blocks(state),
            "kind": kind,
            "num_gaussians": None if queries is None or queries.dim() != 3 else queries.shape[1],
            "ratios": tuple(ratios),
        }

    def settings(self) -> dict[str, Setting]:
        """Heads, epsilon, kind, and the factor of the density."""
        return {
            "num_heads": Setting(self._built["num_heads"], "decoder_num_heads"),
            "norm_eps": Setting(self._built["norm_eps"], "norm_eps"),
            "kind": Setting(self.kind, "kind", "lenient"),
            "density_scale": Setting(self.density_scale, "density_scale"),
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def _level(self, level: int, queries: Tensor, levels: list[Gaussians]) -> Gaussians:
        """Gaussians of one level from the queries (B, K, E); 0 is the base, the others are the groups."""
        count = self.groups[level].heads
        raw = self._apply_heads(queries, level)
        if level == 0 or self.kind == "cgs":
            if self.position_bias is not None:
                first = self.num_gaussians * (1 + sum(self.ratios[: level - 1]) if level else 0)
                raw["position"] = raw["position"] + self.position_bias[:, first : first + self.num_gaussians * count]
            return _activate(raw)
        return _displace(levels[0], raw, count, SHRINK[self.kind][level - 1])

    def _apply_heads(self, queries: Tensor, level: int) -> dict[str, Tensor]:
        """The outputs (B, count * K, width) of a level's heads, by one product; in float32 at least."""
        group = self.groups[level]
        heads: list[Any] = []
        for what in HEADS:
            module: Any = getattr(self, group.attribute(what))
            # torch 2.6 compiles this, not `heads += module`
            heads += [module] if group.name is None else [module[i] for i in range(group.heads)]
        weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        # bfloat16 would put a centre a fifth of a voxel of a 96³ crop off.
        values = exact_linear(queries, weight, bias)  # (B, K, 11 * count)
        values = values if values.dtype == torch.float64 else values.float()
        parts = torch.split(values, [group.heads * width for width in HEADS.values()], dim=-1)
        return {
            what: part.reshape(*part.shape[:2], group.heads, width).transpose(1, 2).flatten(1, 2)
            for (what, width), part in zip(HEADS.items(), parts, strict=True)
        }

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
    counts = default if ratios is None else tuple(ratios)
    if len(counts) != len(default) or any(count < 1 for count in counts):
        raise ValueError(
            f"ratios of kind={kind!r} must be {len(default)} positive numbers (default {default}), got {counts}"
        )
    return counts


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
