"""Latent-to-spatial maps: where in a scan an encoder's tokens are strong, as a volume on the scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Volume
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import check_channels, encoder_of, is_batch, volume_of
from medgmae.inference.windows import cut, evaluating, lay_out
from medgmae.layers.masking import Masking, random_masking
from medgmae.layers.patches import check_multiple
from medgmae.models.encoder import Encoder
from medgmae.models.parts import unwrap

Mode = Literal["pretrained", "finetuned"]
Reduction = Literal["max", "pca", "norm"]
Upsampling = Literal["block", "linear"]

PUBLISHED_RATIO = 0.75  # of hidden patches


@overload
def latent_to_spatial(  # type: ignore[overload-overlap]  # a batch has five axes, a scan that is a tensor four
    model: nn.Module,
    x: Tensor,
    *,
    mode: Mode | None = ...,
    reduction: Reduction | None = ...,
    upsampling: Upsampling = ...,
    mask_ratio: float | None = ...,
    masking: Masking | None = ...,
    generator: torch.Generator | None = ...,
) -> Tensor: ...


@overload
def latent_to_spatial(
    model: nn.Module,
    x: ScanLike,
    *,
    mode: Mode | None = ...,
    reduction: Reduction | None = ...,
    upsampling: Upsampling = ...,
    mask_ratio: float | None = ...,
    masking: Masking | None = ...,
    generator: torch.Generator | None = ...,
) -> Volume: ...


def latent_to_spatial(
    model: nn.Module,
    x: Tensor | ScanLike,
    *,
    mode: Mode | None = None,
    reduction: Reduction | None = None,
    upsampling: Upsampling = "block",
    mask_ratio: float | None = None,
    masking: Masking | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | Volume:
    """One number per patch from its token, laid out over the patch's voxels (3D Mamba MAE, arXiv 2409.07746).

    - "pretrained": the encoder sees the patches that a random mask leaves. A visible patch gets its token after the
      last norm, reduced to one number; a hidden one gets 0.
    - "finetuned": the encoder sees every patch. A patch gets what the last block returns, before the last norm, reduced
      to one number. A block of a Vim returns its mixer's output, not yet added to the residual stream; a block of a ViT
      returns the stream itself.

    The model runs in evaluation mode and without gradients, and gets its own mode back. The published scripts leave
    dropped paths on, so that their maps of one scan differ from run to run.

    Args:
        model: an encoder of this library or a masked autoencoder; neither decoder nor head has a part in the maps.
        x: (B, C, D, H, W), every axis a multiple of the patch; or a preprocessed scan (C, D, H, W) of any size, whose
            rim is repeated up to whole patches. It goes through the model in one pass, whatever its size.
        mode: None: "pretrained" for a masked autoencoder, "finetuned" for an encoder.
        reduction: "max" over the features; "norm", their Euclidean length; "pca", the first principal component over
            the tokens of the sample, its sign fixed by the sum of its loadings' cubes. None as published: "pca" for the
            last block of a ViT, whose largest feature is often one and the same everywhere, and "max" for all else.
        upsampling: "block" repeats a patch's number over its voxels; "linear" interpolates between patch centres, over
            the zeros of hidden patches too.
        mask_ratio: share of hidden patches; None for the autoencoder's own, 0.75 for an encoder.
        masking: which patches are visible, instead of a random choice: for the patches of ``x``, those at its rim
            included that are only partly in the scan.
        generator: source of the random choice.

    Returns:
        (B, 1, D, H, W) float32 on the model's device; for a scan, (1, D, H, W) on its own grid.

    Raises:
        TypeError: not a model of this library, or neither a tensor nor a scan.
        ValueError: a model for images; other channels than the model's, a size that is not a multiple of the patch,
            NaN or infinity; a mask for another grid, beside what draws one, or in a mode that hides nothing; tokens
            without a last norm, in mode "pretrained"; an option that does not exist.
    """
    model = unwrap(model)
    encoder = encoder_of(model, "latent_to_spatial")
    mode, reduction = latent_map_defaults(model, mode, reduction)
    _check_options(mode, reduction, upsampling)
    if mode == "finetuned" and not (mask_ratio is None and masking is None and generator is None):
        raise ValueError("mode 'finetuned' hides no patches: leave out mask_ratio, masking and generator")
    if masking is not None and not (mask_ratio is None and generator is None):
        raise ValueError("masking says which patches are hidden: leave out mask_ratio and generator, which draw one")
    volume: Volume | None = None
    if is_batch(x):
        data = x
    else:
        volume = volume_of(x)
        data = volume.data[None]
    _check_input(encoder, data)
    layout = lay_out(tuple(data.shape[2:]), encoder.patch_size, None, overlap=0)
    if volume is None:
        check_multiple(layout.size, layout.patch)
    else:
        data = cut(volume.data, layout.corner((0, 0, 0)), layout.padded_size, "rim")[None]
    if mode == "pretrained" and masking is None:
        ratio = getattr(model, "mask_ratio", PUBLISHED_RATIO) if mask_ratio is None else mask_ratio
        masking = random_masking(len(data), math.prod(layout.grid), ratio, generator=generator)
    if masking is not None:
        _check_masking(encoder, masking, (len(data), math.prod(layout.grid)))
    with torch.no_grad(), evaluating(model):
        values = _patch_values(encoder, data, masking, reduction)  # (B, N)
    result = upsample(values.reshape(-1, 1, *layout.grid), layout.patch, upsampling)
    return result if volume is None else volume.with_data(result[0].cpu()[(slice(None), *layout.scan)].contiguous())


def latent_map_defaults(
    model: nn.Module, mode: Mode | None = None, reduction: Reduction | None = None
) -> tuple[Mode, Reduction]:
    """What :func:`latent_to_spatial` does with this model where mode or reduction is None."""
    if mode is None:
        mode = "pretrained" if hasattr(unwrap(model), "decoder") else "finetuned"
    if reduction is None:
        reduction = (
            "max" if mode == "pretrained" or encoder_of(model, "latent_to_spatial").map_reduction == "max" else "pca"
        )
    return mode, reduction


def _check_options(mode: str, reduction: str, upsampling: str) -> None:
    choices = {
        "mode": (mode, ("pretrained", "finetuned")),
        "reduction": (reduction, ("max", "pca", "norm")),
        "upsampling": (upsampling, ("block", "linear")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_input(encoder: Encoder, data: Tensor) -> None:
    """data: (B, C, D, H, W)."""
    if data.dim() != 5:
        raise ValueError(f"the input must be (B, {encoder.in_chans}, D, H, W) or a Volume, got {tuple(data.shape)}")
    check_channels(encoder, data.shape[1])
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise ValueError(f"{bad} of {data.numel()} voxels are NaN or infinite; expected finite intensities")


def _patch_values(encoder: Encoder, data: Tensor, masking: Masking | None, reduction: Reduction) -> Tensor:
    """(B, N): a number per patch; of the visible ones where there is a masking."""
    parameter = next(encoder.parameters())
    x = data.to(parameter.device, parameter.dtype)
    if masking is None:
        return reduce_tokens(encoder.forward_last_block(x)[:, encoder.num_prefix_tokens :], reduction)
    keep = masking.keep.to(x.device)
    tokens = encoder.forward_features(x, keep=keep)[:, encoder.num_prefix_tokens :]  # (B, n, E)
    seen = reduce_tokens(tokens, reduction)  # (B, n)
    return seen.new_zeros(masking.mask.shape).scatter(1, keep, seen)


def _check_masking(encoder: Encoder, masking: Masking, expected: tuple[int, int]) -> None:
    """``expected``: batch, patches of the input."""
    if isinstance(encoder.norm, nn.Identity):
        raise ValueError(
            "mode 'pretrained' reads tokens after the last norm, and this encoder normalises the pooled vector "
            "instead; use mode='finetuned', or build it with fc_norm=False"
        )
    if tuple(masking.mask.shape) != expected:
        raise ValueError(f"the masking is for {tuple(masking.mask.shape)} (batch, patches), the input has {expected}")


def reduce_tokens(tokens: Tensor, reduction: Reduction) -> Tensor:
    """Tokens (B, n, E) to float32 numbers (B, n)."""
    tokens = tokens.float()
    if reduction == "max":
        return tokens.amax(-1)
    if reduction == "norm":
        length: Tensor = torch.linalg.vector_norm(tokens, dim=-1)
        return length
    components = []
    for sample in tokens.cpu().double():
        mean, axes = principal_axes(sample, 1)
        components.append(((sample - mean) @ axes)[:, 0])
    return torch.stack(components).float().to(tokens.device)


def principal_axes(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (E,) and the ``count`` directions (E, count) in which tokens (n, E) vary most, largest first.

    The sign of a direction is that of the sum of its loadings' cubes, so that equal tokens give equal directions.
    """
    mean = tokens.mean(0)
    axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean)).eigenvectors[:, -count:].flip(1)
    return mean, axes * torch.where(axes.pow(3).sum(0) < 0, -1.0, 1.0)


def upsample(values: Tensor, patch: Sequence[int], upsampling: Upsampling) -> Tensor:
    """(B, 1, d, h, w) to (B, 1, D, H, W)."""
    if upsampling == "linear":
        size = [n * p for n, p in zip(values.shape[2:], patch, strict=True)]
        return F.interpolate(values, size=size, mode="trilinear", align_corners=False)
    for axis, p in enumerate(patch, 2):
        values = values.repeat_interleave(p, axis)
    return values
