"""Models of timm for images, with random weights, in models of volumes: exactly where that is possible."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from small_models import randomize
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints.opening import OpenSource, timm_settings
from medgmae.checkpoints.reading import Checkpoint

IMAGE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
VOLUME: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "in_chans": 3, "pos_embed": "learned"}
EPS5 = partial(nn.LayerNorm, eps=1e-5)
DINO3: dict[str, Any] = {
    **{"init_values": 1e-5, "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True},
    **{"use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False},
    **{"qkv_bias": False, "dynamic_img_size": True, "norm_layer": EPS5, "global_pool": "token"},
}
EVA2: dict[str, Any] = {"mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}

# timm's class and options, and those of ours beside the sizes.
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "mae": (VisionTransformer, {}, {}),
    "clip": (VisionTransformer, {"pre_norm": True, "norm_layer": EPS5}, {"pre_norm": True, "norm_eps": 1e-5}),
    "dinov2": (VisionTransformer, {"init_values": 1e-5}, {}),
    "dinov2_reg4": (
        VisionTransformer,
        {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        {"registers": 4},
    ),
    "dinov2_giant": (
        VisionTransformer,
        {"init_values": 1e-5, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0},
        {"mlp": "swiglu", "mlp_ratio": 2.0},
    ),
    "dinov3": (Eva, DINO3, {"registers": 4, "rope": "unit", "pos_embed": "none", "norm_eps": 1e-5}),
    "dinov3_qkvb": (
        Eva,
        {**DINO3, "qkv_bias": True},
        {"registers": 4, "rope": "unit", "pos_embed": "none", "norm_eps": 1e-5},
    ),
    "dinov3_plus": (
        Eva,
        {**DINO3, "swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 4.0},
        {"registers": 4, "rope": "unit", "pos_embed": "none", "norm_eps": 1e-5, "mlp": "swiglu"},
    ),
    "eva": (Eva, {"global_pool": "token"}, {}),
    "eva02_small": (
        Eva,
        {**EVA2, "global_pool": "token"},
        {"rope": "scaled", "rope_base": 10000.0, "mlp": "swiglu", "mlp_ratio": 8 / 3},
    ),
    "eva02_base": (
        Eva,
        {**EVA2, "scale_mlp": True, "qkv_fused": False},
        {"rope": "scaled", "rope_base": 10000.0, "mlp": "swiglu_norm", "mlp_ratio": 8 / 3, "global_pool": "avg"},
    ),
}


def of_timm(name: str, **more: Any) -> tuple[Any, OpenSource]:
    """A model of timm with random weights, and what opening it by its name gives."""
    make, options, _ = MODELS[name]
    model: Any = randomize(make(**{**IMAGE, **options, **more})).eval()
    return model, opened(f"timm/{name}", model)


def opened(name: str, model: Any) -> OpenSource:
    """What opening a model of timm by its name gives."""
    return OpenSource(name, Checkpoint(dict(model.state_dict()), "", None), None, timm_settings(model, name))


def lifted(name: str, source: Any, axis: int | None = 0, size: tuple[int, ...] = (24, 32, 32), **more: Any) -> Any:
    """Ours for volumes, filled with it."""
    options: dict[str, Any] = {**VOLUME, "img_size": size, "patch_size": 8, **MODELS[name][2]}
    return medgmae.create_model(
        "vit_base_patch16_96", pretrained=source, lifted_axis=axis, **{**options, **more}
    ).eval()


def repeated(image: Tensor, axis: int, count: int) -> Tensor:
    """Images (B, C, H, W) as volumes that are constant along an axis."""
    return image.unsqueeze(2 + axis).repeat_interleave(count, 2 + axis)


@torch.no_grad()
def off(model: Any, reference: Any, axis: int = 0, count: int = 24) -> float:
    """Largest difference between the features of an image and those of every slice of it repeated."""
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, prefix = reference.forward_features(image), model.num_prefix_tokens
    tokens = model.forward_features(repeated(image, axis, count))
    grid = [4, 4]
    grid.insert(axis, count // 8)
    patches = tokens[:, prefix:].unflatten(1, grid).movedim(1 + axis, 1).flatten(2, 3)
    apart = (patches - expected[:, None, prefix:]).abs().max()
    apart = torch.maximum(apart, (model(repeated(image, axis, count)) - reference(image)).abs().max())
    return max(float(apart), *(tokens[:, :prefix] - expected[:, :prefix]).abs().flatten().tolist(), 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_slice_repeated_has_the_features_of_its_image(name: str) -> None:
    reference, source = of_timm(name)
    model = lifted(name, source)
    assert off(model, reference) < 2e-5
    assert any(
        note.endswith("a slice repeated along axis 0 has the image's features") for note in model.load_report.notes
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_images_is_timms(name: str) -> None:
    reference, source = of_timm(name)
    options: dict[str, Any] = {**VOLUME, "img_size": 32, "patch_size": 8, **MODELS[name][2]}
    model: Any = medgmae.create_model("vit2d_base_patch16_224", pretrained=source, **options).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(image), reference.forward_features(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("name", ["dinov2_reg4", "dinov3", "eva02_base"])
def test_along_any_axis(name: str, axis: int) -> None:
    reference, source = of_timm(name)
    size = [32, 32]
    size.insert(axis, 16)
    assert off(lifted(name, source, axis, tuple(size)), reference, axis, 16) < 2e-5


def test_inflated_in_the_middle_it_is_exact_too() -> None:
    reference, source = of_timm("dinov2")
    assert off(lifted("dinov2", source, inflate="center"), reference) < 2e-5


def test_the_model_still_sees_the_axis() -> None:
    _, source = of_timm("dinov3")
    model = lifted("dinov3", source)
    x = torch.randn(1, 3, 24, 32, 32)
    assert (model(x) - model(x[:, :, :1].expand_as(x))).abs().max() > 1e-3


def test_class_tokens_that_count_once_are_not_exact_and_said_so() -> None:
    reference, source = of_timm("dinov2")
    model = lifted("dinov2", source, None)
    (note,) = [note for note in model.load_report.notes if note.startswith("weights of images")]
    assert "not the same: attention counts class tokens once among all copies of a patch, as lifted_axis=0" in note
    assert off(model, reference) > 1e-4


def test_without_class_tokens_nothing_has_to_be_said() -> None:
    reference = randomize(VisionTransformer(**IMAGE, class_token=False, global_pool="avg")).eval()
    model = lifted("mae", opened("timm/x", reference), None, class_token=False, global_pool="avg")
    assert off(model, reference) < 2e-5
    assert any("has the image's features" in note for note in model.load_report.notes)


def test_other_patches_and_grids_are_not_exact_and_said_so() -> None:
    _, source = of_timm("mae")
    model = lifted("mae", source, 0, (16, 48, 48), patch_size=(4, 16, 16))
    (note,) = [note for note in model.load_report.notes if note.startswith("weights of images")]
    assert "patches of (8, 8) were resized to (16, 16)" in note
    assert "resampled from (4, 4) to (3, 3)" in note


def test_rotary_positions_of_images_need_to_know_the_axis() -> None:
    _, source = of_timm("dinov3")
    with pytest.raises(medgmae.WeightsError, match=r"lifted_axis: 0 in the file's model, None in this one; build it"):
        lifted("dinov3", source, None, embed_dim=48, num_heads=2)
    with pytest.raises(medgmae.WeightsError, match=r"rope: 'unit' in the file's model, 'integer' in this one"):
        lifted("dinov3", source, rope="integer")
    _, source = of_timm("mae")
    with pytest.raises(medgmae.WeightsError, match=r"rope: None in the file's model, 'unit' in this one"):
        lifted("mae", source, rope="unit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_post_norm": True}, "norms stand behind the branches"),
        ({"rope_grid_offset": 0.5, **EVA2}, "rotary positions .* are not supported"),
        ({**EVA2, "ref_feat_shape": (14, 14)}, "ref_feat_shape 16x16"),
        ({"use_rot_pos_emb": True, "rope_type": "mixed"}, "RotaryEmbeddingMixed"),
        ({**DINO3, "rope_rotate_half": False}, "RotaryEmbeddingDinoV3, rotate_half=False"),
    ],
    ids=str,
)
def test_what_timm_computes_and_we_do_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(medgmae.WeightsError, match=message):
        timm_settings(Eva(**{**IMAGE, **options}), "timm/eva")


def test_norms_inside_the_attention_are_refused() -> None:
    _, source = of_timm("eva02_base", scale_attn_inner=True)
    with pytest.raises(medgmae.WeightsError, match=r"parts that are not supported: blocks.0.attn.norm.weight"):
        lifted("eva02_base", source)


def test_a_state_dictionary_alone_is_read_too() -> None:
    reference, _ = of_timm("dinov3")
    model = lifted("dinov3", dict(reference.state_dict()))
    assert off(model, reference) < 2e-5


def test_a_lifted_model_is_saved_and_explained(tmp_path: Any) -> None:
    reference, source = of_timm("dinov3")
    model = lifted("dinov3", source)
    medgmae.save_pretrained(model, tmp_path)
    again: Any = medgmae.create_model(f"local-dir:{tmp_path}").eval()
    assert again.lifted_axis == 0
    assert off(again, reference) < 2e-5
    scan = medgmae.Volume(torch.randn(3, 24, 32, 32))
    assert medgmae.saliency_map(again, scan, method="rollout").shape == (1, 24, 32, 32)


GATED = {"mlp_ratio": 8 / 3, "mlp": "swiglu"}
DINO_ROPE = {"rope": "unit", "registers": 4, "pos_embed": "none", "norm_eps": 1e-5}
EVA_ROPE = {"rope": "scaled", "rope_base": 10000.0, "global_pool": "avg", "mlp_ratio": 8 / 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {},
    "vit_base_patch14_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {"registers": 4},
    "vit_giant_patch14_reg4_dinov2": {"registers": 4, **GATED},
    "vit_base_patch16_clip_224": {"pre_norm": True, "norm_eps": 1e-5},
    "vit_base_patch16_dinov3": DINO_ROPE,
    "vit_small_plus_patch16_dinov3": {**DINO_ROPE, "mlp": "swiglu"},
    "eva02_small_patch14_224": {**EVA_ROPE, "mlp": "swiglu"},
    "eva02_base_patch14_224": {**EVA_ROPE, "mlp": "swiglu_norm"},
    "eva02_base_patch14_448": {**EVA_ROPE, "mlp": "swiglu_norm"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fill_ours(name: str) -> None:
    """Every tensor of timm's own model finds a place, with the options that docs/models.md gives."""
    with torch.device("meta"):
        theirs: Any = timm.create_model(name, num_classes=0)
        side, grid, width = theirs.patch_embed.patch_size[0], theirs.patch_embed.grid_size, theirs.embed_dim
        sizes = {"embed_dim": width, "depth": len(theirs.blocks), "num_heads": theirs.blocks[0].attn.num_heads}
        options = {**VOLUME, **sizes, "img_size": (32, *(n * side for n in grid)), "patch_size": (16, side, side)}
        model: Any = medgmae.create_model("vit_base_patch16_96", lifted_axis=0, **{**options, **PUBLISHED[name]})
    report = medgmae.load_pretrained(model, opened(name, theirs))
    assert report.missing == []
    assert not [unused for unused in report.unused if not unused.endswith((".gamma", "gamma_1", "gamma_2"))]
    assert report.notes[-1] == "weights of images: a slice repeated along axis 0 has the image's features"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eva02_base_patch16_clip_224", "blocks.0.attn.norm.weight"),
        ("eva02_enormous_patch14_clip_224", "norms stand behind the branches"),
        ("vit_base_patch16_clip_quickgelu_224", "its activation is QuickGELU"),
    ],
)
def test_published_models_that_are_refused(name: str, message: str) -> None:
    with torch.device("meta"):
        theirs: Any = timm.create_model(name, num_classes=0)
        model = medgmae.create_model("vit_base_patch16_96", lifted_axis=0, in_chans=3)
    with pytest.raises(medgmae.WeightsError, match=message):
        medgmae.load_pretrained(model, opened(name, theirs))
