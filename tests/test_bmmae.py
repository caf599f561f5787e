"""BM-MAE against its own formulas, written out here in plain torch on a file with the authors' names.

The authors' code is not run: what is compared with is the description of its forward pass, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medgmae
from medgmae.checkpoints.cards import WeightsError
from medgmae.layers.masking import Masking, sequence_masking
from medgmae.models.mae_seqvit import SequenceAutoencoder, sequence_mae
from medgmae.models.seqvit import SEQUENCES, SequenceViT

WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 3, 2, 4, 8
DECODER, DECODER_HEADS, TOKENS = 12, 2, 8
SIZES: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
DECODER_SIZES = {"decoder_embed_dim": DECODER, "decoder_depth": 1, "decoder_num_heads": DECODER_HEADS}


def official_state(seed: int = 0) -> dict[str, Tensor]:
    """A file as the authors' code saves it, with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH)}
    for name in SEQUENCES:
        stem = f"tokenizers.{name}.patch_embedding."
        shapes |= {f"{stem}patch_embeddings.weight": (WIDTH, 1, PATCH, PATCH, PATCH)}
        shapes |= {f"{stem}patch_embeddings.bias": (WIDTH,), f"{stem}position_embeddings": (1, TOKENS, WIDTH)}
        shapes |= {f"decoder.modality_embeddings.{name}": (1, 1, DECODER)}
    for i in range(DEPTH):
        shapes |= block(f"blocks.{i}.", WIDTH, 2 * WIDTH)
    shapes |= block("decoder.decoder_blocks.0.", DECODER, 4 * DECODER)
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"decoder.decoder_embed.weight": (DECODER, WIDTH), "decoder.decoder_embed.bias": (DECODER,)}
    shapes |= {"decoder.mask_tokens": (1, 1, DECODER), "decoder.position_embeddings": (1, TOKENS, DECODER)}
    shapes |= {"decoder.decoder_norm.weight": (DECODER,), "decoder.decoder_norm.bias": (DECODER,)}
    shapes |= {"decoder.decoder_pred.weight": (PATCH**3, DECODER), "decoder.decoder_pred.bias": (PATCH**3,)}
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    table = state["tokenizers.t1.patch_embedding.position_embeddings"]
    return {name: table.clone() if name.endswith(".position_embeddings") and "tok" in name else value
            for name, value in state.items()}  # fmt: skip


def block(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one of MONAI's blocks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (
        ("attn.qkv", 3 * width, width),
        ("attn.out_proj", width, width),
        ("mlp.linear1", hidden, width),
        ("mlp.linear2", width, hidden),
    ):
        shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
    for name in ("norm1", "norm2"):
        shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    return shapes


STATE = official_state()


def norm(x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], STATE[f"{name}.weight"], STATE[f"{name}.bias"], 1e-5)


def linear(x: Tensor, name: str) -> Tensor:
    return F.linear(x, STATE[f"{name}.weight"], STATE[f"{name}.bias"])


def run_block(x: Tensor, prefix: str, heads: int) -> Tensor:
    """x + attention(norm1 x), then x + mlp(norm2 x), with the softmax written out."""
    batch, count, width = x.shape
    qkv = linear(norm(x, f"{prefix}norm1"), f"{prefix}attn.qkv")
    q, k, v = qkv.reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
    x = x + linear((weights @ v).transpose(1, 2).reshape(batch, count, width), f"{prefix}attn.out_proj")
    return x + linear(F.gelu(linear(norm(x, f"{prefix}norm2"), f"{prefix}mlp.linear1")), f"{prefix}mlp.linear2")


