"""Pictures: colours from features, fillings of whole scans, figures; on a real scan and the shipped weights."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm_python

from medgmae import Masking, ViT, Volume, create_model, create_transform, extract_features, reconstruct_scan
from medgmae.data import Grid, crop_or_pad
from medgmae.evaluation import classification_metrics
from medgmae.inference.colours import feature_colours, pca_rgb
from medgmae.inference.features import dense_features
from medgmae.visualize import (
    classification_figure,
    fit_figure,
    images_figure,
    latent_map_figure,
    reconstruction_figure,
    regression_figure,
    runs_figure,
)

DATA = Path(__file__).parent.parent / "examples/data"
TAG = "mae_vit_tiny_patch8_64.demo"


@pytest.fixture(scope="module")
def scan() -> Volume:
    return create_transform(TAG, whole=True)(DATA / "mr_brain_t1.nii.gz")


@pytest.fixture(scope="module")
def small(scan: Volume) -> Volume:
    return crop_or_pad(scan, (40, 44, 36))


def nano() -> torch.nn.Module:
    return create_model("mae_vit_nano_patch8_32").eval()


def test_pca_colours_are_the_principal_components() -> None:
    features = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 9.0, 3.0]).reshape(3, 1, 1, 1)
    rgb = pca_rgb(features)
    assert rgb.shape == (3, 4, 5, 6)
    assert 0 <= float(rgb.min()) < float(rgb.max()) <= 1
    for channel, feature in enumerate((1, 2, 0)):  # by variance
        together = torch.corrcoef(torch.stack([rgb[channel].flatten(), features[feature].flatten()]))[0, 1]
        assert together > 0.95


def test_pca_colours_do_not_depend_on_the_sign_of_an_eigenvector_or_the_order_of_places() -> None:
    features = torch.randn(16, 4, 4, 4)
    flipped = pca_rgb(features.flip(1, 3)).flip(1, 3)
    torch.testing.assert_close(flipped, pca_rgb(features), atol=1e-5, rtol=0)


def test_only_places_in_the_mask_set_the_colours() -> None:
    features, mask = torch.randn(8, 4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[:2] = True
    loud = features.clone()
    loud[:, 2:] = 1e6
    torch.testing.assert_close(pca_rgb(loud, mask)[:, :2], pca_rgb(features, mask)[:, :2])
    torch.testing.assert_close(pca_rgb(features, mask)[:, :2], pca_rgb(features[:, :2]))


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(2, 3, 3, 3), None, "at least 3 features, got (2, 3, 3, 3)"),
        (torch.zeros(5, 3, 3), None, "(E, d, h, w)"),
        (torch.zeros(5, 3, 3, 3), torch.ones(3, 3, 2), "(3, 3, 3) with at least 4 places, got (3, 3, 2)"),
        (torch.zeros(5, 3, 3, 3), torch.zeros(3, 3, 3), "with 0"),
    ],
)
def test_pca_says_what_it_cannot_use(features: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pca_rgb(features, mask)


def test_constant_features_give_finite_colours() -> None:
    assert pca_rgb(torch.ones(4, 2, 2, 2)).isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_reconstruction_keeps_what_was_visible(small: Volume, ratio: float) -> None:
    found = reconstruct_scan(nano(), small, mask_ratio=ratio, generator=torch.Generator().manual_seed(1))
    seen = ~found.visible.data.isnan()
    torch.testing.assert_close(found.visible.data[seen], small.data[seen])
    torch.testing.assert_close(found.filled.data[seen], small.data[seen])
    assert found.filled.data.isfinite().all()
    assert abs(float(seen.float().mean()) - (1 - ratio)) < 0.15
    assert found.gaussians is None
    for part in found[:3]:
        np.testing.assert_allclose(part.grid.affine, small.grid.affine)
        assert part.size == small.size


def test_one_window_equals_the_model(scan: Volume) -> None:
    """On a scan of exactly one window the filling is what ``reconstruct`` gives with the same mask."""
    model, cube = nano(), crop_or_pad(scan, (32, 32, 32))
    found = reconstruct_scan(model, cube, generator=torch.Generator().manual_seed(2))
    hidden = found.visible.data.isnan()[0, ::8, ::8, ::8].flatten()
    order = torch.cat([torch.nonzero(~hidden).flatten(), torch.nonzero(hidden).flatten()])
    masking = Masking(order[None, : int((~hidden).sum())], order.argsort()[None], hidden[None].float())
    torch.testing.assert_close(found.filled.data, model.reconstruct(cube.data[None], masking)[0], atol=1e-5, rtol=0)


def test_the_mask_comes_from_the_generator(small: Volume) -> None:
    first, again, other = (
        reconstruct_scan(nano(), small, generator=torch.Generator().manual_seed(s)).visible.data.isnan()
        for s in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_reconstruction_says_what_it_cannot_use(small: Volume) -> None:
    with pytest.raises(TypeError, match="needs a masked autoencoder of this library, got ViT"):
        reconstruct_scan(create_model("vit_nano_patch8_32"), small)
    with pytest.raises(ValueError, match="norm_target='biased'"):
        reconstruct_scan(create_model("mae_vit_nano_patch8_32", norm_target="biased"), small)
    with pytest.raises(ValueError, match=r"mask_ratio must be .* got 1\.0"):
        reconstruct_scan(nano(), small, mask_ratio=1.0)


def test_dense_features_hold_the_plain_ones_and_lie_between_them(small: Volume) -> None:
    model, cube = nano(), crop_or_pad(small, (32, 32, 32))
    plain = extract_features(model, cube).map
    assert plain is not None
    one = dense_features(model, cube, steps=1)
    torch.testing.assert_close(one.data, plain.data)
    np.testing.assert_allclose(one.grid.affine, plain.grid.affine)
    fine = dense_features(model, cube, steps=2)
    assert fine.data.shape == (48, 8, 8, 8)
    np.testing.assert_allclose(fine.spacing, np.array(plain.spacing) / 2)
    centre = fine.grid.world((np.array(fine.size) - 1) / 2)
    np.testing.assert_allclose(centre, cube.grid.world((np.array(cube.size) - 1) / 2))
    rim = torch.nn.functional.pad(cube.data, (2, 2, 2, 2, 2, 2), mode="replicate")
    for at in ((0, 0, 0), (1, 0, 1), (1, 1, 1)):
        d, h, w = (4 * k for k in at)
        shifted = extract_features(model, cube.with_data(rim[:, d : d + 32, h : h + 32, w : w + 32])).map
        assert shifted is not None
        torch.testing.assert_close(fine.data[:, at[0] :: 2, at[1] :: 2, at[2] :: 2], shifted.data)
    with pytest.raises(ValueError, match=r"steps \(=3\) must be at least 1 and divide the patch \(8, 8, 8\)"):
        dense_features(model, cube, steps=3)


def test_dense_features_end_where_the_plain_ones_do(small: Volume) -> None:
    """Of a scan smaller than the window too, no place lies in the padding."""
    model, slab = nano(), crop_or_pad(small, (21, 44, 9))
    plain = extract_features(model, slab, overlap=0.25, outside="rim").map
    one = dense_features(model, slab, steps=1)
    assert plain is not None
    assert plain.size == one.size == (4, 6, 2)
    torch.testing.assert_close(one.data, plain.data)
    np.testing.assert_allclose(one.grid.affine, plain.grid.affine)
    assert dense_features(model, slab, steps=2).size == (8, 12, 4)


@pytest.mark.parametrize("steps", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_dense_features_lie_where_the_shifted_patches_have_their_middles(steps: int) -> None:
    """A model of tokens that know their own patch alone: the middle of the places that see a voxel is the voxel."""
    torch.manual_seed(0)
    model = ViT(8, 8, embed_dim=24, depth=0, num_heads=2)
    data = torch.zeros(1, 23, 24, 25)
    data[0, 11, 12, 13] = 1e6
    scan = Volume(data)
    dense = dense_features(model, scan, steps=steps, overlap=0.0)
    changed = (dense.data - dense.data[:, :1, :1, :1]).abs().amax(0) > 1e-3
    seen = dense.grid.world(changed.nonzero().numpy())
    voxel = scan.grid.world([11, 12, 13])
    assert int(changed.sum()) == steps**3
    assert (np.abs(seen - voxel) <= 3.5).all()
    assert np.abs(seen.mean(0) - voxel).max() <= 4 / steps


def test_colours_lie_on_the_scan_and_leave_its_background_black(scan: Volume) -> None:
    features = extract_features(create_model(TAG), scan, overlap=0.0).map
    assert features is not None
    colours = feature_colours(features, scan)
    assert colours.data.shape == (3, *scan.size)
    np.testing.assert_allclose(colours.grid.affine, scan.grid.affine)
    far = torch.nn.functional.max_pool3d(scan.data, 7, stride=1, padding=3)[0] <= 0.05
    assert far.float().mean() > 0.3
    assert colours.data[:, far].abs().max() == 0
    assert colours.data[:, scan.data[0] > 0.1].std(dim=1).min() > 0.05


def test_figure_shows_right_on_the_left_and_up_on_top(tmp_path: Path) -> None:
    from PIL import Image

    data = torch.zeros(1, 8, 10, 12)  # RAS array (z, y, x): bright at the top, in front, on the right
    data[:, 4:, 5:, 6:] = 1.0
    scan = Volume(data, Grid(data.shape[1:], 2.0, direction=np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]])))
    assert scan.grid.orientation == "RAS"
    figure = reconstruction_figure(scan, title="corner")
    pictures = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]  # the first row is at the bottom
    assert [picture.shape for picture in pictures] == [(10, 12), (8, 12), (8, 10)]
    for picture in pictures:
        assert picture[-1, 0] == 1.0  # top left
        assert picture[0, 0] == picture[-1, -1] == 0.0
    figure.savefig(tmp_path / "corner.png")
    with Image.open(tmp_path / "corner.png") as image:
        assert min(image.size) > 300


def test_the_planes_go_through_the_middle_voxel() -> None:
    """Of n voxels that is voxel n // 2, as crop_or_pad has it."""
    data = torch.zeros(1, 9, 10, 12)
    data[:, 2:6, 1:8, 4:10] = 1.0  # 4, 7 and 6 voxels: their middle ones are 4, 4 and 7
    data[:, 4, 4, 7] = 2.0
    scan = Volume(data).grid.reoriented("RAS")
    figure = reconstruction_figure(Volume(data, scan))
    for axes in figure.axes:
        assert np.asarray(axes.images[0].get_array()).max() == 2.0


