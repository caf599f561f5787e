"""VoxelFM: its registers, its rotary positions, and what of its files is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomize, small
from torch import Tensor

import medgmae

FILE = Path(__file__).parent / "fixtures" / "voxelfm" / "container.pth"
SIZES: dict[str, Any] = {"img_size": (14, 7, 21), "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}


def built(**more: Any) -> Any:
    return medgmae.create_model("vit_base_patch14_112", pretrained=False, **{**SIZES, **more}).eval()


def teacher() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(FILE, weights_only=True)["teacher"]
    return state


def test_a_lone_teacher_is_named_and_then_read() -> None:
    with pytest.raises(medgmae.WeightsError, match=r"container.pth::teacher'"):
        medgmae.load_pretrained(built(), FILE)
    report = medgmae.load_pretrained(built(), f"{FILE}::teacher")
    assert report.unused["backbone.rope_embed.periods"].endswith("which base 100 gives")
    assert report.unused["dino_head.mlp.0.weight"] == "head of the pre-training"


def test_heads_and_base_are_read_off_the_periods() -> None:
    with pytest.raises(medgmae.WeightsError, match=r"num_heads: 2 in the file's model, 4 in this one"):
        medgmae.load_pretrained(built(num_heads=4), teacher())
    with pytest.raises(medgmae.WeightsError, match=r"rope_base: 100.0 in the file's model, 1000.0 in this one"):
        medgmae.load_pretrained(built(rope_base=1000.0), teacher())
    with pytest.raises(medgmae.WeightsError, match=r"rope: 'unit' in the file's model, None in this one"):
        medgmae.load_pretrained(built(rope=None), teacher())
    with pytest.raises(medgmae.WeightsError, match=r"norm_eps: 1e-05 in the file's model, 1e-06 in this one"):
        medgmae.load_pretrained(built(norm_eps=1e-6), teacher())
    other = {**teacher(), "backbone.rope_embed.periods": torch.tensor([1.0, 1000.0**0.5])}
    medgmae.load_pretrained(built(rope_base=1000.0), other)
    half = {**teacher(), "backbone.rope_embed.periods": torch.tensor([1.0, 10.0], dtype=torch.bfloat16)}
    medgmae.load_pretrained(built(), half)


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        (torch.tensor([2.0, 10.0]), r"begin with 2, 10; expected base\^\(k / 2\)"),
        (torch.tensor([1.0, float("nan")]), "begin with 1, nan"),
        (torch.ones(2, 2), r"shape \(2, 2\), expected \(bands,\)"),
        (torch.ones(0), r"shape \(0,\)"),
        (torch.tensor([1, 10]), "expected floating-point numbers"),
        (100 ** (torch.arange(5) / 5), "5 periods, which 24 channels cannot have"),
    ],
    ids=str,
)
def test_other_periods_are_refused(periods: Tensor, message: str) -> None:
    model = built()
    with pytest.raises(medgmae.WeightsError, match=message):
        medgmae.load_pretrained(model, {**teacher(), "backbone.rope_embed.periods": periods})


def test_other_models_with_such_periods_are_refused() -> None:
    state = {name.removeprefix("backbone."): t for name, t in teacher().items() if name.startswith("backbone.")}
    with pytest.raises(medgmae.WeightsError, match=r"not VoxelFM's parts beside it \(storage_tokens\)"):
        medgmae.load_pretrained(built(), {**state, "storage_tokens": torch.zeros(1, 4, 24)})
    narrow = {**state, "register_tokens": torch.zeros(1, 4, 12)}
    with pytest.raises(medgmae.WeightsError, match=r"24 wide, 'register_tokens' 12"):
        medgmae.load_pretrained(built(), narrow)


def test_info_says_what_a_file_is() -> None:
    found = medgmae.inspect_checkpoint(f"{FILE}::teacher")
    assert found["source"] == "VoxelFM"
    sizes = {name: found["sizes"][name] for name in ("embed_dim", "registers", "pos_embed")}
    assert sizes == {"embed_dim": 24, "registers": 4, "pos_embed": "none"}
    json.dumps(found)


def test_no_pooling_reads_the_registers() -> None:
    model: Any = randomize(built()).eval()
    x = torch.randn(2, 1, 14, 7, 21)
    tokens = model.forward_features(x)
    assert (model.num_class_tokens, model.num_prefix_tokens) == (1, 5)
    assert torch.equal(model(x), tokens[:, 0])
    assert torch.equal(model.get_intermediate_layers(x, return_class_token=True)[0][1], tokens[:, 0])
    both: Any = randomize(built(global_pool="token_avg", fc_norm=False)).eval()
    tokens = both.forward_features(x)
    torch.testing.assert_close(both(x), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))
    row = medgmae.saliency_map(model, medgmae.Volume(torch.randn(1, 14, 7, 21)), method="rollout")
    assert float(row.data.sum()) > 0


def test_visible_patches_keep_their_place() -> None:
    """Without further tokens to attend to, patches that are all kept in another order have the same features."""
    model: Any = randomize(built()).eval()
    x, order = torch.randn(1, 1, 14, 7, 21), torch.tensor([[4, 0, 5, 2, 1, 3]])
    tokens, moved = model.forward_features(x), model.forward_features(x, keep=order)
    torch.testing.assert_close(moved[:, 5:], tokens[:, 5:][:, order[0]], atol=1e-5, rtol=1e-5)
    still: Any = built(rope=None)
    still.load_state_dict(model.state_dict())
    assert (still.forward_features(x) - tokens).abs().max() > 1e-3


def test_a_state_dictionary_of_ours_has_no_table() -> None:
    model: Any = small("vit_base_patch14_112", num_heads=4)
    again: Any = small("vit_base_patch14_112", num_heads=4)
    report = medgmae.load_pretrained(randomize(again, 5), dict(model.state_dict()))
    assert report.source == "state dictionary (medgmae)"
    x = torch.randn(1, 1, *model.img_size)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="registers=2 stand behind a class token"):
        built(registers=2, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="lifted_axis must be 0, 1 or 2"):
        built(lifted_axis=3)
    with pytest.raises(ValueError, match="rope must be None, 'integer', 'unit' or 'scaled'"):
        built(rope="axial")
    with pytest.raises(ValueError, match="mlp must be 'gelu', 'swiglu' or 'swiglu_norm'"):
        built(mlp="relu")
    with pytest.raises(ValueError, match="a multiple of 6, got 8"):
        built(num_heads=3)
