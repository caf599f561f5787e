"""Adapters for MedGMAE's renderer: dense, batched, sparse, and from raw parameters.

The reference renders with the transposed rotation, which is ours with the conjugated quaternion, and multiplies the
densities by a constant of the case (``intensity_scale``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import medgmae
from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.ops.voxel.operator import Support
from medgmae.ops.voxel.reference import box_bounds, precision_matrix
from parity import adapter
from parity.case import EXACT, Case, Options, triple

PROSE = (
    "parity_kind",
    "case",
    "kind",
    "note",
    "kernel_semantics",
    "how_made",
    "checked_against",
    "float32_reference_relative_error",
    "reference_python_relative_error",
    "bbox_margin",
    "tolerance",
    "tensors",
)
# Names of the two supports that the cases hold, and ours.
SUPPORTS: dict[str, Support] = {"": "box", "_full": None}

Render = Callable[[Gaussians, Support], Tensor]


class Scene(NamedTuple):
    """Gaussians of a case, as the reference takes them, with a batch axis; densities (B, N) without the constant."""

    positions: Tensor
    scales: Tensor
    rotations: Tensor
    densities: Tensor
    factor: float

    def leaves(self, dtype: torch.dtype = torch.float32) -> Scene:
        """The same Gaussians, to differentiate by."""
        tensors = (tensor.detach().to(dtype).requires_grad_() for tensor in self[:4])
        return Scene(*tensors, self.factor)

    def gaussians(self, intensities: Tensor | None = None) -> Gaussians:
        """As we have them; ``intensities`` in place of the densities times the constant."""
        intensities = self.densities * self.factor if intensities is None else intensities
        return Gaussians(self.positions, self.scales, conjugate(self.rotations), intensities)


def conjugate(quats: Tensor) -> Tensor:
    """The opposite rotation: (w, -x, -y, -z)."""
    return quats * quats.new_tensor([1.0, -1.0, -1.0, -1.0])


def settings(case: Case) -> tuple[Options, tuple[int, ...]]:
    """The settings of a renderer's case and the size of its volume."""
    options = Options(case.spec)
    options.ignore(*PROSE)
    return options, triple(options("dims"))


def scene(case: Case, options: Options) -> Scene:
    """The case's Gaussians, with a batch axis if they have none."""
    found = [case.input(name) for name in ("positions", "scales", "rotations", "densities")]
    batched = found[0].dim() == 3
    case.same("number of Gaussians", found[0].shape[-2], options("num_gaussians"))
    case.same("batch", len(found[0]) if batched else None, options("batch", None))
    positions, scales, rotations, densities = found if batched else [tensor.unsqueeze(0) for tensor in found]
    return Scene(positions, scales, rotations, densities.squeeze(-1), options("intensity_scale", 0.1))


@adapter("medgmae/render_dense")
@adapter("medgmae/render_batch")
def dense(case: Case) -> None:
    options, size = settings(case)
    given = scene(case, options)
    options.done()

    def render(gaussians: Gaussians, support: Support) -> Tensor:
        volume: Tensor = GaussianRenderer(support)(gaussians, size)
        return volume

    check_quantities(case, given, size)
    for suffix, support in SUPPORTS.items():
        offer(case, f"volume{suffix}", render(given.gaussians(), support))
        check_gradients(case, suffix, given, lambda g, s=support: render(g, s), "grad_volume")
    paper = replace(given.gaussians(), quats=given.rotations)
    offer(case, "volume_full_paper", render(paper, None))


@adapter("medgmae/render_raw_parameters")
def raw_parameters(case: Case) -> None:
    options, size = settings(case)
    raw = {name: case.input(f"_{name}").unsqueeze(0) for name in ("xyz", "scaling", "rotation", "density")}
    case.same("number of Gaussians", raw["xyz"].shape[1], options("num_gaussians"))
    scales, densities = raw["scaling"].sigmoid(), raw["density"].sigmoid()
    offer(case, "scales", scales)
    offer(case, "densities", densities)
    given = Scene(raw["xyz"], scales, raw["rotation"], densities.squeeze(-1), options("intensity_scale"))
    options.done()
    check_quantities(case, given, size)
    for suffix, support in SUPPORTS.items():
        offer(case, f"volume{suffix}", GaussianRenderer(support)(given.gaussians(), size))