def test_figure_has_a_row_per_plane_and_a_column_per_picture(small: Volume, tmp_path: Path) -> None:
    found = reconstruct_scan(nano(), small)
    figure = reconstruction_figure(small, found, feature_colours(dense_features(nano(), small, steps=1), small))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["scan", "visible patches", "reconstruction", "patch features, PCA as RGB"]
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["axial", "coronal", "sagittal"]
    figure.savefig(tmp_path / "scan.png")
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert len(reconstruction_figure(small, found).axes) == 9


def test_pictures_take_images_of_other_libraries(small: Volume) -> None:
    features = extract_features(nano(), small)
    colours = feature_colours(features, small.to_nibabel())
    assert features.map is not None
    torch.testing.assert_close(colours.data, feature_colours(features.map, small).data)
    ours, theirs = reconstruction_figure(small), reconstruction_figure(small.to_sitk(), None, colours.to_metatensor())
    np.testing.assert_array_equal(*(figure.axes[0].images[0].get_array() for figure in (ours, theirs)))
    assert len(theirs.axes) == 6
    latent = small.with_data(torch.rand(small.shape))
    assert len(latent_map_figure(small.to_nibabel(), latent.to_nibabel()).axes) == 7
    gaussians = SimpleNamespace(means=torch.zeros(1, 3, 3), densities=torch.ones(1, 3))
    assert len(fit_figure(small.to_nibabel(), small.to_sitk(), gaussians).axes) == 12


