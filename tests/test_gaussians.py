"""Sets of Gaussians: PLY files bit for bit and as other programs read them, joining, to the patient and back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import plyfile
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medgmae import GaussianRenderer, Gaussians, Volume
from medgmae.data import Grid
from medgmae.ops import voxelize
from medgmae.ops.rotations import rotation_matrix

SIZE = (9, 12, 7)
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
DIRECTIONS = {
    "axial": np.eye(3)[:, ::-1],
    "mirrored": np.eye(3)[:, ::-1] * [1, -1, 1],
    "sagittal": np.eye(3)[:, [0, 2, 1]] * [-1, 1, -1],
    "oblique": TURN,
    "oblique, other hand": -TURN,
}


def some(count: int = 20, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Gaussians:
    """Well-shaped Gaussians in and around the volume, negative and positive."""
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.rand(batch, count, 3, generator=g, dtype=dtype) * 1.2 - 0.1,
        torch.rand(batch, count, 3, generator=g, dtype=dtype) * 0.3 + 0.05,
        torch.randn(batch, count, 4, generator=g, dtype=dtype),
        torch.randn(batch, count, generator=g, dtype=dtype),
    )


def grid(direction: str = "oblique", size: tuple[int, int, int] = SIZE) -> Grid:
    return Grid(size, (2.5, 0.7, 1.3), (-210.0, 35.5, 480.25), DIRECTIONS[direction])


def covariance(gaussians: Gaussians) -> Tensor:
    rotation = rotation_matrix(gaussians.quats.double())
    return rotation @ torch.diag_embed(gaussians.scales.double() ** 2) @ rotation.mT


def assert_same_bits(found: Gaussians, expected: Gaussians) -> None:
    for name, a, b in zip(("means", "scales", "quats", "densities"), found.tensors(), expected.tensors(), strict=True):
        assert a.shape == b.shape, name
        np.testing.assert_array_equal(a.numpy().view(np.int32), b.numpy().view(np.int32), err_msg=name)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    values=st.lists(st.lists(FLOATS, min_size=11, max_size=11), max_size=4), frame=st.sampled_from(["axes", "world"])
)
def test_a_file_gives_every_bit_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]], frame: str
) -> None:
    table = torch.tensor(values, dtype=torch.float32).reshape(1, -1, 11)
    gaussians = Gaussians(table[..., :3], table[..., 3:6], table[..., 6:10], table[..., 10])
    path = tmp_path_factory.getbasetemp() / "bits.ply"
    gaussians.save_ply(path, frame)
    assert_same_bits(Gaussians.load_ply(path), gaussians)
    assert_same_bits(Gaussians.load_ply(path, frame), gaussians)


def viewed(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (K, 3), covariances (K, 3, 3) and opacities (K,), as viewers of Gaussian splatting compute them."""
    vertex = plyfile.PlyData.read(path)["vertex"]
    assert all(p.val_dtype == "f4" for p in vertex.properties)

    def stack(*names: str) -> np.ndarray:
        return np.stack([vertex[name].astype(np.float64) for name in names], -1)

    w, x, y, z = stack("rot_0", "rot_1", "rot_2", "rot_3").T / np.linalg.norm(
        stack("rot_0", "rot_1", "rot_2", "rot_3"), axis=-1
    )
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    half = rotation * np.exp(stack("scale_0", "scale_1", "scale_2"))[:, None]
    return stack("x", "y", "z"), half @ half.transpose(0, 2, 1), 1 / (1 + np.exp(-stack("opacity")[:, 0]))


@pytest.mark.parametrize("frame", ["axes", "world"])
def test_other_programs_see_the_same_gaussians(frame: str, tmp_path: Path) -> None:
    gaussians = some()
    gaussians.save_ply(tmp_path / "g.ply", frame)
    centres, covariances, opacities = viewed(tmp_path / "g.ply")
    order = [2, 1, 0] if frame == "axes" else [0, 1, 2]  # x is w
    np.testing.assert_array_equal(centres, gaussians.means[0].double()[:, order])
    np.testing.assert_allclose(covariances, covariance(gaussians)[0][:, order][:, :, order], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(opacities, gaussians.densities[0].abs().clamp(1e-6, 1 - 1e-6), rtol=2e-6)


def test_viewers_get_opacities_colours_and_scales_that_are_finite(tmp_path: Path) -> None:
    densities = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1e30, -3e-20, 0.25]])
    gaussians = Gaussians(torch.zeros(1, 7, 3), torch.zeros(1, 7, 3), torch.ones(1, 7, 4), densities)
    gaussians.save_ply(tmp_path / "g.ply")
    assert_same_bits(Gaussians.load_ply(tmp_path / "g.ply"), gaussians)
    vertex = plyfile.PlyData.read(tmp_path / "g.ply")["vertex"]
    for name in [p.name for p in vertex.properties if p.name != "density"]:
        assert np.abs(vertex[name]).max() < 100, name
    opacities = viewed(tmp_path / "g.ply")[2]
    np.testing.assert_allclose(opacities, [1e-6, 1e-6, 1 - 1e-6, 1 - 1e-6, 1 - 1e-6, 1e-6, 0.25], rtol=2e-6)
    red = 0.5 + 0.28209479 * vertex["f_dc_0"]
    np.testing.assert_allclose(red, [1, 1, 1, 0.2, 1, 0.2, 1], rtol=1e-5)


