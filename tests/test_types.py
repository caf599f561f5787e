"""What a type checker sees of the library in a user's code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import medgmae
from medgmae.models import names

USER = """
import torch
from torch import Tensor

import medgmae

scan = torch.rand(1, 1, 64, 64, 64)
model = medgmae.create_model("vit_tiny_patch8_64.demo", num_classes=2)
features: int = model.num_features
tokens: Tensor = model.forward_features(scan)
logits: Tensor = model(scan)
maps: list[Tensor] = model.forward_intermediates(scan, indices=[3, 6], intermediates_only=True)
model.reset_classifier(3, "avg")
mae = medgmae.create_model("mae_vit_tiny_patch8_64")
loss: Tensor = mae(scan).loss
picture: Tensor = mae.reconstruct(scan)
gmae = medgmae.create_model("gmae_vit_tiny_patch8_64")
centres: Tensor = gmae(scan, mask_ratio=0.5).gaussians.means
rendered: Tensor = medgmae.GaussianRenderer()(gmae(scan).gaussians, 64)
half: medgmae.Gaussians = gmae.gaussians(scan).to(torch.float64)[0]


def by_any_name(name: str) -> int:
    anything = medgmae.create_model(name)
    anything.forward_features(scan)
    return anything.num_features


rows: Tensor = medgmae.patchify(scan, 8)
volume: Tensor = medgmae.ops.voxelize(half.means, half.scales, half.quats, half.densities, (8, 8, 8))
scan_of_mine = medgmae.read_volume("scan.nii.gz")
scan_features = medgmae.extract_features(model, scan_of_mine)
vector: Tensor = scan_features.pooled
medgmae.write_volume(scan_features.map, "features.nrrd")
labels: medgmae.Volume = medgmae.patch_labels(scan_of_mine, scan_features.map)
lost: list[str] = model.load_report.missing
report: medgmae.LoadReport = medgmae.load_pretrained(model, "file.pth")
"""


def test_a_users_code_is_typed(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(USER)
    # With what `make lint` has kept of torch and of this package, which is read for half a minute otherwise.
    command = [sys.executable, "-m", "mypy", "--strict", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(medgmae.__file__).parent.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(n for n in medgmae.__all__ if inspect.isfunction(getattr(medgmae, n))))
def test_public_functions_return_something_known(name: str) -> None:
    hint = getattr(medgmae, name).__annotations__["return"]  # as written
    assert not re.search(r"\bAny\b", hint.replace("dict[str, Any]", "")), hint  # but for what goes into JSON


def test_names_of_models_have_types() -> None:
    families = [
        "vit_*",
        "vit2d_*",
        "vim_*",
        "primus_*",
        "mae_vit_*",
        "mae_hiend_vit_*",
        "mae2d_vit_*",
        "mae_vim_*",
        "mae_primus_*",
        "simmim_primus_*",
        "gmae_vit_*",
        "glmae_*",
    ]  # others work without their names there
    every = {*medgmae.list_models(families), *medgmae.list_weights(families)}
    listed = {
        "Encoder": typing.get_args(names.EncoderName),
        "MaskedAutoencoder": typing.get_args(names.VoxelName),
        "GaussianMAE": typing.get_args(names.GaussianName),
    }
    assert {n for group in listed.values() for n in group} == every
    for kind, group in listed.items():
        for name in group:
            starts = {
                "Encoder": ("vi", "primus_"),
                "MaskedAutoencoder": ("mae", "simmim_", "glmae_"),
                "GaussianMAE": ("gmae_",),
            }
            assert name.startswith(starts[kind])


def test_completion_shows_public_names_only() -> None:
    assert set(dir(medgmae)) == {*medgmae.__all__, *medgmae._MODULES}
    assert all(hasattr(medgmae, name) for name in dir(medgmae))
