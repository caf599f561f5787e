"""Primus: rotations, autoencoders, the dense head, the projection; and rows of heads in another order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small_models import randomize, small, volume
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints.heads import from_axes, from_halves, permute_heads
from medgmae.layers.dense import PatchDecode
from medgmae.layers.projection import Projection
from medgmae.layers.rope import PRIMUS, HeadRope, Rotary, rotate
from medgmae.models.mae_primus import masked_primus, simmim_primus
from medgmae.models.primus import Primus

GRID = (3, 3, 2)
SIZES: dict[str, Any] = {"img_size": (12, 12, 8), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def by_hand(x: Tensor, rope: HeadRope, grid: tuple[int, ...]) -> Tensor:
    """Tokens (N, d) of one head in raster order, turned pair by pair."""
    turned, bands = x.clone(), x.shape[1] // 6
    for row, place in enumerate(itertools.product(*map(range, grid))):
        for axis, band in itertools.product(range(3), range(bands)):
            t: float = place[axis]
            if rope.coordinates == "unit":
                t = 2 * math.pi * (2 * (t + 0.5) / grid[axis] - 1)
            angle = t * rope.base ** (-rope.exponent * band / bands)
            a, b = x[row, 2 * (axis * bands + band)].item(), x[row, 2 * (axis * bands + band) + 1].item()
            turned[row, 2 * (axis * bands + band)] = a * math.cos(angle) - b * math.sin(angle)
            turned[row, 2 * (axis * bands + band) + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


@pytest.mark.parametrize("rope", [PRIMUS, HeadRope("unit", 100.0), HeadRope("unit", 100.0, 2 / 3)], ids=str)
def test_rotations_by_hand(rope: HeadRope) -> None:
    grid = (2, 3, 4)
    x = torch.randn(24, 18)
    turned = rotate(x, Rotary(rope, 18).turns(grid, 0, None, x))
    torch.testing.assert_close(turned, by_hand(x, rope, grid), atol=1e-5, rtol=1e-4)


def test_tables_in_bfloat16_are_other_tables() -> None:
    exact = HeadRope("unit", 100.0).angles(GRID, 12)
    rough = HeadRope("unit", 100.0, dtype=torch.bfloat16).angles(GRID, 12)
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < (exact - rough.float()).abs().max() < 0.05


def test_prefix_tokens_are_not_turned_and_visible_ones_keep_their_place() -> None:
    x, rotary = torch.randn(2, 1, 5, 12), Rotary(PRIMUS, 12)
    keep = torch.tensor([[7, 0, 17], [3, 4, 5]])
    turned = rotate(x, rotary.turns(GRID, 2, keep, x))
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    table = rotary.turns(GRID, 0, None, x)
    torch.testing.assert_close(turned[0, :, 2:], rotate(x[0, :, 2:], table[keep[0]]))


def test_attention_sees_distances_only() -> None:
    """What two tokens are to each other does not change when both move by the same number of patches."""
    q, k = torch.randn(12).double(), torch.randn(12).double()
    table = Rotary(PRIMUS, 12).turns((5, 6, 7), 0, None, q).unflatten(0, (5, 6, 7))
    here = rotate(q, table[0, 1, 2]) @ rotate(k, table[2, 0, 3])
    there = rotate(q, table[2, 4, 5]) @ rotate(k, table[4, 3, 6])
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert (here - rotate(q, table[0, 1, 2]) @ rotate(k, table[3, 0, 3])).abs() > 1e-3


def test_heads_that_cannot_be_turned_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 6, got 16"):
        Primus(**{**SIZES, "embed_dim": 32})
    with pytest.raises(ValueError, match=r"embed_dim \(=24\) must be divisible"):
        Primus(**{**SIZES, "num_heads": 5})


def test_rows_of_rotated_halves_become_pairs() -> None:
    """Queries and keys of a model that rotates halves, with permuted rows, give the scores that it has."""
    heads, size, x = 2, 12, torch.randn(18, 24)
    query, key = torch.randn(24, 24), torch.randn(24, 24)
    angles = PRIMUS.angles(GRID, size)

    def halves(y: Tensor) -> Tensor:
        a, b = y.unflatten(-1, (heads, size)).chunk(2, -1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def pairs(weight: Tensor) -> Tensor:
        turned = x @ permute_heads(weight, from_halves(size)).T
        return rotate(turned.unflatten(-1, (heads, size)), torch.stack([angles.cos(), angles.sin()], -1)[:, None])

    expected = torch.einsum("nhd,mhd->hnm", halves(x @ query.T), halves(x @ key.T))
    torch.testing.assert_close(torch.einsum("nhd,mhd->hnm", pairs(query), pairs(key)), expected, atol=1e-3, rtol=1e-4)


def test_exchanging_axes_twice_is_nothing() -> None:
    rows = from_axes(12, (1, 0, 2))
    assert rows == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]
    weight = torch.randn(24, 5)
    assert torch.equal(permute_heads(permute_heads(weight, rows), rows), weight)
    assert torch.equal(permute_heads(weight[:, 0], rows), permute_heads(weight, rows)[:, 0])
    assert from_axes(18, (2, 0, 1)) == [*range(6, 18), *range(6)]


@pytest.mark.parametrize("patch", [(8, 8, 8), (2, 4, 4), (3, 3, 3)], ids=str)
def test_the_dense_head_is_its_convolutions(patch: tuple[int, int, int]) -> None:
    head: Any = randomize(PatchDecode(24, 2, patch))
    tokens, grid = torch.randn(2, 12, 24), (2, 3, 2)
    x = tokens.mT.unflatten(2, grid)
    for step, conv in enumerate(head.convs):
        x = conv(x)
        if step < len(head.norms):
            norm = head.norms[step]
            x = nn.functional.gelu(norm(x.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(medgmae.unpatchify(head(tokens), patch, grid, 2), x, atol=1e-5, rtol=1e-4)


def test_widths_of_the_dense_head_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert [conv.in_channels for conv in PatchDecode(864, 1, (8, 8, 8)).convs] == [864, 112, 16]


def test_a_simmim_does_not_read_hidden_patches_and_a_mae_does_not_either() -> None:
    for make in (simmim_primus, masked_primus):
        more = {"decoder_num_heads": 2} if make is masked_primus else {}
        model: Any = randomize(make(**SIZES, **more)).eval()  # type: ignore[operator]
        x = torch.randn(1, 1, 12, 12, 8)
        masking = medgmae.random_masking(1, 18, 0.5, generator=torch.Generator().manual_seed(3))
        patches = medgmae.patchify(x, 4)
        other = medgmae.unpatchify(patches * (1 - masking.mask.unsqueeze(-1)), 4, GRID, 1)
        assert torch.equal(model(x, masking).pred, model(other, masking).pred)
        seen = medgmae.unpatchify(patches * masking.mask.unsqueeze(-1), 4, GRID, 1)
        assert not torch.allclose(model(x, masking).pred, model(seen, masking).pred, atol=1e-4)


def test_the_loss_of_the_authors_trainer() -> None:
    model: Any = randomize(masked_primus(**SIZES, decoder_num_heads=2)).eval()
    x = torch.randn(2, 1, 12, 12, 8)
    masking = medgmae.random_masking(2, 18, 0.5)
    out = model(x, masking)
    error = (out.pred - medgmae.patchify(x, 4)).square().mean(-1)
    torch.testing.assert_close(out.loss, (error * masking.mask).sum() / masking.mask.sum())
    model.loss_patches = "transposed"
    places = torch.arange(18).reshape(GRID).transpose(0, 1).flatten()
    swapped = masking.mask[:, places]
    torch.testing.assert_close(model(x, masking).loss, (error * swapped).sum() / swapped.sum())
    assert "loss_patches" in model.options()
    x = torch.randn(1, 1, 8, 12, 8)
    with pytest.raises(ValueError, match=r"exchanges the first two axes of the grid, which is \(2, 3, 2\)"):
        model(x)
    with pytest.raises(ValueError, match="loss_patches must be"):
        masked_primus(**SIZES, decoder_num_heads=2, loss_patches="visible")  # type: ignore[arg-type]


def test_registers_stand_in_front() -> None:
    model: Any = randomize(Primus(**SIZES, registers=3, pos_embed="none")).eval()
    x = torch.randn(2, 1, 12, 12, 8)
    assert model.forward_features(x).shape == (2, 21, 24)
    assert model(x).shape == (2, 24)
    assert model.num_prefix_tokens == 3
    assert model.read_sizes(model.state_dict())["registers"] == 3
    decoder: Any = randomize(masked_primus(**SIZES, decoder_num_heads=2, registers=3))
    assert decoder(x).pred.shape == (2, 18, 64)


def test_projection_by_hand() -> None:
    projection: Any = randomize(Projection(24, 12, 2))
    reference = nn.MultiheadAttention(12, 2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(projection.qkv.weight)
        reference.in_proj_bias.copy_(projection.qkv.bias)
        reference.out_proj.weight.copy_(projection.out.weight)
        reference.out_proj.bias.copy_(projection.out.bias)
    tokens = torch.randn(2, 7, 24)
    projected = projection(tokens)
    expected = reference(projected.mean(1, keepdim=True), projected, projected, need_weights=False)[0][:, 0]
    torch.testing.assert_close(projection.pool(projected), expected, atol=1e-5, rtol=1e-4)
    one = projected[:, :1]
    torch.testing.assert_close(projection.dense(one)[:, 0], projection.pool(one), atol=1e-5, rtol=1e-4)
    scores = projection.scores(projection.dense(projected), torch.randn(3, 12))
    assert scores.shape == (2, 7, 3)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 7))


def test_projected_features_of_a_scan() -> None:
    model: Any = randomize(Primus(**SIZES, pos_embed="none", projection_dim=12, projection_heads=2)).eval()
    scan = medgmae.Volume(torch.randn(1, 12, 20, 8))
    found = medgmae.extract_features(model, scan, head="projected", window=None)
    with torch.no_grad():
        projected = model.projection(model.forward_features(scan.tensor))
        torch.testing.assert_close(found.pooled, model.projection.pool(projected)[0], atol=1e-5, rtol=1e-4)
        dense = model.projection.dense(projected)[0].mT.unflatten(1, (3, 5, 2))
    torch.testing.assert_close(found.map.data, dense, atol=1e-5, rtol=1e-4)
    alone = medgmae.extract_features(model, scan, head="projected", want_map=False)
    windows = medgmae.extract_features(model, scan, head="projected")
    assert alone.map is None
    assert torch.equal(alone.pooled, windows.pooled)
    assert windows.map.data.shape == (12, 3, 5, 2)
    with pytest.raises(ValueError, match="for a model with a projection"):
        medgmae.extract_features(small("primus_nano_patch8_32"), scan, head="projected")


def test_a_step_on_another_grid() -> None:
    for name in ("mae_primus_nano_patch8_32", "simmim_primus_nano_patch8_32"):
        model: Any = small(name)
        model(volume(name, grid=(1, 3, 2))).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