def encode(scans: Mapping[str, Tensor], keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The normalised sequence (B, 1 + n, E) of these sequences, in their order, and the stream after every block."""
    tokens = []
    for name, scan in scans.items():
        stem = f"tokenizers.{name}.patch_embedding."
        weight, bias = STATE[f"{stem}patch_embeddings.weight"], STATE[f"{stem}patch_embeddings.bias"]
        patches = F.conv3d(scan, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        tokens.append(patches + STATE[f"{stem}position_embeddings"])
    x = torch.cat(tokens, dim=1)
    if keep is not None:
        x = torch.stack([sample[kept] for sample, kept in zip(x, keep, strict=True)])
    x = torch.cat([STATE["cls_token"].expand(len(x), -1, -1), x], dim=1)
    streams = []
    for i in range(DEPTH):
        x = run_block(x, f"blocks.{i}.", HEADS)
        streams.append(x)
    return norm(x, "norm"), streams


def decode(tokens: Tensor, masking: Masking) -> list[Tensor]:
    """The predicted patches (B, N, p^3) of each sequence."""
    x = linear(tokens, "decoder.decoder_embed")
    hidden = masking.restore.shape[1] - (x.shape[1] - 1)
    filled = torch.cat([x[:, 1:], STATE["decoder.mask_tokens"].expand(len(x), hidden, -1)], dim=1)
    filled = torch.stack([sample[places] for sample, places in zip(filled, masking.restore, strict=True)])
    table = STATE["decoder.position_embeddings"]
    places = torch.cat([STATE[f"decoder.modality_embeddings.{name}"] + table for name in SEQUENCES], dim=1)
    x = run_block(torch.cat([x[:, :1], filled + places], dim=1), "decoder.decoder_blocks.0.", DECODER_HEADS)
    pred = linear(norm(x, "decoder.decoder_norm"), "decoder.decoder_pred")[:, 1:]
    return list(pred.split(TOKENS, dim=1))


def patches_of(scan: Tensor) -> Tensor:
    """(B, 1, 8, 8, 8) as (B, N, p^3), raster order of patches and of voxels in them."""
    cut = scan[:, 0].reshape(-1, 2, PATCH, 2, PATCH, 2, PATCH)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(len(scan), TOKENS, -1)


def scans(names: Sequence[str] = SEQUENCES) -> dict[str, Tensor]:
    """Random volumes (2, 1, 8, 8, 8), the same ones of a name whatever the others are."""
    generator = torch.Generator().manual_seed(7)
    every = {name: torch.rand(2, 1, SIDE, SIDE, SIDE, generator=generator) for name in SEQUENCES}
    return {name: every[name] for name in names}


def encoder(**options: Any) -> SequenceViT:
    """An encoder with the file's weights."""
    model = SequenceViT(SIDE, PATCH, **SIZES, **options).eval()
    assert not medgmae.load_pretrained(model, STATE).missing
    return model


def autoencoder() -> SequenceAutoencoder:
    """The autoencoder with the file's weights, nothing of which is left."""
    model = sequence_mae(SIDE, PATCH, **SIZES, **DECODER_SIZES).eval()
    report = medgmae.load_pretrained(model, STATE)
    assert not report.missing
    assert not report.unused
    return model


@pytest.mark.parametrize("names", [SEQUENCES, ("t1",), ("flair",), ("t1ce", "flair"), ("t1", "t2", "flair")])
def test_any_subset_of_the_sequences(names: tuple[str, ...]) -> None:
    given = scans(names)
    expected, streams = encode(given)
    model, turned = encoder(), dict(reversed(given.items()))  # the order of the mapping does not matter
    torch.testing.assert_close(model.sequence_tokens(turned), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(turned), expected[:, 0], atol=1e-5, rtol=1e-4)
    mean = expected[:, 1:].reshape(2, len(names), TOKENS, WIDTH).mean(1)
    torch.testing.assert_close(model.forward_features(turned)[:, 1:], mean, atol=1e-5, rtol=1e-4)
    # A model of these sequences alone: a channel for each, and every tool.
    alone, x = encoder(sequences=names), torch.cat(list(given.values()), dim=1)
    torch.testing.assert_close(alone(x), expected[:, 0], atol=1e-5, rtol=1e-4)
    maps = alone.forward_intermediates(x, intermediates_only=True)
    for image, stream in zip(maps, streams, strict=True):
        mean = stream[:, 1:].reshape(2, len(names), TOKENS, WIDTH).mean(1)
        torch.testing.assert_close(image.flatten(2).transpose(1, 2), mean, atol=1e-5, rtol=1e-4)


def test_the_masked_autoencoder() -> None:
    model, given = autoencoder(), scans()
    x = torch.cat(list(given.values()), dim=1)
    masking = sequence_masking(2, 4, TOKENS, 0.75, generator=torch.Generator().manual_seed(1))
    tokens, _ = encode(given, masking.keep)
    predicted = decode(tokens, masking)
    loss = torch.zeros(())
    for i, (pred, name) in enumerate(zip(predicted, SEQUENCES, strict=True)):
        mask = masking.mask[:, i * TOKENS : (i + 1) * TOKENS]
        error = (pred - patches_of(given[name])).square().mean(2)
        loss = loss + (error * mask).sum() / mask.sum()
    out = model(x, masking)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-4)
    volume = model.reconstruct(x, masking, paste_visible=False)
    for i, pred in enumerate(predicted):
        torch.testing.assert_close(patches_of(volume[:, i : i + 1]), pred, atol=1e-5, rtol=1e-4)
    pasted = model.reconstruct(x, masking)
    for i, name in enumerate(SEQUENCES):
        hidden = masking.mask[:, i * TOKENS : (i + 1) * TOKENS].unsqueeze(2) > 0
        expected = torch.where(hidden, patches_of(volume[:, i : i + 1]), patches_of(given[name]))
        assert torch.equal(patches_of(pasted[:, i : i + 1]), expected)


