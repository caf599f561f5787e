"""UNETRs: equal to MONAI's blocks, any patch and grid, and what goes into them from which file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import assert_same_state, randomize, small, state_copy
from torch import Tensor, nn

import medgmae
from medgmae.layers.convolutions import stage_strides
from medgmae.models.unetr_decoder import UNETRDecoder

WIDTHS = {"embed_dim": 24, "num_heads": 2, "feature_size": 4, "num_classes": 3, "drop_path_rate": 0.0}


def unetr(name: str = "unetr_vit_nano_patch8_32", **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(medgmae.create_model(name, **{**WIDTHS, **options})).eval()


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", ["conv", "perceptron"])
@pytest.mark.parametrize("dims", [2, 3])
def test_monais_unetr_gives_the_same_logits(patch: str, dims: int) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    size = (32, 48, 16)[:dims]
    theirs = nets.UNETR(2, 3, size, 4, 24, 48, 2, patch, spatial_dims=dims, qkv_bias=dims == 2).eval()
    randomize(theirs)
    name = "unetr_vit_base_patch16_96" if dims == 3 else "unetr2d_vit_base_patch16_224"
    options = {"img_size": size, "in_chans": 2, "mlp_ratio": 2, "class_token": False}
    ours = unetr(name, norm_eps=1e-5, **options)
    report = medgmae.load_pretrained(ours, theirs.state_dict())
    assert not report.missing
    assert all("norm_cross_attn" in name for name in report.unused)
    x = noise(2, 2, *size)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(medgmae.WeightsError, match=r"norm_eps: 1e-05 in the file's model, 1e-06 in this one"):
        medgmae.load_pretrained(unetr(name, **options), theirs.state_dict())


class PooledReference(nn.Module):
    """SelfMedMAE's "UNETRx8_decoderv2" of MONAI's blocks, on maps of tokens."""

    def __init__(self, width: int, f: int, classes: int) -> None:
        super().__init__()
        blocks = pytest.importorskip("monai.networks.blocks")
        up = {"kernel_size": 3, "upsample_kernel_size": 2, "norm_name": "instance", "res_block": True}
        basic = {"kernel_size": 3, "stride": 1, "norm_name": "instance", "res_block": True}
        skip = {**up, "stride": 1, "conv_block": True}
        self.encoder1 = blocks.UnetrBasicBlock(3, 1, f, **basic)
        self.encoder2 = blocks.UnetrPrUpBlock(3, width, 2 * f, num_layer=1, **skip)
        self.encoder3 = blocks.UnetrPrUpBlock(3, width, 4 * f, num_layer=0, **skip)
        self.encoder4 = blocks.UnetrBasicBlock(3, width, 8 * f, **basic)
        self.decoder5 = blocks.UnetrUpBlock(3, width, 8 * f, **up)
        self.decoder4 = blocks.UnetrUpBlock(3, 8 * f, 4 * f, **up)
        self.decoder3 = blocks.UnetrUpBlock(3, 4 * f, 2 * f, **up)
        self.decoder2 = blocks.UnetrUpBlock(3, 2 * f, f, **up)
        self.out = blocks.UnetOutBlock(3, f, classes)

    def forward(self, image: Tensor, taps: list[Tensor], last: Tensor) -> Tensor:
        x = nn.functional.avg_pool3d(last, 3, 2, 1)
        x = self.decoder5(x, self.encoder4(taps[2]))
        x = self.decoder4(x, self.encoder3(taps[1]))
        x = self.decoder3(x, self.encoder2(taps[0]))
        return self.out(self.decoder2(x, self.encoder1(image)))


def test_the_pooled_decoder_is_made_of_the_same_blocks() -> None:
    reference = PooledReference(24, 4, 3)
    randomize(reference)
    model = unetr(pooled=True, depth=10, img_size=32, taps=(3, 6, 9))
    encoder = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    file = {**encoder, **{f"decoder.{name}": value for name, value in reference.state_dict().items()}}
    report = medgmae.load_pretrained(model, file)
    assert (report.missing, report.unused) == ([], {})
    x = noise(1, 1, 32, 32, 32)
    tokens, taps = model.encoder.forward_intermediates(x, (3, 6, 9))
    last = tokens[:, 1:].mT.reshape(1, 24, 4, 4, 4)
    torch.testing.assert_close(model(x), reference(x, taps, last), atol=1e-4, rtol=1e-4)
    assert model(noise(1, 1, 24, 40, 8)).shape == (1, 3, 24, 40, 8)  # odd grids, which the reference cannot run


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((16, 16, 16), [(2, 2, 2)] * 4),
        ((12, 12, 12), [(2, 2, 2), (2, 2, 2), (3, 3, 3)]),
        ((14, 14, 14), [(2, 2, 2), (7, 7, 7)]),
        ((4, 16, 16), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((1, 6), [(1, 2), (1, 3)]),
        ((7, 7, 7), [(7, 7, 7)]),
    ],
)
def test_any_patch_has_its_steps(patch: tuple[int, ...], strides: list[tuple[int, ...]]) -> None:
    assert stage_strides(patch) == strides
    grid = (2, 1, 3)[: len(patch)]
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    model = unetr(img_size=size, patch_size=patch, dims=len(patch), depth=4)
    assert len(model.taps) == len(strides) - 1
    assert model(noise(1, 1, *size)).shape == (1, 3, *size)
    finer = tuple(2 * s for s in size)
    assert model(noise(1, 1, *finer)).shape == (1, 3, *finer)


def test_a_patch_of_one_voxel_has_nothing_to_refine() -> None:
    with pytest.raises(ValueError, match="is one voxel"):
        UNETRDecoder(24, (1, 1, 1), 1, 2)


def test_the_published_taps_are_the_default() -> None:
    with torch.device("meta"):
        assert medgmae.create_model("unetr_vit_base_patch16_96").taps == (3, 6, 9)
        assert medgmae.create_model("unetr_vit_base_patch8_96").taps == (4, 8)
        assert medgmae.create_model("unetr_vit_base_patch8_96", taps=(-1, 0)).taps == (11, 0)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"taps must name 2 blocks.*got \(1,\)"):
        unetr(taps=(1,))
    with pytest.raises(ValueError, match="reach outside the 2 blocks"):
        unetr(taps=(0, 2))
    with pytest.raises(ValueError, match="feature_size must be at least 1, got 0"):
        unetr(feature_size=0)
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        unetr(num_classes=-1)
    with pytest.raises(ValueError, match="slice_axis must be None"):
        unetr(slice_axis=3)
    with pytest.raises(ValueError, match="normalises its tokens"):
        medgmae.UNETR(medgmae.create_model("vit_nano_patch8_32", global_pool="avg"), 2)
    model = unetr(slice_axis=0, img_size=(8, 16, 16))
    with pytest.raises(
        ValueError, match="16 voxels along axis 0, of which one slice is predicted; expected one patch, 8"
    ):
        model(noise(1, 1, 16, 16, 16))


def test_a_slice_network_reads_the_middle_slice() -> None:
    model = unetr(slice_axis=-1, img_size=(16, 24, 8))
    x = noise(1, 1, 16, 24, 8)
    assert model(x).shape == (1, 3, 16, 24)
    other = x.clone()
    other[..., 4] = 0
    tokens = model.forward_features(x)
    model.encoder.forward_intermediates = lambda *_: (tokens, [torch.zeros(1, 24, 2, 3, 1)] * 2)
    unread = x.clone()
    unread[..., 3] = 0
    assert torch.equal(model(unread), model(x))
    assert not torch.equal(model(other), model(x))


def test_encoders_of_every_kind_of_file_go_into_a_unetr(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    mae = randomize(medgmae.create_model("mae_vit_nano_patch8_32", **options))
    model = unetr(img_size=(16, 32, 24), num_classes=5)
    decoder = state_copy(model.decoder)
    medgmae.save_pretrained(mae, tmp_path)
    report = medgmae.load_pretrained(model, tmp_path)
    assert "new" in "".join(report.notes)
    assert {name.split(".")[0] for name in report.missing} == {"decoder"}
    assert list(report.resized) == ["encoder.pos_embed"]
    assert set(report.unused.values()) == {"the file has another type of decoder than the model's UNETRDecoder"}
    assert torch.equal(model.encoder.blocks[1].mlp.fc1.weight, mae.encoder.blocks[1].mlp.fc1.weight)
    assert_same_state(model.decoder, decoder)
    alone = medgmae.load_pretrained(unetr(), mae.encoder.state_dict())
    assert (alone.unused, alone.notes[-1:]) == ({}, report.notes)


def test_a_linear_patch_weight_becomes_a_convolution() -> None:
    """The UVA adaptation's masked autoencoders have one; their authors drop it."""
    mae = randomize(medgmae.create_model("mae_vit_nano_patch8_32", embed_dim=24, depth=2, num_heads=2))
    state = {f"encoder.{name}": value for name, value in mae.encoder.state_dict().items() if name != "pos_embed"}
    stem = state["encoder.patch_embed.proj.weight"]
    linear = {**state, "encoder.patch_embed.proj.weight": stem.movedim(1, -1).flatten(1)}
    for file in (
        {**linear, "encoder_pos_embed": mae.encoder.pos_embed},
        {**state, "encoder_pos_embed": mae.encoder.pos_embed},
    ):
        model = unetr()
        medgmae.load_pretrained(model, file)
        assert torch.equal(model.encoder.patch_embed.proj.weight, stem)
        assert torch.equal(model.encoder.pos_embed, mae.encoder.pos_embed)


