"""Building blocks: tables, stems, blocks and their equality with timm's."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import medgmae
from medgmae.layers.blocks import Attention, DropPath, Mlp, initialize, make_head, vit_block
from medgmae.layers.patches import PatchEmbed, take_tokens, to_tuple
from medgmae.layers.pooling import AttentionPool
from medgmae.layers.positions import PositionCache, resample_pos_embed, sincos_pos_embed


@pytest.mark.parametrize(
    ("size", "dims", "expected"), [(4, 3, (4, 4, 4)), ((1, 2), 2, (1, 2)), ([3, 2, 1], 3, (3, 2, 1))]
)
def test_a_size_is_an_int_or_one_per_axis(size: object, dims: int, expected: tuple[int, ...]) -> None:
    assert to_tuple(size, dims) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, (1, 2), (1, 2, 3, 4), (4, 0, 4)])
def test_an_impossible_size_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="patch_size must be one positive int or 3"):
        to_tuple(size, 3, "patch_size")  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(2, 3, 4), (4, 2), (3, 3, 3)])
def test_sincos_rows_follow_the_raster_order_of_a_table_written_out_by_hand(grid: tuple[int, ...]) -> None:
    dim = 4 * len(grid)
    table = sincos_pos_embed(dim, grid)[0]
    for row, position in enumerate(np.ndindex(*grid)):
        expected = [f(t * w) for t in position for f in (math.sin, math.cos) for w in (1.0, 10000**-0.5)]
        torch.testing.assert_close(table[row], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [5, 7, 13, 32, 1024])
def test_sincos_tables_of_any_width_have_distinct_rows(dim: int) -> None:
    table = sincos_pos_embed(dim, (2, 3, 2))
    assert table.shape == (1, 12, dim)
    assert len(torch.unique(table[0], dim=0)) == 12


def test_the_reversed_mesh_differs_on_non_cubic_grids_only() -> None:
    assert torch.equal(sincos_pos_embed(12, (3, 3, 3)), sincos_pos_embed(12, (3, 3, 3), reversed_mesh=True))
    assert not torch.equal(sincos_pos_embed(12, (1, 2, 3)), sincos_pos_embed(12, (1, 2, 3), reversed_mesh=True))


def linear_by_hand(row: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation at pixel centres (align_corners False) along the first axis, by numpy.interp's rule."""
    old = row.shape[0]
    at = (np.arange(size) + 0.5) * old / size - 0.5
    return np.stack([np.interp(at, np.arange(old), column) for column in row.reshape(old, -1).T], 1).reshape(
        size, *row.shape[1:]
    )


@pytest.mark.parametrize(
    ("source", "target"), [((2, 3, 4), (4, 3, 2)), ((3, 3, 3), (6, 6, 6)), ((4, 4, 4), (2, 3, 5)), ((3, 5), (6, 2))]
)
def test_resampling_a_table_equals_interpolation_axis_by_axis(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    table = torch.randn(1, math.prod(source), 6)
    image = table.numpy()[0].reshape(*source, 6)
    for axis, size in enumerate(target):
        image = np.moveaxis(linear_by_hand(np.moveaxis(image, axis, 0), size), 0, axis)
    expected = torch.tensor(image).reshape(1, -1, 6).float()
    torch.testing.assert_close(resample_pos_embed(table, source, target), expected, atol=1e-5, rtol=0)


def test_resampling_to_the_same_grid_gives_the_same_tensor() -> None:
    table = torch.randn(1, 8, 4)
    assert resample_pos_embed(table, (2, 2, 2), (2, 2, 2)) is table


def test_resampling_keeps_the_dtype_and_computes_in_float32() -> None:
    table = torch.randn(1, 8, 4)
    half = resample_pos_embed(table.bfloat16(), (2, 2, 2), (3, 2, 2))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resample_pos_embed(table.bfloat16().float(), (2, 2, 2), (3, 2, 2)).bfloat16())


@pytest.mark.parametrize(("rows", "source", "target"), [(9, (2, 2, 2), (3, 3, 3)), (8, (2, 2, 2), (4, 4))])
def test_a_table_that_does_not_fit_its_grid_is_refused(
    rows: int, source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=f"a table of {rows} rows"):
        resample_pos_embed(torch.zeros(1, rows, 4), source, target)


def test_the_position_cache_follows_a_table_that_changes() -> None:
    cache, table = PositionCache(), nn.Parameter(torch.randn(1, 8, 4), requires_grad=False)
    first = cache(table, (2, 2, 2), (2, 2, 3))
    assert cache(table, (2, 2, 2), (2, 2, 3)) is first
    with torch.no_grad():
        table.mul_(2)
    torch.testing.assert_close(cache(table, (2, 2, 2), (2, 2, 3)), 2 * first)
    torch.testing.assert_close(cache(table.double(), (2, 2, 2), (2, 2, 3)), 2 * first.double())
    assert cache(table, (2, 2, 2), (3, 2, 2)).shape == (1, 12, 4)


def test_the_position_cache_gives_gradients_to_a_learned_table() -> None:
    cache, table = PositionCache(), nn.Parameter(torch.randn(1, 8, 4))
    with torch.no_grad():
        cache(table, (2, 2, 2), (2, 2, 3))  # fills the cache with a value that has no history
    cache(table, (2, 2, 2), (2, 2, 3)).sum().backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad.sum(), torch.tensor(12.0 * 4))


