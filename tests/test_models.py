"""What every registered model must do. A new model is tested here by being registered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import (
    AUTOENCODERS,
    ENCODERS,
    OTHER_GRID,
    every,
    every_autoencoder,
    every_encoder,
    loss_of,
    masking_for,
    patch_length,
    plain,
    prediction,
    run,
    through_compilers,
)
from small_models import (
    assert_same_state,
    by_sequence,
    encoder_of,
    full_size,
    has_blocks,
    has_table,
    is_autoencoder,
    randomize,
    renders,
    segments,
    size_of,
    small,
    state_copy,
    volume,
)
from torch import nn

import medgmae
from medgmae.layers.masking import Masking


def test_there_are_encoders_and_autoencoders() -> None:
    assert len(ENCODERS) >= 12
    assert len(AUTOENCODERS) >= 20


@every
def test_the_registered_size_runs_without_storage(name: str) -> None:
    model = full_size(name)
    encoder = encoder_of(model)
    assert tuple(s // p for s, p in zip(encoder.img_size, encoder.patch_size, strict=True)) == encoder.grid_size
    x = torch.empty(1, encoder.in_chans, *encoder.img_size, device="meta")
    assert encoder.forward_features(x).shape == (
        1,
        encoder.num_prefix_tokens + math.prod(encoder.grid_size),
        encoder.embed_dim,
    )
    assert model.config["architecture"] == name
    assert medgmae.create_model.__doc__
    if is_autoencoder(model):
        count = encoder.num_prefix_tokens + math.prod(encoder.grid_size)
        tokens = torch.empty(1, count, encoder.embed_dim, device="meta")
        if renders(name):
            count = model.decoder.total_gaussians
            assert [t.shape for t in model.decoder(tokens).tensors()] == [
                (1, count, 3),
                (1, count, 3),
                (1, count, 4),
                (1, count),
            ]
            assert model(x).volume.shape == x.shape
        else:
            pred = model.decoder(
                tokens, **({"levels": [tokens] * len(model.decoder.taps)} if has_blocks(model.decoder) else {})
            )
            times = encoder.in_chans if by_sequence(name) else 1  # a patch of every channel by itself
            assert pred.shape == (1, math.prod(encoder.grid_size) * times, patch_length(model) // times)


@every_encoder
def test_encoder_shapes(name: str) -> None:
    model, x = small(name, num_classes=5).eval(), volume(name)
    tokens = model.forward_features(x)
    patches = 2 ** len(model.patch_size)
    assert tokens.shape == (2, model.num_prefix_tokens + patches, 24)
    assert model(x).shape == (2, 5)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(tokens, pre_logits=True))


@every_autoencoder
def test_autoencoder_shapes(name: str) -> None:
    model, x = small(name), volume(name)
    masking = masking_for(x, model)
    out = model(x, masking)
    assert out.loss.shape == ()
    wanted = x.shape if renders(name) else (2, masking.mask.shape[1], patch_length(model))
    assert prediction(model, x, masking).shape == wanted
    assert torch.equal(out.mask, masking.mask)
    assert model.reconstruct(x, masking).shape == x.shape


@every
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    model = small(name, **({"num_classes": 3} if name in ENCODERS else {}))
    loss_of(model, volume(name)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    tables = {n for n in dict(model.named_parameters()) if n.endswith("pos_embed")}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} <= tables


@every
def test_a_saved_model_comes_back_exactly(name: str, tmp_path: Path) -> None:
    model, x = small(name).eval(), volume(name)
    medgmae.save_pretrained(model, tmp_path)
    again: Any = medgmae.create_model(f"local-dir:{tmp_path}").eval()
    assert_same_state(again, state_copy(model))
    assert torch.equal(run(again, x), run(model, x))
    assert {k: p.requires_grad for k, p in again.named_parameters()} == {
        k: p.requires_grad for k, p in model.named_parameters()
    }
    other = randomize(small(name), seed=5)
    medgmae.load_pretrained(other, tmp_path)
    assert_same_state(other, state_copy(model))


@every
def test_another_size_at_run_time_equals_one_at_construction(name: str) -> None:
    model = small(name).eval()
    resized = small(name, img_size=size_of(name, OTHER_GRID)).eval()
    report = medgmae.load_pretrained(resized, model.state_dict(), source_grid=model_grid(model))
    assert ("pos_embed" in " ".join(report.resized)) == has_table(model)
    x = volume(name, grid=OTHER_GRID)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x), run(resized, x), atol=1e-6, rtol=1e-5)
        first = run(model, x)
        run(model, volume(name))  # the table of the other grid is kept for the next call, and not for another grid
        assert torch.equal(run(model, x), first)
    torch.testing.assert_close(run(model, x), first)  # with gradients the table is resampled anew


def model_grid(model: nn.Module) -> tuple[int, ...]:
    """Patch grid of the model's table."""
    return tuple(encoder_of(model).grid_size)


