"""3D Gaussians and the renderer that turns them into a volume."""

from __future__ import annotations

import html
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from medgmae.gaussians.frames import Placed, axes_to_world, transformed
from medgmae.gaussians.ply import Frame, Splats, read_ply, reversed_axes, write_ply
from medgmae.ops.voxel.operator import Support, support_code, voxelize


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A batch of sets of K Gaussians; the value of one at distance d of its centre is density · exp(-½ dᵀ Σ⁻¹ d).

    ``gaussians[i]`` and ``gaussians[i:j]`` are some of the sets, still as a batch; ``len(gaussians)`` is the number of
    sets, and iterating goes over them; ``tensors()`` gives the four tensors.

    means: (B, K, 3) centres, in units of the axis (0 first voxel, 1 last voxel), ordered (d, h, w).
    scales: (B, K, 3) standard deviations along the Gaussian's own axes, in the same units.
    quats: (B, K, 4) rotations (w, x, y, z) from its own axes to the volume's: Σ = R diag(scales²) Rᵀ.
    densities: (B, K) values at the centres.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    densities: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """means, scales, quats and densities, in the order of the renderer's arguments."""
        return self.means, self.scales, self.quats, self.densities

    def __len__(self) -> int:
        return self.means.shape[0]

    def __getitem__(self, sets: SupportsIndex | slice) -> Gaussians:
        if not isinstance(sets, slice):
            number = operator.index(sets)
            if not -len(self) <= number < len(self):
                raise IndexError(f"set {number} of a batch of {len(self)}")
            sets = slice(number, number + 1 or None)
        return Gaussians(*(tensor[sets] for tensor in self.tensors()))

    def __iter__(self) -> Iterator[Gaussians]:
        return (self[i] for i in range(len(self)))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return self.means.dtype

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.densities.shape))
        return f"Gaussians({shape}, {self.densities.dtype}, {self.densities.device})"

    def _repr_html_(self) -> str:
        """A table for notebooks: shape and range of each tensor."""
        rows = ""
        for field in fields(self):
            values: Tensor = getattr(self, field.name).detach()
            span = f"{float(values.min()):.4g} to {float(values.max()):.4g}" if values.numel() else "-"
            rows += f"<tr><th>{field.name}</th><td>{tuple(values.shape)}</td><td>{span}</td></tr>"
        return f"<table><tr><th>{html.escape(repr(self))}</th><th>shape</th><th>range</th></tr>{rows}</table>"

    def to(self, *args: Any, **kwargs: Any) -> Gaussians:
        """The same Gaussians on another device or in another dtype; arguments as for ``Tensor.to``."""
        return Gaussians(*(tensor.to(*args, **kwargs) for tensor in self.tensors()))

    def detach(self) -> Gaussians:
        """The same values without gradients."""
        return Gaussians(*(tensor.detach() for tensor in self.tensors()))

    @staticmethod
    def concat(parts: Sequence[Gaussians]) -> Gaussians:
        """The Gaussians of several sets in one, along K; all must be in the same frame.

        Raises:
            ValueError: no sets, or sets of different batch sizes.
        """
        batches = [part.means.shape[0] for part in parts]
        if not batches or any(size != batches[0] for size in batches):  # a set of sizes takes no symbolic ones
            raise ValueError(
                f"sets of batch sizes {batches} cannot be joined; expected at least one set, all of one size"
            )
        return Gaussians(
            *(torch.cat(joined, dim=1) for joined in zip(*(part.tensors() for part in parts), strict=True))
        )

    def to_world(self, grid: Placed) -> Gaussians:
        """From units of a grid's axes (d, h, w) to LPS millimetres (x, y, z) in the patient, covariance included.

        The values stay what they are at every place; only the coordinates change. Computed in float64 and returned in
        the own dtype, without gradients. The box of MedGMAE's support does not move with a Gaussian: it belongs to the
        grid.

        Args:
            grid: the :class:`~medgmae.Volume`, or its grid, in whose units these Gaussians are: that of the window for
                Gaussians of a window. Along an axis of one voxel a unit is one spacing.

        Raises:
            ValueError: a parameter is NaN or infinite.
        """
        matrix, offset = axes_to_world(grid)
        return Gaussians(*transformed(self.means, self.scales, self.quats, matrix, offset), self.densities.detach())

    def to_grid(self, grid: Placed) -> Gaussians:
        """From LPS millimetres to units of a grid's axes, ready to render on it; undoes :meth:`to_world`.

        The same covariance may come back with its axes in another order: scales and quaternions belong together.

        Args:
            grid: the :class:`~medgmae.Volume`, or its grid, to render on.

        Raises:
            ValueError: a parameter is NaN or infinite.
        """
        matrix, offset = axes_to_world(grid)
        inverse = torch.linalg.inv(matrix)
        moved = transformed(self.means, self.scales, self.quats, inverse, -inverse @ offset)
        return Gaussians(*moved, self.densities.detach())

    def save_ply(self, path: str | os.PathLike[str], frame: Frame = "axes") -> None:
        """Write one set as a PLY file that viewers of 3D Gaussian splatting open; see :mod:`medgmae.gaussians.ply`.

        :meth:`load_ply` gives the same float32 bits back. Viewers want axes in the order (x, y, z), so those of a
        volume are written as (w, h, d).

        Args:
            path: where to write.
            frame: what the coordinates are: "axes", units of a volume's axes (d, h, w), as models give them; or
                "world", LPS millimetres (x, y, z), of :meth:`to_world`. The file says which.

        Raises:
            ValueError: a batch of several sets, another frame, or a parameter that is NaN or infinite.
        """
        if self.means.shape[0] != 1:
            raise ValueError(
                f"a PLY file holds one set, this is a batch of {self.means.shape[0]}; take sample i with "
                "gaussians[i], or join samples in one frame with Gaussians.concat"
            )
        if frame not in ("axes", "world"):
            raise ValueError(f"frame must be 'axes' or 'world', got {frame!r}")
        means, scales, quats, densities = (tensor[0].detach().float().cpu().numpy() for tensor in self.tensors())
        splats = Splats(means, scales, quats, densities, frame)
        write_ply(path, reversed_axes(splats) if frame == "axes" else splats)

    @staticmethod
    def load_ply(path: str | os.PathLike[str], frame: Frame | None = None) -> Gaussians:
        """Gaussians (1, K, ...) of a PLY file, float32 on the CPU.

        Args:
            path: a file of :meth:`save_ply`, or of any tool for 3D Gaussian splatting: then the densities are the
                opacities, and colours are left out.
            frame: the frame to expect, see :meth:`save_ply`. None: the file's own; a file of another tool, which names
                none, is then taken as "world", its x, y, z as they stand.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not of that frame, is not a PLY file of Gaussians, is cut off, or holds NaN.
        """
        splats = read_ply(path)
        if frame not in (None, "axes", "world") or (frame and splats.frame not in (None, frame)):
            raise ValueError(f"{path} holds Gaussians in the frame {splats.frame!r}, asked for was {frame!r}")
        if (splats.frame or frame or "world") == "axes":
            splats = reversed_axes(splats)
        return Gaussians(*(torch.from_numpy(np.ascontiguousarray(values))[None] for values in splats[:4]))


