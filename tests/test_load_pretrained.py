"""Files through load_pretrained: what is read, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from dialects import CONTAINERS, to_masked_autoencoder, to_timm_encoder
from small_models import assert_same_state, randomize, state_copy

import medgmae
from medgmae import WeightsError

ENCODER = "vit_nano_patch8_32"
SOURCE = state_copy(randomize(medgmae.create_model(f"mae_{ENCODER}")))
STATE = to_timm_encoder(SOURCE)
EXPECTED = {name.removeprefix("encoder."): value for name, value in SOURCE.items() if name.startswith("encoder.")}


def nano(**options: Any) -> Any:
    return randomize(medgmae.create_model(ENCODER, **options), seed=8)


def refused(source: Any, match: str, model: Any = None, **options: Any) -> str:
    """Refused with a message, the model unchanged."""
    model = model or nano()
    before = state_copy(model)
    with pytest.raises(WeightsError, match=match) as error:
        medgmae.load_pretrained(model, source, **options)
    assert_same_state(model, before)
    return str(error.value)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    content = {"model": STATE, "args": Evil(marker)}
    path = saved(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=zipped)
    message = refused(path, "posix.system")
    assert "refused" in message
    assert "save that with torch.save" in message
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_path_among_the_arguments_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    args = argparse.Namespace(output=pathlib.PosixPath("/tmp/out"))
    path = saved(tmp_path / "path.pth", {"model": STATE, "args": args}, _use_new_zipfile_serialization=zipped)
    refused(path, r"pathlib.*PosixPath")


def test_several_forbidden_names_are_all_listed(tmp_path: Path) -> None:
    content = {"model": STATE, "a": pathlib.PosixPath("/x"), "b": slice(1), "c": Evil(tmp_path / "no")}
    message = refused(saved(tmp_path / "many.pth", content), "refused")
    assert all(name in message for name in ("PosixPath", "slice", "posix.system"))


@pytest.mark.parametrize(
    "metric",
    [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(3), np.int32(3), np.uint8(3), np.bool_(True)],
    ids=lambda value: type(value).__name__,
)
def test_numpy_scalars_beside_the_weights_are_read(tmp_path: Path, metric: Any) -> None:
    path = saved(tmp_path / "best.pth", {"state_dict": STATE, "metric": metric, "best": {"dice": [metric]}})
    model = nano()
    medgmae.load_pretrained(model, path)
    assert_same_state(model, EXPECTED)


@pytest.mark.parametrize("container", CONTAINERS)
def test_legacy_files_are_read(tmp_path: Path, container: str) -> None:
    path = saved(tmp_path / "old.pth.tar", CONTAINERS[container](STATE), _use_new_zipfile_serialization=False)
    model = nano()
    medgmae.load_pretrained(model, path)
    assert_same_state(model, EXPECTED)


@pytest.mark.parametrize(
    "content", [OrderedDict(STATE), {"model": OrderedDict(STATE)}, dict(STATE)], ids=["ordered", "inside", "plain"]
)
def test_kinds_of_dictionaries(tmp_path: Path, content: Any) -> None:
    model = nano()
    medgmae.load_pretrained(model, saved(tmp_path / "a.bin", content))
    assert_same_state(model, EXPECTED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [True, False])
def test_other_precisions_become_the_models(tmp_path: Path, dtype: torch.dtype, build: bool) -> None:
    state = {name: value.to(dtype) for name, value in EXPECTED.items()}
    path = saved(tmp_path / "half.pth", state)
    model: Any = medgmae.create_model(ENCODER, pretrained=str(path)) if build else nano()
    medgmae.load_pretrained(model, path)
    assert_same_state(model, {name: value.float() for name, value in state.items()})


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    if kind == "safetensors":
        path = medgmae.save_pretrained(nano(), tmp_path / "folder") / "model.safetensors"
    else:
        path = saved(tmp_path / "cut.pth", CONTAINERS["mae"](STATE), _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "fetch it again")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "expected a dictionary of weights, found list"),
        (torch.ones(3), "expected a dictionary of weights, found Tensor"),
        ({}, "no weights found.*found nothing"),
        ({"epoch": 3, "lr": 0.1}, "found 'epoch', 'lr'"),
        ({"teacher": STATE, "epoch": 3}, "not taken without being asked for: pass .*none.pth::teacher"),
        ({"model": {}, "optimizer": {}}, "no weights found"),
        ({"model": {"model": {"model": {"model": {"model": {"model": STATE}}}}}}, "no weights found"),
    ],
)
def test_files_without_weights_say_what_they_hold(tmp_path: Path, content: Any, match: str) -> None:
    refused(saved(tmp_path / "none.pth", content), match)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    refused(tmp_path / "missing.pth", "no such file")
    refused(tmp_path, "expected model.safetensors in this folder, found nothing")
    (tmp_path / "text.pth").write_text("404: Not Found")
    refused(tmp_path / "text.pth", "cannot be read as a PyTorch checkpoint")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    refused(tmp_path / "text.safetensors", "not a safetensors file")


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    state = {**STATE, "norm.weight": torch.empty(48, device="meta")}
    path = saved(tmp_path / "hollow.pth", state)
    refused(path, "'norm.weight' is without values")
    with pytest.raises(WeightsError, match="without values"):
        medgmae.create_model(ENCODER, pretrained=str(path))
    refused(state, "norm.weight: no values in the file")


def test_whole_numbers_are_not_weights() -> None:
    refused({**STATE, "norm.weight": torch.ones(48, dtype=torch.int32)}, r"norm.weight: torch\.int32")
    refused({**STATE, "cls_token": STATE["cls_token"].long()}, "'cls_token' is of torch.int64")


def test_a_head_for_other_classes_is_dropped_and_said() -> None:
    ten = nano(num_classes=10)
    five = nano(num_classes=5)
    head = state_copy(five.head)
    report = medgmae.load_pretrained(five, ten.state_dict())
    assert report.unused == {
        name: f"head of shape {shape}, the model's is {other}"
        for name, shape, other in (("head.weight", (10, 48), (5, 48)), ("head.bias", (10,), (5,)))
    }
    assert report.missing == ["head.weight", "head.bias"]
    assert_same_state(five.head, head)
    assert "randomly initialised: head.weight" in str(report)
    same = nano(num_classes=10)
    assert "head.weight" in medgmae.load_pretrained(same, ten.state_dict()).loaded
    assert_same_state(same, state_copy(ten))


def test_a_deeper_file_does_not_fit_a_shallower_model() -> None:
    deep = nano(depth=3).state_dict()
    for strict in (True, False):
        message = refused(deep, "blocks.2.norm1.weight: in the file", strict=strict)
        assert "and 0 more" not in message
    refused(nano().state_dict(), "blocks.2.norm1.weight: not in the file", nano(depth=3))


def test_another_pooling_keeps_what_it_can() -> None:
    cls, mean = nano(), nano(global_pool="avg")
    report = medgmae.load_pretrained(mean, cls.state_dict())
    assert report.unused == {
        f"norm.{part}": "last norm of the tokens: the model normalises the pooled vector instead"
        for part in ("weight", "bias")
    }
    assert report.missing == ["fc_norm.weight", "fc_norm.bias"]
    refused(mean.state_dict(), "norm.weight: not in the file", cls)


def test_another_module_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"got Linear.*create_model"):
        medgmae.load_pretrained(torch.nn.Linear(2, 2), STATE)


def test_wrappers_are_taken_off() -> None:
    model = nano()
    medgmae.load_pretrained(torch.nn.DataParallel(torch.compile(model)), STATE)
    assert_same_state(model, EXPECTED)


@pytest.mark.parametrize("options", [{"num_heads": 4}, {"norm_eps": 1e-3}])
def test_settings_that_no_tensor_shows_must_agree(tmp_path: Path, options: dict[str, Any]) -> None:
    """Other heads or another epsilon compute other features from the same weights: the saved config tells."""
    medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32", **options), tmp_path)
    with pytest.raises(medgmae.WeightsError, match=r"in the file's model, .* in this one"):
        medgmae.load_pretrained(medgmae.create_model("vit_nano_patch8_32"), tmp_path)
    medgmae.load_pretrained(medgmae.create_model("vit_nano_patch8_32", **options), tmp_path)


def test_the_sigmoid_of_a_saved_autoencoder_must_agree(tmp_path: Path) -> None:
    medgmae.save_pretrained(medgmae.create_model("mae_vit_nano_patch8_32", sigmoid=True), tmp_path)
    with pytest.raises(medgmae.WeightsError, match=r"decoder\.sigmoid: True in the file"):
        medgmae.load_pretrained(medgmae.create_model("mae_vit_nano_patch8_32"), tmp_path)


def test_the_grid_of_a_sine_cosine_table_is_read_off_the_table() -> None:
    """64 rows of 8 x 4 x 2 are also a cube; the table itself tells them apart."""
    slab = medgmae.create_model("vit_nano_patch8_32", img_size=(64, 32, 16))
    model = medgmae.create_model("vit_nano_patch8_32")
    report = medgmae.load_pretrained(model, slab.state_dict())
    assert report.resized == {"pos_embed": "grid (8, 4, 2) to (4, 4, 4)"}
    expected = medgmae.resample_pos_embed(slab.pos_embed, (8, 4, 2), (4, 4, 4))
    assert torch.equal(model.pos_embed, expected)


def test_a_class_token_is_not_dropped_in_silence() -> None:
    model = medgmae.create_model("vit_nano_patch8_32", class_token=False, global_pool="avg", fc_norm=False)
    file = medgmae.create_model("vit_nano_patch8_32").state_dict()
    with pytest.raises(medgmae.WeightsError, match="cls_token: in the file"):
        medgmae.load_pretrained(model, file)
    report = medgmae.load_pretrained(model, file, strict=False)
    assert report.unused == {"cls_token": "class token: the model has none"}


def test_loading_keeps_dtype_gradients_and_identity_of_the_parameters() -> None:
    model = nano().double()
    before = dict(model.named_parameters())
    medgmae.load_pretrained(model, STATE)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(value.dtype == torch.float64 for value in after.values())
    assert not model.pos_embed.requires_grad
    assert model.cls_token.requires_grad
    assert_same_state(model, {name: value.double() for name, value in EXPECTED.items()})


def test_an_encoder_gets_the_encoder_of_an_autoencoder_and_says_so() -> None:
    model = nano()
    report = medgmae.load_pretrained(model, to_masked_autoencoder(SOURCE))
    assert_same_state(model, EXPECTED)
    assert set(report.unused.values()) == {"decoder"}
    assert str(report).startswith("state dictionary (masked autoencoder with timm's names): ")
    assert f"unused (decoder): {len(report.unused)} tensors" in str(report)


def rewrite_header(path: Path, change: Any) -> None:
    """Replace the JSON header of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("grid", ["[4, 4]", "[4, 4, 5]", '"cube"', "[4.0, 4, 4]", "[-4, -4, 4]"])
