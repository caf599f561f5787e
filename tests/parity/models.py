"""What several systems share: a model from a case, the official file into it, tokens, masks and gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints.dialects.entries import Target
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.models.mae import masked_vit
from parity.case import Case, Options, crop, triple, whole_patches
from parity.official import write_file

M = TypeVar("M", bound=nn.Module)


def geometry(options: Options, size: str = "img_size") -> dict[str, Any]:
    """img_size, patch_size and in_chans of a case, as our models take them."""
    patch = options("patch_size")
    options.ignore("grid_size", "grid")
    return {
        "img_size": whole_patches(options(size), patch),
        "patch_size": triple(patch),
        "in_chans": options("in_chans", 1),
    }


def transformer(options: Options) -> dict[str, Any]:
    """Width, depth and the like of an encoder, as our models take them."""
    options.require(qkv_bias=True)
    return {
        "embed_dim": options("embed_dim"),
        "depth": options("depth"),
        "num_heads": options("num_heads"),
        "mlp_ratio": float(options("mlp_ratio", 4)),
        "norm_eps": options.norm_eps(),
    }


def decoder(options: Options) -> dict[str, Any]:
    """Width, depth and heads of a decoder, as ``masked_vit`` takes them."""
    return {name: options(name) for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}


def load(model: M, file: Path | Mapping[str, Tensor], source_grid: Any = None, unused: str = "") -> M:
    """Fill a model from a file; every tensor must find its place, but those whose names match ``unused``."""
    grid = tuple(source_grid) if source_grid else model.encoder.grid_size
    report = medgmae.load_pretrained(model, file, source_grid=grid)
    assert not report.missing, f"not in the file: {report.missing}"
    left = [name for name in report.unused if not (unused and re.search(unused, name))]
    assert not left, f"in the file, but unused: {left}"
    return model.eval()


def raw_tokens(model: medgmae.ViT, x: Tensor, block: int = -1) -> Tensor:
    """(B, P + N, E): the residual stream after a block, not normalised."""
    _, found = model.forward_intermediates(x, indices=[block], return_prefix_tokens=True)
    image, prefix = found[0]
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)


def with_class_row(encoder: Any, class_token: Tensor) -> Tensor:
    """The encoder's table as the references have it: its first row was added into the class token on loading.

    class_token: the token as it stands in the file.
    """
    return torch.cat([encoder.cls_token - class_token, encoder.pos_embed], dim=1)


def decoder_table(model: medgmae.MaskedAutoencoder) -> Tensor:
    """The decoder's table as the references have it, class row first."""
    return torch.cat([model.decoder.prefix_pos_embed, model.decoder.pos_embed], dim=1)


