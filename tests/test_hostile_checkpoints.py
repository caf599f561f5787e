"""Files and configs that mean harm: one clear error of ours in a second, or the right weights; nothing runs."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from dialects import to_glmae, to_timm_encoder
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import WeightsError

FUZZ = Path(__file__).parent / "fuzz"
ENCODER = "vit_nano_patch8_32"
STATE = state_copy(randomize(medgmae.create_model(ENCODER)))

# What a pickle pushes. The dtype is object, for which numpy's scalar reads a pointer from no memory.
SCALAR = (
    b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0O8K\0K\x01\x87R"
    b"c_codecs\nencode\nX\x08\0\0\0" + bytes(8) + b"X\x06\0\0\0latin1\x86R\x86R"
)
DEPTH = 250_000  # Python ends with a crash when it hashes tuples in one another, 200,000 deep
PUSHES = {
    "scalar of objects": SCALAR,
    "dtype of 2 GB": b"cnumpy\ndtype\nX\x0b\0\0\0V2000000000K\0K\x01\x87R",
    "bytearray of 8 GB": b"cbuiltins\nbytearray\n\x8a\x05" + (8 * 10**9).to_bytes(5, "little") + b"\x85R",
    "deep tuple": b")" + b"\x85" * DEPTH,
    "deep set": b"cbuiltins\nset\n](" + b")" + b"\x85" * DEPTH + b"e\x85R",
}


def nano(**options: Any) -> Any:
    return randomize(medgmae.create_model(ENCODER, **options), seed=8)


def refused(source: Any, match: str, **options: Any) -> str:
    """Refused with a message within seconds, the model unchanged."""
    model = nano()
    before = state_copy(model)
    begin = time.process_time()
    with pytest.raises(WeightsError, match=match) as error:
        medgmae.load_pretrained(model, source, **options)
    assert time.process_time() - begin < 5
    assert_same_state(model, before)
    return str(error.value)


def with_pickle(path: Path, pickle: bytes, zipped: bool) -> Path:
    """A file of torch.save, in either layout, with this pickle and no tensors."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle)
            archive.writestr("archive/version", "3\n")
        return path
    torch.save({}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    empty = b"\x80\x02}q\x00."
    assert content.count(empty) == 1
    path.write_bytes(content.replace(empty, pickle))
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES)
def test_pickles_that_crash_or_take_memory(tmp_path: Path, push: bytes, zipped: bool) -> None:
    refused(with_pickle(tmp_path / "whole.pth", b"\x80\x02" + push + b".", zipped), "expected a dictionary of weights")
    refused(with_pickle(tmp_path / "key.pth", b"\x80\x02}" + push + b"K\x01s.", zipped), "no weights found")


def test_a_harmless_file_with_a_hostile_value_beside_the_weights_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as archive, zipfile.ZipFile(tmp_path / "odd.pth", "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = content[:-1] + b"X\x06\0\0\0metric" + SCALAR + b"s."
            copy.writestr(name, content)
    model = nano()
    medgmae.load_pretrained(model, tmp_path / "odd.pth")
    assert_same_state(model, STATE)


def test_pickles_and_archives_have_bounds(tmp_path: Path) -> None:
    long = with_pickle(tmp_path / "long.pth", b"\x80\x02" + b"N0" * 300_000 + b"}.", True)
    refused(long, "more than 500000 operations")
    with zipfile.ZipFile(tmp_path / "many.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for number in range(80_000):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{number}"), b"")
    refused(tmp_path / "many.pth", "its directory has [0-9]+ bytes")
    refused({f"blocks.{i}.a": torch.zeros(1) for i in range(20_001)}, "20001 entries, expected 20000 at most")
    refused({"model." * 200_000 + "a.b": torch.zeros(1)}, "1200003 characters")


@pytest.mark.parametrize("layout", ["zip", "legacy", "memory"])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(48).to_sparse(), "'norm.weight' is sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.qint8), "'norm.weight' is quantized"),
        (torch.ones(48).to(torch.float8_e4m3fn), "'norm.weight' is of type torch.float8_e4m3fn"),
        (torch.ones(48, dtype=torch.complex64), "'norm.weight' is of type torch.complex64"),
        (torch.ones(1).expand(10**9), r"'norm.weight' is expanded to \(1000000000,\)"),
        (torch.ones(95).as_strided((48, 48), (1, 1)), r"'norm.weight' is expanded to \(48, 48\)"),
        (torch.full((48,), float("nan")), "1 tensors have NaN or infinite values.*: norm.weight"),
        (torch.full((48,), 1e300, dtype=torch.float64), "infinite in the model's type: norm.weight"),
    ],
    ids=["sparse", "quantized", "fp8", "complex", "expanded", "windows", "nan", "too large"],
)
@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning")
def test_odd_tensors_are_refused_by_name(tmp_path: Path, value: Any, match: str, layout: str) -> None:
    state: Any = {**STATE, "norm.weight": value() if callable(value) else value}
    if layout != "memory":
        torch.save(state, tmp_path / "odd.pth", _use_new_zipfile_serialization=layout == "zip")
        state = tmp_path / "odd.pth"
    refused(state, match)
    with pytest.raises(WeightsError, match=match):
        medgmae.create_model(ENCODER, pretrained=state)


