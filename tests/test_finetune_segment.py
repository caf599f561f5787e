"""Fine-tuning of segmentations: labels reach the crops where the scans have them, nnU-Net's folders are read as is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_runs import MACHINE, tune, write_table

import medgmae
from medgmae.data import Augmentation, Grid, Volume, VolumeError, list_scans, read_volume, resample_like
from medgmae.data.nnunet import list_nnunet, nnunet_regions
from medgmae.training import Predictor, TrainingError, TuneSettings, rehearse
from medgmae.training.finetune import completed, study_of
from medgmae.training.machine import accelerator_for
from medgmae.training.segmenting import LabelledCrops
from medgmae.training.tables import read_table

SIZE = (24, 20, 28)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(folder: Path, name: str, seed: int, channels: int = 1) -> tuple[list[Path], Path]:
    """A dark scan with a bright ball (label 1) around a brighter core (label 2); the labels are of half the spacing
    along the first axis, and of another orientation."""
    rng = torch.Generator().manual_seed(seed)
    grid = Grid(SIZE, (2.0, 2.0, 2.0), (5.0, -3.0, 7.0))
    centre = [n // 2 + int(torch.randint(-3, 4, (), generator=rng)) for n in SIZE]
    places = torch.meshgrid(*(torch.arange(n) - c for n, c in zip(SIZE, centre, strict=True)), indexing="ij")
    radius = sum(axis**2 for axis in places).float().sqrt()
    data = 10 * torch.rand(SIZE, generator=rng) + 60 * (radius < 8) + 60 * (radius < 5)
    labels = (radius < 8).to(torch.uint8) + (radius < 5).to(torch.uint8)
    files = [folder / "imagesTr" / f"{name}_{k:04d}.nii.gz" for k in range(channels)]
    mask = folder / "labelsTr" / f"{name}.nii.gz"
    for file in (*files, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(files):
        Volume(data[None] + k, grid).save(file)
    fine = Grid((48, 20, 28), (1.0, 2.0, 2.0), tuple(grid.world((-0.25, 0, 0))), grid.direction)
    placed = resample_like(Volume(labels[None], grid), fine.reoriented("RAS"), interpolation="nearest")
    placed.save(mask)
    return files, mask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Dataset001_Ball")
    for k in range(6):
        pair(folder, f"ball_{k}", k)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "shell": 1, "core": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def settings_of(**changes: Any) -> TuneSettings:
    table = {
        "model": "unetr_vit_nano_patch8_32",
        "model_options": {"img_size": 16},
        "input": {"orientation": "RAS", "window": [0, 130], "range": [0, 1]},
        "task": {"kind": "segment", "labels": ["mask"]},
        "view": {"kind": "windows", "size": [16, 16, 16], "windows": 2, "overlap": 0.25, "foreground": 0.75},
        "augmentation": {"flip": 0.5, "rotate90": 0.5, "scale": [1.0, [-0.05, 0.05]]},
        "training": {"steps": 100, "batch_size": 4, "lr": 2e-2, "warmup_steps": 5, "clip": 1.0, "layer_decay": 0.75},
        "held_out": 0.34,
    }
    return read_table(TuneSettings, table).changed(changes)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataclasses import replace

    machine = replace(MACHINE, checkpoint_every=50)
    return tune(settings_of(), dataset, tmp_path_factory.mktemp("runs") / "run", machine)


def test_a_folder_of_nnunet_becomes_a_segmenter(run: Path, dataset: Path, tmp_path: Path) -> None:
    found = json.loads((run / "metrics.json").read_text())
    assert found["cases"] == 2
    assert found["metrics"]["dice_shell"]["value"] > 0.5
    assert found["metrics"]["dice_core"]["value"] > 0.6
    model: Any = medgmae.create_model(f"local-dir:{run}")
    assert model.label_names == ["background", "shell", "core"]
    with (run / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # what the command that everybody uses makes of the file itself, on the file's own grid
    name = rows[0]["name"]
    scan = medgmae.create_transform(model, whole=True)(dataset / "imagesTr" / f"{name}_0000.nii.gz")
    labels = medgmae.segment_scan(model, scan, window=(16, 16, 16), overlap=0.25, progress=False).labels
    truth = resample_like(read_volume(dataset / "labelsTr" / f"{name}.nii.gz"), labels, interpolation="nearest")
    scores = medgmae.evaluation.segmentation_metrics(labels, truth, classes=3)
    assert scores.dice.tolist() == pytest.approx([float(rows[0]["dice_shell"]), float(rows[0]["dice_core"])], abs=1e-3)
    with pytest.raises(TrainingError, match="medgmae segment"):
        Predictor(run)


def test_a_table_with_folds_and_regions_that_overlap(dataset: Path, tmp_path: Path) -> None:
    rows = [
        {"path": dataset / "imagesTr" / f"ball_{k}_0000.nii.gz", "id": f"b{k}", "seg": f"labels/ball_{k}.nii.gz"}
        for k in range(6)
    ]
    (tmp_path / "labels").symlink_to(dataset / "labelsTr")
    table = write_table(tmp_path / "table.csv", rows)
    changes = {"task.labels": ["seg"], "task.multilabel": True, "task.regions": {"ball": [1, 2], "core": [2]}}
    settings = settings_of(folds=2, **changes, **{"training.steps": 8})
    out = tune(settings, table, tmp_path / "run")
    found = json.loads((out / "metrics.json").read_text())
    assert found["cases"] == 6
    assert set(found["pooled"]) >= {"dice", "dice_ball", "dice_core"}
    model: Any = medgmae.create_model(f"local-dir:{out / 'fold_1'}")
    assert model.label_names == ["ball", "core"]
    again = medgmae.training.finetune(settings, [], out, resume=True, machine=MACHINE)
    assert json.loads((again / "metrics.json").read_text()) == found


def test_labels_lie_where_the_scan_has_them(dataset: Path, tmp_path: Path) -> None:
    settings = completed(settings_of(augmentation={"flip": 0.5, "rotate90": 0.5}), [dataset])
    study = study_of(settings, [dataset], tmp_path, False, accelerator_for(MACHINE, "fp32", tmp_path))
    assert study.masks is not None
    assert study.masks.regions == {"shell": [1], "core": [2]}
    crops = LabelledCrops(
        study.corpus.scans, study.masks.maps, study.masks, study.view, Augmentation(flip=0.5, rotate90=0.5), seed=3
    )
    seen = 0
    for position in range(24):
        x, y, _ = crops[position]
        assert x.shape == (1, 16, 16, 16)
        assert torch.equal(y, ((x > 0.4).long() + (x > 0.85).long()))  # as bright as the labels say
        assert torch.equal(crops[position][0], x)
        seen += int((y > 0).any())
    assert seen > 12


def test_metrics_of_one_case_are_json(dataset: Path, tmp_path: Path) -> None:
    """One case has no interval, and JSON no NaN."""
    one = tmp_path / "data"
    pair(one, "only", 0)
    (one / "dataset.json").write_text((dataset / "dataset.json").read_text())
    run = tune(settings_of(held_out=0.0, **{"training.steps": 2, "training.warmup_steps": 0}), one, tmp_path / "run")
    found = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["metrics"]["dice"]["low"] is None


def test_resuming_keeps_the_label_maps(dataset: Path, tmp_path: Path) -> None:
    settings = completed(settings_of(), [dataset])
    accelerator = accelerator_for(MACHINE, "fp32", tmp_path)
    study_of(settings, [dataset], tmp_path, False, accelerator)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()}
    again = study_of(settings, [tmp_path], tmp_path, False, accelerator, [dataset])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()} == kept
    assert again.masks is not None
    assert len(kept) == len(again.masks.maps) == 6


def test_channels_are_matched_by_name(tmp_path: Path) -> None:
    files, mask = pair(tmp_path, "a", 0, channels=2)
    about: dict[str, Any] = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "x": [1, 2], "y": 2},
    }
    (tmp_path / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    (scan,) = list_nnunet(tmp_path, ["flair", "t1"]).scans
    assert scan.contrasts == {"flair": files[1], "t1": files[0]}
    assert scan.labels == {"mask": str(mask.resolve())}
    assert nnunet_regions(tmp_path) == ({"x": [1, 2], "y": [2]}, True)
    assert list_scans(tmp_path, ["flair", "t1"]).scans == [scan]
    with pytest.raises(VolumeError, match="the channels are T1, FLAIR, and the model takes t2, t1"):
        list_nnunet(tmp_path, ["t2", "t1"])
    files[1].unlink()
    listing = list_nnunet(tmp_path)
    assert not listing.scans
    assert "a_0001.nii.gz" in listing.errors[0]["error"]


def test_labels_of_version_one(tmp_path: Path) -> None:
    pair(tmp_path, "a", 0)
    about = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    assert nnunet_regions(tmp_path) == ({"liver": [1], "tumour": [2]}, False)
    (tmp_path / "dataset.json").write_text(json.dumps({**about, "labels": "liver"}))
    with pytest.raises(VolumeError, match="expected names with their label numbers"):
        nnunet_regions(tmp_path)


def test_what_cannot_be_segmented(dataset: Path, tmp_path: Path) -> None:
    scan = dataset / "imagesTr" / "ball_0_0000.nii.gz"
    away = tmp_path / "away.nii.gz"
    Volume(torch.ones(1, 8, 8, 8), Grid((8, 8, 8), (1.0, 1.0, 1.0), (900.0, 0.0, 0.0))).save(away)
    rows = [{"path": scan, "mask": dataset / "labelsTr" / "ball_0.nii.gz"}]
    for change, message in (
        ({"mask": ""}, "1 cases have no label map"),
        ({"mask": "nothing.nii.gz"}, "the label map of ball_0_0000 cannot be used"),
        ({"mask": away}, "no labelled voxel lies in the scan"),
        ({"mask": scan}, "has whole numbers from 0"),
    ):
        table = write_table(tmp_path / "table.csv", [{**rows[0], **change}])
        with pytest.raises(TrainingError, match=message):
            tune(settings_of(held_out=0.0), table, tmp_path / f"run {message[:8]}")
    table = write_table(tmp_path / "table.csv", rows)
    for changes, message in (
        ({"augmentation": {"affine": [0.5, [0.9, 1.1], 5.0]}}, "would bend the labels"),
        ({"model": "vit_nano_patch8_32"}, "does not segment volumes"),
        ({"view.kind": "center"}, "segmentation has 'windows'"),
        ({"tuning.select": "loss"}, "does not measure"),
        ({"tuning.encoder": "lora"}, "not for segmentation"),
        ({"task.regions": {"a": [1], "b": [1, 2]}}, "task.regions share labels"),
        ({"task.regions": {"a": [0]}}, "label numbers above 0"),
    ):
        with pytest.raises(TrainingError, match=message):
            tune(settings_of(held_out=0.0, **changes), table, tmp_path / f"run {message[:8]}")


def test_a_rehearsal_of_a_segmentation(dataset: Path) -> None:
    facts = rehearse(settings_of(folds=2), [dataset])
    assert [part[:2] for part in facts["parts"]] == [[3, 3]] * 2
    assert facts["outputs"] == ["shell", "core"]
    assert facts["seconds"] > 0