def test_a_sequence_that_is_not_at_hand_is_predicted_from_the_others() -> None:
    model, x = autoencoder(), torch.cat(list(scans().values()), dim=1)
    mask = torch.zeros(2, 4, TOKENS)
    mask[:, 2] = 1
    order = mask.flatten(1).argsort(dim=1, stable=True)
    masking = Masking(order[:, : 3 * TOKENS], order.argsort(dim=1), mask.flatten(1))
    other = x.clone()
    other[:, 2] = 5
    assert torch.equal(model.reconstruct(x, masking)[:, 2], model.reconstruct(other, masking)[:, 2])
    assert torch.equal(model.reconstruct(x, masking)[:, [0, 1, 3]], x[:, [0, 1, 3]])


def test_the_same_patches_hidden_in_every_sequence() -> None:
    model, x = autoencoder(), torch.cat(list(scans().values()), dim=1)
    one = medgmae.random_masking(2, TOKENS, 0.5, generator=torch.Generator().manual_seed(2))
    mask = one.mask.repeat(1, 4)
    order = mask.argsort(dim=1, stable=True)
    every = Masking(order[:, : 2 * TOKENS], order.argsort(dim=1), mask)
    torch.testing.assert_close(model(x, one).loss, model(x, every).loss)
    torch.testing.assert_close(model(x, one).pred, model(x, every).pred)
    with pytest.raises(ValueError, match=r"the masking is for \(2, 16\) \(batch, patches\), the input has \(2, 8\)"):
        model(x, medgmae.random_masking(2, 2 * TOKENS, 0.5))


def test_shares_of_the_sequences_are_dirichlet() -> None:
    masking = sequence_masking(4000, 4, 64, 0.75, generator=torch.Generator().manual_seed(3))
    assert masking.keep.shape == (4000, 64)
    shares = 1 - masking.mask.reshape(4000, 4, 64).mean(2)  # as many stay visible as a sequence has
    assert torch.equal(shares.sum(1), torch.ones(4000))
    # A Dirichlet distribution with ones has mean 1 / M and variance (M - 1) / (M^2 (M + 1)).
    torch.testing.assert_close(shares.mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close(shares.var(0), torch.full((4,), 3 / 80), atol=0.004, rtol=0)
    # Which patches of a sequence are visible is even.
    torch.testing.assert_close(masking.mask.mean(0), torch.full((256,), 0.75), atol=0.04, rtol=0)
    again = sequence_masking(4000, 4, 64, 0.75, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.keep, masking.keep)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.9])
def test_maskings_of_other_ratios(ratio: float) -> None:
    masking = sequence_masking(3, 4, TOKENS, ratio, generator=torch.Generator().manual_seed(4))
    visible = int(4 * TOKENS * (1 - ratio))
    assert masking.keep.shape == (3, visible)
    assert (masking.mask == 0).sum(1).tolist() == [visible] * 3
    order = masking.restore.argsort(dim=1)
    assert torch.equal(order[:, :visible], masking.keep)
    assert not masking.mask.gather(1, masking.keep).any()


