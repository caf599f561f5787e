"""Cards and the files they describe: a manifest fills the model of its card, every layout comes through the hub."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_bmmae
import test_convert_beyond as beyond
import test_voxelfm
import torch
from dialects import to_tangerine
from hub_server import HubServer
from safetensors.torch import save
from small_models import randomize
from test_convert_primus import to_colipri, to_nnssl
from torch import Tensor

import medgmae
from medgmae.checkpoints.cards import weights_folder
from medgmae.checkpoints.verification import manifest_of

MANIFESTS = sorted(path.stem for path in (weights_folder() / "manifests").glob("*.json"))
DOWNLOADED = [tag for tag in medgmae.list_weights() if medgmae.weight_card(tag).availability in ("hub", "url")]

PERIODS = 100 ** (torch.arange(12) / 12)  # of VoxelFM's rotary positions

State = dict[str, Tensor]


def nnssl(state: State, _: str) -> Any:
    return {"network_weights": state, "nnssl_adaptation_plan": {"key_to_encoder": "eva"}, "current_epoch": 1000}


def bare(state: State, _: str) -> Any:
    return state


def under_its_set(state: State, wanted: str) -> Any:
    return {wanted: state, "epoch": 1}


# How the authors' code wraps the tensors of each card's file; the rest are plain.
WRAPPED: dict[str, Callable[[State, str], Any]] = {
    "primus_m_patch8_160.openmind_mae": nnssl,
    "primus_m_patch8_160.openmind_simmim": nnssl,
    "vit_large_patch16_112.3dino": under_its_set,
    "vit_base_patch14_112.voxelfm": under_its_set,
    "vit_large_patch16_256.tangerine": lambda state, _: {"model": state, "epoch": 1},
    "mae_vit_large_patch16_256.tangerine": lambda state, _: {"model": state, "epoch": 1},
    "vit_base_patch4x16x16_32x256x256.segvol": lambda state, _: {"state_dict": state},
}


def serialized(tag: str, state: State) -> bytes:
    """A card's file as its authors write it."""
    name, wanted = medgmae.weight_card(tag).hub_file
    if name.endswith(".safetensors"):
        return save({key: value.contiguous() for key, value in state.items()})
    file = io.BytesIO()
    torch.save(WRAPPED.get(tag, bare)(state, wanted), file)
    return file.getvalue()


def test_every_manifest_has_a_card() -> None:
    assert set(MANIFESTS) <= set(medgmae.list_weights())


@pytest.mark.parametrize("tag", [tag for tag in MANIFESTS if tag in medgmae.list_weights()])
def test_a_manifest_fills_the_model_of_its_card(tag: str) -> None:
    card, shapes = medgmae.weight_card(tag), manifest_of(tag)
    assert shapes is not None
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state |= {name: PERIODS for name in shapes if name.endswith("rope_embed.periods")}  # whose values are looked at
    with torch.device("meta"):
        model = medgmae.create_model(tag, pretrained=False)
    report = medgmae.load_pretrained(model, state, token_order=card.token_order)
    # A norm over the pooled vector starts at identity where the pre-training had none.
    assert [name for name in report.missing if not name.startswith("fc_norm.")] == []
    assert (report.resized, report.adapted) == ({}, {})
    left = [name for name in shapes if name in report.unused]
    reasons = set(report.unused.values())
    assert len(left) == len(report.unused)  # what is left out is named as in the file
    assert not any("unknown" in reason for reason in reasons)
    if card.acceptance is not None and card.acceptance["check"] == "reconstruction":
        with torch.device("meta"):
            whole = medgmae.create_model(card.acceptance["model"])
        report = medgmae.load_pretrained(whole, state, token_order=card.token_order)
        assert (report.missing, report.unused) == ([], {})


class Layout(NamedTuple):
    """A small model, its state with the names of a card's file, and how to build it again."""

    state: State
    architecture: str
    options: dict[str, Any]


def nano(name: str, **options: Any) -> Any:
    return randomize(medgmae.create_model(name, **options))


TINY_DINO: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_MONAI: dict[str, Any] = {"img_size": (8, 32, 32), "patch_size": (4, 8, 8), "embed_dim": 48, "depth": 3}
TINY_MONAI |= {"num_heads": 4, "norm_eps": 1e-5, "pos_embed": "learned"}
TINY_SEQUENCES: dict[str, Any] = {"img_size": test_bmmae.SIDE, "patch_size": test_bmmae.PATCH, **test_bmmae.SIZES}
VIT, MAE = "vit_nano_patch8_32", "mae_vit_nano_patch8_32"


