"""Gaussians to begin a reconstruction with, in LPS millimetres, with densities in 1/mm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from medgmae.data import Volume, VolumeError, crop_or_pad
from medgmae.data.preparation import Preparation
from medgmae.gaussians.fitting import FIRST_SCALE, fit_gaussians
from medgmae.gaussians.rendering import Gaussians
from medgmae.inference.reconstruction import reconstruct_scan
from medgmae.tomography.projections import MU_WATER, to_hounsfield

Rule = Literal["gradient", "fit", "r2", "random"]

# R2-Gaussian's start (Zha et al. 2024, https://arxiv.org/abs/2405.20693): voxels above this part of the range of
# attenuation, and the part of a voxel's value that its Gaussian gets.
R2_LEAST, R2_DENSITY = 0.05, 0.15
# Least standard deviation in voxels: what thinner ones have at voxels says little of their line integrals.
THINNEST = 0.6
RIM = 4  # voxels of air about a volume that Gaussians are fitted to, so that they do not reach out of it unseen


def start_gaussians(
    volume: Volume,
    count: int,
    rule: Rule = "fit",
    *,
    steps: int = 100,
    support: float = 3.5,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Gaussians:
    """Gaussians from a first reconstruction.

    - "gradient": places drawn by the size of the gradient, as wide as they are apart, see
      :func:`~medgmae.fit_gaussians`.
    - "fit": these, fitted to the volume for some steps, with the growth of that function.
    - "r2": R2-Gaussian's: places drawn evenly among voxels above 5 % of the largest value, as wide as the root mean
      square distance of the three nearest, of 0.15 times the voxel's value.
    - "random": places drawn evenly in the whole volume, 0.7 times as wide as
      they are apart, of as much attenuation together as the volume has.

    Args:
        volume: attenuation in 1/mm, such as that of :func:`~medgmae.tomography.fdk`.
        count: Gaussians, K.
        rule: see above.
        steps: of the fit.
        support: of the rendering that "gradient" and "fit" match, see :class:`~medgmae.GaussianRenderer`.
        generator: source of the places, on the CPU; None: one with seed 0.
        progress: show a progress bar of the fit.

    Returns:
        (1, K, ...) in LPS millimetres.

    Raises:
        VolumeError: an unknown rule, several channels, or no voxel to begin with.
    """
    if rule not in get_args(Rule):
        raise VolumeError(f"rule is {rule!r}; expected one of {list(get_args(Rule))}")
    if volume.channels != 1:
        raise VolumeError(f"the start has {volume.channels} channels; expected one, attenuation in 1/mm")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if rule in ("gradient", "fit"):
        within = crop_or_pad(volume, tuple(n + 2 * RIM for n in volume.size), value=0.0)
        moves = steps if rule == "fit" else 0
        found = fit_gaussians(
            within, count, moves, support=support, thinnest=THINNEST, generator=generator, progress=progress
        )
        return found.to_world(within)
    values = volume.data[0].float()
    if rule == "r2":
        candidates = (values > R2_LEAST * float(values.max())).nonzero()
        if len(candidates) < 4:
            raise VolumeError(f"{len(candidates)} voxels are above 5 % of the largest value; expected a body")
    else:
        candidates = torch.ones_like(values).nonzero()
    picks = torch.randperm(len(candidates), generator=generator)[:count]
    picks = picks if len(picks) == count else torch.randint(len(candidates), (count,), generator=generator)
    index = candidates[picks]
    jitter = torch.rand(count, 3, generator=generator) - 0.5
    means = torch.from_numpy(volume.grid.world((index + jitter).numpy())).float()
    if rule == "r2":
        scales, densities = _nearest(means), R2_DENSITY * values[tuple(index.unbind(1))]
    else:
        extent = float(torch.tensor(volume.size).prod()) * float(torch.tensor(volume.spacing).prod())
        scales = torch.full((count,), FIRST_SCALE * (extent / count) ** (1 / 3))
        densities = (values.mean() / ((2 * math.pi) ** 1.5 * FIRST_SCALE**3)).expand(count).clone()
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    return Gaussians(means[None], scales[:, None].expand(count, 3)[None].clone(), quats[None], densities[None])


def _nearest(points: Tensor, count: int = 3) -> Tensor:
    """Root mean square distance (n,) of the nearest ``count`` other points (n, 3)."""
    found = []
    for some in points.split(1024):  # type: ignore[no-untyped-call]
        nearest = torch.cdist(some, points).topk(min(count + 1, len(points)), largest=False).values[:, 1:]
        found.append(nearest.square().mean(1).sqrt())
    return torch.cat(found).clamp(min=1e-3)


def predict_gaussians(
    model: nn.Module,
    volume: Volume,
    input: Mapping[str, Any] | None = None,
    mu_water: float = MU_WATER,
    *,
    overlap: float = 0.5,
    progress: bool | None = None,
) -> Gaussians:
    """What a Gaussian masked autoencoder makes of a first reconstruction, all of whose patches it sees.

    The volume is turned, resampled and windowed as the model's weight card says, the model predicts the Gaussians of
    windows (see :func:`~medgmae.reconstruct_scan`), and their densities are scaled back to attenuation.

    Args:
        model: a :class:`~medgmae.GaussianMAE`.
        volume: attenuation in 1/mm.
        input: what the model was trained on, an input block as :func:`~medgmae.create_transform` takes it, of
            Hounsfield units; None: that of its weight card. Its window must begin at -1000 HU, which is air, and
            become 0 to 1: where there are no Gaussians there is 0.
        mu_water: attenuation of water in 1/mm.
        overlap: of the windows.
        progress: show a progress bar over the windows.

    Returns:
        (1, K, ...) in LPS millimetres; K is the model's number times the number of windows.

    Raises:
        VolumeError: nothing is known of the model's input, or it has another window.
        TypeError: the model predicts no Gaussians.
    """
    known = (getattr(model, "pretrained_cfg", None) or {}).get("input") if input is None else input
    if not known:
        raise VolumeError(
            "the model has no weight card that says what it was trained on; pass input=, such as "
            "{'spacing': [3, 3, 3], 'resample': {}, 'window': [-1000, 1000]}"
        )
    prepare = Preparation(known, whole=True)
    window, normalize = prepare.input["window"], prepare.input["normalize"]
    if window is None or isinstance(window, Mapping) or window[0] != -1000:
        raise VolumeError(f"window of the model's input is {window}; expected its lower end at -1000 HU, air")
    if tuple(prepare.input["range"]) != (0, 1) or normalize != "none":
        raise VolumeError(
            f"the model's input is mapped to {prepare.input['range']} and normalised by {normalize!r}; expected "
            "0 to 1 and 'none': nothing else can be scaled back to attenuation"
        )
    in_hu = volume.with_data(to_hounsfield(volume.data.float(), mu_water))
    found = reconstruct_scan(model, prepare(in_hu), mask_ratio=0.0, overlap=overlap, progress=progress)
    if found.gaussians is None:
        raise TypeError(f"expected a model that predicts Gaussians, got {type(model).__name__}")
    parts, reach = found.gaussians, window[1] - window[0]
    return Gaussians(parts.means, parts.scales, parts.quats, parts.densities * (mu_water * reach / 1000))
