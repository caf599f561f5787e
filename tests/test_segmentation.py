"""Whole scans through a model of voxels: where windows lie, how they are averaged, what is kept and what comes back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import medgmae
from medgmae.data import Grid, Volume
from medgmae.inference.segmentation import _OpenSums
from medgmae.inference.windows import lay_out


class Small(nn.Module):
    """Logits that depend on a voxel's neighbours and on where in the window it lies."""

    def __init__(self, classes: int = 3, channels: int = 1, img_size: tuple[int, int, int] = (8, 6, 10)) -> None:
        super().__init__()
        self.img_size, self.in_chans = img_size, channels
        self.conv = nn.Conv3d(channels, classes, 3, padding=1)
        self.place = nn.Parameter(torch.randn(classes, *img_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.place


def scan_of(*size: int, channels: int = 1) -> Volume:
    return Volume(torch.randn(channels, *size), Grid(size, (2.0, 1.0, 1.5), (5.0, 6.0, -7.0)))


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(
    ("size", "overlap"),
    [((20, 17, 31), 0.5), ((5, 6, 9), 0.5), ((8, 40, 7), 0.25), ((19, 5, 26), 0.0), ((9, 13, 21), 0.8)],
    ids=str,
)
def test_strided_windows_equal_monai(size: tuple[int, int, int], overlap: float, mode: str) -> None:
    from monai.inferers import sliding_window_inference

    model, scan = Small(), scan_of(*size)
    blend: Any = {"constant": "uniform"}.get(mode, mode)
    ours = medgmae.predict_logits(model, scan, overlap=overlap, blend=blend, placement="strided", batch_size=3)
    with torch.no_grad():
        theirs: Any = sliding_window_inference(scan.tensor, model.img_size, 3, model, overlap, mode)
    torch.testing.assert_close(ours.data, theirs[0], atol=2e-6, rtol=1e-5)
    labels = medgmae.segment_scan(model, scan, overlap=overlap, blend=blend, placement="strided").labels
    agree = (labels.data[0] == theirs[0].argmax(0)).float().mean()
    assert agree > 0.999


def by_hand(model: nn.Module, scan: Volume, window: tuple[int, ...], overlap: float) -> Tensor:
    """Uniform mean over the windows of the even layout, all of the padded scan at once."""
    layout = lay_out(scan.size, (1, 1, 1), window, overlap)
    padded = torch.zeros(len(scan.data), *layout.grid)
    padded[(slice(None), *layout.scan)] = scan.data
    sums, count = torch.zeros(3, *layout.grid), torch.zeros(layout.grid)
    with torch.no_grad():
        for start in layout.windows():
            where = layout.patches(start)
            sums[(slice(None), *where)] += model(padded[(slice(None), *where)][None])[0]
            count[where] += 1
    return (sums / count)[(slice(None), *layout.scan)]


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(*[st.integers(1, 24)] * 3), overlap=st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9]))
def test_finished_blocks_are_the_mean_of_all_windows(size: tuple[int, ...], overlap: float) -> None:
    model, scan = Small(img_size=(4, 5, 3)), scan_of(*size)
    found = medgmae.predict_logits(model, scan, overlap=overlap, blend="uniform", batch_size=2)
    torch.testing.assert_close(found.data, by_hand(model, scan, (4, 5, 3), overlap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", list(itertools.permutations([40, 12, 20])), ids=str)
def test_what_is_kept_does_not_grow_with_the_longest_axis(size: tuple[int, int, int]) -> None:
    def kept(size: tuple[int, ...]) -> int:
        sums = _OpenSums(lay_out(size, (1, 1, 1), 8, 0.5))
        return sum(Tensor.numel(torch.empty(sums._size(axis, 3), device="meta")) for axis in range(3))

    longer = tuple(n * 10 if n == 40 else n for n in size)
    assert kept(longer) <= kept(size)
    assert kept(size) < 3 * 40 * 12 * 20


def test_labels_and_probabilities_are_of_the_logits() -> None:
    model, scan = Small(), scan_of(12, 9, 17)
    logits = medgmae.predict_logits(model, scan).data
    result = medgmae.segment_scan(model, scan, probabilities=True)
    assert torch.equal(result.labels.data, logits.argmax(0, keepdim=True).to(torch.uint8))
    assert result.probabilities is not None
    torch.testing.assert_close(result.probabilities.data, logits.softmax(0))
    assert result.labels.grid is scan.grid
    masks = medgmae.segment_scan(model, scan, multilabel=True, probabilities=True)
    assert torch.equal(masks.labels.data, (logits.sigmoid() > 0.5).to(torch.uint8))
    assert masks.probabilities is not None
    torch.testing.assert_close(masks.probabilities.data, logits.sigmoid())
    assert medgmae.segment_scan(model, scan).probabilities is None


def test_many_classes_need_a_wider_type() -> None:
    model, scan = nn.Conv3d(1, 300, 1), scan_of(4, 4, 4)
    labels = medgmae.segment_scan(model, scan, window=4).labels
    assert labels.dtype == torch.int16
    assert torch.equal(labels.data[0], medgmae.predict_logits(model, scan, window=4).data.argmax(0).short())


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_flips_make_the_result_the_mirror_image_of_itself(axes: tuple[int, ...]) -> None:
    model, scan = Small(), scan_of(8, 6, 10)
    found = medgmae.predict_logits(model, scan, mirror=True if len(axes) == 3 else axes).data
    flipped = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
    with torch.no_grad():
        each = [
            model(scan.tensor.flip([a + 2 for a in flip]))[0].flip([a + 1 for a in flip])
            if flip
            else model(scan.tensor)[0]
            for flip in flipped
        ]
    assert len(each) == 2 ** len(axes)
    torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_labels_go_back_to_the_source(tmp_path: Any) -> None:
    """By geometry: turned, resampled and cut; exactly where nothing was resampled."""
    source = Volume(torch.zeros(1, 20, 24, 16), Grid((20, 24, 16), (2.0, 1.0, 1.0), (3.0, 4.0, 5.0)))
    source.data[:, 4:12, 6:18, 3:11] = 1.0
    above: Any = nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        above.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))
        above.bias.copy_(torch.tensor([0.5, -0.5]))
    for block, exact in (
        ({"orientation": "RAS", "axes": "xyz", "crop": ["foreground"]}, True),
        ({"orientation": "RAS", "spacing": [1.0, 1.0, 1.0], "resample": {"to": "spacing"}}, False),
    ):
        prepared = medgmae.create_transform(block, whole=True)(source)
        assert prepared.size != source.size
        labels = medgmae.segment_scan(above, prepared, window=8, like=source).labels
        assert labels.grid is source.grid
        wrong = int((labels.data != source.data.to(torch.uint8)).sum())
        assert wrong == 0 if exact else wrong < 0.05 * source.data.sum()
        on_grid = medgmae.segment_scan(above, prepared, window=8, like=source.grid).labels
        assert torch.equal(on_grid.data, labels.data)


