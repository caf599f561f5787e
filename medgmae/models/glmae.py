"""GL-MAE (Zhuang et al. 2023, https://arxiv.org/abs/2306.08913): masked autoencoding of global and local views of a
scan, and consistency of their class tokens with those of a teacher that sees the global views complete.

Its authors have not published their pre-training code. From the figure of their repository are: the masked views, the
complete global views of the teacher, one projector each, reconstruction of both kinds of views, consistency of both
with the teacher's, no predictor. That the consistency has DINO's form is inferred: their files are laid out as DINO's.

Not theirs: patch distillation, after iBOT (Zhou et al. 2022, https://arxiv.org/abs/2111.07832). There the student's
encoder has mask tokens in the places of hidden patches, and one projector serves class token and patches. Here the
encoder sees visible patches only, so that it is the decoder's tokens that stand for hidden ones; a linear layer brings
them to the encoder's width, and patches have a projector of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.layers.blocks import initialize
from medgmae.layers.masking import Masking
from medgmae.layers.patches import take_tokens
from medgmae.layers.projection import Projector
from medgmae.models.autoencoder import Autoencoder, Seen
from medgmae.models.consistency import consistency, entropy, koleo, teacher_shares
from medgmae.models.decoder import MaskDecoder
from medgmae.models.mae import DEC24, DEC96, DEC576, MaskedAutoencoder, masked_vit
from medgmae.models.mae_vim import DEC96 as VIM96
from medgmae.models.mae_vim import masked_vim
from medgmae.models.registry import build, register_model
from medgmae.models.vim import TINY as VIM_TINY
from medgmae.models.vit import BASE, NANO, TINY


class Views(NamedTuple):
    """Views of B scans, and what of them the student sees.

    whole: (B, p, C, *size), the global views.
    whole_masking: of (B p), those of the first scan first.
    part: (B, q, C, *size), the local views, None for none; likewise ``part_masking``, of (B q).
    """

    whole: Tensor
    whole_masking: Masking
    part: Tensor | None = None
    part_masking: Masking | None = None

    def groups(self, at_once: int | None = None) -> list[Group]:
        """Views of one kind, ``at_once`` of each scan; None: all of them.

        The global ones are last: they go through every parameter that learns, which is what processes that exchange
        their gradients with the last backward pass wait for.

        Raises:
            ValueError: a masking for another number of views.
        """
        groups = []
        for kind, x, masking in (("local", self.part, self.part_masking), ("global", self.whole, self.whole_masking)):
            if x is None or masking is None:
                continue
            scans, count = x.shape[:2]
            if len(masking.mask) != scans * count:
                raise ValueError(f"the masking is for {len(masking.mask)} views; there are {scans * count} {kind} ones")
            size = at_once or count
            for first in range(0, count, size):
                at = slice(first, first + size)
                own = Masking(*(part.reshape(scans, count, -1)[:, at].flatten(0, 1) for part in masking))
                groups.append(Group(kind, x[:, at], own, first, count))
        return groups


class Group(NamedTuple):
    """Some views of one kind, which the student sees at once.

    kind: "global" or "local".
    x: (B, m, C, *size).
    masking: of (B m).
    first: number of the first of them.
    of: how many of their kind a scan has.
    """

    kind: str
    x: Tensor
    masking: Masking
    first: int
    of: int


class GlobalLocalOutput(NamedTuple):
    """What a step of :class:`GlobalLocalMAE` gives.

    loss: scalar, the weighted sum of the losses.
    terms: the losses by name, without weights, and without gradients ``teacher_entropy`` in nats and ``agreement``, the
        mean correlation over the prototypes of the student's and the teacher's projections of global views of one scan.
        Those of a :class:`Group` are its shares of them: over all groups they add up.
    teacher_mean: (K,), the mean of the teacher's projections, for :meth:`GlobalLocalMAE.follow`.
    patch_mean: (K',), that of its projections of hidden patches, None without patch distillation.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    teacher_mean: Tensor
    patch_mean: Tensor | None = None


class Taught(NamedTuple):
    """What the teacher makes of the complete global views of B scans, without gradients.

    logits: (B, p, K), its projections.
    shares: (B, p, K), their softmax less the centre at its temperature.
    mean: (K,) of the projections.
    patch_shares: (B, p, h, K') of the h patches that are hidden from the student, None without patch distillation.
    patch_mean: (K',), likewise.
    """

    logits: Tensor
    shares: Tensor
    mean: Tensor
    patch_shares: Tensor | None = None
    patch_mean: Tensor | None = None


class GlobalLocalMAE(nn.Module):
    """A student, any masked autoencoder, that completes masked views and agrees with a teacher about their scan.

    The loss is global_reconstruction + b1 local_reconstruction + b2 global_consistency + b3 local_consistency. The
    reconstructions are the student's own loss, of masked patches, in the mean over the global and over the local views.
    The consistencies are :func:`~medgmae.models.consistency.consistency` of every global (local) view of the student
    with every global view of the teacher; pairs of the same view count too, since the teacher sees it complete. Views
    are compared by their class token after the last norm, of an encoder without one by its pooled vector.

    With a ``patch_projector``, patch distillation is one more loss: of every hidden patch of the global views the
    cross-entropy of the student's softmax, of its decoder's token through a linear layer and the patch projector, with
    the teacher's, of its encoder's token of the same patch of the complete view. Their centre is of the hidden patches.

    The teacher's encoder and projectors begin as the student's and follow them, see :meth:`follow`; no gradient goes
    through them, and drop path does not act in them. Tables of positions are resampled for each size of views.

    Args:
        student: a masked autoencoder, of voxels or of Gaussians.
        projector: from the encoder's pooled vector to K numbers.
        local_reconstruction: b1; likewise ``global_consistency``, b2, and ``local_consistency``, b3. All 1: a guess.
        koleo_weight: of :func:`~medgmae.models.consistency.koleo` of the pooled vectors of each of the student's global
            views; not in the paper but in DINOv2.
        student_temperature: of the student's softmax. 0.1, DINO's: a guess.
        patch_projector: from the width of the encoder's tokens to K' numbers; None: no patch distillation.
        patch_distillation: its weight.
        patch_temperature: of the teacher's softmax of patches; iBOT's.

    Raises:
        ValueError: patch distillation with a student whose decoder has no token of each patch.
    """

    center: Tensor
    patch_center: Tensor

    def __init__(
        self,
        student: Autoencoder,
        projector: Projector,
        *,
        local_reconstruction: float = 1.0,
        global_consistency: float = 1.0,
        local_consistency: float = 1.0,
        koleo_weight: float = 0.0,
        student_temperature: float = 0.1,
        patch_projector: Projector | None = None,
        patch_distillation: float = 1.0,
        patch_temperature: float = 0.04,
    ) -> None:
        super().__init__()
        self.student, self.projector = student, projector
        self.weights = {
            "global_reconstruction": 1.0,
            "local_reconstruction": local_reconstruction,
            "global_consistency": global_consistency,
            "local_consistency": local_consistency,
            "koleo": koleo_weight,
            "patch_distillation": patch_distillation,
        }
        self.student_temperature, self.patch_temperature = student_temperature, patch_temperature
        self.patch_projector = patch_projector
        followed: dict[str, nn.Module] = {"encoder": student.encoder, "projector": projector}
        if patch_projector is not None:
            self.bridge = nn.Linear(_decoder_width(student), student.encoder.embed_dim).apply(initialize)
            self.register_buffer("patch_center", torch.zeros(len(patch_projector.prototypes)))
            followed["patch_projector"] = patch_projector
        self.teacher = nn.ModuleDict({name: copy.deepcopy(part) for name, part in followed.items()})
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(len(projector.prototypes)))

    __call__: Callable[..., GlobalLocalOutput]

    def forward(
        self,
        views: Views | Group,
        step: int | Tensor = 0,
        teacher_temperature: float = 0.04,
        taught: Taught | None = None,
    ) -> GlobalLocalOutput:
        """Complete the masked views and compare them with the teacher's.

        Memory is that of all views at once. Where that is too much, ``taught(views, temperature)`` and then forward and
        backward of one ``views.groups(at_once)`` after the other give the same loss and gradients in sum.

        Args:
            views: of B scans, or some of them.
            step: training steps so far; the loss of a Gaussian autoencoder may depend on it.
            teacher_temperature: of the teacher's softmax, unless ``taught`` is given. 0.04, DINO's: a guess.
            taught: what the teacher makes of the complete global views, see :meth:`taught`; a group of views needs it.

        Raises:
            ValueError: views that do not fit the encoder, a masking for others, one that hides nothing from patch
                distillation, or a group without ``taught``.
        """
        if isinstance(views, Group):
            if taught is None:
                raise ValueError("a group of views is compared with all global ones; give taught=model.taught(views)")
            groups = [views]
        else:
            taught, groups = self.taught(views, teacher_temperature) if taught is None else taught, views.groups()
        terms: dict[str, Tensor] = {}
        for group in groups:
            terms |= self._terms(group, taught, step)
        loss = torch.stack([self.weights[name] * value for name, value in terms.items() if name in self.weights]).sum()
        return GlobalLocalOutput(loss, terms, taught.mean, taught.patch_mean)

    def _terms(self, group: Group, taught: Taught, step: int | Tensor) -> dict[str, Tensor]:
        """What a group of views adds to the losses, and to what is shown of the projections of global ones."""
        x, kind, count = group.x.flatten(0, 1), group.kind, group.x.shape[1]
        seen = self.student.forward_with_tokens(x, self.student._masking(x, group.masking, None), step)
        pooled = self.student.encoder.forward_head(seen.tokens, pre_logits=True).reshape(*group.x.shape[:2], -1)
        said = self.projector(pooled)
        terms: dict[str, Tensor] = {
            f"{kind}_reconstruction": seen.output.loss,
            f"{kind}_consistency": consistency(taught.shares, said, self.student_temperature),
        }
        if kind == "global":
            if self.weights["koleo"]:
                terms["koleo"] = torch.stack([koleo(one) for one in pooled.unbind(1)]).mean()
            if taught.patch_shares is not None:
                own = taught.patch_shares[:, group.first : group.first + count]
                terms["patch_distillation"] = self._patches(seen, group.masking, own)
            ours, theirs = _level(said.detach()).unsqueeze(2), _level(taught.logits - self.center).unsqueeze(1)
            terms["teacher_entropy"] = entropy(taught.shares).mean()
            terms["agreement"] = torch.cosine_similarity(ours, theirs, dim=-1).mean()
        return {name: value * (count / group.of) for name, value in terms.items()}

    def _patches(self, seen: Seen, masking: Masking, shares: Tensor) -> Tensor:
        """The mean cross-entropy of hidden patches of views with the teacher's shares (B, m, h, K') of them."""
        assert self.patch_projector is not None
        assert seen.decoded is not None
        said = self.patch_projector(self.bridge(take_tokens(seen.decoded, masking.hidden)))  # (B m, h, K')
        shares, said = (one.reshape(-1, 1, one.shape[-1]) for one in (shares, said))  # each patch with itself alone
        return consistency(shares, said, self.student_temperature)

    @torch.no_grad()
    def taught(self, views: Views, temperature: float) -> Taught:
        """What the teacher makes of the complete global views.

        Args:
            views: of B scans.
            temperature: of its softmax.

        Raises:
            ValueError: see :meth:`forward`.
        """
        encoder: Any = self.teacher["encoder"]
        x = views.whole.flatten(0, 1)
        tokens = encoder.forward_features(x)
        shape = views.whole.shape[:2]
        projections = self.teacher["projector"](encoder.forward_head(tokens, pre_logits=True))
        logits = projections.reshape(*shape, -1)
        shares, mean = teacher_shares(logits, self.center, temperature), projections.float().mean(0)
        if self.patch_projector is None:
            return Taught(logits, shares, mean)
        hidden = self.student._masking(x, views.whole_masking, None).hidden
        if hidden.shape[1] == 0:
            raise ValueError(
                "patch distillation compares hidden patches, and the masking hides none of the global views; give a "
                "larger mask_ratio, or patch_projector=None"
            )
        patches = self.teacher["patch_projector"](take_tokens(tokens[:, encoder.num_prefix_tokens :], hidden))
        patch_shares = teacher_shares(patches, self.patch_center, self.patch_temperature)
        patch_mean = patches.float().mean((0, 1))
        return Taught(logits, shares, mean, patch_shares.reshape(*shape, *patches.shape[1:]), patch_mean)

    @torch.no_grad()
    def teach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher's encoder makes of complete views (n, C, *size), (n, F), and its projections, (n, K)."""
        encoder: Any = self.teacher["encoder"]
        features: Tensor = encoder.forward_head(encoder.forward_features(x), pre_logits=True)
        return features, self.teacher["projector"](features)

    @torch.no_grad()
    def follow(
        self, teacher_mean: Tensor, momentum: float, center_momentum: float, patch_mean: Tensor | None = None
    ) -> None:
        """After an update, teacher <- momentum teacher + (1 - momentum) student, and the centres the same way towards
        the means of the teacher's projections.

        Args:
            teacher_mean: (K,), of the whole batch: all passes, all processes.
            momentum: of the teacher's weights.
            center_momentum: 0.9 is DINO's and iBOT's; 1 leaves the centres at 0, which is no centring.
            patch_mean: (K',), likewise of hidden patches; None without patch distillation.
        """
        learning = (self.student.encoder, self.projector, self.patch_projector)
        student = chain.from_iterable(part.parameters() for part in learning if part is not None)
        for ours, theirs in zip(self.teacher.parameters(), student, strict=True):
            ours.lerp_(theirs, 1 - momentum)
        self.center.lerp_(teacher_mean.to(self.center), 1 - center_momentum)
        if patch_mean is not None:
            self.patch_center.lerp_(patch_mean.to(self.patch_center), 1 - center_momentum)

    def train(self, mode: bool = True) -> GlobalLocalMAE:
        """The student in training mode, or not; the teacher never is."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def mask_ratio(self) -> float:
        """That of the student."""
        return self.student.mask_ratio

    @property
    def patch_size(self) -> tuple[int, ...]:
        """That of the student."""
        return self.student.patch_size

    def reconstruct(self, x: Tensor, masking: Masking | None = None) -> Tensor:
        """What the student makes of a volume, see :meth:`Autoencoder.reconstruct`."""
        return self.student.reconstruct(x, masking)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the student's blocks in the backward pass instead of keeping their activations."""
        self.student.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers leave undecayed: the student's."""
        return {f"student.{name}" for name in self.student.no_weight_decay()}


