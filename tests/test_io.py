"""Reading and writing: voxels and geometry against SimpleITK and nibabel, and every kind of bad file."""

from __future__ import annotations

import gzip
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medgmae.data import Grid, Volume, VolumeError, read_volume, stack_channels, write_volume

ROOT = Path(__file__).parent.parent
SCANS = sorted((ROOT / "examples/data").glob("*.nii.gz"))
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
XYZ_TO_DHW = np.eye(4)[[2, 1, 0, 3]]

sys.path.insert(0, str(ROOT / "tests/fuzz"))
from fuzz_volumes import fuzz  # noqa: E402


def oblique(channels: int = 1, dtype: torch.dtype = torch.int16) -> Volume:
    """A volume whose axes follow no body axis, of three different sizes and spacings."""
    rotation = sitk.VersorTransform((0.3, -0.5, 0.2), 0.6)
    direction = np.array(rotation.GetMatrix()).reshape(3, 3)[:, ::-1]
    data = torch.arange(channels * 5 * 6 * 7).reshape(channels, 5, 6, 7).to(dtype)
    return Volume(data, Grid((5, 6, 7), (2.5, 0.8, 0.7), (10.0, -20.0, 5.0), direction))


def assert_same_place(volume: Volume, image: sitk.Image, atol: float = 1e-5) -> None:
    for index in np.random.default_rng(0).uniform(-3, 30, (20, 3)):
        expected = image.TransformContinuousIndexToPhysicalPoint(index[::-1].tolist())[:3]
        np.testing.assert_allclose(volume.grid.world(index), expected, atol=atol)
        np.testing.assert_allclose(volume.grid.index(expected), index, atol=10 * atol)


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.name)
def test_real_scans_agree_with_simpleitk_and_nibabel(path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume, image, other = read_volume(path), sitk.ReadImage(str(path)), nibabel.load(path)
    np.testing.assert_array_equal(volume.data[0].numpy(), sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(volume.data[0].numpy(), np.asarray(other.dataobj).T)
    assert_same_place(volume, image)
    np.testing.assert_allclose(volume.grid.affine, RAS @ other.affine @ XYZ_TO_DHW, atol=1e-5)
    assert volume.orientation == "".join(nibabel.aff2axcodes(other.affine))


def test_oblique_four_dimensional_example_of_nibabel() -> None:
    import nibabel

    path = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"
    with pytest.raises(VolumeError, match=r"example4d\.nii\.gz.*4-D, 128 x 96 x 24 with 2 frames.*channels=2"):
        read_volume(path)
    with pytest.raises(VolumeError, match=r"2 channel\(s\).*expected 4"):
        read_volume(path, channels=4)
    volume, other = read_volume(path, channels=2), nibabel.load(path)
    np.testing.assert_array_equal(volume.data.numpy(), np.asarray(other.dataobj).T)
    np.testing.assert_allclose(volume.grid.affine, RAS @ other.affine @ XYZ_TO_DHW, atol=1e-5)
    assert volume.orientation == "".join(nibabel.aff2axcodes(other.affine)) == "LAS"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"])
@pytest.mark.parametrize("channels", [1, 3])
def test_written_volumes_come_back(tmp_path: Path, suffix: str, channels: int) -> None:
    volume, path = oblique(channels), tmp_path / f"v{suffix}"
    write_volume(volume, path)
    again = read_volume(path)
    assert torch.equal(again.data, volume.data)
    assert again.data.dtype == volume.data.dtype
    np.testing.assert_allclose(again.grid.affine, volume.grid.affine, atol=1e-5)
    image = sitk.ReadImage(str(path))
    assert image.GetNumberOfComponentsPerPixel() == channels
    assert_same_place(volume, image)


def test_nibabel_reads_what_is_written(tmp_path: Path) -> None:
    import nibabel

    write_volume(oblique(), tmp_path / "v.nii.gz")
    image = nibabel.load(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, oblique().data[0].numpy())
    np.testing.assert_allclose(RAS @ image.affine @ XYZ_TO_DHW, oblique().grid.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "read"),
    [("uint8", "uint8"), ("int8", "int8"), ("uint16", "int32"), ("int32", "int32"), ("uint32", "int64"),
     ("int64", "int64"), ("float32", "float32"), ("float64", "float64")],
)  # fmt: skip
@pytest.mark.parametrize("version", ["Nifti1Image", "Nifti2Image"])
def test_nifti_types_and_versions(tmp_path: Path, stored: str, read: str, version: str) -> None:
    import nibabel

    voxels = np.arange(24, dtype=stored).reshape(2, 3, 4)
    image = getattr(nibabel, version)(voxels, np.diag([1.5, 2, 3, 1]), dtype=stored)
    for suffix in (".nii", ".nii.gz"):
        nibabel.save(image, tmp_path / f"v{suffix}")
        volume = read_volume(tmp_path / f"v{suffix}")
        assert str(volume.data.dtype) == f"torch.{read}"
        np.testing.assert_array_equal(volume.data[0].numpy(), voxels.T)
        assert volume.spacing == (3.0, 2.0, 1.5)


def test_big_endian_scaled_and_rgb_nifti(tmp_path: Path) -> None:
    import nibabel

    voxels = np.arange(24).reshape(2, 3, 4)
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(voxels.astype(">i2"), np.eye(4), header), tmp_path / "big.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "big.nii").data[0].numpy(), voxels.T)
    image = nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / "scaled.nii")
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "scaled.nii")))
    np.testing.assert_allclose(read_volume(tmp_path / "scaled.nii").data[0].numpy(), expected, atol=1e-6)
    assert expected[1, 0, 0] != 1
    colours = np.arange(72, dtype=np.uint8).reshape(4, 3, 2, 3)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "rgb.nii"))
    np.testing.assert_array_equal(read_volume(tmp_path / "rgb.nii").data.numpy(), np.moveaxis(colours, -1, 0))


