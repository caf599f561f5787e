"""MetaImage and NRRD headers: every way of storing voxels against SimpleITK, and headers that mean harm."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medgmae.data import VolumeError, read_volume

VOXELS = np.arange(4 * 5 * 6, dtype="<i2").reshape(4, 5, 6)
RAW = VOXELS.tobytes()
SLICES = {f"s{k + 1}.raw": plane.tobytes() for k, plane in enumerate(VOXELS)}


def metaimage(folder: Path, data: str, extra: str = "", size: str = "6 5 4") -> Path:
    path = folder / "v.mhd"
    path.write_text(
        f"ObjectType = Image\nNDims = 3\n{extra}TransformMatrix = 0 1 0 -1 0 0 0 0 1\nOffset = 1 2 3\n"
        f"ElementSpacing = 1 2 3\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = {data}\n"
    )
    return path


def nrrd(folder: Path, data: str, extra: str = "encoding: raw\n", size: str = "6 5 4") -> Path:
    path = folder / "v.nhdr"
    path.write_text(
        f"NRRD0004\n# made for a test\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: {size}\n"
        f"space directions: (0,1,0) (-2,0,0) (0,0,3)\nspace origin: (1,2,3)\nendian: little\n{extra}"
        f"key:=value: of any kind\ndata file: {data}\n"
    )
    return path


WRITERS = pytest.mark.parametrize("write", [metaimage, nrrd])


@WRITERS
@pytest.mark.parametrize("data", ["all.raw", "s%d.raw 1 4 1", "s%d.raw 1 4", "LIST\ns1.raw\ns2.raw\ns3.raw\ns4.raw"])
def test_every_way_to_name_data_files_is_read_as_simpleitk_reads_it(tmp_path: Path, write, data: str) -> None:
    (tmp_path / "all.raw").write_bytes(RAW)
    for name, content in SLICES.items():
        (tmp_path / name).write_bytes(content)
    path = write(tmp_path, data)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data[0].numpy(), VOXELS)
    if data != "s%d.raw 1 4":  # a step that is not there crashes SimpleITK
        image = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(volume.data[0].numpy(), sitk.GetArrayFromImage(image))
        for index in ((0, 0, 0), (1, 2, 3)):
            expected = image.TransformIndexToPhysicalPoint(index[::-1])
            np.testing.assert_allclose(volume.grid.world(index), expected, atol=1e-6)


def test_names_count_up_with_leading_zeros_and_down(tmp_path: Path) -> None:
    for k, plane in enumerate(VOXELS):
        (tmp_path / f"s{3 * k + 2:03d}").write_bytes(plane.tobytes())
    np.testing.assert_array_equal(read_volume(nrrd(tmp_path, "s%03d 2 11 3")).data[0].numpy(), VOXELS)
    np.testing.assert_array_equal(read_volume(metaimage(tmp_path, "s%03d 11 2 -3")).data[0].numpy(), VOXELS[::-1])


@WRITERS
@pytest.mark.parametrize(
    "data",
    ["%n 1 4 1", "%s", "%s%s%s 1 4 1", "%999999999d 1 4 1", "s%d.raw 1 4 0", "s%d%n 1 4 1", "%%d 1 4 1", "%*d 1 4 1",
     "s%010d.raw 1 4 1", "s%4d.raw 1 4 1", "s%d.raw", "s%x.raw 1 4 1", "s%d.raw 1 999999999 1"],
)  # fmt: skip
def test_patterns_that_reach_sprintf_elsewhere_are_refused(tmp_path: Path, write, data: str) -> None:
    for name, content in SLICES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match="data files"):
        read_volume(write(tmp_path, data))


@WRITERS
@pytest.mark.parametrize(
    "data", ["s%d.raw 1 3 1", "LIST\ns1.raw\ns2.raw", "LIST\ns1.raw\ns1.raw\ns2.raw\ns3.raw", "LIST"]
)
def test_fewer_files_than_slices_are_refused(tmp_path: Path, write, data: str) -> None:
    for name, content in SLICES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=r"data files?\b.*; expected (4|one file)"):
        read_volume(write(tmp_path, data))


@WRITERS
def test_data_files_lie_beside_or_below_the_header(tmp_path: Path, write) -> None:
    folder = tmp_path / "scan"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "x.raw", folder / "sub/x.raw"):
        path.write_bytes(RAW)
    (folder / "link.raw").symlink_to(tmp_path / "x.raw")
    os.mkfifo(folder / "pipe")
    np.testing.assert_array_equal(read_volume(write(folder, "sub/x.raw")).data[0].numpy(), VOXELS)
    for name in ("../x.raw", str(tmp_path / "x.raw"), "link.raw"):
        with pytest.raises(VolumeError, match=r"outside its folder.*allow_outside=True"):
            read_volume(write(folder, name))
        np.testing.assert_array_equal(read_volume(write(folder, name), allow_outside=True).data[0].numpy(), VOXELS)
    for name, words in (
        ("pipe", "regular"),
        ("sub", "regular"),
        ("gone.raw", "does not exist"),
        ("x" * 300, "cannot be opened"),
    ):
        with pytest.raises(VolumeError, match=words):
            read_volume(write(folder, name))
    header = write(folder, "v")
    with pytest.raises(VolumeError, match="names itself"):
        read_volume(write(folder, header.name, size="2 2 2"))
    for name in ("/dev/zero", "/etc/passwd"):
        with pytest.raises(VolumeError, match="outside its folder"):
            read_volume(write(folder, name, size="2 2 2"))
    with pytest.raises(VolumeError, match="regular"):
        read_volume(write(folder, "/dev/zero"), allow_outside=True)


@pytest.mark.parametrize("said", [True, False])
def test_compressed_streams_must_be_whole(tmp_path: Path, said: bool) -> None:
    for content, words in (
        (zlib.compress(RAW)[:-9], "truncated"),
        (zlib.compress(RAW[:-40]), "too early"),
        (zlib.compress(RAW)[:-4] + b"\0\0\0\0", "broken"),
        (zlib.compress(RAW + bytes(2 << 20)), "goes on"),
    ):
        (tmp_path / "v.zraw").write_bytes(content)
        extra = "CompressedData = True\n" + f"CompressedDataSize = {len(content)}\n" * said
        with pytest.raises(VolumeError, match=words):
            read_volume(metaimage(tmp_path, "v.zraw", extra))
    (tmp_path / "v.zraw").write_bytes(zlib.compress(RAW))
    with pytest.raises(VolumeError, match="the header says 7"):
        read_volume(metaimage(tmp_path, "v.zraw", "CompressedData = True\nCompressedDataSize = 7\n"))
    for encoding in ("gzip", "bzip2"):
        with pytest.raises(VolumeError, match=r"broken|truncated"):
            read_volume(nrrd(tmp_path, "v.zraw", f"encoding: {encoding}\n"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ElementType = MET_SHORT", "ElementType = MET_STRING", "ElementType"),
        ("NDims = 3", "NDims = 3\nBinaryData = False", "stored as text"),
        ("NDims = 3", "NDims = 3\nNDims = 3", "twice"),
        ("NDims = 3", "NDims = 3\nElementToIntensityFunctionSlope = 2", "slope"),
        ("NDims = 3", "NDims = 3\nDistanceUnits = um", "DistanceUnits"),
        ("DimSize = 6 5 4", "DimSize = 6 5 1_0", "size"),
        ("Offset = 1 2 3", "Offset = 1 2 nan", "Offset"),
        ("Offset = 1 2 3", "Offset = 1 2 3\nPosition = 3 2 1", "one of them"),
    ],
)
def test_fields_that_cannot_be(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "all.raw").write_bytes(RAW)
    path = metaimage(tmp_path, "all.raw")
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(VolumeError, match=words):
        read_volume(path)


def test_what_is_assumed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "all.raw").write_bytes(RAW)
    path = metaimage(tmp_path, "all.raw")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "Spacing" not in line) + "\n")
    assert read_volume(path).spacing == (1.0, 1.0, 1.0)
    assert [record.message for record in caplog.records] == [
        f"{path}: the header has no ElementSpacing: voxels of 1 mm are assumed"
    ]


def test_what_a_header_may_ask_for_is_limited(tmp_path: Path) -> None:
    with (tmp_path / "all.raw").open("wb") as file:
        file.truncate(2 << 40)  # a sparse file: it has the bytes, and takes none
    path = metaimage(tmp_path, "all.raw", size="1000000 1000 1000")
    with pytest.raises(VolumeError, match=r"1000000 x 1000 x 1000 voxels, 4e\+12 bytes.*max_bytes=4000000000000"):
        read_volume(path)
    (tmp_path / "all.raw").write_bytes(RAW)
    with pytest.raises(VolumeError, match="at most 479"):
        read_volume(metaimage(tmp_path, "all.raw"), max_bytes=479)
    assert read_volume(metaimage(tmp_path, "all.raw"), max_bytes=480).size == (4, 5, 6)
