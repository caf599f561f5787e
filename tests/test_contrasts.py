"""Cases in several contrasts: files by name onto one grid, in the card's order; the intensity rule of 3D Mamba MAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python

import medgmae
from medgmae.data import Grid, Volume, VolumeError, find_contrasts, read_volume, write_volume, zscore
from medgmae.data.transforms import resample_like
from medgmae.factory import create_transform

NAMES = ["t1", "t2", "t1ce", "flair"]
BLOCK: dict[str, Any] = {"modality": "MR", "channels": 4, "contrasts": NAMES}
MAMBA: dict[str, Any] = {
    **BLOCK, "orientation": "LPS", "axes": "xyz", "spacing": [1.0, 1.0, 1.0], "size": [16, 16, 16],
    "resample": {"to": "spacing"}, "window": {"percentiles": [0, 100], "per": "channel"}, "crop": ["center"],
    "normalize": "zscore_all",
}  # fmt: skip


def contrast(seed: int, size: tuple[int, int, int] = (6, 7, 8)) -> Volume:
    data = torch.randint(0, 1000, (1, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    return Volume(data, Grid(data.shape[1:], origin=(5.0, -3.0, 2.0)))


def moved(volume: Volume, origin: tuple[float, float, float]) -> Volume:
    return Volume(volume.data, Grid(volume.size, volume.spacing, origin, volume.direction))


@pytest.fixture
def case() -> dict[str, Any]:
    return {name: contrast(seed) for seed, name in enumerate(NAMES)}


def save(case: dict[str, Any], folder: Path, pattern: str = "case_{}.nii.gz") -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for name, volume in case.items():
        write_volume(volume, folder / pattern.format(name))
    return {name: folder / pattern.format(name) for name in case}


def test_the_card_decides_the_order_of_channels(case: dict[str, Any], tmp_path: Path) -> None:
    prepare = create_transform(BLOCK)
    stacked = torch.cat([case[name].data for name in NAMES]).float()
    ready = prepare(case)
    assert torch.equal(ready.data, stacked)
    np.testing.assert_allclose(ready.grid.affine, case["t1"].grid.affine)
    assert torch.equal(prepare(dict(reversed(case.items()))).data, stacked)
    files = save(case, tmp_path)
    assert torch.equal(prepare({**files, "t2": str(files["t2"])}).data, stacked)
    assert torch.equal(prepare({**files, "t2": case["t2"]}).data, stacked)
    assert torch.equal(prepare(tmp_path).data, stacked)
    write_volume(case["t1"].with_data(stacked), tmp_path / "all.nrrd")
    assert torch.equal(prepare(tmp_path / "all.nrrd").data, stacked)
    other = create_transform({**BLOCK, "contrasts": NAMES[::-1]})(case)
    assert torch.equal(other.data, stacked.flip(0))


def test_contrasts_come_onto_the_grid_of_the_first(case: dict[str, Any]) -> None:
    part = case["t2"].data[:, ::2, :, 1:]
    t2 = Volume(part, Grid(part.shape[1:], (2.0, 1.0, 1.0), case["t2"].grid.world((0, 0, 1)).tolist()))
    ready = create_transform(BLOCK)({**case, "t2": t2})
    assert ready.size == case["t1"].size
    assert torch.equal(ready.data[1], resample_like(t2, case["t1"]).data[0])
    assert torch.equal(ready.data[1, ::2, :, 1:], t2.data[0].float())
    assert (ready.data[1, :, :, 0] == 0).all()  # beyond its voxels
    assert torch.equal(ready.data[[0, 2, 3]], create_transform(BLOCK)(case).data[[0, 2, 3]])
    # A header rounded in the third digit is the same grid: nothing is interpolated.
    rounded = moved(case["flair"], (5.001, -3.001, 2.0))
    assert torch.equal(create_transform(BLOCK)({**case, "flair": rounded}).data, create_transform(BLOCK)(case).data)


def test_another_grid_is_interpolated_once(case: dict[str, Any]) -> None:
    block = {**BLOCK, "resample": {"to": "spacing"}, "spacing": [0.5, 0.5, 0.5]}
    t2 = moved(case["t2"], (5.25, -3.0, 2.0))
    ready = create_transform(block)({**case, "t2": t2})
    assert torch.equal(ready.data[1], resample_like(t2, ready).data[0])


def test_latent_map_of_a_case_in_a_process_of_its_own(case: dict[str, Any], tmp_path: Path) -> None:
    """Contrasts as files in the channels' order, and as a folder; nothing has imported the parts of the library yet."""
    files = save({name: contrast(seed, (16, 16, 16)) for seed, name in enumerate(NAMES)}, tmp_path / "case")
    model: Any = medgmae.create_model("vim_nano_patch8_32", in_chans=4)
    model.pretrained_cfg = {**medgmae.weight_card("vim_small_patch16_160.mamba_mae").to_json(), "input": MAMBA}
    saved = medgmae.save_pretrained(model, tmp_path / "model")
    command = ["-m", "medgmae", "latent-map", "--model", f"local-dir:{saved}", "--threads", "1"]
    for scans, out in ((files.values(), "files.nii.gz"), ([tmp_path / "case"], "folder.nii.gz")):
        done = warm_python.run(*command, *scans, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    maps = [read_volume(tmp_path / out) for out in ("files.nii.gz", "folder.nii.gz")]
    assert maps[0].data.unique().numel() == 8
    assert torch.equal(maps[0].data, maps[1].data)


def test_files_are_found_by_the_words_in_their_names(case: dict[str, Any], tmp_path: Path) -> None:
    files = save(case, tmp_path)
    (tmp_path / "case_seg.nii.gz").write_bytes(b"")
    assert find_contrasts(tmp_path, NAMES) == files
    for name, spelling in {"t1": "T1n", "t2": "t2w", "t1ce": "t1c", "flair": "T2F"}.items():
        files[name].rename(tmp_path / f"BraTS-GLI-00001-{spelling}.nii.gz")
    found = find_contrasts(tmp_path, NAMES)
    assert [path.name[16:-7] for path in found.values()] == ["T1n", "t2w", "t1c", "T2F"]
    assert create_transform(BLOCK)(tmp_path).channels == 4
    write_volume(case["t1"], tmp_path / "extra_t1.nii.gz")
    with pytest.raises(VolumeError, match=r"BraTS-GLI-00001-T1n\.nii\.gz and extra_t1\.nii\.gz for the contrast 't1'"):
        find_contrasts(tmp_path, NAMES)
    found["flair"].unlink()
    (tmp_path / "extra_t1.nii.gz").unlink()
    with pytest.raises(VolumeError, match=r"no file for the contrast 'flair' among: .*t1c.*, case_seg"):
        create_transform(BLOCK)(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flair": None}, r"\['flair'\] missing, \[\] unknown; expected exactly \['t1', 't2', 't1ce', 'flair'\]$"),
        (
            {"flair": None, "FLAIR": contrast(3)},
            r"\['flair'\] missing, \['FLAIR'\] unknown.*did you mean 'flair' by 'FLAIR'\?",
        ),
        ({"adc": contrast(9)}, r"\[\] missing, \['adc'\] unknown"),
        ({"t1ce": contrast(2).with_data(torch.zeros(2, 6, 7, 8))}, "'t1ce', volume: 2 channels; expected one"),
        ({"t2": moved(contrast(1), (500.0, 0.0, 0.0))}, "'t2', volume, has no place in common with 't1'"),
    ],
)
def test_a_wrong_case_says_what_is_wrong(case: dict[str, Any], change: dict[str, Any], words: str) -> None:
    wrong = {name: volume for name, volume in {**case, **change}.items() if volume is not None}
    with pytest.raises(VolumeError, match=words):
        create_transform(BLOCK)(wrong)


