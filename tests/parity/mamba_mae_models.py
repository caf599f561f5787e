"""Adapters for the 3D Mamba MAE: mixer, block, encoder, masked autoencoder, and the one's file in the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints.dialects.entries import strip_prefixes
from medgmae.layers import mamba
from medgmae.models.mae_vim import masked_vim
from medgmae.models.vim import Vim
from parity import adapter
from parity.case import Case, Options
from parity.models import load, renamed
from parity.official import write_file

# What files hold and models compute by themselves, behind whatever prefix wrappers leave.
COMPUTED = r"(?:^|\.)((decoder_)?rope\.freqs(_cos|_sin)?)$"
# The same, and the class token of files whose models have none.
WITHOUT_TOKEN = COMPUTED[:-2] + r"|cls_token)$"

POOLS = {"mean": "avg", "none": "last", "max": "max_logit", "all": "none"}


def divides(settings: Options, default: bool = False) -> bool:
    """Whether the two directions are averaged; the reference spells it two ways."""
    return bool(settings("if_devide_out", settings("if_divide_out", default)))


def common(settings: Options, divide_output: bool) -> dict[str, Any]:
    """The options that our encoder and our autoencoder share; ``divide_output`` where the case does not say it."""
    settings.require(rms_norm=True, residual_in_fp32=True, if_3d=True, bimamba_type="v2", bias=False)
    settings.ignore("fused_add_norm")  # another kernel for the same sums
    patch = settings("patch_size")
    settings.require(stride=patch)
    ssm = Options(settings("ssm_cfg", None) or {})
    ssm.require(d_conv=4)
    rotary, of_stream = settings("if_rope", False), settings("if_rope_residual", False)
    assert rotary or not of_stream, "if_rope_residual without if_rope is not supported"
    found = {
        "img_size": settings("img_size"),
        "patch_size": patch,
        "embed_dim": settings("embed_dim"),
        "depth": settings("depth"),
        "d_state": ssm("d_state", 16),
        "expand": ssm("expand", 2),
        "norm_eps": float(settings("norm_epsilon", 1e-5)),
        "rope": rotary,
        "rope_residual": of_stream,
        "divide_output": divides(settings, divide_output),
    }
    ssm.done()
    return found


def classifier(settings: Options) -> Any:
    """The reference's classifier as our encoder. A class token, where there is one, is what it pools."""
    options = common(settings, divide_output=False)
    double, middle = settings("use_double_cls_token", False), settings("use_middle_cls_token", False)
    place = "double" if double else "middle" if middle else "front"
    has_token, pool = settings("if_cls_token", False), settings("final_pool_type", "none")
    settings.require(if_abs_pos_embed=True)
    options["rope"] = "axial_published" if options["rope"] else None
    model = Vim(
        in_chans=settings("channels"),
        num_classes=settings("num_classes"),
        drop_path_rate=settings("drop_path_rate", 0.0),
        pos_embed="learned",
        class_token=place if has_token else None,  # type: ignore[arg-type]
        global_pool="token" if has_token else POOLS[pool],  # type: ignore[arg-type]
        **options,
    )
    settings.done()
    return model


def autoencoder(settings: Options) -> Any:
    """The reference's masked autoencoder; without a class token its decoder is off by one."""
    options = common(settings, divide_output=True)
    has_token = settings("if_cls_token", False)
    options["rope"] = "sequence" if options["rope"] else None
    model = masked_vim(
        in_chans=settings("in_chans"),
        decoder_embed_dim=settings("decoder_embed_dim"),
        decoder_depth=settings("decoder_depth"),
        mask_ratio=settings("mask_ratio", 0.75),
        norm_target="unbiased" if settings("norm_pix_loss") else None,
        drop_path_rate=settings("drop_path_rate", 0.0),
        class_token="front" if has_token else None,
        scan_order="given",
        off_by_one=not has_token,
        **options,
    )
    settings.done()
    return model


def filled(case: Case, model: Any) -> Any:
    """The model with the case's weights, read from a file as the reference writes it."""
    encoder = getattr(model, "encoder", model)
    return load(model, write_file(case, case.weights), unused=COMPUTED if encoder.class_token else WITHOUT_TOKEN)


