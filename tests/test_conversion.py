"""Scans in memory of SimpleITK, nibabel and MONAI: voxels and geometry against the libraries themselves, and back."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import monai.data
import monai.transforms
import nibabel
import nibabel.affines
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medgmae.data import Grid, Volume, VolumeError, as_volume, find_contrasts, read_volume, write_volume
from medgmae.factory import create_transform

RAS = np.array([-1.0, -1.0, 1.0])
DTYPES = [torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8, torch.float32, torch.float64]


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    """Small volumes in any place: axes in any order, flipped, oblique; one to three channels of any type."""
    turn = sitk.VersorTransform((*draw(st.tuples(*[st.floats(-1, 1)] * 2)), 0.5), draw(st.floats(-3, 3)))
    direction = np.array(turn.GetMatrix()).reshape(3, 3)[:, draw(st.permutations(range(3)))]
    direction = direction * draw(st.tuples(*[st.sampled_from((-1, 1))] * 3))
    size, spacing = draw(st.tuples(*[st.integers(1, 5)] * 3)), draw(st.tuples(*[st.floats(0.25, 5)] * 3))
    origin = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    data = torch.randint(0, 100, (draw(st.integers(1, 3)), *size), generator=torch.Generator().manual_seed(len(size)))
    return Volume(data.to(draw(st.sampled_from(DTYPES))), Grid(size, spacing, origin, direction))


def assert_same(ours: Volume, theirs: Volume, atol: float = 1e-9) -> None:
    assert ours.data.dtype == theirs.data.dtype
    assert torch.equal(ours.data, theirs.data)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=atol)


def marked(volume: Volume) -> tuple[tuple[int, ...], Any]:
    """A voxel (d, h, w), and its LPS position."""
    index = tuple(n // 2 for n in volume.size)
    return index, volume.grid.world(index)


@given(volumes())
@settings(max_examples=60, deadline=None)
def test_simpleitk_and_back(volume: Volume) -> None:
    image = volume.to_sitk()
    (d, h, w), world = marked(volume)
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((w, h, d)), world, atol=1e-9)
    np.testing.assert_array_equal(np.atleast_1d(image[w, h, d]), volume.data[:, d, h, w].numpy())
    assert_same(as_volume(image), volume)


@given(volumes())
@settings(max_examples=60, deadline=None)
def test_nibabel_and_back(volume: Volume) -> None:
    image = volume.to_nibabel()
    (d, h, w), world = marked(volume)
    np.testing.assert_allclose(nibabel.affines.apply_affine(image.affine, (w, h, d)) * RAS, world, atol=1e-9)
    np.testing.assert_array_equal(np.atleast_1d(image.dataobj[w, h, d]), volume.data[:, d, h, w].numpy())
    assert image.get_data_dtype() == volume.data.numpy().dtype
    assert image.shape == volume.size[::-1] + ((volume.channels,) if volume.channels > 1 else ())
    assert_same(as_volume(image), volume)


@given(volumes())
@settings(max_examples=60, deadline=None)
def test_metatensor_and_back(volume: Volume) -> None:
    image = volume.to_metatensor()
    (d, h, w), world = marked(volume)
    affine = image.affine.numpy()
    np.testing.assert_allclose((affine @ [w, h, d, 1])[:3] * RAS, world, atol=1e-9)
    assert torch.equal(image.as_tensor()[:, w, h, d], volume.data[:, d, h, w])
    assert_same(as_volume(image), volume)
    # MONAI's own transforms see the same geometry.
    turned = monai.transforms.Orientation(axcodes="LPS", labels=None)(image)
    centres = [v.grid.world((np.array(v.size) - 1) / 2) for v in (as_volume(turned), volume)]
    np.testing.assert_allclose(*centres, atol=1e-6)


def nifti(path: Path, voxels: Any, **header: Any) -> Path:
    """A file that nibabel writes, in an oblique place."""
    turn = np.array(sitk.VersorTransform((0.3, -0.5, 0.2), 0.6).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.7, -0.8, 2.5], [10.0, -20.0, 5.0]
    image = nibabel.nifti1.Nifti1Image(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def monai_load(file: Path, ensure_channel_first: bool = True, dtype: Any = np.float32) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LoadImage warns of readers that are not installed
        load = monai.transforms.LoadImage("NibabelReader", dtype=dtype, ensure_channel_first=ensure_channel_first)
    return load(file)


def test_what_the_libraries_load_is_what_read_volume_reads(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for dtype in ("i2", "u2", "i4", "u1", "f4", "f8"):
        file = nifti(tmp_path / f"{dtype}.nii.gz", (draw.random((5, 6, 7)) * 100).astype(dtype))
        volume = read_volume(file)
        assert_same(as_volume(nibabel.load(file)), volume)
        assert_same(as_volume(sitk.ReadImage(str(file))), volume, atol=1e-5)
        loaded = as_volume(monai_load(file))
        assert torch.equal(loaded.data, volume.data.float())
        np.testing.assert_allclose(loaded.affine, volume.affine)
        assert loaded.source == as_volume(nibabel.load(file)).source == volume.source


def test_several_values_per_voxel_become_channels(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 100, (5, 6, 7, 3)).astype(np.int16)
    file = nifti(tmp_path / "4d.nii.gz", voxels)
    volume = read_volume(file, channels=3)
    assert_same(as_volume(nibabel.load(file)), volume)
    assert_same(as_volume(sitk.ReadImage(str(file))), volume, atol=1e-5)  # a 4-D image
    assert_same(as_volume(volume.to_sitk()), volume)  # a vector image
    first = monai_load(file, dtype=np.int16)
    assert_same(as_volume(first), volume)
    with pytest.raises(VolumeError, match=r"channels last; expected \(C, x, y, z\): LoadImage\(ensure_channel_first"):
        as_volume(monai_load(file, ensure_channel_first=False))
    five = nifti(tmp_path / "5d.nii.gz", voxels[:, :, :, None])
    assert_same(as_volume(nibabel.load(five)), read_volume(five))
    colours = np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = voxels[..., 0]
    rgb = nifti(tmp_path / "rgb.nii.gz", colours)
    assert_same(as_volume(nibabel.load(rgb)), read_volume(rgb))


def test_scaled_voxels_and_other_units(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 100, (5, 6, 7)).astype(np.int16)
    scaled = nibabel.nifti1.Nifti1Image(voxels, np.eye(4))
    scaled.header.set_slope_inter(0.1, -7.3)
    nibabel.save(scaled, tmp_path / "scaled.nii")
    assert_same(as_volume(nibabel.load(tmp_path / "scaled.nii")), read_volume(tmp_path / "scaled.nii"))
    assert as_volume(nibabel.load(tmp_path / "scaled.nii")).data.dtype == torch.float32
    for units in (1, 3):  # metres, micrometres
        file = nifti(tmp_path / f"{units}.nii", voxels, xyzt_units=units)
        assert_same(as_volume(nibabel.load(file)), read_volume(file))
        assert as_volume(nibabel.load(file)).spacing != (2.5, 0.8, 0.7)


def test_a_metatensor_in_lps() -> None:
    affine = np.array([[0.7, 0, 0, 1], [0, 0.8, 0, 2], [0, 0, 2.5, 3], [0, 0, 0, 1]])
    image = monai.data.MetaTensor(torch.zeros(1, 2, 3, 4), affine=torch.tensor(affine), meta={"space": "LPS"})
    volume = as_volume(image)
    assert volume.origin == (1, 2, 3)
    assert volume.spacing == (2.5, 0.8, 0.7)
    assert volume.orientation == "LPS"
    image.meta["space"] = "RAS"
    assert as_volume(image).orientation == "RAS"
    image.meta["space"] = "scanner"
    with pytest.raises(VolumeError, match="space is 'scanner'; expected 'RAS' or 'LPS'"):
        as_volume(image)


def test_arrays_have_voxels_of_one_millimetre() -> None:
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    for scan in (array, array[None], torch.from_numpy(array.astype(np.int32)), torch.from_numpy(array)):
        volume = as_volume(scan)
        assert volume.shape == (1, 2, 3, 4)
        assert volume.data.dtype == torch.int32
        np.testing.assert_array_equal(volume.affine, Grid((2, 3, 4)).affine)
        np.testing.assert_array_equal(np.asarray(volume)[0], array)
    array[:] = 0
    assert as_volume(array[::-1, :, ::2]).size == (2, 3, 2)
    assert as_volume(volume) is volume


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("scan.nii.gz", r"str is not a scan; .* For a file: read_volume\(path\)"),
        (None, "NoneType is not a scan"),
        (np.zeros((3, 4)), r"numpy array has shape \(3, 4\); expected \(D, H, W\) or \(C, D, H, W\)"),
        (
            torch.zeros(1, 1, 2, 3, 4),
            r"\(1, 1, 2, 3, 4\); expected .*batch of one pass the Volume itself, or scan\[0\]",
        ),
        (torch.zeros(2, 1, 2, 3, 4), r"torch array has shape \(2, 1, 2, 3, 4\); expected .*W\)$"),
        (np.zeros((0, 3, 4)), r"shape \(0, 3, 4\)"),
        (np.zeros((2, 3, 4), dtype=complex), "complex128; expected integers, floats or bool"),
        (np.full((1, 1, 1), 2**63, dtype=np.uint64), "beyond the signed range"),
        (sitk.Image(4, 5, sitk.sitkInt16), "2-D, 4 x 5; expected a 3-D volume"),
        (sitk.Image([2, 3, 4, 5], sitk.sitkVectorUInt8, 2), "4-D, .* with 2 components"),
        (monai.data.MetaTensor(torch.zeros(2, 1, 2, 3, 4)), "expected one scan .*decollate_batch"),
        (nibabel.nifti1.Nifti1Image(np.zeros((2, 3)), np.eye(4)), r"shape \(2, 3\); expected \(x, y, z\)"),
        (nibabel.nifti1.Nifti1Image(np.zeros((2, 3, 4)), None), "no affine; expected a 4x4"),
    ],
)
def test_what_is_no_scan(given: Any, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        as_volume(given)


def test_sheared_axes_are_refused() -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    with pytest.raises(VolumeError, match="sheared axes have no spacing"):
        as_volume(nibabel.nifti1.Nifti1Image(np.zeros((2, 3, 4), np.int16), affine))
    with pytest.raises(VolumeError, match="sheared axes have no spacing"):
        as_volume(monai.data.MetaTensor(torch.zeros(1, 2, 3, 4), affine=torch.tensor(affine)))


def test_types_that_files_do_not_have() -> None:
    for dtype, kept in ((torch.bool, torch.uint8), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        volume = Volume(torch.ones(1, 2, 3, 4).to(dtype))
        assert as_volume(volume.to_sitk()).data.dtype == kept
        assert as_volume(volume.to_nibabel()).data.dtype == kept
        assert as_volume(volume.to_metatensor()).data.dtype == dtype


def test_a_volume_as_an_array() -> None:
    volume = Volume(torch.arange(24, dtype=torch.int16).reshape(1, 2, 3, 4))
    shared = np.asarray(volume)
    assert shared.dtype == np.int16
    assert shared.shape == volume.shape
    assert np.shares_memory(shared, volume.data.numpy())
    copied = np.array(volume)
    assert not np.shares_memory(copied, volume.data.numpy())
    assert np.asarray(volume, dtype=np.float32).dtype == np.float32
    assert np.asarray(volume.with_data(volume.data.bfloat16())).dtype == np.float32
    assert np.asarray(volume.with_data(volume.data.float().requires_grad_())).sum() == 276
    if int(np.__version__.split(".")[0]) > 1:
        assert np.shares_memory(np.asarray(volume, copy=False), shared)
        with pytest.raises(ValueError, match="without a copy"):
            np.asarray(volume, dtype=np.float32, copy=False)


def test_save_writes_what_is_read_back(tmp_path: Path) -> None:
    volume = Volume(torch.rand(1, 3, 4, 5), Grid((3, 4, 5), (2.0, 1.0, 0.5), (1, 2, 3)))
    volume.save(tmp_path / "a.nii.gz")
    assert_same(read_volume(tmp_path / "a.nii.gz"), volume, atol=1e-5)
    write_volume(volume.to_nibabel(), tmp_path / "b.nrrd")
    assert_same(read_volume(tmp_path / "b.nrrd"), volume, atol=1e-5)
    with pytest.raises(VolumeError, match=r"unknown suffix; expected one of \.nii"):
        volume.save(tmp_path / "c.png")


def test_a_preparation_takes_them_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voxels = (np.random.default_rng(0).random((12, 14, 16)) * 100).astype(np.int16)
    file = nifti(tmp_path / "a_t1.nii.gz", voxels)
    prepare = create_transform({"orientation": "RAS", "axes": "xyz", "spacing": [1, 1, 1], "resample": {}})
    expected = prepare(file)
    loaded = monai_load(file, dtype=np.int16)
    for scan in (read_volume(file), nibabel.load(file), loaded):
        assert_same(prepare(scan), expected)
    np.testing.assert_allclose(prepare(sitk.ReadImage(str(file))).data, expected.data, atol=1e-3)
    assert "medgmae" not in {record.name for record in caplog.records}
    assert prepare(voxels).size == (12, 14, 16)[::-1]
    assert "the array has no geometry: 1 mm voxels (z, y, x) in LPS are assumed" in caplog.text

    contrasts = create_transform({"channels": 2, "contrasts": ["t1", "t2"]})
    nifti(tmp_path / "a_t2.nii.gz", voxels + 1)
    both = contrasts(tmp_path)
    assert_same(contrasts({"t1": nibabel.load(file), "t2": sitk.ReadImage(str(tmp_path / "a_t2.nii.gz"))}), both)
    assert find_contrasts(tmp_path, ["t1", "t2"]).keys() == {"t1", "t2"}
    image = nibabel.load(file)
    with pytest.raises(VolumeError, match="'t1' and 't2' are the same scan"):
        contrasts({"t1": image, "t2": image})
    with pytest.raises(VolumeError, match="int is not a scan"):
        prepare(3)  # type: ignore[arg-type]


def test_read_volume_reads_images_with_the_checks_of_files() -> None:
    volume = Volume(torch.rand(1, 3, 4, 5), Grid((3, 4, 5), (2.0, 1.0, 0.5), (1, 2, 3)))
    images = [volume.to_sitk(), volume.to_nibabel(), volume.to_metatensor(), volume]
    for image in images:
        assert_same(read_volume(image), volume)
        with pytest.raises(VolumeError, match=r"1 channel\(s\), 5 x 4 x 3; expected 2"):
            read_volume(image, channels=2)
    broken = volume.with_data(volume.data.clone())
    broken.data[0, 1, 2, 3] = torch.inf
    for image in (broken.to_sitk(), broken.to_nibabel(), broken.to_metatensor(), broken):
        assert as_volume(image).data.isinf().any()
        with pytest.raises(VolumeError, match="1 of 60 voxels are NaN or infinite"):
            read_volume(image)
    for array in (volume.data, volume.data.numpy()):
        with pytest.raises(VolumeError, match=r"array without a geometry; .* medgmae\.as_volume\(array\)"):
            read_volume(array)
    with pytest.raises(VolumeError, match="is for DICOM folders, and this is a Image"):
        read_volume(images[0], series="1.2")
    with pytest.raises(VolumeError, match="int is not a scan"):
        read_volume(3)  # type: ignore[arg-type]
    time_series = nibabel.nifti1.Nifti1Image(np.zeros((5, 4, 3, 2), np.int16), np.eye(4))
    for series in (time_series, sitk.Image([5, 4, 3, 2], sitk.sitkInt16)):
        with pytest.raises(VolumeError, match=r"4-D, 5 x 4 x 3 with 2 frames; expected .*channels=2 reads"):
            read_volume(series)
        assert read_volume(series, channels=2).shape == (2, 3, 4, 5)


def test_scans_that_are_not_finite_are_not_prepared() -> None:
    data = torch.rand(1, 4, 4, 4)
    data[0, 0, 0, 0] = torch.nan
    assert as_volume(data).data.isnan().sum() == 1
    for scan in (Volume(data), Volume(data).to_nibabel(), data):
        with pytest.raises(VolumeError, match="1 of 64 voxels are NaN or infinite; expected finite intensities"):
            create_transform({})(scan)


class ScalarImage(dict):  # type: ignore[type-arg]
    """An image as TorchIO has it: a dict with what is needed to make a SimpleITK image."""

    def __init__(self, image: sitk.Image) -> None:
        super().__init__(stem="a")
        self._image, self.path = image, Path("a.nii.gz")

    def as_sitk(self) -> sitk.Image:
        return self._image


def test_images_of_torchio() -> None:
    volume = Volume(torch.rand(2, 3, 4, 5), Grid((3, 4, 5), (2.0, 1.0, 0.5), (1, 2, 3)))
    image = ScalarImage(volume.to_sitk())
    assert_same(as_volume(image), volume)
    assert as_volume(image).source == "a.nii.gz"
    prepare = create_transform({"channels": 2, "contrasts": ["t1", "t2"], "spacing": [1, 1, 1], "resample": {}})
    assert_same(prepare(image), prepare(volume))  # one scan, although it is a mapping


def test_no_library_is_imported_that_the_scan_is_not_of() -> None:
    code = (
        "import sys, numpy, medgmae.data as data\n"
        "volume = data.as_volume(numpy.zeros((2, 3, 4)))\n"
        "numpy.asarray(volume), repr(volume), volume._repr_html_(), volume.tensor\n"
        "assert not {'SimpleITK', 'nibabel', 'matplotlib', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