@adapter("medgmae/render_sparse")
def sparse(case: Case) -> None:
    options, size = settings(case)
    given, patch = scene(case, options), triple(options("patch", 1))
    options.done()
    mask = case.input("mask").bool()
    voxels = mask.flatten().nonzero().T  # (1, M) raster numbers, as patches of one voxel
    indices = mask.nonzero()
    last = torch.tensor([max(s - 1, 1) for s in size])
    case.offer("indices", indices)
    offer(case, "points", indices / last)

    def by_voxel(gaussians: Gaussians, support: Support) -> Tensor:
        rendered: Tensor = GaussianRenderer(support)(gaussians, size, voxels, 1)
        return rendered

    def by_patch(gaussians: Gaussians, support: Support) -> Tensor:
        return in_patches(gaussians, support, mask, patch)

    whole_patches = not any(s % p for s, p in zip(size, patch, strict=True))
    for render in (by_voxel, by_patch) if whole_patches else (by_voxel,):
        for suffix, support in SUPPORTS.items():
            values = render(given.gaussians(), support)
            offer(case, f"values{suffix}", values)
            scattered = torch.zeros(size).masked_scatter(mask, values)
            offer(case, f"scattered_volume{suffix}", scattered)
            check_gradients(case, suffix, given, lambda g, r=render, s=support: r(g, s), "grad_values")
    check_quantities(case, given, size)
    check_stale_sizes(case, given, indices / last, by_voxel)


