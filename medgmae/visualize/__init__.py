"""Pictures of scans in three planes: what a masked autoencoder saw and made of it, features as colours, latent maps,
segmentations. And pictures of data sets and predictions, and curves of training runs."""

from medgmae.inference.latents import latent_to_spatial
from medgmae.visualize.curves import runs_figure
from medgmae.visualize.datasets import check_figure
from medgmae.visualize.figures import fit_figure, latent_map_figure, reconstruction_figure, segmentation_figure
from medgmae.visualize.gallery import gallery_figure
from medgmae.visualize.images import images_figure
from medgmae.visualize.predictions import classification_figure, regression_figure
from medgmae.visualize.tomography import ct_figure, descent_figure
from medgmae.visualize.views import views_figure

__all__ = [
    "check_figure",
    "classification_figure",
    "ct_figure",
    "descent_figure",
    "fit_figure",
    "gallery_figure",
    "images_figure",
    "latent_map_figure",
    "latent_to_spatial",
    "reconstruction_figure",
    "regression_figure",
    "runs_figure",
    "segmentation_figure",
    "views_figure",
]