def _decoder_width(student: Autoencoder) -> int:
    """Of a decoder's tokens.

    Raises:
        ValueError: it has none for each patch.
    """
    if not isinstance(student, MaskedAutoencoder) or not isinstance(student.decoder, MaskDecoder):
        raise ValueError(
            "patch distillation compares the tokens of the student's decoder patch by patch, and the "
            f"{type(student.decoder).__name__} of a {type(student).__name__} has none; expected a masked autoencoder "
            "such as mae_vit_* or mae_vim_*, or no patch distillation"
        )
    return student.decoder.mask_token.shape[-1]


def _level(logits: Tensor) -> Tensor:
    """What a softmax sees of logits: not their mean."""
    return logits - logits.mean(-1, keepdim=True)


def _student(builder: Any, overrides: dict[str, Any], *sizes: dict[str, Any], **more: Any) -> Autoencoder:
    defaults = {name: value for size in sizes for name, value in size.items()}
    return build(builder, {**defaults, "mask_ratio": 0.6, **more}, overrides)  # type: ignore[no-any-return]


@register_model
def glmae_vit_base_patch16_96(**overrides: Any) -> Autoencoder:
    """GL-MAE's student: ViT-B/16, table for 96³, decoder 576 wide and mask ratio 0.6 as in its author's MAE3D."""
    return _student(masked_vit, overrides, BASE, DEC576, img_size=96, patch_size=16, norm_target="unbiased")


@register_model
def glmae_vit_tiny_patch8_64(**overrides: Any) -> Autoencoder:
    """GL-MAE's student with ViT-Ti/8, table for 64³, decoder 96 wide: small enough for a laptop."""
    return _student(masked_vit, overrides, TINY, DEC96, img_size=64, patch_size=8)


@register_model
def glmae_vim_tiny_patch8_64(**overrides: Any) -> Autoencoder:
    """GL-MAE's student with Vim-Ti/8, table for 64³, decoder 96 wide, compared by the mean of its tokens."""
    return _student(masked_vim, overrides, VIM_TINY, VIM96, img_size=64, patch_size=8)


@register_model
def glmae_vit_nano_patch8_32(**overrides: Any) -> Autoencoder:
    """GL-MAE's student of two narrow blocks, table for 32³, one block in the decoder: for tests."""
    return _student(masked_vit, overrides, NANO, DEC24, img_size=32, patch_size=8)