@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 1), (1, 1), (0, 0)])
def test_every_form_of_nifti_geometry_is_read_as_simpleitk_reads_it(tmp_path: Path, qform: int, sform: int) -> None:
    import nibabel

    write_volume(oblique(), tmp_path / "v.nii")
    image = nibabel.load(tmp_path / "v.nii")
    affine = image.affine
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    if qform:
        image.set_qform(affine, qform)
    if sform:
        image.set_sform(affine, sform)
    nibabel.save(image, tmp_path / "form.nii")
    assert_same_place(read_volume(tmp_path / "form.nii"), sitk.ReadImage(str(tmp_path / "form.nii")), 1e-4)


def test_a_sheared_sform_falls_back_to_the_qform_or_is_refused(tmp_path: Path) -> None:
    import nibabel

    sheared = np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), None)
    image.set_sform(sheared, 1)
    nibabel.save(image, tmp_path / "v.nii")
    with pytest.raises(VolumeError, match="sheared"):
        read_volume(tmp_path / "v.nii")
    image.set_qform(np.diag([1, 2, 3, 1]), 1)
    nibabel.save(image, tmp_path / "v.nii")
    assert read_volume(tmp_path / "v.nii").spacing == (3.0, 2.0, 1.0)


def damaged(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


@pytest.fixture
def intact(tmp_path: Path) -> dict[str, bytes]:
    files = {}
    for suffix in (".nii", ".nii.gz", ".mha", ".nrrd"):
        write_volume(oblique(), tmp_path / f"intact{suffix}")
        files[suffix] = (tmp_path / f"intact{suffix}").read_bytes()
    return files


def rejects(path: Path, content: bytes, *words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert str(path) in message
    assert "expected" in message, message
    for word in words:
        assert word in message, message


def test_bad_nifti_files_are_named_and_explained(
    tmp_path: Path, intact: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    nii, path = intact[".nii"], tmp_path / "bad.nii"
    rejects(path, nii[:300], "header")
    rejects(path, nii[:-1], "truncated", str(len(nii)))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        rejects(path, damaged(nii, 80, struct.pack("<f", value)), "spacing")
    rejects(path, damaged(nii, 42, struct.pack("<3h", 30000, 30000, 30000)), "30000 x 30000 x 30000")
    rejects(path, damaged(nii, 40, struct.pack("<h", 2)), "2-D")
    rejects(path, damaged(nii, 40, struct.pack("<h", 12)), "dimensions")
    rejects(path, damaged(nii, 70, struct.pack("<h", 32)), "data type is 32")
    rejects(path, damaged(nii, 344, b"ni1\0"), "pair")
    packed, path = intact[".nii.gz"], tmp_path / "bad.nii.gz"
    rejects(path, packed[: len(packed) // 2], "truncated")
    rejects(path, packed[:-4] + b"\0\0\0\0")
    for missing in (1, 8):  # every voxel is there, but not the checksum that vouches for them
        rejects(path, packed[:-missing], "truncated", "checksum")
    rejects(path, damaged(packed, len(packed) // 2, b"\xff\xff\xff"), "gzip")
    rejects(path, gzip.compress(damaged(nii, 42, struct.pack("<3h", 3000, 3000, 300))), "more than")
    rejects(path, gzip.compress(b"no image at all" * 40), "not NIfTI")
    assert capfd.readouterr().err == ""


def test_bad_meta_and_nrrd_files(tmp_path: Path, intact: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    for suffix, spacing in ((".mha", b"ElementSpacing ="), (".nrrd", b"space directions:")):
        content, path = intact[suffix], tmp_path / f"bad{suffix}"
        rejects(path, content[:-20])
        start = content.index(spacing)
        end = content.index(b"\n", start)
        broken = {".mha": [b" 0 1 1", b" -1 1 1", b" nan 1 1"], ".nrrd": [b" (0,0,0) (0,1,0) (0,0,1)"]}[suffix]
        for value in broken:
            rejects(path, content[: start + len(spacing)] + value + content[end:])
        sizes = b"DimSize =" if suffix == ".mha" else b"sizes:"
        start, end = content.index(sizes), content.index(b"\n", content.index(sizes))
        rejects(path, content[:start] + sizes + b" 100000 100000 100000" + content[end:], "100000 x 100000")
        rejects(path, content[:start] + sizes + b" 7 6" + content[end:], "expected")
    mha = intact[".mha"]
    rejects(tmp_path / "dims.mha", mha.replace(b"NDims = 3", b"NDims = -1"), "NDims")
    rejects(tmp_path / "flip.mha", damaged(mha, len(mha) - 12, bytes([mha[-12] ^ 255])))
    rejects(tmp_path / "lost.mha", mha.replace(b"= LOCAL", b"= gone.raw"), "gone.raw")
    assert capfd.readouterr().err == ""


def test_other_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="no such file"):
        read_volume(tmp_path / "missing.nii")
    rejects(tmp_path / "empty.nii.gz", b"", "empty")
    rejects(tmp_path / "scan.jpg", b"\xff\xd8\xff\xe0 not a volume", "unknown file type")
    sitk.WriteImage(sitk.Image(8, 9, sitk.sitkInt16), str(tmp_path / "flat.mha"))
    with pytest.raises(VolumeError, match="2-D, 8 x 9; expected a 3-D volume"):
        read_volume(tmp_path / "flat.mha")
    sitk.WriteImage(sitk.Image((4, 4, 4), sitk.sitkVectorUInt8, 2), str(tmp_path / "two.nrrd"))
    with pytest.raises(VolumeError, match=r"2 channel\(s\), 4 x 4 x 4; expected 1"):
        read_volume(tmp_path / "two.nrrd", channels=1)
    with pytest.raises(VolumeError, match="series='1' is for DICOM folders"):
        read_volume(tmp_path / "two.nrrd", series="1")


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_voxels_that_are_not_finite(tmp_path: Path, suffix: str, value: float) -> None:
    data = torch.zeros(1, 4, 5, 6)
    data[0, 1, 2, 3] = value
    write_volume(Volume(data), tmp_path / f"v{suffix}")
    with pytest.raises(VolumeError, match="1 of 120 voxels are NaN or infinite"):
        read_volume(tmp_path / f"v{suffix}")


def test_large_finite_voxels_are_not_taken_for_infinite(tmp_path: Path) -> None:
    write_volume(Volume(torch.full((1, 4, 5, 6), 1e308, dtype=torch.float64)), tmp_path / "v.nrrd")
    assert read_volume(tmp_path / "v.nrrd").data.max() == 1e308


def test_a_volume_is_its_voxels_and_a_grid() -> None:
    grid = Grid((2, 3, 4), 1.5, (7, 8, 9))
    volume = Volume(torch.zeros(2, 2, 3, 4), grid)
    assert volume.grid is grid is volume.with_data(volume.data[:1]).grid
    assert volume.shape == (2, 2, 3, 4)
    assert volume.size == (2, 3, 4)
    assert volume.spacing == (1.5, 1.5, 1.5)
    assert volume.origin == (7.0, 8.0, 9.0)
    np.testing.assert_array_equal(volume.affine, grid.affine)
    np.testing.assert_array_equal(volume.direction, grid.direction)
    again = Grid.from_affine(grid.affine, grid.size)
    np.testing.assert_array_equal(again.affine, grid.affine)
    assert Grid(4).size == (4, 4, 4)


def test_a_volume_answers_like_its_tensor() -> None:
    volume = oblique().to(torch.int16)
    assert (volume.dtype, volume.device) == (torch.int16, torch.device("cpu"))
    moved = volume.to("meta")
    assert moved.device.type == "meta"
    assert moved.grid is volume.grid
    assert np.shares_memory(volume.numpy(), volume.data.numpy())
    assert volume.to(torch.bfloat16).numpy().dtype == np.float32


def test_a_volume_checks_itself() -> None:
    data = torch.zeros(1, 2, 3, 4)
    with pytest.raises(VolumeError, match=re.escape("(2, 3, 4); expected (C, D, H, W): data[None] adds the channel")):
        Volume(data[0])
    for other in (data.numpy(), oblique().to_sitk(), oblique().to_metatensor()):
        with pytest.raises(VolumeError, match=rf"data is a {type(other).__name__}.*: medgmae\.as_volume\(image\)"):
            Volume(other)  # type: ignore[arg-type]
    assert Volume(oblique().to_metatensor(), Grid(oblique().size[::-1])).size == oblique().size[::-1]
    with pytest.raises(VolumeError, match=re.escape("grid is (2.0, 1.0, 1.0); expected Grid(data.shape[1:], spacing)")):
        Volume(data, (2.0, 1.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match="spacing"):
        Grid((2, 3, 4), (1.0, 0.0, 1.0))
    with pytest.raises(VolumeError, match="orthonormal"):
        Grid((2, 3, 4), direction=np.ones((3, 3)))
    with pytest.raises(VolumeError, match=re.escape("shape (1, 2, 3, 4), and the grid has the size (2, 3, 5)")):
        Volume(data, Grid((2, 3, 5)))
    for wrong in (0, 2.5, (2, 3), (2.0, 3, 4)):
        with pytest.raises(VolumeError, match="three positive numbers of voxels"):
            Grid(wrong)  # type: ignore[arg-type]
    assert Volume(data).orientation == "LPS"
    assert Volume(data.int()).tensor.shape == (1, 1, 2, 3, 4)
    assert Volume(data.int()).tensor.dtype == torch.float32
    assert_same_place(oblique(), oblique().to_sitk())


def test_writing_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"unknown suffix; expected one of .*\.nii\.gz"):
        write_volume(oblique(), tmp_path / "v.png")
    with pytest.raises(VolumeError, match="does not exist"):
        write_volume(oblique(), tmp_path / "no/v.nii")


def test_stacking_needs_one_grid() -> None:
    both = stack_channels([oblique(), oblique()])
    assert both.data.shape == (2, 5, 6, 7)
    with pytest.raises(VolumeError, match="different grids"):
        stack_channels([oblique(), Volume(oblique().data)])


def test_corrupted_files_are_volumes_or_errors() -> None:
    outcomes, bad = fuzz(count=320, seed=7)
    assert bad == []
    assert sum(n for key, n in outcomes.items() if key.endswith("error")) > 100
    assert sum(outcomes.values()) == 320
