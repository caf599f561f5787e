"""Adapters for MedGMAE's models that make Gaussians, its losses and its training schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints.dialects.gaussian import gaussian_name, turn_rotation
from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.losses import _blur, ssim3d
from medgmae.models.gmae import GaussianMAE, gaussian_vit
from medgmae.training.optim import cosine_schedule, param_groups
from parity import adapter
from parity.case import EXACT, Case, Options
from parity.medgmae_render import PROSE, conjugate
from parity.models import geometry, load, renamed
from parity.official import random_state, timm_shapes, write_file

# Official entries that nothing is computed from.
UNUSED = r"(^|\.)(mask_token|decoder_pos_embed)$"
TABLES = {"sincos": "sincos", "perceptron": "learned"}
TERMS = {"mse": "loss", "l1": "l1", "ssim": "ssim_loss", "scale": "scale_penalty", "uniformity": "uniformity_loss"}


@contextmanager
def whole_sequence(decoder: Any) -> Iterator[list[Tensor]]:
    """Collect the sequence (B, P + K + n, E) after the last block and the norm; ours normalises the queries only."""
    found: list[Tensor] = []
    hook = decoder.blocks[-1].register_forward_hook(lambda _module, _args, x: found.append(decoder.norm(x)))
    try:
        yield found
    finally:
        hook.remove()


def as_theirs(gaussians: Gaussians, density_scale: float) -> dict[str, Tensor]:
    """Gaussians as the reference's decoder gives them: quaternions conjugated, densities before the factor."""
    return {
        "positions": gaussians.means,
        "scales": gaussians.scales,
        "rotations": conjugate(gaussians.quats),
        "densities": gaussians.densities.unsqueeze(-1) / density_scale,
    }


@adapter("medgmae/gaussian_decoder")
def gaussian_decoder(case: Case) -> None:
    options = Options(case.spec["config"])
    width, count = options("embed_dim"), options("num_gaussians")
    # The file is that of a whole model, whose bridge changes nothing and whose encoder is of no account.
    model = gaussian_vit(
        8,
        4,
        embed_dim=width,
        depth=1,
        num_heads=1,
        pos_embed="learned",
        num_gaussians=count,
        decoder_embed_dim=width,
        decoder_depth=options("depth"),
        decoder_num_heads=options("num_heads"),
        mlp_ratio=float(options("mlp_ratio", 4)),
        norm_eps=options.norm_eps(),
        support="box",
    )
    options.done()
    load(model, write_file(case, around_decoder(case.weights, width, count)))
    tokens = case.input("tokens").requires_grad_()
    made = []
    with whole_sequence(model.decoder) as features:
        for sample in tokens.split(1):  # the case has other queries for every sample
            queries = {"query_tokens": sample[:, 1 : 1 + count]}
            others = torch.cat([sample[:, :1], sample[:, 1 + count :]], dim=1)
            made.append(torch.func.functional_call(model.decoder, queries, (others,)))
    case.offer("features", torch.cat(features))
    gaussians = Gaussians(*(torch.cat(parts) for parts in zip(*(one.tensors() for one in made), strict=True)))
    found = as_theirs(gaussians, model.decoder.density_scale)
    for name, value in found.items():
        case.offer(name, value)
    loss = torch.stack([(value * case.input(f"cotangent_{name}")).sum() for name, value in found.items()]).sum()
    case.offer("grad_tokens", torch.autograd.grad(loss, tokens)[0])


def around_decoder(decoder: dict[str, Tensor], width: int, count: int) -> dict[str, Tensor]:
    """An official file of a decoder, an identity as the bridge, and an encoder of one block on 2 x 2 x 2 patches."""
    encoder = random_state(timm_shapes(width, patch=(4, 4, 4), rows=8))
    return {
        "encoder_pos_embed": encoder.pop("pos_embed"),
        **{f"encoder.{name}": tensor for name, tensor in encoder.items()},
        "encoder_to_decoder.weight": torch.eye(width),
        "encoder_to_decoder.bias": torch.zeros(width),
        "gaussian_query_tokens": torch.zeros(1, count, width),
        **{f"decoder.{name}": tensor for name, tensor in decoder.items()},
    }


