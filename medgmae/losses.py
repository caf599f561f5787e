"""Reconstruction losses over patches and volumes, and penalties on Gaussians."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.ops.precision import full_precision

NormTarget = Literal["unbiased", "biased"]

# Added to a patch's variance before the root, in every published variant.
PATCH_EPS = 1e-6


def patch_statistics(patches: Tensor, norm: NormTarget) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, both (B, N, 1): std = sqrt(var + 1e-6).

    ``norm`` says which variance: "unbiased" divides by n - 1 (He et al. 2022 and TANGERINE), "biased" by n (a layer
    norm without affine part: SelfMedMAE and the voxel baseline of MedGMAE).
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=int(norm == "unbiased"))
    return mean, (variance + PATCH_EPS).sqrt()


def patch_mse(pred: Tensor, target: Tensor, mask: Tensor, norm: NormTarget | None = None) -> Tensor:
    """Mean squared error over the masked patches, a scalar; computed in float32, of float64 in float64.

    Args:
        pred: (B, N, L) predicted patch vectors.
        target: (B, N, L) true patch vectors.
        mask: (B, N), 1 where a patch counts. With nothing masked the loss is 0.
        norm: None compares raw values; otherwise each true patch is normalised, see :func:`patch_statistics`.
    """
    exact = torch.promote_types(pred.dtype, torch.float32)
    pred, target, mask = pred.to(exact), target.to(exact), mask.to(exact)
    if norm is not None:
        mean, std = patch_statistics(target, norm)
        target = (target - mean) / std
    per_patch = (pred - target).square().mean(-1)
    return (per_patch * mask).sum() / mask.sum().clamp(min=1)


def fourier_code(values: Tensor, frequencies: int, temperature: float = 0.01, lowest: float = 2 * math.pi) -> Tensor:
    """Each number as sines and cosines, (..., 2 K): sin(t w_0) .. sin(t w_K-1), cos(t w_0) .. cos(t w_K-1).

    w_k = lowest / temperature^(k / K), float32 but for float64. The 2D masked autoencoder of SelfMedMAE predicts this
    code of every pixel (lib/models/mae.py, FourierMSELossv2); its ``fourier_embed_dim`` is 2 K times the channels.

    Args:
        values: (...) numbers t.
        frequencies: K, at least 1.
        temperature: between 0 and 1 for frequencies that grow; the published one is 0.01.
        lowest: w_0 in radians per unit of t.

    Raises:
        ValueError: no frequencies, or a temperature that is not positive.
    """
    values = values if values.dtype == torch.float64 else values.float()
    angles = values.unsqueeze(-1) * _angular(frequencies, temperature, lowest, values)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _angular(frequencies: int, temperature: float, lowest: float, like: Tensor) -> Tensor:
    """(K,) radians per unit, in the type of ``like``."""
    check_fourier(frequencies, temperature)
    exponents = torch.arange(frequencies, dtype=like.dtype, device=like.device) / frequencies
    return lowest / temperature**exponents


def check_fourier(frequencies: int, temperature: float) -> None:
    """Raise ValueError unless these describe a code."""
    if frequencies < 1 or not temperature > 0:
        raise ValueError(
            f"a Fourier code needs at least one frequency and a positive temperature, got {frequencies} and "
            f"{temperature}"
        )


@torch.no_grad()
def fourier_decode(code: Tensor, temperature: float = 0.01, bounds: tuple[float, float] = (-3.0, 3.0)) -> Tensor:
    """The numbers (...) whose :func:`fourier_code` is nearest to ``code`` (..., 2 K), within ``bounds``.

    The lowest frequency alone has a period of 1, and so says a number up to whole steps; the others tell them apart, as
    far as their ratios are no whole numbers: with one frequency, bounds wider than 1 leave the answer open. The four
    best places of a table with eight entries per period of the highest frequency are refined by Newton's method, in
    float64, and the best of them is taken. An exact code gives its number back within 1e-6. With normal
    noise of 0.3 on every number of a code of 12 frequencies, half of the errors are below 0.0004 and 2 in 100,000 above
    0.1; of 4 frequencies, 3 in 10 are.

    Args:
        code: (..., 2 K), of any length: only its direction counts.
        temperature: that of the code.
        bounds: lowest and highest number looked for; the default holds images normalised as the published ones are.

    Raises:
        ValueError: an odd number of values, or bounds that do not increase.
    """
    low, high = bounds
    if code.shape[-1] % 2 or not low < high:
        raise ValueError(f"expected sines and as many cosines, and bounds low < high, got {code.shape[-1]}, {bounds}")
    sines_cosines = code.double().reshape(-1, code.shape[-1])
    omega = _angular(code.shape[-1] // 2, temperature, 2 * math.pi, sines_cosines)
    count = 2 + math.ceil((high - low) * 8 * float(omega.max()) / (2 * math.pi))
    table = torch.linspace(low, high, count, dtype=torch.float64, device=code.device)
    entries = fourier_code(table, len(omega), temperature).float().T
    rows = max(1, (1 << 23) // count)  # 32 MB of products at a time
    step = (high - low) / (count - 1)
    found = [_nearest(part, table, entries, omega, step) for part in torch.split(sines_cosines, rows)]
    return torch.cat(found).reshape(code.shape[:-1]).to(code.dtype)


def _nearest(code: Tensor, table: Tensor, entries: Tensor, omega: Tensor, step: float) -> Tensor:
    """The numbers (n,) of codes (n, 2 K): ``table`` holds candidates, ``entries`` (2 K, m) their codes."""
    agreement = F.pad(code.float() @ entries, (1, 1), value=-math.inf)
    middle = agreement[:, 1:-1]
    peak = (middle >= agreement[:, :-2]) & (middle >= agreement[:, 2:])
    best = middle.masked_fill(~peak, -math.inf).topk(min(4, len(table)), dim=1).indices
    # From the table's entry to the top of the agreement, at most one entry away.
    start = values = table[best]
    sines, cosines = code.unsqueeze(1).chunk(2, dim=-1)
    for _ in range(4):
        angles = values.unsqueeze(-1) * omega
        slope = (omega * (sines * angles.cos() - cosines * angles.sin())).sum(-1)
        curvature = (omega.square() * (sines * angles.sin() + cosines * angles.cos())).sum(-1)
        change = torch.where(curvature > 0, slope / curvature.clamp(min=1e-12), 0.0)
        values = (values + change).clamp(start - step, start + step).clamp(table[0], table[-1])
    angles = values.unsqueeze(-1) * omega
    exact = (sines * angles.sin() + cosines * angles.cos()).sum(-1)
    return values.gather(1, exact.argmax(1, keepdim=True)).squeeze(1)


def fourier_mse(pred: Tensor, target: Tensor, frequencies: int, temperature: float = 0.01) -> Tensor:
    """Mean squared difference of the Fourier codes of two tensors, a scalar: SelfMedMAE's first Fourier loss.

    Its lowest frequency is 1 radian per unit. The reference defines it (lib/models/mae.py, FourierMSELoss) and trains
    with the other one, where the prediction is the code: :func:`patch_mse` with :func:`fourier_code` of the target.

    Args:
        pred: any shape.
        target: the same shape.
        frequencies: K of :func:`fourier_code`; likewise ``temperature``.

    Raises:
        ValueError: shapes that differ.
    """
    if pred.shape != target.shape:
        raise ValueError(f"fourier_mse needs one shape, got {tuple(pred.shape)} and {tuple(target.shape)}")
    difference = fourier_code(pred, frequencies, temperature, 1.0) - fourier_code(target, frequencies, temperature, 1.0)
    return difference.square().mean()


def image_norm(volume: Tensor) -> Tensor:
    """Every channel of a crop (B, C, D, H, W) with mean 0 and biased variance 1, epsilon 1e-6: MedGMAE's image norm."""
    return F.layer_norm(volume, volume.shape[-3:], eps=PATCH_EPS)