def renamed(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Official name to ours, as the names of a masked autoencoder (``encoder.``, ``decoder.``)."""
    encoder: Any = getattr(model, "encoder", model)
    target = Target(encoder.grid_size, encoder.patch_size, encoder.in_chans)
    return convert(state, target=target, source_grid=encoder.grid_size).renamed


def check_gradients(case: Case, model: medgmae.MaskedAutoencoder, loss: Tensor, prefix: str = "grad/") -> None:
    """Gradients of the loss, as tensors under ``outputs/grad/`` or as norms under ``grad_norms``, by official name."""
    norms = case.spec.get("grad_norms") or {}
    names = [name for name in case.outputs if name.startswith(prefix)]
    if not norms and not names:
        return
    model.zero_grad()
    loss.backward()
    ours = renamed(case.weights, model)
    parameters = dict(model.named_parameters())

    def gradient(official: str) -> Tensor:
        found = parameters[ours[official]].grad
        assert found is not None, f"no gradient for {official}"
        return found

    for name in names:
        official = name.removeprefix(prefix)
        found = gradient(official)
        if case.outputs[name].dim() == 2 and found.dim() == 5:  # a linear patch weight: channel fastest
            found = found.movedim(1, -1).flatten(1)
        case.offer(name, found, "grad", "gradients")
    for official, norm in norms.items():
        if norm is not None:
            # Not in the list of tolerances: the loosest one, relative to the norm as well.
            atol, rtol = case.tolerance("grad_norms", "grad_norm", "grad")
            tolerance = (atol, max(atol, rtol))
            case.close(f"gradient norm of {official}", gradient(official).norm().item(), norm, tolerance)
    frozen = {ours[name] for name in ours if "pos_embed" in name and norms and name not in norms}
    trained = {name for name in frozen if parameters[name].grad is not None}
    case.same("tables that got a gradient", trained, set())


def check_timm_mae(case: Case, model: medgmae.MaskedAutoencoder, raw: bool) -> None:
    """The outputs of a MAE in timm's spelling (TANGERINE, GL-MAE's sibling), made from explicit noise.

    raw: whether ``outputs/loss`` compares raw intensities; ``outputs/loss_norm_pix`` is always the normalised one.
    """
    model = load(model, write_file(case, case.weights))
    x, noise = crop(case.input("volume", "x", "image"), model.encoder.patch_size), case.input("noise")
    masking = medgmae.random_masking(len(x), noise.shape[1], model.mask_ratio, noise=noise)
    case.offer("mask", masking.mask)
    case.offer("ids_restore", masking.restore)
    case.offer("ids_keep", masking.keep)
    case.offer("latent", model.encoder.forward_features(x, keep=masking.keep))
    patches = medgmae.patchify(x, model.encoder.patch_size)
    case.offer("target_patches", _every(case, "target_patches", patches), tolerance=(0.0, 0.0))
    plain = medgmae.MaskedAutoencoder(model.encoder, model.decoder, model.mask_ratio)
    normed = medgmae.MaskedAutoencoder(model.encoder, model.decoder, model.mask_ratio, "unbiased")
    output, normed_loss = plain(x, masking), normed(x, masking).loss
    case.offer("pred", output.pred)
    case.offer("loss", output.loss if raw else normed_loss)
    case.offer("loss_norm_pix", normed_loss, "loss")
    _check_volume(case, plain.reconstruct(x, masking, paste_visible=False))
    check_gradients(case, model, output.loss if raw else normed_loss)


def _every(case: Case, name: str, patches: Tensor) -> Tensor:
    """The patches that the JSON says were stored, as in ``patchify(volume)[:, ::8]``."""
    text = (case.spec.get("layout") or case.spec.get("axes") or {}).get(f"outputs/{name}", "")
    step = re.search(r"\[:, ::(\d+)\]", text)
    return patches[:, :: int(step[1])] if step else patches


def _check_volume(case: Case, volume: Tensor) -> None:
    """``unpatchify_pred_<sample>_sub<step>``: the prediction of one sample as a volume, every <step>-th voxel."""
    for name in list(case.outputs):
        if found := re.fullmatch(r"unpatchify_pred_(\d+)_sub(\d+)", name):
            sample, step = int(found[1]), int(found[2])
            case.offer(name, volume[sample, :, ::step, ::step, ::step], "pred")


def build_mae3d(settings: Options, mask_ratio: float, encoder: Options, bridge: dict[str, Any]) -> Any:
    """``MAE3D`` of SelfMedMAE and MedGMAE: layer-normalised targets, tables without class row."""
    settings.ignore("patchembed")
    kind = settings("pos_embed_type", "sincos")
    tables = {"sincos": "sincos", "perceptron": "learned"}
    assert kind in tables, f"pos_embed_type={kind!r} is not one of the reference's working ones: {', '.join(tables)}"
    model = masked_vit(
        **geometry(settings, "img_size" if "img_size" in settings else "input_size"),
        **transformer(encoder),
        **bridge,
        pos_embed=tables[kind],
        mask_ratio=mask_ratio,
        norm_target="biased",
    )
    settings.done()
    encoder.done()
    return model


def check_mae3d(case: Case, model: medgmae.MaskedAutoencoder, names: Mapping[str, str]) -> None:
    """The outputs of ``MAE3D``, made from an explicit permutation.

    names: our word for an output to the case's.
    """
    model = load(model, write_file(case, case.weights))
    x, shuffle = case.input("image", "x", "volume"), case.input("shuffle_indices").long()
    # The permutation is what sorting the noise gives: patch shuffle[i] has the i-th smallest noise.
    noise = shuffle.argsort(dim=1).double()
    masking = medgmae.random_masking(len(x), shuffle.shape[1], model.mask_ratio, noise=noise)
    case.same("visible patches", masking.keep.tolist(), shuffle[:, : masking.keep.shape[1]].tolist())
    output = model(x, masking)
    patches = medgmae.patchify(x, model.encoder.patch_size)
    recon = model.reconstruct(x, masking, paste_visible=False, denormalize="reference")
    case.offer(names["patches"], patches, tolerance=(0.0, 0.0))
    case.offer(names["masked"], patches * (1 - masking.mask).unsqueeze(-1), tolerance=(0.0, 0.0))
    case.offer(names["encoded"], model.encoder.forward_features(x, keep=masking.keep))
    case.offer(names["recon"], medgmae.patchify(recon, model.encoder.patch_size))
    case.offer(names["loss"], output.loss)
    decoded = names["decoded"]
    if case.has(decoded):
        # The reference predicts a patch from the class token too and throws it away; ours does not compute it, and
        # that row is taken over. The others are in shuffled order.
        shuffled = output.pred.gather(1, shuffle.unsqueeze(-1).expand_as(output.pred))
        case.offer(decoded, torch.cat([case.outputs[decoded][:, :1], shuffled], dim=1))
    check_gradients(case, model, output.loss)