def layout_of(tag: str) -> Layout:
    """What the file of a card would be of a small model."""
    name = tag.partition(".")[2]
    if name.startswith("openmind_"):
        order = str(medgmae.weight_card(tag).token_order)
        kind = "mae" if name == "openmind_mae" else "simmim"
        return Layout(to_nnssl(nano(f"{kind}_primus_nano_patch8_32"), order), "primus_nano_patch8_32", {})
    if name == "colipri":
        options = {"pos_embed": "none"}
        return Layout(to_colipri(nano("primus_nano_patch8_32", **options)), "primus_nano_patch8_32", options)
    if name == "3dino":
        return Layout(beyond.TEACHER, VIT, {**TINY_DINO, "pos_embed": "learned", "interpolate_offset": 0.1})
    if name == "voxelfm":
        return Layout(test_voxelfm.teacher(), "vit_base_patch14_112", test_voxelfm.SIZES)
    if name in ("segvol", "m3dclip"):
        token = beyond.NO_TOKEN if name == "segvol" else {}
        return Layout(beyond.SEGVOL if token else beyond.M3D, VIT, {**TINY_MONAI, **token})
    if name == "tangerine":
        whole = tag.startswith("mae_")
        state = nano(MAE, sigmoid=True).state_dict()
        return Layout(to_tangerine(state), MAE if whole else VIT, {"sigmoid": True} if whole else {})
    assert name.startswith("bmmae"), f"{tag}: add a small file of its layout"
    decoder = {**test_bmmae.DECODER_SIZES} if tag.startswith("mae_") else {}
    prefix = "mae_" if decoder else ""
    return Layout(test_bmmae.official_state(), f"{prefix}seqvit_base_patch16_128", {**TINY_SEQUENCES, **decoder})


def as_yaml(expected: dict[str, Any]) -> bytes:
    """A configuration with these values by dotted name."""
    config: dict[str, Any] = {}
    for name, value in expected.items():
        place, (*parents, last) = config, name.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    for name, value in config.items():
        if "0" in value:
            config[name] = [value["0"]]
    return json.dumps(config).encode()  # which is YAML too


def served(hub: HubServer, tag: str, content: bytes) -> medgmae.WeightCard:
    """The card, with this content at the hub or behind its address."""
    card = medgmae.weight_card(tag).to_json() | {"sha256": None, "bytes": None, "features": None}
    if card["hub"]:
        file = medgmae.weight_card(tag).hub_file[0]
        beside = {card["config"]["file"]: as_yaml(card["config"]["expected"])} if card["config"] else {}
        hub.add(card["hub"]["repo"], {file: content, **beside})
        card["hub"] |= {"revision": "main"}
    else:
        hub.files["/official.pth"] = content
        card |= {"url": f"{hub.url}/official.pth", "md5": hashlib.md5(content).hexdigest()}
    return medgmae.WeightCard.from_json(card)


@pytest.mark.parametrize("tag", DOWNLOADED)
def test_a_small_file_of_every_layout_comes_through_the_hub(tag: str, hub: HubServer, tmp_path: Path) -> None:
    layout = layout_of(tag)
    card = served(hub, tag, serialized(tag, layout.state))
    model: Any = medgmae.create_model(layout.architecture, **layout.options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = medgmae.load_pretrained(model, card, cache_dir=tmp_path, progress=False)
    assert report.missing == []
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    blocks = {name.partition("blocks.")[2].split(".")[0] for name in changed if "blocks." in name}
    assert blocks == {str(i) for i in range(len(model.encoder.blocks))}  # all of them, and from the file
    assert any("patch_embed" in name or "stems" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("tag", [tag for tag in MANIFESTS if tag in DOWNLOADED])
def test_a_file_of_the_full_size_comes_through_the_hub(tag: str, hub: HubServer, tmp_path: Path) -> None:
    """Official names, shapes and container with random numbers: downloaded, verified, loaded and run once."""
    tensors: dict[str, list[int]] = json.loads((weights_folder() / f"manifests/{tag}.json").read_text())["tensors"]
    plain = not medgmae.weight_card(tag).hub_file[0].endswith(".safetensors")
    size = max(map(math.prod, tensors.values()))
    pool = (0.02 * torch.randn(size, generator=torch.Generator().manual_seed(0))).half()

    def part(shape: list[int]) -> Tensor:
        tensor = pool[: math.prod(shape)].view(shape)
        return tensor if plain else tensor.clone()  # safetensors know no shared memory

    state = {name: part(shape) for name, shape in tensors.items()}
    state |= {name: PERIODS for name in tensors if name.endswith("rope_embed.periods")}
    content = serialized(tag, state)
    card = served(hub, tag, content)
    found = medgmae.verify_weights(card, cache_dir=tmp_path, progress=False)
    assert found.passed, str(found)
    assert (found.manifest, found.missing, found.shapes, found.unlisted) == (True, [], {}, 0)
    model = medgmae.create_model(card.architecture, card, cache_dir=tmp_path, progress=False, **card.model_args)
    encoder = getattr(model, "encoder", model)
    assert sum(p.numel() for p in encoder.parameters()) > 50_000_000
    with torch.no_grad():
        out = encoder.eval()(torch.zeros(1, encoder.in_chans, *(4 * p for p in encoder.patch_size)))
    assert torch.isfinite(out).all()
