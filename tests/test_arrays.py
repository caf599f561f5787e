"""Arrays of numpy as scans: what is read is what numpy reads, and what is hostile is refused before it takes memory."""

from __future__ import annotations

import io
import logging
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import medgmae
from medgmae.data import VolumeError, find_scans, read_volume

KINDS = ["b1", "i1", "u1", "<i2", ">i2", "<u2", ">u4", "<i8", "<u8", "<f2", "<f4", ">f4", "<f8"]


def numbers(kind: str, shape: tuple[int, ...] = (3, 4, 5)) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 2 if kind == "b1" else 100, shape).astype(kind)


def headed(header: str, content: bytes = b"\0" * 240, version: int = 1) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content


def archive(path: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_voxels_are_numpys(kind: str, order: Any, tmp_path: Path) -> None:
    array = np.asarray(numbers(kind), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", array)
    np.savez_compressed(tmp_path / "c.npz", other=array + array, volume=array)
    for name in ("a.npy", "b.npz", "c.npz"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.numpy()[0], array.astype(volume.numpy().dtype))
        assert volume.grid == medgmae.Grid((3, 4, 5))
    many = np.asarray(numbers(kind, (2, 3, 4, 5)), order=order)
    np.save(tmp_path / "d.npy", many)
    np.testing.assert_array_equal(
        read_volume(tmp_path / "d.npy", channels=2).numpy(), many.astype(volume.numpy().dtype)
    )


def test_blocks_meet_where_they_end(tmp_path: Path) -> None:
    """More voxels than are handled at a time."""
    array = np.arange(70 * 80 * 90, dtype=">i4").reshape(70, 80, 90)
    np.savez_compressed(tmp_path / "a.npz", array)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.npz").numpy()[0], array)


def test_the_geometry_is_said_to_be_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "a.npy", numbers("f4"))
    with caplog.at_level(logging.WARNING, "medgmae"):
        read_volume(tmp_path / "a.npy")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.npy'}: an array has no geometry: voxels of 1 mm along the axes of the body (LPS) are assumed"
    ]


def test_a_fourth_axis_is_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers("f4", (2, 3, 4, 5)))
    with pytest.raises(VolumeError, match=r"4-D, 5 x 4 x 3 with 2 frames; .*channels=2 reads them as channels"):
        read_volume(tmp_path / "a.npy")
    with pytest.raises(VolumeError, match=r"2 channel\(s\).*expected 3"):
        read_volume(tmp_path / "a.npy", channels=3)
    assert medgmae.create_transform({"channels": 2, "window": [0, 100]})(tmp_path / "a.npy").channels == 2