def test_pictures_say_what_they_expected(small: Volume) -> None:
    model, features = nano(), extract_features(nano(), small)
    calls: list[tuple[Any, str]] = [
        (lambda: feature_colours(model, small), "features must be what extract_features.* got MaskedAutoencoder"),
        (lambda: feature_colours(features, model), "scan must be the scan that the features are of; got MaskedAuto"),
        (lambda: reconstruction_figure(model, small), "scan must be the prepared scan; got MaskedAutoencoder"),
        (lambda: reconstruction_figure(small, small), "reconstruction must be what reconstruct_scan.* got Volume"),
        (lambda: reconstruction_figure(small, None, features), "colours must be what feature_colours.* got Features"),
        (lambda: latent_map_figure(model, small), "scan must be the prepared scan; got MaskedAutoencoder"),
        (lambda: latent_map_figure("a.nii.gz", small), "scan must be the prepared scan; got str"),
        (lambda: latent_map_figure(small, features), "latent must be what latent_to_spatial.* got Features"),
        (lambda: fit_figure(model, small, features), "scan must be the scan that was fitted; got MaskedAutoencoder"),
        (lambda: fit_figure(small, features, features), "rendered must be the Gaussians rendered .* got Features"),
        (lambda: fit_figure(small, small, features), "gaussians must be Gaussians in LPS mm; got Features"),
    ]
    for call, message in calls:
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="map is a Tensor without a geometry"):
        feature_colours(torch.zeros(4, 2, 2, 2), small)
    with pytest.raises(ValueError, match=r"rendered has shape .* expected the scan's"):
        fit_figure(small, crop_or_pad(small, 8), SimpleNamespace(means=small.data, densities=small.data))


