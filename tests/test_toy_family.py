"""A family of one's own: a model with its settings and sizes, a dialect and a card, in this one file.

Nothing else knows it. It goes through the contract tests of every registered model, its checkpoints through the border.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import test_models
import test_models_api
import torch
from small_models import assert_same_state, full_size, randomize, small, state_copy, volume
from torch import Tensor, nn

import medgmae
from medgmae.checkpoints import cards
from medgmae.checkpoints.dialects import recognise
from medgmae.checkpoints.dialects.entries import Converted, File
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.layers.blocks import DropPath, run_block
from medgmae.models import registry
from medgmae.models.encoder import Encoder
from medgmae.models.parts import Setting, count_blocks, drop_path_rates, given

NAME = "toymixer_nano_patch8_32"


class ToyBlock(nn.Module):
    """x + leaky(linear(x + mean of all tokens))."""

    def __init__(self, dim: int, slope: float, drop_path: float) -> None:
        super().__init__()
        self.mix, self.slope, self.drop_path = nn.Linear(dim, dim), slope, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.leaky_relu(self.mix(x), self.slope)
        return x + self.drop_path(mixed)


class ToyMixer(Encoder):
    """Blocks that mix channels; the slope of their activation is in no tensor."""

    map_reduction: ClassVar[Literal["max"]] = "max"
    FIXED_SIZES = ("embed_dim", "depth", "patch_size")

    def __init__(
        self,
        img_size: Any = 32,
        patch_size: Any = 8,
        in_chans: int = 1,
        embed_dim: int = 48,
        depth: int = 2,
        *,
        slope: float = 0.1,
        global_pool: Any = "avg",
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
    ) -> None:
        built = given(locals())
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            dims=3,
            class_tokens=0,
            global_pool=global_pool,
            pos_embed="sincos",
        )
        self._built = built
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(ToyBlock(embed_dim, slope, rate) for rate in rates)
        self.norm, self.fc_norm = nn.LayerNorm(embed_dim), nn.Identity()
        self._add_head(num_classes)

    @classmethod
    def read_sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        stem = state.get("patch_embed.proj.weight")
        if stem is None or "blocks.0.mix.weight" not in state:
            return None
        sizes = {"embed_dim": len(stem), "depth": count_blocks(state), "patch_size": tuple(stem.shape[2:])}
        return {**sizes, "in_chans": stem.shape[1]}

    def settings(self) -> dict[str, Setting]:
        return {"slope": Setting(self._built["slope"], "slope")}

    def forward_last_block(self, x: Tensor) -> Tensor:
        return self._encode(x, None)[0]

    def _encode(
        self, x: Tensor, keep: Tensor | None, taps: Sequence[int] = (), depth: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        tokens, tapped = self._embed(x, keep), {}
        for i, block in enumerate(self.blocks):
            if i == depth:
                break
            tokens = run_block(block, tokens, self.grad_checkpointing)
            if i in taps:
                tapped[i] = tokens
        return tokens, tapped


def toymixer_nano_patch8_32(**overrides: Any) -> ToyMixer:
    """A toy on 32³."""
    return registry.build(ToyMixer, {}, overrides)


def convert_toy(file: File) -> Converted:
    """A code base that writes ``TOY.`` before every name, its grid and its slope into entries."""
    grid, slope = tuple(file.tensor("TOY.grid").tolist()), float(file.tensor("TOY.slope"))
    file.drop("TOY.grid", "grid of the table")
    file.drop("TOY.slope", "slope of the activation")
    file.take_all(lambda name: f"encoder.{name.removeprefix('TOY.')}")
    return file.finish("toy code", grid, expects={"encoder.slope": slope})


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Registers all of it, for one test."""
    registry.model_names()
    recognise.known_dialects()
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(recognise, "_dialects", dict(recognise._dialects))
    registry.register_class(ToyMixer)
    registry.register_model(toymixer_nano_patch8_32)
    register_dialect("toy code", order=25, matches=lambda file: file.has("TOY.grid"))(convert_toy)
    card = json.loads((cards.weights_folder() / "vit_tiny_patch8_64.demo.json").read_text())
    card |= {"tag": f"{NAME}.toy", "model_args": {"slope": 0.3}, "file": None, "sha256": None, "bytes": None}
    known = {**cards._cards(), f"{NAME}.toy": cards.WeightCard.from_json(card)}
    monkeypatch.setattr(cards, "_cards", lambda: known)
    yield
    full_size.cache_clear()


def contract() -> list[Any]:
    """Every test of the contract that is for all models or for all encoders."""
    found = []
    for module in (test_models, test_models_api):
        for name, function in vars(module).items():
            marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize" and m.args[0] == "name"]
            autoencoders_only = any("vit_nano_patch8_32" not in map(_name, m.args[1]) for m in marks)
            if name.startswith("test_") and marks and not autoencoders_only:
                slow = [m for m in function.pytestmark if m.name == "slow"]
                found.append(pytest.param(function, id=name, marks=slow))
    return found


def _name(value: Any) -> str:
    return value if isinstance(value, str) else value.values[0]


@pytest.mark.parametrize("check", contract())
def test_the_contract_holds(check: Any, tmp_path: Path) -> None:
    wanted = inspect.signature(check).parameters
    check(NAME, **({"tmp_path": tmp_path} if "tmp_path" in wanted else {}))


def test_there_is_a_contract() -> None:
    assert len(contract()) > 20


def official(model: nn.Module, slope: float) -> dict[str, Tensor]:
    state = {f"TOY.{name}": value for name, value in model.state_dict().items()}
    return {**state, "TOY.grid": torch.tensor([4, 4, 4]), "TOY.slope": torch.tensor(slope)}


def test_its_checkpoints_go_through_the_border(tmp_path: Path) -> None:
    source = randomize(medgmae.create_model(NAME, slope=0.25))
    file = tmp_path / "toy.pth"
    torch.save({"state_dict": official(source, 0.25)}, file)
    model = medgmae.create_model(NAME, pretrained=file, slope=0.25)
    assert_same_state(model, state_copy(source))
    with pytest.raises(medgmae.WeightsError, match=r"slope: 0.25 in the file's model, 0.1 in this one.*slope=0.25"):
        medgmae.create_model(NAME, pretrained=file)
    facts = medgmae.inspect_checkpoint(file)
    assert (facts["source"], facts["architecture"], facts["sizes"]["embed_dim"]) == ("toy code", NAME, 48)
    wide = medgmae.create_model(NAME, pretrained=file, slope=0.25, in_chans=3, img_size=(16, 32, 24))
    assert list(wide.load_report.resized) == ["pos_embed"]


def test_its_card_and_name_are_known() -> None:
    assert NAME in medgmae.list_models("toymixer")
    assert medgmae.list_weights("toy") == [f"{NAME}.toy"]
    model = medgmae.create_model(f"{NAME}.toy", pretrained=False)
    assert model.options()["slope"] == 0.3
    assert model.pretrained_cfg["tag"] == f"{NAME}.toy"


def test_scans_go_through_it() -> None:
    scan = medgmae.Volume(torch.rand(1, 40, 32, 48))
    features = medgmae.extract_features(small(NAME), scan, window=16, progress=False)
    assert features.map is not None
    assert features.map.shape == (24, 5, 4, 6)
    assert medgmae.latent_map_defaults(small(NAME)) == ("finetuned", "max")
    assert medgmae.latent_to_spatial(small(NAME), volume(NAME)).shape == (2, 1, 16, 16, 16)
