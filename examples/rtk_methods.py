"""RTK, the Reconstruction Toolkit, on our projections and grids: what a comparison with it needs.

    from rtk_methods import joseph, fdk, sart, cg       # pip install medgmae[rtk]

RTK's circle turns about y (IEC 61217), that of ``tomography.circular_geometry`` about z: RTK's axes (x, y, z) are our
(y, z, x), and its origin is the middle of the circle. RTK gets as many threads as torch has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae import Volume, tomography
from medgmae.data import Grid, VolumeError
from medgmae.tomography.fdk import orbit_of

Watch = Callable[[int, Volume, float], None]

AXES = [1, 2, 0]  # of our frame, in RTK's order
PARALLEL_SID = 1e4  # mm; RTK starts parallel rays that far from the axis, so it has to be outside of the volume
NEAR_MM = 1e-4  # by which views may differ from those of RTK's circle
# Voxels of air around ours. RTK's volume ends at the centres of the outermost voxels, ours falls to 0 one voxel
# further: without them RTK could not explain the projections of a body that the grid cuts off.
AROUND = 1


class Scan(NamedTuple):
    """A geometry as RTK has it.

    views: its object. parameters: (V, 9), what was given to it for each view. pixel_mm: (row step, column step).
    upside_down: whether the last row of an image is RTK's first one. centre: RTK's origin in our frame (x, y, z).
    """

    views: Any
    parameters: Tensor
    pixel_mm: tuple[float, float]
    upside_down: bool
    centre: Tensor


def toolkit() -> tuple[Any, Any]:
    """The packages itk and RTK, set to torch's number of threads.

    Raises:
        ImportError: they are not installed.
    """
    try:
        import itk
        from itk import RTK
    except ImportError as error:
        raise ImportError("this needs itk-rtk, which is not installed: pip install medgmae[rtk]") from error
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    return itk, RTK


def as_rtk(geometry: tomography.ProjectionGeometry) -> Scan:
    """A circle of ours as RTK's ThreeDCircularProjectionGeometry.

    Raises:
        VolumeError: views that are not on a circle about an axis along z, or a detector that is tilted.
    """
    rows, columns = geometry.size
    row_mm, column_mm = geometry.pixel_mm
    centre = orbit_of(geometry).centre
    cone = geometry.beam == "cone"
    moved = geometry.views.clone()
    moved[:, : 2 if cone else 0] -= centre
    moved[:, 1:2] -= 0 if cone else centre
    source, corner, column, row = moved[..., AXES].unbind(1)
    upside_down = bool(row[0, 1] < 0)
    if upside_down:
        corner, row = corner + (rows - 1) * row, -row
    u, v = column / column_mm, row / row_mm
    normal = torch.linalg.cross(u, v)  # towards the source
    sid = (source * normal).sum(1) if cone else torch.full((len(geometry),), PARALLEL_SID, dtype=torch.float64)
    depth = (corner * normal).sum(1)
    if not cone:  # the place of a detector along its rays does not matter
        corner, depth = corner + (sid - depth)[:, None] * normal, sid
    parameters = torch.zeros(len(geometry), 9, dtype=torch.float64)
    parameters[:, 0], parameters[:, 1] = sid, sid - depth
    parameters[:, 2] = torch.rad2deg(torch.atan2(normal[:, 0], normal[:, 2]))
    parameters[:, 3] = (corner * u).sum(1) + (columns - 1) / 2 * column_mm
    parameters[:, 4] = (corner * v).sum(1) + (rows - 1) / 2 * row_mm
    if not cone:
        parameters[:, 1] = 0
    # What these numbers leave out, such as a tilt, shows when they are turned back into vectors.
    back = tomography.rtk_geometry(parameters, geometry.size, geometry.pixel_mm)
    off = (back.views - torch.stack([source, corner, column, row], dim=1)).abs().flatten(1).amax(1)
    if back.beam != geometry.beam or float(off.max()) > NEAR_MM:
        raise VolumeError(
            f"view {int(off.argmax())} is {float(off.max()):.3g} mm from any that RTK's circle has here; expected a "
            "circle about an axis along z with an upright detector, as circular_geometry makes it: use tomography.sart "
            "or cg, which take any views"
        )
    _, rtk = toolkit()
    views = rtk.ThreeDCircularProjectionGeometry.New()
    for numbers in parameters.tolist():
        views.AddProjection(*numbers)
    return Scan(views, parameters, geometry.pixel_mm, upside_down, centre)


def stack(data: Tensor, scan: Scan) -> Any:
    """Projections (V, rows, columns) as RTK's image, centred on the detector."""
    itk, _ = toolkit()
    rows, columns = data.shape[1:]
    row_mm, column_mm = scan.pixel_mm
    image = itk.image_from_array(_turned(data, scan).contiguous().numpy())
    image.SetSpacing([column_mm, row_mm, 1.0])
    image.SetOrigin([-(columns - 1) / 2 * column_mm, -(rows - 1) / 2 * row_mm, 0.0])
    return image


