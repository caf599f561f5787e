"""Files of OpenMind's pre-trainings and of COLIPRI into Primus: the order of the tokens, prefixes, heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from small_models import randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import factory
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.heads import from_axes, permute_heads
from medgmae.cli import main
from medgmae.models.mae_primus import masked_primus
from medgmae.models.primus import Primus

GRID = (3, 3, 2)
SIZES: dict[str, Any] = {"img_size": (12, 12, 8), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def to_nnssl(model: Any, order: str, prefix: str = "") -> dict[str, Tensor]:
    """The state of one of our models with nnssl's names, its tokens in an order: the inverse of what loading does."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("prefix_pos_embed"):
            continue
        moved = tensor
        if order == "swapped" and name.endswith("pos_embed"):
            grid = model.grid_size
            moved = tensor.reshape(1, *grid, -1).transpose(1, 2).reshape(tensor.shape)
        if order == "swapped" and (".q_proj." in name or ".k_proj." in name):
            moved = permute_heads(tensor, from_axes(12, (1, 0, 2)))
        name = name.removeprefix("encoder.")
        name = name.replace("decoder.head.convs.", "up_projection.decode.").replace("decoder.mask_token", "mask_token")
        name = name.replace("decoder.head.norms.", "up_projection.norms.")
        parts = name.split(".")
        if parts[0] == "up_projection":
            last = parts[2] == "1"
            inner = "1." if parts[1] == "norms" else "" if last else "0."
            name = f"up_projection.decode.{parts[2]}.{inner}{parts[3]}"
        elif not name.startswith(("decoder.", "mask_token")):
            name = f"eva.{name}".replace("eva.patch_embed.", "down_projection.")
        theirs[prefix + name if not name.startswith(("decoder.", "up_")) else name] = moved.clone()
    return theirs


def write(path: Path, state: dict[str, Tensor], trainer: str | None, encoder: str = "eva") -> Path:
    plan = {"architecture_plans": {"arch_class_name": "PrimusM"}, "key_to_encoder": encoder, "key_to_stem": "x"}
    beside: dict[str, Any] = {"optimizer_state": {}, "current_epoch": 3, "nnssl_adaptation_plan": plan}
    beside |= {} if trainer is None else {"trainer_name": trainer}
    torch.save({"network_weights": state, **beside}, path)
    return path


def nano(**more: Any) -> Any:
    return masked_primus(**SIZES, decoder_num_heads=2, decoder_depth=1, **more)


@pytest.mark.parametrize("trainer", ["BaseEvaMAETrainer_BS8", "VoCoEvaTrainer", "SimMIMEvaTrainer_BS8"])
@pytest.mark.parametrize("wrap", ["", "module."])
def test_the_trainer_tells_the_order(tmp_path: Path, trainer: str, wrap: str) -> None:
    order = "raster" if "SimMIM" in trainer else "swapped"
    model = randomize(nano())
    state = {wrap + name: tensor for name, tensor in to_nnssl(model, order).items()}
    file = write(tmp_path / "checkpoint_final.pth", state, trainer)
    other = randomize(nano(), seed=4)
    report = medgmae.load_pretrained(other, file)
    assert report.notes == [f"token order {order!r}: the file was written by {trainer}"]
    assert (report.missing, report.unused) == ([], {})
    for name, tensor in state_copy(model).items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=0, rtol=0)


def test_an_override_takes_the_other_order(tmp_path: Path) -> None:
    model = randomize(nano())
    file = write(tmp_path / "a.pth", to_nnssl(model, "raster"), "BaseEvaMAETrainer_BS8")  # not what the trainer had
    x = torch.randn(1, 1, 12, 12, 8)
    asked: Any = nano().eval()
    report = medgmae.load_pretrained(asked, file, token_order="raster")
    assert report.notes == ["token order 'raster': as asked for by token_order, or by the weight card"]
    torch.testing.assert_close(asked.forward_features(x), model.eval().forward_features(x), atol=1e-6, rtol=1e-5)
    told: Any = nano().eval()
    medgmae.load_pretrained(told, file)
    assert not torch.allclose(told.forward_features(x), asked.forward_features(x), atol=1e-2)
    with pytest.raises(ValueError, match="token_order must be None, 'raster' or 'swapped', got 'xyz'"):
        medgmae.load_pretrained(told, file, token_order="xyz")  # type: ignore[arg-type]
    built = medgmae.create_model("mae_primus_nano_patch8_32", file, token_order="raster", decoder_num_heads=2, **SIZES)
    assert built.load_report.notes == report.notes