def test_a_config_that_lies_about_its_grid_is_refused(tmp_path: Path, grid: str) -> None:
    folder = medgmae.save_pretrained(nano(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "grid": json.loads(grid)}))
    refused(folder, "grid")


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = medgmae.save_pretrained(nano(), tmp_path) / "model.safetensors"
    original = path.read_bytes()
    for change in (
        lambda header: header.pop("norm.weight"),
        lambda header: header["norm.weight"].update(dtype="I32"),
        lambda header: header["norm.weight"].update(shape=[47]),
        lambda header: header["norm.weight"]["data_offsets"].reverse(),
        lambda header: header["__metadata__"].update(medgmae="{"),
        lambda header: header["__metadata__"].update(medgmae="3"),
    ):
        path.write_bytes(original)
        rewrite_header(path, change)
        refused(path, "norm.weight|not a readable safetensors file|should be a JSON object|not valid JSON")


def test_the_fuzzer_finds_nothing_in_a_short_run() -> None:
    """The full run has 10,000 files: python tests/fuzz/fuzz_checkpoints.py --count 10000."""
    script = Path(__file__).parent / "fuzz/fuzz_checkpoints.py"
    done = warm_python.run(script, "--count", "200", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 files" in done.stdout


@pytest.mark.parametrize("name", [7, torch.float32, torch.zeros(1).untyped_storage()], ids=["int", "dtype", "storage"])
def test_names_that_are_no_text_are_refused(name: Any) -> None:
    with pytest.raises(medgmae.WeightsError, match="the name of a weight is of type"):
        medgmae.load_pretrained(nano(), {**STATE, name: torch.zeros(1)})


def test_a_report_is_short_in_a_console_and_a_table_in_a_notebook() -> None:
    report = medgmae.load_pretrained(nano(), to_masked_autoencoder(SOURCE))
    loaded, unused = len(report.loaded), len(report.unused)
    counts = f"loaded={loaded}, resized=0, adapted=0, unused={unused}, missing=0"
    assert repr(report) == f"LoadReport({report.source!r}, {counts})"
    table = report._repr_html_()
    assert f"<tr><th>unused: {unused} tensors</th><td>decoder</td></tr>" in table
    assert table.count("<tr>") == 3


def test_what_looks_like_markup_in_a_file_is_not_run_by_a_notebook(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    report = medgmae.load_pretrained(
        nano(num_classes=2), {**nano(num_classes=2).state_dict(), script: torch.ones(1)}, strict=False
    )
    assert script in report.unused
    shown = medgmae.LoadReport(script, resized={script: script}, adapted={"&": '"'}, unused={"a": script})
    assert "<script>" not in shown._repr_html_()
    assert "&lt;script&gt;" in shown._repr_html_()


def test_options_are_named() -> None:
    with pytest.raises(TypeError, match="cachedir"):
        medgmae.load_pretrained(nano(), STATE, cachedir="/tmp")  # type: ignore[call-arg]


def test_settings_of_a_decoder_that_is_not_taken_do_not_matter(tmp_path: Path) -> None:
    """Another type of decoder is left out whole: its number of heads is no reason to refuse the encoder."""
    voxels = randomize(medgmae.create_model(f"mae_{ENCODER}", decoder_num_heads=4, sigmoid=True))
    medgmae.save_pretrained(voxels, tmp_path)
    model: Any = medgmae.create_model(f"gmae_{ENCODER}")
    refused(tmp_path, "another type of decoder than the model's GaussianDecoder; strict=False", model)
    report = medgmae.load_pretrained(model, tmp_path, strict=False)
    assert report.adapted == {}
    assert all(name.startswith("decoder.") for name in report.missing)
    assert_same_state(model.encoder, state_copy(voxels.encoder))


def test_a_setting_names_the_option_that_decides_it(tmp_path: Path) -> None:
    medgmae.save_pretrained(medgmae.create_model(ENCODER, num_heads=4), tmp_path)
    refused(tmp_path, r"num_heads: 4 in the file's model, 3 in this one; build it with .*num_heads=4")
