"""Saliency: what in a scan an encoder, or one output of its head, goes by, as a volume on the scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from medgmae.data import Volume
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import check_channels, encoder_of, volume_of
from medgmae.inference.latents import Upsampling, reduce_tokens, upsample
from medgmae.inference.outputs import scan_logits
from medgmae.inference.windows import Outside, WindowMean, batches, blend_weights, evaluating, lay_out
from medgmae.layers.blocks import Block
from medgmae.models.encoder import Encoder
from medgmae.models.parts import check_choice
from medgmae.ops.progress import progress_bar

Method = Literal["rollout", "gradient", "latent"]

_QUERIES = 256  # whose attention to all tokens is in memory at a time


def saliency_map(
    model: nn.Module,
    scan: ScanLike,
    *,
    method: Method = "rollout",
    output: int | str | None = None,
    window: Literal["model"] | int | Sequence[int] | None = "model",
    overlap: float = 0.5,
    outside: Outside = 0.0,
    upsampling: Upsampling = "block",
    batch_size: int = 1,
    progress: bool | None = None,
) -> Volume:
    """One number per patch that says how much it counts, laid out over the patch's voxels.

    - "rollout": attention rollout of a ViT (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928): the mean attention
      of the heads, half of it the token itself, multiplied through the blocks; from the class token where the head
      pools that, from the last patch where it pools that, and from all patches alike otherwise. What a patch gets is
      its share; those of a window's tokens sum to 1. It knows nothing of the head's outputs.
    - "gradient": Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) on tokens, of a model with a head:
      each feature counts by its mean gradient over the patches; a patch gets the sum over its features, where that is
      positive, else 0. The tokens are those that the head pools. Where it pools one token only ("token", "last"), they
      are those that go into the last block.
    - "latent": the latent map of mode "finetuned", see :func:`~medgmae.latent_to_spatial`, from the tokens of windows.

    Windows lie as those of :func:`~medgmae.extract_features` and are averaged as there; "gradient" is of each window's
    own output. The model runs in evaluation mode, and gets its own mode back.

    Args:
        model: an encoder of this library, or a masked autoencoder, whose encoder is then used.
        scan: (C, D, H, W), preprocessed.
        method: see above.
        output: of "gradient": number or name of the output that is explained; None for the largest that
            :func:`~medgmae.inference.outputs.scan_logits` finds for the scan.
        window: see :func:`~medgmae.extract_features`; likewise ``overlap``, ``outside``, ``batch_size``, ``progress``.
        upsampling: "block" repeats a patch's number over its voxels; "linear" interpolates between patch centres.

    Returns:
        (1, D, H, W) float32 on the scan's grid.

    Raises:
        TypeError: the model is not one of this library, or the scan not a scan.
        ValueError: a method that the model has not what it takes for; an output that it does not have; channels that
            it does not take, or an option that is not possible.
    """
    check_choice("method", method, get_args(Method))
    check_choice("upsampling", upsampling, get_args(Upsampling))
    encoder, volume = encoder_of(model, "saliency_map"), volume_of(scan)
    check_channels(encoder, volume.channels)
    if method != "gradient" and output is not None:
        raise ValueError(f"output={output!r} is for method 'gradient'; {method!r} knows nothing of the outputs")
    layout = lay_out(volume.size, encoder.patch_size, encoder.img_size if window == "model" else window, overlap)
    number = 0
    if method == "rollout":
        _check_attention(encoder)
    elif method == "gradient":
        seen: Any = {"window": window, "overlap": overlap, "outside": outside, "batch_size": batch_size}
        number = _output(encoder, output)
        number = int(scan_logits(encoder, volume, **seen).argmax()) if output is None else number
    mean = WindowMean(layout.grid, blend_weights(layout.window))
    parameter = next(encoder.parameters())
    with evaluating(encoder), progress_bar(len(layout.windows()), "windows", progress) as bar:
        for starts, batch in batches(volume.data, layout, outside, batch_size):
            x = batch.to(parameter.device, parameter.dtype)
            if method == "gradient":
                values = gradient_weighted(encoder, x, number)[:, None]
            elif method == "rollout":
                values = attention_rollout(encoder, x)[:, None, encoder.num_prefix_tokens :]
            else:
                with torch.no_grad():
                    values = encoder.forward_last_block(x)[:, encoder.num_prefix_tokens :].mT
            for one, start in zip(values.float().cpu(), starts, strict=True):  # (1 or E, N)
                mean.add(layout.patches(start), one.reshape(-1, *layout.window))
            bar.update(len(starts))
    found = mean.result()
    if method == "latent":
        found = reduce_tokens(found.flatten(1).mT[None], encoder.map_reduction).reshape(1, *layout.grid)
    voxels = upsample(found[None], layout.patch, upsampling)[0]
    return volume.with_data(voxels[(slice(None), *layout.scan)].contiguous())


def _check_attention(encoder: Encoder) -> None:
    if not all(isinstance(block, Block) for block in encoder.blocks):
        raise ValueError(
            f"method 'rollout' multiplies the attention of a model's blocks, and a {type(encoder).__name__} has none; "
            "use method='gradient', or 'latent'"
        )


def _output(encoder: Encoder, output: int | str | None) -> int:
    """The number of an output; 0 where none is named.

    Raises:
        ValueError: a model without a head, or without pooling; no such output.
    """
    count, names = encoder.num_classes, encoder.label_names
    if not count or encoder.global_pool == "none":
        raise ValueError(
            f"method 'gradient' explains an output of a head, and the model has num_classes={count} and "
            f"global_pool={encoder.global_pool!r}; fine-tune one, or use method='rollout' or 'latent'"
        )
    number = names.index(output) if names and output in names else output
    if number is None:
        return 0
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        known = f", or their names: {', '.join(names)}" if names else "; the model has no names for them"
        raise ValueError(f"output is {output!r}; expected a number from 0 to {count - 1}{known}")
    return number


@torch.no_grad()
def attention_rollout(encoder: Encoder, x: Tensor) -> Tensor:
    """How much each token counts, (B, P + N), class tokens first; rows sum to 1. x: (B, C, D, H, W).

    Fused attention gives no weights, so each block's are computed again from what went into it.
    """
    _check_attention(encoder)
    attentions: list[Any] = [block.attn for block in encoder.blocks]
    given: list[tuple[Tensor, ...]] = []
    hooks = [one.register_forward_pre_hook(lambda _, args: given.append(args)) for one in attentions]
    try:
        encoder.forward_features(x)
    finally:
        for hook in hooks:
            hook.remove()
    rows = _pooled_rows(encoder, given[0][0])
    for attention, arguments in zip(reversed(attentions), reversed(given), strict=True):
        queries, keys, _ = attention.heads(*arguments[:2])
        bias = arguments[2] if len(arguments) == 3 else None
        rows = (rows + _attended(queries.float(), keys.float(), rows, bias)) / 2
    return rows


def _pooled_rows(encoder: Encoder, tokens: Tensor) -> Tensor:
    """How much each token (B, P + N, E) counts for the pooled vector, (B, P + N)."""
    batch, count, prefix, read = *tokens.shape[:2], encoder.num_prefix_tokens, encoder.num_class_tokens
    row = torch.zeros(count, device=tokens.device)
    if encoder.global_pool == "last":
        row[-1] = 1
    else:
        share = {"token": 1.0, "token_avg": 0.5}.get(encoder.global_pool, 0.0)  # of the class tokens
        row[:read] = share / max(read, 1)
        row[prefix:] = (1 - share) / (count - prefix)
    return row.expand(batch, -1)


def _attended(queries: Tensor, keys: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Rows (B, N) times the attention of tokens to each other, the mean of the heads; both are (B, heads, N, d).

    bias: added to the scores of every key, (N).
    """
    queries, keys = queries * queries.shape[-1] ** -0.5, keys.mT
    found, more = torch.zeros_like(rows), 0.0 if bias is None else bias.float()
    parts = zip(torch.split(queries, _QUERIES, dim=2), torch.split(rows, _QUERIES, dim=1), strict=True)
    for part, weight in parts:
        found += ((part @ keys + more).softmax(-1) * weight[:, None, :, None]).sum(2).mean(1)
    return found


