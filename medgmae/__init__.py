"""3D medical masked autoencoders: models, published weights and the way from a scan on disk to features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medgmae._version import __version__

# Public names and where they live. They are imported on first use, so that `import medgmae` costs what torch costs.
_PUBLIC = {
    "create_model": "medgmae.factory",
    "list_models": "medgmae.factory",
    "register_model": "medgmae.models.registry",
    "load_pretrained": "medgmae.checkpoints.loading",
    "LoadReport": "medgmae.checkpoints.report",
    "WeightCard": "medgmae.checkpoints.cards",
    "WeightsError": "medgmae.checkpoints.cards",
    "Recommendation": "medgmae.checkpoints.choosing",
    "choose_weights": "medgmae.checkpoints.choosing",
    "recommend": "medgmae.factory",
    "list_weights": "medgmae.checkpoints.cards",
    "weight_card": "medgmae.checkpoints.cards",
    "export_model": "medgmae.checkpoints.exporting",
    "verify_weights": "medgmae.checkpoints.verification",
    "Verification": "medgmae.checkpoints.verification",
    "save_pretrained": "medgmae.checkpoints.saving",
    "push_to_hub": "medgmae.checkpoints.saving",
    "Model": "medgmae.models.encoder",
    "Encoder": "medgmae.models.encoder",
    "ViT": "medgmae.models.vit",
    "ViTDecoder": "medgmae.models.mae",
    "Vim": "medgmae.models.vim",
    "VimDecoder": "medgmae.models.mae_vim",
    "MaskedAutoencoder": "medgmae.models.mae",
    "MAEOutput": "medgmae.models.mae",
    "GaussianDecoder": "medgmae.models.gaussian_decoder",
    "GaussianMAE": "medgmae.models.gmae",
    "GaussianMAEOutput": "medgmae.models.gmae",
    "UNETR": "medgmae.models.unetr",
    "ssim3d": "medgmae.losses",
    "dice_loss": "medgmae.losses",
    "dice_ce_loss": "medgmae.losses",
    "Masking": "medgmae.layers.masking",
    "random_masking": "medgmae.layers.masking",
    "patchify": "medgmae.layers.patches",
    "unpatchify": "medgmae.layers.patches",
    "sincos_pos_embed": "medgmae.layers.positions",
    "resample_pos_embed": "medgmae.layers.positions",
    "Grid": "medgmae.data",
    "Volume": "medgmae.data",
    "VolumeError": "medgmae.data",
    "as_volume": "medgmae.data",
    "patch_labels": "medgmae.data",
    "read_volume": "medgmae.data",
    "write_volume": "medgmae.data",
    "create_transform": "medgmae.factory",
    "extract_features": "medgmae.inference.features",
    "dense_features": "medgmae.inference.features",
    "feature_colours": "medgmae.inference.colours",
    "Features": "medgmae.inference.features",
    "PooledFeatures": "medgmae.inference.features",
    "inspect_checkpoint": "medgmae.checkpoints.inspection",
    "segment_scan": "medgmae.inference.segmentation",
    "predict_logits": "medgmae.inference.segmentation",
    "Segmentation": "medgmae.inference.segmentation",
    "reconstruct_scan": "medgmae.inference.reconstruction",
    "Reconstruction": "medgmae.inference.reconstruction",
    "psnr": "medgmae.losses",
    "latent_to_spatial": "medgmae.inference.latents",
    "latent_map_defaults": "medgmae.inference.latents",
    "saliency_map": "medgmae.inference.saliency",
    "reconstruction_figure": "medgmae.visualize",
    "latent_map_figure": "medgmae.visualize",
    "fit_figure": "medgmae.visualize",
    "segmentation_figure": "medgmae.visualize",
    "gallery_figure": "medgmae.visualize",
    "fit_gaussians": "medgmae.gaussians.fitting",
    "Gaussians": "medgmae.gaussians.rendering",
    "GaussianRenderer": "medgmae.gaussians.rendering",
}

# Modules that a program may use as attributes, without an import of their own.
_MODULES = ("data", "evaluation", "models", "ops", "tomography", "training", "visualize")

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from medgmae import data as data
    from medgmae import evaluation as evaluation
    from medgmae import models as models
    from medgmae import ops as ops
    from medgmae import training as training
    from medgmae import visualize as visualize
    from medgmae.checkpoints.cards import WeightCard as WeightCard
    from medgmae.checkpoints.cards import WeightsError as WeightsError
    from medgmae.checkpoints.cards import list_weights as list_weights
    from medgmae.checkpoints.cards import weight_card as weight_card
    from medgmae.checkpoints.choosing import Recommendation as Recommendation
    from medgmae.checkpoints.choosing import choose_weights as choose_weights
    from medgmae.checkpoints.exporting import export_model as export_model
    from medgmae.checkpoints.inspection import inspect_checkpoint as inspect_checkpoint
    from medgmae.checkpoints.loading import load_pretrained as load_pretrained
    from medgmae.checkpoints.report import LoadReport as LoadReport
    from medgmae.checkpoints.saving import push_to_hub as push_to_hub
    from medgmae.checkpoints.saving import save_pretrained as save_pretrained
    from medgmae.checkpoints.verification import Verification as Verification
    from medgmae.checkpoints.verification import verify_weights as verify_weights
    from medgmae.data import Grid as Grid
    from medgmae.data import Volume as Volume
    from medgmae.data import VolumeError as VolumeError
    from medgmae.data import as_volume as as_volume
    from medgmae.data import patch_labels as patch_labels
    from medgmae.data import read_volume as read_volume
    from medgmae.data import write_volume as write_volume
    from medgmae.factory import create_model as create_model
    from medgmae.factory import create_transform as create_transform
    from medgmae.factory import list_models as list_models
    from medgmae.factory import recommend as recommend
    from medgmae.gaussians.fitting import fit_gaussians as fit_gaussians
    from medgmae.gaussians.rendering import GaussianRenderer as GaussianRenderer
    from medgmae.gaussians.rendering import Gaussians as Gaussians
    from medgmae.inference.colours import feature_colours as feature_colours
    from medgmae.inference.features import Features as Features
    from medgmae.inference.features import PooledFeatures as PooledFeatures
    from medgmae.inference.features import dense_features as dense_features
    from medgmae.inference.features import extract_features as extract_features
    from medgmae.inference.latents import latent_map_defaults as latent_map_defaults
    from medgmae.inference.latents import latent_to_spatial as latent_to_spatial
    from medgmae.inference.reconstruction import Reconstruction as Reconstruction
    from medgmae.inference.reconstruction import reconstruct_scan as reconstruct_scan
    from medgmae.inference.saliency import saliency_map as saliency_map
    from medgmae.inference.segmentation import Segmentation as Segmentation
    from medgmae.inference.segmentation import predict_logits as predict_logits
    from medgmae.inference.segmentation import segment_scan as segment_scan
    from medgmae.layers.masking import Masking as Masking
    from medgmae.layers.masking import random_masking as random_masking
    from medgmae.layers.patches import patchify as patchify
    from medgmae.layers.patches import unpatchify as unpatchify
    from medgmae.layers.positions import resample_pos_embed as resample_pos_embed
    from medgmae.layers.positions import sincos_pos_embed as sincos_pos_embed
    from medgmae.losses import dice_ce_loss as dice_ce_loss
    from medgmae.losses import dice_loss as dice_loss
    from medgmae.losses import psnr as psnr
    from medgmae.losses import ssim3d as ssim3d
    from medgmae.models.encoder import Encoder as Encoder
    from medgmae.models.encoder import Model as Model
    from medgmae.models.gaussian_decoder import GaussianDecoder as GaussianDecoder
    from medgmae.models.gmae import GaussianMAE as GaussianMAE
    from medgmae.models.gmae import GaussianMAEOutput as GaussianMAEOutput
    from medgmae.models.mae import MAEOutput as MAEOutput
    from medgmae.models.mae import MaskedAutoencoder as MaskedAutoencoder
    from medgmae.models.mae import ViTDecoder as ViTDecoder
    from medgmae.models.mae_vim import VimDecoder as VimDecoder
    from medgmae.models.registry import register_model as register_model
    from medgmae.models.unetr import UNETR as UNETR
    from medgmae.models.vim import Vim as Vim
    from medgmae.models.vit import ViT as ViT
    from medgmae.visualize import fit_figure as fit_figure
    from medgmae.visualize import gallery_figure as gallery_figure
    from medgmae.visualize import latent_map_figure as latent_map_figure
    from medgmae.visualize import reconstruction_figure as reconstruction_figure
    from medgmae.visualize import segmentation_figure as segmentation_figure


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"medgmae.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medgmae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
