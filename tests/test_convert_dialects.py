"""The register of dialects: found by themselves, tried in a stated order, open to others."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
import torch
from dialects import to_mae3d, to_masked_autoencoder, to_medgmae, to_timm_encoder, to_uva
from safetensors.torch import load_file
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import WeightsError
from medgmae.checkpoints import dialects
from medgmae.checkpoints.dialects import recognise
from medgmae.checkpoints.dialects.entries import Converted, File, split_place
from medgmae.checkpoints.dialects.recognise import convert, known_dialects, register_dialect

FIXTURES = Path(__file__).parent / "fixtures/selfmedmae"
SOURCE = state_copy(randomize(medgmae.create_model("mae_vit_nano_patch8_32")))
ENCODER = {name.removeprefix("encoder."): value for name, value in SOURCE.items() if name.startswith("encoder.")}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> dict[str, recognise.Dialect]:
    """A register that forgets what a test enters."""
    known_dialects()
    monkeypatch.setattr(recognise, "_dialects", dict(recognise._dialects))
    return recognise._dialects


def test_every_module_of_the_folder_enters_its_dialects() -> None:
    homes = {dialect.convert.__module__.rpartition(".")[2] for dialect in known_dialects()}
    modules = {module.name for module in pkgutil.iter_modules(dialects.__path__)}
    assert homes == modules - {"recognise", "entries"}


def test_no_two_dialects_stand_at_one_place_in_the_line() -> None:
    orders = [dialect.order for dialect in known_dialects()]
    assert orders == sorted(set(orders))


def to_toy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A code base of its own: every name in capitals, the grid in an entry."""
    return {"GRID": torch.tensor([4, 4, 4]), **{name.upper(): tensor for name, tensor in state.items()}}


def convert_toy(file: File) -> Converted:
    grid = tuple(file.tensor("GRID").tolist())
    file.drop("GRID", "patch grid of the table")
    file.take_all(lambda name: f"encoder.{name.lower()}")
    return file.finish("toy", grid, expects={"encoder.num_heads": 3})


def toy_encoder() -> torch.nn.Module:
    return randomize(medgmae.create_model("vit_nano_patch8_32"), seed=8)


def test_a_dialect_from_elsewhere_loads(register: dict[str, recognise.Dialect]) -> None:
    with pytest.raises(WeightsError, match="not recognised"):
        medgmae.load_pretrained(toy_encoder(), to_toy(ENCODER))
    register_dialect("a toy", order=25, matches=lambda file: file.has("GRID"))(convert_toy)
    model = toy_encoder()
    report = medgmae.load_pretrained(model, to_toy(ENCODER))
    assert_same_state(model, ENCODER)
    assert report.source == "state dictionary (toy)"
    assert report.unused == {"GRID": "patch grid of the table"}
    with pytest.raises(WeightsError, match=r"num_heads: 3 in the file's model, 4 in this one.*num_heads=3"):
        medgmae.load_pretrained(medgmae.create_model("vit_nano_patch8_32", num_heads=4), to_toy(ENCODER))
    with pytest.raises(WeightsError, match=r"not recognised\. Known are models saved by medgmae, a toy, .*MedGMAE, "):
        medgmae.load_pretrained(model, {"resnet.weight": torch.ones(2)})


def test_the_order_decides_between_dialects_that_match(register: dict[str, recognise.Dialect]) -> None:
    def never(file: File) -> Converted:
        raise AssertionError("another one comes first")

    register_dialect("late", order=61, matches=lambda file: True)(never)
    assert convert(to_timm_encoder(SOURCE)).source == "ViT with timm's names"
    register_dialect("early", order=59, matches=lambda file: True)(lambda file: file.finish("early", (1, 1, 1)))
    early = convert(to_timm_encoder(SOURCE))
    assert early.source == "early"
    assert set(early.unknown) == set(to_timm_encoder(SOURCE))