@every
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    model, x = small(name), volume(name)
    with pytest.raises(ValueError, match="multiple of the patch"):
        model(x[..., :-1])
    with pytest.raises(ValueError, match="in_chans=") as error:
        encoder_of(model)(torch.cat([x, x], 1))
    assert str(2 * x.shape[1]) in str(error.value)
    with pytest.raises(ValueError, match="input must be"):
        encoder_of(model)(x[0, 0])


@every
def test_other_channels(name: str) -> None:
    chans = encoder_of(full_size(name)).in_chans + 2
    if renders(name):
        with pytest.raises(ValueError, match=r"one intensity.*got in_chans=3"):
            small(name, in_chans=chans)
        return
    if by_sequence(name):
        with pytest.raises(ValueError, match=r"name them, as in sequences=\['t1', 't1ce'\], instead of in_chans=6"):
            small(name, in_chans=chans)
        return
    model = small(name, in_chans=chans)
    x = volume(name, chans=chans)
    loss_of(model, x).backward()
    other = small(name)
    report = medgmae.load_pretrained(encoder_of(model), encoder_of(other).state_dict())
    assert "channels" in report.adapted["patch_embed.proj.weight"]
    one = volume(name)[:, :1]
    many = one.expand(-1, chans, *one.shape[2:])
    few = one.expand(-1, chans - 2, *one.shape[2:])
    torch.testing.assert_close(
        encoder_of(model).forward_features(many), encoder_of(other).forward_features(few), atol=1e-4, rtol=1e-4
    )


@every
def test_float64_agrees_with_float32(name: str) -> None:
    model, x = small(name).eval(), volume(name, grid=OTHER_GRID)
    single = run(model, x)
    double = run(model.double(), x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), atol=1e-4, rtol=1e-4)


@every
def test_autocast_to_bfloat16(name: str) -> None:
    model, x = small(name), volume(name, grid=OTHER_GRID)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x)
        half = run(model, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    full = run(model, x)
    assert (half.float() - full).norm() < 0.05 * full.norm()


@through_compilers
def test_export_with_any_batch(name: str) -> None:
    model, x = small(name).eval(), volume(name, grid=OTHER_GRID)
    batch, other = torch.export.Dim("batch", min=1, max=64), volume(name, batch=3, grid=OTHER_GRID)
    if is_autoencoder(model):
        shapes = {"x": {0: batch}, "masking": Masking({0: batch}, {0: batch}, {0: batch})}
        program = torch.export.export(model, (x, masking_for(x, model)), dynamic_shapes=shapes).module()
        masking = masking_for(other, model)
        torch.testing.assert_close(plain(program(other, masking)), plain(model(other, masking)))
    else:
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        torch.testing.assert_close(program(other), model(other))


@through_compilers
def test_dynamo_sees_one_graph(name: str) -> None:
    torch.compiler.reset()
    model, x = small(name), volume(name, grid=OTHER_GRID)
    arguments = (x, masking_for(x, model)) if is_autoencoder(model) else (x,)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(plain(compiled(*arguments)), plain(model(*arguments)))


NANO = [name for name in AUTOENCODERS if "_nano_patch8_32" in name and "2d" not in name]
QUICK = ("mae_vit_nano_patch8_32", "gmae_vit_nano_patch8_32")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NANO])
def test_an_autoencoder_compiles_with_its_gradients(name: str) -> None:
    torch.compiler.reset()
    model, x = small(name), volume(name, grid=OTHER_GRID)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss_of(model, x), trained)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, masking_for(x, model)).loss, trained)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_nano_patch8_32", "vim_nano_patch8_32"])
def test_inductor_computes_the_same(name: str) -> None:
    torch.compiler.reset()
    model, x = small(name, depth=1).eval(), volume(name, grid=OTHER_GRID)
    with torch.no_grad():
        compiled: Any = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


@every
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model, x = small(name), volume(name)
    kept = torch.autograd.grad(loss_of(model, x), [p for p in model.parameters() if p.requires_grad])
    calls: list[str] = []
    parts = [encoder_of(model).blocks]
    if hasattr(model, "decoder") and (segments(name) or has_blocks(model.decoder)):
        parts.append(model.decoder.stages if segments(name) else model.decoder.blocks)
    for part in parts:
        # the last one: the first stage of a segmenter computes again by itself
        part[-1].register_forward_pre_hook(lambda *_: calls.append("forward"))
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(loss_of(model, x), [p for p in model.parameters() if p.requires_grad])
    assert len(calls) == 2 * len(parts)  # once forward, once more for the backward pass
    for a, b in zip(saved, kept, strict=True):
        torch.testing.assert_close(a, b)
