"""The example scripts run, and the shipped demonstration weights are what their card says."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from medgmae import (
    Volume,
    create_model,
    create_transform,
    dice_ce_loss,
    extract_features,
    psnr,
    read_volume,
    save_pretrained,
    weight_card,
    write_volume,
)
from medgmae.checkpoints.cards import weights_folder
from medgmae.data import crop_or_pad, resample_like

EXAMPLES = Path(__file__).parent.parent / "examples"
BRAIN = EXAMPLES / "data/mr_brain_t1.nii.gz"
TAG = "mae_vit_tiny_patch8_64.demo"
TAGS = (TAG, TAG.removeprefix("mae_"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example by name, as Python does when it runs one beside the others."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def run(module: ModuleType, *arguments: object) -> str:
    done = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def small_scan(folder: Path) -> Path:
    """A cube of 88 mm from the middle of the brain."""
    path = folder / "small.nii.gz"
    write_volume(crop_or_pad(read_volume(BRAIN), (88, 88, 88)), path)
    return path


@pytest.mark.parametrize("tag", TAGS)
def test_the_card_tells_the_truth_about_its_file(tag: str) -> None:
    card = weight_card(tag)
    assert card.file is not None
    content = (weights_folder() / card.file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == card.sha256
    assert len(content) == card.bytes <= 12_000_000
    with safe_open(weights_folder() / card.file, framework="pt") as file:
        assert json.loads(file.metadata()["medgmae"])["architecture"] == TAG.partition(".")[0]
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("tag", TAGS)
def test_shipped_weights_load_completely_in_single_precision(tag: str) -> None:
    model = create_model(tag)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.load_report.missing == []
    assert set(model.load_report.loaded) == set(model.state_dict())


def test_both_tags_give_the_same_tokens() -> None:
    x = torch.rand(1, 1, 64, 64, 64)
    whole, encoder = (create_model(tag).eval() for tag in TAGS)
    torch.testing.assert_close(whole.encoder.forward_features(x), encoder.forward_features(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:nilearn", "ignore::FutureWarning:nilearn")
def test_shipped_weights_beat_filling_without_training_by_what_the_card_says(script: Any) -> None:
    evaluate = script("evaluate_mae")
    measured = evaluate.compare(create_model(TAG).eval(), evaluate.windows(evaluate.mni152(), 64))
    said = dict(
        re.findall(
            r"(mean of the visible voxels|trilinear fill|harmonic fill|model) (\d+\.\d+) dB",
            weight_card(TAG).notes or "",
        )
    )
    assert set(said) == set(measured)
    for name, decibel in measured.items():
        assert decibel == pytest.approx(float(said[name]), abs=0.05), name
    assert measured["model"] > measured["trilinear fill"] + 1 > measured["mean of the visible voxels"] + 1


def test_fillings_keep_what_is_visible_and_reproduce_what_they_can(script: Any) -> None:
    evaluate = script("evaluate_mae")
    model = create_model("mae_vit_nano_patch8_32")
    visible = evaluate.visible_voxels(evaluate.fixed_masking(model, 2, seed=0), model)
    assert float(visible.mean()) == 0.25
    ramp = torch.linspace(0, 1, 32).reshape(1, 1, 32, 1, 1).expand(2, 1, 32, 32, 32)
    for fill in (evaluate.mean_fill, evaluate.trilinear_fill, evaluate.harmonic_fill):
        torch.testing.assert_close(fill(torch.full_like(ramp, 0.3), visible), torch.full_like(ramp, 0.3))
        torch.testing.assert_close(fill(ramp, visible)[visible > 0], ramp[visible > 0])
    mean, trilinear, harmonic = (
        psnr(fill(ramp, visible), ramp, where=visible == 0)
        for fill in (evaluate.mean_fill, evaluate.trilinear_fill, evaluate.harmonic_fill)
    )
    assert mean < trilinear < harmonic


def test_demo_writes_features_and_a_picture(script: Any, tmp_path: Path) -> None:
    demo, scan = script("demo"), small_scan(tmp_path)
    output = run(demo, scan, "--out", tmp_path / "out")
    assert "$ medgmae features" in output
    assert "done in" in output
    pooled, found = demo.read_features(tmp_path / "out/features.safetensors")["small"]
    expected = extract_features(create_model(TAGS[1]).eval(), create_transform(TAGS[1], whole=True)(scan))
    assert isinstance(found, Volume)
    assert isinstance(expected.map, Volume)
    torch.testing.assert_close(pooled, expected.pooled)
    torch.testing.assert_close(found.data, expected.map.data)
    assert found.origin == pytest.approx(expected.map.origin)
    assert (tmp_path / "out/small.png").stat().st_size > 30_000


def test_four_contrasts_go_from_files_to_a_map_on_the_t1(script: Any, tmp_path: Path) -> None:
    example, out = script("four_contrasts"), tmp_path / "out"
    saved = save_pretrained(create_model("vim_tiny_patch16_160"), tmp_path / "saved")
    output = run(example, BRAIN, "--model", "vim_tiny_patch16_160", "--weights", saved, "--out", out)
    assert "random weights" not in output
    assert "vector of 192, map torch.Size([192, 10, 10, 10])" in output
    t1, latent = read_volume(BRAIN), read_volume(out / "latent_map.nii.gz")
    assert torch.equal(read_volume(out / "brain_t1.nii.gz").data, t1.data)
    assert latent.data.shape == t1.data.shape
    assert latent.grid.affine == pytest.approx(t1.grid.affine)
    assert 900 < latent.data.unique().numel() <= 1001  # one number per patch, and 0 outside the 160 mm of the model
    assert read_volume(out / "features.nrrd").data.shape == (192, 10, 10, 10)
    assert (out / "latent_map.png").stat().st_size > 30_000


def test_made_contrasts_show_tissues_as_they_look_in_each(script: Any, tmp_path: Path) -> None:
    example = script("four_contrasts")
    files = example.make_case(small_scan(tmp_path), tmp_path)
    t1 = read_volume(files["t1"])
    shares = t1.data / t1.data.max()
    places = {"fluid": (0.3, 0.4), "grey": (0.63, 0.67), "white": (0.83, 0.87)}
    look = {}
    for name in ("t2", "t1ce", "flair"):
        scan = resample_like(read_volume(files[name]), t1).data.float()
        look[name] = {k: float(scan[(shares > a) & (shares < b)].mean()) for k, (a, b) in places.items()}
    assert look["t2"]["fluid"] > look["t2"]["grey"] > look["t2"]["white"]
    assert look["t1ce"]["fluid"] < look["t1ce"]["grey"] < look["t1ce"]["white"]
    assert look["flair"]["fluid"] < look["flair"]["white"] < look["flair"]["grey"]
    assert read_volume(files["flair"]).size == (44, 88, 88)
    ready = create_transform(example.CARD)(files)
    assert ready.data.shape == (4, 160, 160, 160)
    backwards = create_transform(example.CARD)(dict(reversed(files.items())))
    assert torch.equal(ready.data, backwards.data)


def test_segmentation_trains_and_tests_on_parts_that_share_no_plane(script: Any) -> None:
    example = script("few_shot_segmentation")
    for name, task in example.TASKS.items():
        train, test = example.parts(task)
        for scan, labels in (train, test):
            assert all(n >= wanted for n, wanted in zip(scan.size, task.crop, strict=True)), name
            assert labels.data.unique().tolist() == list(range(len(task.classes) + 1)), name
            assert labels.size == scan.size
            assert labels.grid.affine == pytest.approx(scan.grid.affine)
            assert 0 <= float(scan.data.min()) < float(scan.data.max()) <= 1
        grids = [train.labels.grid, test.labels.grid]
        centres = [grid.world([(n - 1) / 2 for n in grid.size])[2 - task.axis] for grid in grids]
        apart = sum(grid.size[task.axis] for grid in grids) / 2 + 2 * example.GAP
        up_or_left = centres[1] - centres[0] if task.axis == 0 else centres[0] - centres[1]  # in LPS
        assert up_or_left == pytest.approx(2.0 * apart), name


def test_labels_of_the_abdomen_lie_on_its_organs(script: Any) -> None:
    """Their file says another place: bright, even voxels under the liver's label show that they were put right."""
    example = script("few_shot_segmentation")
    scan, labels = example.parts(example.TASKS["organs"])[1]
    liver = scan.data[labels.data == 1]
    assert float(liver.std()) < 0.4 * float(scan.data.std())
    assert float(liver.mean()) > float(scan.data.mean()) + float(scan.data.std()) / 2
    beside = scan.data[labels.data.roll(20, dims=2) == 1]
    assert float(beside.std()) > 1.5 * float(liver.std())


