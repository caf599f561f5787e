"""GL-MAE: every loss against a formula written out, a teacher that only follows, views of several sizes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import medgmae
from medgmae.layers.masking import Masking
from medgmae.layers.projection import Projector
from medgmae.models.consistency import consistency, effective_rank, entropy, koleo, teacher_shares
from medgmae.models.glmae import GlobalLocalMAE, Views

SMALL = {"embed_dim": 24, "depth": 1, "img_size": 16}
STUDENTS: dict[str, dict[str, Any]] = {
    "glmae_vit_nano_patch8_32": {**SMALL, "num_heads": 2},
    "glmae_vim_tiny_patch8_64": {**SMALL, "decoder_embed_dim": 12, "decoder_depth": 1},
    "gmae_vit_nano_patch8_32": {**SMALL, "num_heads": 2, "num_gaussians": 5},
    "mae2d_vit_nano_patch8_32": {**SMALL, "num_heads": 2},
}


def model_of(name: str = "glmae_vit_nano_patch8_32", *, patches: bool = False, **options: Any) -> GlobalLocalMAE:
    """A narrow student with noise everywhere, a teacher with other noise, and centres."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student: Any = medgmae.create_model(name, **STUDENTS[name])
        more = {"patch_projector": Projector(24, 16, 8, 10)} if patches else {}
        model = GlobalLocalMAE(student, Projector(24, 16, 8, 12), **more, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for center in model.buffers():
                center.normal_(std=0.1)
    return model


def masking(rows: int, tokens: int, seed: int) -> Masking:
    noise = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed))
    return medgmae.random_masking(rows, tokens, 0.5, noise=noise)


def views_of(name: str = "", dtype: torch.dtype = torch.float32, local: bool = True) -> Views:
    """Two scans, two global views of 24 x 16 x 16 voxels and three local ones of 8 x 16 x 16; of images the same with
    one axis of 16 less."""
    axes = (16,) if name.startswith("mae2d") else (16, 16)
    rng = torch.Generator().manual_seed(1)
    whole = torch.rand(2, 2, 1, 24, *axes, generator=rng, dtype=dtype)
    part = torch.rand(2, 3, 1, 8, *axes, generator=rng, dtype=dtype)
    patches = 2 ** len(axes)
    return Views(whole, masking(4, 3 * patches, 2), *((part, masking(6, patches, 3)) if local else ()))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def test_the_consistency_is_the_cross_entropy_of_every_pair() -> None:
    rng = torch.Generator().manual_seed(0)
    taught = torch.rand(3, 2, 5, generator=rng, dtype=torch.float64)
    said = torch.rand(3, 4, 5, generator=rng, dtype=torch.float64)
    center = torch.rand(5, generator=rng, dtype=torch.float64)
    pairs = []
    for scan in range(3):
        for t in taught[scan].tolist():
            shares = softmax([(a - c) / 0.04 for a, c in zip(t, center.tolist(), strict=True)])
            for s in said[scan].tolist():
                other = softmax([b / 0.1 for b in s])
                pairs.append(-sum(p * math.log(q) for p, q in zip(shares, other, strict=True)))
    ours = consistency(teacher_shares(taught, center, 0.04), said, 0.1)
    assert float(ours) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_entropy_rank_and_spread_by_hand() -> None:
    shares = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4], dtype=torch.float64)
    assert entropy(shares).tolist() == pytest.approx([0.0, math.log(4)])
    corners = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=torch.float64)
    assert float(effective_rank(corners)) == pytest.approx(2.0)
    assert float(effective_rank(torch.ones(4, 3))) == 0.0
    line = torch.outer(torch.tensor([1.0, 2, 3, 7]), torch.ones(3))
    assert float(effective_rank(line)) == pytest.approx(1.0, abs=1e-3)
    # of three directions the nearest pairs are 0.1 rad and 1 rad apart
    angles = torch.tensor([0.0, 0.1, 1.1], dtype=torch.float64)
    unit = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    chords = [2 * math.sin(angle / 2) for angle in (0.1, 0.1, 1.0)]
    assert float(koleo(unit)) == pytest.approx(-sum(map(math.log, chords)) / 3, abs=1e-6)
    assert float(koleo(unit[:1])) == 0.0


