"""Saliency maps: by hand on small models, on the scan's grid, and where the label of a fine-tuned model shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from small_models import randomize
from test_cli import run
from tuning_runs import cases, tune, tune_settings

import medgmae
from medgmae.data import Grid, Volume
from medgmae.inference import saliency
from medgmae.inference.saliency import attention_rollout, gradient_weighted, saliency_map


def vit(**options: Any) -> Any:
    return randomize(medgmae.create_model("vit_nano_patch8_32", **{"img_size": 16, **options})).eval()


def vim(**options: Any) -> Any:
    return randomize(medgmae.create_model("vim_nano_patch8_32", **{"img_size": 16, **options})).eval()


def scan(size: tuple[int, int, int] = (21, 18, 26)) -> Volume:
    turn = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]]
    data = torch.rand(1, *size, generator=torch.Generator().manual_seed(1))
    return Volume(data, Grid(size, (2.0, 1.0, 1.5), (4.0, -7.0, 9.0), turn))


def weights(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention (B, N, N) of a layer, head by head as its definition has it, the mean of the heads."""
    width = x.shape[-1] // attention.num_heads
    query, key, _ = attention.qkv(x).chunk(3, dim=-1)
    total = torch.zeros(len(x), x.shape[1], x.shape[1])
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        total += (query[..., part] @ key[..., part].mT / math.sqrt(width)).softmax(-1)
    return total / attention.num_heads


@pytest.mark.parametrize("pool", ["token", "avg", "token_avg", "last"])
def test_rollout_is_the_product_of_the_attention_matrices(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "_QUERIES", 4)  # so that the nine tokens are not done at once
    model, x = vit(global_pool=pool, depth=3), torch.rand(2, 1, 16, 16, 16)
    taken: list[torch.Tensor] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda _, args, out: taken.append(out))
    with torch.no_grad():
        model(x)
        product = torch.eye(9).expand(2, 9, 9)
        for block, tokens in zip(model.blocks, taken, strict=True):
            product = (weights(block.attn, tokens) + torch.eye(9)) / 2 @ product
    token, patches = product[:, 0], product[:, 1:].mean(1)
    last = product[:, -1]
    expected = {"token": token, "avg": patches, "token_avg": (token + patches) / 2, "last": last}[pool]
    found = attention_rollout(model, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_one_block_that_attends_to_all_alike() -> None:
    model = vit(depth=1, global_pool="token")
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.bias)
    found = attention_rollout(model, torch.rand(1, 1, 16, 16, 16))
    torch.testing.assert_close(found[0], torch.tensor([0.5 + 1 / 18, *[1 / 18] * 8]))


def reads_patches() -> Any:
    """A ViT whose blocks change nothing: feature 0 of a patch is its mean, feature 1 its negative, a class reads
    either."""
    model = vit(depth=1, global_pool="avg", fc_norm=False, num_classes=2)
    with torch.no_grad():
        for part in (model.patch_embed.proj, model.blocks[0].attn.proj, model.blocks[0].mlp.fc2, model.head):
            part.weight.zero_()
            part.bias.zero_()
        model.pos_embed.zero_()
        model.patch_embed.proj.weight[0] = 1 / 512
        model.patch_embed.proj.weight[1] = -1 / 512
        model.head.weight[0, 0] = model.head.weight[1, 1] = 1.0
    model.norm = torch.nn.Identity()
    return model