def test_crops_are_around_labelled_voxels_and_come_again_with_the_seed(script: Any) -> None:
    example = script("few_shot_segmentation")
    scan, labels = torch.rand(1, 20, 20, 20), torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    labels[0, 0, 19, 7] = 1
    labels[0, 10, 10, 10] = 2
    places = [(labels[0] == number).nonzero() for number in (1, 2)]

    def crop(seed: int) -> Any:
        return example.random_crop(scan, labels, (8, 8, 8), places, torch.Generator().manual_seed(seed))

    seen = set()
    for seed in range(8):
        part, target = crop(seed)
        assert part.shape == target.shape == (1, 8, 8, 8)
        assert torch.equal(part, crop(seed)[0])
        seen.add(int(target.max()))
    assert seen == {1, 2}


def test_segmentation_learns_scores_and_draws(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the middle of the test part, which takes two windows instead of twenty."""
    example = script("few_shot_segmentation")
    whole, size = example.parts, (48, 48, 64)

    def middle(task: Any) -> Any:
        train, test = whole(task)
        return train, example.Part(*(crop_or_pad(volume, size) for volume in test))

    monkeypatch.setattr(example, "parts", middle)
    output = run(example, "--task", "aorta", "--steps", 2, "--seeds", 2, "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    aorta = results["tasks"]["aorta"]
    assert aorta["steps"] == 2
    for start in ("pretrained", "random"):
        dice = [seed[0] for seed in aorta[start]["dice"]]
        assert len(dice) == 2
        assert all(0 <= value <= 1 for value in dice)
        assert f"{sum(dice) / 2:.3f} ± {abs(dice[0] - dice[1]) / 2**0.5:.3f}" in output
    assert aorta["pretrained"] != aorta["random"]
    assert (tmp_path / "out/segmentation.png").stat().st_size > 10_000


def test_segmentation_starts_differ_in_the_encoder_and_fit_their_crops(script: Any) -> None:
    example = script("few_shot_segmentation")
    scan = Volume(torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
    labels = scan.with_data((scan.data > 0.5).to(torch.uint8))
    task, part = example.TASKS["aorta"]._replace(crop=(16, 16, 16)), example.Part(scan, labels)
    same = example.fit(task, part, "pretrained", 1, 1, 0.0, 0)
    shipped: Any = create_model(TAGS[1], img_size=16)
    torch.testing.assert_close(same.encoder.state_dict(), shipped.state_dict())
    for start in example.STARTS:
        first, last = (example.fit(task, part, start, steps, 1, 1e-3, 0) for steps in (1, 12))
        before, after = (dice_ce_loss(model(scan.data[None]), labels.data[None]) for model in (first, last))
        assert after < 0.9 * before, start


@pytest.mark.slow
def test_a_ct_from_projections(script: Any, tmp_path: Path) -> None:
    small = ("--views", 6, "--gaussians", 500, "--steps", 10, "--seeds", 1, "--iterations", 2, 2)
    said = run(script("ct_from_projections"), *small, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["voxels"]["SART"]["psnr"] > results["voxels"]["FDK"]["psnr"]
    assert all(f"{name} " in said for name in ("FDK", "SART", "CG", *results["gaussians"]))
    best = max(results["gaussians"], key=lambda name: results["gaussians"][name][0]["psnr"])
    assert best == "fitted to SART"
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("planes", "curves"))