def _turned(data: Tensor, scan: Scan) -> Tensor:
    """Rows of projections in the other's order."""
    return data.flip(1) if scan.upside_down else data


def image_of(data: Tensor, grid: Grid, scan: Scan) -> Any:
    """Values (D, H, W) on a grid, and 0 around them, as RTK's image: its second axis is ours along the circle's."""
    itk, _ = toolkit()
    wider = F.pad(data.float(), (AROUND,) * 6).permute(2, 0, 1).contiguous()
    image = itk.image_from_array(wider.numpy())
    order = [1, 0, 2]  # of our array's axes (d, h, w), in the order of ITK's indices
    image.SetSpacing([grid.spacing[k] for k in order])
    image.SetOrigin((grid.world([-AROUND] * 3) - scan.centre.numpy())[AXES].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(grid.direction[AXES][:, order])))
    return image


def volume_of(image: Any, grid: Grid) -> Volume:
    """The volume of an image made by :func:`image_of`, or of a reconstruction on it."""
    itk, _ = toolkit()
    inside = slice(AROUND, -AROUND)
    values = torch.from_numpy(itk.array_from_image(image)).permute(1, 2, 0)[inside, inside, inside]
    return Volume(values.contiguous()[None], grid)


def joseph(volume: Volume, geometry: tomography.ProjectionGeometry) -> tomography.Projections:
    """Line integrals of a volume by Joseph's method (1982, IEEE Trans. Med. Imaging 1, 192)."""
    itk, rtk = toolkit()
    scan, kind = as_rtk(geometry), itk.Image[itk.F, 3]
    empty = stack(torch.zeros(len(geometry), *geometry.size), scan)
    source = image_of(volume.data[0], volume.grid, scan)
    project = rtk.JosephForwardProjectionImageFilter[kind, kind].New()
    project.SetInput(0, empty)
    project.SetInput(1, source)
    project.SetGeometry(scan.views)
    project.Update()
    found = torch.from_numpy(itk.array_from_image(project.GetOutput()))
    return tomography.Projections(_turned(found, scan).contiguous(), geometry)


def fdk(projections: tomography.Projections, grid: Grid) -> Volume:
    """Attenuation in 1/mm by filtered back-projection: ramp filter, Parker's weights where the arc is short."""
    itk, rtk = toolkit()
    scan, kind = as_rtk(projections.geometry), itk.Image[itk.F, 3]
    # ITK collects a source that nothing in Python refers to, and what hangs on it then is empty, without an error.
    data, empty = stack(projections.data, scan), image_of(torch.zeros(grid.size), grid, scan)
    weighted = rtk.ParkerShortScanImageFilter[kind].New()
    weighted.SetInput(data)
    weighted.SetGeometry(scan.views)
    reconstruct = rtk.FDKConeBeamReconstructionFilter[kind].New()
    reconstruct.SetInput(0, empty)
    reconstruct.SetInput(1, weighted.GetOutput())
    reconstruct.SetGeometry(scan.views)
    reconstruct.Update()
    return volume_of(reconstruct.GetOutput(), grid)