def test_a_file_that_does_not_tell_its_order_is_refused(tmp_path: Path) -> None:
    state = {n: t for n, t in to_nnssl(nano(), "raster").items() if not n.startswith("decoder.")}
    encoder = Primus(**SIZES)
    for trainer, word in ((None, "an unknown trainer"), ("nnUNet_Primus_M_Trainer", "nnUNet_Primus_M_Trainer")):
        file = write(tmp_path / "a.pth", state, trainer)
        with pytest.raises(medgmae.WeightsError, match=f"it was written by {word}. Pass token_order='swapped'"):
            medgmae.load_pretrained(encoder, file)
    with pytest.raises(medgmae.WeightsError, match="Pass token_order"):
        medgmae.load_pretrained(encoder, state)
    report = medgmae.load_pretrained(nano(), to_nnssl(nano(), "swapped"))  # the decoder is of one class alone
    assert report.notes == ["token order 'swapped': the file has the decoder of nnssl's masked autoencoder"]


def test_a_card_tells_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = copy.copy(medgmae.weight_card("primus_m_patch8_160.openmind_mae"))
    assert card.token_order == "swapped"
    assert medgmae.weight_card("primus_m_patch8_160.openmind_simmim").token_order == "raster"
    state = {n: t for n, t in to_nnssl(nano(), "swapped").items() if not n.startswith("decoder.")}
    file = write(tmp_path / "a.pth", state, None)
    monkeypatch.setattr(factory, "weight_card", lambda *_: card)
    name = "primus_m_patch8_160.openmind_mae"
    model = medgmae.create_model(name, checkpoint_path=file, **SIZES)
    assert model.load_report.notes[0].startswith("token order 'swapped'")


def test_encoders_under_a_prefix(tmp_path: Path) -> None:
    model = randomize(nano())
    state = {n: t for n, t in to_nnssl(model, "swapped", "encoder.").items() if n.startswith("encoder.")}
    state["projector.layer1.0.weight"] = torch.ones(3, 3)
    encoder: Any = Primus(**SIZES)
    report = medgmae.load_pretrained(encoder, write(tmp_path / "a.pth", state, "VoCoEvaTrainer", "encoder.eva"))
    assert report.unused["projector.layer1.0.weight"] == "head of the pre-training"
    assert torch.equal(encoder.pos_embed, model.encoder.pos_embed)  # type: ignore[union-attr]
    with pytest.raises(medgmae.WeightsError, match=r"its adaptation plan says 'other\.eva'"):
        medgmae.load_pretrained(encoder, write(tmp_path / "a.pth", state, "VoCoEvaTrainer", "other.eva"))


def test_swapped_tokens_of_a_grid_whose_axes_differ_are_refused() -> None:
    sizes = {**SIZES, "img_size": (8, 12, 8)}
    model = masked_primus(**sizes, decoder_num_heads=2)
    state = to_nnssl(model, "raster")
    with pytest.raises(medgmae.WeightsError, match=r"first two axes are equal, got \(2, 3, 2\)"):
        medgmae.load_pretrained(model, state, source_grid=(2, 3, 2))
    assert not medgmae.load_pretrained(model, state, source_grid=(2, 3, 2), token_order="raster").missing


def test_swapped_tokens_go_to_another_grid() -> None:
    """The table is put in order on its own grid first, then resampled."""
    model: Any = randomize(nano())
    wide: Any = masked_primus(**{**SIZES, "img_size": (16, 8, 12)}, decoder_num_heads=2, decoder_depth=1)
    medgmae.load_pretrained(wide, to_nnssl(model, "swapped"), source_grid=GRID)
    expected = medgmae.resample_pos_embed(model.encoder.pos_embed, GRID, (4, 2, 3))
    torch.testing.assert_close(wide.encoder.pos_embed, expected)