@pytest.mark.parametrize(("ratio", "message"), [(1.0, r"in \[0, 1\), got 1.0"), (0.99, "leaves none visible")])
def test_maskings_that_leave_nothing(ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_masking(1, 4, TOKENS, ratio)


def changed(**entries: Tensor | None) -> dict[str, Tensor]:
    """The file with other tensors, or without those that are None; two underscores stand for a dot."""
    state: dict[str, Tensor | None] = {**STATE, **{name.replace("__", "."): value for name, value in entries.items()}}
    return {name: value for name, value in state.items() if value is not None}


T2 = {name: None for name in STATE if name.startswith("tokenizers.t2.")}
# What the authors' short way to load builds: one tokenizer with another name, and another name of its convolution.
SHORT = {name: value for name, value in STATE.items() if not name.startswith(("tokenizers.", "decoder."))}
SHORT |= {"tokenizers.T1.proj.weight": STATE["tokenizers.t1.patch_embedding.patch_embeddings.weight"]}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({k: v for k, v in STATE.items() if k not in T2}, "no patch embedding for 't2', only for t1, t1ce, flair"),
        (SHORT, "not recognised"),
        (
            changed(tokenizers__t2__patch_embedding__position_embeddings=torch.zeros(1, TOKENS, WIDTH)),
            "the sequences have different tables of positions, expected one for all",
        ),
        (
            changed(tokenizers__t2__patch_embedding__patch_embeddings__weight=torch.zeros(WIDTH, 2, 4, 4, 4)),
            r"the patch weights are .*expected one shape \(width, 1, d, h, w\)",
        ),
        (
            changed(tokenizers__t2__patch_embedding__patch_embeddings__bias=torch.zeros(3)),
            "biases of the patches do not fit",
        ),
        (changed(tokenizers__t2__patch_embedding__position_embeddings=None), "has no 'tokenizers.t2.*incomplete"),
        (changed(blocks__0__norm1__weight=None), "blocks.0.norm1.weight: not in the file"),
        (changed(norm__weight=None), "norm.weight: not in the file"),
    ],
)
def test_files_that_do_not_fit(state: dict[str, Tensor], message: str) -> None:
    model = SequenceViT(SIDE, PATCH, **SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        medgmae.load_pretrained(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_for_all_channels_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"embedding for each of the sequences t1, .*sequences=\['t1'\]\)"):
        medgmae.load_pretrained(medgmae.ViT(SIDE, PATCH, mlp_ratio=2.0, norm_eps=1e-5, **SIZES), STATE)


def test_some_sequences_of_a_file() -> None:
    model = sequence_mae(SIDE, PATCH, ("flair", "t1"), **SIZES, **DECODER_SIZES)
    report = medgmae.load_pretrained(model, STATE)
    assert not report.missing
    assert report.unused["tokenizers.t2.patch_embedding.patch_embeddings.bias"].startswith("stem of a sequence that")
    assert report.unused["decoder.modality_embeddings.t1ce"].startswith("embedding of a sequence that")
    rows = [STATE[f"decoder.modality_embeddings.{name}"][0, 0] for name in ("flair", "t1")]
    assert torch.equal(model.decoder.sequence_embed[0], torch.stack(rows))


def test_saved_models_know_their_sequences(tmp_path: Path) -> None:
    model = encoder(sequences=("t2", "t1"))
    again = medgmae.create_model(medgmae.save_pretrained(model, tmp_path)).eval()
    x = torch.cat(list(scans(("t2", "t1")).values()), dim=1)
    assert torch.equal(again(x), model(x))
    with pytest.raises(
        WeightsError, match=r"sequences: \['t2', 't1'\] in the file's model.*create_model\(..., sequences="
    ):
        medgmae.load_pretrained(SequenceViT(SIDE, PATCH, ("t1", "t2"), **SIZES), tmp_path)


def test_info_names_the_sequences(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "bmmae.pth")
    info = medgmae.inspect_checkpoint(tmp_path / "bmmae.pth")
    assert (info["source"], info["sizes"]["sequences"]) == ("BM-MAE", list(SEQUENCES))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({}, r"one or more of the sequences \['t1', 't1ce', 't2', 'flair'\], got \[\]"),
        ({"t1": torch.zeros(1, 1, 8, 8, 8), "adc": torch.zeros(1, 1, 8, 8, 8)}, r"got \['adc', 't1'\]"),
        ({"t1": torch.zeros(1, 1, 8, 8, 8), "t2": torch.zeros(1, 1, 8, 8, 4)}, r"every sequence must be \(B, 1, D, H"),
        ({"t1": torch.zeros(1, 8, 8, 8)}, r"every sequence must be \(B, 1, D, H, W\), all of one size, got \[\(1, 8"),
    ],
)
def test_scans_that_are_none(x: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder()(x)


@pytest.mark.parametrize("names", [(), ("t1", "t1"), ("",), (1, 2)])
def test_names_that_are_none(names: Any) -> None:
    with pytest.raises(ValueError, match="sequences must be different names such as"):
        SequenceViT(SIDE, PATCH, names, **SIZES)


def test_one_name_is_one_sequence() -> None:
    assert SequenceViT(SIDE, PATCH, "t1", **SIZES).sequences == ["t1"]


def test_parameters_of_the_published_size() -> None:
    """The authors' 70,885,632 and 7,394,944, with one table for four, and a row for the class token's position."""
    with torch.device("meta"):
        model: Any = medgmae.create_model("mae_seqvit_base_patch16_128")
    table = model.encoder.pos_embed.numel()
    assert sum(p.numel() for p in model.encoder.parameters()) == 70_885_632 - 3 * table
    assert sum(p.numel() for p in model.decoder.parameters()) == 7_394_944 + 384
