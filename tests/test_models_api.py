"""What users call on every registered model: intermediates, heads, sizes, options, what optimisers ask."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    OTHER_GRID,
    every,
    every_autoencoder,
    every_encoder,
    masking_for,
    prediction,
    run,
)
from small_models import (
    assert_same_state,
    attends,
    encoder_of,
    full_size,
    has_table,
    is_autoencoder,
    randomize,
    size_of,
    small,
    state_copy,
    volume,
)
from torch import nn

import medgmae
from medgmae.layers.masking import Masking, visible_count
from medgmae.models.encoder import Model
from medgmae.models.registry import model_builder


@every
def test_intermediates(name: str) -> None:
    model, x = encoder_of(small(name)), volume(name, grid=OTHER_GRID)
    grid = tuple(s // p for s, p in zip(x.shape[2:], model.patch_size, strict=True))
    tokens, maps = model.forward_intermediates(x)
    torch.testing.assert_close(tokens, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 24, *grid)] * 2
    _, (last,) = model.forward_intermediates(x, indices=1, norm=True)
    patches = tokens[:, model.num_prefix_tokens :]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), patches)
    _, chosen = model.forward_intermediates(x, indices=[-1, 0])
    assert torch.equal(chosen[0], maps[1])
    assert torch.equal(chosen[1], maps[0])
    (image, prefix) = model.forward_intermediates(x, indices=[1], return_prefix_tokens=True)[1][0]
    assert torch.equal(image, maps[1])
    assert prefix.shape == (2, model.num_prefix_tokens, 24)
    for wrong in ([2], [-3], 3, 0, -1):
        with pytest.raises(ValueError, match="valid: -2 to 1"):
            model.forward_intermediates(x, indices=wrong)


@every
def test_keeping_all_patches_permuted_equals_gathering(name: str) -> None:
    model, x = encoder_of(small(name)).eval(), volume(name, grid=OTHER_GRID)
    grid = tuple(s // p for s, p in zip(x.shape[2:], model.patch_size, strict=True))
    count = torch.Size(grid).numel()
    keep = torch.stack([torch.randperm(count), torch.randperm(count)])
    p = model.num_prefix_tokens
    tokens, kept = model.forward_features(x), model.forward_features(x, keep=keep)
    gathered = tokens[:, p:].gather(1, keep.unsqueeze(-1).expand(-1, -1, 24))
    torch.testing.assert_close(kept, torch.cat([tokens[:, :p], gathered], 1), atol=1e-5, rtol=1e-4)
    few = model.forward_features(x, keep=keep[:, :2])
    assert few.shape == (2, p + 2, 24)
    hidden = x.clone()
    mask = torch.ones(2, count).scatter(1, keep[:, :2], 0.0)
    cut = medgmae.patchify(hidden, model.patch_size) * (1 - mask.unsqueeze(-1))
    hidden = medgmae.unpatchify(cut, model.patch_size, grid, x.shape[1])
    assert torch.equal(model.forward_features(hidden, keep=keep[:, :2]), few)  # hidden voxels are never read


@every
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    model, x = small(name).eval(), volume(name, grid=OTHER_GRID)
    with torch.no_grad():
        expected = run(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, x), expected)
            randomize(other, seed=3)
            assert not torch.equal(run(other, x), expected)
        assert torch.equal(run(model, x), expected)


@every
def test_a_state_dictionary_goes_through_torch_save(name: str) -> None:
    model, buffer = small(name), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = randomize(small(name), seed=9)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_state(other, state_copy(model))


@every
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    model, x = small(name).eval(), volume(name, batch=3)
    masking = masking_for(x, model)
    for i in range(3):
        if is_autoencoder(model):
            one = prediction(model, x[i : i + 1], Masking(*(t[i : i + 1] for t in masking)))
            torch.testing.assert_close(one, prediction(model, x, masking)[i : i + 1], atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(model(x[i : i + 1]), model(x)[i : i + 1], atol=1e-5, rtol=1e-4)


@every
def test_intermediates_in_timms_words(name: str) -> None:
    model, x = encoder_of(small(name)), volume(name, grid=OTHER_GRID)
    tokens, maps = model.forward_intermediates(x)
    for layout in ("NCDHW", "NCHW"):
        assert torch.equal(model.forward_intermediates(x, output_fmt=layout, intermediates_only=True)[1], maps[1])
    flat = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(flat, [maps[0].flatten(2).mT])
    calls: list[str] = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append("second block"))
    stopped, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, norm=True)
    assert not calls
    torch.testing.assert_close(stopped[:, model.num_prefix_tokens :], first.flatten(2).mT)
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(x, output_fmt="NHWC")
    (last,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(last, tokens[:, model.num_prefix_tokens :])
    raw = model.get_intermediate_layers(x, n=[0, 1], reshape=True, norm=False)
    torch.testing.assert_close(list(raw), maps)
    if model.num_prefix_tokens:
        ((_, token),) = model.get_intermediate_layers(x, return_class_token=True)
        torch.testing.assert_close(token, tokens[:, : model.num_class_tokens].mean(1))
    else:
        with pytest.raises(ValueError, match="no class token"):
            model.get_intermediate_layers(x, return_class_token=True)
    info = [{"module": f"blocks.{i}", "num_chs": 24, "reduction": model.patch_size} for i in range(2)]
    assert model.feature_info == info
    assert [model.get_submodule(entry["module"]) for entry in model.feature_info] == list(model.blocks)


@every
def test_a_model_of_another_input_size(name: str, tmp_path: Path) -> None:
    model, x = small(name).eval(), volume(name, grid=OTHER_GRID)
    trained = has_table(model) and encoder_of(model).pos_embed.requires_grad
    expected = run(model, x)
    model.set_input_size(size_of(name, OTHER_GRID))
    size = size_of(name, OTHER_GRID)
    assert model.img_size == size
    assert model.grid_size == tuple(s // p for s, p in zip(size, model.patch_size, strict=True))
    assert (has_table(model) and encoder_of(model).pos_embed.requires_grad) == trained
    torch.testing.assert_close(run(model, x), expected, atol=1e-6, rtol=1e-5)
    medgmae.save_pretrained(model, tmp_path)
    again = medgmae.create_model(tmp_path).eval()
    assert again.img_size == model.img_size
    assert torch.equal(run(again, x), run(model, x))
    with pytest.raises(ValueError, match="multiple of the patch"):
        model.set_input_size([n + 1 for n in model.img_size])


@every
def test_what_is_not_a_batch_is_refused(name: str) -> None:
    model, x = small(name), volume(name)
    for called in {model, encoder_of(model)}:
        with pytest.raises(ValueError, match=r"no batch axis; pass x\[None\]"):
            called(x[0])
        with pytest.raises(ValueError, match=r"no batch and no channel axis; pass x\[None, None\]"):
            called(x[0, 0])
        if encoder_of(model).in_chans != len(x):
            with pytest.raises(ValueError, match=r"no channel axis; pass x\[:, None\]"):
                called(x[:, 0])
        if len(encoder_of(model).patch_size) == 3:
            with pytest.raises(TypeError, match=r"got a Volume; pass its \.tensor"):
                called(medgmae.Volume(x[0]))
        with pytest.raises(TypeError, match="got a ndarray; make it one with"):
            called(x.numpy())
        with pytest.raises(TypeError, match=r"int16.*x\.float\(\)"):
            called(x.to(torch.int16))


@every
def test_options_that_make_no_sense_are_refused(name: str) -> None:
    for wrong in ({"drop_path_rate": 1.5}, {"drop_path_rate": -1}, {"drop_path_rate": None}, {"in_chans": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            small(name, **wrong)
    assert small(name, img_size=tuple(np.int64(n) for n in size_of(name))).img_size == size_of(name)


@every
def test_options_build_the_model_again(name: str) -> None:
    model = small(name, drop_path_rate=0.1)
    assert isinstance(model, Model)
    with torch.device("meta"):
        again: Any = model_builder(type(model).__name__)(**json.loads(json.dumps(model.options())))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert json.dumps(again.options()) == json.dumps(model.options())
    assert again.settings() == model.settings()


@every
def test_what_optimisers_leave_undecayed(name: str) -> None:
    model = small(name)
    names = model.no_weight_decay()
    assert names <= set(dict(model.named_parameters()))
    prefix = "encoder." if hasattr(model, "decoder") else ""
    tokens = {*(["pos_embed"] if has_table(model) else []), *(["cls_token"] if model.num_prefix_tokens else [])}
    assert {n.removeprefix(prefix) for n in names if n.startswith(prefix) and "blocks" not in n} >= tokens
    if is_autoencoder(model):
        assert any(n.startswith("decoder.") for n in names)


@every_autoencoder
def test_a_mask_ratio_in_the_call(name: str, tmp_path: Path) -> None:
    model, x = small(name), volume(name)
    assert model(x, mask_ratio=0.5).mask.mean() == model(x, None, 0.5).mask.mean() == 0.5
    hidden = 1 - visible_count(model(x).mask.shape[1], model.mask_ratio) / model(x).mask.shape[1]
    assert model(x).mask.mean() == hidden
    with pytest.raises(ValueError, match="leave out mask_ratio"):
        model(x, masking_for(x, model), mask_ratio=0.5)
    with pytest.raises(TypeError, match=r"expected a Masking, or mask_ratio=0\.75"):
        model(x, 0.75)
    assert torch.equal(model.reconstruct(x, mask_ratio=0.0), x)
    assert torch.equal(model.forward_features(x), model.encoder.forward_features(x))
    model.mask_ratio = 0.5  # a schedule may change it
    medgmae.save_pretrained(model, tmp_path)
    assert medgmae.create_model(tmp_path).mask_ratio == 0.5


@every
def test_drop_path_acts_in_training_only(name: str) -> None:
    model, x = small(name, drop_path_rate=0.5), volume(name, batch=8)
    assert [block.drop_path.p for block in encoder_of(model).blocks] == [0.0, 0.5]
    x = x[:1].expand(8, *x.shape[1:])
    tokens = encoder_of(model).forward_features(x)
    assert not all(torch.equal(tokens[0], other) for other in tokens)
    model.eval()
    assert torch.equal(run(model, x), run(model, x))
    plain = small(name).eval()
    assert torch.equal(run(model, x), run(plain, x))


@every_encoder
def test_resetting_the_classifier_keeps_the_features(name: str, tmp_path: Path) -> None:
    head = {"head_hidden": (6,)} if attends(full_size(name)) else {}
    model, x = small(name, num_classes=3, global_pool="avg", **head).double().eval(), volume(name).double()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), features)
    medgmae.save_pretrained(model, tmp_path)
    again: Any = medgmae.create_model(f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(again(x.float()), model(x).float(), atol=1e-5, rtol=1e-4)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(4, "max")
    tokens = model.forward_features(x)
    torch.testing.assert_close(
        model.forward_head(tokens, True), model.fc_norm(tokens[:, model.num_prefix_tokens :].amax(1))
    )
    medgmae.save_pretrained(model, tmp_path)
    again = medgmae.create_model(f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(again(x.float()), model(x).float(), atol=1e-5, rtol=1e-4)
    head = model.head
    for wrong, message in (
        ((4, "mean"), "did you mean 'avg'"),
        ((-1,), "num_classes must be"),
        ((2.0,), "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(*wrong)
    assert (model.head is head, model.num_classes, model.global_pool) == (True, 4, "max")