def gradient_weighted(encoder: Encoder, x: Tensor, number: int) -> Tensor:
    """(B, N), from 0: what the patches' tokens give to output ``number`` of the head. x: (B, C, D, H, W)."""
    with _frozen(encoder), torch.enable_grad():
        if encoder.global_pool in ("token", "last"):
            kept: list[Tensor] = []
            hook = encoder.blocks[-1].register_forward_pre_hook(lambda _, streams: _leaf(streams, kept))
            try:
                logits = encoder(x)
            finally:
                hook.remove()
        else:
            kept = [encoder.forward_features(x).detach().requires_grad_()]
            logits = encoder.forward_head(kept[0])
        (gradient,) = torch.autograd.grad(logits[:, number].sum(), kept)
    tokens = kept[0].detach()
    if encoder.global_pool in ("token", "last"):
        tokens, gradient = encoder.prefix_first(tokens), encoder.prefix_first(gradient)
    first = encoder.num_prefix_tokens
    features = gradient[:, first:].float().mean(1, keepdim=True)
    return (features * tokens[:, first:].float()).sum(-1).relu()


def _leaf(streams: tuple[Tensor | None, ...], kept: list[Tensor]) -> tuple[Tensor | None, ...]:
    """What a block takes, as one tensor from which gradients begin; a Vim's takes tokens beside the stream that they
    are to be added to."""
    kept.append(sum(one for one in streams if one is not None).detach().requires_grad_())  # type: ignore[union-attr]
    return kept[0], *(None for _ in streams[1:])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters for a while, so that nothing is kept for them."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
