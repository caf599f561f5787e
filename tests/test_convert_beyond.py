"""Files of 3DINO, SegVol, M3D-CLIP, BrainIAC and Hi-End-MAE: what is taken, what is left, what is refused.

That the numbers are the reference's is the business of test_parity.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import medgmae
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.models.mae_hiend import hiend_mae

FIXTURES = Path(__file__).parent / "fixtures/beyond"


def weights(name: str) -> dict[str, Tensor]:
    """The official tensors of a parity case."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    return {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}


TEACHER = weights("dino3d_load_teacher")
M3D = weights("monai_m3dclip_encoder")
SEGVOL = weights("monai_segvol_encoder")
BRAINIAC = weights("monai_conv_crossattn_encoder")
HIEND = weights("hiendmae_mae")


def dino(**options: Any) -> medgmae.ViT:
    """A model for the teacher."""
    size: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "pos_embed": "learned"}
    return medgmae.ViT(24, 8, **{**size, "interpolate_offset": 0.1, **options})


def monai(**options: Any) -> medgmae.ViT:
    """A model for SegVol's and M3D-CLIP's encoders."""
    size: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 4, "norm_eps": 1e-5, "pos_embed": "learned"}
    return medgmae.ViT((8, 32, 32), (4, 8, 8), **{**size, **options})


NO_TOKEN: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def test_a_card_names_the_teacher_of_3dino(hub: HubServer, tmp_path: Path) -> None:
    torch.save({"teacher": TEACHER, "epoch": 1}, tmp_path / "3dino.pth")
    commit = hub.add("lab/dino", {"3dino.pth": (tmp_path / "3dino.pth").read_bytes()})
    place = {"repo": "lab/dino", "revision": commit, "file": "3dino.pth::teacher"}
    card = WeightCard("vit_large_patch16_112.3dino", hub=place)
    report = medgmae.load_pretrained(dino(), card, cache_dir=tmp_path / "cache", progress=False)
    assert medgmae.weight_card("vit_large_patch16_112.3dino").hub_file == ("3dino_vit_weights.pth", "teacher")
    assert not report.missing
    reasons = {why for name, why in report.unused.items() if name.startswith(("dino_head.", "ibot_head."))}
    assert reasons == {"head of the pre-training: projection_dim= (Primus) or prototypes= (ViT) builds it"}
    assert report.unused["backbone.blocks.1.1.ls2.gamma"] == "folded into blocks.1.mlp.fc2"


def heads() -> dict[str, Tensor]:
    """Both heads as DINOv2's code saves them: 10 wide, 6 at the bottleneck, 7 prototypes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"mlp.0": (10, 24), "mlp.2": (10, 10), "mlp.4": (6, 10)}
    state = {f"{part}.weight": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    state |= {f"{part}.bias": torch.randn(shape[0], generator=generator) for part, shape in shapes.items()}
    state |= {"last_layer.weight_v": torch.randn(7, 6, generator=generator)}
    state |= {"last_layer.weight_g": 1 + torch.rand(7, 1, generator=generator)}
    return {
        f"{head}.{name}": x + (head == "ibot_head") for head in ("dino_head", "ibot_head") for name, x in state.items()
    }


def by_hand(head: str, x: Tensor) -> Tensor:
    """What torch's own layers make of it."""
    state = {name.removeprefix(f"{head}."): tensor for name, tensor in heads().items() if name.startswith(head)}
    mlp = nn.Sequential(nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU(), nn.Linear(10, 6))
    last = weight_norm(nn.Linear(6, 7, bias=False))
    mlp.load_state_dict({name.removeprefix("mlp."): t for name, t in state.items() if name.startswith("mlp.")})
    last.load_state_dict(
        {
            "parametrizations.weight.original0": state["last_layer.weight_g"],
            "parametrizations.weight.original1": state["last_layer.weight_v"],
        }
    )
    found: Tensor = last(nn.functional.normalize(mlp(x), dim=-1))
    return found


