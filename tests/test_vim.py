"""Vim's own options, and the masked autoencoders around it. What every model must do is tested in test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomize, small
from torch import Tensor, nn

import medgmae
from medgmae.layers.mamba import MambaStack, RMSNorm
from medgmae.layers.rope import rotate
from medgmae.models.mae_vim import masked_vim
from medgmae.training import param_groups

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 2, "embed_dim": 12, "depth": 2, "d_state": 4}
PLACES = [None, "front", "middle", "double"]
ROPES = [None, "sequence", "axial", "axial_published"]


def vim(**options: Any) -> Any:
    torch.manual_seed(1)
    return randomize(medgmae.Vim(**{**SIZES, **options})).eval()


def masked(**options: Any) -> Any:
    decoder = {"decoder_embed_dim": 12, "decoder_depth": 2}
    return randomize(masked_vim(**{**SIZES, **decoder, **options})).eval()


def volume(*size: int) -> Tensor:
    return torch.randn(2, 2, *(size or (8, 8, 8)))


def seen_by(block: nn.Module, run: Any) -> Tensor:
    """The tokens that a block is given while ``run`` runs."""
    found: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize(("place", "at"), [("front", [0]), ("middle", [4]), ("double", [0, 9])])
def test_class_tokens_have_their_place_in_the_scan(place: Any, at: list[int]) -> None:
    model, x = vim(class_token=place, rope=None), volume()
    scanned = seen_by(model.blocks[0], lambda: model(x))
    patches = model.patch_embed(x) + model.pos_embed
    others = [i for i in range(8 + len(at)) if i not in at]
    torch.testing.assert_close(scanned[:, at], model.cls_token.expand(2, -1, -1))
    torch.testing.assert_close(scanned[:, others], patches)
    model.blocks = MambaStack(12, 0)  # the tokens go straight to the last norm
    torch.testing.assert_close(model.forward_features(x), model.norm(torch.cat([scanned[:, at], patches], 1)))
    assert isinstance(model.patch_embed.norm, nn.Identity)
    assert isinstance(vim().patch_embed.norm, nn.LayerNorm)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rope", ROPES)
def test_every_place_with_every_rotation(place: Any, rope: Any) -> None:
    """Maps, an odd number of visible patches in any order, another grid."""
    model, x = vim(class_token=place, rope=rope), volume(4, 12, 8)
    prefix = model.num_prefix_tokens
    assert prefix == {None: 0, "double": 2}.get(place, 1)
    tokens, pairs = model.forward_intermediates(x, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(tokens, model.forward_features(x))
    image, tokens_of_class = pairs[-1]
    torch.testing.assert_close(torch.cat([tokens_of_class, image.flatten(2).transpose(1, 2)], 1), tokens)
    keep = torch.tensor([[4, 0, 3], [1, 5, 2]])
    kept, ordered = model.forward_features(x, keep), model.forward_features(x, keep.sort(1)[0])
    assert kept.shape == (2, prefix + 3, 12)
    assert torch.equal(kept[:, :prefix], ordered[:, :prefix])
    ranks = keep.argsort(1).argsort(1).unsqueeze(-1).expand(-1, -1, 12)
    assert torch.equal(kept[:, prefix:], ordered[:, prefix:].gather(1, ranks))


@pytest.mark.parametrize(("place", "rope"), [("middle", "axial"), ("double", "sequence")])
def test_chosen_patches_and_class_tokens_compile(place: Any, rope: Any) -> None:
    torch.compiler.reset()
    model, x, keep = vim(class_token=place, rope=rope), volume(), torch.tensor([[4, 0, 3], [1, 5, 2]])
    compiled: Any = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, keep), model.forward_features(x, keep))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    ("place", "at", "at_of_all"),
    [(None, [], []), ("front", [0], [0]), ("middle", [1], [4]), ("double", [0, 4], [0, 9])],
)
def test_tokens_are_turned_by_their_own_place(rope: Any, place: Any, at: list[int], at_of_all: list[int]) -> None:
    """Before the first block: by the place in the scan, or a patch as in the whole volume and a class token not."""
    x, keep = volume(), torch.tensor([[6, 1, 3], [0, 7, 2]])
    model = vim(class_token=place, rope=rope, scan_order="given")
    whole = seen_by(model.blocks[0], lambda: model.forward_features(x))
    few = seen_by(model.blocks[0], lambda: model.forward_features(x, keep))
    rotary, model.blocks._rotary = model.blocks._rotary, None
    plain = seen_by(model.blocks[0], lambda: model.forward_features(x, keep))
    assert torch.equal(few, plain) == (rope is None)
    if rope == "sequence":
        torch.testing.assert_close(few, rotate(plain, rotary.table((), few.shape[1], few)))
        return
    patches = [[i for i in range(count + len(at)) if i not in places] for count, places in ((3, at), (8, at_of_all))]
    gathered = whole[:, patches[1]].gather(1, keep.unsqueeze(-1).expand(-1, -1, 12))
    torch.testing.assert_close(few[:, patches[0]], gathered)
    assert torch.equal(few[:, at], plain[:, at])


def test_scan_orders() -> None:
    x, keep = volume(), torch.tensor([[6, 1, 3], [0, 7, 2]])
    raster, given = vim(), vim(scan_order="given")
    assert torch.equal(raster.forward_features(x), given.forward_features(x))
    in_order = keep.sort(1)[0]
    assert torch.equal(raster.forward_features(x, in_order), given.forward_features(x, in_order))
    assert not torch.isclose(raster.forward_features(x, keep), given.forward_features(x, keep)).all(-1).any()
    scanned = seen_by(given.blocks[0], lambda: given.forward_features(x, keep))
    turned = seen_by(given.blocks[0], lambda: given.forward_features(x, keep.flip(1)))
    torch.testing.assert_close(scanned, turned.flip(1))
    sequence = vim(scan_order="given", rope="sequence")
    assert not torch.isclose(
        seen_by(sequence.blocks[0], lambda: sequence.forward_features(x, keep)),
        seen_by(sequence.blocks[0], lambda: sequence.forward_features(x, keep.flip(1))).flip(1),
    ).all()


def test_pools() -> None:
    x = volume()
    for place in ("front", "double"):
        model = vim(class_token=place, global_pool="token", num_classes=3)
        tokens = model.forward_features(x)
        mean = (tokens[:, 0] + tokens[:, model.num_prefix_tokens - 1]) / 2
        torch.testing.assert_close(model(x), model.head(mean))
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), mean)
        model.global_pool = "avg"
        torch.testing.assert_close(model(x), model.head(tokens[:, model.num_prefix_tokens :].mean(1)))
    for pool in ("last", "max", "max_logit", "none"):
        model = vim(class_token="middle", global_pool=pool, num_classes=3)
        patches = model.forward_features(x)[:, 1:]
        pooled = {"last": patches[:, -1], "none": patches}.get(pool, patches.amax(1))
        expected = model.head(patches).amax(1) if pool == "max_logit" else model.head(pooled)
        torch.testing.assert_close(model(x), expected)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "token"}, "needs a class token"),
        ({"global_pool": "mean"}, "global_pool must be one of 'token', 'avg', .*got 'mean'"),
        ({"class_token": True}, "class_token must be None, 'front', 'middle' or 'double', got True"),
        ({"scan_order": "random"}, "'raster' or 'given', got 'random'"),
        ({"pos_embed": "sin"}, "'sincos', 'learned' or 'none', got 'sin'"),
        ({"rope": "axis"}, "rope must be"),
        ({"embed_dim": 13}, "even, got 13"),
        ({"img_size": (8, 8)}, "img_size must be"),
        ({"img_size": 9}, "multiple of the patch"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vim(**options)


def test_keep_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is for a batch of 1, the input is a batch of 2"):
        vim().forward_features(volume(), torch.tensor([[0, 1]]))


def test_rates_of_dropping() -> None:
    assert [block.drop_path.p for block in vim(depth=3, drop_path_rate=0.4).blocks] == [0, 0.2, 0.4]
    model = vim(depth=1, drop_path_rate=1.0).train()  # a single block keeps everything
    assert torch.equal(model(x := volume()), model.eval()(x))


def test_maps_are_the_stream() -> None:
    model, x = vim(rope=None), volume()
    _, (first, second) = model.forward_intermediates(x)
    tokens = first.flatten(2).transpose(1, 2)
    hidden, stream = model.blocks[1](tokens, None)
    assert torch.equal(stream, tokens)
    torch.testing.assert_close(second.flatten(2).transpose(1, 2), hidden + tokens)


def test_published_sizes() -> None:
    """Parameters that the authors' models have, less a class token and two tables of frequencies that nothing uses."""
    with torch.device("meta"):
        for patch, count, trained in ((4, 51_864_592, 15_000_256), (32, 90_553_424, 90_481_088)):
            model = medgmae.create_model(f"mae_vim_small_patch{patch}_160", off_by_one=True, rope="sequence")
            assert sum(p.numel() for p in model.parameters()) == count - 384 - 96 - 48
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained - 384
        for patch, count in ((4, 37_196_546), (16, 19_197_698)):
            model = medgmae.create_model(f"vim_small_patch{patch}_160", num_classes=2, pos_embed="learned")
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("rope", ["sequence", "axial"])
def test_the_published_decoder_is_off_by_one(rope: Any) -> None:
    model = masked(off_by_one=True, rope=rope)
    decoder, tokens = model.decoder, torch.randn(2, 3, 12)
    masking = medgmae.random_masking(2, 8, 0.6)
    decoder.blocks._rotary = None
    scanned = seen_by(decoder.blocks[0], lambda: decoder(tokens, masking.restore))
    assert scanned.shape == (2, 9, 12)
    embedded = decoder.embed(tokens)
    torch.testing.assert_close(scanned[:, 0], embedded[:, 0] + decoder.prefix_pos_embed[:, 0])
    for sample in range(2):
        for patch in range(8):
            rank = int(masking.restore[sample, patch])
            token = embedded[sample, rank + 1] if rank + 1 < 3 else decoder.mask_token[0, 0]
            torch.testing.assert_close(scanned[sample, patch + 1], token + decoder.pos_embed[0, patch])


