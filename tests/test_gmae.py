"""The Gaussian autoencoder against its definition: losses, masks, terms, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small, volume
from torch import Tensor
from torch.nn import functional as F

import medgmae
from medgmae.layers.masking import Masking
from medgmae.losses import scale_penalty, ssim3d, uniformity

NAME = "gmae_vit_nano_patch8_32"
ALL_TERMS = {"mse": 0.4, "l1": 0.4, "ssim": 0.2, "scale": 3.0, "uniformity": 0.5}


def masking(ratio: float = 0.5, batch: int = 2, tokens: int = 8) -> Masking:
    return medgmae.random_masking(batch, tokens, ratio, generator=torch.Generator().manual_seed(4))


def voxels(mask: Tensor, patch: int = 8) -> Tensor:
    """The mask of 2x2x2 patches as one of voxels, (B, 1, 16, 16, 16) bool."""
    cube = mask.reshape(-1, 1, 2, 2, 2)
    return cube.repeat_interleave(patch, 2).repeat_interleave(patch, 3).repeat_interleave(patch, 4) > 0


def model_and_input(**options: Any) -> tuple[Any, Tensor]:
    return small(NAME, **options).eval(), volume(NAME)


def test_the_papers_loss_is_the_error_of_the_masked_voxels() -> None:
    model, x = model_and_input(loss_weights={"mse": 1.0, "l1": 2.0})
    m = masking()
    out, full, hidden = model(x, m), model.reconstruct(x, m, paste_visible=False), voxels(m.mask)
    torch.testing.assert_close(out.volume, torch.where(hidden, full, torch.zeros(())), atol=1e-6, rtol=1e-5)
    assert not out.volume[~hidden].any()
    assert full[~hidden].any()
    difference = (full - x)[hidden]
    torch.testing.assert_close(out.terms, {"mse": difference.square().mean(), "l1": difference.abs().mean()})
    torch.testing.assert_close(out.loss, out.terms["mse"] + 2 * out.terms["l1"])
    assert torch.equal(out.mask, m.mask)


def test_the_reference_loss_is_the_error_of_all_voxels_against_the_scan_with_holes() -> None:
    model, x = model_and_input(loss="reference", loss_weights=dict.fromkeys(ALL_TERMS, 1.0))
    m = masking()
    out, target = model(x, m), x * voxels(m.mask)
    assert torch.equal(out.volume, model.reconstruct(x, m, paste_visible=False))
    expected = {
        "mse": F.mse_loss(out.volume, target),
        "l1": F.l1_loss(out.volume, target),
        "ssim": 1 - ssim3d(out.volume, target).mean(),
        "scale": scale_penalty(out.gaussians.scales, 0.5),
        "uniformity": uniformity(out.gaussians.means),
    }
    torch.testing.assert_close(out.terms, expected)


@pytest.mark.parametrize("loss", ["paper", "reference"])
def test_image_norm_is_over_the_whole_crop(loss: str) -> None:
    model, x = model_and_input(loss=loss, image_norm=True, loss_weights={"mse": 1.0, "l1": 1.0})
    m = masking()
    out, hidden = model(x, m), voxels(m.mask)

    def normalise(v: Tensor) -> Tensor:
        mean = v.mean((2, 3, 4), keepdim=True)
        return (v - mean) / (v.var((2, 3, 4), keepdim=True, unbiased=False) + 1e-6).sqrt()

    counted = hidden if loss == "paper" else torch.ones_like(hidden)
    difference = (normalise(out.volume) - normalise(x * hidden))[counted]
    torch.testing.assert_close(out.terms["mse"], difference.square().mean())
    torch.testing.assert_close(out.terms["l1"], (out.volume - x * hidden)[counted].abs().mean())


def test_the_papers_loss_renders_masked_patches_alone() -> None:
    model, x = model_and_input(loss_weights=dict.fromkeys(ALL_TERMS, 1.0), image_norm=True)
    seen: list[tuple[Any, ...]] = []
    model.renderer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    m = masking(0.75)
    model(x, m)
    ((_, size, patches, patch_size),) = seen
    assert tuple(size) == (16, 16, 16)
    assert patch_size == (8, 8, 8)
    assert patches.shape == (2, 6)
    assert torch.equal(torch.zeros(2, 8).scatter(1, patches, 1.0), m.mask)


@pytest.mark.parametrize("loss", ["paper", "reference"])
def test_with_nothing_masked_every_voxel_counts(loss: str) -> None:
    model, x = model_and_input(loss=loss)
    out = model(x, masking(0.0))
    torch.testing.assert_close(out.volume, model.reconstruct(x, masking(0.0), paste_visible=False))
    torch.testing.assert_close(out.loss, F.mse_loss(out.volume, x))
    assert not out.mask.any()


def test_the_weight_of_the_scale_penalty_falls_with_the_steps() -> None:
    model, x = model_and_input(loss_weights=ALL_TERMS, max_scale=0.1)
    m = masking()
    out = model(x, m)
    rest = sum(ALL_TERMS[name] * value for name, value in out.terms.items() if name != "scale")
    assert out.terms["scale"] > 1e-4
    for step, factor in ((0, 1.0), (500, 0.1**0.5), (1000, 0.1), (3000, 0.001)):
        torch.testing.assert_close(model(x, m, step=step).loss, rest + factor * 3 * out.terms["scale"])
        torch.testing.assert_close(model(x, m, step=torch.tensor(step)).loss, model(x, m, step=step).loss)


def test_a_drawn_masking_hides_the_ratio() -> None:
    model, x = model_and_input(mask_ratio=0.7)
    assert torch.equal(model(x).mask.sum(1), torch.tensor([6.0, 6.0]))
    torch.manual_seed(3)
    first = model(x).volume
    torch.manual_seed(3)
    assert torch.equal(model(x).volume, first)


def test_a_given_masking_leaves_the_random_numbers_alone() -> None:
    model, x = model_and_input()
    model.train()
    before = torch.random.get_rng_state()
    model(x, masking())
    model.reconstruct(x, masking(), paste_visible=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reconstruct_pastes_what_was_visible() -> None:
    model, x = model_and_input()
    m = masking()
    pasted = model.reconstruct(x, m, paste_visible=True)
    assert torch.equal(pasted, torch.where(voxels(m.mask), model.reconstruct(x, m, paste_visible=False), x))
    assert not pasted.requires_grad
    assert torch.equal(model.reconstruct(x, masking(0.0), paste_visible=True), x)


def test_the_gaussians_are_those_that_are_rendered() -> None:
    model, x = model_and_input()
    gaussians = model.gaussians(x, masking())
    for ours, theirs in zip(gaussians.tensors(), model(x, masking()).gaussians.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.renderer(gaussians, (16, 16, 16)), model.reconstruct(x, masking(), paste_visible=False))


def test_learned_positions_are_learned() -> None:
    model, x = model_and_input(pos_embed="learned")
    model(x, masking()).loss.backward()
    assert model.encoder.pos_embed.grad.any()


def test_an_encoder_without_class_token() -> None:
    model, x = model_and_input(class_token=False, global_pool="avg", fc_norm=False)
    assert model.decoder.num_prefix_tokens == 0
    assert model(x, masking()).volume.shape == x.shape


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "papers"}, "'paper' or 'reference', got 'papers'"),
        ({"loss_weights": {"mse": 1.0, "psnr": 1.0}}, r"terms of mse, l1, .*got \['mse', 'psnr'\]"),
        ({"loss_weights": {}}, "terms of mse"),
        ({"global_pool": "avg"}, "global_pool='token' or fc_norm=False, got global_pool='avg'"),
        ({"dims": 2, "img_size": 16}, "in_chans=1 and dims=3, got in_chans=1 and dims=2"),
        ({"support": "sphere"}, "support must be 'box'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(NAME, **options)


def test_a_masking_for_another_input_is_refused() -> None:
    model, x = model_and_input()
    for wrong in (masking(tokens=12), masking(batch=3)):
        with pytest.raises(
            ValueError, match=r"the masking is for \(., ..?\) \(batch, patches\), the input has \(2, 8\)"
        ):
            model(x, wrong)


def assert_same_output(out: Any, expected: Any) -> None:
    for ours, theirs in zip(out, expected, strict=True):
        gaussians = isinstance(theirs, medgmae.Gaussians)
        torch.testing.assert_close(*(value.tensors() if gaussians else value for value in (ours, theirs)))


@pytest.mark.parametrize("options", [{}, {"loss": "reference", "image_norm": True}], ids=["paper", "reference"])
def test_every_term_compiles_exports_and_survives_autocast(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model, x = model_and_input(loss_weights=ALL_TERMS, max_scale=0.1, **options)
    m = masking()
    plain = model(x, m)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert_same_output(compiled(x, m), plain)
    assert_same_output(torch.export.export(model, (x, m)).module()(x, m), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, m)
    assert {value.dtype for value in half.terms.values()} == {torch.float32}
    assert {value.dtype for value in half.gaussians.tensors()} == {torch.float32}
    torch.testing.assert_close(half.terms, plain.terms, rtol=0.03, atol=0.003)


def test_support_is_an_option_and_the_published_names_have_the_box() -> None:
    with torch.device("meta"):
        support = {name: medgmae.create_model(name).renderer.support for name in medgmae.list_models("gmae_*")}  # type: ignore[union-attr]
    assert {name for name, value in support.items() if value == "box"} == {n for n in support if n.endswith("96")} | {
        n for n in support if "96_" in n
    }
    assert {value for value in support.values() if value != "box"} == {4.0}
    model, x = model_and_input(support=None)
    other, _ = model_and_input(support="box")
    assert not torch.allclose(model.reconstruct(x, masking(), paste_visible=False), other.reconstruct(x, masking()))


def test_it_learns_a_crop() -> None:
    model: Any = medgmae.create_model(NAME)
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, 32),) * 3, indexing="ij")
    crop = torch.stack([(z**2 + y**2 + x**2 < 0.5), (z + y < 0) & (x.abs() < 0.5)]).float().unsqueeze(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    m = medgmae.random_masking(2, 64, 0.75)
    first = model(crop, m).loss.item()
    for _ in range(100):
        loss = model(crop, m).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert loss.item() < 0.5 * crop.var().item()  # better than the best constant
