"""Features of whole scans: windows on the patch grid, blended into one map with the scan's geometry."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor, nn

from medgmae.data import Volume, resample
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import check_channels, encoder_of, volume_of
from medgmae.inference.windows import Blend, Layout, Outside, WindowMean, batches, blend_weights, evaluating, lay_out
from medgmae.models.encoder import Encoder
from medgmae.ops.progress import Bar, progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on


class Features(NamedTuple):
    """Features of one scan, float32 on the CPU.

    pooled: (F,), the model's pooled vector, averaged over the windows with equal weights. With ``head="projected"``
        (P,), pooled once from the whole map.
    map: (E, d, h, w), or (P, d, h, w), on the grid of patches, in the scan's world: spacing is the patch's size in mm,
        origin the centre of the first patch.
    """

    pooled: Tensor
    map: Volume

    def __repr__(self) -> str:
        return f"Features({', '.join(f'{name}: {text}' for name, text in self._facts())})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = (f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in self._facts())
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        spacing = " x ".join(f"{mm:.4g}" for mm in self.map.spacing)
        place = f"{tuple(self.map.data.shape)}, a place every {spacing} mm, {self.map.orientation}"
        return [("pooled", str(tuple(self.pooled.shape))), ("map", place)]


class PooledFeatures(NamedTuple):
    """Features of one scan without a map; see :class:`Features`."""

    pooled: Tensor
    map: None = None

    def __repr__(self) -> str:
        return f"PooledFeatures(pooled: {tuple(self.pooled.shape)})"


class Options(TypedDict, total=False):
    """Options of :func:`extract_features` that do not change what it returns."""

    head: Literal["projected"] | None
    window: Literal["model"] | int | Sequence[int] | None
    overlap: float
    blend: Blend
    resize: bool
    outside: Outside
    batch_size: int
    autocast: torch.dtype | None
    progress: bool | None


@overload
def extract_features(
    model: nn.Module, scan: ScanLike, *, want_map: Literal[True] = ..., **options: Unpack[Options]
) -> Features: ...


@overload
def extract_features(
    model: nn.Module, scan: ScanLike, *, want_map: Literal[False], **options: Unpack[Options]
) -> PooledFeatures: ...


@overload
def extract_features(
    model: nn.Module, scan: ScanLike, *, want_map: bool, **options: Unpack[Options]
) -> Features | PooledFeatures: ...


def extract_features(
    model: nn.Module,
    scan: ScanLike,
    *,
    window: Literal["model"] | int | Sequence[int] | None = "model",
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    resize: bool = False,
    outside: Outside = 0.0,
    want_map: bool = True,
    head: Literal["projected"] | None = None,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    progress: bool | None = None,
) -> Features | PooledFeatures:
    """Pooled vector and feature map of a whole scan that has been through the model's transform.

    Windows lie on one patch grid, so that their tokens fall onto each other exactly. A scan smaller than the window, or
    of a size that is not a multiple of the patch, is padded on both sides. Only one batch of windows is on the model's
    device at a time; the map is summed up on the CPU.

    Args:
        model: an encoder of this library, or a masked autoencoder, whose encoder is then used.
        scan: (C, D, H, W), preprocessed.
        window: voxels (d, h, w) that the model sees at once, multiples of the patch: "model" for the size it was built
            for, an int for a cube, None for the whole scan in one pass.
        overlap: least share of a window that it has in common with the next, 0 to below 1.
        blend: how overlapping windows are averaged: "gaussian" trusts the middle of a window more than its rim.
        resize: first resample the scan to the window's size, changing its proportions; one pass then.
        outside: intensity of the padding, in the units of the scan; or "rim", which repeats its outermost voxels.
        want_map: False gives ``map=None`` and spares its memory.
        head: "projected" reads what heads of the pre-training make of the features: COLIPRI with
            ``projection_dim=768`` in the space that scans share with texts, where tokens are blended over the windows,
            projected, and pooled over the whole scan; 3DINO with ``prototypes=(2048, 256, 65536)``, the prototypes of
            the pooled vector and of every patch.
        batch_size: windows per pass.
        autocast: run the model under autocast with this dtype.
        progress: show a progress bar over the windows; by default in terminals and notebooks.

    Raises:
        ValueError: channels that the model does not take, or an option that is not possible.
        TypeError: the model is not one of this library, or the scan not a scan.
    """
    encoder, volume = encoder_of(model, "extract_features"), volume_of(scan)
    check_channels(encoder, volume.channels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if resize and window is None:
        raise ValueError("resize=True needs a window to resize to, got window=None")
    if isinstance(outside, str) and outside != "rim":
        raise ValueError(f"outside must be an intensity or 'rim', got {outside!r}")
    size = encoder.img_size if window == "model" else window
    layout = lay_out(volume.size, encoder.patch_size, size, overlap)
    if resize:
        volume = resample(volume, size=layout.window_size)
        layout = lay_out(volume.size, encoder.patch_size, size, overlap)
    weight = blend_weights(layout.window, blend)
    project = _projector(encoder, head)
    mean = WindowMean(layout.grid, weight) if want_map or project else None
    reader = _Reader(encoder, outside, batch_size, autocast)
    with evaluating(model), progress_bar(len(layout.windows()), "windows", progress) as bar:
        pooled = reader.read(volume.data, layout, bar, mean)
    if mean is None:
        return PooledFeatures(pooled)
    inside = mean.result()[(slice(None), *layout.inside)].contiguous()  # without patches that lie in the padding
    if project is not None:
        pooled, inside = project(pooled, inside)
    if not want_map:
        return PooledFeatures(pooled)
    return Features(pooled, Volume(inside, layout.patch_grid(volume.grid), volume.source))


def _projector(encoder: Encoder, head: str | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """From the pooled vector (F,) and a map of tokens (E, d, h, w) to those of ``head``, (P,) and (P, d, h, w).

    Raises:
        ValueError: an unknown head, or a model that has none.
    """
    if head is None:
        return None
    layers: Any = encoder.projection
    if head != "projected" or layers is None:
        raise ValueError(
            f"head={head!r} must be None, or 'projected' for a model with a projection, such as "
            "create_model('primus_m_patch8_192.colipri', projection_dim=768) or "
            "create_model('vit_large_patch16_112.3dino', prototypes=(2048, 256, 65536))"
        )
    parameter = next(encoder.parameters())

    @torch.inference_mode()
    def project(pooled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        given = (part[None].to(parameter.device, parameter.dtype) for part in (pooled, tokens.flatten(1).mT))
        one, dense = (part[0].float().cpu() for part in layers.read(*given))
        return one.clone(), dense.mT.reshape(-1, *tokens.shape[1:]).clone()

    return project


def dense_features(
    model: nn.Module, scan: ScanLike, *, steps: int = 2, overlap: float = 0.25, progress: bool | None = None
) -> Volume:
    """A feature map finer than the patches: the scan is read several times, shifted by parts of a patch.

    Where a window reaches beyond the scan, the scan's rim is repeated.

    Args:
        model: an encoder of this library, or a masked autoencoder, whose encoder is then used.
        scan: (C, D, H, W), preprocessed.
        steps: places per patch and axis; must divide the patch. The work grows with its cube.
        overlap: of the windows, see :func:`~medgmae.extract_features`.
        progress: show a progress bar over the windows; by default in terminals and notebooks.

    Returns:
        (E, d, h, w), a place every ``patch / steps`` voxels.

    Raises:
        ValueError: ``steps`` does not divide the patch; channels that the model does not take, or an overlap that is
            not possible.
        TypeError: the model is not one of this library, or the scan not a scan.
    """
    encoder, volume = encoder_of(model, "dense_features"), volume_of(scan)
    check_channels(encoder, volume.channels)
    patch = encoder.patch_size
    if steps < 1 or any(p % steps for p in patch):
        raise ValueError(f"steps (={steps}) must be at least 1 and divide the patch {tuple(patch)}")
    layout = lay_out(volume.size, patch, encoder.img_size, overlap)
    place = layout.patch_grid(volume.grid, steps)
    reader, weight = _Reader(encoder, "rim"), blend_weights(layout.window)
    dense = torch.empty(0)
    with evaluating(model), progress_bar(len(layout.windows()) * steps**3, "windows", progress) as bar:
        for shift in itertools.product(range(steps), repeat=3):
            mean = WindowMean(layout.grid, weight)
            reader.read(volume.data, layout.shifted(shift, steps), bar, mean)
            inside = mean.result()[(slice(None), *layout.inside)]
            if not len(dense):
                dense = torch.empty(len(inside), *place.size)
            dense[(slice(None), *(slice(k, None, steps) for k in shift))] = inside
    return Volume(dense, place, volume.source)


@dataclass(frozen=True)
class _Reader:
    """An encoder, and how it reads windows."""

    encoder: Encoder
    outside: Outside
    batch_size: int = 1
    autocast: torch.dtype | None = None

    def read(self, data: Tensor, layout: Layout, bar: Bar, mean: WindowMean | None) -> Tensor:
        """The mean pooled vector (F,) of the windows of a scan (C, D, H, W); their tokens go into ``mean``."""
        pooled = torch.zeros((), dtype=torch.float64)
        for starts, batch in batches(data, layout, self.outside, self.batch_size):
            tokens, vectors = self._forward(batch)
            pooled = pooled + vectors.float().cpu().double().sum(0)  # sums, since a view would keep all tokens alive
            if mean is not None:
                patches = tokens[:, self.encoder.num_prefix_tokens :].float().cpu().mT  # (B, E, N)
                for values, start in zip(patches, starts, strict=True):
                    mean.add(layout.patches(start), values.reshape(-1, *layout.window))
            bar.update(len(starts))
        return (pooled / len(layout.windows())).float()

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, P + N, E) and pooled vectors (B, F) of a batch of windows (B, C, d, h, w)."""
        parameter = next(self.encoder.parameters())
        x = batch.to(parameter.device, parameter.dtype)
        with torch.inference_mode(), torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            tokens = self.encoder.forward_features(x)
            return tokens, self.encoder.forward_head(tokens, pre_logits=True)
