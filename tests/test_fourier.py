"""Fourier codes of intensities: what SelfMedMAE's 2D masked autoencoder predicts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from dialects import to_mae3d
from small_models import small, state_copy, volume
from test_cli import run
from torch import Tensor
from torch.testing import assert_close

import medgmae
from medgmae.losses import fourier_code, fourier_decode, fourier_mse

NAME = "mae2d_vit_nano_patch8_32"


def test_a_code_is_sines_then_cosines() -> None:
    code = fourier_code(torch.tensor([[0.25, -1.0]]), 2, temperature=0.25)
    t = torch.tensor([0.25, -1.0])
    angles = torch.stack([2 * math.pi * t, 4 * math.pi * t], dim=-1)  # 0.25^(-1/2) = 2
    assert_close(code, torch.cat([angles.sin(), angles.cos()], dim=-1)[None])
    assert fourier_code(t.bfloat16(), 3).dtype == torch.float32
    assert fourier_code(t.double(), 3).dtype == torch.float64


@pytest.mark.parametrize(("frequencies", "bounds"), [(1, (-0.5, 0.49)), (3, (-3, 3)), (4, (-3, 3)), (12, (-3, 3))])
def test_an_exact_code_gives_its_number_back(frequencies: int, bounds: tuple[float, float]) -> None:
    low, high = bounds
    values = low + (high - low) * torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    decoded = fourier_decode(fourier_code(values, frequencies), bounds=bounds)
    assert decoded.shape == values.shape
    assert float((decoded - values).abs().max()) < 1e-6
    assert_close(fourier_decode(0.1 * fourier_code(values, frequencies), bounds=bounds), decoded, atol=1e-6, rtol=0)


def test_the_nearest_code_is_found_among_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 6 * torch.rand(2000, generator=generator) - 3
    code = fourier_code(values, 12) + 0.2 * torch.randn(2000, 24, generator=generator)
    decoded = fourier_decode(code)

    def distance(t: Tensor) -> Tensor:
        return (fourier_code(t, 12) - code).square().sum(-1)

    assert bool((distance(decoded) <= distance(values) + 1e-4).all())
    assert float((decoded - values).abs().median()) < 0.001


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frequency"):
        fourier_code(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="positive temperature"):
        fourier_code(torch.zeros(2), 4, temperature=0)
    with pytest.raises(ValueError, match="sines and as many cosines"):
        fourier_decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="bounds low < high"):
        fourier_decode(torch.zeros(2, 4), bounds=(1, 1))
    with pytest.raises(ValueError, match="one shape"):
        fourier_mse(torch.zeros(2), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="leave out norm_target='biased'"):
        medgmae.create_model(NAME, norm_target="biased")


def test_a_perfect_prediction_is_the_image() -> None:
    """The decoder is replaced by the code of the true patches: no loss, and the image comes back."""
    model: Any = small(NAME)
    x = 4 * volume(NAME) - 2
    code = fourier_code(medgmae.patchify(x, 8), model.fourier_frequencies).flatten(-2)
    model.decoder.predict = lambda _: code
    assert float(model(x).loss) == 0
    assert_close(model.reconstruct(x, paste_visible=False), x, atol=1e-6, rtol=0)


def test_one_option_makes_it_a_model_of_intensities() -> None:
    model = medgmae.create_model("mae2d_vit_nano_patch8_32", fourier_frequencies=0)
    assert model(volume(NAME)).pred.shape[-1] == 64
    assert "fourier_frequencies" not in model.settings()


def scrambled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of SelfMedMAE's 2D model, with the weight that reads a patch (C, h, w) as (h, w, C), place by place."""
    official = to_mae3d(state)
    weight = official["encoder.patch_embed.proj.weight"]
    _, channels, rows, columns = weight.shape
    wrong = torch.empty_like(weight)
    for place in range(channels * rows * columns):
        read = (place % channels, place // channels // columns, place // channels % columns)
        held = (place // (rows * columns), place % (rows * columns) // columns, place % columns)
        wrong[(slice(None), *read)] = weight[(slice(None), *held)]
    for table in ("encoder_pos_embed", "decoder_pos_embed"):
        row = torch.zeros(1, 1, official[table].shape[2])
        official[table] = torch.cat([row, official[table]], dim=1)
    del official["encoder_to_decoder.bias"]
    return {**official, "encoder.patch_embed.proj.weight": wrong}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_channels_of_a_published_file_are_put_in_order(channels: int) -> None:
    source: Any = small(NAME, in_chans=channels)
    source.decoder.embed.bias.data.zero_()
    source.decoder.prefix_pos_embed.data.zero_()
    report = medgmae.load_pretrained(model := small(NAME, in_chans=channels), scrambled(state_copy(source)))
    assert report.missing == []
    assert len(report.notes) == int(channels > 1)
    assert {name: bool((value == source.state_dict()[name]).all()) for name, value in model.state_dict().items()} == (
        dict.fromkeys(model.state_dict(), True)
    )


def test_the_table_that_the_published_classifier_loses_is_loaded() -> None:
    source: Any = small(NAME, in_chans=3)
    state = scrambled(state_copy(source))
    classifier: Any = small("vit2d_base_patch16_224", patch_size=8, img_size=16, num_classes=14)
    report = medgmae.load_pretrained(classifier, state)
    assert torch.equal(classifier.pos_embed, source.encoder.pos_embed)
    assert torch.equal(classifier.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)
    assert report.missing == ["head.weight", "head.bias"]


def test_a_class_row_goes_into_the_class_token() -> None:
    source: Any = small(NAME)
    state = scrambled(state_copy(source))
    state["encoder_pos_embed"][:, 0] = 0.5
    medgmae.load_pretrained(model := small(NAME), state)
    assert_close(model.encoder.cls_token, source.encoder.cls_token + 0.5)


def test_a_file_says_how_many_frequencies_it_has(tmp_path: Any) -> None:
    file = tmp_path / "mae.pth.tar"
    model = medgmae.create_model("mae2d_vit_nano_patch8_32", fourier_frequencies=5)
    torch.save({"state_dict": scrambled(state_copy(model))}, file)
    facts = medgmae.inspect_checkpoint(file)
    assert (facts["architecture"], facts["problem"]) == (NAME, None)
    assert facts["model_args"]["fourier_frequencies"] == 5
    with pytest.raises(medgmae.WeightsError, match="fourier_frequencies=5"):
        medgmae.create_model("mae2d_vit_nano_patch8_32", pretrained=file)


def test_info_says_it() -> None:
    done = run("info", NAME, "--json")
    facts = json.loads(done.stdout)
    assert (facts["fourier_frequencies"], facts["fourier_temperature"]) == (4, 0.01)
    assert "fourier_frequencies" not in json.loads(run("info", "mae_vit_nano_patch8_32", "--json").stdout)
