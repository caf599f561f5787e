"""Adapters for CT: line integrals of volumes, and RTK's geometry as vectors."""

from __future__ import annotations

import torch

import medgmae
from medgmae.data import Grid
from medgmae.ops.rays.operator import back_project_volume, project_volume
from medgmae.tomography import rtk_geometry
from parity import adapter
from parity.case import Case


@adapter("tomography/voxel_projection")
def voxel_projection(case: Case) -> None:
    """By the reference and by the kernels; the adjoint agrees with them."""
    volume, views, expected = case.input("volume"), case.input("views"), case.outputs["projections"]
    assert case.spec["direction"] == "identity"
    grid = Grid(tuple(volume.shape), case.spec["spacing_xyz"][::-1], case.spec["origin_xyz"])
    affine, size, beam = torch.from_numpy(grid.affine), expected.shape[1:], case.spec["beam"]
    tolerance = (float(case.spec["tolerance"].split()[0]) * float(expected.abs().max()), 0.0)
    for native in (False, True):
        with medgmae.ops.use_native(native):
            for dtype in (torch.float32, torch.float64):
                found = project_volume(volume[None].to(dtype), affine, views, size, beam=beam)[0]
                case.equal(f"projections, native={native}, {dtype}", found, expected, tolerance)
            spread = back_project_volume(expected[None], affine, views, grid.size, beam=beam)
            product = float((spread * volume).sum())
            case.close("product with the adjoint", product, float((found * expected).sum()), (0.0, 1e-6))
    case.offer("projections", found, tolerance=tolerance)


@adapter("tomography/geometry_rtk")
def geometry_rtk(case: Case) -> None:
    """The nine numbers of a view as vectors."""
    column_mm, row_mm = case.input("pixel").tolist()
    geometry = rtk_geometry(case.input("parameters"), case.spec["detector"], (row_mm, column_mm))
    relative = float(case.spec["tolerance"].split()[0]) * float(case.outputs["views"].abs().max())
    case.offer("views", geometry.views, tolerance=(relative, 0.0))
