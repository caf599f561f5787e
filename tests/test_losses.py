"""Losses against their formulas written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import medgmae
from medgmae.losses import NormTarget, image_norm, patch_mse, patch_statistics, scale_penalty, ssim3d, uniformity


@pytest.fixture
def patches() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0]])
    return torch.randn(2, 4, 6), 3 * torch.randn(2, 4, 6) + 1, mask


@pytest.mark.parametrize(("norm", "divisor"), [("unbiased", 5), ("biased", 6)])
def test_statistics_are_those_of_each_patch(patches: tuple[torch.Tensor, ...], norm: NormTarget, divisor: int) -> None:
    target = patches[1]
    mean, std = patch_statistics(target, norm)
    by_hand = target.sum(-1, keepdim=True) / 6
    torch.testing.assert_close(mean, by_hand)
    torch.testing.assert_close(std, ((target - by_hand).square().sum(-1, keepdim=True) / divisor + 1e-6).sqrt())


@pytest.mark.parametrize("norm", [None, "unbiased", "biased"])
def test_the_loss_is_the_mean_over_masked_patches(patches: tuple[torch.Tensor, ...], norm: NormTarget | None) -> None:
    pred, target, mask = patches
    goal = target
    if norm:
        mean, std = patch_statistics(target, norm)
        goal = (target - mean) / std
    errors = [((pred[b, i] - goal[b, i]) ** 2).mean() for b in range(2) for i in range(4) if mask[b, i]]
    torch.testing.assert_close(patch_mse(pred, target, mask, norm), torch.stack(errors).mean())


def test_biased_normalisation_is_a_layer_norm(patches: tuple[torch.Tensor, ...]) -> None:
    target = patches[1]
    mean, std = patch_statistics(target, "biased")
    torch.testing.assert_close((target - mean) / std, torch.nn.functional.layer_norm(target, (6,), eps=1e-6))


def test_visible_patches_do_not_count(patches: tuple[torch.Tensor, ...]) -> None:
    pred, target, mask = patches
    other = torch.where(mask.unsqueeze(-1) > 0, pred, torch.full_like(pred, 1e6))
    assert torch.equal(patch_mse(other, target, mask), patch_mse(pred, target, mask))


def test_with_nothing_masked_the_loss_is_zero_and_so_is_its_gradient(patches: tuple[torch.Tensor, ...]) -> None:
    pred = patches[0].requires_grad_()
    loss = patch_mse(pred, patches[1], torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0
    assert pred.grad is not None
    assert not pred.grad.any()


def test_a_constant_patch_gives_a_finite_loss(patches: tuple[torch.Tensor, ...]) -> None:
    pred, _, mask = patches
    assert patch_mse(pred, torch.full_like(pred, 7.0), mask, "unbiased").isfinite()


def test_half_precision_is_computed_in_float32(patches: tuple[torch.Tensor, ...]) -> None:
    pred, target, mask = (t.bfloat16() for t in patches)
    loss = patch_mse(pred, target, mask, "unbiased")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, patch_mse(pred.float(), target.float(), mask.float(), "unbiased"))


def test_the_gradient_is_right(patches: tuple[torch.Tensor, ...]) -> None:
    pred, target, mask = patches
    pred.requires_grad_()
    patch_mse(pred, target, mask).backward()
    expected = 2 * (pred - target) * mask.unsqueeze(-1) / (6 * mask.sum())
    torch.testing.assert_close(pred.grad, expected.detach())


def test_image_norm_is_over_the_crop() -> None:
    volume = 3 * torch.rand(2, 1, 4, 5, 6) + 7
    normed = image_norm(volume)
    torch.testing.assert_close(normed.mean((2, 3, 4)), torch.zeros(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var((2, 3, 4), unbiased=False), torch.ones(2, 1), atol=1e-4, rtol=0)
    assert image_norm(torch.full((1, 1, 4, 4, 4), 5.0)).isfinite().all()


def test_the_scale_penalty_counts_what_is_too_large() -> None:
    scales = torch.tensor([[0.4, 0.5, 0.7], [0.1, 1.0, 0.2]])
    assert scale_penalty(scales).item() == pytest.approx((0.2**2 + 0.5**2) / 6)
    assert scale_penalty(scales, 0.6).item() == pytest.approx((0.1**2 + 0.4**2) / 6)
    assert scale_penalty(scales, 1.0).item() == 0


def test_uniformity_is_the_mean_over_pairs() -> None:
    means = torch.rand(2, 5, 3, dtype=torch.float64)
    pairs = [
        torch.exp(-(means[b, i] - means[b, j]).square().sum() / 0.5)
        for b in range(2)
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    torch.testing.assert_close(uniformity(means), torch.stack(pairs).mean())
    assert uniformity(torch.full((1, 4, 3), 0.3)).item() == pytest.approx(1.0)
    assert uniformity(means[:, :1]).item() == 0
    assert torch.autograd.gradcheck(uniformity, means.requires_grad_())


def plain_ssim(a: torch.Tensor, b: torch.Tensor, window: int, sigma: float, span: float) -> float:
    """SSIM of two volumes (D, H, W), voxel by voxel."""
    half = window // 2
    g = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=a.dtype) / sigma) ** 2)
    g = g / g.sum()
    kernel = g[:, None, None] * g[:, None] * g
    a, b = (torch.nn.functional.pad(v, (half,) * 6) for v in (a, b))
    found = []
    for z, y, x in itertools.product(*(range(n - 2 * half) for n in a.shape)):
        p, q = (v[z : z + window, y : y + window, x : x + window] for v in (a, b))
        mp, mq = (kernel * p).sum(), (kernel * q).sum()
        vp, vq, cov = (kernel * p * p).sum() - mp**2, (kernel * q * q).sum() - mq**2, (kernel * p * q).sum() - mp * mq
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return torch.stack(found).mean().item()


@pytest.mark.parametrize(("window", "sigma", "span"), [(7, 1.5, 1.0), (3, 0.8, 4.0), (11, 1.5, 1.0)])
def test_ssim_is_its_formula(window: int, sigma: float, span: float) -> None:
    a, b = torch.rand(2, 2, 1, 5, 4, 6, dtype=torch.float64)
    expected = [plain_ssim(p[0], q[0], window, sigma, span) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(ssim3d(a, b, window, sigma, span), torch.tensor(expected, dtype=torch.float64))


def test_ssim_of_equal_volumes_is_one_and_channels_are_averaged() -> None:
    a, b = torch.rand(2, 2, 3, 6, 6, 6)
    torch.testing.assert_close(ssim3d(a, a), torch.ones(2))
    each = torch.stack([ssim3d(a[:, c : c + 1], b[:, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(ssim3d(a, b), each.mean(0))
    assert ssim3d(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_ssim_has_the_right_gradient_and_ignores_autocast() -> None:
    a, b = torch.rand(2, 1, 1, 4, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: ssim3d(v, b, 3), a.requires_grad_())
    p, q = torch.rand(2, 1, 1, 9, 8, 7)
    with torch.autocast("cpu", torch.bfloat16):
        half = ssim3d(p, q), uniformity(p[0, 0, :, :, :3])
    assert torch.equal(half[0], ssim3d(p, q))
    assert torch.equal(half[1], uniformity(p[0, 0, :, :, :3]))


def test_ssim_of_what_cannot_be_compared_is_refused() -> None:
    a = torch.rand(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="of one shape"):
        ssim3d(a, a[..., :3])
    with pytest.raises(ValueError, match="two volumes"):
        ssim3d(a[0], a[0])
    with pytest.raises(ValueError, match="odd and positive, got 6"):
        ssim3d(a, a, window_size=6)


@pytest.mark.parametrize("size", [(5, 4, 6), (7, 3)])
def test_dice_losses_equal_monai(size: tuple[int, ...]) -> None:
    from monai.losses import DiceCELoss, DiceLoss

    logits, labels = 3 * torch.randn(2, 4, *size), torch.randint(0, 3, (2, 1, *size))  # nothing has the last class
    options = {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6}
    expected = DiceCELoss(to_onehot_y=True, softmax=True, **options)(logits, labels)
    torch.testing.assert_close(medgmae.dice_ce_loss(logits, labels), expected)
    torch.testing.assert_close(medgmae.dice_ce_loss(logits, labels[:, 0].float()), expected)
    masks = torch.randint(0, 2, logits.shape)
    expected = DiceLoss(sigmoid=True, **options)(logits, masks.float())
    torch.testing.assert_close(medgmae.dice_loss(logits, masks, multilabel=True), expected)


def test_gradients_of_dice_losses() -> None:
    logits = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    labels, masks = torch.randint(0, 3, (2, 3, 2, 2)), torch.randint(0, 2, logits.shape)
    assert torch.autograd.gradcheck(lambda x: medgmae.dice_ce_loss(x, labels), logits)
    assert torch.autograd.gradcheck(lambda x: medgmae.dice_loss(x, masks, multilabel=True), logits)
    assert medgmae.dice_ce_loss(logits.half(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "multilabel", "message"),
    [
        (torch.zeros(2, 4, 4), False, r"need class ids \(2, 4, 4, 4\), got \(2, 4, 4\)"),
        (torch.full((2, 4, 4, 4), 3), False, "0 to 2, as the logits have 3 channels, got 3 to 3"),
        (torch.full((2, 1, 4, 4, 4), -1), False, "got -1 to -1"),
        (torch.zeros(2, 1, 4, 4, 4), True, r"need masks of that shape, got \(2, 1, 4, 4, 4\)"),
    ],
)
def test_targets_that_do_not_fit(target: Tensor, multilabel: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        medgmae.dice_loss(torch.zeros(2, 3, 4, 4, 4), target, multilabel=multilabel)


def test_only_known_labels_count() -> None:
    logits, target = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 1, math.nan])
    wanted = target.expand(4, 3).clone()
    loss = medgmae.losses.multilabel_loss(logits, wanted)
    known = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, :2], wanted[:, :2].double())
    torch.testing.assert_close(loss, known)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[:, 2].any()
    assert logits.grad[:, :2].all()
    assert float(medgmae.losses.multilabel_loss(logits.detach(), torch.full((4, 3), math.nan))) == 0
    smooth = medgmae.losses.multilabel_loss(logits[:, :2], wanted[:, :2], smoothing=0.2)
    softened = torch.tensor([0.1, 0.9], dtype=torch.float64).expand(4, 2)
    torch.testing.assert_close(smooth, torch.nn.functional.binary_cross_entropy_with_logits(logits[:, :2], softened))
    with pytest.raises(ValueError, match="masks of that shape"):
        medgmae.losses.multilabel_loss(logits, wanted[:, :2])


def test_cox_is_the_partial_likelihood() -> None:
    risk = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    time, event = torch.tensor([5.0, 2, 2, 9]), torch.tensor([1.0, 1, 0, 0])
    values, by_hand = risk.tolist(), 0.0
    for i in (0, 1):  # the events; at risk are those observed at least as long, ties among them
        at_risk = [k for k in range(4) if time[k] >= time[i]]
        by_hand -= values[i] - math.log(sum(math.exp(values[k]) for k in at_risk))
    assert float(medgmae.losses.cox_loss(risk.detach(), time, event)) == pytest.approx(by_hand / 2)
    assert torch.autograd.gradcheck(lambda r: medgmae.losses.cox_loss(r, time, event), (risk,))
    assert float(medgmae.losses.cox_loss(risk.detach(), time, torch.zeros(4))) == 0
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        medgmae.losses.cox_loss(risk[:, None], time, event)