def test_the_position_cache_serves_training_after_inference_mode() -> None:
    cache, table = PositionCache(), nn.Parameter(torch.randn(1, 8, 4), requires_grad=False)
    with torch.inference_mode():
        cache(table, (2, 2, 2), (2, 2, 3))
    x = torch.randn(1, 12, 4, requires_grad=True)
    (x * cache(table, (2, 2, 2), (2, 2, 3))).sum().backward()
    assert x.grad is not None


def test_copies_of_a_position_cache_start_empty() -> None:
    cache = PositionCache()
    cache(torch.randn(1, 8, 4), (2, 2, 2), (2, 2, 3))
    assert copy.deepcopy(cache)._value is None
    assert pickle.loads(pickle.dumps(cache))._value is None


@pytest.mark.parametrize(("channels", "patch"), [(1, (4, 4, 4)), (3, (2, 3, 4)), (2, (3, 2))])
def test_the_patch_embedding_is_the_convolution_of_its_weight(channels: int, patch: tuple[int, ...]) -> None:
    embed = PatchEmbed(channels, 5, patch).double()
    x = torch.randn(2, channels, *(2 * p for p in patch), dtype=torch.float64)
    tokens = embed(x)
    torch.testing.assert_close(tokens, embed.proj(x).flatten(2).transpose(1, 2))
    keep = torch.tensor([[3, 0], [1, 2]])
    torch.testing.assert_close(embed(x, keep), take_tokens(tokens, keep))


def test_attention_refuses_a_width_that_the_heads_do_not_share_out() -> None:
    with pytest.raises(ValueError, match=r"embed_dim \(=10\) must be divisible by num_heads \(=4\)"):
        Attention(10, 4)


@pytest.mark.parametrize("ratio", [4.0, 2.67])
def test_the_block_equals_timms(ratio: float) -> None:
    from timm.models.vision_transformer import Block as TimmBlock

    theirs = TimmBlock(24, 3, mlp_ratio=ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = vit_block(24, 3, ratio)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_attention_equals_softmax_written_out() -> None:
    attention = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.reshape(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(4, 2)), torch.ones(4, 2))


def test_heads() -> None:
    assert isinstance(make_head(8, 0), nn.Identity)
    assert isinstance(make_head(8, 3), nn.Linear)
    head = make_head(8, 3, (6, 4))
    kinds = [nn.Linear, nn.LeakyReLU, nn.BatchNorm1d, nn.Linear, nn.LeakyReLU, nn.BatchNorm1d, nn.Linear]
    assert [type(layer) for layer in head.children()] == kinds
    assert head(torch.randn(5, 8)).shape == (5, 3)


def test_initialisation_is_maes() -> None:
    linear, conv = nn.Linear(300, 100), nn.Conv3d(2, 64, 4)
    for module in (linear, conv):
        initialize(module)
        fan_out, fan_in = module.weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert module.bias is not None
        assert not module.bias.any()
        assert 0.98 * bound < module.weight.abs().max() <= bound
        assert abs(module.weight.std().item() - bound / math.sqrt(3)) < 0.05 * bound


def test_initialisation_leaves_the_meta_device_alone() -> None:
    with torch.device("meta"):
        linear = nn.Linear(3, 3)
    initialize(linear)
    assert linear.weight.is_meta


def test_the_mlp_uses_the_exact_gelu() -> None:
    mlp = Mlp(3, 5).double()
    hidden = mlp.fc1(x := torch.randn(4, 3, dtype=torch.float64))
    exact = hidden / 2 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), mlp.fc2(exact))


def test_attention_pools_by_its_definition() -> None:
    pool = AttentionPool(128).double()
    pool.apply(initialize)
    x = torch.randn(2, 7, 128, dtype=torch.float64)
    keys, values = pool.kv(pool.norm(x)).chunk(2, -1)
    query, expected = pool.query.reshape(2, 64), torch.empty(2, 128, dtype=torch.float64)
    for head in range(2):
        part = slice(64 * head, 64 * (head + 1))
        weights = (keys[..., part] @ query[head] / 8).softmax(1)  # (2, 7)
        expected[:, part] = (weights[..., None] * values[..., part]).sum(1)
    torch.testing.assert_close(pool(x), pool.proj(expected))
    assert AttentionPool(96).heads == 1
    assert torch.autograd.gradcheck(pool, (x[:1, :3].requires_grad_(),))


def test_an_encoder_may_begin_or_stop_to_pool_by_attention() -> None:
    model = medgmae.create_model("vit_nano_patch8_32", global_pool="attention", num_classes=3)
    x = torch.rand(2, 1, 16, 16, 16)
    assert model(x).shape == (2, 3)
    assert "attn_pool.query" in model.state_dict()
    plain = medgmae.create_model("vit_nano_patch8_32", num_classes=3)
    medgmae.load_pretrained(model, plain.state_dict())  # the pool is new, as a head is
    plain.reset_classifier(2, "attention")
    assert plain(x).shape == (2, 2)
    plain.reset_classifier(2, "token")
    assert "attn_pool.query" not in plain.state_dict()