def test_the_heads_of_3dino_if_asked_for(tmp_path: Path) -> None:
    backbone = {name: tensor for name, tensor in TEACHER.items() if "_head." not in name}
    model = dino(prototypes=(10, 6, 7))
    report = medgmae.load_pretrained(model, {**backbone, **heads()})
    assert not any("_head." in name for name in report.unused)
    scan = torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    plain = medgmae.extract_features(model, scan)
    found = medgmae.extract_features(model, scan, head="projected")
    torch.testing.assert_close(found.pooled, by_hand("dino_head", plain.pooled), rtol=1e-4, atol=1e-5)
    expected = by_hand("ibot_head", plain.map.data.flatten(1).mT).mT.reshape(7, 3, 3, 3)
    torch.testing.assert_close(found.map.data, expected, rtol=1e-4, atol=1e-5)
    again = medgmae.create_model(medgmae.save_pretrained(model, tmp_path / "dino"))
    same = medgmae.extract_features(again, scan, head="projected")
    torch.testing.assert_close(same.pooled, found.pooled)
    with pytest.raises(WeightsError, match=r"projection\.dino\.prototypes: not in the file"):
        medgmae.load_pretrained(model, backbone)
    with pytest.raises(ValueError, match="three widths of heads that read the class token"):
        dino(prototypes=(10, 6, 7), global_pool="avg")


def test_3dino_needs_its_offset() -> None:
    with pytest.raises(WeightsError, match=r"interpolate_offset: 0.1 in .*create_model\(..., interpolate_offset=0.1\)"):
        medgmae.load_pretrained(dino(interpolate_offset=0.0), TEACHER)


def test_the_offset_is_kept(tmp_path: Path) -> None:
    model = dino()
    medgmae.load_pretrained(model, TEACHER)
    again = medgmae.create_model(medgmae.save_pretrained(model, tmp_path / "dino")).eval()
    x = torch.rand(1, 1, 32, 24, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model.eval()(x))
    other = dino(interpolate_offset=0.0).eval()
    other.load_state_dict(model.state_dict())
    assert (other(x) - model(x)).abs().max() > 1e-4
    before = model(x)
    model.set_input_size((32, 24, 40))
    assert torch.equal(model(x), before)


def test_two_blocks_of_one_number_are_refused() -> None:
    state = {**TEACHER, "backbone.blocks.1.0.norm1.weight": torch.ones(24)}
    with pytest.raises(WeightsError, match=r"are both 'blocks.0.norm1.weight'"):
        medgmae.load_pretrained(dino(), state)


@pytest.mark.parametrize("prefix", ["", "model.encoder.", "backbone.", "module.net.vit."])
def test_monais_vit_under_any_prefix(prefix: str) -> None:
    plain = {name.removeprefix("model.encoder."): tensor for name, tensor in SEGVOL.items()}
    state = {prefix + name: tensor for name, tensor in plain.items()}
    report = medgmae.load_pretrained(model := monai(**NO_TOKEN), state)
    assert not report.missing
    assert not report.unused
    stem = plain["patch_embedding.patch_embeddings.1.weight"].reshape(48, 4, 8, 8, 1).movedim(-1, 1)
    assert torch.equal(model.patch_embed.proj.weight, stem)
    assert not model.blocks[0].attn.qkv.bias.any()


def test_what_lies_beside_an_encoder_of_monai_is_reported() -> None:
    state = {**SEGVOL, "model.decoder.weight": torch.zeros(1024, 48), "model.mask_token": torch.zeros(1, 1, 48)}
    report = medgmae.load_pretrained(monai(**NO_TOKEN), state)
    assert report.unused == dict.fromkeys(("model.decoder.weight", "model.mask_token"), "beside 'encoder.'")


