"""NIfTI pairs, FreeSurfer volumes, gzip layouts and memory: against nibabel, and against the files that it packages."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import warm_python

from medgmae.data import VolumeError, read_volume

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
XYZ_TO_DHW = np.eye(4)[[2, 1, 0, 3]]
PACKAGED = sorted(
    path for path in Path(nibabel.__file__).parent.rglob("tests/data/*") if path.suffix not in (".py", ".pyc", ".m")
    and path.is_file()
)  # fmt: skip
# Those of whole voxels with perpendicular axes, and the length of their fourth axis.
READ = {
    "anatomical.nii": None, "standard.nii.gz": None, "reoriented_anat_moved.nii": None, "functional.nii": 20,
    "example4d.nii.gz": 2, "example_nifti2.nii.gz": 2,
}  # fmt: skip
VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def assert_as_nibabel(path: Path, channels: int | None = None) -> None:
    volume, image = read_volume(path, channels=channels), nibabel.load(path)
    voxels = np.asarray(image.dataobj).T
    np.testing.assert_allclose(volume.data.numpy(), voxels if voxels.ndim == 4 else voxels[None], rtol=1e-6)
    np.testing.assert_allclose(volume.affine, RAS @ image.affine @ XYZ_TO_DHW, atol=1e-4)


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_every_file_that_nibabel_ships_is_as_nibabel_reads_it_or_refused(path: Path) -> None:
    if path.name in READ:
        assert_as_nibabel(path, channels=READ[path.name])
    else:
        with pytest.raises(VolumeError, match=re.escape(str(path))):
            read_volume(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_pairs_are_read_by_either_name(tmp_path: Path, suffix: str, kind: type) -> None:
    affine = np.diag([2.0, 3, 4, 1])
    affine[0, 3] = 7
    nibabel.save(kind(VOXELS, affine), tmp_path / f"v.hdr{suffix}")
    for name in (f"v.hdr{suffix}", f"v.img{suffix}"):
        assert_as_nibabel(tmp_path / name)
    (tmp_path / f"v.img{suffix}").unlink()
    with pytest.raises(VolumeError, match=r"v\.img.*does not exist"):
        read_volume(tmp_path / f"v.hdr{suffix}")


def test_analyze_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Spm2AnalyzeImage(VOXELS, np.eye(4)), tmp_path / "v.img")
    with pytest.raises(VolumeError, match="not Analyze"):
        read_volume(tmp_path / "v.img")


@pytest.mark.parametrize("name", ["v.mgz", "v.mgh"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_freesurfer_volumes(tmp_path: Path, name: str, dtype: str) -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * [1.5, 0.7, 2.0], [3, -7, 11]
    nibabel.save(nibabel.MGHImage(VOXELS.astype(dtype), affine.astype("f4")), tmp_path / "v.mgz")
    assert_as_nibabel(tmp_path / "v.mgz")
    content = (tmp_path / "v.mgz").read_bytes()
    content = gzip.decompress(content) if name == "v.mgh" else content
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(read_volume(tmp_path / name).data[0].numpy(), VOXELS.T)
    (tmp_path / name).write_bytes(content[:-5] if name == "v.mgz" else content[:290])
    with pytest.raises(VolumeError, match="truncated"):
        read_volume(tmp_path / name)


def nifti(slope: tuple[float, float] | None = None, voxels: np.ndarray = VOXELS) -> bytes:
    image = nibabel.Nifti1Image(voxels, np.eye(4), dtype=voxels.dtype)
    if slope:
        image.header.set_slope_inter(*slope)
    return bytes(image.to_bytes())


@pytest.mark.parametrize(
    ("around", "warnings"),
    [(lambda b: gzip.compress(b"") * 2 + gzip.compress(b), 0), (lambda b: gzip.compress(b) + bytes(600), 0),
     (lambda b: gzip.compress(b[:90]) + gzip.compress(b"") + gzip.compress(b[90:]), 0),
     (lambda b: gzip.compress(b) + b"junk", 1), (lambda b: gzip.compress(b) + bytes(3) + b"junk", 1)],
    ids=["empty first", "padded", "members", "junk", "padding and junk"],
)  # fmt: skip
def test_gzip_layouts(tmp_path: Path, around, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "v.nii.gz"
    path.write_bytes(around(nifti()))
    np.testing.assert_array_equal(read_volume(path).data[0].numpy(), VOXELS.T)
    told = [record.message for record in caplog.records if "bytes after the gzip stream" in record.message]
    assert len(told) == warnings
    assert all(str(path) in message for message in told)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", ">f4", ">i2"])
def test_scales_of_every_type(tmp_path: Path, dtype: str) -> None:
    image = nibabel.Nifti1Image(
        VOXELS.astype(dtype),
        np.eye(4),
        nibabel.Nifti1Header(endianness=dtype[0].replace("u", "<").replace("i", "<").replace("f", "<")),
    )
    image.header.set_data_dtype(dtype)
    content = bytearray(image.to_bytes())
    at = 112
    order = ">" if dtype[0] == ">" else "<"
    content[at : at + 8] = np.array([0.5, -3], f"{order}f4").tobytes()
    (tmp_path / "v.nii").write_bytes(bytes(content))
    np.testing.assert_allclose(read_volume(tmp_path / "v.nii").data[0].numpy(), VOXELS.T * 0.5 - 3, rtol=1e-6)


def test_doubles_beyond_float32(tmp_path: Path) -> None:
    path = tmp_path / "v.nii"
    path.write_bytes(nifti(voxels=np.full((2, 3, 4), 1e300)))
    volume = read_volume(path)
    assert volume.data.max() == 1e300
    with pytest.raises(VolumeError, match=r"reach 1e\+300, beyond float32"):
        volume.tensor  # noqa: B018
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([2, 0], "<f4").tobytes()
    path.write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"reach 2e\+300 after scaling by 2 and 0, beyond float32"):
        read_volume(path)


MEASURE = """
import sys
import medgmae
from medgmae.data import read_volume
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
volume = read_volume(sys.argv[1])
sys.stdout.write(f"{peak() - before} {volume.data.numel()}")
"""


@pytest.mark.parametrize("dtype", ["u1", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reading_takes_little_memory(tmp_path: Path, dtype: str, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    content = bytearray(nifti(voxels=np.zeros((200, 200, 200), dtype)))
    if dtype == "u1":
        content[112:120] = np.array([0.5, 3], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(content), 1) if suffix == ".nii.gz" else bytes(content))
    done = warm_python.run("-c", MEASURE, path)
    assert done.returncode == 0, done.stderr
    peak, voxels = map(int, done.stdout.split())
    assert peak <= 3 * 4 * voxels + path.stat().st_size


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    for path in (tmp_path / "pipe.nii", "/dev/zero"):
        with pytest.raises(VolumeError, match="not a regular file"):
            read_volume(path)
    nibabel.save(nibabel.Nifti1Pair(VOXELS, np.eye(4)), tmp_path / "v.hdr")
    (tmp_path / "v.img").unlink()
    os.mkfifo(tmp_path / "v.img")
    for name in ("v.hdr", "v.img"):
        with pytest.raises(VolumeError, match="not a regular file"):
            read_volume(tmp_path / name)
