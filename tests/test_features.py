"""Features of whole scans: against single passes and plain loops, and in the scan's own world by SimpleITK."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import medgmae
from medgmae.data import Grid, resample_like
from medgmae.inference.windows import blend_weights

DATA = Path(__file__).parent.parent / "examples/data"
# Orientation LPS, RAS; none of the sizes is a multiple of the patch.
SCANS = [DATA / "ct_thorax.nii.gz", DATA / "ct_abdomen.nii.gz"]


@pytest.fixture
def nano() -> medgmae.ViT:
    torch.manual_seed(0)
    return medgmae.ViT(32, 8, embed_dim=24, depth=2, num_heads=2)


@pytest.fixture
def local() -> medgmae.ViT:
    """A real encoder whose tokens know nothing but their own patch: no blocks, no table of positions."""
    torch.manual_seed(0)
    model = medgmae.ViT(32, 8, embed_dim=24, depth=0, num_heads=2)
    with torch.no_grad():
        model.pos_embed.zero_()
    return model


def volume(*size: int, channels: int = 1) -> medgmae.Volume:
    data = torch.rand(channels, *size, generator=torch.Generator().manual_seed(1))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    return medgmae.Volume(data, Grid(data.shape[1:], (2.0, 0.7, 0.9), (10.0, -20.0, 30.0), turn))


@torch.no_grad()
def one_pass(model: medgmae.ViT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled vector and map of a single pass, written out."""
    model.eval()
    tokens = model.forward_features(x)
    grid = [size // patch for size, patch in zip(x.shape[2:], model.patch_size, strict=True)]
    patches = tokens[0, model.num_prefix_tokens :].T.reshape(-1, *grid)
    return model.forward_head(tokens, pre_logits=True)[0], patches


@pytest.mark.parametrize("window", ["model", 32, (32, 32, 32), None])
def test_one_window_that_covers_all_is_a_single_pass(nano: medgmae.ViT, window: Any) -> None:
    scan = volume(32, 32, 32)
    pooled, maps = medgmae.extract_features(nano, scan, window=window)
    wanted = one_pass(nano, scan.tensor)
    assert maps is not None
    torch.testing.assert_close(pooled, wanted[0])
    torch.testing.assert_close(maps.data, wanted[1])


@pytest.mark.parametrize("pool", ["avg", "token_avg"])
def test_pooled_is_the_models_own(pool: Any) -> None:
    model = medgmae.ViT(16, 8, embed_dim=24, depth=1, num_heads=2, global_pool=pool, num_classes=5)
    scan = volume(16, 16, 16)
    pooled = medgmae.extract_features(model, scan).pooled
    torch.testing.assert_close(pooled, one_pass(model, scan.tensor)[0])
    assert pooled.shape == (model.num_features,)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
def test_blending_weights_sum_to_one(local: medgmae.ViT, blend: Any, overlap: float) -> None:
    """Where every window says the same of a patch, the blend must say it too: the single pass over the whole scan."""
    scan = volume(40, 72, 56)
    slid = medgmae.extract_features(local, scan, window=(16, 32, 24), overlap=overlap, blend=blend)
    whole = medgmae.extract_features(local, scan, window=None)
    assert slid.map is not None
    assert whole.map is not None
    torch.testing.assert_close(slid.map.data, whole.map.data, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slid.map.grid.affine, whole.map.grid.affine)


@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
def test_sliding_window_is_the_plain_loop(nano: medgmae.ViT, blend: Any) -> None:
    scan = volume(48, 32, 40)
    pooled, maps = medgmae.extract_features(nano, scan, window=(32, 32, 24), overlap=0.5, blend=blend, batch_size=2)
    total, weights, vectors = torch.zeros(24, 6, 4, 5), torch.zeros(6, 4, 5), []
    for d, w in itertools.product((0, 2), (0, 1, 2)):  # first patch of each window
        vector, tokens = one_pass(nano, scan.tensor[:, :, d * 8 : d * 8 + 32, :, w * 8 : w * 8 + 24])
        vectors.append(vector)
        for i, j, k in itertools.product(range(4), range(4), range(3)):
            offsets = ((i - 1.5) / 4, (j - 1.5) / 4, (k - 1) / 3)
            weight = math.exp(-0.5 * sum((o / 0.125) ** 2 for o in offsets)) if blend == "gaussian" else 1.0
            total[:, d + i, j, w + k] += weight * tokens[:, i, j, k]
            weights[d + i, j, w + k] += weight
    assert maps is not None
    torch.testing.assert_close(maps.data, total / weights)
    torch.testing.assert_close(pooled, torch.stack(vectors).mean(0))


def test_gaussian_weights() -> None:
    weights = blend_weights((4, 1, 3))
    assert weights.shape == (4, 1, 3)
    torch.testing.assert_close(weights, weights.flip(0, 1, 2))
    assert weights[1, 0, 1] == weights.max()
    assert (weights > 0).all()
    assert (blend_weights((2, 3, 4), "uniform") == 1).all()


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.name)
@pytest.mark.parametrize("window", [(32, 32, 32), None, (256, 32, 128)])
def test_map_lies_where_simpleitk_says(path: Path, window: Any, local: medgmae.ViT, tmp_path: Path) -> None:
    scan = medgmae.read_volume(path)
    maps = medgmae.extract_features(local, scan, window=window).map
    assert maps is not None
    medgmae.write_volume(maps.with_data(maps.data[:1]), tmp_path / "map.nrrd")
    image, written = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "map.nrrd"))
    np.testing.assert_allclose(written.GetSpacing(), [8 * s for s in image.GetSpacing()], rtol=1e-6)
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-6)
    size, shape = image.GetSize(), written.GetSize()
    # Voxels of the scan in front of the first kept patch; the middle voxel of the scan stays the middle voxel.
    first = []
    for axis in range(3):
        asked = 0 if window is None else window[2 - axis]
        padded = max(math.ceil(size[axis] / 8) * 8, asked)
        first.append(-(padded // 2 - size[axis] // 2) % -8)
        assert first[axis] + 8 * shape[axis] >= size[axis] > first[axis] + 8 * (shape[axis] - 1)
    for index in [(0, 0, 0), tuple(n - 1 for n in shape), (1, 2, 3)]:
        centre = [f + 8 * i + 3.5 for f, i in zip(first, index, strict=True)]
        wanted = image.TransformContinuousIndexToPhysicalPoint(centre)
        np.testing.assert_allclose(written.TransformIndexToPhysicalPoint(index), wanted, atol=1e-3)


@pytest.mark.parametrize("window", ["model", None, (64, 128, 32)])
def test_a_bright_voxel_is_found_in_its_own_patch(local: medgmae.ViT, window: Any) -> None:
    image = sitk.Image(45, 83, 22, sitk.sitkFloat32)  # x, y, z
    image.SetSpacing((0.8, 1.5, 3.0))
    image.SetOrigin((-30.0, 44.0, 12.5))
    image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    for x, y, z in [(0, 0, 0), (44, 82, 21), (17, 40, 9)]:
        image[x, y, z] = 100.0
        data = torch.from_numpy(sitk.GetArrayFromImage(image))[None]
        columns = np.array(image.GetDirection()).reshape(3, 3)[:, ::-1]
        scan = medgmae.Volume(data, Grid(data.shape[1:], image.GetSpacing()[::-1], image.GetOrigin(), columns))
        maps = medgmae.extract_features(local, scan, window=window).map
        image[x, y, z] = 0.0
        assert maps is not None
        changed = (maps.data - maps.data.flatten(1).median(1).values.reshape(-1, 1, 1, 1)).abs().amax(0) > 1e-4
        assert changed.sum() == 1
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        offset = maps.grid.index(point) - changed.nonzero()[0].numpy()
        assert (np.abs(offset) <= 0.5).all()


def test_map_goes_back_onto_the_scan(local: medgmae.ViT) -> None:
    scan = volume(24, 40, 33)
    maps = medgmae.extract_features(local, scan).map
    assert maps is not None
    back = resample_like(maps, scan, interpolation="nearest")
    assert back.data.shape == (24, *scan.data.shape[1:])
    # 33 wide: padded by 4 in front and 3 behind; 24 deep: by 4 and 4 up to the window of 32.
    for d, h, w in [(0, 0, 0), (23, 39, 32), (11, 20, 5), (13, 7, 28)]:
        patch = ((d + 4) // 8 - (4 // 8), h // 8, (w + 4) // 8)
        torch.testing.assert_close(back.data[:, d, h, w], maps.data[(slice(None), *patch)])


def test_small_scan_is_padded_on_both_sides(nano: medgmae.ViT) -> None:
    scan = volume(9, 40, 16)
    pooled, maps = medgmae.extract_features(nano, scan, outside=-1.0, window=(32, 40, 32))
    padded = torch.nn.functional.pad(scan.tensor, (8, 8, 0, 0, 12, 11), value=-1.0)
    wanted = one_pass(nano, padded)
    assert maps is not None
    torch.testing.assert_close(pooled, wanted[0])
    torch.testing.assert_close(maps.data, wanted[1][:, 1:3, :, 1:3])


def test_resize_is_one_pass_over_the_whole_scan(nano: medgmae.ViT) -> None:
    scan = medgmae.read_volume(SCANS[0])
    pooled, maps = medgmae.extract_features(nano, scan, resize=True)
    small = medgmae.data.resample(scan, size=(32, 32, 32))
    wanted = one_pass(nano, small.tensor)
    assert maps is not None
    torch.testing.assert_close(pooled, wanted[0])
    assert maps.data.shape == (24, 4, 4, 4)
    ends = np.array([[-0.5] * 3, [3.5] * 3])  # outer corners of the map are those of the scan
    corners = np.array([[-0.5] * 3, [n - 0.5 for n in scan.size]])
    np.testing.assert_allclose(maps.grid.world(ends), scan.grid.world(corners), atol=1e-6)


def test_windows_are_streamed(nano: medgmae.ViT) -> None:
    seen: list[int] = []
    nano.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    first = medgmae.extract_features(nano, volume(64, 64, 48), batch_size=4)
    assert seen == [4] * 4 + [2]  # 3 x 3 x 2 windows
    seen.clear()
    second = medgmae.extract_features(nano, volume(64, 64, 48), want_map=False)
    assert seen == [1] * 18
    assert second.map is None
    torch.testing.assert_close(first.pooled, second.pooled)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_tokens_of_past_windows_are_let_go(pool: Any) -> None:
    model = medgmae.ViT(32, 8, embed_dim=24, depth=1, num_heads=2, global_pool=pool)
    alive: list[int] = []
    seen: list[StorageWeakRef] = []

    def remember(module: torch.nn.Module, args: Any, tokens: Tensor) -> None:
        seen.append(StorageWeakRef(tokens.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in seen))

    model.norm.register_forward_hook(remember)
    medgmae.extract_features(model, volume(64, 64, 48))
    assert len(seen) == 18
    assert max(alive) <= 2


def test_modes_of_the_model_are_given_back() -> None:
    model = medgmae.ViT(16, 8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    results = [medgmae.extract_features(model, volume(16, 16, 16)).pooled for _ in range(2)]
    assert torch.equal(results[0], results[1])
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="multiples"):
        medgmae.extract_features(model, volume(16, 16, 16), window=12)
    assert [module.training for module in model.modules()] == before


def test_features_can_be_trained_on(nano: medgmae.ViT) -> None:
    pooled, maps = medgmae.extract_features(nano, volume(32, 32, 32))
    assert maps is not None
    probe = torch.nn.Linear(24, 2)
    (probe(pooled).sum() + probe(maps.data.flatten(1).T).sum()).backward()
    assert probe.weight.grad is not None
    assert not pooled.requires_grad
    assert all(p.grad is None for p in nano.parameters())


def test_a_masked_autoencoder_gives_its_encoders_features() -> None:
    model: Any = medgmae.create_model("mae_vit_nano_patch8_32")
    scan = volume(40, 32, 32)
    whole, part = medgmae.extract_features(model, scan), medgmae.extract_features(model.encoder, scan)
    assert whole.map is not None
    assert part.map is not None
    assert torch.equal(whole.pooled, part.pooled)
    assert torch.equal(whole.map.data, part.map.data)


def test_precision_of_the_model_is_respected(nano: medgmae.ViT) -> None:
    scan = volume(32, 32, 40)
    exact = medgmae.extract_features(nano, scan).pooled
    cast = medgmae.extract_features(nano, scan, autocast=torch.bfloat16).pooled
    low = medgmae.extract_features(nano.to(torch.bfloat16), scan).pooled
    double = medgmae.extract_features(nano.double(), scan).pooled
    for other in (cast, low, double):
        assert other.dtype == torch.float32
        assert 0 < (other - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.gpu
def test_on_a_gpu(nano: medgmae.ViT) -> None:
    scan = volume(40, 50, 60)
    on_cpu = medgmae.extract_features(nano, scan)
    on_gpu = medgmae.extract_features(nano.cuda(), scan, batch_size=4)
    assert on_cpu.map is not None
    assert on_gpu.map is not None
    assert on_gpu.map.data.device.type == on_gpu.pooled.device.type == "cpu"
    torch.testing.assert_close(on_gpu.map.data, on_cpu.map.data, rtol=1e-2, atol=1e-2)


def test_integers_are_taken(nano: medgmae.ViT) -> None:
    scan = medgmae.Volume((torch.rand(1, 20, 32, 32) * 100).to(torch.int16))
    as_float = scan.with_data(scan.data.float())
    a, b = (medgmae.extract_features(nano, s, outside=-0.5).pooled for s in (scan, as_float))
    assert torch.equal(a, b)


def test_features_show_what_they_are_and_not_their_numbers(nano: medgmae.ViT) -> None:
    features = medgmae.extract_features(nano, volume(40, 32, 32))
    place = "(24, 5, 4, 4), a place every 16 x 5.6 x 7.2 mm"
    assert repr(features) == f"Features(pooled: (24,), map: {place}, {features.map.orientation})"
    html = features._repr_html_()
    assert "<th>pooled</th><td>(24,)</td>" in html
    assert place in html
    pooled_only = medgmae.extract_features(nano, volume(40, 32, 32), want_map=False)
    assert repr(pooled_only) == "PooledFeatures(pooled: (24,))"
    pooled, maps = features
    assert pooled is features.pooled
    assert maps is features.map


def test_the_rim_can_be_repeated_around_a_scan(nano: medgmae.ViT) -> None:
    scan = volume(40, 16, 32)
    padded = torch.nn.functional.pad(scan.tensor, (0, 0, 8, 8, 0, 0), mode="replicate")
    wanted = one_pass(nano, padded)
    pooled, maps = medgmae.extract_features(nano, scan, outside="rim", window=(40, 32, 32))
    assert maps is not None
    torch.testing.assert_close(pooled, wanted[0])
    torch.testing.assert_close(maps.data, wanted[1][:, :, 1:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 20}, r"multiples of the patch \(8, 8, 8\), got 20"),
        ({"window": (32, 32)}, "one size per axis"),
        ({"blend": "linear"}, "blend must be 'gaussian' or 'uniform', got 'linear'"),
        ({"outside": "edge"}, "outside must be an intensity or 'rim', got 'edge'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"resize": True, "window": None}, "needs a window"),
    ],
)
def test_wrong_options_are_refused(nano: medgmae.ViT, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        medgmae.extract_features(nano, volume(32, 32, 32), **options)


def test_wrong_models_and_scans_are_refused(nano: medgmae.ViT) -> None:
    with pytest.raises(ValueError, match=r"the scan has 2 channel\(s\), the model takes 1"):
        medgmae.extract_features(nano, volume(32, 32, 32, channels=2))
    with pytest.raises(ValueError, match=r"model for volumes; ViT with patches of \(8, 8\) pixels is one for images"):
        medgmae.extract_features(medgmae.ViT(32, 8, depth=0, dims=2), volume(32, 32, 32))
    with pytest.raises(TypeError, match="got Linear"):
        medgmae.extract_features(torch.nn.Linear(2, 2), volume(32, 32, 32))
    with pytest.raises(ValueError, match=r"for this batch of one pass the Volume itself, or scan\[0\]"):
        medgmae.extract_features(nano, volume(32, 32, 32).tensor)
    with pytest.raises(TypeError, match=r"must be a Volume, or what medgmae\.as_volume takes; got int"):
        medgmae.extract_features(nano, 3)  # type: ignore[arg-type]
    broken = volume(32, 32, 32)
    broken.data[0, 1, 2, 3] = math.nan
    for scan in (broken, broken.to_sitk(), broken.data):
        with pytest.raises(ValueError, match="1 of 32768 voxels are NaN or infinite"):
            medgmae.extract_features(nano, scan)
