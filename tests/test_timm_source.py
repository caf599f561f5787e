"""What the weights of timm's models need beyond their tensors, seen on models built here with random weights."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch

import medgmae
import medgmae.checkpoints.reading
from medgmae.checkpoints.opening import OpenSource, timm_settings

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


def test_clip_needs_its_epsilon_and_then_agrees() -> None:
    clip = timm.models.vision_transformer.VisionTransformer(
        **SMALL, pre_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5)
    ).eval()
    state, settings = dict(clip.state_dict()), timm_settings(clip, "timm/clip")
    source = OpenSource("timm/clip", medgmae.checkpoints.reading.Checkpoint(state, "", None), None, settings)
    options = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "in_chans": 3}
    with pytest.raises(medgmae.WeightsError, match=r"norm_eps: 1e-05 in the file's model, 1e-06 in this one"):
        medgmae.create_model("vit2d_base_patch16_224", pretrained=source, pre_norm=True, **options)
    model = medgmae.create_model(
        "vit2d_base_patch16_224", pretrained=source, pre_norm=True, norm_eps=1e-5, **options
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(image), clip(image), rtol=1e-5, atol=1e-5)


def test_another_activation_is_refused() -> None:
    model = timm.models.vision_transformer.VisionTransformer(**SMALL, act_layer=timm.layers.QuickGELU)
    with pytest.raises(medgmae.WeightsError, match="its activation is QuickGELU"):
        timm_settings(model, "timm/quick")


def test_a_convolutional_model_is_refused() -> None:
    with pytest.raises(medgmae.WeightsError, match="is not a plain ViT"):
        timm_settings(timm.create_model("resnet18"), "timm/resnet18")
