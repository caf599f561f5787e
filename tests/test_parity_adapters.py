"""The comparison with the reference code bases, itself tested on the cases that are shipped: it can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import ADAPTERS, run
from parity.case import Case
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parent / "fixtures"

MODELS = [
    "tangerine/vit_cls_token",
    "tangerine/mae_aniso",
    "glmae/encoder_aniso",
    "glmae/mae3d_sibling_normpix",
    "selfmedmae/mae3d_uva_linear_c1",
    "selfmedmae/mae2d_c3",
    "medgmae/mae3d_baseline",
    "medgmae/model_sincos",
    "medgmae/model_perceptron_imagenorm",
    "mamba_mae/encoder_clsmiddle_norope_p4",
    "mamba_mae/encoder_mean_rope_p4",
    "mamba_mae/finetune_load_p4",
    "mamba_mae/l2s_p4_finetuned",
    "mamba_mae/l2s_p4_pretrained",
    "mamba_mae/mae_grads_p4",
]

# Cases without a file of weights in a container.
PARTS = [
    "colipri/encoder_grids",
    "colipri/heads",
    "colipri/sliding_window",
    "primus/encoder_mae_order",
    "primus/encoder_registers",
    "primus/mae",
    "primus/pos_embed_resize",
    "primus/rope_tables",
    "primus/simmim",
    "selfmedmae/fourier_losses",
    "selfmedmae/pseudo3d_noaffine",
    "selfmedmae/slice2d",
    "selfmedmae/val_transforms",
    "medgmae/decoder",
    "medgmae/ssim3d",
    "medgmae/render_batch",
    "medgmae/render_dense_dyadic",
    "medgmae/render_dense_tiny",
    "medgmae/render_gaussianmodel",
    "medgmae/render_sparse",
    "mamba_mae/block_residual_d24_L21",
    "mamba_mae/conv_silu_L17",
    "mamba_mae/evaluation_5fold_knn",
    "mamba_mae/mixer_v2_nodiv_d20_L16",
    "mamba_mae/position_tables",
    "mamba_mae/preprocess_zscore",
    "mamba_mae/scan_groups_L19",
    "selfmedmae/metrics_brats",
    "selfmedmae/metrics_btcv",
    "selfmedmae/sliding_window",
    "colipri/preprocess_int16",
    "voxelfm/encoder",
    "voxelfm/encoder_head72",
    "voxelfm/encoder_options",
    "voxelfm/features",
    "voxelfm/preprocess_crop_budget",
    "voxelfm/rope_tables",
    "beyond/dino3d_preprocess",
    "beyond/m3d_preprocess",
    "beyond/segvol_preprocess",
]

# Wrappings that training code puts around weights: entry of the container ("" for none) and prefix of the names.
WRAPPINGS = {
    "tangerine": [("model", "module."), ("model_state", ""), ("state_dict", "module.model."), ("", "module.")],
    "glmae": [("student", "module.backbone."), ("state_dict", "backbone."), ("model", "module."), ("", "")],
    "selfmedmae": [("state_dict", "module."), ("", ""), ("model", "_orig_mod.")],
    "mamba_mae": [("model", ""), ("", "module."), ("model", "module._orig_mod.")],
    "medgmae": [("state_dict", ""), ("", "module."), ("state_dict", "module._orig_mod.")],
}


@pytest.mark.parametrize("name", MODELS)
def test_any_wrapping_of_a_file_gives_the_same(name: str, tmp_path: Path) -> None:
    for entry, prefix in WRAPPINGS[name.split("/")[0]]:
        case = Case(SHIPPED / f"{name}.json", tmp_path)
        beside: dict[str, Any] = {"epoch": 3, "args": "Namespace", "optimizer": "state"}
        if entry == "student":
            beside["teacher"] = {f"{prefix}{key}": torch.zeros_like(value) for key, value in case.weights.items()}
        case.spec["container"] = {"layout": {entry: "weights/*", **beside}} if entry else {"kind": "bare"}
        case.spec["container"]["key_prefix"] = prefix
        case.spec.pop("checkpoint_container", None)
        run(case)


def copy(name: str, folder: Path, **spec: Any) -> Path:
    """A case copied to ``folder``, with some entries of its JSON replaced."""
    source, target = SHIPPED / f"{name}.json", folder / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**json.loads(source.read_text()), **spec}))
    shutil.copy(source.with_suffix(".safetensors"), target.with_suffix(".safetensors"))
    if (scans := source.parent / "data").is_dir():
        shutil.copytree(scans, target.parent / "data", dirs_exist_ok=True)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *PARTS])
def test_every_output_is_compared(name: str, tmp_path: Path) -> None:
    file = copy(name, tmp_path)
    # Copies: safetensors may have mapped the file, which is about to be written (0.4.5 does).
    tensors = {key: tensor.clone() for key, tensor in load_file(file.with_suffix(".safetensors")).items()}
    outputs = [key for key in tensors if key.startswith("outputs/")]
    assert outputs
    for key in outputs:
        changed = tensors[key].clone()
        last = changed.view(-1)[-1:]
        last.copy_(last.nan_to_num(-1) + 1)  # NaN is a number then
        save_file({**tensors, key: changed}, file.with_suffix(".safetensors"))
        with pytest.raises(AssertionError, match=key.removeprefix("outputs/")):
            run(Case(file, tmp_path))


def test_an_output_that_no_adapter_knows_fails(tmp_path: Path) -> None:
    file = copy("tangerine/vit_cls_token", tmp_path)
    tensors = load_file(file.with_suffix(".safetensors"))
    save_file({**tensors, "outputs/attention": torch.zeros(2)}, file.with_suffix(".safetensors"))
    with pytest.raises(AssertionError, match="no adapter compared: attention"):
        run(Case(file, tmp_path))


def test_a_kind_without_an_adapter_fails(tmp_path: Path) -> None:
    file = copy("tangerine/vit_cls_token", tmp_path, parity_kind="tangerine/dreams")
    with pytest.raises(AssertionError, match="'tangerine/dreams'"):
        run(Case(file, tmp_path))


def test_a_setting_that_is_not_supported_fails(tmp_path: Path) -> None:
    config = json.loads((SHIPPED / "tangerine/vit_cls_token.json").read_text())["config"]
    file = copy("tangerine/vit_cls_token", tmp_path, config={**config, "qkv_bias": False})
    with pytest.raises(AssertionError, match="qkv_bias=False"):
        run(Case(file, tmp_path))
    file = copy("tangerine/vit_cls_token", tmp_path, config={**config, "registers": 4})
    with pytest.raises(AssertionError, match="registers"):
        run(Case(file, tmp_path))


def test_tensors_that_the_json_lists_must_be_there(tmp_path: Path) -> None:
    file = copy("tangerine/vit_cls_token", tmp_path)
    file.with_suffix(".safetensors").unlink()
    with pytest.raises(AssertionError, match="lacks tensors"):
        Case(file, tmp_path)


def change(entry: Any, *path: str | int) -> Any:
    """A copy of a JSON entry with the number at ``path`` 1 % larger, or the list there one item shorter."""
    changed = json.loads(json.dumps(entry))
    holder = changed
    for step in path[:-1]:
        holder = holder[step]
    value = holder[path[-1]]
    holder[path[-1]] = value[:-1] if isinstance(value, list) else value * 1.01
    return changed


@pytest.mark.parametrize(
    "path",
    [
        ("medgmae_lr", "lr", 5),
        ("medgmae_lr", "lr", 8),
        ("mae3d_lr", "lr", 7),
        ("scale_penalty_weight", "weight", 3),
        ("param_groups", 0, "params"),
        ("param_groups", 1, "weight_decay_scale"),
    ],
    ids=str,
)
def test_every_entry_of_the_schedule_is_compared(path: tuple[Any, ...], tmp_path: Path) -> None:
    spec = json.loads((SHIPPED / "medgmae/training_schedule.json").read_text())
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(change(spec, *path)))
    with pytest.raises(AssertionError, match=path[0]):
        run(Case(file, tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        ("param_groups", "blocks.1.mixer.A_log", "weight_decay"),
        ("param_groups", "blocks.1.mixer.A_log", "lr_scale"),
        ("param_groups", "norm_f.weight", "lr_scale"),
        ("lr_at_epoch", "2.50"),
        ("lr_at_epoch", "100.00"),
    ],
    ids=str,
)
def test_every_entry_of_fine_tuning_is_compared(path: tuple[Any, ...], tmp_path: Path) -> None:
    spec = json.loads((SHIPPED / "mamba_mae/optimisation_groups.json").read_text())
    file = tmp_path / "optimisation.json"
    file.write_text(json.dumps(change(spec, *path)))
    with pytest.raises(AssertionError, match=path[0]):
        run(Case(file, tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        ("visible_counts", "L=100,mask_ratio=0.9"),
        ("unetr_optimizer", "peak_lr"),
        ("unetr_optimizer", "lr_at_epoch_before_layer_scale", "49.99"),
        ("unetr_optimizer", "groups", 6, "lr_scale"),
        ("unetr_optimizer", "groups", 21, "weight_decay"),
        ("unetr_optimizer", "groups", 2, "names"),
        ("mae3d_optimizer", "lr_at_epoch", "5050"),
        ("mae3d_optimizer", "groups", 0, "weight_decay"),
        ("mae3d_optimizer", "groups", 1, "names"),
    ],
    ids=str,
)
def test_every_entry_of_selfmedmae_training_is_compared(path: tuple[Any, ...], tmp_path: Path) -> None:
    spec = json.loads((SHIPPED / "selfmedmae/trainer_behaviour.json").read_text())
    file = tmp_path / "trainer.json"
    file.write_text(json.dumps(change(spec, *path)))
    with pytest.raises(AssertionError, match="mae3d" if "mae3d" in path[0] else "unetr|visible"):
        run(Case(file, tmp_path))


@pytest.mark.parametrize("path", [("aggregate_over_batches_of_one", name) for name in ("Dice", "cls8_Dice", "HD")])
def test_every_mean_of_a_segmentation_is_compared(path: tuple[str, str], tmp_path: Path) -> None:
    name = "selfmedmae/metrics_btcv"
    spec = change(json.loads((SHIPPED / f"{name}.json").read_text()), *path)
    with pytest.raises(AssertionError, match=path[1]):
        run(Case(copy(name, tmp_path, **{path[0]: spec[path[0]]}), tmp_path))


@pytest.mark.parametrize("entry", ["n_parameters", "n_parameters_trainable", "n_state_dict_elements", "num_patches"])
@pytest.mark.parametrize("name", ["mae_3d_vim_small_patch16", "vim_3D_small_patch16_stride16_224_bimambav2_*"])
def test_what_a_manifest_states_is_compared(name: str, entry: str, tmp_path: Path) -> None:
    file = next((SHIPPED / "mamba_mae").glob(f"manifest_{name}.json"))
    spec = json.loads(file.read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**spec, entry: spec[entry] + 1}))
    with pytest.raises(AssertionError, match=r"patches|parameters|elements"):
        run(Case(tmp_path / "manifest.json", tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        ("grad_norms_of_loss", "encoder_pos_embed"),
        ("grad_norms_of_loss", "decoder.rotation_head.weight"),
        ("grad_norms_of_loss", "encoder.blocks.0.attn.qkv.weight"),
        ("visible_tokens",),
        ("parameters",),
    ],
    ids=str,
)
def test_what_a_model_case_states_is_compared(path: tuple[Any, ...], tmp_path: Path) -> None:
    name = "medgmae/model_perceptron_imagenorm"
    spec = change(json.loads((SHIPPED / f"{name}.json").read_text()), *path)
    with pytest.raises(AssertionError, match=path[-1].split("_")[0]):
        run(Case(copy(name, tmp_path, **{path[0]: spec[path[0]]}), tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        ("per_fold_metrics", 3, "roc_auc_score"),
        ("per_fold_metrics", 4, "acc1"),
        ("average_metrics", "specificity"),
        ("global_metrics", "f1_score"),
        ("global_metrics", "sensitivity"),
        ("knn_metrics", "knn_auc"),
        ("knn_metrics", "knn_f1"),
        ("knn_metrics", "knn_acc"),
    ],
    ids=str,
)
def test_every_metric_is_compared(path: tuple[Any, ...], tmp_path: Path) -> None:
    name = "mamba_mae/evaluation_5fold_knn"
    spec = change(json.loads((SHIPPED / f"{name}.json").read_text()), *path)
    with pytest.raises(AssertionError, match=path[-1]):
        run(Case(copy(name, tmp_path, **{path[0]: spec[path[0]]}), tmp_path))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"atol": 1e-5, "rtol": 1e-4}, (1e-5, 1e-4)),
        ({"rtol": 1e-9}, (0.0, 1e-9)),
        ("rtol 1e-4, atol 1e-5", (1e-5, 1e-4)),
        ("atol 2e-5 (float32 sin of arguments up to about 12)", (2e-5, 0.0)),
        ("exact", (0.0, 0.0)),
        ({"features": {"atol": 1e-3}, "pos_embed": 1e-6}, (1e-6, 0.0)),
        ("atol 1e-5 (rtol 1e-3)", (1e-5, 1e-3)),
        ("rtol 2e-4, atol 1e-3 (pos_embed); 2e-4 (gradients)", (1e-3, 2e-4)),
        (2e-5, (2e-5, 0.0)),
    ],
)
def test_tolerances_in_every_spelling(tmp_path: Path, stated: Any, expected: tuple[float, float]) -> None:
    case = Case(copy("tangerine/vit_cls_token", tmp_path, tolerance=stated), tmp_path)
    assert case.tolerance("pos_embed") == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("rtol 2e-4, atol 1e-2*max (values); 2e-4*max (gradients)", (0.04, 2e-4)),
        ({"values": "max|diff| <= 2.0e-02 * max|value|", "gradients": 1e-3}, (0.08, 0.0)),
    ],
)
def test_a_part_of_the_largest_value_is_taken_of_the_output(
    tmp_path: Path, stated: Any, expected: tuple[float, float]
) -> None:
    case = Case(copy("tangerine/vit_cls_token", tmp_path, tolerance=stated), tmp_path)
    assert case.tolerance("values", expected=torch.tensor([1.0, -4.0])) == pytest.approx(expected)
    with pytest.raises(AssertionError, match="largest value"):
        case.tolerance("values")


def test_every_adapter_has_a_shipped_case() -> None:
    run(Case(SHIPPED / "medgmae/patchify.json", SHIPPED))
    kinds = {json.loads(file.read_text())["parity_kind"] for file in SHIPPED.glob("*/*.json")}
    assert kinds == set(ADAPTERS)