@pytest.mark.parametrize("place", PLACES)
def test_a_new_decoder_is_not(place: Any) -> None:
    model = masked(class_token=place)
    decoder, prefix = model.decoder, model.encoder.num_prefix_tokens
    tokens = torch.randn(2, prefix + 3, 12)
    masking = medgmae.random_masking(2, 8, 0.6)
    decoder.blocks._rotary = None
    scanned = seen_by(decoder.blocks[0], lambda: decoder(tokens, masking.restore))
    embedded = decoder.embed(tokens)
    torch.testing.assert_close(scanned[:, :prefix], embedded[:, :prefix] + decoder.prefix_pos_embed)
    places = masking.keep.unsqueeze(-1).expand(-1, -1, 12)
    visible = embedded[:, prefix:] + decoder.pos_embed.expand(2, -1, -1).gather(1, places)
    torch.testing.assert_close(scanned[:, prefix:].gather(1, places), visible)


def test_decoding_every_patch() -> None:
    everything = torch.arange(8).expand(2, 8)
    for off_by_one in (True, False):
        decoder, tokens = masked(off_by_one=off_by_one).decoder, torch.randn(2, 8, 12)
        assert torch.equal(decoder(tokens), decoder(tokens, everything))
    with pytest.raises(ValueError, match="for encoders without class tokens, this one has 2"):
        masked(off_by_one=True, class_token="double")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rope", ROPES)