def to_colipri(model: Any) -> dict[str, Tensor]:
    """The state of one of our encoders with a projection as COLIPRI's file has it."""
    moved = {
        "projection.proj.": "image_encoder.projector.",
        "projection.qkv.": "image_encoder.pooler.attn.in_proj_",
        "projection.out.": "image_encoder.pooler.attn.out_proj.",
        "patch_embed.": "image_encoder.backbone.down_projection.",
    }
    state: dict[str, Tensor] = {"text_encoder.backbone.x.weight": torch.ones(2, 2)}
    for name, tensor in model.state_dict().items():
        theirs = "softmax_temperature" if name == "projection.temperature" else f"image_encoder.backbone.eva.{name}"
        for ours, official in moved.items():
            theirs = official + name.removeprefix(ours) if name.startswith(ours) else theirs
        state[theirs] = tensor[..., None, None, None] if name == "projection.proj.weight" else tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def test_colipri_with_and_without_its_projection(tmp_path: Path) -> None:
    sizes = {**SIZES, "pos_embed": "none"}
    model: Any = randomize(Primus(**sizes, projection_dim=12, projection_heads=2))
    state = to_colipri(model) | {"softmax_temperature": torch.ones((), dtype=torch.int64)}
    save_file(state, tmp_path / "model.safetensors")
    whole: Any = Primus(**sizes, projection_dim=12, projection_heads=2)
    report = medgmae.load_pretrained(whole, tmp_path / "model.safetensors")
    assert report.unused == {"text_encoder.backbone.x.weight": "text encoder"}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) or name == "projection.temperature", name
    assert whole.projection.temperature == 1.0
    bare: Any = Primus(**sizes)
    reasons = medgmae.load_pretrained(bare, tmp_path / "model.safetensors").unused
    assert (
        reasons["image_encoder.projector.weight"]
        == "head of the pre-training: projection_dim= (Primus) or prototypes= (ViT) builds it"
    )
    assert torch.equal(bare.norm.weight, model.norm.weight)
    with pytest.raises(medgmae.WeightsError, match=r"projection\.proj\.weight: not in the file"):
        medgmae.load_pretrained(whole, bare.state_dict())
    with pytest.raises(medgmae.WeightsError, match="COLIPRI's tokens are in raster order"):
        medgmae.load_pretrained(bare, state, token_order="swapped")
    with pytest.raises(medgmae.WeightsError, match="pos_embed: not in the file"):
        medgmae.load_pretrained(Primus(**SIZES), state)


def test_what_a_file_is_without_a_model(tmp_path: Path) -> None:
    torch.save(to_colipri(medgmae.create_model("primus_nano_patch8_32", pos_embed="none")), tmp_path / "a.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "a.pth")
    expected = ("COLIPRI", "primus_nano_patch8_32", {"img_size": 192, "pos_embed": "none"}, None)
    assert tuple(facts[name] for name in ("source", "architecture", "model_args", "problem")) == expected
    state = to_nnssl(medgmae.create_model("simmim_primus_nano_patch8_32"), "raster")
    facts = medgmae.inspect_checkpoint(write(tmp_path / "b.pth", state, "SimMIMEvaTrainer"))
    assert (facts["architecture"], facts["model_args"]) == ("simmim_primus_nano_patch8_32", {})
    assert facts["encoder_architecture"] == "primus_nano_patch8_32"


def test_a_published_size_has_its_heads() -> None:
    """They decide how rows are exchanged; a model with others would compute something else."""
    with torch.device("meta"):
        state = to_nnssl(medgmae.create_model("mae_primus_m_patch8_160", depth=1), "raster")
        model: Any = medgmae.create_model("mae_primus_m_patch8_160", depth=1, num_heads=16)
    with pytest.raises(medgmae.WeightsError, match="num_heads: 12 in the file's model, 16 in this one"):
        medgmae.load_pretrained(model, state)
    swapped = convert(state).encoder["blocks.0.attn.q_proj.weight"]
    assert swapped.shape == (864, 864)


def test_exchanged_rows_of_the_published_width() -> None:
    """24 channels per axis in each of 12 heads."""
    rows = torch.arange(864.0)
    expected = rows.reshape(12, 3, 24)[:, [1, 0, 2]].flatten()
    assert torch.equal(permute_heads(rows, from_axes(72, (1, 0, 2))), expected)


def test_info_and_convert_take_the_order(tmp_path: Path) -> None:
    model: Any = medgmae.create_model("simmim_primus_nano_patch8_32")
    file = write(tmp_path / "a.pth", to_nnssl(model, "raster"), None)
    with pytest.raises(medgmae.WeightsError, match="Pass token_order"):
        medgmae.inspect_checkpoint(file)
    assert medgmae.inspect_checkpoint(file, token_order="raster")["architecture"] == "simmim_primus_nano_patch8_32"
    told = CliRunner().invoke(main, ["info", str(file), "--token-order", "raster", "--json"])
    assert '"simmim_primus_nano_patch8_32"' in told.output
    done = CliRunner().invoke(main, ["convert", str(file), str(tmp_path / "out"), "--token-order", "raster"])
    assert done.exit_code == 0, done.output
    again = medgmae.create_model(tmp_path / "out")
    assert torch.equal(again.encoder.norm.weight, model.encoder.norm.weight)
    assert "token_order" not in again.config["model_args"]