def test_cross_attention_that_nothing_runs_is_reported() -> None:
    model = medgmae.ViT(32, 8, 1, 36, 3, 3, norm_eps=1e-5, pos_embed="learned", **NO_TOKEN)
    report = medgmae.load_pretrained(model, BRAINIAC)
    assert not report.missing
    assert {why for name, why in report.unused.items() if "cross_attn" in name} == {"not used by the reference"}


def test_the_projection_of_m3d_clip_is_a_head_if_asked_for() -> None:
    plain = monai()
    report = medgmae.load_pretrained(plain, M3D)
    assert report.unused["mm_vision_proj.weight"] == "head"
    model = monai(num_classes=48)
    assert "mm_vision_proj.weight" not in medgmae.load_pretrained(model, M3D).unused
    assert torch.equal(model.head.weight, M3D["mm_vision_proj.weight"])


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (SEGVOL, {**NO_TOKEN, "norm_eps": 1e-6}, r"norm_eps: 1e-05 in the file's model, 1e-06 in this one; build it"),
        (SEGVOL, {}, "cls_token: not in the file"),
        (M3D, NO_TOKEN, "vision_encoder.cls_token: in the file, but the model has no such part"),
        ({**SEGVOL, **M3D}, {}, "several encoders, under 'encoder.', 'vision_encoder.'; save the one to load alone"),
        ({**SEGVOL, "model.encoder.blocks.1.attn.qkv.bias": torch.zeros(144)}, NO_TOKEN, "blocks.0.attn.qkv.bias: not"),
        ({k: v for k, v in SEGVOL.items() if "blocks.2.norm2" not in k}, NO_TOKEN, "blocks.2.norm2.weight: not in the"),
    ],
)
def test_files_of_monai_that_do_not_fit(state: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        medgmae.load_pretrained(monai(**options), state)


def test_plain_vit_without_biases_of_queries_keys_and_values() -> None:
    model = medgmae.create_model("vit_nano_patch8_32").eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.bias)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("qkv.bias")}
    other = medgmae.create_model("vit_nano_patch8_32").eval()
    assert not medgmae.load_pretrained(other, state).missing
    x = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), other(x))


def hiend(**options: Any) -> medgmae.MaskedAutoencoder:
    """A model for the case's file."""
    decoder = {"decoder_embed_dim": 18, "decoder_num_heads": 3, **options}
    return hiend_mae(24, 6, embed_dim=24, depth=12, num_heads=3, mlp_ratio=2.0, **decoder)


def test_hiend_decoder_is_known_by_its_tensors() -> None:
    report = medgmae.load_pretrained(hiend().encoder, HIEND)
    assert set(report.unused.values()) == {"decoder"}
    with pytest.raises(
        WeightsError, match=r"decoder: the file has another type of decoder than the model's ViTDecoder"
    ):
        medgmae.load_pretrained(
            medgmae.create_model(
                "mae_vit_nano_patch8_32", img_size=24, patch_size=6, embed_dim=24, depth=12, mlp_ratio=2.0
            ),
            HIEND,
        )
    with pytest.raises(WeightsError, match=r"decoder.taps: \(9, 6, 3\) in the file's model, \(8, 4\) in this one"):
        medgmae.load_pretrained(hiend(decoder_cross_depth=2), HIEND)


def test_hiend_decoder_says_what_it_reads() -> None:
    model = hiend()
    with pytest.raises(ValueError, match=r"reads the encoder's blocks \(9, 6, 3\), got 0 levels; call the whole model"):
        model.decoder(torch.zeros(1, 65, 24))


def test_info_shows_the_decoder_of_hiend(tmp_path: Path) -> None:
    torch.save({"state_dict": HIEND}, tmp_path / "hiend.pth")
    info = medgmae.inspect_checkpoint(tmp_path / "hiend.pth")
    assert info["source"] == "Hi-End-MAE"
    assert {name: info["sizes"][name] for name in ("grid", "decoder_depth", "decoder_cross_depth")} == {
        "grid": [4, 4, 4],
        "decoder_depth": 2,
        "decoder_cross_depth": 3,
    }