def test_values_that_are_not_finite_can_be_asked_for() -> None:
    state = {**STATE, "norm.weight": torch.full((48,), float("nan"))}
    model = medgmae.create_model(ENCODER, pretrained=state, allow_nonfinite=True)
    assert model.norm.weight.isnan().all()
    huge = {**STATE, "norm.weight": torch.full((48,), 3e38)}  # finite, though its sum is not
    medgmae.load_pretrained(nano(), huge)


@pytest.mark.parametrize("layout", ["zip", "legacy", "memory"])
def test_shared_memory_does_not_tie_parameters(tmp_path: Path, layout: str) -> None:
    pool = torch.arange(96.0)
    state: Any = {**STATE, "norm.weight": pool[:48], "norm.bias": pool[24:72]}
    state["blocks.0.norm1.weight"] = state["blocks.1.norm1.weight"] = torch.ones(48)
    state["blocks.0.norm1.bias"] = torch.zeros(1, 48, 2)[0, :, 0]
    expected = {name: value.clone() for name, value in state.items()}
    source = state
    if layout != "memory":
        torch.save(state, tmp_path / "tied.pth", _use_new_zipfile_serialization=layout == "zip")
        source = tmp_path / "tied.pth"
    model: Any = medgmae.create_model(ENCODER, pretrained=source)
    assert_same_state(model, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.testing.assert_close(dict(model.state_dict()), {name: value + 1 for name, value in expected.items()})
    assert_same_state(model, {name: value + 1 for name, value in expected.items()})
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_views_of_the_models_own_memory_load_right() -> None:
    model = nano()
    state = dict(model.state_dict())
    swapped = {**state, "norm.weight": state["norm.bias"], "norm.bias": state["norm.weight"]}
    expected = {name: value.clone() for name, value in swapped.items()}
    medgmae.load_pretrained(model, swapped)
    assert_same_state(model, expected)


def test_tensors_without_values_do_not_become_random_weights() -> None:
    hollow = {**STATE, "norm.weight": torch.empty(48, device="meta")}
    with pytest.raises(WeightsError, match=r"norm\.weight: without values"):
        medgmae.create_model(ENCODER, pretrained=hollow)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medgmae.save_pretrained(nano(), tmp_path_factory.mktemp("saved"))


def edited(saved: Path, folder: Path, config: bytes | str, inside: bool) -> Path:
    """The saved model with another config: in its folder or, inside, in the header of its file."""
    data = (saved / "model.safetensors").read_bytes()
    if not inside:
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
        return folder
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["medgmae"] = config
    text = json.dumps(header).encode()
    (folder / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return folder / "odd.safetensors"


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"depth": 10**6}, "depth is 1000000, expected 30 at most"),
        ({"depth": 1e30}, r"depth is 1e\+30"),
        ({"num_classes": 3 * 10**7}, "num_classes is 30000000, expected 1024 at most"),
        ({"head_hidden": [8] * 3000}, "head_hidden is 3000 long"),
        ({"num_heads": 0}, "its config describes no model"),
        ({"embed_dim": -48}, "its config describes no model"),
        ({"mlp_ratio": float("inf")}, "not valid JSON: Out of range"),
        ({"in_chans": 2**62}, "in_chans is 4611686018427387904"),
        ({"in_chans": 10**400}, "in_chans is 1000"),
        ({"depth": [[[[3]]]]}, "its config describes no model"),
        ({"embed_dim": 96}, r"shape \(1, 1, 48\) in the file, \(1, 1, 96\) in the model that its config"),
        ({"img_size": [16, 32, 64]}, r"the config's grid is \[4, 4, 4\], its model_args make \[2, 4, 8\]"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_configs_that_lie(saved: Path, tmp_path: Path, options: dict[str, Any], match: str, inside: bool) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["model_args"] |= options
    source = edited(saved, tmp_path, json.dumps(config), inside)
    refused(source, match)
    with pytest.raises(WeightsError, match=match):
        medgmae.inspect_checkpoint(source)
    if not inside:
        for pretrained in (None, False):
            with pytest.raises(WeightsError, match=match):
                medgmae.create_model(source, pretrained=pretrained)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"\xff\xfe{}", "not UTF-8 text .'utf-8' codec"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 16 deep"),
        (b'{"a":"\\ud800"}', "not UTF-8 text .*surrogates"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b" " * 2_000_000, "longer than 1048576 characters"),
        (b"[1]", "should be a JSON object, got list"),
        (b'{"architecture": 3, "grid": [4, 4, 4]}', "should be text and an object, got int and dict"),
    ],
    ids=["utf-16", "deep", "nested", "surrogate", "digits", "long", "list", "types"],
)
def test_configs_that_are_hardly_json(saved: Path, tmp_path: Path, text: bytes, match: str) -> None:
    refused(edited(saved, tmp_path, text, inside=False), match)