def test_the_header_says_what_the_coordinates_are(tmp_path: Path) -> None:
    some().save_ply(tmp_path / "a.ply")
    some().save_ply(tmp_path / "w.ply", "world")
    assert any("units of the axis" in c for c in plyfile.PlyData.read(tmp_path / "a.ply").comments)
    assert any("LPS millimetres" in c for c in plyfile.PlyData.read(tmp_path / "w.ply").comments)
    with pytest.raises(ValueError, match="in the frame 'axes', asked for was 'world'"):
        Gaussians.load_ply(tmp_path / "a.ply", "world")


def foreign(path: Path, kind: str, dtype: str = "f4") -> np.ndarray:
    """A file as other tools write it: no density, coefficients of higher harmonics, perhaps doubles."""
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "f_rest_0", "f_rest_1"]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    vertex = np.empty(6, [(name, dtype) for name in names])
    for i, name in enumerate(names):
        vertex[name] = np.random.default_rng(i).normal(size=6)
    element = plyfile.PlyElement.describe(vertex, "vertex", comments=["made elsewhere"])
    plyfile.PlyData([element], text=kind == "ascii", byte_order=">" if kind == "big" else "<").write(path)
    return vertex


@pytest.mark.parametrize(("kind", "dtype"), [("little", "f4"), ("big", "f4"), ("ascii", "f4"), ("little", "f8")])
def test_files_of_other_tools(kind: str, dtype: str, tmp_path: Path) -> None:
    vertex = foreign(tmp_path / "f.ply", kind, dtype)
    found = Gaussians.load_ply(tmp_path / "f.ply")
    assert all(t.dtype == torch.float32 for t in found)
    np.testing.assert_allclose(found.means[0, :, 0], vertex["x"], rtol=1e-7)
    np.testing.assert_allclose(found.quats[0, :, 3], vertex["rot_3"], rtol=1e-7)
    np.testing.assert_allclose(found.scales[0, :, 1], np.exp(vertex["scale_1"]), rtol=1e-6)
    np.testing.assert_allclose(found.densities[0], torch.tensor(vertex["opacity"].astype("f8")).sigmoid(), rtol=1e-6)
    as_axes = Gaussians.load_ply(tmp_path / "f.ply", "axes")  # x, y, z are then (w, h, d)
    np.testing.assert_allclose(as_axes.means[0, :, 2], vertex["x"], rtol=1e-7)


def test_an_editors_change_counts(tmp_path: Path) -> None:
    gaussians = some(3)
    gaussians.save_ply(tmp_path / "g.ply")
    content = plyfile.PlyData.read(tmp_path / "g.ply", mmap=False)
    content["vertex"]["opacity"][1] = 0.0
    content["vertex"]["scale_2"][2] += 1.0  # scale_2 is along d
    content.write(tmp_path / "edited.ply")
    found = Gaussians.load_ply(tmp_path / "edited.ply")
    assert found.densities[0].tolist() == [gaussians.densities[0, 0], 0.5, gaussians.densities[0, 2]]
    scales = gaussians.scales[0].clone()
    scales[2, 0] *= np.e
    torch.testing.assert_close(found.scales[0], scales, rtol=1e-6, atol=0)
    assert torch.equal(found.scales[0, :2], scales[:2])