def sart(
    projections: tomography.Projections,
    grid: Grid,
    iterations: int = 3,
    *,
    relaxation: float = 0.5,
    watch: Watch | None = None,
) -> Volume:
    """Attenuation in 1/mm by SART, nowhere negative, with RTK's own back-projector.

    An iteration is a run of its own that begins with the last one's volume and 0 around it: this filter has no mask,
    and what it puts around the grid would be missing in it.

    Args:
        projections: line integrals.
        grid: of the result.
        iterations: times that every view is used.
        relaxation: part of each correction that is made.
        watch: called after each iteration with its number, the volume and the seconds so far.
    """
    itk, rtk = toolkit()
    kind, scan = itk.Image[itk.F, 3], as_rtk(projections.geometry)
    filters = rtk.SARTConeBeamReconstructionFilter[kind, kind]  # the first look loads RTK, which takes seconds
    begin = time.perf_counter()
    data, found = stack(projections.data, scan), Volume(torch.zeros(1, *grid.size), grid)
    for number in range(1, iterations + 1):
        first = image_of(found.data[0], grid, scan)
        method = filters.New()
        method.SetLambda(relaxation)
        method.SetEnforcePositivity(True)
        method.SetInput(0, first)
        method.SetInput(1, data)
        method.SetGeometry(scan.views)
        method.SetNumberOfIterations(1)
        method.Update()
        found = volume_of(method.GetOutput(), grid)
        if watch is not None:
            watch(number, found, time.perf_counter() - begin)
    return found


def cg(projections: tomography.Projections, grid: Grid, iterations: int = 10, *, watch: Watch | None = None) -> Volume:
    """Attenuation in 1/mm by conjugate gradients with Joseph's projector and its adjoint, 0 around the grid.

    Args:
        projections: line integrals.
        grid: of the result.
        iterations: steps.
        watch: called after each iteration with its number, the volume and the seconds so far.
    """
    itk, rtk = toolkit()
    scan = as_rtk(projections.geometry)
    method = rtk.ConjugateGradientConeBeamReconstructionFilter[itk.Image[itk.F, 3]].New()
    begin, done = time.perf_counter(), 0
    data, empty = stack(projections.data, scan), image_of(torch.zeros(grid.size), grid, scan)
    mask = image_of(torch.ones(grid.size), grid, scan)

    def seen() -> None:
        nonlocal done
        done += 1
        if watch is not None:
            watch(done, volume_of(method.GetOutput(), grid), time.perf_counter() - begin)

    method.SetCudaConjugateGradient(False)
    method.SetDisableDisplacedDetectorFilter(True)  # it weighs pixels, which the normal equations do not
    method.SetForwardProjectionFilter(type(method).ForwardProjectionType_FP_JOSEPH)
    method.SetBackProjectionFilter(type(method).BackProjectionType_BP_JOSEPH)
    method.SetInput(0, empty)
    method.SetInput(1, data)
    method.SetSupportMask(mask)
    method.SetGeometry(scan.views)
    method.SetNumberOfIterations(iterations)
    method.AddObserver(itk.IterationEvent(), seen)
    method.Update()
    return volume_of(method.GetOutput(), grid)


def at_their_best(
    projections: tomography.Projections, grid: Grid, iterations: tuple[int, int], best: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
    """Rows of RTK's SART and CG at the best of so many iterations; ``best()`` is a watch that finds it, with a row."""
    rows = {}
    for name, run, count in (("RTK SART", sart, iterations[0]), ("RTK CG", cg, iterations[1])):
        watch = best()
        run(projections, grid, count, watch=watch)
        rows[name] = {**watch.row, "of": count}
    return rows
