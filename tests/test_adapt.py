"""Weights for other channels, patches, grids and dimensions; timm's 2D models into 3D ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor, nn

import medgmae
from medgmae import ViT, WeightsError
from medgmae.checkpoints.adapt import (
    Inflate,
    _resize_matrix,
    adapt_channels,
    adapt_stem,
    adapt_table,
    inflate_stem,
    resize_patch,
)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5))
def test_equal_channels_give_the_same_tokens(old: int, new: int) -> None:
    weight = torch.randn(6, old, 2, 3, 2, dtype=torch.float64)
    image = torch.randn(2, 1, 4, 6, 4, dtype=torch.float64)
    before = F.conv3d(image.expand(-1, old, -1, -1, -1), weight, stride=(2, 3, 2))
    after = F.conv3d(image.expand(-1, new, -1, -1, -1), adapt_channels(weight, new), stride=(2, 3, 2))
    torch.testing.assert_close(before, after)


def resize_matrix(old: int, new: int) -> Tensor:
    """Linear, antialiased resizing of ``old`` samples to ``new``: a triangle at every new pixel's centre, by hand."""
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
    distance = (torch.arange(old) + 0.5 - centres[:, None]).abs() / max(old / new, 1)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear, antialiased resizing axis by axis."""
    for axis, n in enumerate(size, start=2):
        x = (x.movedim(axis, -1) @ resize_matrix(x.shape[axis], n).T).movedim(-1, axis)
    return x


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 8), (16, 8), (14, 16), (16, 12), (5, 2), (4, 4)])
def test_the_resizing_of_a_patch_is_linear_and_antialiased(old: int, new: int) -> None:
    torch.testing.assert_close(_resize_matrix(old, new), resize_matrix(old, new))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 5), st.integers(0, 4)), min_size=2, max_size=3))
def test_a_larger_patch_answers_to_the_enlarged_patch_exactly(axes: list[tuple[int, int]]) -> None:
    old, new = [o for o, _ in axes], [o + more for o, more in axes]
    weight, patch = torch.randn(5, 2, *old, dtype=torch.float64), torch.randn(3, 2, *old, dtype=torch.float64)
    resized = resize_patch(weight, new)
    assert list(resized.shape[2:]) == new
    before, after = patch.flatten(1) @ weight.flatten(1).T, resize(patch, new).flatten(1) @ resized.flatten(1).T
    torch.testing.assert_close(before, after, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("old", "new"), [((4, 4, 4), (2, 3, 4)), ((6, 4), (3, 4)), ((4, 2, 4), (2, 4, 4))])
def test_a_resized_weight_is_the_pseudo_inverse_of_the_whole_patch(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    length = torch.Size(old).numel()
    patches = torch.eye(length, dtype=torch.float64).reshape(length, 1, *old)
    matrix = resize(patches, new).reshape(length, -1).T  # (new, old)
    weight = torch.randn(3, 1, *old, dtype=torch.float64)
    expected = weight.flatten(1) @ torch.linalg.pinv(matrix)
    torch.testing.assert_close(resize_patch(weight, new).flatten(1), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("how", ["average", "center"])
def test_a_stem_inflates(how: Any) -> None:
    plane = torch.randn(4, 2, 3, 3)
    cube = inflate_stem(plane, 5, how)
    assert cube.shape == (4, 2, 5, 3, 3)
    torch.testing.assert_close(cube.sum(2), plane)
    if how == "center":
        assert torch.equal(cube[:, :, 2], plane)
        assert cube.count_nonzero() == plane.count_nonzero()
    else:
        assert torch.equal(cube[:, :, 0], cube[:, :, 4])
    with pytest.raises(ValueError, match="'average' or 'center', got 'middle'"):
        inflate_stem(plane, 5, "middle")  # type: ignore[arg-type]


def test_what_was_done_to_a_stem_is_said() -> None:
    weight, done = adapt_stem(torch.randn(4, 3, 4, 4), (4, 1, 2, 8, 8), "average")
    assert weight.shape == (4, 1, 2, 8, 8)
    assert [line.split()[0] for line in done] == ["inflated", "channels", "patch"]
    same = torch.randn(4, 3, 2, 2, 2)
    assert adapt_stem(same, same.shape, "average") == (same, [])


def test_a_flat_table_is_repeated_along_depth() -> None:
    table = torch.randn(1, 6, 4)
    lifted = adapt_table(table, (2, 3), (3, 4, 2)).reshape(3, 8, 4)
    plane = medgmae.resample_pos_embed(table, (2, 3), (4, 2))[0]
    assert all(torch.equal(layer, plane) for layer in lifted)


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def timm_vit(**options: Any) -> Any:
    """A small 2D ViT of timm with random numbers everywhere."""
    from timm.models.vision_transformer import VisionTransformer

    return randomize(VisionTransformer(**{**SIZES, **options})).eval()


def twin(dims: int = 2, **options: Any) -> Any:
    """Our model of the same size."""
    sizes = {key: value for key, value in SIZES.items() if key != "img_size"}
    return randomize(ViT(16, in_chans=3, dims=dims, **{**sizes, **options}), seed=4).eval()


CLIP = {"pre_norm": True, "global_pool": "token", "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mae": ({"global_pool": "token"}, {}),
    "mae, mean of the patches": ({"global_pool": "avg"}, {"global_pool": "avg"}),
    "dinov2": ({"init_values": 0.1, "no_embed_class": True, "global_pool": "token"}, {}),
    "dinov2 with a class row": ({"init_values": 0.1, "global_pool": "token"}, {}),
    "clip": (CLIP, {"pre_norm": True, "norm_eps": 1e-5}),
    "no class token": (
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_model_equals_timms(kind: str) -> None:
    theirs, ours = timm_vit(**KINDS[kind][0]), twin(**KINDS[kind][1])
    report = medgmae.load_pretrained(ours, theirs.state_dict())
    assert not report.missing
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_between_the_blocks_equal_timms(kind: str) -> None:
    theirs, ours = timm_vit(**KINDS[kind][0]), twin(**KINDS[kind][1])
    medgmae.load_pretrained(ours, theirs.state_dict())
    x = torch.randn(1, 3, 16, 16)
    for norm in (True, False):
        for a, b in zip(
            ours.forward_intermediates(x, norm=norm)[1], theirs.forward_intermediates(x, norm=norm)[1], strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [4, 2])
def test_a_volume_constant_along_depth_gives_the_features_of_its_plane(kind: str, depth: int) -> None:
    """One layer of patches: the inflated model then computes exactly what the flat one computes."""
    theirs = timm_vit(**KINDS[kind][0])
    options = {**KINDS[kind][1], "patch_size": (depth, 4, 4)}
    ours = randomize(ViT((depth, 16, 16), in_chans=3, embed_dim=24, depth=2, num_heads=2, **options), seed=4).eval()
    report = medgmae.load_pretrained(ours, theirs.state_dict())
    assert "inflated from 2D (average along depth)" in report.adapted["patch_embed.proj.weight"]
    assert "pos_embed" in report.resized
    plane = torch.randn(2, 3, 16, 16)
    volume = plane.unsqueeze(2).expand(-1, -1, depth, -1, -1)
    torch.testing.assert_close(ours.forward_features(volume), theirs.forward_features(plane), atol=1e-5, rtol=1e-5)


def test_every_layer_of_an_inflated_stem_gives_the_tokens_of_the_plane() -> None:
    theirs, ours = timm_vit(), ViT(16, 4, 3, 24, 2, 2)
    medgmae.load_pretrained(ours, theirs.state_dict())
    plane = torch.randn(1, 3, 16, 16)
    tokens = ours.patch_embed(plane.unsqueeze(2).expand(-1, -1, 16, -1, -1)).reshape(4, 16, 24)
    for layer in tokens:
        torch.testing.assert_close(layer, theirs.patch_embed(plane)[0], atol=1e-5, rtol=1e-5)


def test_a_centred_stem_reads_the_middle_slice() -> None:
    theirs, ours = timm_vit(), ViT((4, 16, 16), 4, 3, 24, 2, 2)
    medgmae.load_pretrained(ours, theirs.state_dict(), inflate="center")
    volume = torch.randn(1, 3, 4, 16, 16)
    torch.testing.assert_close(ours.patch_embed(volume), theirs.patch_embed(volume[:, :, 2]), atol=1e-5, rtol=1e-5)


def test_photographs_become_single_channel_volumes_of_another_patch_and_size() -> None:
    ours = randomize(ViT((8, 24, 16), (4, 8, 8), 1, 24, 2, 2))
    report = medgmae.load_pretrained(ours, timm_vit().state_dict())
    assert report.adapted["patch_embed.proj.weight"].count(";") == 2
    assert report.resized == {"pos_embed": "grid (4, 4) to (2, 3, 2)"}
    assert ours(torch.randn(1, 1, 8, 24, 16)).isfinite().all()


def test_attention_pooling_is_left_out_and_said() -> None:
    theirs = timm_vit(class_token=False, global_pool="map")
    ours = twin(class_token=False, global_pool="avg", fc_norm=False)
    report = medgmae.load_pretrained(ours, theirs.state_dict())
    assert set(report.unused.values()) == {"attention pooling"}
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg_tokens": 4, "no_embed_class": True}, r"cls_token: \(1, 5, 24\) in the file"),
        ({"qk_norm": True}, "not supported.*q_norm"),
    ],
)
def test_models_that_compute_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    ours = twin()
    before = state_copy(ours)
    with pytest.raises(WeightsError, match=message):
        medgmae.load_pretrained(ours, timm_vit(**options).state_dict())
    assert_same_state(ours, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"pre_norm": True}, "norm_pre.weight"), ({"depth": 3}, "blocks.2"), ({"embed_dim": 32}, "blocks.0.norm1.weight")],
)
def test_models_of_another_build_are_refused(options: dict[str, Any], name: str) -> None:
    ours = twin()
    before = state_copy(ours)
    with pytest.raises(WeightsError, match=name):
        medgmae.load_pretrained(ours, timm_vit(**options).state_dict())
    with pytest.raises(WeightsError, match="not in the file"):
        medgmae.load_pretrained(twin(pre_norm=True), timm_vit().state_dict())
    assert_same_state(ours, before)


def test_volumes_do_not_go_into_images() -> None:
    flat, deep = twin(), randomize(ViT(16, 4, 3, 24, 2, 2))
    before = state_copy(flat)
    with pytest.raises(WeightsError, match="pos_embed"):
        medgmae.load_pretrained(flat, deep.state_dict())
    assert_same_state(flat, before)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("how", ["average", "center"])
def test_depth_may_be_any_axis(axis: int, how: Inflate) -> None:
    plane, table = torch.randn(4, 2, 3, 5), torch.randn(1, 6, 4)
    cube = inflate_stem(plane, 7, how, axis)
    torch.testing.assert_close(cube.movedim(2 + axis, 2), inflate_stem(plane, 7, how))
    target = [2, 3]
    target.insert(axis, 4)
    lifted = adapt_table(table, (2, 3), target, axis).reshape(*target, 4)
    assert all(torch.equal(layer, table.reshape(2, 3, 4)) for layer in lifted.unbind(axis))