def build_model(case: Case) -> GaussianMAE:
    """The case's model with every term of the loss; only the first has a weight in the reference's loss."""
    options = Options(case.spec["config"])
    encoder, decoder = Options(options("encoder")), Options(options("decoder"))
    options.require(qkv_bias=True, drop_path=0, act="exact GELU")
    table = options("pos_embed_type", "sincos")
    assert table in TABLES, f"pos_embed_type={table!r} is not one of the reference's working ones: {', '.join(TABLES)}"
    weights = dict.fromkeys(TERMS, 0.0)
    weights |= {"mse": 1.0, "scale": options("scale_penalty_weight", 0.0)}
    model = gaussian_vit(
        **geometry(options),
        **{name: encoder(name) for name in ("embed_dim", "depth", "num_heads")},
        **{f"decoder_{name}": decoder(name) for name in ("embed_dim", "depth", "num_heads")},
        num_gaussians=options("num_gaussians"),
        mask_ratio=options("mask_ratio"),
        pos_embed=TABLES[table],
        mlp_ratio=float(options("mlp_ratio", 4)),
        norm_eps=options("layernorm_eps", 1e-6),
        support="box",
        loss="reference",
        image_norm=options("use_image_norm", False),
        loss_weights=weights,
        max_scale=options("max_gaussian_scale", 0.5),
    )
    for part in (options, encoder, decoder):
        part.done()
    return model


@adapter("medgmae/gaussian_mae")
def gaussian_mae(case: Case) -> None:
    model = load(build_model(case), write_file(case, case.weights), unused=UNUSED)
    unused = [tensor.numel() for name, tensor in case.weights.items() if re.search(UNUSED, name)]
    ours = sum(parameter.numel() for parameter in model.parameters())
    case.same("parameters", ours + sum(unused), case.spec["parameters"])
    case.same("grid", list(model.encoder.grid_size), list(case.spec["grid"]))
    x, shuffle = case.input("x"), case.input("shuffle_indices").long()
    # The permutation is what sorting the noise gives: patch shuffle[i] has the i-th smallest noise.
    noise = shuffle.argsort(dim=1).double()
    masking = medgmae.random_masking(*shuffle.shape, model.mask_ratio, noise=noise)
    visible = masking.keep.shape[1]
    case.same("visible patches", masking.keep.tolist(), shuffle[:, :visible].tolist())
    case.same("visible tokens", visible, case.spec["visible_tokens"])
    check_tokens(case, model, x, masking)
    check_losses(case, model, x, masking)


def check_tokens(case: Case, model: GaussianMAE, x: Tensor, masking: medgmae.Masking) -> None:
    """What goes through the encoder and the decoder, and the Gaussians and volumes that come out."""
    latent = model.encoder.forward_features(x, keep=masking.keep)
    case.offer("encoder_latent", latent, "tokens")
    case.offer("encoder_all_visible", model.encoder.forward_features(x), "tokens")
    case.offer("projected", model.decoder.embed(latent), "tokens")
    with whole_sequence(model.decoder) as features:
        gaussians = model.gaussians(x, masking)
    case.offer("decoder_features", features[0], "tokens")
    for name, value in as_theirs(gaussians, model.decoder.density_scale).items():
        case.offer(name, value, "parameters")
    case.offer("rendered", model.reconstruct(x, masking, paste_visible=False))
    case.offer("rendered_full", GaussianRenderer(None)(gaussians, x.shape[2:]), "rendered")


def check_losses(case: Case, model: GaussianMAE, x: Tensor, masking: medgmae.Masking) -> None:
    """Every term in the reference's way, the paper's loss, and the gradients of the reference's."""
    output = model(x, masking)
    case.offer("rendered", output.volume)
    for term, name in TERMS.items():
        case.offer(name, output.terms[term], "loss")
    weighted = output.terms["mse"] + model.loss_weights["scale"] * output.terms["scale"]
    case.equal("the weighted sum of the terms", output.loss, weighted, case.tolerance("loss"))
    paper = GaussianMAE(model.encoder, model.decoder, model.renderer, mask_ratio=model.mask_ratio)(x, masking)
    case.offer("mse_masked_only", paper.loss, "loss")
    patch, grid = model.encoder.patch_size, model.encoder.grid_size
    # Where it masks nothing, the reference's pixel mask is full of ones.
    mask = masking.mask if masking.mask.any() else torch.ones_like(masking.mask)
    voxels = medgmae.unpatchify(mask.unsqueeze(-1).expand(-1, -1, torch.Size(patch).numel()), patch, grid, 1)
    case.offer("pixel_mask", voxels, tolerance=EXACT)
    case.equal("the masked patches alone", paper.volume, output.volume * voxels, case.tolerance("rendered"))
    check_gradients(case, model, output.terms["mse"])


