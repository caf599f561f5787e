"""The command line: what it prints, what it writes, what it answers to wrong use, and its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import medgmae
from medgmae.cli import main

ROOT = Path(__file__).parent.parent
NANO = "vit_nano_patch8_32"


# click before 8.2 mixes the two streams unless it is told not to.
SEPARATE: Any = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}


def run(*args: str | Path) -> Result:
    return CliRunner(**SEPARATE).invoke(main, [str(arg) for arg in args])


def shell(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medgmae", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


def tangerine_file(path: Path, model: Any) -> Path:
    """The weights of one of our autoencoders in a file as TANGERINE's trainer writes it."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "encoder":
            theirs[rest] = tensor
        elif rest.startswith("head."):
            theirs[f"decoder_pred.0.{rest.removeprefix('head.')}"] = tensor
        else:
            theirs["mask_token" if rest == "mask_token" else f"decoder_{rest}"] = tensor
    del theirs["decoder_prefix_pos_embed"]
    for table in ("pos_embed", "decoder_pos_embed"):
        theirs[table] = torch.cat([torch.zeros(1, 1, theirs[table].shape[2]), theirs[table]], dim=1)
    torch.save({"model": theirs, "epoch": 399, "args": argparse.Namespace(lr=1e-4)}, path)
    return path


@pytest.fixture
def autoencoder() -> Any:
    return medgmae.create_model("mae_vit_nano_patch8_32", sigmoid=True)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# start-up and errors


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["features", "--help"], ["convert", "-h"]])
def test_help_does_not_import_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom medgmae.cli import main\n"
        f"main({args!r}, standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'SimpleITK', 'tqdm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "medgmae" in done.stdout or "Usage" in done.stdout


def test_every_command_has_help() -> None:
    for name in main.commands:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert all(option.help for option in main.commands[name].params if isinstance(option, click.Option))