def offer_gradients(case: Case, model: nn.Module, names: dict[str, str]) -> None:
    """``grad_NAME`` of every parameter that the case has; ``names``: official name to ours."""
    parameters = dict(model.named_parameters())
    for name in case.outputs:
        official = name.removeprefix("grad_")
        if name.startswith("grad_") and official in names:
            found = parameters[names[official]].grad
            assert found is not None, f"no gradient for {official}"
            case.offer(name, found, "grad")


@contextmanager
def recorded() -> Iterator[dict[str, Tensor]]:
    """What the operators of a mixer get and give, by the names of a case: in time order of their own direction."""
    found: dict[str, Tensor] = {}
    operators = {"causal_conv1d": mamba.causal_conv1d, "selective_scan": mamba.selective_scan}

    def note(reverse: bool, **tensors: Tensor) -> None:
        prefix = "inter_bwd" if reverse else "inter_fwd"
        found.update({f"{prefix}_{name}": t.flip(-1) if reverse else t for name, t in tensors.items()})

    def convolve(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = operators["causal_conv1d"](*args, **kwargs)
        note(bool(kwargs.get("reverse", args[4] if len(args) > 4 else False)), conv_out=out)
        return out

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = operators["selective_scan"](u, delta, A, B, C, **kwargs)
        note(kwargs["reverse"], delta=delta, B=B, C=C, scan_out_gated=out)
        return out

    with mock.patch.multiple(mamba, causal_conv1d=convolve, selective_scan=scan):
        yield found


@adapter("mamba_mae/bimamba_mixer")
def mixer(case: Case) -> None:
    settings = Options(case.spec["config"])
    settings.require(bimamba_type="v2", bias=False, conv_bias=True)
    model = mamba.BidirectionalMamba(
        settings("d_model"),
        settings("d_state", 16),
        settings("d_conv", 4),
        settings("expand", 2),
        settings("dt_rank", None),
        divides(settings),
    )
    case.same("d_inner", model.out_proj.in_features, settings("d_inner", model.out_proj.in_features))
    settings.done()
    model.load_state_dict(case.weights)
    x = case.input("x").requires_grad_()
    with recorded() as found:
        out = model(x)
    case.offer("out", out)
    for name, tensor in found.items():
        case.offer(name, tensor, "inter")
    out.backward(case.input("dout"))
    assert x.grad is not None
    case.offer("grad_x", x.grad, "grad")
    offer_gradients(case, model, {name: name for name in case.weights})


@adapter("mamba_mae/bimamba_block")
def block(case: Case) -> None:
    settings = Options(case.spec["config"])
    settings.require(bimamba_type="v2", rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
    model = mamba.MambaBlock(
        settings("d_model"),
        settings("d_state", 16),
        settings("d_conv", 4),
        settings("expand", 2),
        divide_output=divides(settings),
        norm_eps=settings("norm_epsilon", 1e-5),
    )
    given = settings("residual_given")
    settings.done()
    case.same("residual given", "residual" in case.inputs, given)
    model.load_state_dict(case.weights)
    inputs = {name: case.input(name).requires_grad_() for name in ("hidden_states", "residual")[: 1 + int(given)]}
    hidden, residual = model(*inputs.values())
    case.offer("hidden_states", hidden)
    case.offer("residual", residual)
    torch.autograd.backward([hidden, residual], [case.input("d_hidden"), case.input("d_residual")])
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        case.offer(f"grad_{name}", tensor.grad, "grad")
    offer_gradients(case, model, {name: name for name in case.weights})


@adapter("mamba_mae/vim3d_encoder")
def encoder(case: Case) -> None:
    model = filled(case, classifier(Options(case.spec["config"])))
    x = case.input("x").requires_grad_()
    case.offer("patch_tokens", model.patch_embed(x))
    with _streams(model) as streams:
        tokens = model.forward_features(x)
    logits = model.forward_head(tokens)
    if model.global_pool == "token" and case.spec["config"].get("final_pool_type") == "max":
        logits = logits.amax(1)  # the reference's largest logit of all tokens, among the classes of one
    _offer_streams(case, model, x, streams)
    per_patch = model.global_pool in ("max_logit", "none")  # their features are what the classifier is applied to
    case.offer("features", tokens if per_patch else model.forward_head(tokens, pre_logits=True))
    case.offer("tokens", tokens)
    case.offer("logits", logits)
    case.equal("forward", model(x), model.forward_head(tokens))
    if "d_logits" in case.inputs:
        logits.backward(case.input("d_logits"))
        assert x.grad is not None
        case.offer("grad_x", x.grad, "grad")
        offer_gradients(case, model, _names(case, model))


def _names(case: Case, model: nn.Module) -> dict[str, str]:
    """Official name to the model's own."""
    names = renamed(case.weights, model)
    return names if hasattr(model, "decoder") else {n: ours.removeprefix("encoder.") for n, ours in names.items()}


@contextmanager
def _streams(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What every block gives: the mixer's output and the residual stream."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [part.register_forward_hook(lambda _m, _args, out: found.append(out)) for part in model.blocks]
    yield found
    for handle in handles:
        handle.remove()


def _offer_streams(case: Case, model: Any, x: Tensor, streams: list[tuple[Tensor, Tensor]]) -> None:
    """The sequence as it is scanned, before and behind every block.

    Where the stream is turned as well, our blocks get the sum of the two turned at once; the case has the two apart.
    """
    sequence, table = model._sequence(x, None)
    case.offer("tokens_with_pos", sequence)
    for i, (hidden, residual) in enumerate(streams):
        case.offer(f"block{i}_in_hidden", sequence if table is None else mamba.rotate(sequence, table))
        case.offer(f"block{i}_hidden", hidden)
        case.offer(f"block{i}_residual", residual)
        sequence = hidden


@adapter("mamba_mae/vim3d_mae")
def masked_autoencoder(case: Case) -> None:
    model = filled(case, autoencoder(Options(case.spec["config"])))
    x, noise = case.input("x"), case.input("noise")
    masking = medgmae.random_masking(len(x), noise.shape[1], model.mask_ratio, noise=noise)
    case.offer("mask", masking.mask)
    case.offer("ids_restore", masking.restore)
    case.offer("ids_keep", masking.keep)
    case.offer("patches", medgmae.patchify(x, model.encoder.patch_size), tolerance=(0.0, 0.0))
    case.offer("latent", model.encoder.forward_features(x, keep=masking.keep))
    output = model(x, masking)
    case.offer("pred", output.pred)
    case.offer("loss", output.loss)
    if any(name.startswith("grad_") for name in case.outputs):
        output.loss.backward()
        names = _names(case, model)
        offer_gradients(case, model, names)
        _check_untrained(case, model, names)


def _check_untrained(case: Case, model: nn.Module, names: dict[str, str]) -> None:
    """What the reference's loss does not reach either has no gradient here or is no parameter of ours."""
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for official in case.spec.get("params_without_gradient", []):
        case.same(f"{official} is reached by the loss", names.get(official) in reached, False)
    given = {names[name.removeprefix("grad_")] for name in case.outputs if name.startswith("grad_")}
    case.same("parameters that are reached by the loss", sorted(reached), sorted(given))


@adapter("mamba_mae/finetune_load")
def finetune_load(case: Case) -> None:
    """A pre-training file in the autoencoder that wrote it, and its encoder in a classifier."""
    config = case.spec["config"]
    file = write_file(case, case.weights)
    load(autoencoder(Options(config["pretrain"])), file, unused=WITHOUT_TOKEN)
    model = classifier(Options(config["classifier"])).eval()
    report = medgmae.load_pretrained(model, file)
    missing = [name for name in case.spec["missing_keys"] if not re.search(COMPUTED, name)]
    case.same("missing", sorted(report.missing), sorted(missing))
    case.same("without a place", sorted(map(strip_prefixes, report.unused)), sorted(case.spec["unexpected_keys"]))
    model.head.load_state_dict({"weight": case.input("head.weight"), "bias": case.input("head.bias")})
    x = case.input("x")
    case.offer("features", model.forward_head(model.forward_features(x), pre_logits=True))
    case.offer("logits", model(x))
    _check_again(case, model, x)


def _check_again(case: Case, model: Any, x: Tensor) -> None:
    """The same file by way of our own: the encoder of a saved autoencoder in a classifier."""
    pretrained = load(autoencoder(Options(case.spec["config"]["pretrain"])), write_file(case, case.weights), unused=".")
    again = classifier(Options(case.spec["config"]["classifier"])).eval()
    path: Path = case.tmp / "ours.pth"
    torch.save(pretrained.state_dict(), path)
    medgmae.load_pretrained(again, path)
    again.head.load_state_dict(model.head.state_dict())
    case.equal("logits by way of our own file", again(x), model(x))