def test_gradient_lights_what_the_head_reads() -> None:
    model, data = reads_patches(), torch.zeros(1, 1, 16, 16, 16)
    data[..., 8:, :8, 8:] = 1.0  # patch 5
    data[..., :8, :8, :8] = -3.0  # patch 0
    found = gradient_weighted(model, data, 0)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0, 0, 0, 1 / 8, 0, 0]]))  # a mean of eight patches
    torch.testing.assert_close(gradient_weighted(model, data, 1), torch.tensor([[3 / 8, *[0.0] * 7]]))
    volume = Volume(data[0], Grid((16, 16, 16), (1.0, 1.0, 1.0)))
    found = saliency_map(model, volume, method="gradient", output=0).data
    assert torch.equal(found > 0, data[0] > 0)
    assert torch.equal(saliency_map(model, volume, method="gradient").data > 0, data[0] < 0)  # output 1 is larger
    model.label_names = ["plus", "minus"]
    assert torch.equal(saliency_map(model, volume, method="gradient", output="plus").data, found)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "pos_embed")


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (vit, {"global_pool": "token"}),
        (vit, {"global_pool": "last"}),
        (vim, {"global_pool": "token", "class_token": "middle"}),
        (vim, {"global_pool": "last", "rope_residual": False}),
    ],
)
def test_gradient_of_a_head_that_reads_one_token(build: Any, options: dict[str, Any]) -> None:
    """The tokens are those before the last block; what they give is checked by differences of the logit."""
    model, x = build(num_classes=2, depth=2, **options), torch.rand(1, 1, 16, 16, 16)
    taken: list[torch.Tensor] = []

    def change(_: Any, streams: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        stream = sum(one for one in streams if one is not None)
        taken[:] = [stream]
        return stream + 1e-2 * step, *(None for _ in streams[1:])

    model.blocks[-1].register_forward_pre_hook(change)
    step: Any = 0
    with torch.no_grad():
        model.double()(x.double())
        stream = taken[0]
        patches = model.prefix_first(torch.arange(stream.shape[1])[None, :, None])[0, model.num_prefix_tokens :, 0]
        gradient = torch.zeros(stream.shape[2], dtype=torch.float64)
        for feature in range(stream.shape[2]):  # the mean over patches is a step of all of them together
            logits = []
            for sign in (1, -1):
                step = torch.zeros_like(stream)
                step[:, patches, feature] = sign
                logits.append(model(x.double())[0, 1])
            gradient[feature] = (logits[0] - logits[1]) / 2e-2 / len(patches)
        expected = (stream[:, patches] @ gradient).relu()
        step = 0
    torch.testing.assert_close(gradient_weighted(model, x.double(), 1).double(), expected, rtol=5e-3, atol=1e-6)
    assert expected.max() > 0


@pytest.mark.parametrize("method", ["rollout", "gradient", "latent"])
def test_maps_lie_on_the_scan(method: Any) -> None:
    model = vit(num_classes=3, global_pool="avg").train()
    options: Any = {"method": method, "outside": "rim", "batch_size": 2}
    found = saliency_map(model, scan(), **options)
    assert found.grid == scan().grid
    assert found.shape == scan().shape
    assert bool(found.data.isfinite().all())
    assert float(found.data.std()) > 0
    assert model.training
    one = saliency_map(model, scan(), **options, overlap=0.0, upsampling="linear")
    assert not torch.equal(one.data, found.data)


@pytest.mark.parametrize("build", [vit, vim])
def test_one_window_is_the_latent_map(build: Any) -> None:
    model = build(num_classes=2)
    found = saliency_map(model, scan(), method="latent", window=None, outside="rim", upsampling="linear")
    expected = medgmae.latent_to_spatial(model, scan(), mode="finetuned", upsampling="linear")
    torch.testing.assert_close(found.data, expected.data)


def test_what_a_method_cannot_do_says_why() -> None:
    with pytest.raises(ValueError, match="a Vim has none; use method='gradient', or 'latent'"):
        saliency_map(vim(), scan())
    with pytest.raises(ValueError, match="num_classes=0 and global_pool='token'; fine-tune one"):
        saliency_map(vit(), scan(), method="gradient")
    model = vit(num_classes=2)
    model.label_names = ["dark", "bright"]
    for output in ("grey", 2, -1, True):
        with pytest.raises(ValueError, match=r"expected a number from 0 to 1, or their names: dark, bright"):
            saliency_map(model, scan(), method="gradient", output=output)
    with pytest.raises(ValueError, match="output=0 is for method 'gradient'"):
        saliency_map(model, scan(), output=0)
    with pytest.raises(ValueError, match="method must be"):
        saliency_map(model, scan(), method="lime")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned whether the lower half of a box is bright."""
    folder = tmp_path_factory.mktemp("tuned")
    return tune(tune_settings(**{"training.steps": 120, "held_out": 0.0}), cases(folder), folder / "run")


@pytest.mark.parametrize(("method", "output"), [("gradient", "bright"), ("rollout", None)])
def test_the_half_that_decides_is_lit(method: Any, output: str | None, tuned: Path) -> None:
    model: Any = medgmae.create_model(tuned).eval()
    volume = medgmae.create_transform(model)(tuned.parent / "case1.nii.gz")
    assert model.label_names[int(model(volume.tensor).argmax())] == "bright"
    found = saliency_map(model, volume, method=method, output=output).data
    assert float(found[:, :8].mean()) > 1.5 * float(found[:, 8:].mean())


def saliency_command(*args: str | Path) -> Result:
    return run("saliency", *args, "--threads", "1")


def test_the_command_writes_the_librarys_maps(tuned: Path, tmp_path: Path) -> None:
    files = [tuned.parent / f"case{k}.nii.gz" for k in (0, 1)]
    options = ["--model", tuned, "--method", "gradient", "--output", "bright", "--out", tmp_path / "maps"]
    result = saliency_command(*files, *options, "--png", "--json")
    assert result.exit_code == 0, result.stderr
    model: Any = medgmae.create_model(tuned).eval()
    facts = json.loads(result.stdout)
    assert (facts["method"], facts["output"], list(facts["scans"])) == ("gradient", "bright", ["case0", "case1"])
    for k in (0, 1):
        prepared = medgmae.create_transform(model)(files[k])
        written = medgmae.read_volume(tmp_path / f"maps/case{k}.nii.gz")
        expected = saliency_map(model, prepared, method="gradient", output="bright")
        assert torch.equal(medgmae.data.resample_like(written, prepared).data, expected.data)
        assert (tmp_path / f"maps/case{k}.png").stat().st_size > 10_000
        assert facts["scans"][f"case{k}"]["largest"] == float(expected.data.max())
    again = saliency_command(*files, *options)
    assert again.exit_code == 2
    assert "case0.nii.gz exists" in again.stderr


def test_a_class_whose_name_is_a_number(tmp_path: Path) -> None:
    model: Any = vit(num_classes=3, global_pool="avg")
    model.label_names = ["0", "2", "7"]
    medgmae.save_pretrained(model, tmp_path / "model")
    scan().save(tmp_path / "scan.nii.gz")
    written = []
    for output in ("2", "1"):  # a name, and the number of the same output
        out = tmp_path / output
        options = ["--model", tmp_path / "model", "--method", "gradient", "--output", output, "--out", out]
        assert saliency_command(tmp_path / "scan.nii.gz", *options).exit_code == 0
        written.append(medgmae.read_volume(out / "scan.nii.gz").data)
    assert torch.equal(written[0], written[1])


def test_the_command_of_an_encoder_reads_the_whole_scan(tuned: Path, tmp_path: Path) -> None:
    file, tag = tuned.parent / "case1.nii.gz", "vit_tiny_patch8_64.demo"
    result = saliency_command(file, "--model", tag, "--method", "rollout", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    prepared = medgmae.create_transform(tag, whole=True)(file)
    expected = saliency_map(medgmae.create_model(tag), prepared, outside=0.0)
    written = medgmae.read_volume(tmp_path / "case1.nii.gz")
    torch.testing.assert_close(medgmae.data.resample_like(written, prepared).data, expected.data)
    result = saliency_command(file, "--model", tag, "--method", "gradient", "--out", tmp_path / "more")
    assert result.exit_code == 1
    assert "fine-tune one" in result.stderr
    assert not list((tmp_path / "more").glob("*.nii.gz"))
