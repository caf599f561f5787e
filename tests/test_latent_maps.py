"""Latent-to-spatial maps: both published algorithms by hand and by their description, on scans of any geometry."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small, volume
from torch import Tensor, nn

import medgmae
from medgmae import Volume, latent_map_figure, latent_to_spatial, random_masking
from medgmae.inference.latents import latent_map_defaults
from medgmae.visualize import latent_to_spatial as as_visualize_has_it

ENCODERS = ["vit_nano_patch8_32", "vim_nano_patch8_32"]
AUTOENCODERS = ["mae_vit_nano_patch8_32", "mae_vim_nano_patch8_32", "gmae_vit_nano_patch8_32"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored_tokens(tokens: Tensor, grid: tuple[int, int, int], **options: Any) -> Any:
    """An encoder of patch 2 whose tokens (N, E) are these whatever it is shown: its blocks and its stem add nothing."""
    size = tuple(2 * n for n in grid)
    options = {"class_token": False, "pool": "avg", "fc_norm": False, "num_heads": 1, **options}
    model = medgmae.ViT(size, 2, embed_dim=tokens.shape[1], depth=1, **options)
    with torch.no_grad():
        for part in (model.patch_embed.proj, model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            for parameter in part.parameters():
                parameter.zero_()
        model.pos_embed.copy_(tokens[None])
    return model


def blocks(values: Tensor, patch: int) -> Tensor:
    """(d, h, w) to voxels, one by one."""
    found = torch.empty([n * patch for n in values.shape])
    for index in np.ndindex(*found.shape):
        found[index] = values[tuple(i // patch for i in index)]
    return found


def by_description(encoder: Any, x: Tensor, masking: medgmae.Masking) -> Tensor:
    """The map of visible tokens as published: zeros appended, put in place by the ranks, repeated, unpatchified."""
    with torch.no_grad():
        latent = encoder.eval().forward_features(x, keep=masking.keep)[:, encoder.num_prefix_tokens :]
    hidden = masking.restore.shape[1] - latent.shape[1]
    largest = torch.cat([latent.max(dim=2).values, torch.zeros(len(x), hidden)], dim=1)
    values = torch.gather(largest, 1, masking.restore)
    grid = [n // p for n, p in zip(x.shape[2:], encoder.patch_size, strict=True)]
    repeated = values.unsqueeze(-1).repeat(1, 1, math.prod(encoder.patch_size))
    return medgmae.unpatchify(repeated, encoder.patch_size, grid, 1)


# the published algorithms


def test_tokens_of_the_last_block_by_hand() -> None:
    tokens = torch.tensor([[1.0, -9], [2, 0], [-3, -4], [0, 5], [6, 6], [-7, 8]])
    model = stored_tokens(tokens, (1, 2, 3))
    expected = blocks(torch.tensor([[[1.0, 2, -3], [5, 6, 8]]]), 2)
    found = latent_to_spatial(model, torch.rand(2, 1, 2, 4, 6), reduction="max")
    assert torch.equal(found, expected.expand(2, 1, 2, 4, 6))
    lengths = latent_to_spatial(model, torch.rand(1, 1, 2, 4, 6), reduction="norm")
    torch.testing.assert_close(lengths[0, 0, 0, ::2, ::2], torch.tensor([[82.0, 4, 25], [25, 72, 113]]).sqrt())


def test_visible_tokens_by_hand() -> None:
    """Two features: normalised they are (1, -1) or (-1, 1), and then weighted 2 and 5."""
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1])
    model = stored_tokens(100 * torch.stack([signs, -signs], dim=1), (2, 2, 2))
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([2.0, 5.0]))
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.8, 0.2, 0.7, 0.6, 0.95]])  # visible, in this order: 1, 4, 0, 6
    found = latent_to_spatial(
        model, torch.rand(1, 1, 4, 4, 4), mode="pretrained", masking=random_masking(1, 8, 0.5, noise=noise)
    )
    torch.testing.assert_close(found[0, 0], blocks(torch.tensor([[[2.0, 5], [0, 0]], [[5, 0], [2, 0]]]), 2))


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 4, 3)])
def test_visible_tokens_of_any_autoencoder_as_described(name: str, grid: tuple[int, ...]) -> None:
    model, x = small(name), volume(name, batch=2, grid=grid)
    masking = random_masking(2, math.prod(grid), 0.5, generator=seeded(0))
    found = latent_to_spatial(model, x, masking=masking)
    assert found.shape == (2, 1, *x.shape[2:])
    assert torch.equal(found, by_description(model.encoder, x, masking))
    assert ((found == 0).float().mean((1, 2, 3, 4)) == masking.mask.mean(1)).all()
    assert torch.equal(latent_to_spatial(model.encoder, x, mode="pretrained", masking=masking), found)


@pytest.mark.parametrize("order", ["raster", "given"])
def test_the_order_of_a_scan_does_not_move_the_map(order: str) -> None:
    """The patches come back where they were, whatever order the state space read them in."""
    model, x = small("mae_vim_nano_patch8_32", scan_order=order), volume("mae_vim_nano_patch8_32", grid=(2, 3, 2))
    masking = random_masking(2, 12, 0.75, generator=seeded(1))
    found = latent_to_spatial(model, x, masking=masking)
    assert torch.equal(found[:, 0, ::8, ::8, ::8].flatten(1) == 0, masking.mask.bool())
    assert torch.equal(found, by_description(model.encoder, x, masking))


@pytest.mark.parametrize(("token", "cut"), [(None, None), ("front", 0), ("middle", 6), ("double", 0)])
def test_the_last_mixers_output_before_it_is_added(token: str | None, cut: int | None) -> None:
    name = "vim_nano_patch8_32"
    model, x = small(name, class_token=token), volume(name, grid=(2, 3, 2))
    seen: list[Tensor] = []
    handle = model.blocks[-1].mixer.register_forward_hook(lambda module, args, out: seen.append(out))
    found = latent_to_spatial(model, x)
    handle.remove()
    tokens = seen[0].detach()  # as they were scanned
    if cut is not None:
        tokens = torch.cat([tokens[:, :cut], tokens[:, cut + 1 :]], dim=1)[:, :12]
    values = tokens.max(dim=2).values.reshape(2, 2, 3, 2)
    assert torch.equal(found[:, 0], torch.stack([blocks(sample, 8) for sample in values]))


def test_a_vit_gives_the_first_principal_component_of_its_last_block() -> None:
    name = "vit_nano_patch8_32"
    model, x = small(name), volume(name, grid=(3, 2, 4))
    found = latent_to_spatial(model, x)
    for sample, image in zip(found, model.forward_intermediates(x, indices=1)[1][0].detach(), strict=True):
        tokens = image.flatten(1).T.double().numpy()  # (N, E)
        _, _, directions = np.linalg.svd(tokens - tokens.mean(0))
        direction = directions[0] * np.sign((directions[0] ** 3).sum())
        expected = torch.from_numpy((tokens - tokens.mean(0)) @ direction).float().reshape(3, 2, 4)
        torch.testing.assert_close(sample[0, ::8, ::8, ::8], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("vit_nano_patch8_32", (None, None), ("finetuned", "pca")),
        ("vim_nano_patch8_32", (None, None), ("finetuned", "max")),
        ("mae_vit_nano_patch8_32", (None, None), ("pretrained", "max")),
        ("mae_vim_nano_patch8_32", (None, None), ("pretrained", "max")),
        ("mae_vit_nano_patch8_32", ("finetuned", None), ("finetuned", "pca")),
        ("mae_vim_nano_patch8_32", ("finetuned", None), ("finetuned", "max")),
        ("vit_nano_patch8_32", ("pretrained", "norm"), ("pretrained", "norm")),
    ],
)
def test_what_is_done_unless_it_is_said(name: str, given: Any, expected: Any) -> None:
    model, x = small(name), volume(name)
    assert latent_map_defaults(model, *given) == expected
    found = [
        latent_to_spatial(model, x, mode=m, reduction=r, generator=seeded(2) if expected[0] == "pretrained" else None)
        for m, r in (given, expected)
    ]
    assert torch.equal(*found)
    assert as_visualize_has_it is latent_to_spatial


# the run


@pytest.mark.parametrize("name", [*ENCODERS, *AUTOENCODERS[:2]])
def test_dropped_paths_are_off_and_every_part_gets_its_mode_back(name: str) -> None:
    model, x = small(name, drop_path=0.9), volume(name)
    expected = latent_to_spatial(model.eval(), x, **drawn(model, 3))
    encoder = getattr(model.train(), "encoder", model)
    encoder.blocks[0].eval()  # a frozen part
    modes = {key: module.training for key, module in model.named_modules()}
    first = latent_to_spatial(model, x, **drawn(model, 3))
    assert torch.equal(first, expected)
    assert not first.requires_grad
    assert {key: module.training for key, module in model.named_modules()} == modes


def drawn(model: nn.Module, seed: int, **more: Any) -> Any:
    return {"generator": seeded(seed), **more} if hasattr(model, "decoder") else {}


def test_the_mask_comes_from_the_generator_and_its_ratio_from_the_model() -> None:
    model, x = small("mae_vit_nano_patch8_32", mask_ratio=0.5), volume("mae_vit_nano_patch8_32", grid=(2, 4, 2))
    first, again, other = (latent_to_spatial(model, x, generator=seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first == 0).float().mean() == 0.5
    assert (latent_to_spatial(model, x, mask_ratio=0.25) == 0).float().mean() == 0.25
    assert (latent_to_spatial(model.encoder, x, mode="pretrained") == 0).float().mean() == 0.75


def test_a_model_in_double_precision_maps_too() -> None:
    model, x = small("vim_nano_patch8_32"), volume("vim_nano_patch8_32")
    expected = latent_to_spatial(model, x)
    found = latent_to_spatial(model.double(), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ENCODERS, *AUTOENCODERS])
def test_on_a_gpu_it_is_the_same(name: str) -> None:
    model, x, scan = small(name), volume(name, grid=(2, 3, 2)), oblique((16, 13, 30))
    expected = [latent_to_spatial(model, given, **drawn(model, 8)) for given in (x, scan)]
    found = [latent_to_spatial(model.cuda(), given, **drawn(model, 8)) for given in (x, scan)]
    assert found[0].device.type == "cuda"
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].data, expected[1].data, atol=1e-4, rtol=1e-4)


def test_linear_upsampling_goes_through_the_patch_centres() -> None:
    model = stored_tokens(torch.tensor([[1.0], [3.0]]), (1, 1, 2), num_heads=1)
    found = latent_to_spatial(model, torch.rand(1, 1, 2, 2, 4), reduction="max", upsampling="linear")
    assert torch.equal(found[0, 0], torch.tensor([1, 1.5, 2.5, 3]).expand(2, 2, 4))


# scans


def oblique(size: tuple[int, int, int], channels: int = 1) -> Volume:
    """A scan with axes that are neither those of the body nor equally spaced."""
    a, b = 0.4, -0.7
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    data = torch.rand(channels, *size, generator=seeded(6))
    return Volume(data, (4.0, 0.8, 1.1), (-31.0, 12.5, 77.0), (turn @ tilt)[:, ::-1])


@pytest.mark.parametrize("name", [*ENCODERS, *AUTOENCODERS[:2]])
@pytest.mark.parametrize("size", [(16, 24, 8), (13, 21, 30)])
def test_a_scan_of_any_size_keeps_its_geometry(name: str, size: tuple[int, int, int]) -> None:
    model, scan = small(name), oblique(size)
    found = latent_to_spatial(model, scan, **drawn(model, 7))
    assert isinstance(found, Volume)
    assert found.data.shape == (1, *size)
    assert found.data.dtype == torch.float32
    np.testing.assert_array_equal(found.grid.affine, scan.grid.affine)
    before = [-(n // -8) * 4 - n // 2 for n in size]  # so that the middle voxel stays the middle voxel
    index = [(torch.arange(-(n // -8) * 8) - b).clamp(0, n - 1) for n, b in zip(size, before, strict=True)]
    padded = scan.data[:, index[0]][:, :, index[1]][:, :, :, index[2]]
    expected = latent_to_spatial(model, padded[None], **drawn(model, 7))[0]
    inside = [slice(b, b + n) for n, b in zip(size, before, strict=True)]
    assert torch.equal(found.data, expected[(slice(None), *inside)])


def test_several_channels_and_integers() -> None:
    scan = oblique((16, 16, 16), channels=4)
    scan = scan.with_data((scan.data * 100).to(torch.int16))
    model = small("vim_nano_patch8_32", in_chans=4)
    found = latent_to_spatial(model, scan)
    assert torch.equal(found.data, latent_to_spatial(model, scan.tensor)[0])


def with_nan(x: Tensor) -> Tensor:
    x[0, 0, 1, 2, 3] = math.nan
    return x


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.rand(1, 4, 16, 16, 16), {}, "has 4 channel(s), the model takes 1"),
        (oblique((8, 8, 8), channels=2), {}, "has 2 channel(s), the model takes 1"),
        (torch.rand(1, 16, 16, 16), {}, "must be (B, 1, D, H, W) or a Volume, got (1, 16, 16, 16)"),
        (torch.rand(1, 1, 16, 20, 16), {}, "must be a multiple of the patch. Crop or pad it to (16, 24, 16)"),
        (with_nan(torch.rand(1, 1, 8, 8, 8)), {}, "1 of 512 voxels are NaN"),
        (torch.rand(1, 1, 8, 8, 8), {}, "0.75 of 1 patches leaves none visible"),
        (torch.rand(1, 1, 8, 8, 16), {"mask_ratio": 1.0}, "must be in [0, 1), got 1.0"),
        (torch.rand(1, 1, 8, 8, 16), {"masking": random_masking(1, 8, 0.5)}, "is for (1, 8) (batch, patches)"),
        (torch.rand(1, 1, 8, 8, 16), {"masking": random_masking(1, 2, 0.5), "mask_ratio": 0.5}, "leave out mask_ratio"),
        (torch.rand(1, 1, 8, 8, 16), {"mode": "finetuned", "mask_ratio": 0.5}, "hides no patches: leave out"),
        (torch.rand(1, 1, 8, 8, 16), {"mode": "trained"}, "mode must be one of 'pretrained', 'finetuned', got"),
        (torch.rand(1, 1, 8, 8, 16), {"reduction": "mean"}, "reduction must be one of 'max', 'pca', 'norm', got"),
        (torch.rand(1, 1, 8, 8, 16), {"upsampling": "cubic"}, "upsampling must be one of 'block', 'linear', got"),
    ],
)
def test_what_does_not_fit(x: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        latent_to_spatial(small("mae_vim_nano_patch8_32"), x, **options)


def test_models_that_do_not_fit() -> None:
    x = torch.rand(1, 1, 16, 16, 16)
    with pytest.raises(TypeError, match="needs a model of this library, got Linear"):
        latent_to_spatial(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="needs a model for volumes"):
        latent_to_spatial(small("vit2d_base_patch16_224"), x)
    with pytest.raises(ValueError, match="normalises the pooled vector instead; use mode='finetuned'"):
        latent_to_spatial(small("vit_nano_patch8_32", pool="avg"), x, mode="pretrained")


# the picture


def test_the_picture_shows_the_map_on_the_scan_through_its_peak(tmp_path: Path) -> None:
    data = torch.ones(1, 8, 12, 16)
    latent = torch.zeros_like(data)
    latent[:, 4:8, 0:4, 8:12] = 3.0
    latent[:, 0:4, 8:12, 0:4] = -1.0
    data[:, 0] = 0.0
    # RAS: the array grows to the top, the front and the right of the body.
    scan = Volume(data, (2.0, 3.0, 1.0), direction=np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]]))
    for shown in (scan, medgmae.data.reorient(scan, "LPI")):
        overlay = medgmae.data.reorient(scan.with_data(latent), shown.orientation)
        figure = latent_map_figure(shown, overlay, title="corner")
        grid = figure.axes[:6]
        assert [axes.get_ylabel() for axes in grid[::2]] == ["axial", "coronal", "sagittal"]
        assert [axes.get_title() for axes in grid[:2]] == ["scan", "latent map"]
        assert len(figure.axes) == 7  # and the scale
        pictures: list[Any] = [axes.images[1].get_array() for axes in grid[1::2]]
        assert [picture.shape for picture in pictures] == [(12, 16), (8, 16), (8, 12)]
        for picture in pictures:  # the first row is at the bottom; right, or the front, at the left
            assert (picture == 3.0).sum() == 16
            assert picture.mask.sum() == picture.size - 16  # hidden patches are left out
        assert (pictures[0][0:4, 4:8] == 3.0).all()
        assert (pictures[1][4:8, 4:8] == 3.0).all()
        assert (pictures[2][4:8, 8:12] == 3.0).all()
        figure.savefig(tmp_path / "corner.png")
        assert (tmp_path / "corner.png").stat().st_size > 10_000


def test_the_planes_go_through_the_point_that_is_given() -> None:
    scan = oblique((10, 12, 14))
    latent = scan.with_data(torch.arange(10 * 12 * 14.0).reshape(1, 10, 12, 14))
    at = scan.grid.world((3, 4, 5))
    grid = latent_map_figure(scan, latent, at=at.tolist()).axes
    value = float(latent.data[0, 3, 4, 5])
    for axes in grid[1:6:2]:
        picture: Any = axes.images[1].get_array()
        assert (picture == value).sum() == 1
    with pytest.raises(ValueError, match=r"the point \(500, 0, 0\) lies outside the scan"):
        latent_map_figure(scan, latent, at=(500, 0, 0))


def test_the_peak_is_sought_in_the_body() -> None:
    data, latent = torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 8, 8)
    data[:, 4:, 4:, 4:] = 1.0
    latent[:, 0:2] = 9.0  # air
    latent[:, 5, 6, 7] = 2.0
    scan = Volume(data, direction=np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]]))
    figure = latent_map_figure(scan, scan.with_data(latent))
    picture: Any = figure.axes[1].images[1].get_array()
    assert picture.max() == 2.0
    nothing = latent_map_figure(scan.with_data(data * 0), scan.with_data(latent))  # no body: anywhere
    assert nothing.axes[1].images[1].get_array().max() == 9.0


@pytest.mark.parametrize("wrong", [torch.zeros(2, 8, 8, 8), torch.zeros(1, 8, 8, 4)])
def test_a_map_of_another_grid_is_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="expected one channel on the scan's grid"):
        latent_map_figure(oblique((8, 8, 8)), Volume(wrong))
