"""Adapters for the 3D Mamba MAE: its latent-to-spatial maps, before and after fine-tuning."""

from __future__ import annotations

import torch

import medgmae
from parity import adapter
from parity.case import EXACT, Case, Options
from parity.mamba_mae_models import autoencoder, classifier, filled


@adapter("mamba_mae/latent_to_spatial_pretrained")
def pretrained(case: Case) -> None:
    """The map, and what the reference saves beside it: its prediction stays normalised, as the decoder gives it."""
    settings = Options(case.spec["config"])
    ratio = settings("mask_ratio")
    model = filled(case, autoencoder(settings))
    x, noise = case.input("x"), case.input("noise")
    masking = medgmae.random_masking(*noise.shape, ratio, noise=noise)
    case.offer("ids_restore", masking.restore)
    case.offer("mask", masking.mask, tolerance=EXACT)
    with torch.no_grad():
        case.offer("latent", model.encoder.forward_features(x, keep=masking.keep))
        pred = model(x, masking).pred
    case.offer("latent_space", medgmae.latent_to_spatial(model.train(), x, masking=masking))
    grid, patch, channels = model.encoder.grid_size, model.encoder.patch_size, x.shape[1]
    predicted = medgmae.unpatchify(pred, patch, grid, channels)
    hidden = medgmae.unpatchify(masking.mask.unsqueeze(-1).expand_as(pred), patch, grid, channels)
    case.offer("masked", x * (1 - hidden))
    case.offer("reconstruct", predicted)
    case.offer("recons_und_visible", x * (1 - hidden) + predicted * hidden)


@adapter("mamba_mae/latent_to_spatial_finetuned")
def finetuned(case: Case) -> None:
    model = filled(case, classifier(Options(case.spec["config"])))
    x = case.input("x")
    with torch.no_grad():
        case.offer("last_mixer_output", model.forward_last_block(x))
    found = medgmae.latent_to_spatial(model.train(), x)
    case.offer("latent_space_before_prediction", found[0, 0])
