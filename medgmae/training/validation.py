"""What a run is measured by and shows on the way: fixed crops with fixed masks, their PSNR and SSIM, a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medgmae.data import Grid, Volume
from medgmae.evaluation import psnr, ssim3d
from medgmae.inference.reconstruction import Reconstruction
from medgmae.layers.masking import Masking
from medgmae.layers.patches import unpatchify
from medgmae.training.batches import MaskedBatch, MaskedCrops

if TYPE_CHECKING:
    from medgmae.training.engine import Engine


class Validation:
    """Crops that stay the same over a run.

    Args:
        crops: of scans that are held out, or of those that are trained on.
        count: how many.
        held_out: whether they are held out.
    """

    def __init__(self, crops: MaskedCrops, count: int, held_out: bool) -> None:
        self.crops, self.count, self.held_out = crops, min(count, len(crops)), held_out

    def batches(self, micro: int) -> list[list[int]]:
        """Positions of crops, ``micro`` at once."""
        return [list(range(i, min(i + micro, self.count))) for i in range(0, self.count, micro)]

    def measure(self, engine: Engine, step: int) -> dict[str, Any]:
        """Loss, PSNR of the hidden voxels in dB and SSIM of the completed crops; the range is that of the crop."""
        totals: dict[str, float] = {}
        engine.model.eval()
        for positions in self.batches(engine.share.micro):
            batch = self._batch(positions).to(engine.accelerator.device)
            masking = batch.masking(engine.plain.mask_ratio)  # type: ignore[arg-type]
            with torch.no_grad():
                loss = engine.values(batch, step)["loss"]
                with engine.accelerator.autocast():
                    completed: Tensor = engine.plain.reconstruct(batch.x, masking)  # type: ignore[operator]
            for i in range(len(positions)):
                for name, value in _scores(
                    completed[i : i + 1].float(), batch.x[i : i + 1], masking, i, engine
                ).items():
                    totals[name] = totals.get(name, 0.0) + value / self.count
            totals["loss"] = totals.get("loss", 0.0) + float(loss) * len(positions) / self.count
        engine.model.train()
        return {f"validation_{name}": value for name, value in totals.items()}

    def _batch(self, positions: list[int]) -> MaskedBatch:
        return self.crops.stack([self.crops[position] for position in positions])

    def picture(self, model: nn.Module, path: Path, title: str) -> None:
        """The first crop, what the model saw of it and what it made of that, as a PNG file."""
        batch = self._batch([0])
        masking = batch.masking(model.mask_ratio)  # type: ignore[arg-type]
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        x, on_device = batch.x.to(device), Masking(*(one.to(device) for one in masking))
        with torch.no_grad():
            predicted = model.reconstruct(x, on_device, paste_visible=False).float().cpu()[0]  # type: ignore[operator]
            gaussians = model.gaussians(x, on_device) if hasattr(model, "gaussians") else None  # type: ignore[operator]
        model.train(was_training)
        hidden = voxels_hidden(masking, model.patch_size, tuple(batch.x.shape[2:]))[0]  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = self._figure(batch.x[0], hidden, predicted, gaussians, title)
        figure.savefig(path)

    def _figure(self, x: Tensor, hidden: Tensor, predicted: Tensor, gaussians: Any, title: str) -> Any:
        from medgmae.visualize import images_figure, reconstruction_figure

        visible, filled = x.masked_fill(hidden, math.nan), torch.where(hidden, predicted, x)
        if x.dim() == 3:
            images = {"plane": x[0], "visible patches": visible[0], "reconstruction": filled[0]}
            return images_figure(images, title=title)
        sample = self.crops.crops[0]
        grid = self.crops.crops.scans[sample["scan"]].grid
        scan = Volume(x, Grid(x.shape[1:], grid.spacing, tuple(grid.world(sample["start"])), grid.direction))
        world = None if gaussians is None else gaussians.to_world(scan.grid)
        shown, completed, whole = (scan.with_data(data) for data in (visible, filled, predicted))
        return reconstruction_figure(scan, Reconstruction(shown, completed, whole, world), title=title)


def voxels_hidden(masking: Masking, patch: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Which voxels the masks hide, (B, 1, *size) bool."""
    grid = tuple(n // p for n, p in zip(size, patch, strict=True))
    mask = masking.mask.unsqueeze(-1).expand(-1, -1, math.prod(patch))
    return unpatchify(mask, patch, grid, 1) > 0


def _scores(completed: Tensor, x: Tensor, masking: Masking, i: int, engine: Engine) -> dict[str, float]:
    one = Masking(*(part[i : i + 1] for part in masking))
    hidden = voxels_hidden(one, engine.plain.patch_size, tuple(x.shape[2:]))  # type: ignore[arg-type]
    span = float(x.max() - x.min()) or 1.0
    scores = {}
    if bool(hidden.any()):
        # no error at all would make every mean infinite: 100 dB are beyond what float32 crops can show
        scores["psnr"] = min(psnr(completed, x, data_range=span, where=hidden), 100.0)
    if x.dim() == 5:
        scores["ssim"] = float(ssim3d(completed, x, data_range=span))
    return scores
