"""CT from X-ray projections: geometry, reading, filtered back-projection, iterative methods on voxels."""

from medgmae.tomography.fdk import default_grid, fdk
from medgmae.tomography.geometry import ProjectionGeometry, astra_geometry, circular_geometry, rtk_geometry
from medgmae.tomography.geometry_files import read_geometry
from medgmae.tomography.iterative import cg, project, sart
from medgmae.tomography.projections import (
    MU_WATER,
    Projections,
    add_noise,
    from_hounsfield,
    line_integrals,
    to_hounsfield,
)
from medgmae.tomography.reading import read_projections
from medgmae.tomography.reconstruction import Descent, Reconstruction, reconstruct_ct, render_attenuation
from medgmae.tomography.starts import predict_gaussians, start_gaussians

__all__ = [
    "MU_WATER",
    "Descent",
    "ProjectionGeometry",
    "Projections",
    "Reconstruction",
    "add_noise",
    "astra_geometry",
    "cg",
    "circular_geometry",
    "default_grid",
    "fdk",
    "from_hounsfield",
    "line_integrals",
    "predict_gaussians",
    "project",
    "read_geometry",
    "read_projections",
    "reconstruct_ct",
    "render_attenuation",
    "rtk_geometry",
    "sart",
    "start_gaussians",
    "to_hounsfield",
]
