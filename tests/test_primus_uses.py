"""Primus in what the library does with models: pre-training, fine-tuning, segmentation, saliency, maps, export."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomize, small, volume
from training_runs import numbers, run_of, scans, settings_of
from tuning_runs import cases, tune, tune_settings

import medgmae
from medgmae.inference.saliency import attention_rollout
from medgmae.layers.rope import rotate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("scans"))


@pytest.mark.parametrize("name", ["mae_primus_nano_patch8_32", "simmim_primus_nano_patch8_32"])
def test_pre_training_makes_an_encoder_that_goes_on(name: str, data: Path, tmp_path: Path) -> None:
    run = run_of(settings_of(name, **{"training.steps": 30}), data, tmp_path / "run")
    losses = [row["loss"] for row in numbers(run) if "loss" in row]
    assert losses[-1] < losses[0]
    trained: Any = medgmae.create_model(run)
    encoder: Any = medgmae.create_model("primus_nano_patch8_32", run, img_size=16)
    assert set(encoder.load_report.unused.values()) == {"decoder"}
    x = torch.rand(1, 1, 16, 24, 16)
    assert torch.equal(encoder.eval().forward_features(x), trained.eval().forward_features(x))
    segmenter: Any = medgmae.create_model("unetr_primus_nano_patch8_32", run, img_size=16)
    assert {name.split(".")[0] for name in segmenter.load_report.missing} == {"decoder"}
    assert torch.equal(segmenter.encoder.blocks[1].mlp.fc1_g.weight, encoder.blocks[1].mlp.fc1_g.weight)


@pytest.mark.slow  # test_finetune.py fine-tunes one in the quick tests
def test_fine_tuning_tells_bright_from_dark(tmp_path: Path) -> None:
    changes = {"model": "primus_nano_patch8_32", "training.steps": 60}
    run = tune(tune_settings(**changes), cases(tmp_path / "cases"), tmp_path / "run")
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    share = [float(row["probability_bright"]) for row in rows]
    truth = [row["label"] == "bright" for row in rows]
    bright = [p for p, is_bright in zip(share, truth, strict=True) if is_bright]
    dark = [p for p, is_bright in zip(share, truth, strict=True) if not is_bright]
    assert min(bright) > max(dark)


def test_rollout_multiplies_the_attention_of_turned_queries_and_keys() -> None:
    model: Any = randomize(medgmae.create_model("primus_nano_patch8_32", registers=1)).eval()
    x = torch.rand(2, 1, 16, 24, 16)
    taken: list[Any] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: taken.append(args))
    with torch.no_grad():
        model(x)
        product = torch.eye(13).expand(2, 13, 13)
        for block, (tokens, turns) in zip(model.blocks, taken, strict=True):
            shape = (2, 13, 4, 12)
            query, key = (layer(tokens).reshape(shape) for layer in (block.attn.q_proj, block.attn.k_proj))
            query, key = rotate(query, turns[:, None]), rotate(key, turns[:, None])
            weights = (torch.einsum("bnhd,bmhd->bhnm", query, key) / 12**0.5).softmax(-1).mean(1)
            product = (weights + torch.eye(13)) / 2 @ product
    expected = product[:, 1:].mean(1)
    torch.testing.assert_close(attention_rollout(model, x), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["gradient", "rollout", "latent"])
def test_saliency_and_latent_maps_of_a_scan(method: Any) -> None:
    model: Any = randomize(medgmae.create_model("primus_nano_patch8_32", num_classes=2, img_size=16))
    scan = medgmae.Volume(torch.rand(1, 20, 33, 18))
    found = medgmae.saliency_map(model, scan, method=method, progress=False)
    assert found.data.shape == scan.data.shape
    assert found.data.std() > 0
    assert medgmae.latent_map_defaults(model) == ("finetuned", "pca")
    x = volume("primus_nano_patch8_32")
    assert medgmae.latent_to_spatial(small("primus_nano_patch8_32"), x).shape == (2, 1, *x.shape[2:])


def test_windows_of_a_scan_are_read_and_segmented() -> None:
    encoder: Any = randomize(medgmae.create_model("primus_nano_patch8_32", img_size=16, pos_embed="none"))
    scan = medgmae.Volume(torch.rand(1, 24, 32, 16))
    found = medgmae.extract_features(encoder, scan)
    assert found.map.data.shape == (48, 3, 4, 2)
    with torch.no_grad():
        whole = encoder.eval().forward_features(scan.tensor).mT.unflatten(2, (3, 4, 2))[0]
    one = medgmae.extract_features(encoder, scan, window=None)
    torch.testing.assert_close(one.map.data, whole, atol=1e-5, rtol=1e-4)
    model: Any = randomize(medgmae.create_model("unetr_primus_nano_patch8_32", num_classes=3, img_size=16))
    labels = medgmae.segment_scan(model, scan, progress=False).labels
    assert labels.data.shape == scan.data.shape


def test_exported_for_another_runtime(tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("primus_nano_patch8_32", num_classes=2, img_size=16))
    found = medgmae.export_model(model, tmp_path / "model.onnx")
    assert found.difference < 1e-4 * found.size