def test_autoencoders_with_every_option(place: Any, rope: Any, tmp_path: Path) -> None:
    options = {"class_token": place, "rope": rope, "scan_order": "given", "off_by_one": place is None}
    model = small("mae_vim_nano_patch8_32", rope_residual=False, **options).eval()
    x, masking = torch.rand(2, 1, 8, 24, 16), medgmae.random_masking(2, 6, 0.5)
    out = model(x, masking)
    out.loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    medgmae.save_pretrained(model, tmp_path)
    again: Any = medgmae.create_model(f"local-dir:{tmp_path}").eval()
    assert torch.equal(again(x, masking).pred, out.pred)


@pytest.mark.parametrize("name", ["mae_vim_nano_patch8_32", "mae_vit_nano_patch8_32"])
def test_checkpointing_reaches_both_parts(name: str) -> None:
    model, x = small(name), torch.rand(1, 1, 16, 16, 16)
    masking = medgmae.random_masking(1, 8, 0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(x, masking).loss, trained)
    calls: list[str] = []
    for part in ("encoder", "decoder"):
        getattr(model, part).blocks[0].register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(model(x, masking).loss, trained)
    assert sorted(calls) == ["decoder"] * 2 + ["encoder"] * 2
    for a, b in zip(saved, plain, strict=True):
        torch.testing.assert_close(a, b)
    model.set_grad_checkpointing(False)
    model(x, masking).loss.backward()
    assert len(calls) == 6


def test_what_an_optimiser_leaves_undecayed() -> None:
    for model in (vim(class_token="front", pos_embed="learned", num_classes=2), masked(class_token="front")):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = {names[id(p)]: g["weight_decay"] for g in param_groups(model, 0.05) for p in g["params"]}
        decayed = {name.removeprefix("encoder.") for name, decay in groups.items() if decay}
        own = ("A_log", "D", "A_b_log", "D_b", "norm.weight", "bias")
        assert not {name for name in decayed if name.endswith(own)}
        assert {"blocks.1.mixer.in_proj.weight", "blocks.0.mixer.conv1d_b.weight", "patch_embed.proj.weight"} <= decayed
        assert not {"pos_embed", "cls_token", "decoder.mask_token"} & decayed
    scales = {
        names[id(p)]: g["lr_scale"]
        for model in [vim(num_classes=2)]
        for names in [{id(p): n for n, p in model.named_parameters()}]
        for g in param_groups(model, 0.05, layer_decay=0.5)
        for p in g["params"]
    }
    expected = {"patch_embed.norm.weight": 0.125, "blocks.0.mixer.A_log": 0.25, "blocks.1.mixer.D": 0.5}
    expected |= {"norm.weight": 1.0, "head.weight": 1.0}
    assert {name: scales[name] for name in expected} == expected


def test_the_encoder_of_an_autoencoder_normalises_tokens() -> None:
    assert isinstance(masked().encoder.norm, RMSNorm)
    with pytest.raises(ValueError, match="global_pool='token' or fc_norm=False, got global_pool='avg'"):
        small("mae_vit_nano_patch8_32", global_pool="avg")


def test_half_precision_weights() -> None:
    model, x = masked(class_token="middle"), torch.rand(2, 2, 8, 8, 8)
    masking = medgmae.random_masking(2, 8, 0.5)
    full = model(x, masking).pred
    half = model.bfloat16()(x.bfloat16(), masking).pred
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()
