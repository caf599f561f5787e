"""Pre-training with views and a teacher: it goes on exactly, is shared by processes, and says when it has collapsed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import MACHINE, numbers, outcome, run_of, scans, settings_of

import medgmae
from medgmae.models import GlobalLocalMAE
from medgmae.training import Run, Settings, Stopped, TrainingError, pretrain, read_settings, write_glmae
from medgmae.training.states import read_state

VIEWS = {"local_size": [16, 8, 8], "local_views": 3, "local_mask_ratio": 0.5, "projector": [32, 16, 64]}


def views_settings(model: str = "glmae_vit_nano_patch8_32", **changes: Any) -> Settings:
    """A run of nine updates on global views of 16 voxels and local ones of two patches."""
    options = {
        "model_options": {"img_size": 16, "mask_ratio": 0.5},
        "augmentation": {"flip": 0.5, "scale": [1.0, [-0.1, 0.1]]},
    }
    return settings_of(model, **{"global_local": {**VIEWS}, **options, **changes})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("data") / "scans")


PATCHES = {"global_local.patch_distillation": 0.5, "global_local.patch_projector": [32, 16, 48]}
IMAGES = {"model": "mae2d_vit_nano_patch8_32", "global_local.local_size": [8, 16]}
SEQUENCE = {"global_local.views_at_once": 1, "training.micro_batch": 2, "model_options.drop_path_rate": 0.2}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run_of(views_settings(), data, out, replace(MACHINE, picture_every=6))


def last_state(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last state: student, projectors, teacher, centre."""
    (*_, path) = sorted((run / "checkpoints").glob("step_*"))
    return read_state(path).model


def test_a_run_leaves_a_teacher_a_student_and_numbers(undisturbed: Path) -> None:
    lines = numbers(undisturbed)
    losses = [line for line in lines if "loss" in line]
    terms = {"global_reconstruction", "local_reconstruction", "global_consistency", "local_consistency"}
    assert all({*terms, "teacher_entropy", "agreement"} <= set(line) for line in losses)
    assert all(line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5) for line in losses)
    measured = [line for line in lines if "effective_rank" in line]
    assert [line["step"] for line in measured] == [3, 6, 9]
    assert all(1 < line["effective_rank"] < 24 and line["feature_variance"] > 0 for line in measured)
    assert len(list((undisturbed / "pictures").iterdir())) == 2
    state = last_state(undisturbed)
    teacher = medgmae.create_model("vit_nano_patch8_32", pretrained=undisturbed, img_size=16)
    student = medgmae.create_model("vit_nano_patch8_32", pretrained=undisturbed / "student", img_size=16)
    for name in ("blocks.0.attn.qkv.weight", "cls_token"):
        assert torch.equal(teacher.state_dict()[name], state[f"teacher.encoder.{name}"])
        assert torch.equal(student.state_dict()[name], state[f"student.encoder.{name}"])
        assert not torch.equal(teacher.state_dict()[name], student.state_dict()[name])
    whole: Any = medgmae.create_model(f"local-dir:{undisturbed / 'student'}")
    assert isinstance(whole, medgmae.MaskedAutoencoder)
    assert "the weights are the teacher's" in str(teacher.load_report)
    assert "the weights are the student's" in str(student.load_report)
    assert whole.pretrained_cfg["tag"] == "glmae_vit_nano_patch8_32.student"
    assert {"center", "teacher.projector.prototypes", "projector.mlp.0.weight"} <= set(state)
    assert state["center"].any()


def test_the_settings_that_are_written_are_read(undisturbed: Path) -> None:
    settings = Run(undisturbed).settings(Settings)
    assert settings == views_settings()
    with pytest.raises(TrainingError, match=r"global_local\.momentum is 2\.0; expected 0 to 1"):
        settings.changed({"global_local.momentum": 2.0})
    with pytest.raises(TrainingError, match=r"global_local\.moment is not a setting"):
        read_settings({"model": "m", "global_local": {"moment": 1}})


