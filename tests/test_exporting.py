"""Exported files: ONNX Runtime gives the model's outputs, the file says what it is, what cannot be is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from click.testing import Result
from small_models import randomize
from test_cli import run
from tuning_runs import cases, tune, tune_settings

import medgmae
from medgmae.checkpoints import exporting

NANO = "vit_nano_patch8_32"


def export(*args: str | Path) -> Result:
    return run("export", *args, "--threads", "1")


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(path).run(None, {"scan": x.numpy()})[0])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    return tune(tune_settings(**{"training.steps": 3}), cases(folder), folder / "run")


def test_a_fine_tuned_run_as_onnx(tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    result = export(tuned, "--out", file, "--dynamic-batch", "--json")
    assert result.exit_code == 0, result.stderr
    model = medgmae.create_model(tuned).eval()
    x = torch.rand(5, 1, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(outputs(file, x), model(x), rtol=0, atol=1e-5)
    facts = json.loads(session(file).get_modelmeta().custom_metadata_map["medgmae"])
    assert facts == json.loads(result.stdout)["metadata"]
    assert (facts["architecture"], facts["medgmae"]) == (NANO, medgmae.__version__)
    assert (facts["labels"], facts["output"], facts["shape"]) == (["bright", "dark"], "logits", [1, 16, 16, 16])
    assert facts["input"] == model.pretrained_cfg["input"]
    assert medgmae.create_transform(facts["input"])(tuned.parent / "case0.nii.gz").size == (16, 16, 16)
    assert 0 < json.loads(result.stdout)["difference"] < 1e-5
    assert b"exporting.py" not in file.read_bytes()  # nor any other path of this machine
    again = export(tuned, "--out", file)
    assert again.exit_code == 2
    assert "exists; choose another name, or --overwrite" in again.stderr


def test_a_vim_as_onnx_is_a_loop_over_tokens(tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("vim_nano_patch8_32", class_token="middle", global_pool="token"))
    done = medgmae.export_model(model, tmp_path / "vim.onnx", size=(16, 24, 16))
    assert model.img_size == (32, 32, 32)
    assert model.training
    x = torch.rand(1, 1, 16, 24, 16)
    model.set_input_size((16, 24, 16))
    with torch.inference_mode():
        torch.testing.assert_close(outputs(tmp_path / "vim.onnx", x), model.eval()(x), rtol=0, atol=1e-5)
    assert (done.facts["output"], done.facts["shape"]) == ("features", [1, 16, 24, 16])
    assert done.difference < 1e-5 < done.size


@pytest.mark.slow
def test_a_unetr_as_onnx(tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("unetr_vit_nano_patch8_32", num_classes=2))
    medgmae.export_model(model, tmp_path / "unetr.onnx")
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(outputs(tmp_path / "unetr.onnx", x), model.eval()(x), rtol=0, atol=1e-3)


def test_a_program_of_torch(tmp_path: Path) -> None:
    folder = medgmae.save_pretrained(medgmae.create_model("vim_nano_patch8_32", num_classes=2), tmp_path / "model")
    file = tmp_path / "model.pt2"
    result = export(folder, "--format", "torch", "--out", file, "--dynamic-batch")
    assert result.exit_code == 0, result.stderr
    assert "logits of 1 x 32 x 32 x 32, no labels" in result.stdout
    extra = {"medgmae.json": ""}
    program = torch.export.load(file, extra_files=extra)
    assert json.loads(extra["medgmae.json"])["architecture"] == "vim_nano_patch8_32"
    x = torch.rand(4, 1, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), medgmae.create_model(folder).eval()(x))


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = medgmae.create_model(NANO, num_classes=2)
    genuine = exporting._run_onnx
    monkeypatch.setattr(exporting, "_run_onnx", lambda path, x: genuine(path, x) * 1.01)
    with pytest.raises(ValueError, match=r"was not written: the file's outputs differ from the model's by up to 0\.0"):
        medgmae.export_model(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert model.training


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, model = tmp_path / "model.onnx", medgmae.create_model(NANO)
    with pytest.raises(TypeError, match="needs a model of this library, got Linear"):
        medgmae.export_model(torch.nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match=r"MaskedAutoencoder is a masked autoencoder.*export its encoder"):
        medgmae.export_model(medgmae.create_model("mae_vit_nano_patch8_32"), file)
    with pytest.raises(ValueError, match=r"weights in torch\.float16; expected float32"):
        medgmae.export_model(medgmae.create_model(NANO).half(), file)
    with pytest.raises(ValueError, match=r"model\.bin must end in \.onnx, or in \.pt2"):
        medgmae.export_model(model, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"model\.onnx must end in \.pt2"):
        medgmae.export_model(model, file, format="torch")
    with pytest.raises(ValueError, match="opset must be 18 or more, got 11"):
        medgmae.export_model(model, file, opset=11)
    with pytest.raises(ValueError, match="multiple"):
        medgmae.export_model(model, file, size=20)
    found = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(ImportError, match=r"needs onnx, not installed here: pip install 'medgmae\[onnx\]'"):
        medgmae.export_model(model, file)
    assert not list(tmp_path.iterdir())


def test_the_command_names_what_to_export_instead(tuned: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "model.onnx"]
    (tmp_path / "folds" / "fold_1").mkdir(parents=True)
    (tmp_path / "folds" / "fold_1" / "config.json").write_text("{}")
    wrong = {
        "mae_vit_tiny_patch8_64.demo": "medgmae export vit_tiny_patch8_64 --weights mae_vit_tiny_patch8_64.demo",
        str(tmp_path): "holds no model: expected config.json and model.safetensors",
        str(tmp_path / "folds"): "the models of its folds are in fold_1: name one of them",
    }
    for name, said in wrong.items():
        result = export(name, *out)
        assert result.exit_code == 2, result.stdout
        assert said in result.stderr.replace("\n", " ")
    result = export(tuned, *out, "--size", "20")
    assert result.exit_code == 1
    assert "multiple" in result.stderr