@pytest.mark.parametrize("name", STUDENTS)
def test_the_losses_are_those_of_the_parts(name: str) -> None:
    """Views one by one through the student itself, tokens pooled here, and the sum of weighted means."""
    model = model_of(name, local_reconstruction=0.5, global_consistency=2.0, local_consistency=3.0, koleo_weight=0.7)
    model = model.double().eval()
    views = views_of(name, torch.float64)
    out = model(views, teacher_temperature=0.05)
    teacher, student = model.teacher["encoder"], model.student
    shares = []
    for view in views.whole.flatten(0, 1):
        tokens = teacher.forward_features(view[None])  # type: ignore[operator]
        pooled = tokens[:, 0] if student.num_prefix_tokens else tokens.mean(1)
        logits = model.teacher["projector"](pooled)
        shares.append(((logits - model.center) / 0.05).softmax(-1))
    expected: dict[str, Tensor] = {}
    for kind, x, hidden in (("global", views.whole, views.whole_masking), ("local", views.part, views.part_masking)):
        assert x is not None
        assert hidden is not None
        losses, crosses, vectors = [], [], []
        for i, view in enumerate(x.flatten(0, 1)):
            one = Masking(*(part[i : i + 1] for part in hidden))
            losses.append(student(view[None], one).loss)
            tokens = student.forward_features(view[None], one.keep)
            vectors.append(tokens[:, 0] if student.num_prefix_tokens else tokens.mean(1))
            said = (model.projector(vectors[-1]) / 0.1).log_softmax(-1)
            scan = i // x.shape[1]
            crosses += [-(share * said).sum() for share in shares[2 * scan : 2 * scan + 2]]
        expected[f"{kind}_reconstruction"] = torch.stack(losses).mean()
        expected[f"{kind}_consistency"] = torch.stack(crosses).mean()
        if kind == "global":
            expected["koleo"] = (koleo(torch.cat(vectors[::2])) + koleo(torch.cat(vectors[1::2]))) / 2
    for term, value in expected.items():
        torch.testing.assert_close(out.terms[term], value, rtol=1e-6, atol=1e-9)
    weights = {
        "global_reconstruction": 1,
        "local_reconstruction": 0.5,
        "global_consistency": 2,
        "local_consistency": 3,
        "koleo": 0.7,
    }
    total = sum(weight * expected[term] for term, weight in weights.items())
    torch.testing.assert_close(out.loss, total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["glmae_vit_nano_patch8_32", "glmae_vim_tiny_patch8_64"])
@torch.no_grad()
def test_patch_distillation_is_the_cross_entropy_of_every_hidden_patch(name: str) -> None:
    """Patch by patch, from what the decoder's last layer gets and from the teacher's encoder."""
    model = model_of(name, patches=True, patch_distillation=0.7, patch_temperature=0.06).double().eval()
    views = views_of(name, torch.float64)
    out = model(views)
    crosses, heard, student = [], [], model.student
    for i, view in enumerate(views.whole.flatten(0, 1)):
        inputs: list[Tensor] = []
        hook = student.decoder.head.register_forward_hook(lambda _, x, y, to=inputs: to.append(x[0]))
        student(view[None], Masking(*(part[i : i + 1] for part in views.whole_masking)))
        hook.remove()
        truth = model.teacher["encoder"].forward_features(view[None])[0, student.num_prefix_tokens :]  # type: ignore[operator]
        for patch in range(12):
            if views.whole_masking.mask[i, patch] == 0:
                continue
            heard.append(model.teacher["patch_projector"](truth[patch]))
            shares = softmax(((heard[-1] - model.patch_center) / 0.06).tolist())
            token = inputs[0][0, patch] @ model.bridge.weight.T + model.bridge.bias
            said = softmax((model.patch_projector(token) / 0.1).tolist())  # type: ignore[misc]
            crosses.append(-sum(p * math.log(q) for p, q in zip(shares, said, strict=True)))
    assert len(crosses) == 4 * 6
    assert float(out.terms["patch_distillation"]) == pytest.approx(sum(crosses) / len(crosses), rel=1e-9)
    torch.testing.assert_close(out.patch_mean, torch.stack(heard).mean(0).float())
    without = sum(value for key, value in out.terms.items() if key.endswith(("reconstruction", "consistency")))
    torch.testing.assert_close(out.loss, without + 0.7 * out.terms["patch_distillation"])
    plain = model_of(name).double().eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    torch.testing.assert_close(plain(views).loss, without)


def test_patch_distillation_needs_tokens_of_hidden_patches() -> None:
    with pytest.raises(ValueError, match="the GaussianDecoder of a GaussianMAE has none; expected a masked autoenc"):
        model_of("gmae_vit_nano_patch8_32", patches=True)
    views = views_of(local=False)
    everything = medgmae.random_masking(4, 12, 0.0)
    with pytest.raises(ValueError, match="the masking hides none of the global views"):
        model_of(patches=True)(views._replace(whole_masking=everything))