def test_contrasts_that_were_mixed_up_are_noticed(case: dict[str, Any], tmp_path: Path) -> None:
    files = save(case, tmp_path)
    prepare = create_transform(BLOCK)
    with pytest.raises(VolumeError, match=r"'t1' is given the file .*case_t2\.nii\.gz, whose name says 't2'"):
        prepare({**files, "t1": files["t2"], "t2": files["t1"]})
    swapped = prepare({**files, "t1": read_volume(files["t2"]), "t2": read_volume(files["t1"])})  # as the error says
    assert torch.equal(swapped.data, prepare(files).data[[1, 0, 2, 3]])
    with pytest.raises(VolumeError, match=r"'t1' and 'flair' are the same scan, .*case_t1\.nii\.gz"):
        prepare({**files, "flair": str(files["t1"])})
    with pytest.raises(VolumeError, match="'t2' and 't1ce' are the same scan"):
        prepare({**case, "t1ce": case["t2"]})
    with pytest.raises(VolumeError, match=r"1 channel\(s\); expected 4 \(MR\); or give a mapping with t1, t2"):
        prepare(case["t1"])
    with pytest.raises(VolumeError, match=r"mapping of \['t1', 't2', 't1ce', 'flair'\]; expected one scan"):
        create_transform({"channels": 4})(case)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"contrasts": "t1"}, "contrasts is 't1'; expected null or a list"),
        ({"contrasts": ["t1", "t1", "t2", "flair"]}, "different names"),
        ({"contrasts": []}, "different names"),
        ({"channels": 3}, r"contrasts names \['t1', 't2', 't1ce', 'flair'\], and input.channels is 3"),
        ({"window": {"percentiles": [0, 100], "per": "voxel"}}, "window is .*'scan' or 'channel'"),
        ({"window": {"per": "channel"}}, "window is"),
        ({"normalize": "minmax"}, "normalize is 'minmax'"),
    ],
)
def test_a_wrong_block_says_what_is_wrong(change: dict[str, Any], words: str) -> None:
    with pytest.raises(VolumeError, match=words):
        create_transform({**BLOCK, **change})


