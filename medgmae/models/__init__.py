"""Model families, one file each. A new family is known by lying here: nothing lists it."""

from medgmae.models.autoencoder import Autoencoder
from medgmae.models.decoder import MaskDecoder
from medgmae.models.encoder import Encoder, Model
from medgmae.models.gaussian_decoder import GaussianDecoder
from medgmae.models.glmae import GlobalLocalMAE, GlobalLocalOutput, Views
from medgmae.models.gmae import GaussianMAE, GaussianMAEOutput
from medgmae.models.mae import MAEOutput, MaskedAutoencoder, ViTDecoder
from medgmae.models.mae_vim import VimDecoder
from medgmae.models.parts import Setting
from medgmae.models.unetr import UNETR
from medgmae.models.unetr_decoder import UNETRDecoder
from medgmae.models.vim import Vim
from medgmae.models.vit import ViT

__all__ = [
    "UNETR",
    "Autoencoder",
    "Encoder",
    "GaussianDecoder",
    "GaussianMAE",
    "GaussianMAEOutput",
    "GlobalLocalMAE",
    "GlobalLocalOutput",
    "MAEOutput",
    "MaskDecoder",
    "MaskedAutoencoder",
    "Model",
    "Setting",
    "UNETRDecoder",
    "ViT",
    "ViTDecoder",
    "Views",
    "Vim",
    "VimDecoder",
]