def test_an_error_is_one_message_and_debug_shows_more(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    done = shell("convert", tmp_path / "bad.pth", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    result = run("--debug", "convert", tmp_path / "bad.pth", tmp_path / "out")
    assert isinstance(result.exception, medgmae.WeightsError)


@pytest.mark.parametrize(
    "command", [["fit", "s.nii", "--out", "g.ply"], ["reconstruct", "s.nii", "--model", NANO, "--out", "r.nii"],
                ["latent-map", "s.nii", "--model", NANO, "--out", "m.nii"]], ids=lambda command: command[0]
)  # fmt: skip
def test_a_picture_without_matplotlib_is_refused_before_the_work(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(*command, "--png", "p.png")
    assert result.exit_code == 2
    assert "--png needs matplotlib, which is not installed: pip install medgmae[viz]" in result.stderr


# list


def test_list_names_everything() -> None:
    result = run("list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == sorted(medgmae.list_models() + medgmae.list_weights())
    row = next(line for line in lines if line.startswith("vit_large_patch16_256.tangerine"))
    assert row.split() == [
        *("vit_large_patch16_256.tangerine", "310.7", "M", "1", "x", "256x256x256", "16x16x16"),
        *("download", "cc-by-nc-4.0", "-"),
    ]


def test_list_as_json() -> None:
    rows = json.loads(run("list", "vit_nano*", "--json").stdout)
    assert [row["name"] for row in rows] == [NANO]
    assert rows[0]["parameters"] == sum(p.numel() for p in medgmae.create_model(NANO).parameters())
    assert (rows[0]["img_size"], rows[0]["patch_size"], rows[0]["weights"]) == ([32, 32, 32], [8, 8, 8], None)
    rows = json.loads(run("list", "tangerine", "--json").stdout)
    assert {row["weights"]["availability"] for row in rows} == {"url"}
    assert len(rows) == 2


def test_list_pretrained_is_what_can_be_had() -> None:
    rows = json.loads(run("list", "--pretrained", "--json").stdout)
    assert [row["name"] for row in rows] == sorted(medgmae.list_models(pretrained=True))


def test_list_of_nothing_says_so() -> None:
    result = run("list", "resnet")
    assert result.exit_code == 2
    assert "no model or weights match" in result.stderr
    assert json.loads(run("list", "resnet", "--json").stdout) == []


# info


def test_info_of_an_architecture() -> None:
    facts = json.loads(run("info", "mae_vit_nano_patch8_32", "--json").stdout)
    model: Any = medgmae.create_model("mae_vit_nano_patch8_32")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["grid"] == list(model.encoder.grid_size)
    assert facts["decoder"]["embed_dim"] == 24
    text = run("info", NANO).stdout
    assert "84,384" in text
    assert "[32, 32, 32]" in text


def test_info_of_a_gaussian_autoencoder_counts_its_gaussians() -> None:
    facts = json.loads(run("info", "gmae_vit_base_patch16_96_hierarchical", "--json").stdout)
    assert facts["decoder"]["kind"] == "hierarchical"
    assert facts["decoder"]["total_gaussians"] == 512 * (1 + 12 + 7)
    assert facts["mask_ratio"] == 0.75
    assert "norm_target" not in facts


def test_info_of_a_state_space_says_how_it_scans() -> None:
    facts = json.loads(run("info", "mae_vim_nano_patch8_32", "--json").stdout)
    expected = {"d_state": 16, "class_token": None, "rope": "axial", "rope_residual": True, "scan_order": "raster"}
    assert {name: facts[name] for name in expected} == expected
    assert facts["decoder"]["off_by_one"] is False
    assert "num_heads" not in {*facts, *facts["decoder"]}


def test_info_of_a_tag_shows_the_whole_card() -> None:
    tag = "vit_large_patch16_256.tangerine"
    facts = json.loads(run("info", tag, "--json").stdout)
    assert facts["card"] == medgmae.weight_card(tag).to_json()
    assert facts["num_features"] == 2048
    text = run("info", tag).stdout
    for name, value in facts["card"].items():
        assert name in text
        if isinstance(value, str):
            assert value.split()[-1] in text


def test_info_of_a_file(tmp_path: Path, autoencoder: Any) -> None:
    file = tangerine_file(tmp_path / "checkpoint-399.pth", autoencoder)
    facts = json.loads(run("info", file, "--json").stdout)
    assert facts["source"] == "TANGERINE pre-training"
    assert facts["architecture"] == "mae_vit_nano_patch8_32"
    assert facts["model_args"] == {"sigmoid": True}
    text = run("info", file).stdout
    assert "decoder_blocks.* -> decoder.blocks.*" in text
    assert "decoder_pred.0.* -> decoder.head.*" in text
    assert "decoder_pos_embed -> decoder.pos_embed" in text


def test_info_tells_what_is_left_out(tmp_path: Path) -> None:
    state = {f"module.backbone.{name}": tensor for name, tensor in medgmae.create_model(NANO).state_dict().items()}
    state |= {"module.head.mlp.0.weight": torch.zeros(2, 2), "module.head.mlp.0.bias": torch.zeros(2)}
    torch.save({"student": state}, tmp_path / "student.pth")
    text = run("info", tmp_path / "student.pth").stdout
    assert "the layout of GL-MAE's student" in text
    assert "module.backbone.* -> encoder.*" in text
    assert "beside 'backbone.'" in text
    assert "module.head.mlp.0.weight, module.head.mlp.0.bias" in " ".join(text.split())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vit_nano_patch8_23", f"Did you mean '{NANO}'"),
        ("vit_large_patch16_256.tangerin", "vit_large_patch16_256.tangerine"),
        ("no/such/file.pth", "no such file"),
        ("pyproject.toml", "cannot be read"),
    ],
)
def test_info_of_nothing_known(what: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run("info", what, "--json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# convert


def test_convert_round_trip(tmp_path: Path, autoencoder: Any) -> None:
    file, out = tangerine_file(tmp_path / "official.pth", autoencoder), tmp_path / "out"
    result = run("convert", file, out)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again: Any = medgmae.create_model(f"local-dir:{out}")
    assert same_weights(again, autoencoder)
    x = torch.rand(1, 1, 32, 32, 32)
    masking = medgmae.random_masking(1, 64, 0.75)
    assert torch.equal(again.reconstruct(x, masking), autoencoder.reconstruct(x, masking))


def test_convert_the_encoder_alone_with_options(tmp_path: Path, autoencoder: Any) -> None:
    file, out = tangerine_file(tmp_path / "official.pth", autoencoder), tmp_path / "out"
    changes = ["global_pool=token_avg", "img_size=[32,48,32]", "in_chans=2"]
    options = ["--model", NANO, *(word for change in changes for word in ("--set", change)), "--json"]
    result = run("convert", file, out, *options)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["model_args"] == {"global_pool": "token_avg", "img_size": [32, 48, 32], "in_chans": 2}
    assert facts["resized"] == {"pos_embed": "grid (4, 4, 4) to (4, 6, 4)"}
    assert list(facts["adapted"]) == ["patch_embed.proj.weight"]
    direct = medgmae.create_model(NANO, global_pool="token_avg", img_size=(32, 48, 32), in_chans=2)
    medgmae.load_pretrained(direct, file)
    x = torch.rand(1, 2, 32, 48, 32)
    assert torch.equal(medgmae.create_model(f"local-dir:{out}").eval()(x), direct.eval()(x))


def test_convert_with_a_tag_keeps_its_card(tmp_path: Path) -> None:
    tag, short = "vit_base_patch16_96.glmae", ["--set", "depth=1"]
    state = medgmae.create_model("vit_base_patch16_96", depth=1).state_dict()
    torch.save({"student": state}, tmp_path / "gl.pth")
    result = run("convert", tmp_path / "gl.pth", tmp_path / "out", "--model", tag, *short)
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["weight_card"]["tag"] == tag
    assert config["weight_card"]["input"] == medgmae.weight_card(tag).to_json()["input"]
    result = run("convert", tmp_path / "out", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    result = run("convert", tmp_path / "gl.pth", tmp_path / "out2", "--model", "vit_base_patch16_96", *short)
    assert "convert it with --model TAG" in result.stdout
    assert tag in result.stdout


def test_convert_a_patch_size(tmp_path: Path) -> None:
    torch.save(medgmae.create_model(NANO).state_dict(), tmp_path / "plain.pth")
    result = run(
        "convert", tmp_path / "plain.pth", tmp_path / "out", "--patch-size", "4,8,8", "--set", "img_size=(16,32,32)"
    )
    assert result.exit_code == 0, result.stderr
    model: Any = medgmae.create_model(f"local-dir:{tmp_path / 'out'}")
    assert model.patch_size == (4, 8, 8)


def test_convert_asks_for_the_grid(tmp_path: Path) -> None:
    model = medgmae.create_model(NANO, img_size=(16, 24, 40))
    torch.nn.init.normal_(model.pos_embed)  # a sine-cosine table would tell its grid
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    result = run("convert", tmp_path / "plain.pth", tmp_path / "out")
    assert result.exit_code == 1
    assert "source_grid" in result.stderr
    result = run("convert", tmp_path / "plain.pth", tmp_path / "out", "--source-grid", "2,3,5")
    assert result.exit_code == 0, result.stderr
    assert same_weights(medgmae.create_model(f"local-dir:{tmp_path / 'out'}"), model)


def test_convert_of_unknown_sizes_says_what_to_type(tmp_path: Path) -> None:
    model = medgmae.create_model(NANO, depth=3)
    torch.save(model.state_dict(), tmp_path / "deep.pth")
    result = run("convert", tmp_path / "deep.pth", tmp_path / "out")
    assert result.exit_code == 2
    assert "--set depth=3" in " ".join(result.stderr.split())
    result = run("convert", tmp_path / "deep.pth", tmp_path / "out", "--model", NANO, "--set", "depth=3")
    assert result.exit_code == 0, result.stderr
    assert same_weights(medgmae.create_model(f"local-dir:{tmp_path / 'out'}"), model)


def test_convert_leaves_a_full_folder_alone(tmp_path: Path, autoencoder: Any) -> None:
    file, out = tangerine_file(tmp_path / "official.pth", autoencoder), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    result = run("convert", file, out)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert os.listdir(out) == ["mine.txt"]
    assert run("convert", file, out, "--overwrite").exit_code == 0
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--model", "vit_nano"], "Did you mean", 1),
        (["--model", NANO, "--set", "dept=3"], "Did you mean 'depth'", 2),
        (["--set", "depth"], "not of the form key=value", 2),
        (["--patch-size", "8,x"], "is not a size", 2),
        (["--model", "vit_tiny_patch8_64"], "does not fit this model", 1),
    ],
)
def test_convert_refuses(options: list[str], message: str, code: int, tmp_path: Path, autoencoder: Any) -> None:
    file = tangerine_file(tmp_path / "official.pth", autoencoder)
    result = run("convert", file, tmp_path / "out", *options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_tab_key_completes_names_and_tags() -> None:
    from click.shell_completion import ShellComplete

    from medgmae.cli import main

    def completed(*words: str) -> set[str]:
        shell = ShellComplete(main, {}, "medgmae", "_MEDGMAE_COMPLETE")
        return {item.value for item in shell.get_completions(list(words[:-1]), words[-1])}

    names = completed("features", "--model", "vit_tiny")
    assert names == {"vit_tiny_patch8_64", "vit_tiny_patch8_64.demo"}
    assert completed("info", "vit_tiny") == names
    assert completed("features", "--input-of", "vit_tiny") == {"vit_tiny_patch8_64.demo"}
