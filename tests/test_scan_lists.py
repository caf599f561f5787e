"""Lists of scans (.txt) and tables with a column for each contrast, in the library and through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import dicom_series, small_scan
from safetensors.torch import load_file
from test_cli import run

import medgmae
from medgmae.data import Listing, VolumeError, list_scans, read_manifest

NAMES = ["t1", "t2", "t1ce", "flair"]
BLOCK = {"channels": 4, "contrasts": NAMES, "window": {"percentiles": [0, 100], "per": "channel"}}


def paths(listing: Listing) -> list[Path]:
    return [scan.path for scan in listing.scans]


def test_a_list_of_paths(tmp_path: Path) -> None:
    one, two = small_scan(tmp_path / "x/one #1.nii"), small_scan(tmp_path / "y/z/two.nii", 1)
    dicom_series(tmp_path / "dicom", "1.2.3.1")
    text = tmp_path / "lists/cases.txt"
    text.parent.mkdir()
    text.write_text(f"\ufeff# cases\r\n../x/one #1.nii\r\n\r\n  {tmp_path}/y  \r\n../dicom\r\n  # no more\r\n")
    listing = list_scans(text)
    assert paths(listing) == [one.parent.parent / "lists/../x/one #1.nii", two, text.parent / "../dicom"]
    assert [scan.series for scan in listing.scans] == [None, None, "1.2.3.1"]
    assert paths(list_scans([text])) == paths(listing)
    text.write_text("../x/one #1.nii\n../gone.nii\n")
    listing = list_scans(text)
    assert len(listing.scans) == len(listing.errors) == 1
    assert "gone.nii: no such file or folder" in listing.errors[0]["error"]


def test_lists_that_are_none(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("# nothing\n\n")
    with pytest.raises(VolumeError, match=r"a\.txt names no scans; expected a path per line"):
        list_scans(text)
    text.write_bytes(b"M\xfcller.nii\n")
    with pytest.raises(VolumeError, match=r"a\.txt is not UTF-8"):
        list_scans(text)
    small_scan(tmp_path / "b.nii")
    listing = list_scans([tmp_path / "b.nii", text])  # beside scans it is a text
    assert len(listing.scans) == len(listing.skipped) == 1


def test_commands_take_lists(tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii")
    (tmp_path / "cases.TXT").write_text("a.nii\n")
    for command in ("features", "slices"):
        listed = run(command, tmp_path / "cases.TXT", "--list", "--json")
        assert listed.exit_code == 0, listed.stderr
        assert json.loads(listed.stdout)["scans"] == [{"name": "a", "path": str(scan)}]
    (tmp_path / "cases.txt").write_text("\n")
    wrong = run("features", tmp_path / "cases.txt", "--list")
    assert wrong.exit_code == 2
    assert "names no scans" in wrong.stderr


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two cases of four contrasts, one with its files in one folder, one with them apart."""
    rows = [["id", "fold", *(f"path_{name}" for name in NAMES)]]
    for case in ("p1", "p2"):
        files = [f"{case}/{name}.nii" if case == "p1" else f"{name}/{case}.nii" for name in NAMES]
        for number, file in enumerate(files):
            small_scan(tmp_path / file, number, size=16)
        rows.append([case, "3", *files])
    (tmp_path / "cases.csv").write_text("\n".join(map(",".join, rows)))
    return tmp_path / "cases.csv"


def test_a_column_per_contrast(table: Path) -> None:
    one, two = read_manifest(table).scans
    assert one.source == {name: table.parent / f"p1/{name}.nii" for name in NAMES}
    assert (one.name, one.path, one.labels) == ("p1", table.parent / "p1/t1.nii", {"id": "p1", "fold": "3"})
    assert two.described["contrasts"] == {name: str(table.parent / f"{name}/p2.nii") for name in NAMES}
    assert one.all_files() == list(one.paths) == [table.parent / f"p1/{name}.nii" for name in NAMES]
    prepared = medgmae.create_transform(BLOCK)(one.source)
    expected = [medgmae.read_volume(path).data[0] for path in one.paths]
    for channel, voxels in zip(prepared.data, expected, strict=True):
        torch.testing.assert_close(channel, (voxels - voxels.min()) / (voxels.max() - voxels.min()))
    with pytest.raises(VolumeError, match="the scan has the contrasts t1, t2, t1ce, flair, a file each"):
        one.read()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    card = medgmae.weight_card("vit_tiny_patch8_64.demo").to_json()
    made = medgmae.create_model("vit_nano_patch8_32", in_chans=4)
    made.pretrained_cfg = {**card, "input": BLOCK}
    return f"local-dir:{medgmae.save_pretrained(made, tmp_path_factory.mktemp('model') / 'nano')}"


def test_features_of_a_table_with_contrasts(table: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    result = run("features", table, "--model", model, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["scans"]
    assert facts["p1"]["contrasts"] == {name: str(table.parent / f"p1/{name}.nii") for name in NAMES}
    loaded = medgmae.create_model(model).eval()
    prepare = medgmae.create_transform(loaded, whole=True)
    case = {name: table.parent / f"{name}/p2.nii" for name in NAMES}
    expected = medgmae.extract_features(loaded, prepare(case)).pooled
    assert torch.equal(load_file(out)["p2/pooled"], expected)


def test_a_changed_contrast_is_read_again(table: Path) -> None:
    from medgmae.cli.journal import state_of

    scan = read_manifest(table).scans[0]
    before = state_of(scan)
    small_scan(scan.paths[2], 9, size=24)
    assert state_of(scan) != before


def test_segment_takes_a_table_with_contrasts(table: Path, tmp_path: Path) -> None:
    made = medgmae.create_model("unetr_vit_nano_patch8_32", num_classes=3, img_size=16, in_chans=4)
    made.pretrained_cfg = {**medgmae.weight_card("vit_tiny_patch8_64.demo").to_json(), "input": BLOCK}
    name = f"local-dir:{medgmae.save_pretrained(made, tmp_path / 'unetr')}"
    result = run("segment", table, "--model", name, "--out", tmp_path / "out", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert medgmae.read_volume(tmp_path / "out/p2.nii.gz").size == (16, 16, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,path_t1\na,b\n", "columns path, path_t1; expected path alone"),
        ("path_t1,path_t2\na.nii,\n", "row 2: the path_t2 is empty"),
        ("path_\na\n", "expected one named path"),
        ("path_t1,path_t2,series\na.nii,b.nii,1.2\n", "row 2: a series and several contrasts"),
        ("path_t1,path_t2\na.nii,b.nii\na.nii,b.nii\n", "twice; expected each once"),
    ],
)
def test_tables_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(VolumeError, match=message):
        list_scans(tmp_path / "t.csv")


def test_a_case_with_a_contrast_that_is_gone(tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text("path_t1,path_t2\na.nii,b.nii\nb.nii,c.nii\nc.nii,gone.nii\n")
    listing = list_scans(tmp_path / "t.csv")
    assert [scan.name for scan in listing.scans] == ["a", "b"]
    assert len(listing.errors) == 1
    assert "gone.nii: no such file or folder" in listing.errors[0]["error"]


def test_a_table_says_itself_which_series(table: Path) -> None:
    with pytest.raises(VolumeError, match="a table says it in a column named series"):
        list_scans(table, series=["*lung*"])