def scale_penalty(scales: Tensor, max_scale: float = 0.5) -> Tensor:
    """Mean square of what scales (..., in units of the axis) are above ``max_scale``, a scalar (MedGMAE)."""
    return (scales - max_scale).relu().square().mean()


def uniformity(means: Tensor, temperature: float = 0.5) -> Tensor:
    """How close together points lie, a scalar between 0 and 1: mean of exp(-|a - b|² / temperature) over pairs.

    After Wang & Isola 2020 as MedGMAE has it, over ordered pairs of different points and averaged over the batch.
    Needs memory for all pairs.

    Args:
        means: (B, K, 3) points.
        temperature: in squared units of the axes.
    """
    squares = means.square().sum(-1)
    with full_precision(means):
        products = means @ means.transpose(-1, -2)  # (B, K, K)
    distances = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * products).clamp(min=0)
    close = (-distances / temperature).exp()
    count = means.shape[-2]
    pairs = close.sum((-1, -2)) - close.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs.mean() / max(count * (count - 1), 1)


def ssim3d(a: Tensor, b: Tensor, window_size: int = 7, sigma: float = 1.5, data_range: float = 1.0) -> Tensor:
    """Structural similarity of volumes (Wang et al. 2004), (B,): 1 for equal ones; its mean is that of the batch.

    Local moments by a Gaussian window with zeros outside of the volume and no correction for them, constants
    (0.01 · range)² and (0.03 · range)²; the mean over channels and voxels. Float64 is computed as such, all else in
    float32. The constants and the border are MedGMAE's, whose loss is 1 - SSIM.

    Args:
        a: (B, C, D, H, W).
        b: the same shape.
        window_size: voxels of the window along each axis, odd.
        sigma: standard deviation of the window in voxels.
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: shapes that differ or are not of volumes, or an even window.
    """
    if a.shape != b.shape or a.dim() != 5:
        raise ValueError(
            f"expected two volumes (B, C, D, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size must be odd and positive, got {window_size}")
    a, b = (v if v.dtype == torch.float64 else v.float() for v in (a, b))
    moments = _blur(torch.stack([a, b, a * a, b * b, a * b]), window_size, sigma)
    mean_a, mean_b, square_a, square_b, product = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    covariance = product - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity: Tensor = top / ((mean_a.square() + mean_b.square() + c1) * (variances + c2))
    return similarity.flatten(1).mean(1)


