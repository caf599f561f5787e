"""3D medical masked autoencoders: models, published weights and the way from a scan on disk to features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and where they live. They are imported on first use, so that `import medgmae` costs what torch costs.
_PUBLIC = {
    "create_model": "medgmae.factory",
    "list_models": "medgmae.factory",
    "register_model": "medgmae.registry",
    "load_pretrained": "medgmae.hub",
    "LoadReport": "medgmae.hub",
    "WeightCard": "medgmae.hub",
    "WeightsError": "medgmae.hub",
    "list_weights": "medgmae.hub",
    "weight_card": "medgmae.hub",
    "save_pretrained": "medgmae.hub",
    "push_to_hub": "medgmae.hub",
    "ViT": "medgmae.models.vit",
    "ViTDecoder": "medgmae.models.mae",
    "Vim": "medgmae.models.vim",
    "VimDecoder": "medgmae.models.mae_vim",
    "MaskedAutoencoder": "medgmae.models.mae",
    "MAEOutput": "medgmae.models.mae",
    "GaussianDecoder": "medgmae.models.gaussian_decoder",
    "GaussianMAE": "medgmae.models.gmae",
    "GaussianMAEOutput": "medgmae.models.gmae",
    "ssim3d": "medgmae.losses",
    "Masking": "medgmae.masking",
    "random_masking": "medgmae.masking",
    "patchify": "medgmae.masking",
    "unpatchify": "medgmae.masking",
    "sincos_pos_embed": "medgmae.layers",
    "resample_pos_embed": "medgmae.layers",
    "Volume": "medgmae.data",
    "VolumeError": "medgmae.data",
    "read_volume": "medgmae.data",
    "write_volume": "medgmae.data",
    "create_transform": "medgmae.data",
    "extract_features": "medgmae.features",
    "Features": "medgmae.features",
    "inspect_checkpoint": "medgmae.inspect",
    "reconstruct_scan": "medgmae.reconstruction",
    "Reconstruction": "medgmae.reconstruction",
    "psnr": "medgmae.reconstruction",
    "latent_to_spatial": "medgmae.latent_maps",
    "latent_map_defaults": "medgmae.latent_maps",
    "reconstruction_figure": "medgmae.visualize",
    "latent_map_figure": "medgmae.visualize",
    "fit_figure": "medgmae.visualize",
    "fit_gaussians": "medgmae.fitting",
    "Gaussians": "medgmae.rendering",
    "GaussianRenderer": "medgmae.rendering",
}

# Modules that a program may use as attributes, without an import of their own.
_MODULES = ("data", "evaluation", "ops", "training", "visualize")

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from medgmae import data as data
    from medgmae import evaluation as evaluation
    from medgmae import ops as ops
    from medgmae import training as training
    from medgmae import visualize as visualize
    from medgmae.data import Volume as Volume
    from medgmae.data import VolumeError as VolumeError
    from medgmae.data import create_transform as create_transform
    from medgmae.data import read_volume as read_volume
    from medgmae.data import write_volume as write_volume
    from medgmae.factory import create_model as create_model
    from medgmae.factory import list_models as list_models
    from medgmae.features import Features as Features
    from medgmae.features import extract_features as extract_features
    from medgmae.fitting import fit_gaussians as fit_gaussians
    from medgmae.hub import LoadReport as LoadReport
    from medgmae.hub import WeightCard as WeightCard
    from medgmae.hub import WeightsError as WeightsError
    from medgmae.hub import list_weights as list_weights
    from medgmae.hub import load_pretrained as load_pretrained
    from medgmae.hub import push_to_hub as push_to_hub
    from medgmae.hub import save_pretrained as save_pretrained
    from medgmae.hub import weight_card as weight_card
    from medgmae.inspect import inspect_checkpoint as inspect_checkpoint
    from medgmae.latent_maps import latent_map_defaults as latent_map_defaults
    from medgmae.latent_maps import latent_to_spatial as latent_to_spatial
    from medgmae.layers import resample_pos_embed as resample_pos_embed
    from medgmae.layers import sincos_pos_embed as sincos_pos_embed
    from medgmae.losses import ssim3d as ssim3d
    from medgmae.masking import Masking as Masking
    from medgmae.masking import patchify as patchify
    from medgmae.masking import random_masking as random_masking
    from medgmae.masking import unpatchify as unpatchify
    from medgmae.models.gaussian_decoder import GaussianDecoder as GaussianDecoder
    from medgmae.models.gmae import GaussianMAE as GaussianMAE
    from medgmae.models.gmae import GaussianMAEOutput as GaussianMAEOutput
    from medgmae.models.mae import MAEOutput as MAEOutput
    from medgmae.models.mae import MaskedAutoencoder as MaskedAutoencoder
    from medgmae.models.mae import ViTDecoder as ViTDecoder
    from medgmae.models.mae_vim import VimDecoder as VimDecoder
    from medgmae.models.vim import Vim as Vim
    from medgmae.models.vit import ViT as ViT
    from medgmae.reconstruction import Reconstruction as Reconstruction
    from medgmae.reconstruction import psnr as psnr
    from medgmae.reconstruction import reconstruct_scan as reconstruct_scan
    from medgmae.registry import register_model as register_model
    from medgmae.rendering import GaussianRenderer as GaussianRenderer
    from medgmae.rendering import Gaussians as Gaussians
    from medgmae.visualize import fit_figure as fit_figure
    from medgmae.visualize import latent_map_figure as latent_map_figure
    from medgmae.visualize import reconstruction_figure as reconstruction_figure


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"medgmae.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medgmae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PUBLIC})