@pytest.mark.parametrize(
    ("axis", "size", "patch"), [(0, (8, 32, 32), 8), (-1, (32, 32, 8), 8), (None, (32, 32, 1), (8, 8, 1))]
)
def test_a_plane_goes_into_a_slab(axis: int | None, size: tuple[int, ...], patch: Any) -> None:
    flat = randomize(medgmae.create_model("vit_nano_patch8_32", dims=2, embed_dim=24, num_heads=2)).eval()
    model = unetr(slice_axis=axis, img_size=size, patch_size=patch)
    report = medgmae.load_pretrained(model, flat.state_dict())
    assert "inflated" in report.adapted["encoder.patch_embed.proj.weight"]
    image = noise(1, 1, 32, 32)
    slab = image.unsqueeze(2).expand(-1, -1, 8, -1, -1) if axis == 0 else image.unsqueeze(-1).expand(1, 1, *size)
    torch.testing.assert_close(model.forward_features(slab), flat.forward_features(image), atol=1e-4, rtol=1e-4)


def test_a_unetr_file_is_read_whole_or_not_at_all() -> None:
    model = unetr()
    whole = state_copy(model)
    other = small("unetr_vit_nano_patch8_32", embed_dim=24, feature_size=4, num_classes=7)
    report = medgmae.load_pretrained(other, whole)
    assert list(report.unused) == ["decoder.out.weight", "decoder.out.bias"]
    assert "head of shape (3, 4, 1, 1, 1)" in report.unused["decoder.out.weight"]
    assert report.missing == ["decoder.out.weight", "decoder.out.bias"]
    features = unetr(num_classes=0)
    assert medgmae.load_pretrained(features, whole).missing == []
    assert features(noise(1, 1, 16, 16, 16)).shape == (1, 4, 16, 16, 16)
    partial = {name: value for name, value in whole.items() if name != "decoder.stages.0.up.conv.weight"}
    before = state_copy(model)
    with pytest.raises(medgmae.WeightsError, match=r"decoder\.stages\.0\.up\.conv\.weight: not in the file"):
        medgmae.load_pretrained(model, partial)
    assert_same_state(model, before)
    encoder = medgmae.create_model("vit_nano_patch8_32", embed_dim=24, num_heads=2)
    assert set(medgmae.load_pretrained(encoder, whole).unused.values()) == {"decoder"}
    with pytest.raises(medgmae.WeightsError, match="another type of decoder"):
        medgmae.load_pretrained(medgmae.create_model("mae_vit_nano_patch8_32", embed_dim=24, num_heads=2), whole)


