"""What users and strangers put in the place of weights: other formats, addresses, headers and configs that lie."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from small_models import assert_same_state, randomize, state_copy

import medgmae
from medgmae import WeightsError
from medgmae.checkpoints.safetensors_files import MAX_HEADER

ENCODER = "vit_nano_patch8_32"
STATE = state_copy(randomize(medgmae.create_model(ENCODER)))


def nano(**options: Any) -> Any:
    return randomize(medgmae.create_model(ENCODER, **options), seed=8)


def refused(source: Any, match: str) -> str:
    """Refused with a message that can be printed, the model unchanged."""
    model = nano()
    before = state_copy(model)
    with pytest.raises(WeightsError, match=match) as error:
        medgmae.load_pretrained(model, source)
    assert_same_state(model, before)
    assert all(char.isprintable() or char == "\n" for char in str(error.value))
    return str(error.value)


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


OTHERS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "Git LFS.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "gzip": (gzip.compress(b"x" * 100), r"compressed \(gzip\); unpack"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
    "npz": (numpy_archive(), "an archive of numpy arrays"),
    "keras": (zipped(**{"model.weights.h5": b"x"}), "a model of Keras"),
    "zip": (zipped(**{"model.pth": b"x"}), "unpack it, and load the weight file inside"),
    "script": (zipped(**{"a/data.pkl": b"x", "a/constants.pkl": b"x"}), "torch.jit.load"),
    "export": (zipped(**{"a/archive_format": b"pt2"}), "torch.export.load"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("content", "match"), OTHERS.values(), ids=OTHERS)
def test_other_formats_are_named_with_what_to_do(tmp_path: Path, content: bytes, match: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    assert "fetch it again" not in refused(path, match)


def test_text_is_called_text(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b'{"error": "not found"}')
    refused(tmp_path / "x.pth", "it is text, which begins with .*not found")


def test_the_content_of_a_file_decides_and_not_its_name(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "zip.safetensors")
    # The length of this header begins like gzip: what stands before a brace is a length, whatever it looks like.
    body = save(STATE)
    length = struct.unpack("<Q", body[:8])[0]
    padded = body[8 : 8 + length].ljust(0x8B1F)
    (tmp_path / "tensors.bin").write_bytes(struct.pack("<Q", len(padded)) + padded + body[8 + length :])
    for name in ("zip.safetensors", "tensors.bin"):
        model = nano()
        medgmae.load_pretrained(model, tmp_path / name)
        assert_same_state(model, STATE)


def test_headers_of_safetensors_are_bounded_and_name_nothing_twice(tmp_path: Path) -> None:
    body = save(STATE)
    length = struct.unpack("<Q", body[:8])[0]
    header, values = body[8 : 8 + length].rstrip(), body[8 + length :]
    entries = json.loads(header)
    entries["norm.weight"], entries["norm.bias"] = entries["norm.bias"], entries["norm.weight"]
    for name, text, match in (
        ("twice", header[:-1] + b", " + json.dumps(entries).encode()[1:], "names '.*' twice"),
        ("long", header.ljust(MAX_HEADER + 1), f"{MAX_HEADER} at most"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + values)
        refused(path, match)


def test_patches_out_of_measure_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused({**STATE, "patch_embed.proj.weight": torch.zeros(48, 1, 8000, 1, 1)}, "in the file, .* in the model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # the matrix had 512 MB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_adapted_in_float32(dtype: torch.dtype) -> None:
    half = {name: value.to(dtype) for name, value in STATE.items()}
    half["patch_embed.proj.weight"] = torch.full((48, 2, 8, 8, 8), 6e4, dtype=dtype)  # two of them overflow float16
    models = [nano(img_size=48, patch_size=6) for _ in range(2)]
    medgmae.load_pretrained(models[0], half)
    medgmae.load_pretrained(models[1], {name: value.float() for name, value in half.items()})
    assert_same_state(models[0], state_copy(models[1]))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("https://example.com/x.pth", "an address, expected a path; download"),
        ("file:///tmp/x.pth", "leave out 'file://'"),
        ("", "'' is not a path"),
        ("a\0b.pth", "is not a path"),
        ("~nobody_of_that_name/x.pth", "no such home folder"),
        ("x" * 5000 + ".pth", "5004 characters are too long"),
        (Path("y" * 300 + ".pth"), "too long for a path"),
        (Path(os.devnull), "neither a file nor a folder"),
        (Path(os.fsdecode(b"gone\xff.pth")), "no such file"),
    ],
    ids=["https", "file", "empty", "nul", "home", "long", "long path", "device", "bytes"],
)
def test_what_cannot_be_a_path_says_what_to_write(source: Any, match: str) -> None:
    refused(source, match)
    with pytest.raises(WeightsError, match=match):
        medgmae.inspect_checkpoint(source)
    if isinstance(source, str) and not source.startswith(("https", "file")):
        with pytest.raises(WeightsError):
            medgmae.save_pretrained(nano(), f"{source}x" if source.startswith("a") else source)


@pytest.mark.parametrize("source", [3, b"x.pth", [1], None, torch.nn.Linear(1, 1)], ids=repr)
def test_what_is_no_source_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match=r"named by text or a path.*state_dict\(\)"):
        medgmae.load_pretrained(nano(), source)


@pytest.mark.parametrize(
    "grid", ["abc", 64, (0, 4, 16), (-4, -4, 4), (4.0, 4, 4), (True, 8, 8), (4, 4, 4, 1)], ids=repr
)
def test_a_grid_that_is_none_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match="source_grid must be patches per axis"):
        medgmae.load_pretrained(nano(), STATE, source_grid=grid)


def test_arguments_are_checked_though_nothing_needs_them() -> None:
    with pytest.raises(WeightsError, match="has 2 axes, the file's patches have 3"):
        medgmae.load_pretrained(nano(), STATE, source_grid=(8, 8))
    with pytest.raises(ValueError, match="inflate must be"):
        medgmae.load_pretrained(nano(), STATE, inflate="bogus")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["reg_token\x1b[2J", "norm.\u202eweight", "blocks.0.x\nfine", ""], ids=ascii)
def test_names_that_cannot_be_printed_are_refused(name: str) -> None:
    refused({**STATE, name: torch.ones(1)}, "the name of a weight is .*, expected text that can be printed")


def test_containers_do_not_steer_a_terminal(tmp_path: Path) -> None:
    torch.save({"x\x1b[31m": STATE}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"x\\x1b\[31m")


def test_a_config_of_another_edition_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = medgmae.save_pretrained(nano(), tmp_path)
    other = medgmae.save_pretrained(nano(num_heads=6), tmp_path / "other")
    (folder / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(WeightsError, match="num_heads: 3 in the file's model, 6 in this one"):
        medgmae.create_model(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "options", [{"num_heads": 3.0}, {"num_heads": True}, {"norm_eps": "1e-6"}, {"norm_eps": -1}], ids=str
)
def test_options_of_another_type_are_refused_when_a_model_is_built(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(num_heads|norm_eps) must be"):
        medgmae.create_model(ENCODER, **options)


@pytest.mark.parametrize(
    "names",
    [["a\ud800", "b"], {"a", "b"}, ["x" * 600_000] * 2, iter("ab")],
    ids=["surrogate", "set", "long", "iterator"],
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, names: Any) -> None:
    model = nano(num_classes=2)
    model.label_names = names
    with pytest.raises(WeightsError):
        medgmae.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_odd_models_and_folders_are_not_saved(tmp_path: Path) -> None:
    for card in ("x", {"tag": 3}):
        model = nano()
        model.pretrained_cfg = card
        with pytest.raises(WeightsError, match=r"model\.pretrained_cfg|weight card 3"):
            medgmae.save_pretrained(model, tmp_path)
    with pytest.raises(WeightsError, match="head_hidden is 70 long"):
        medgmae.save_pretrained(nano(num_classes=2, head_hidden=[4] * 70), tmp_path)
    with pytest.raises(WeightsError, match="push_to_hub"):
        medgmae.save_pretrained(nano(), "hf-hub:org/repo")
    assert medgmae.save_pretrained(nano(), f"local-dir:{tmp_path}/here") == tmp_path / "here"


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    model = nano(img_size=np.int64(32), drop_path_rate=np.float32(0.5))
    folder = medgmae.save_pretrained(model, tmp_path)
    assert_same_state(medgmae.create_model(f"local-dir:{folder}"), state_copy(model))