def test_broken_files_are_refused(tmp_path: Path) -> None:
    some(5).save_ply(tmp_path / "g.ply")
    whole = (tmp_path / "g.ply").read_bytes()
    foreign(tmp_path / "t.ply", "ascii")
    text = (tmp_path / "t.ply").read_bytes()
    broken = tmp_path / "broken.ply"
    for content, message in [
        (whole[:-1], "is cut off: 419 bytes after the header, expected 420 for 5 Gaussians"),
        (whole + b"\0", "is too long: 421 bytes"),
        (whole[:100], "expected a PLY file"),
        (b"", "expected a PLY file"),
        (b"\x1f\x8b" + whole, "expected a PLY file"),
        (whole.replace(b"binary_little_endian", b"binary"), "format is 'binary'; expected one of binary_little_endian"),
        (whole.replace(b"vertex 5", b"vertex -5"), "first element is 'vertex -5'"),
        (whole.replace(b"vertex 5", b"vertex 99999999999"), "is cut off"),
        (whole.replace(b"element vertex", b"element chunk"), "first element is 'chunk 5'"),
        (whole.replace(b"float opacity", b"float alpha__"), "expected Gaussians, with opacity"),
        (whole.replace(b"float nx", b"float x"), "each name once"),
        (whole.replace(b"property float nx", b"property list uchar int nx"), "'list uchar int nx' is not a number"),
        (whole.replace(b"frame axes", b"frame moon"), "frame is 'moon'; expected one of axes, world"),
        (whole[:-20] + np.float32(np.nan).tobytes() + whole[-16:], "quats of Gaussian 4 is NaN or infinite"),
        (text[: text.rindex(b" ")], "is cut off: 113 numbers, expected 114 for 6 Gaussians"),
        (text[: text.rindex(b" ")] + b" none", "a value is not a number"),
    ]:
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            Gaussians.load_ply(broken)
        assert str(broken) in str(error.value)
    with pytest.raises(FileNotFoundError):
        Gaussians.load_ply(tmp_path / "absent.ply")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.ply"
    with pytest.raises(ValueError, match="one set, this is a batch of 2"):
        some(batch=2).save_ply(path)
    with pytest.raises(ValueError, match="frame must be 'axes' or 'world', got 'mars'"):
        some().save_ply(path, "mars")
    broken = some()
    broken.scales[0, 7, 1] = torch.inf
    with pytest.raises(ValueError, match="scales of Gaussian 7 is NaN or infinite"):
        broken.save_ply(path)
    assert not path.exists()