def check_gradients(case: Case, model: GaussianMAE, loss: Tensor) -> None:
    """Gradients of the reference's loss by official name, tensors and norms; those of unused entries are null."""
    model.zero_grad()
    loss.backward()
    ours, parameters = renamed(case.weights, model), dict(model.named_parameters())
    for name in [name for name in case.outputs if name.startswith("grad/")]:
        found = parameters[ours[name.removeprefix("grad/")]].grad
        assert found is not None, f"no gradient for {name}"
        # The signs of a rotation head's rows are turned on loading, and back again they are turned the same way.
        case.offer(name, turn_rotation(ours[name.removeprefix("grad/")], found), "grads")
    for official, norm in case.spec["grad_norms_of_loss"].items():
        found = parameters[ours[official]].grad if official in ours else None
        if norm is None or found is None:
            case.same(f"gradient of {official}", found, norm)
            continue
        within = case.tolerance("grads", expected=torch.tensor(norm))
        case.close(f"gradient norm of {official}", found.norm().item(), norm, within)


@adapter("medgmae/ssim3d")
def ssim(case: Case) -> None:
    for spec in case.spec["cases"]:
        options = Options(spec)
        index = options("index")
        a, b = case.input(f"{index}/a").requires_grad_(), case.input(f"{index}/b")
        case.same(f"shape of {index}", list(a.shape), options("shape"))
        window, sigma, data_range = options("window_size"), options("sigma"), options("data_range")
        options.done()
        found = ssim3d(a, b, window, sigma, data_range)
        loss = 1 - found.mean()
        case.offer(f"{index}/ssim_per_sample", found, "values")
        case.offer(f"{index}/ssim", found.mean(), "values")
        case.offer(f"{index}/loss", loss, "values")
        case.offer(f"{index}/grad_loss_a", torch.autograd.grad(loss, a)[0], "gradients")
        case.offer(f"{index}/mse_l1", torch.stack([F.mse_loss(a, b), F.l1_loss(a, b)]), "values")
        case.offer(f"{index}/kernel1d", window_of_ssim(window, sigma), "values")


def window_of_ssim(size: int, sigma: float) -> Tensor:
    """(size,): the weights of the window along an axis, read off what it makes of a single voxel."""
    voxel = torch.zeros(1, 1, size, size, size)
    voxel[..., size // 2, size // 2, size // 2] = 1
    return _blur(voxel, size, sigma).sum((-1, -2)).flatten()


@adapter("medgmae/training_schedule")
def training_schedule(case: Case) -> None:
    options = Options(case.spec)
    options.ignore(*PROSE, "param_groups_note", "optimizer")
    # The voxel baseline's trainer multiplies by 0.9 per epoch after the warm-up, which ends its training early: this
    # library has no such option, so the factor is put in here.
    for name, per_epoch in (("medgmae_lr", 1.0), ("mae3d_lr", 0.9)):
        if name in options:
            check_rates(case, name, Options(options(name)), per_epoch)
    if "scale_penalty_weight" in options:
        check_scale_penalty(case, Options(options("scale_penalty_weight")))
    if "param_groups" in options:
        check_param_groups(case, options("param_groups"))
    options.done()


def check_rates(case: Case, name: str, options: Options, per_epoch: float) -> None:
    """The learning rate at each epoch, fractions included."""
    options.ignore("formula")
    base, warmup, times = options("base_lr"), options("warmup_epochs"), options("epoch")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    schedule = cosine_schedule(optimizer, options("epochs"), warmup)
    rates = []
    for epoch in times:
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"] * per_epoch ** max(epoch - warmup, 0))
    expected = torch.tensor(options("lr"), dtype=torch.float64)
    options.done()
    case.equal(name, torch.tensor(rates, dtype=torch.float64), expected, case.tolerance(name))


def check_scale_penalty(case: Case, options: Options) -> None:
    """What a model multiplies the penalty by, in float64."""
    options.ignore("formula")
    model = medgmae.create_model("gmae_vit_nano_patch8_32", loss_weights={"scale": options("initial")}, max_scale=0.0)
    x = torch.rand(1, 1, *model.encoder.img_size).double()
    outputs = [model.double()(x, step=step) for step in options("step")]
    found = torch.stack([output.loss / output.terms["scale"] for output in outputs])
    expected = torch.tensor(options("weight"), dtype=torch.float64)
    options.done()
    case.equal("scale_penalty_weight", found, expected, case.tolerance("scale_penalty_weight"))


def check_param_groups(case: Case, groups: list[dict[str, Any]]) -> None:
    """Which parameters decay, in a model of one encoder and one decoder block."""
    model = medgmae.create_model("gmae_vit_nano_patch8_32", depth=1, decoder_depth=1, spread=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in param_groups(model, weight_decay=1.0):
        key = (group["weight_decay"], group.get("lr_scale", 1.0))
        found[key] = sorted(names[id(parameter)] for parameter in group["params"])
    expected = {}
    for group in groups:
        options = Options(group)
        ours = [gaussian_name(name) for name in options("params") if not re.search(UNUSED, name)]
        expected[options("weight_decay_scale"), options("lr_scale")] = sorted(ours)
        options.done()
    case.same("param_groups", found, expected)
