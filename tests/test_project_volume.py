"""Line integrals of volumes on every path: exact, matched with their adjoint, and as torch's operator."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from sequences import RUNNABLE
from torch import Tensor

import medgmae
from medgmae.data import Grid
from medgmae.ops.rays import native, reference
from medgmae.ops.rays.inputs import RayInputs
from medgmae.ops.rays.operator import back_project_volume, in_indices, project_volume
from medgmae.tomography import circular_geometry

FORWARD, BACKWARD = torch.ops.medgmae.project_volume.default, torch.ops.medgmae.project_volume_backward.default
PATHS: dict[str, Any] = {"reference": (reference.forward, reference.backward)}
PATHS |= {name: (partial(native.forward, variant=name), partial(native.backward, variant=name)) for name in RUNNABLE}
every_path = pytest.mark.parametrize("path", PATHS)
both_beams = pytest.mark.parametrize("beam", ["cone", "parallel"])


def scene(
    beam: str, dtype: torch.dtype = torch.float64, depth: int = 21, pixels: tuple[int, int] = (9, 11)
) -> RayInputs:
    """Two volumes with a rim, seen from four sides, one of them along the voxels' axes."""
    grid = Grid((depth, 6, 5), (2.0, 3.0, 2.5), (-4.0, -7.0, -9.0))
    lengths: dict[str, float] = {"sid": 90.0, "sdd": 140.0} if beam == "cone" else {}
    geometry = circular_geometry([0.0, 0.4, 1.9, 4.4], pixels, (5.0, 4.0), **lengths)
    lines, spacing = in_indices(torch.from_numpy(grid.affine), geometry.views, beam)
    values = torch.randn(2, *grid.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.nn.functional.pad(values, (1,) * 6).to(dtype)
    return RayInputs(padded, lines, spacing, list(pixels), beam == "parallel")


@every_path
@both_beams
def test_a_constant_along_an_axis_is_its_length(path: str, beam: str) -> None:
    """A ray through the middle of a block: its voxels, and half of the fall to 0 at either end."""
    grid = Grid((7, 7, 7), 2.0, (-6.0, -6.0, -6.0))
    lengths: dict[str, float] = {"sid": 500.0, "sdd": 800.0} if beam == "cone" else {}
    geometry = circular_geometry([0.0, math.pi / 2], (1, 1), 1.0, **lengths)
    lines, spacing = in_indices(torch.from_numpy(grid.affine), geometry.views, beam)
    padded = torch.nn.functional.pad(torch.ones(1, 7, 7, 7, dtype=torch.float64), (1,) * 6)
    found = PATHS[path][0](RayInputs(padded, lines, spacing, [1, 1], beam == "parallel"))
    torch.testing.assert_close(found.flatten(), torch.full((2,), 14.0, dtype=torch.float64))


@both_beams
def test_fine_sampling_gives_the_same(beam: str) -> None:
    inputs = scene(beam)
    size = torch.tensor(inputs.volume.shape[1:])
    found, most = reference.forward(inputs), 0.0
    for view in range(4):
        source, corner, column, row = inputs.views[view]
        for r, c in ((0, 0), (4, 5), (7, 2), (3, 9)):
            pixel = corner + c * column + r * row
            start, along = (pixel, source) if inputs.parallel else (source, pixel - source)
            reach = 400.0 / float((along * inputs.spacing).norm())
            near = 0.0 if inputs.parallel else 90.0 / 140.0
            t = near + (torch.arange(200_000, dtype=torch.float64) / 200_000 - 0.5) * reach
            points = start + t[:, None] * along
            unit = (points / (size - 1) * 2 - 1).flip(-1)[None, None, None]
            values = torch.nn.functional.grid_sample(
                inputs.volume[:1, None], unit, align_corners=True, padding_mode="zeros"
            )
            summed = float(values.sum()) * reach / 200_000 * float((along * inputs.spacing).norm())
            assert abs(summed - float(found[0, view, r, c])) < 2e-3
            most = max(most, abs(summed))
    assert most > 5


@every_path
@both_beams
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_kernels_give_what_the_reference_gives(path: str, beam: str, dtype: torch.dtype) -> None:
    inputs, room = scene(beam, dtype), 1e-6 if dtype == torch.float32 else 1e-12
    exact = scene(beam)
    out, expected = PATHS[path][0](inputs), reference.forward(exact)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= room * expected.abs().max()
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,), (wanted,) = PATHS[path][1](grad.to(dtype), inputs), reference.backward(grad, exact)
    assert (found - wanted).abs().max() <= 2 * room * wanted.abs().max()
    product = float((out.double() * grad).sum())
    assert math.isclose(product, float((found.double() * exact.volume).sum()), rel_tol=1e-4)