def test_joined_sets_render_as_their_sum() -> None:
    first, second = some(3, batch=2, seed=1), some(5, batch=2, seed=2)
    joined = Gaussians.concat([first, second])
    assert [tuple(t.shape) for t in joined.tensors()] == [(2, 8, 3), (2, 8, 3), (2, 8, 4), (2, 8)]
    expected = voxelize(*first.tensors(), SIZE) + voxelize(*second.tensors(), SIZE)
    torch.testing.assert_close(voxelize(*joined.tensors(), SIZE), expected)
    with pytest.raises(ValueError, match=r"batch sizes \[1, 2\]"):
        Gaussians.concat([some(), some(batch=2)])
    with pytest.raises(ValueError, match="at least one"):
        Gaussians.concat([])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_places_and_covariances_in_the_patient(direction: str) -> None:
    """Against SimpleITK for the centres, and the matrix product A Σ Aᵀ for the covariance."""
    gaussians, place = some(dtype=torch.float64, batch=2), grid(direction)
    world = gaussians.to_world(place)
    image = Volume(torch.zeros(1, *SIZE), place).to_sitk()
    for sample, index in [(0, 0), (1, 13)]:
        where = gaussians.means[sample, index] * (torch.tensor(SIZE) - 1)
        point = image.TransformContinuousIndexToPhysicalPoint(where.flip(0).tolist())
        np.testing.assert_allclose(world.means[sample, index], point, atol=1e-4)
    matrix = torch.tensor(place.affine[:3, :3] * (np.array(SIZE) - 1))
    torch.testing.assert_close(covariance(world), matrix @ covariance(gaussians) @ matrix.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(world.quats.norm(dim=-1), torch.ones(2, 20, dtype=torch.float64))
    assert float(world.scales.min()) > 0
    assert torch.equal(world.densities, gaussians.densities)
    assert isinstance(image, sitk.Image)


@pytest.mark.parametrize("support", [None, 4.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [SIZE, (1, 12, 7), (5, 1, 1)])
def test_through_the_patient_and_back_renders_the_same(
    direction: str, size: tuple[int, int, int], support: float | None
) -> None:
    place = grid(direction, size)
    # Float32 steps at 480 mm are 3e-5 mm; along an axis of one voxel the Gaussians here are 0.04 mm wide.
    for dtype, tolerance in [(torch.float64, 1e-9), (torch.float32, 1e-5 if size == SIZE else 1e-3)]:
        gaussians = some(dtype=dtype)
        back = gaussians.to_world(place).to_grid(Volume(torch.zeros(1, *size), place))
        assert all(t.dtype == dtype for t in back)
        direct, through = (voxelize(*g.tensors(), size, support=support) for g in (gaussians, back))
        assert float((direct - through).abs().max()) <= tolerance * float(direct.abs().max())


@pytest.mark.parametrize("support", [None, 4.0])
def test_a_windows_gaussians_render_the_same_voxels_on_the_whole_scan(support: float | None) -> None:
    scan = grid("oblique", (15, 20, 17))
    start, window = (4, 6, 3), (8, 10, 12)
    gaussians = some(dtype=torch.float64)
    inside = voxelize(*gaussians.tensors(), window, support=support)
    whole = voxelize(*gaussians.to_world(scan.part(start, window)).to_grid(scan).tensors(), scan.size, support=support)
    part = whole[(..., *(slice(s, s + w) for s, w in zip(start, window, strict=True)))]
    torch.testing.assert_close(part, inside, rtol=1e-9, atol=1e-9)


def test_a_map_that_only_stretches_alike_keeps_scales_and_quaternions() -> None:
    """Not only the covariance: own axes keep their numbers and signs where the map leaves them."""
    gaussians = some(dtype=torch.float64)
    cube = Grid((11, 11, 11), (2.0, 2.0, 2.0), (1.0, 2.0, 3.0), np.eye(3))
    world = gaussians.to_world(cube)
    torch.testing.assert_close(world.scales, gaussians.scales * 20)
    quats = torch.nn.functional.normalize(gaussians.quats, dim=-1)
    torch.testing.assert_close(world.quats, quats * quats[..., :1].sign(), rtol=1e-7, atol=1e-7)


def test_round_flat_and_unturned_gaussians_move_too() -> None:
    scales = torch.tensor([[[0.2, 0.2, 0.2], [0.2, 0.2, 1e-6], [0.3, 0.0, 0.0], [0.1, -0.2, 0.3]]], dtype=torch.float64)
    quats = torch.tensor([[[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -3, 4]]], dtype=torch.float64)
    gaussians = Gaussians(torch.full((1, 4, 3), 0.5, dtype=torch.float64), scales, quats, torch.ones(1, 4))
    world = gaussians.to_world(grid())
    matrix = torch.tensor(grid().affine[:3, :3] * (np.array(SIZE) - 1))
    torch.testing.assert_close(covariance(world), matrix @ covariance(gaussians) @ matrix.T)
    torch.testing.assert_close(covariance(world.to_grid(grid())), covariance(gaussians))
    assert not world.means.requires_grad


def test_nothing_that_is_not_finite_is_moved() -> None:
    broken = some()
    broken.quats[0, 3, 2] = torch.nan
    for move in (broken.to_world, broken.to_grid):
        with pytest.raises(ValueError, match="quats holds NaN or infinite values"):
            move(grid())


def test_no_gaussians_are_a_set_too(tmp_path: Path) -> None:
    empty = some(0)
    assert all(t.shape[1] == 0 for t in empty.to_world(grid()).to_grid(grid()).tensors())
    empty.save_ply(tmp_path / "g.ply")
    assert Gaussians.load_ply(tmp_path / "g.ply").means.shape == (1, 0, 3)


def test_sets_of_a_batch() -> None:
    gaussians = some(batch=3)
    assert len(gaussians) == 3
    assert_same_bits(gaussians[1], Gaussians(*(t[1:2] for t in gaussians.tensors())))
    assert_same_bits(gaussians[-1], gaussians[2])
    assert_same_bits(gaussians[:2], Gaussians(*(t[:2] for t in gaussians.tensors())))
    for i, one in enumerate(gaussians):
        assert_same_bits(one, gaussians[np.int64(i)])
    assert_same_bits(gaussians[torch.tensor(1)], gaussians[1])
    with pytest.raises(IndexError, match="set 3 of a batch of 3"):
        gaussians[3]
    for wrong in ((0, 1), None, 1.0):
        with pytest.raises(TypeError):
            gaussians[wrong]


def test_to_another_dtype_and_without_gradients() -> None:
    gaussians = some()
    assert {t.dtype for t in gaussians.to(torch.float64).tensors()} == {torch.float64}
    assert {t.device.type for t in gaussians.to("meta").tensors()} == {"meta"}
    assert (gaussians.to("meta").device.type, gaussians.dtype) == ("meta", torch.float32)
    learning = Gaussians(*(t.clone().requires_grad_() for t in gaussians.tensors()))
    assert not any(t.requires_grad for t in learning.detach().tensors())


def test_how_they_show_themselves() -> None:
    assert repr(some(batch=2)) == "Gaussians(2 x 20, torch.float32, cpu)"
    table = some()._repr_html_()
    assert table.count("<tr>") == 5
    assert "(1, 20, 4)" in table
    assert Gaussians(*(t[:, :0] for t in some().tensors()))._repr_html_().count("<td>-</td>") == 4


def test_one_number_is_a_cube() -> None:
    renderer, gaussians = GaussianRenderer(), some()
    assert torch.equal(renderer(gaussians, 8), renderer(gaussians, (8, 8, 8)))
    assert torch.equal(renderer(gaussians, np.int64(8)), renderer(gaussians, 8))
    patches = torch.tensor([[1, 3]])
    assert torch.equal(renderer(gaussians, 8, patches, 4), renderer(gaussians, (8, 8, 8), patches, (4, 4, 4)))