# Models that give Gaussians are exported and compiled with them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 warns of its own call inside
    torch.export.register_dataclass(Gaussians, serialized_type_name="medgmae.Gaussians")


class GaussianRenderer(nn.Module):
    """Renders Gaussians into volumes or patches; differentiable, on CPU and CUDA. It has no parameters.

    Args:
        support: where a Gaussian counts. A number k: inside its ellipsoid of k standard deviations; at the default 4
            a Gaussian ends at 0.03 % of its peak. None: everywhere. "box": MedGMAE's box of ±2 scales that is not
            turned with the Gaussian, for its checkpoints; there a Gaussian ends at 14 % of its peak or less.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, support: Support = 4.0) -> None:
        super().__init__()
        support_code(support)
        self.support: Support = support

    def forward(
        self,
        gaussians: Gaussians,
        size: int | Sequence[int],
        patches: Tensor | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Render; see :func:`medgmae.ops.voxelize` for the grid, the patches and the errors.

        Args:
            gaussians: K Gaussians for each of B samples.
            size: voxels (D, H, W), or one number for a cube.
            patches: (B, n) long, the only patches to render, as numbered by :class:`~medgmae.layers.masking.Masking`.
            patch_size: voxels of a patch, with ``patches``.

        Returns:
            (B, 1, D, H, W), or (B, n, prod(patch_size)) for the patches. NaN in a sample with a parameter that is NaN
            or infinite, or with a scale s whose 1 / s² is not finite (0, or below 5.4e-20 in float32).
        """
        means, scales, quats, densities = gaussians.tensors()
        size = (int(size),) * 3 if isinstance(size, Integral) else size
        return voxelize(
            means, scales, quats, densities, size, support=self.support, patches=patches, patch_size=patch_size
        )

    def described(self) -> dict[str, Any]:
        """The name of the class and its options, for the options of a model that it is a part of."""
        return {"class": type(self).__name__, "support": self.support}

    def extra_repr(self) -> str:
        """The support, for ``print``."""
        return f"support={self.support!r}"