def test_a_run_with_patch_distillation(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    run = run_of(views_settings(**PATCHES), data, tmp_path / "run")
    losses = [line for line in numbers(run) if "loss" in line]
    without = [name for name in losses[0] if name.endswith(("_reconstruction", "_consistency"))]
    for line in losses:
        expected = sum(line[name] for name in without) + 0.5 * line["patch_distillation"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    state = last_state(run)
    more = {name.split(".")[0] for name in set(state) - set(last_state(undisturbed))}
    assert more == {"bridge", "patch_projector", "patch_center", "teacher"}
    assert state["patch_center"].shape == (48,)
    assert state["patch_center"].any()
    assert not torch.equal(state["patch_projector.prototypes"], state["teacher.patch_projector.prototypes"])
    gaussian = views_settings("gmae_vit_nano_patch8_32", **PATCHES)
    with pytest.raises(TrainingError, match=r"GaussianDecoder .* give global_local\.patch_distillation=0"):
        run_of(gaussian, data, tmp_path / "gaussian")
    with pytest.raises(TrainingError, match=r"hidden patches, and model_options\.mask_ratio is 0"):
        run_of(views_settings(**PATCHES, **{"model_options.mask_ratio": 0.0}), data, tmp_path / "all")


@pytest.mark.parametrize("changes", [{}, PATCHES, pytest.param(SEQUENCE, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_exactly(
    changes: dict[str, Any], undisturbed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medgmae.training.engine import Engine

    whole = run_of(views_settings(**changes), data, tmp_path / "whole") if changes else undisturbed
    real = Engine.update

    def update(self: Engine, number: int, batches: Any) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number, batches)

    monkeypatch.setattr(Engine, "update", update)
    with pytest.raises(Stopped):
        run_of(views_settings(**changes), data, tmp_path / "run")
    monkeypatch.undo()
    pretrain(Run(tmp_path / "run").settings(Settings), [], tmp_path / "run", resume=True, machine=MACHINE)
    assert outcome(tmp_path / "run") == outcome(whole)
    expected = last_state(whole)
    for name, value in last_state(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("options", "machine"),
    [
        pytest.param({"training.micro_batch": 1}, {}, marks=pytest.mark.slow),  # the quick tests have the two at once
        pytest.param({"global_local.views_at_once": 2}, {}, marks=pytest.mark.slow),
        ({"global_local.views_at_once": 1, "training.micro_batch": 2}, {}),
        ({}, {"workers": 2}),
        ({"training.checkpointing": True}, {}),
    ],
)
def test_what_does_not_decide_the_outcome(
    undisturbed: Path, data: Path, tmp_path: Path, options: dict[str, Any], machine: dict[str, Any]
) -> None:
    run = run_of(views_settings(**options), data, tmp_path / "run", replace(MACHINE, **machine))
    expected = last_state(undisturbed)
    for name, value in last_state(run).items():
        if {"training.micro_batch", "global_local.views_at_once"} & set(options):  # sums in another order
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-3)
        else:
            assert torch.equal(value, expected[name]), name


def test_views_in_sequence_have_one_teacher_and_one_exchange(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of three local and two global views each: gradients are exchanged with the tenth."""
    from medgmae.training.engine import Engine

    calls: list[str] = []
    without_sync, taught = Engine._without_sync, GlobalLocalMAE.taught

    def exchanges(self: Engine, last: bool) -> Any:
        calls.append("last" if last else "more")
        return without_sync(self, last)

    def teaches(self: GlobalLocalMAE, *given: Any) -> Any:
        if self.student.training:
            calls.append("teacher")
        return taught(self, *given)

    monkeypatch.setattr(Engine, "_without_sync", exchanges)
    monkeypatch.setattr(GlobalLocalMAE, "taught", teaches)
    run_of(views_settings(**SEQUENCE, **{"training.steps": 2}), data, tmp_path / "run")
    assert calls == [*["teacher", *["more"] * 5], *["teacher", *["more"] * 4, "last"]] * 2


@pytest.mark.parametrize("changes", [{"model": "mae_vim_nano_patch8_32"}, {"model": "gmae_vit_nano_patch8_32"}, IMAGES])
def test_any_masked_autoencoder_learns_with_a_teacher(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Of one scan, seen again and again, both reconstructions fall."""
    options = {"training.steps": 40, "training.lr": 3e-3, "augmentation": {}, "held_out": 0.0, "training.batch_size": 2}
    run = run_of(views_settings(**changes, **options), data, tmp_path / "run", replace(MACHINE, checkpoint_every=40))
    losses = [line for line in numbers(run) if "loss" in line]
    for term in ("global_reconstruction", "local_reconstruction"):
        assert losses[-1][term] < 0.8 * losses[0][term]


def test_a_run_without_centring_collapses_and_is_stopped(data: Path, tmp_path: Path) -> None:
    # A warm-up of one update would be too short for the centre, which then has hardly begun.
    options = {
        "training.steps": 100,
        "training.warmup_steps": 20,
        "held_out": 0.0,
        "global_local.momentum": 0.95,
    }
    machine = replace(MACHINE, checkpoint_every=20)
    with pytest.raises(
        TrainingError, match=r"collapsed: .* global_local\.center_momentum is 1, no centring: give 0\.9"
    ):
        run_of(views_settings(**{**options, "global_local.center_momentum": 1.0}), data, tmp_path / "off", machine)
    lines = [line for line in numbers(tmp_path / "off") if "teacher_information" in line]
    assert lines[-1]["teacher_information"] < 3e-4
    assert list((tmp_path / "off" / "checkpoints").glob(f"step_*{lines[-1]['step']}.safetensors"))
    run_of(views_settings(**options), data, tmp_path / "on", machine)
    lines = [line for line in numbers(tmp_path / "on") if "teacher_information" in line]
    assert len(lines) == 5
    assert min(line["prototypes_used"] for line in lines) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_local.local_size": [12, 8, 8]}, "made of whole patches"),
        ({"global_local.local_mask_ratio": 0.9}, "of 2 patches leaves none visible"),
        ({"global_local.local_size": [64, 64, 64]}, "too small"),
        ({"augmentation": {"rotate90": 0.5}}, "rotate90 moves voxels"),
        ({"model": "mae2d_vit_nano_patch8_32"}, "local_size is .16, 8, 8. and the model's patch .8, 8.; expected as"),
        ({**IMAGES, "augmentation": {"resized_crop": [0.2, 1.0]}}, "resized_crop moves voxels; views have flip, scale"),
    ],
)
def test_views_that_cannot_be_had_are_refused(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        run_of(views_settings(**changes), data, tmp_path / "run")


def test_a_run_in_the_layout_of_the_authors_file(undisturbed: Path, tmp_path: Path) -> None:
    path = write_glmae(undisturbed, tmp_path / "glmae.pth")
    content = torch.load(path, weights_only=True)
    assert set(content) == {"student", "teacher"}
    assert content["student"]["module.backbone.pos_embed"].shape == (1, 9, 48)
    assert not content["teacher"]["backbone.pos_embed"][:, 0].any()
    for name, folder in (("", undisturbed / "student"), ("::teacher", undisturbed)):
        model = medgmae.create_model("vit_nano_patch8_32", pretrained=f"{path}{name}", img_size=16)
        expected: Any = medgmae.create_model(f"local-dir:{folder}")
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected.encoder.state_dict()[key]), key
        assert ("the layout of GL-MAE's student" in model.load_report.source) == (name == "")
    with pytest.raises(TrainingError, match="no student and teacher"):
        write_glmae(tmp_path, path)


def test_a_vim_has_no_place_in_the_authors_file(data: Path, tmp_path: Path) -> None:
    settings = views_settings("mae_vim_nano_patch8_32", **{"training.steps": 2, "training.warmup_steps": 0})
    run = run_of(settings, data, tmp_path / "run")
    with pytest.raises(TrainingError, match="is a Vim; GL-MAE's files hold a ViT with a class token"):
        write_glmae(run, tmp_path / "glmae.pth")
