"""Reconstruction losses against their formulas written out."""

from __future__ import annotations

import pytest
import torch

from medgmae.losses import NormTarget, patch_mse, patch_statistics


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
