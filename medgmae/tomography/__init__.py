"""CT from X-ray projections: geometry, reading, filtered back-projection, iterative methods on voxels."""

from medgmae.tomography.fdk import fdk
from medgmae.tomography.geometry import ProjectionGeometry, astra_geometry, circular_geometry, rtk_geometry
from medgmae.tomography.geometry_files import read_geometry
from medgmae.tomography.iterative import cg, project, sart
from medgmae.tomography.projections import Projections, from_hounsfield, line_integrals, to_hounsfield
from medgmae.tomography.reading import read_projections

__all__ = [
    "ProjectionGeometry",
    "Projections",
    "astra_geometry",
    "cg",
    "circular_geometry",
    "fdk",
    "from_hounsfield",
    "line_integrals",
    "project",
    "read_geometry",
    "read_projections",
    "rtk_geometry",
    "sart",
    "to_hounsfield",
]
