"""Latent-to-spatial maps: where in a scan an encoder's tokens are strong, as a volume on the scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Volume, crop_or_pad
from medgmae.inference.windows import evaluating, extend_rim
from medgmae.layers.masking import Masking, random_masking
from medgmae.layers.patches import check_multiple

Mode = Literal["pretrained", "finetuned"]
Reduction = Literal["max", "pca", "norm"]
Upsampling = Literal["block", "linear"]

PUBLISHED_RATIO = 0.75  # of hidden patches


@overload
def latent_to_spatial(
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
    x: Volume,
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
    x: Tensor | Volume,
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
        TypeError: not a model of this library.
        ValueError: a model for images; other channels than the model's, a size that is no multiple of the patch, NaN or
            infinity; a mask for another grid, beside what draws one, or in a mode that hides nothing; tokens without a
            last norm, in mode "pretrained"; an option that does not exist.
    """
    encoder = _encoder(model)
    mode, reduction = latent_map_defaults(model, mode, reduction)
    _check_options(mode, reduction, upsampling)
    data = x.data.unsqueeze(0) if isinstance(x, Volume) else x
    _check_input(encoder, data)
    if mode == "finetuned" and not (mask_ratio is None and masking is None and generator is None):
        raise ValueError("mode 'finetuned' hides no patches: leave out mask_ratio, masking and generator")
    if masking is not None and not (mask_ratio is None and generator is None):
        raise ValueError("masking says which patches are hidden: leave out mask_ratio and generator, which draw one")
    if isinstance(x, Volume):
        size = [-(n // -p) * p for n, p in zip(x.size, encoder.patch_size, strict=True)]
        padded = extend_rim(x, [n // 2 - m // 2 for n, m in zip(x.size, size, strict=True)], size)
        data = padded.tensor
    check_multiple(data.shape[2:], encoder.patch_size)
    if mode == "pretrained" and masking is None:
        ratio = getattr(model, "mask_ratio", PUBLISHED_RATIO) if mask_ratio is None else mask_ratio
        masking = random_masking(len(data), math.prod(_grid(encoder, data)), ratio, generator=generator)
    found = _upsample(_patch_values(encoder, data, masking, reduction), encoder.patch_size, upsampling)
    if not isinstance(x, Volume):
        return found
    return x.with_data(crop_or_pad(padded.with_data(found[0].cpu()), x.size).data)


def latent_map_defaults(
    model: nn.Module, mode: Mode | None = None, reduction: Reduction | None = None
) -> tuple[Mode, Reduction]:
    """What :func:`latent_to_spatial` does with this model where mode or reduction is None."""
    if mode is None:
        mode = "pretrained" if hasattr(model, "decoder") else "finetuned"
    if reduction is None:
        reduction = "max" if mode == "pretrained" or _encoder(model).map_reduction == "max" else "pca"
    return mode, reduction


def _encoder(model: nn.Module) -> Any:
    encoder: Any = getattr(model, "encoder", model)
    needed = ("patch_size", "in_chans", "num_prefix_tokens", "forward_features", "forward_intermediates")
    if not all(hasattr(encoder, name) for name in needed):
        raise TypeError(f"latent_to_spatial needs a model of this library, got {type(model).__name__}")
    if len(encoder.patch_size) != 3:
        raise ValueError(f"latent_to_spatial needs a model for volumes, this one takes patches {encoder.patch_size}")
    return encoder


def _check_options(mode: str, reduction: str, upsampling: str) -> None:
    choices = {
        "mode": (mode, ("pretrained", "finetuned")),
        "reduction": (reduction, ("max", "pca", "norm")),
        "upsampling": (upsampling, ("block", "linear")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_input(encoder: Any, data: Tensor) -> None:
    """data: (B, C, D, H, W)."""
    if data.dim() != 5:
        raise ValueError(f"the input must be (B, {encoder.in_chans}, D, H, W) or a Volume, got {tuple(data.shape)}")
    if data.shape[1] != encoder.in_chans:
        raise ValueError(
            f"the input has {data.shape[1]} channel(s), the model takes {encoder.in_chans}: the contrasts that it was "
            f"trained on, in its order. Or build the model with in_chans={data.shape[1]}"
        )
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise ValueError(f"{bad} of {data.numel()} voxels are NaN or infinite; expected finite intensities")


def _grid(encoder: Any, data: Tensor) -> tuple[int, ...]:
    return tuple(s // p for s, p in zip(data.shape[2:], encoder.patch_size, strict=True))


def _patch_values(encoder: Any, data: Tensor, masking: Masking | None, reduction: Reduction) -> Tensor:
    """(B, 1, d, h, w): a number per patch; of the visible ones where there is a masking."""
    grid = _grid(encoder, data)
    parameter = next(encoder.parameters())
    x = data.to(parameter.device, parameter.dtype)
    with torch.no_grad(), evaluating(encoder):
        if masking is None:
            values = _reduce(_last_block(encoder, x), reduction)  # (B, N)
        else:
            keep = _checked(encoder, masking, len(x), math.prod(grid)).to(x.device)
            tokens = encoder.forward_features(x, keep=keep)[:, encoder.num_prefix_tokens :]  # (B, n, E)
            seen = _reduce(tokens, reduction)  # (B, n)
            values = seen.new_zeros(len(x), math.prod(grid)).scatter(1, keep, seen)
    return values.reshape(len(x), 1, *grid)


def _checked(encoder: Any, masking: Masking, batch: int, patches: int) -> Tensor:
    """The visible patches (B, n) of a masking that fits the input and the encoder."""
    if isinstance(encoder.norm, nn.Identity):
        raise ValueError(
            "mode 'pretrained' reads tokens after the last norm, and this encoder normalises the pooled vector "
            "instead; use mode='finetuned', or build it with fc_norm=False"
        )
    if tuple(masking.mask.shape) != (batch, patches):
        raise ValueError(
            f"the masking is for {tuple(masking.mask.shape)} (batch, patches), the input has {(batch, patches)}"
        )
    return masking.keep


def _last_block(encoder: Any, x: Tensor) -> Tensor:
    """(B, N, E): what the last block returns for every patch, raster order."""
    tokens: Tensor = encoder.forward_last_block(x)
    return tokens[:, encoder.num_prefix_tokens :]


def _reduce(tokens: Tensor, reduction: Reduction) -> Tensor:
    """Tokens (B, n, E) to float32 numbers (B, n)."""
    tokens = tokens.float()
    if reduction == "max":
        return tokens.amax(-1)
    if reduction == "norm":
        length: Tensor = torch.linalg.vector_norm(tokens, dim=-1)
        return length
    found = []
    for sample in tokens.cpu().double():
        mean, axes = principal_axes(sample, 1)
        found.append(((sample - mean) @ axes)[:, 0])
    return torch.stack(found).float().to(tokens.device)


def principal_axes(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (E,) and the ``count`` directions (E, count) in which tokens (n, E) vary most, largest first.

    The sign of a direction is that of the sum of its loadings' cubes, so that equal tokens give equal directions.
    """
    mean = tokens.mean(0)
    axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean)).eigenvectors[:, -count:].flip(1)
    return mean, axes * torch.where(axes.pow(3).sum(0) < 0, -1.0, 1.0)


def _upsample(values: Tensor, patch: Sequence[int], upsampling: Upsampling) -> Tensor:
    """(B, 1, d, h, w) to (B, 1, D, H, W)."""
    if upsampling == "linear":
        size = [n * p for n, p in zip(values.shape[2:], patch, strict=True)]
        return F.interpolate(values, size=size, mode="trilinear", align_corners=False)
    for axis, p in enumerate(patch, 2):
        values = values.repeat_interleave(p, axis)
    return values
