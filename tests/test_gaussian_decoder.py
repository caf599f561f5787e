"""The four Gaussian decoders: what the heads mean, how they start, what the levels are relative to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomize
from torch import Tensor
from torch.nn import functional as F

import medgmae
from medgmae import GaussianDecoder
from medgmae.models.gaussian_decoder import MIN_SCALE, even_points

SMALL = {"in_dim": 10, "num_gaussians": 4, "embed_dim": 12, "depth": 4, "num_heads": 2}
TOKENS = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))


def decoder(**options: Any) -> GaussianDecoder:
    torch.manual_seed(0)
    return randomize(GaussianDecoder(**{**SMALL, **options})).eval()  # type: ignore[return-value]


def features(model: GaussianDecoder, blocks: int | None = None) -> Tensor:
    """The queries after so many blocks and the last norm, by hand."""
    x = model.embed(TOKENS)
    x = torch.cat([x[:, :1], model.query_tokens.expand(2, -1, -1), x[:, 1:]], 1)
    for block in model.blocks[:blocks]:
        x = block(x)
    return model.norm(x)[:, 1 : 1 + model.num_gaussians]


def head(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def level0(model: Any, x: Tensor) -> list[Tensor]:
    """Means, scales, quats and unscaled densities of the base heads."""
    return [
        head(model.position_head, x).sigmoid(),
        head(model.scale_head, x).sigmoid(),
        F.normalize(head(model.rotation_head, x), dim=-1),
        head(model.density_head, x).sigmoid()[..., 0],
    ]


def assert_gaussians(found: medgmae.Gaussians, expected: list[Tensor]) -> None:
    for ours, theirs in zip(found.tensors(), [*expected[:3], 0.1 * expected[3]], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_standard_is_four_heads_on_the_queries() -> None:
    model = decoder()
    assert_gaussians(model(TOKENS), level0(model, features(model)))
    bright = decoder(density_scale=1.0)(TOKENS)
    torch.testing.assert_close(bright.densities, 10 * model(TOKENS).densities)


@pytest.mark.parametrize(
    ("kind", "groups", "shrink", "per_query"),
    [("residual", {"residual": 13}, [0.0], 14), ("hierarchical", {"level1": 12, "level2": 7}, [0.02, 0.05], 20)],
)
def test_residuals_follow_equation_four(kind: str, groups: dict[str, int], shrink: list[float], per_query: int) -> None:
    model: Any = decoder(kind=kind)
    assert model.total_gaussians == 4 * per_query
    x = features(model)
    mean, scale, quat, density = level0(model, x)
    expected = [[mean], [scale], [quat], [density]]
    for (group, count), delta in zip(groups.items(), shrink, strict=True):
        for i in range(count):
            move = {
                what: head(getattr(model, f"{group}_{what}_heads")[i], x).tanh()
                for what in ("position", "scale", "rotation", "density")
            }
            expected[0].append(mean + 0.1 * move["position"])
            expected[1].append((scale + 0.1 * move["scale"] - delta).clamp(min=MIN_SCALE))
            expected[2].append(F.normalize(quat + 0.5 * move["rotation"], dim=-1))
            expected[3].append(density + 0.5 * move["density"][..., 0])
    found = model(TOKENS)
    assert_gaussians(found, [torch.cat(parts, 1) for parts in expected])
    assert found.means.shape[1] == model.total_gaussians


def test_cgs_reads_each_level_a_quarter_later() -> None:
    model: Any = decoder(kind="cgs", depth=12)
    assert model.taps == (2, 5, 8, 11)
    assert decoder(kind="cgs", depth=16).taps == (3, 7, 11, 15)
    assert model.total_gaussians == 4 * 15
    expected = [[part] for part in level0(model, features(model, 3))]
    for i, count in enumerate((2, 4, 8)):
        x = features(model, 3 * (i + 2))
        for j in range(count):
            parts = {what: getattr(model, f"cgs{i + 1}_{what}_heads")[j] for what in ("position", "scale")}
            parts |= {what: getattr(model, f"cgs{i + 1}_{what}_heads")[j] for what in ("rotation", "density")}
            expected[0].append(head(parts["position"], x).sigmoid())
            expected[1].append(head(parts["scale"], x).sigmoid())
            expected[2].append(F.normalize(head(parts["rotation"], x), dim=-1))
            expected[3].append(head(parts["density"], x).sigmoid()[..., 0])
    assert_gaussians(model(TOKENS), [torch.cat(parts, 1) for parts in expected])


@pytest.mark.parametrize("kind", ["residual", "hierarchical"])
@torch.no_grad()
def test_scales_stay_positive_and_can_grow_again(kind: str) -> None:
    model: Any = decoder(kind=kind)
    model.scale_head.weight.zero_()
    model.scale_head.bias.fill_(-9.0)  # level 0 is 0.0001 wide
    for name, parameter in model.named_parameters():
        if "scale_heads" in name and name.endswith("bias"):
            parameter.fill_(-5.0)
    with torch.enable_grad():
        scales = model(TOKENS).scales[:, 4:]
        (gradient,) = torch.autograd.grad(
            scales.sum(), model.get_parameter(f"{model.groups[-1].name}_scale_heads.0.bias")
        )
    torch.testing.assert_close(scales, torch.full_like(scales, MIN_SCALE))
    assert (gradient > 0).all()


@pytest.mark.parametrize("kind", ["standard", "residual", "hierarchical", "cgs"])
def test_the_order_of_the_visible_patches_does_not_matter(kind: str) -> None:
    model = decoder(kind=kind)
    swapped = TOKENS[:, [0, 4, 2, 5, 1, 3]]
    for ours, other in zip(model(TOKENS).tensors(), model(swapped).tensors(), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)


def test_ratios_are_options() -> None:
    assert decoder(kind="hierarchical", ratios=[3, 16]).total_gaussians == 80
    assert decoder(kind="residual", ratios=(2,))(TOKENS).means.shape == (2, 12, 3)
    assert decoder(kind="cgs", ratios=(1, 1, 1)).total_gaussians == 16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "nested"}, "'standard', 'residual', 'hierarchical', 'cgs', got 'nested'"),
        ({"kind": "hierarchical", "ratios": (3,)}, r"must be 2 positive numbers \(default \(12, 7\)\), got \(3,\)"),
        ({"kind": "residual", "ratios": (0,)}, "must be 1 positive numbers"),
        ({"ratios": (2,)}, "must be 0 positive numbers"),
        ({"kind": "cgs", "depth": 3}, "after 4 different blocks.* got 3"),
        ({"num_gaussians": 0}, "must be positive, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decoder(**options)


def test_heads_start_as_published() -> None:
    model: Any = GaussianDecoder(96, 512)
    biases = {name: getattr(model, f"{name}_head").bias for name in ("position", "scale", "rotation", "density")}
    for name, value in {"position": 0.0, "scale": -1.386, "rotation": 0.0, "density": -0.405}.items():
        assert torch.equal(biases[name], torch.full_like(biases[name], value))
    assert model.scale_head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for name, width in {"position": 3, "rotation": 4, "density": 1}.items():
        bound = math.sqrt(6 / (384 + width))  # Xavier
        assert 0.95 * bound < getattr(model, f"{name}_head").weight.abs().max() <= bound
    assert model.query_tokens.std().item() == pytest.approx(0.02, rel=0.01)
    gaussians = model(torch.randn(1, 55, 96))
    assert gaussians.scales.mean().item() == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(gaussians.quats.norm(dim=-1), torch.ones(1, 512))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["residual", "hierarchical", "cgs"])
def test_additional_gaussians_start_dim(kind: str) -> None:
    model = GaussianDecoder(96, 64, kind=kind, depth=4)  # type: ignore[arg-type]
    densities = model(torch.randn(1, 55, 96)).densities[0]
    assert 0.02 < densities[:64].mean() < 0.06
    assert densities[64:].sum().abs() < 2 * densities[:64].sum()
    assert densities[64:].any()  # or they would get no gradient


def cells(means: Tensor) -> Tensor:
    """How many of the points (K, 3) lie in each of 4x4x4 cells."""
    index = (means * 4).long().clamp(0, 3)
    return torch.bincount(index[:, 0] * 16 + index[:, 1] * 4 + index[:, 2], minlength=64)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "residual", "hierarchical", "cgs"])
def test_spread_fills_the_volume_where_the_published_start_does_not(kind: str) -> None:
    options = {"in_dim": 96, "num_gaussians": 512, "kind": kind, "depth": 12 if kind == "cgs" else 8}
    tokens = torch.randn(1, 55, 96)
    spread, published = (GaussianDecoder(**options, spread=s)(tokens).means[0] for s in (True, False))
    assert spread.std(0).min() > 0.27  # of an even spread: 0.289
    assert (cells(spread[:512]) >= 2).all()
    assert (cells(spread) > 0).all()
    if kind == "standard":
        assert published.std(0).max() < 0.2
        assert (cells(published) == 0).sum() > 30


@pytest.mark.parametrize("count", [1, 7, 64, 512])
def test_even_points_are_even(count: int) -> None:
    points = even_points(count)
    assert points.shape == (count, 3)
    assert (points > 0).all()
    assert (points < 1).all()
    if count >= 64:
        assert points.mean(0).sub(0.5).abs().max() < 0.03
        apart = torch.cdist(points, points) + 9 * torch.eye(count)
        assert apart.min() > 0.4 * count ** (-1 / 3)  # a cubic lattice would have count ** (-1 / 3)


NAME = "gmae_vit_nano_patch8_32"


def start_of(model: Any) -> dict[str, Tensor]:
    """What a fresh decoder has, whatever the random numbers."""
    names = {"position_bias", *(f"{n}_head.bias" for n in ("position", "scale", "rotation", "density"))}
    return {name: value for name, value in model.decoder.state_dict().items() if name in names}


def test_a_decoder_that_the_file_lacks_starts_as_a_new_one() -> None:
    encoder = randomize(medgmae.create_model("vit_nano_patch8_32"))
    model: Any = medgmae.create_model(NAME, pretrained=encoder.state_dict(), strict=False)
    assert torch.equal(model.encoder.cls_token, encoder.cls_token)
    assert not any(parameter.is_meta for parameter in model.parameters())
    expected = start_of(medgmae.create_model(NAME))
    assert len(expected) == 5
    for name, value in start_of(model).items():
        assert torch.equal(value, expected[name]), name
    assert model.decoder.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.decoder.scale_head.weight.std().item() == pytest.approx(0.01, rel=0.3)


def test_offsets_that_the_file_lacks_leave_the_rest_as_loaded(tmp_path: Path) -> None:
    plain: Any = randomize(medgmae.create_model(NAME, spread=False))
    medgmae.save_pretrained(plain, tmp_path)
    model: Any = medgmae.create_model(NAME, pretrained=tmp_path, strict=False)
    assert model.load_report.missing == ["decoder.position_bias"]
    assert torch.equal(model.decoder.position_bias, even_points(64).logit().unsqueeze(0))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