def _blur(volumes: Tensor, window_size: int, sigma: float) -> Tensor:
    """Gaussian average (..., D, H, W) with zeros outside, as a product with a band matrix along each axis.

    That is ten times quicker than a convolution of one channel, forward and backward.
    """
    depth, height, width = (_band(n, window_size, sigma, volumes) for n in volumes.shape[-3:])
    with full_precision(volumes):
        volumes = height @ (volumes @ width)
        return (depth @ volumes.flatten(-2)).reshape(volumes.shape)


def _band(size: int, window_size: int, sigma: float, like: Tensor) -> Tensor:
    """(size, size) symmetric matrix whose rows are the window, cut off at the ends of the axis."""
    offsets = torch.arange(size, dtype=like.dtype, device=like.device)
    offsets = offsets.unsqueeze(1) - offsets
    half = window_size // 2
    total = sum(math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-half, half + 1))
    return (-0.5 * (offsets / sigma).square()).exp() * (offsets.abs() <= half) / total


def psnr(predicted: Tensor, true: Tensor, *, data_range: float = 1.0, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range² / mean squared error); infinite where nothing differs.

    Args:
        predicted: any shape.
        true: the same shape.
        data_range: largest minus smallest possible value.
        where: bool, of a shape that broadcasts to theirs: the voxels that count; all when None.

    Raises:
        ValueError: shapes differ, no voxel counts, or the range is not positive.
    """
    if predicted.shape != true.shape or not data_range > 0:
        raise ValueError(
            f"psnr needs two volumes of one shape and a positive data_range, got {tuple(predicted.shape)}, "
            f"{tuple(true.shape)} and {data_range}"
        )
    squared = (predicted.double() - true.double()).square()
    squared = squared if where is None else squared[where.expand_as(squared)]
    if not squared.numel():
        raise ValueError("psnr of no voxels; expected at least one that counts")
    error = float(squared.mean())
    return 10 * math.log10(data_range**2 / error) if error > 0 else math.inf


def dice_loss(logits: Tensor, target: Tensor, *, multilabel: bool = False, smooth: float = 1e-6) -> Tensor:
    """1 minus a soft Dice, averaged over batch and classes, background included; a scalar.

    ``1 - 2 Σ p t / (Σ p² + Σ t² + smooth)`` over the voxels (Milletari et al. 2016), with the smoothing of SelfMedMAE:
    none above, ``smooth`` below. Half precision is computed in float32.

    Args:
        logits: (B, K, *size).
        target: class ids (B, *size) or (B, 1, *size); with ``multilabel`` masks (B, K, *size) of 0 and 1.
        multilabel: p is the sigmoid of each channel by itself instead of the softmax over the channels.

    Raises:
        ValueError: shapes that do not fit, or ids that are no classes.
    """
    logits = _at_least_single(logits)
    truth = _masks(logits, target) if multilabel else F.one_hot(_ids(logits, target), logits.shape[1]).movedim(-1, 1)
    share, truth = (logits.sigmoid() if multilabel else logits.softmax(1)).flatten(2), truth.flatten(2).to(logits.dtype)
    above = 2 * (share * truth).sum(-1)
    below = share.square().sum(-1) + truth.square().sum(-1) + smooth
    return (1 - above / below).mean()


def dice_ce_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-6) -> Tensor:
    """:func:`dice_loss` of a softmax plus the mean cross-entropy, a scalar: SelfMedMAE's loss on BTCV.

    Args:
        logits: (B, K, *size).
        target: class ids (B, *size) or (B, 1, *size).

    Raises:
        ValueError: shapes that do not fit, or ids that are no classes.
    """
    logits = _at_least_single(logits)
    return dice_loss(logits, target, smooth=smooth) + F.cross_entropy(logits, _ids(logits, target))


def multilabel_loss(logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross-entropy of the labels that are known, a scalar; 0 where none is.

    Args:
        logits: (B, L).
        target: (B, L), 0 or 1, NaN where the label is not known.
        smoothing: moves targets towards 1/2 by this share.

    Raises:
        ValueError: shapes that do not fit.
    """
    logits, target = _at_least_single(logits), _masks(logits, target).to(logits.device)
    known = ~target.isnan()
    wanted = torch.where(known, target, 0.5).to(logits.dtype) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log partial likelihood of Cox's proportional hazards per event, a scalar; ties as Breslow (1974).

    A batch without an event has loss 0. Of a batch that is a part of the cases, only its own risk sets count.

    Args:
        risk: (B,), the log hazard ratio.
        time: (B,), of the event or of the end of observation, any unit.
        event: (B,), 1 for an event, 0 for a case that was observed no longer.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not risk.dim() == 1 or not risk.shape == time.shape == event.shape:
        raise ValueError(
            f"risk, time and event must be (B,), got {tuple(risk.shape)}, {tuple(time.shape)}, {tuple(event.shape)}"
        )
    risk = _at_least_single(risk)
    at_risk = time[None, :] >= time[:, None]  # (B, B): who is still observed at the time of each
    likelihoods = risk - risk[None, :].masked_fill(~at_risk, -math.inf).logsumexp(1)
    happened = event.to(risk.dtype)
    return -(likelihoods * happened).sum() / happened.sum().clamp(min=1)


def _at_least_single(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _ids(logits: Tensor, target: Tensor) -> Tensor:
    """Class ids (B, *size), int64."""
    size, classes = (len(logits), *logits.shape[2:]), logits.shape[1]
    if target.shape == (size[0], 1, *size[1:]):
        target = target[:, 0]
    if target.shape != size:
        raise ValueError(f"logits {tuple(logits.shape)} need class ids {size}, got {tuple(target.shape)}")
    low, high = target.aminmax() if target.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"class ids must be 0 to {classes - 1}, as the logits have {classes} channels, got {low} to {high}"
        )
    return target.long()


def _masks(logits: Tensor, target: Tensor) -> Tensor:
    if target.shape != logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need masks of that shape, got {tuple(target.shape)}")
    return target
