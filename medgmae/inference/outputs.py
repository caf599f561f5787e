"""What an encoder with a head says of a whole scan: one row of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import check_channels, encoder_of, volume_of
from medgmae.inference.windows import Outside, batches, evaluating, lay_out


def scan_logits(
    model: nn.Module,
    scan: ScanLike,
    *,
    window: Literal["model"] | int | Sequence[int] | None = "model",
    overlap: float = 0.0,
    outside: Outside = 0.0,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The outputs of a model's head for a scan that has been through the model's transform.

    A scan larger than the window is read in several, whose pooled vectors are averaged before the head, each counting
    alike; with ``global_pool="max_logit"``, whose head looks at every patch, the largest output of all windows counts.

    Args:
        model: an encoder of this library with a head.
        scan: (C, D, H, W), preprocessed.
        window: voxels (d, h, w) that the model sees at once; see :func:`~medgmae.extract_features`.
        overlap: least share of a window that it has in common with the next, 0 to below 1.
        outside: intensity of the padding, in the units of the scan; or "rim", which repeats its outermost voxels.
        batch_size: windows per pass.
        autocast: run the model under autocast with this dtype.

    Returns:
        (num_classes,) float32 on the CPU.

    Raises:
        ValueError: a model without a head, or without pooling; channels that it does not take; an option that is not
            possible.
        TypeError: the model is not one of this library, or the scan not a scan.
    """
    encoder, volume = encoder_of(model, "scan_logits"), volume_of(scan)
    check_channels(encoder, volume.channels)
    if not encoder.num_classes or encoder.global_pool == "none":
        raise ValueError(
            f"scan_logits needs a model with a head and pooling, got num_classes={encoder.num_classes} and "
            f"global_pool={encoder.global_pool!r}; fine-tune one, or build it with num_classes=..."
        )
    layout = lay_out(volume.size, encoder.patch_size, encoder.img_size if window == "model" else window, overlap)
    largest = encoder.global_pool == "max_logit"
    parameter, vectors = next(encoder.parameters()), []
    with evaluating(encoder), torch.inference_mode():
        for _, batch in batches(volume.data, layout, outside, batch_size):
            x = batch.to(parameter.device, parameter.dtype)
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                vectors.append(encoder.forward_head(encoder.forward_features(x), pre_logits=not largest))
        found = torch.cat(vectors)
        if largest:
            return found.amax(0).float().cpu().clone()
        with torch.autocast(parameter.device.type, autocast, enabled=autocast is not None):
            logits: Tensor = encoder.head(found.mean(0, keepdim=True))
        return logits[0].float().cpu().clone()