def test_what_lies_outside_of_a_small_scan() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x

    scan = scan_of(3, 3, 3)
    medgmae.predict_logits(Watching(), scan, window=4, outside=-7.0)
    medgmae.predict_logits(Watching(), scan, window=4, outside="rim")
    assert int((seen[0] == -7).sum()) == 64 - 27
    assert float(seen[1].min()) == float(scan.data.min())


def test_a_model_may_return_its_own_memory() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.full((1, 2, 4, 4, 4), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.value

    class Expanded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(3.0).expand(len(x), 2, *x.shape[2:])

    for model in (Constant(), Expanded()):
        found = medgmae.predict_logits(model, scan_of(9, 9, 9), window=4).data
        torch.testing.assert_close(found, torch.full((2, 9, 9, 9), 3.0))


def test_modes_are_given_back_and_half_precision_is_averaged_in_single() -> None:
    model, scan = Small().train(), scan_of(12, 9, 17)
    assert medgmae.predict_logits(model.double(), scan).dtype == torch.float32
    assert model.training
    exact = medgmae.predict_logits(model.float(), scan).data
    rough = medgmae.predict_logits(model, scan, autocast=torch.bfloat16).data
    assert 0 < (exact - rough).abs().max() < 0.1


class Bad(nn.Module):
    img_size = (4, 4, 4)

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Bad(lambda x: x.mean((2, 3, 4))),
            {},
            r"of windows \(1, 1, 4, 4, 4\) the model Bad makes \(1, 1\); expected logits",
        ),
        (Bad(lambda x: x[..., :2]), {}, r"makes \(1, 1, 4, 4, 2\); expected logits \(1, K, 4, 4, 4\)"),
        (Bad(lambda x: {"out": x}), {}, "makes dict; expected logits"),
        (Bad(lambda x: x / 0), {}, "NaN or infinite in torch.float32; expected finite ones"),
        (Bad(lambda x: x), {}, "one output, of which the largest is always the first.*multilabel=True"),
        (Small(channels=4), {}, r"has 1 channel\(s\), the model takes 4"),
        (nn.Conv3d(1, 2, 1), {}, "window is 'model'; expected voxels.*Conv3d has not"),
        (Small(), {"window": "all"}, "window is 'all'; expected voxels"),
        (Small(), {"window": (4, 4)}, "one size per axis"),
        (Small(), {"overlap": 1}, "overlap must be at least 0 and below 1, got 1"),
        (Small(), {"placement": "monai"}, "placement must be 'even' or 'strided', got 'monai'"),
        (Small(), {"blend": "constant"}, "blend must be 'gaussian' or 'uniform', got 'constant'"),
        (Small(), {"mirror": (0, 3)}, r"mirror is \(0, 3\); expected"),
        (Small(), {"mirror": (1, 1)}, r"mirror is \(1, 1\); expected"),
        (Small(), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (Small(), {"outside": "edge"}, "outside must be an intensity or 'rim', got 'edge'"),
    ],
)
def test_one_error_for_each_wrong_input(model: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        medgmae.segment_scan(model, scan_of(6, 6, 6), **options)


def test_a_path_is_not_a_prepared_scan() -> None:
    with pytest.raises(TypeError, match=r"create_transform\(model, whole=True\)\(path\)"):
        medgmae.segment_scan(Small(), "scan.nii.gz")  # type: ignore[arg-type]