def test_windows_per_channel(case: dict[str, Any]) -> None:
    per_scan, per_channel = (
        create_transform({**BLOCK, "window": {"percentiles": [0, 100], "per": per}})(
            {**case, "t2": doubled(case["t2"])}
        )
        for per in ("scan", "channel")
    )
    assert per_channel.data.flatten(1).amin(1).tolist() == [0] * 4
    assert per_channel.data.flatten(1).amax(1).tolist() == [1] * 4
    assert per_scan.data[1].max() == 1
    assert per_scan.data[0].max() < 0.51


def doubled(volume: Volume) -> Volume:
    return volume.with_data(volume.data * 2)


def test_zscore_of_all_channels_together() -> None:
    data = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9 + 100
    data[1] += 50
    expected = (data - data.mean()) / data.std()  # torch's deviation is the unbiased one
    found = zscore(Volume(data), together=True).data
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert found.dtype == torch.float32
    assert (zscore(Volume(torch.full((2, 2, 2, 2), 7.0)), together=True).data == 0).all()
    like = Volume(data[:1])
    assert abs(float(zscore(Volume(data), together=True, like=like).data[0].mean())) < 1e-6
    for wrong in ({"nonzero": True, "together": True}, {"like": like}):
        with pytest.raises(VolumeError, match="expected at most one of nonzero, together and of"):
            zscore(Volume(data), **wrong)  # type: ignore[arg-type]


def test_padding_and_background_count_in_the_statistics(case: dict[str, Any]) -> None:
    ready = create_transform(MAMBA)(case)
    assert ready.data.shape == (4, 16, 16, 16)
    values = ready.data.double()
    assert abs(float(values.mean())) < 1e-6
    assert float(values.std()) == pytest.approx(1, abs=1e-6)
    assert ready.data[:, 0].unique().numel() == 1  # padding is background, not the mean
    assert float(ready.data[0, 0, 0, 0]) == float(ready.data.min()) < -0.1


def test_a_whole_scan_has_the_intensities_of_its_centre_crop() -> None:
    volumes = {name: contrast(seed, (12, 20, 24)) for seed, name in enumerate(NAMES)}
    block = {**MAMBA, "orientation": None, "axes": "zyx"}
    crop, whole = create_transform(block)(volumes), create_transform(block, whole=True)(volumes)
    assert whole.size == (16, 20, 24)  # nothing is lost, and no window reaches beyond the background
    assert torch.equal(resample_like(whole, crop, interpolation="nearest").data, crop.data)
