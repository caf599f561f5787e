"""Adapters for SelfMedMAE's 2D masked autoencoder and its Fourier losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import medgmae
from medgmae.losses import fourier_code, fourier_mse, patch_mse
from medgmae.models.mae import masked_vit
from parity import adapter
from parity.case import EXACT, Case, Options, triple
from parity.models import check_gradients, load
from parity.official import write_file


def frequencies(width: int, channels: int) -> int:
    """Frequencies per channel of the reference's ``fourier_embed_dim``."""
    count = width // (2 * channels)
    assert 2 * channels * count == width, f"fourier_embed_dim={width} is no multiple of twice {channels} channels"
    return count


def build(config: dict[str, Any]) -> medgmae.MaskedAutoencoder:
    """The model of a case's settings."""
    settings = Options(config)
    settings.require(patchembed="PatchEmbed2D", pos_embed_type="sincos")
    channels = settings("in_chans")
    model = masked_vit(
        img_size=triple(settings("input_size"), 2),
        patch_size=triple(settings("patch_size"), 2),
        in_chans=channels,
        embed_dim=settings("encoder_embed_dim"),
        depth=settings("encoder_depth"),
        num_heads=settings("encoder_num_heads"),
        decoder_embed_dim=settings("decoder_embed_dim"),
        decoder_depth=settings("decoder_depth"),
        decoder_num_heads=settings("decoder_num_heads"),
        mask_ratio=settings("mask_ratio"),
        fourier_frequencies=frequencies(settings("fourier_embed_dim"), channels),
        fourier_temperature=settings("fourier_temperature"),
        norm_eps=settings.norm_eps(),
        dims=2,
    )
    settings.done()
    return model


def channels_first(patches: Tensor, channels: int) -> Tensor:
    """Patch vectors (B, N, pixels * C) as the reference has them, (B, N, C * pixels)."""
    return patches.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)


@adapter("selfmedmae/mae2d")
def mae2d(case: Case) -> None:
    model = load(build(case.spec["config"]), write_file(case, case.weights))
    x, shuffle = case.input("image"), case.input("shuffle_indices").long()
    masking = medgmae.random_masking(len(x), shuffle.shape[1], model.mask_ratio, noise=shuffle.argsort(dim=1).double())
    case.same("visible patches", masking.keep.tolist(), shuffle[:, : masking.keep.shape[1]].tolist())
    case.same("visible", masking.keep.shape[1], case.spec.get("visible", masking.keep.shape[1]))
    case.same("patches", shuffle.shape[1], case.spec.get("num_patches", shuffle.shape[1]))
    output = model(x, masking)
    patches = channels_first(medgmae.patchify(x, model.patch_size), model.in_chans)
    case.offer("patches", patches, tolerance=EXACT)
    case.offer("masked", torch.where(masking.mask.unsqueeze(-1) > 0, 0.5, patches), tolerance=EXACT)
    case.offer("encoded", model.encoder.forward_features(x, keep=masking.keep))
    case.offer("recon", output.pred[..., : patches.shape[-1]], "decoded")  # not an image, see the case's notes
    case.offer("loss", output.loss)
    if case.has("decoded"):
        # The row of the class token, which the reference drops, is not computed here; it is taken over.
        shuffled = output.pred.gather(1, shuffle.unsqueeze(-1).expand_as(output.pred))
        case.offer("decoded", torch.cat([case.outputs["decoded"][:, :1], shuffled], dim=1))
    check_gradients(case, model, output.loss)


@adapter("selfmedmae/fourier_losses")
def fourier_losses(case: Case) -> None:
    for name, config in case.spec["config"].items():
        settings = Options(config)
        channels, temperature = settings("channels"), settings("temperature")
        count = frequencies(settings("fourier_embed_dim"), channels)
        case.same(f"{name}: frequencies", count, settings("frequencies", count))
        settings.ignore("patches", "pixels")
        settings.done()
        pred, target, code = (case.inputs[f"{name}/{what}"] for what in ("pred", "target", "code"))
        pred, code = pred.clone().requires_grad_(), code.clone().requires_grad_()
        first = fourier_mse(pred, target, count, temperature)
        wanted = fourier_code(target.transpose(1, 2), count, temperature).flatten(1)
        second = patch_mse(code[None], wanted[None], torch.ones(1, len(code)))
        for loss, of, word in ((first, pred, "fourier_mse"), (second, code, "fourier_mse_v2")):
            case.offer(f"{name}/{word}", loss, "loss")
            case.offer(f"{name}/{word}_grad", torch.autograd.grad(loss, of)[0], "grad")