def test_without_matplotlib_the_error_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch; from medgmae import Volume; from medgmae.visualize import reconstruction_figure\n"
        "reconstruction_figure(Volume(torch.rand(1, 4, 4, 4)))\n"
    )
    done = warm_python.run("-c", code)
    assert done.returncode == 1
    assert "pip install medgmae[viz]" in done.stderr.splitlines()[-1]


def test_planes_side_by_side_on_one_scale() -> None:
    plane = torch.rand(8, 12)
    hidden = plane.masked_fill(plane > 0.5, float("nan"))
    figure = images_figure({"plane": plane, "visible": hidden, "twice": 2 * plane}, title="a")
    assert [axes.get_title() for axes in figure.axes] == ["plane", "visible", "twice"]
    limits = {axes.images[0].get_clim() for axes in figure.axes}
    assert limits == {(float(plane.min()), float(plane.max()))}
    for images in ({}, {"volume": torch.rand(2, 3, 4)}):
        with pytest.raises(ValueError, match=r"images \(h, w\) by title"):
            images_figure(images)


def test_curves_of_runs() -> None:
    logs = {"a": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "validation_psnr": 9.0}], "b": [], "c": []}
    logs["c"] = [{"step": 2, "validation_psnr": 8.0}]
    figure = runs_figure(logs)
    titles = {axes.get_title(): axes for axes in figure.axes}
    assert set(titles) == {"loss", "PSNR of hidden voxels, dB"}
    assert titles["loss"].get_yscale() == "log"
    psnr = titles["PSNR of hidden voxels, dB"].lines
    assert [line.get_label() for line in psnr] == ["a", "c"]
    assert psnr[0].get_color() == titles["loss"].lines[0].get_color() != psnr[1].get_color()
    with pytest.raises(ValueError, match="no numbers in the logs of b"):
        runs_figure({"b": []})


@pytest.mark.parametrize("classes", [2, 3])
def test_curves_of_classifiers_and_of_their_folds(classes: int) -> None:
    labels = torch.arange(90) % classes
    noise = torch.randn(90, classes, generator=torch.Generator().manual_seed(1))
    shares = (noise + torch.nn.functional.one_hot(labels, classes)).softmax(1)
    folds = torch.arange(90) // 30
    folds[labels == 1] %= 2  # fold 2 has no case of class 1
    figure = classification_figure(shares, labels, ["no", "yes", "perhaps"][:classes], folds=folds, title="probe")
    roc, precision, confusion, calibration = figure.axes
    drawn = [1] if classes == 2 else [0, 1, 2]
    assert len(roc.lines) == sum(1 + (2 if k == 1 else 3) for k in drawn) + 1  # and the line of chance
    assert len(precision.lines) == len(roc.lines) - 1
    assert len(calibration.lines) == len(drawn) + 1
    aucs = [re.search(r": ([\d.]+)$", text.get_text()) for text in roc.get_legend().get_texts()]
    if classes == 2:
        assert float(aucs[0][1]) == pytest.approx(classification_metrics(shares.log(), labels).auc, abs=6e-4)
    cells = [int(text.get_text()) for text in confusion.texts]
    assert sum(cells) == 90
    assert cells[0] == int(((labels == 0) & (shares.argmax(1) == 0)).sum())
    assert [tick.get_text() for tick in confusion.get_yticklabels()] == ["no", "yes", "perhaps"][:classes]
    assert figure.get_suptitle() == "probe"
    assert len(classification_figure(shares, labels).axes[0].lines) == len(drawn) + 1


@pytest.mark.parametrize(
    ("more", "message"),
    [({"names": ["a"]}, "1 names for 2 classes"), ({"folds": [0]}, "folds are (1,); expected one per case, (3,)")],
)
def test_curves_of_classifiers_say_what_they_need(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        classification_figure([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]], [1, 0, 0], **more)


def test_points_of_predicted_numbers() -> None:
    targets, folds = torch.arange(30.0), torch.arange(30) % 3
    figure = regression_figure(targets + 2, targets, folds=folds, label="age, years", title="probe")
    (axes,) = figure.axes
    assert [len(line.get_xdata()) for line in axes.lines] == [10, 10, 10, 2]  # and the line where they are the same
    assert axes.lines[1].get_ydata().tolist() == (targets[folds == 1] + 2).tolist()
    assert "error 2," in axes.get_title()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fold 0", "fold 1", "fold 2"]
    assert regression_figure(targets, targets).axes[0].get_legend() is None
    with pytest.raises(ValueError, match=re.escape("folds are (2,); expected one per case, (30,)")):
        regression_figure(targets, targets, folds=[0, 1])