def test_one_of_several_sets_of_weights_is_read_and_said(tmp_path: Path) -> None:
    ema = {name: value + 1 for name, value in STATE.items()}
    path = tmp_path / "last.pth"
    for mine, other in (("model", "model_ema"), ("student", "teacher"), ("state_dict", "ema")):
        torch.save({mine: STATE, other: {"module": ema} if other == "ema" else ema, "epoch": 3}, path)
        model = nano()
        report = medgmae.load_pretrained(model, path)
        assert_same_state(model, STATE)
        assert any(f"under {mine!r}, not those under '{other}" in note for note in report.notes)
        assert f"note: read are the weights under {mine!r}" in str(report)
        name = f"{other}.module" if other == "ema" else other
        report = medgmae.load_pretrained(model, f"{path}::{name}")
        assert_same_state(model, ema)
        assert any(f"not those under {mine!r}" in note for note in report.notes)
        facts = medgmae.inspect_checkpoint(path)
        assert (facts["container"], facts["other_sets"]) == (mine, [name])
        assert medgmae.inspect_checkpoint(f"{path}::{name}")["container"] == name
    refused(f"{path}::momentum", "has no single set of weights 'momentum'; there are 'state_dict', 'ema.module'")


def test_sets_under_prefixes_of_one_dictionary(tmp_path: Path) -> None:
    ema = {name: value + 1 for name, value in STATE.items()}
    both = {f"model.{n}": v for n, v in STATE.items()} | {f"ema_model.module.{n}": v for n, v in ema.items()}
    torch.save({"state_dict": both}, tmp_path / "last.ckpt")
    model = nano()
    report = medgmae.load_pretrained(model, tmp_path / "last.ckpt")
    assert_same_state(model, STATE)
    assert "the weights under 'ema_model.' are not read; 'FILE::ema_model' takes them" in report.notes
    medgmae.load_pretrained(model, f"{tmp_path}/last.ckpt::ema_model")
    assert_same_state(model, ema)
    two = {f"left.{n}": v for n, v in STATE.items()} | {f"right.{n}": v for n, v in ema.items()}
    refused(two, "has several models, under 'left.', 'right.'; take one of them with 'FILE::left'")


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        *(
            ("net.", "state_dict"),
            ("model.", "state_dict"),
            ("net.encoder.", "state_dict"),
            ("module._orig_mod.", "model"),
        ),
        *(
            ("_fsdp_wrapped_module.", "model"),
            ("", "module"),
            ("backbone.", "model"),
            ("model.vit._orig_mod.", "state_dict"),
        ),
    ],
)
def test_prefixes_and_containers_of_every_day(tmp_path: Path, prefix: str, container: str) -> None:
    state: dict[str, Tensor] = {f"{prefix}{name}": value for name, value in STATE.items()}
    if "net" in prefix:
        state |= {"loss.weight": torch.ones(3)}
    content = {container: state, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1e-3}, "loops": [{}]}
    torch.save(content, tmp_path / "last.ckpt")
    model = nano()
    report = medgmae.load_pretrained(model, tmp_path / "last.ckpt")
    assert_same_state(model, STATE)
    if prefix == "net.":
        assert "the weights are those under 'net.'" in report.notes
        assert report.unused == {"loss.weight": "beside 'net.'"}


def test_an_entry_of_the_encoder_beside_it_is_not_left_out() -> None:
    state = {f"net.{name}": value for name, value in STATE.items() if name != "cls_token"}
    refused({**state, "cls_token": STATE["cls_token"]}, "'cls_token' lies beside an encoder under 'net.'")


def test_adapters_and_shards_are_refused_with_the_remedy() -> None:
    lora = {"base_model.model.blocks.0.attn.qkv.lora_A.default.weight": torch.ones(4, 48)}
    refused({**STATE, **lora}, "LoRA adapters.*merge_and_unload")
    refused({"_fsdp_wrapped_module._flat_param": torch.ones(4)}, "FULL_STATE_DICT")


def test_provenance_is_said_only_where_it_is_certain() -> None:
    autoencoder = state_copy(randomize(medgmae.create_model(f"mae_{ENCODER}")))
    for state, layout in (
        (to_glmae(autoencoder), "the layout of GL-MAE's student"),  # which DINO's code has for any encoder
        ({f"encoder.{n}": v for n, v in to_timm_encoder(autoencoder).items()}, "ViT with timm's names"),
    ):
        report = medgmae.load_pretrained(nano(), state)
        assert report.source == f"state dictionary ({layout})"
        assert not any("row for the class token" in note for note in report.notes)
    report = medgmae.load_pretrained(nano(), STATE)
    assert report.notes == ["the table of positions has no row for the class token: 64 rows, all patches'"]


@pytest.mark.parametrize("attack", ["pickles", "tensors", "configs"])
def test_the_fuzzer_of_meaning_finds_nothing_in_a_short_run(attack: str) -> None:
    """The full run has 10,000 cases: python tests/fuzz/fuzz_hostile.py pickles --count 10000."""
    command = ["-W", "ignore", FUZZ / "fuzz_hostile.py", attack, "--count", "20", "--seed", "1"]
    done = warm_python.run(*command, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