@pytest.mark.parametrize("name", ["glmae_vit_nano_patch8_32", "mae2d_vit_nano_patch8_32"])
@pytest.mark.parametrize("patches", [False, True])
def test_gradients_go_to_the_student_alone(name: str, patches: bool) -> None:
    model = model_of(name, patches=patches).train()
    model(views_of(name)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not [name for name in trained if name.startswith("teacher.")]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not any(module.training for module in model.teacher.modules())
    assert model.student.training
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("kind", ["glmae_vit_nano_patch8_32", "mae2d_vit_nano_patch8_32"])
def test_the_teacher_follows_and_begins_as_the_student(kind: str) -> None:
    student: Any = medgmae.create_model(kind, **STUDENTS[kind])
    model = GlobalLocalMAE(student, Projector(24, 16, 8, 12))
    for name, value in model.teacher["encoder"].state_dict().items():
        assert torch.equal(value, student.encoder.state_dict()[name])
    model = model_of(kind, patches=True)
    before = copy.deepcopy(model.state_dict())
    means = {"center": torch.linspace(-1, 1, 12), "patch_center": torch.linspace(0, 2, 10)}
    model.follow(means["center"], momentum=0.9, center_momentum=0.75, patch_mean=means["patch_center"])
    for name, value in model.state_dict().items():
        old = before[name]
        if name.startswith("teacher."):
            own = name.replace("teacher.encoder", "student.encoder").removeprefix("teacher.")
            torch.testing.assert_close(value, 0.9 * old + 0.1 * before[own])
        elif name in means:
            torch.testing.assert_close(value, 0.75 * old + 0.25 * means[name])
        else:
            assert torch.equal(value, old)


def test_what_is_seen_of_the_teacher() -> None:
    model = model_of().eval()
    views = views_of(local=False)
    out = model(views)
    assert set(out.terms) == {"global_reconstruction", "global_consistency", "teacher_entropy", "agreement"}
    torch.testing.assert_close(out.loss, out.terms["global_reconstruction"] + out.terms["global_consistency"])
    features, logits = model.teach(views.whole.flatten(0, 1))
    assert features.shape == (4, 24)
    torch.testing.assert_close(out.teacher_mean, logits.mean(0))
    shares = ((logits - model.center) / 0.04).softmax(-1)
    torch.testing.assert_close(out.terms["teacher_entropy"], -(shares * shares.log()).sum(1).mean())


def test_checkpointing_and_two_scans_at_a_time_change_nothing() -> None:
    model, views = model_of(), views_of()
    plain = torch.autograd.grad(model(views).loss, [p for p in model.parameters() if p.requires_grad])
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(views).loss, [p for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_masking_for_other_views_is_refused() -> None:
    views = views_of()
    with pytest.raises(ValueError, match="the masking is for 6 views; there are 4 global ones"):
        model_of()(views._replace(whole_masking=views.part_masking))
    for patches in (False, True):
        with pytest.raises(ValueError, match=r"the masking is for \(4, 4\).*the input has \(4, 12\)"):
            model_of(patches=patches)(views._replace(whole_masking=masking(4, 4, 0)))


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_of_views_in_sequence_do_what_all_do_at_once(name: str, at_once: int) -> None:
    """Losses and gradients add up, those of KoLeo too, which compares the scans of one view."""
    patches = not name.startswith("gmae")
    model = model_of(name, patches=patches, local_consistency=3.0, koleo_weight=0.7).double().train()
    views = views_of(name, torch.float64)
    learning = [p for p in model.parameters() if p.requires_grad]
    whole = model(views, teacher_temperature=0.05)
    expected = torch.autograd.grad(whole.loss, learning)
    taught = model.taught(views, 0.05)
    groups = views.groups(at_once)
    assert [group.kind for group in groups] == ["local"] * -(-3 // at_once) + ["global"] * -(-2 // at_once)
    terms: dict[str, float] = {}
    for group in groups:
        assert group.x.shape[1] <= at_once
        out = model(group, taught=taught)
        out.loss.backward()
        for term, value in {**out.terms, "loss": out.loss}.items():
            terms[term] = terms.get(term, 0.0) + value.item()
    assert terms == {
        **{term: pytest.approx(value.item(), rel=1e-12) for term, value in whole.terms.items()},
        "loss": pytest.approx(whole.loss.item(), rel=1e-12),
    }
    assert torch.equal(taught.mean, whole.teacher_mean)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"give taught=model\.taught\(views\)"):
        model(groups[0])