def test_a_name_is_entered_once(register: dict[str, recognise.Dialect]) -> None:
    with pytest.raises(ValueError, match=r"'MedGMAE' is registered twice, first by medgmae\..*\.gaussian"):
        register_dialect("MedGMAE", order=1, matches=lambda file: False)(convert_toy)


def test_the_parts_come_apart() -> None:
    converted = convert(to_masked_autoencoder(SOURCE))
    assert set(converted.encoder) == set(ENCODER)
    decoder = {name.removeprefix("decoder.") for name in SOURCE if name.startswith("decoder.")}
    assert set(converted.decoder) == decoder
    assert converted.renamed["decoder_blocks.0.norm1.bias"] == "decoder.blocks.0.norm1.bias"
    assert converted.file_names("decoder")["mask_token"] == "mask_token"
    assert "prefix_pos_embed" not in converted.file_names("decoder")  # which the conversion added
    assert converted.expects == {"decoder.sigmoid": False}
    with pytest.raises(ValueError, match=r"'head\.weight' is not a place"):
        split_place("head.weight")


@pytest.mark.parametrize("name", ["decoder.mask_token", "encoder.pos_embed"])
def test_two_entries_for_one_place_are_refused(name: str) -> None:
    state = {**to_mae3d(SOURCE), name: torch.zeros(1, 64, 48)}
    with pytest.raises(WeightsError, match=f"stands for '{name}', which is in the file twice"):
        medgmae.load_pretrained(randomize(medgmae.create_model("mae_vit_nano_patch8_32")), state)


def test_names_outside_of_both_parts_are_errors_whatever_strict_is() -> None:
    state = {**to_mae3d(SOURCE), "classifier.weight": torch.ones(2)}
    for strict in (True, False):
        with pytest.raises(WeightsError, match=r"classifier.weight: in the file, but the model has no such part"):
            medgmae.load_pretrained(toy_encoder(), state, strict=strict)


def test_gaussians_and_voxels_are_told_apart_by_their_own_dialects() -> None:
    gaussians = state_copy(randomize(medgmae.create_model("gmae_vit_nano_patch8_32", support="box", spread=False)))
    assert convert(to_medgmae(gaussians)).source == "MedGMAE"
    assert convert(to_mae3d(SOURCE)).source == "MAE3D of SelfMedMAE or MedGMAE"


UPSTREAM, UVA = "MAE3D of SelfMedMAE or MedGMAE", "MAE3D of the UVA adaptation of SelfMedMAE"


@pytest.mark.parametrize(
    ("fixture", "own"),
    [("mae3d_sincos_c1", UPSTREAM), ("mae3d_sincos_c4_aniso", UPSTREAM), ("mae3d_uva_linear_c1", UVA)],
)
def test_uva_and_upstream_recognise_their_own_files_alone(fixture: str, own: str) -> None:
    state = load_file(FIXTURES / f"{fixture}.safetensors")
    file = File({n.removeprefix("weights/"): t for n, t in state.items() if n.startswith("weights/")}, fixture)
    assert [dialect.name for dialect in known_dialects() if dialect.matches(file)] == [own]


def test_uva_and_upstream_are_opposite_pairs() -> None:
    """With several channels: each order of the patch weight read as the other would be another model, in silence."""
    model = randomize(medgmae.create_model("mae_vit_nano_patch8_32", in_chans=2))
    state = {**state_copy(model), "decoder.prefix_pos_embed": torch.zeros(1, 1, 24)}  # which neither kind of file has
    upstream, uva = to_mae3d(state), to_uva(state)
    stem = "encoder.patch_embed.proj.weight"
    for file, source, other in ((upstream, UPSTREAM, uva[stem]), (uva, UVA, upstream[stem])):
        report = medgmae.load_pretrained(model, file)
        assert (report.source, report.adapted) == (f"state dictionary ({source})", {})
        assert_same_state(model, state)
        medgmae.load_pretrained(model, {**file, stem: other.reshape(file[stem].shape)})
        assert not torch.equal(model.state_dict()[stem], state[stem])