def in_patches(gaussians: Gaussians, support: Support, mask: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(1, M, 1): the values where the mask is set, from rendering only the patches that hold such a voxel."""
    size = tuple(mask.shape)
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    touched = medgmae.patchify(mask[None, None].float(), patch)[0].any(-1).nonzero().T  # (1, n)
    rendered = GaussianRenderer(support)(gaussians, size, touched, patch)
    whole = rendered.new_zeros(1, math.prod(grid), math.prod(patch))
    whole = whole.index_copy(1, touched[0], rendered)
    return medgmae.unpatchify(whole, patch, grid, 1)[0, 0][mask].reshape(1, -1, 1)


def offer(case: Case, name: str, actual: Tensor) -> None:
    """Compare values with or without a batch axis and a channel, as the case has them, within its tolerance."""
    if case.has(name):
        expected = case.outputs[name]
        label = "gradients" if name.startswith("grad") else "volume"
        case.offer(name, actual.reshape(expected.shape), label, "values")


def check_quantities(case: Case, given: Scene, size: tuple[int, ...]) -> None:
    """What the renderer makes of the parameters first: inverse covariances, intensities, boxes."""
    precision = precision_matrix(given.scales.double(), conjugate(given.rotations.double()))
    paper = precision_matrix(given.scales.double(), given.rotations.double())
    offer(case, "inv_covariance", precision)
    offer(case, "inv_covariance_paper", paper)
    offer(case, "covariance", torch.linalg.inv(paper))  # of this one the reference does not transpose the rotation
    offer(case, "intensities", given.gaussians().densities)
    if case.has("bbox"):
        bounds = torch.stack(box_bounds(given.positions, given.scales, size), dim=-1)
        case.offer("bbox", bounds.reshape(case.outputs["bbox"].shape), tolerance=EXACT)


def check_gradients(
    case: Case, suffix: str, given: Scene, render: Callable[[Gaussians], Tensor], cotangent: str
) -> None:
    """Gradients of sum(cotangent * rendered), by what goes into the kernel and by what the user gives."""
    if not any(name.startswith("grad_") and name.endswith(suffix) for name in case.outputs):
        return

    def loss(gaussians: Gaussians) -> Tensor:
        rendered = render(gaussians)
        return (rendered * case.input(cotangent).to(rendered).reshape(rendered.shape)).sum()

    leaves = given.leaves()
    intensities = leaves.densities * leaves.factor
    found = torch.autograd.grad(loss(leaves.gaussians(intensities)), (*leaves[:4], intensities))
    names = ("positions", "scales", "rotations", "densities", "intensities")
    for name, gradient in zip(names, found, strict=True):
        offer(case, f"grad_{name}{suffix}", gradient)
    offer(case, f"grad_centers{suffix}", found[0])
    if case.has(f"grad_inv_covariance{suffix}"):
        offer(case, f"grad_inv_covariance{suffix}", inverse_covariance_gradient(given, loss))


def inverse_covariance_gradient(given: Scene, loss: Callable[[Gaussians], Tensor]) -> Tensor:
    """(B, N, 3, 3): what our gradients to scales and quaternions say about the gradient to the inverse covariance.

    Ours has no such argument. But by the chain rule the seven gradients of a Gaussian are seven linear equations for
    the six numbers of the symmetric matrix, so it can be solved for, in float64. They do not suffice where two scales
    are equal, as a turn in their plane changes nothing. There the same Gaussian is described a second time, its axes
    turned by 45 degrees in that plane, which adds the equations that are missing.
    """
    rows, values = [], []
    for turned_about in (None, 0, 1, 2):
        leaves = given._replace(rotations=turn_equal_axes(given, turned_about)).leaves(torch.float64)
        gaussians = leaves.gaussians()
        wanted = (leaves.scales, gaussians.quats)
        values.append(torch.cat(torch.autograd.grad(loss(gaussians), wanted), dim=-1).flatten(0, 1))
        rows.append(torch.func.vmap(chain_rule)(*(tensor.detach().flatten(0, 1) for tensor in wanted)))
    matrix, right = torch.cat(rows, dim=1), torch.cat(values, dim=1)
    assert torch.linalg.matrix_rank(matrix).eq(6).all(), "the gradients do not determine that of the inverse covariance"
    solved = torch.linalg.lstsq(matrix, right.unsqueeze(-1)).solution.squeeze(-1)
    return (solved @ symmetric_basis().flatten(1)).reshape(*given.scales.shape, 3)


def turn_equal_axes(given: Scene, about: int | None) -> Tensor:
    """The quaternions (reference convention, float64) of the same Gaussians, own axes turned where scales are equal."""
    quats = given.rotations.double()
    if about is None:
        return quats
    one, other = (axis for axis in range(3) if axis != about)
    equal = given.scales[..., one] == given.scales[..., other]
    w, v = quats[..., :1], quats[..., 1:]
    # Conjugation reverses products: ours is turned from the right, the reference's is turned back from the left.
    axis = -math.sin(math.pi / 8) * torch.eye(3, dtype=torch.float64)[about]
    cos = math.cos(math.pi / 8)
    turned_w = cos * w - (v * axis).sum(-1, keepdim=True)
    turned_v = cos * v + w * axis + torch.linalg.cross(axis.expand_as(v), v)
    return torch.where(equal.unsqueeze(-1), torch.cat([turned_w, turned_v], dim=-1), quats)


def symmetric_basis() -> Tensor:
    """(6, 3, 3): the symmetric matrices with one or two ones."""
    basis = torch.zeros(6, 3, 3, dtype=torch.float64)
    for n, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]):
        basis[n, i, j] = basis[n, j, i] = 1
    return basis


def chain_rule(scales: Tensor, quats: Tensor) -> Tensor:
    """(7, 6): from a symmetric gradient to the inverse covariance of a Gaussian to scales and quaternion.

    Columns are the entries that :func:`symmetric_basis` names.
    """
    by_scale, by_quat = torch.func.jacrev(precision_matrix, argnums=(0, 1))(scales, quats)
    jacobian = torch.cat([by_scale, by_quat], dim=-1)  # (3, 3, 7)
    return torch.einsum("ijp,nij->pn", jacobian, symmetric_basis())


def check_stale_sizes(case: Case, given: Scene, points: Tensor, render: Render) -> None:
    """``*_stale96``: a recorded defect of the reference that this library does not have, put together here.

    The sparse kernel is never told the grid and takes 96 voxels per axis: a point has the index round(95 p), and the
    boxes are those of 96^3. So each of our Gaussians is rendered by itself, without support, and kept where that rule
    says so.
    """
    if not case.has("values_stale96"):
        return
    stale = (96, 96, 96)
    first, last = (bound[0, :, None] for bound in box_bounds(given.positions, given.scales, stale))  # (N, 1, 3)
    index = (points * 95).round()
    inside = ((index >= first) & (index <= last)).all(-1)  # (N, M)

    def kept(scene: Scene) -> Tensor:
        each = Gaussians(*(tensor.movedim(0, 1) for tensor in scene.gaussians().tensors()))  # one Gaussian per sample
        values = [render(one, None) for one in each]
        return (torch.cat(values).squeeze(-1) * inside).sum(0).unsqueeze(-1)

    leaves = given.leaves()
    values = kept(leaves)
    offer(case, "values_stale96", values)
    gradient = torch.autograd.grad((values * case.input("grad_values")).sum(), leaves.positions)[0]
    offer(case, "grad_centers_stale96", gradient)
