"""Lists of names and shapes of the published architectures against the registered models, on the meta device."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import torch
from torch import nn

import medgmae
from parity.case import Case, triple


class Numbers(NamedTuple):
    """What tells architectures apart; a head count is 0 where the case does not say it.

    gaussians: number of queries of a Gaussian decoder of the standard kind; 0 for other decoders.
    """

    encoder: tuple[int, int, int]  # width, blocks, heads
    decoder: tuple[int, int, int]  # the same; zeros for none
    patch_size: tuple[int, ...]
    sigmoid: bool
    gaussians: int = 0


class Manifest:
    """A manifest's JSON, in whichever words its system has."""

    def __init__(self, spec: dict[str, Any], dims: int, overrides: dict[str, Any]) -> None:
        self.spec, self.overrides = spec, overrides
        listed = spec["state_dict"]
        self.shapes = {name: tuple(v["shape"] if isinstance(v, dict) else v) for name, v in listed.items()}
        self.patch = triple(self.first("patch_size"), dims)
        self.in_chans = int(spec["in_chans"])
        size = triple(self.first("input_size", "img_size"), dims)
        covered = [s // p for s, p in zip(size, self.patch, strict=True)]
        self.grid = tuple(self.first("grid_size", "grid", default=covered))
        self.img_size = tuple(g * p for g, p in zip(self.grid, self.patch, strict=True))

    def first(self, *names: str, default: Any = None) -> Any:
        """The first of these entries that is there, at the top or in ``config``, ``constructor``."""
        for place in (self.spec, self.spec.get("config") or {}, self.spec.get("constructor") or {}):
            if isinstance(place, dict):
                for name in names:
                    if name in place:
                        return place[name]
        return default

    def shape(self, *names: str) -> tuple[int, ...] | None:
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def numbers(self) -> Numbers:
        """Sizes read off the shapes, head counts off the settings."""
        bias = self.shape("patch_embed.proj.bias", "encoder.patch_embed.proj.bias")
        bridge = self.shape("decoder_embed.weight", "encoder_to_decoder.weight")
        assert bias is not None, "the manifest lists no patch embedding"
        encoder, decoder = self.spec.get("encoder") or {}, self.spec.get("decoder") or {}
        heads = encoder.get("num_heads") or self.first("num_heads", default=0)
        decoder_heads = decoder.get("num_heads") or self.first("decoder_num_heads", default=0)
        sizes = (bridge[0], self._blocks(r"decoder(?:_|\.)blocks"), decoder_heads) if bridge else (0, 0, 0)
        sigmoid = "decoder_pred.0.weight" in self.shapes
        queries = self.shape("gaussian_query_tokens")
        widths = (bias[0], self._blocks(r"(?:encoder\.)?blocks"), heads)
        return Numbers(widths, sizes, self.patch, sigmoid, queries[1] if queries else 0)

    def _blocks(self, prefix: str) -> int:
        found = [re.match(prefix + r"\.(\d+)\.", name) for name in self.shapes]
        return 1 + max(int(match[1]) for match in found if match)


@functools.cache
def registered() -> dict[str, tuple[Numbers, tuple[int, ...], int]]:
    """Every registered name: its numbers, its input size and its channels.

    Gaussian decoders of other kinds than the standard one are left out: no manifest has them.
    """
    models = {name: on_meta(name) for name in medgmae.list_models(["vit*", "mae*_vit*", "gmae_vit*"])}
    return {name: _describe(model) for name, model in models.items() if _kind(model) in ("", "standard")}


def _kind(model: Any) -> str:
    return str(getattr(getattr(model, "decoder", None), "kind", ""))


def on_meta(name: str, **overrides: Any) -> Any:
    """A registered model without storage."""
    with torch.device("meta"):
        return medgmae.create_model(name, pretrained=False, **overrides)


def _describe(model: Any) -> tuple[Numbers, tuple[int, ...], int]:
    encoder = getattr(model, "encoder", model)
    decoder, sigmoid, gaussians = (0, 0, 0), False, 0
    if encoder is not model:
        blocks = model.decoder.blocks
        decoder = (model.decoder.embed.out_features, len(blocks), blocks[0].attn.num_heads)
        sigmoid, gaussians = getattr(model.decoder, "sigmoid", False), getattr(model.decoder, "num_gaussians", 0)
    sizes = (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads)
    return Numbers(sizes, decoder, encoder.patch_size, sigmoid, gaussians), encoder.img_size, encoder.in_chans


def _agree(ours: tuple[int, int, int], wanted: tuple[int, int, int]) -> bool:
    return ours[:2] == wanted[:2] and wanted[2] in (0, ours[2])


def build(manifest: Manifest) -> Any:
    """The registered model of a manifest's architecture, if need be with another input size or channel count.

    Of an architecture that is not published the patch size and the decoder may differ from the registered ones too.
    """
    wanted = manifest.numbers()
    options = {"img_size": manifest.img_size, "in_chans": manifest.in_chans, **manifest.overrides}

    def distance(name: str) -> tuple[bool, ...]:
        numbers, size, channels = registered()[name]
        apart = (not _agree(numbers.decoder, wanted.decoder), numbers.patch_size != wanted.patch_size)
        return (*apart, numbers.sigmoid != wanted.sigmoid, size != manifest.img_size, channels != manifest.in_chans)

    def fits(name: str) -> bool:
        numbers = registered()[name][0]
        alike = any(numbers.decoder) == any(wanted.decoder) and bool(numbers.gaussians) == bool(wanted.gaussians)
        return alike and _agree(numbers.encoder, wanted.encoder)

    nearest = min(filter(fits, registered()), key=distance, default=None)
    assert nearest, f"no registered model has {wanted}"
    if any(distance(nearest)[:3]):
        assert manifest.first("published") is not True, f"no registered model has {wanted}; the nearest is {nearest}"
        options["patch_size"] = wanted.patch_size
        if any(wanted.decoder):
            names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
            options |= {name: number for name, number in zip(names, wanted.decoder, strict=True) if number}
        if any(wanted.decoder) and not wanted.gaussians:
            options["sigmoid"] = wanted.sigmoid
    if wanted.gaussians:
        options["num_gaussians"] = wanted.gaussians  # an option of the architecture, in the reference as in ours
    return on_meta(nearest, **options)


def check_manifest(case: Case, manifest: Manifest, unused: tuple[str, ...] = ()) -> None:
    """The official names and shapes fill the registered model, all of them, and the counts agree.

    unused: official parameters from which nothing is computed and that ours has not.
    """
    _check_own_counts(case, manifest)
    model = build(manifest)
    encoder = getattr(model, "encoder", model)
    case.same("grid", tuple(encoder.grid_size), manifest.grid)
    state = {name: torch.empty(shape, device="meta") for name, shape in manifest.shapes.items()}
    report = medgmae.load_pretrained(model, state, source_grid=manifest.grid)
    case.same("names that find no place", sorted(report.unused), sorted(unused))
    case.same("names that are missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    case.same("our names", sorted(report.loaded), sorted(model.state_dict()))
    _check_our_counts(case, manifest, model, encoder, unused)


def _check_own_counts(case: Case, manifest: Manifest) -> None:
    names = manifest.first("n_tensors", "n_keys", "keys")
    if names is not None:
        case.same("tensors", len(manifest.shapes), names)


def _check_our_counts(case: Case, manifest: Manifest, model: nn.Module, encoder: Any, unused: tuple[str, ...]) -> None:
    """Our tables have no class row (it is folded into the class token), our voxel decoders one for prefix tokens."""
    width, decoder_width = manifest.numbers().encoder[0], manifest.numbers().decoder[0]
    tokens = math.prod(manifest.grid)
    table = manifest.shape("pos_embed", "encoder_pos_embed")
    decoder_table = manifest.shape("decoder_pos_embed")
    assert table is not None
    class_row = (table[1] - tokens) * width
    voxels = decoder_table if "decoder_pos_embed" not in unused else None
    prefix_row = (1 - (voxels[1] - tokens)) * decoder_width if voxels else 0
    dropped = {name: math.prod(manifest.shapes[name]) for name in unused}
    more = prefix_row - class_row - sum(dropped.values())
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned = class_row if encoder.pos_embed.requires_grad else 0
    learned += sum(count for name, count in dropped.items() if "pos_embed" not in name)
    expected = manifest.first("params_total", "parameter_count", "parameters_total", "parameters")
    case.same("parameters", total, expected + more)
    expected = manifest.first(
        "params_trainable", "parameters_trainable", "trainable_parameters", "parameter_count_without_pos_embeds"
    )
    case.same("trainable parameters", trainable, expected - learned)
    size = manifest.first("float32_bytes")
    if size is not None:  # four for every number, the counters of batch norms included
        numbers = total + sum(buffer.numel() for buffer in model.buffers())
        case.same("bytes", 4 * (numbers - more), size)
    if encoder is not model:
        part = manifest.first("parameters_encoder", "encoder_parameters")
        if part is not None:
            own = sum(p.numel() for p in encoder.parameters()) - encoder.pos_embed.numel()
            case.same("parameters of the encoder without its table", own, part)
        part = manifest.first("decoder_parameters")
        if part is not None:
            parts = [
                p for name, p in model.decoder.named_parameters() if re.match(r"blocks\.|norm\.|(\w+_)?head\.", name)
            ]
            case.same("parameters of the decoder's blocks, norm and heads", sum(p.numel() for p in parts), part)