@every_path
def test_planes_of_voxels_and_the_rim(path: str) -> None:
    """Rays that run within a plane of voxel centres, along the rim, and beside the volume."""
    inputs = scene("parallel")
    along = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    corner = torch.tensor([0.0, 0.0, -50.0], dtype=torch.float64)
    view = torch.stack([along, corner, torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 1.0, 0]).double()])
    given = inputs._replace(views=view[None], size=[9, 24])
    found = PATHS[path][0](given)[:, 0]  # (B, rows: h, columns: d)
    expected = (inputs.volume.sum(3) * 2.5).mT
    torch.testing.assert_close(found[:, 1:7, 1:22], expected[:, 1:7, 1:22])
    assert not found[:, 8].any()
    assert not found[:, :, 0].any()


@pytest.mark.parametrize("variant", RUNNABLE)
def test_threads_change_no_bit(variant: str) -> None:
    inputs = scene("cone", torch.float32)
    grad = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(1))
    for run in (partial(native.forward, inputs), partial(native.backward, grad, inputs)):
        one, three = (run(variant=variant, threads=threads) for threads in (1, 3))
        first, second = (x if isinstance(x, Tensor) else x[0] for x in (one, three))
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@both_beams
@pytest.mark.parametrize("use", [False, True], ids=["reference", "native"])
def test_operator_is_what_torch_expects(beam: str, use: bool) -> None:
    inputs = scene(beam, depth=3)
    with medgmae.ops.use_native(use):
        inputs.volume.requires_grad_()
        torch.library.opcheck(FORWARD, tuple(inputs))
        grad = torch.randn(2, 4, 9, 11, dtype=torch.float64)
        torch.library.opcheck(BACKWARD, (grad, *inputs), test_utils=("test_schema", "test_faketensor"))
        few = scene(beam, depth=3, pixels=(3, 4))  # a Jacobian is a call for each of its rows and columns
        assert torch.autograd.gradcheck(lambda x: FORWARD(x, *few[1:]), few.volume.requires_grad_())


def test_the_adjoint_has_a_gradient_too() -> None:
    grid = Grid((4, 5, 6), 2.0, (-5.0, -4.0, -3.0))
    geometry = circular_geometry([0.3, 1.4], (4, 3), 3.0, sid=60, sdd=90)
    affine = torch.from_numpy(grid.affine)

    def spread(y: Tensor) -> Tensor:
        return back_project_volume(y, affine, geometry.views, grid.size)

    assert torch.autograd.gradcheck(spread, torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True))


def test_vmap_and_autocast() -> None:
    inputs = scene("cone", torch.float32)
    mapped = torch.vmap(lambda x: FORWARD(x, *inputs[1:]))(torch.stack([inputs.volume, 2 * inputs.volume]))
    plain = FORWARD(*inputs)
    torch.testing.assert_close(mapped, torch.stack([plain, 2 * plain]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FORWARD(*inputs), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": torch.zeros(3, 3, 3)}, r"expected \(B, D, H, W\), float32 or float64"),
        ({"volume": torch.zeros(1, 3, 3, 3, dtype=torch.float16)}, r"float16: expected"),
        ({"views": torch.zeros(2, 3, 3)}, r"views are \(2, 3, 3\): expected \(V, 4, 3\)"),
        ({"views": torch.full((2, 4, 3), torch.nan)}, "finite numbers"),
        ({"size": (0, 4)}, "positive numbers of pixels"),
        ({"beam": "fan"}, "'cone' or 'parallel', got 'fan'"),
        ({"affine": torch.eye(3)}, r"affine is \(3, 3\)"),
        ({"affine": torch.eye(4) + torch.eye(4).roll(1, 1)}, "not perpendicular"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    given = {"volume": torch.zeros(1, 3, 3, 3), "affine": torch.eye(4), "views": torch.rand(2, 4, 3), "size": (2, 2)}
    with pytest.raises(ValueError, match=message):
        project_volume(**(given | changes))
    with pytest.raises(TypeError, match="int64"):
        project_volume(torch.zeros(1, 3, 3, 3, dtype=torch.int64), torch.eye(4), torch.rand(2, 4, 3), (2, 2))