def test_other_taps_than_the_files_are_refused() -> None:
    model = unetr(depth=10, taps=(1, 5))
    encoder = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    theirs = {
        name.replace("decoder.", "decoder.")
        .replace("skips.0.up.conv", "encoder2.transp_conv_init.conv")
        .replace("skips.1.up.conv", "encoder3.transp_conv_init.conv"): value
        for name, value in model.state_dict().items()
        if "skips" in name and "stages" not in name
    }
    theirs["decoder.encoder1.layer.conv1.conv.weight"] = model.decoder.stem.conv1.weight
    with pytest.raises(medgmae.WeightsError, match=r"decoder.taps: \(4, 8\) in the file's model, \(1, 5\)"):
        medgmae.load_pretrained(model, {**encoder, **theirs})


def test_a_tag_of_the_encoder_brings_its_preprocessing() -> None:
    model: Any = medgmae.create_model("unetr_vit_tiny_patch8_64", pretrained="vit_tiny_patch8_64.demo", num_classes=5)
    assert model.num_classes == 5
    assert model.pretrained_cfg["tag"] == "vit_tiny_patch8_64.demo"
    assert medgmae.create_transform(model)
    assert "decoder is new" in str(model.load_report)
    encoder: Any = medgmae.create_model("vit_tiny_patch8_64.demo")
    assert_same_state(model.encoder, state_copy(encoder))


def test_classes_change_and_are_saved_with_their_names(tmp_path: Path) -> None:
    model = unetr()
    model.reset_classifier(2)
    model.label_names = ["background", "aorta"]
    medgmae.save_pretrained(model, tmp_path)
    assert "pipeline_tag: image-segmentation" in (tmp_path / "README.md").read_text()
    again: Any = medgmae.create_model(tmp_path)
    assert again.label_names == ["background", "aorta"]
    assert_same_state(again, state_copy(model))
    built = medgmae.UNETR(model.encoder, 2, 4)
    medgmae.save_pretrained(built, tmp_path)
    assert_same_state(medgmae.create_model(tmp_path), state_copy(built))


def test_a_unetr_file_is_inspected(tmp_path: Path) -> None:
    model = unetr(taps=(0, 0), embed_dim=48, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "unetr.pth")
    found = medgmae.inspect_checkpoint(tmp_path / "unetr.pth")
    assert found["architecture"] == "unetr_vit_nano_patch8_32"
    assert found["encoder_architecture"] == "vit_nano_patch8_32"
    assert found["sizes"]["feature_size"] == 4
    assert found["problem"] is None
    again = medgmae.create_model(found["architecture"], tmp_path / "unetr.pth", **found["model_args"], taps=(0, 0))
    assert_same_state(again, state_copy(model))


def test_gradients_in_bfloat16_are_finite_whatever_lay_in_memory() -> None:
    model = unetr(img_size=(8, 24, 16), embed_dim=24).train()
    for _ in range(20):
        waste = [torch.full((size,), torch.nan) for size in (100, 1000, 5000, 20_000, 100_000) for _ in range(20)]
        del waste  # what is allocated next has NaN in it
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(noise(1, 1, 8, 24, 16)).float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