class Trap:
    """What would run where an array were unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


_GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 5), }"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(np.array([[[Trap()]]], dtype=object)), "'|O'; expected integers, floats or bool"),
        (saved(np.zeros((2, 2, 2), "f4,i4")), "plain numbers"),
        (saved(np.zeros((2, 2, 2), "c8")), "'<c8'; expected integers"),
        (saved(np.zeros((2, 2, 2), "S5")), "expected integers"),
        (saved(np.zeros((2, 2, 2), "M8[s]")), "expected integers"),
        (saved(np.zeros((2, 2))), r"shape \(2, 2\); expected \(D, H, W\)"),
        (saved(np.zeros((1, 1, 2, 2, 2))), "expected"),
        (saved(np.zeros((0, 2, 2))), r"shape \(0, 2, 2\)"),
        (saved(np.full((2, 2, 2), np.nan)), "NaN or infinite"),
        (saved(np.full((2, 2, 2), 2**64 - 1, "u8")), "unsigned 64-bit"),
        (saved(numbers("f4"))[:-1], "truncated: the array has 239 bytes; expected 240"),
        (saved(numbers("f4"))[:20], "which is broken|expected plain numbers"),
        (headed(_GOOD.replace("3, 4", "3000000000, 4")), "truncated"),
        (headed(_GOOD.replace("3, 4", "9" * 40 + ", 4")), "broken"),
        (headed(_GOOD.replace("3, 4", "-3, 4")), "plain numbers"),
        (headed(_GOOD.replace("(3, 4, 5)", "__import__('os')")), "plain numbers"),
        (headed(_GOOD + " " * 70000, version=2), "70.* bytes; expected at most"),
        (headed(_GOOD.replace("}", "'more': 1}")), "broken"),
        (headed("(" * 60000, version=2), "plain numbers"),
        (headed(_GOOD, version=3), "of version"),
        (b"\x93NUMPY", "of version"),
    ],
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_hostile_arrays_are_refused(content: bytes, message: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        path.write_bytes(content)
    else:
        archive(path, {"a.npy": content})
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(path)
    assert str(caught.value).startswith(str(path))


def test_what_old_and_other_writers_leave_is_read(tmp_path: Path) -> None:
    content = numbers("<f4").tobytes()
    for header in (
        '{"descr": "<f4", "fortran_order": False, "shape": (3L, 4L, 5L)}',
        "{'shape':(3,4,5),'fortran_order':False,'descr':'<f4'}",
    ):
        (tmp_path / "a.npy").write_bytes(headed(header, content))
        np.testing.assert_array_equal(read_volume(tmp_path / "a.npy").numpy()[0], numbers("<f4"))


def test_archives_name_one_array(tmp_path: Path) -> None:
    one = saved(numbers("f4"))
    with pytest.raises(VolumeError, match="the arrays: image, label; expected one, or one named volume"):
        read_volume(archive(tmp_path / "two.npz", {"image.npy": one, "label.npy": one}))
    with pytest.raises(VolumeError, match="the arrays: none"):
        read_volume(archive(tmp_path / "none.npz", {"data.pkl": b"x"}))
    np.testing.assert_array_equal(
        read_volume(archive(tmp_path / "one.npz", {"readme.txt": b"x", "image.npy": one})).numpy()[0], numbers("f4")
    )


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb.npz", {"a.npy": headed(_GOOD.replace("3, 4, 5", "300, 400, 500"), b"\0" * 1000)})
    with pytest.raises(VolumeError, match="truncated: the array has 1000 bytes; expected 240000000"):
        read_volume(bomb)
    zeros = archive(tmp_path / "zeros.npz", {"a.npy": saved(np.zeros((64, 64, 64), "f4"))})
    with pytest.raises(VolumeError, match="claims 64 x 64 x 64 voxels"):
        read_volume(zeros, max_bytes=1000)
    whole = archive(tmp_path / "whole.npz", {"a.npy": saved(numbers("f4"))}, zipfile.ZIP_STORED).read_bytes()
    at = whole.index(b"\x93NUMPY") + 200
    (tmp_path / "bits.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(VolumeError, match=r"the archive is broken .*CRC"):
        read_volume(tmp_path / "bits.npz")
    directory = whole.index(b"PK\x01\x02")
    size = struct.pack("<I", 1 << 31)  # of the member unpacked, as the directory says it
    (tmp_path / "lies.npz").write_bytes(whole[: directory + 24] + size + whole[directory + 28 :])
    with pytest.raises(VolumeError, match=r"more than .* zipped bytes can hold"):
        read_volume(tmp_path / "lies.npz")
    (tmp_path / "cut.npz").write_bytes(whole[:-30])
    with pytest.raises(VolumeError, match="the archive is broken"):
        read_volume(tmp_path / "cut.npz")
    with pytest.raises(VolumeError, match="encrypted or packed otherwise"):
        read_volume(archive(tmp_path / "lzma.npz", {"a.npy": saved(numbers("f4"))}, zipfile.ZIP_LZMA))
    (tmp_path / "trail.npz").write_bytes(archive(tmp_path / "t", {"a.npy": saved(numbers("f4")) + b"x"}).read_bytes())
    with pytest.raises(VolumeError, match="goes on after the array"):
        read_volume(tmp_path / "trail.npz")


def test_damaged_bytes_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = [saved(numbers("f4")), archive(tmp_path / "a", {"a.npy": saved(numbers("i2"))}).read_bytes()]
    refused = 0
    for number in range(400):
        content = bytearray(sources[number % 2])
        for at in rng.integers(0, len(content), rng.integers(1, 5)):
            content[at] = rng.integers(256)
        (tmp_path / "b").write_bytes(content[: rng.integers(1, len(content))] if number % 5 == 0 else content)
        try:
            assert read_volume(tmp_path / "b").data.numel() > 0
        except VolumeError:
            refused += 1
    assert 100 < refused < 400


def test_folders_hold_arrays_where_asked(tmp_path: Path) -> None:
    for name, shape in {"a": (3, 4, 5), "b": (2, 3, 4, 5), "features": (7, 384), "labels": (7,)}.items():
        np.save(tmp_path / f"{name}.npy", np.zeros(shape))
    np.savez(tmp_path / "c.npz", np.zeros((3, 4, 5)))
    (tmp_path / "broken.npy").write_bytes(b"x")
    assert find_scans([tmp_path]).scans == []
    listing = find_scans([tmp_path], arrays=True)
    assert [scan.name for scan in listing.scans] == ["a", "b", "broken", "c"]
    assert {Path(one["path"]).name: one["reason"] for one in listing.skipped} == {
        "features.npy": "an array of 2 axes, not 3 or 4", "labels.npy": "an array of 1 axes, not 3 or 4",
    }  # fmt: skip
    assert listing.unexpected == 0
    assert torch.equal(listing.scans[0].read().data, torch.zeros(1, 3, 4, 5, dtype=torch.float64))
