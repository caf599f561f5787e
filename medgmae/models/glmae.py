"""GL-MAE (Zhuang et al. 2023, https://arxiv.org/abs/2306.08913): masked autoencoding of global and local views of a
scan, and consistency of their class tokens with those of a teacher that sees the global views complete.

Its authors have not published their pre-training code. From the figure of their repository are: the masked views, the
complete global views of the teacher, one projector each, reconstruction of both kinds of views, consistency of both
with the teacher's, no predictor. That the consistency has DINO's form is inferred: their files are laid out as DINO's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.layers.masking import Masking
from medgmae.layers.projection import Projector
from medgmae.models.autoencoder import Autoencoder
from medgmae.models.consistency import consistency, entropy, koleo, teacher_shares
from medgmae.models.mae import DEC24, DEC96, DEC576, masked_vit
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


class GlobalLocalOutput(NamedTuple):
    """What a step of :class:`GlobalLocalMAE` gives.

    loss: scalar, the weighted sum of the losses.
    terms: the losses by name, without weights, and without gradients ``teacher_entropy`` in nats and ``agreement``, the
        mean correlation over the prototypes of the student's and the teacher's projections of global views of one scan.
    teacher_mean: (K,), the mean of the teacher's projections, for :meth:`GlobalLocalMAE.follow`.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    teacher_mean: Tensor


class GlobalLocalMAE(nn.Module):
    """A student, any masked autoencoder, that completes masked views and agrees with a teacher about their scan.

    The loss is global_reconstruction + b1 local_reconstruction + b2 global_consistency + b3 local_consistency. The
    reconstructions are the student's own loss, of masked patches, in the mean over the global and over the local views.
    The consistencies are :func:`~medgmae.models.consistency.consistency` of every global (local) view of the student
    with every global view of the teacher; pairs of the same view count too, since the teacher sees it complete. Views
    are compared by their class token after the last norm, of an encoder without one by its pooled vector.

    The teacher's encoder and projector begin as the student's and follow them, see :meth:`follow`; no gradient goes
    through them, and drop path does not act in them. Tables of positions are resampled for each size of views.

    Args:
        student: a masked autoencoder, of voxels or of Gaussians.
        projector: from the encoder's pooled vector to K numbers.
        local_reconstruction: b1; likewise ``global_consistency``, b2, and ``local_consistency``, b3. All 1: a guess.
        koleo_weight: of :func:`~medgmae.models.consistency.koleo` of the pooled vectors of each of the student's global
            views; not in the paper but in DINOv2.
        student_temperature: of the student's softmax. 0.1, DINO's: a guess.
    """

    center: Tensor

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
    ) -> None:
        super().__init__()
        self.student, self.projector = student, projector
        self.weights = {
            "global_reconstruction": 1.0,
            "local_reconstruction": local_reconstruction,
            "global_consistency": global_consistency,
            "local_consistency": local_consistency,
            "koleo": koleo_weight,
        }
        self.student_temperature = student_temperature
        self.teacher = nn.ModuleDict(
            {"encoder": copy.deepcopy(student.encoder), "projector": copy.deepcopy(projector)}
        ).requires_grad_(False)
        self.teacher.eval()
        self.register_buffer("center", torch.zeros(len(projector.prototypes)))

    __call__: Callable[..., GlobalLocalOutput]

    def forward(self, views: Views, step: int | Tensor = 0, teacher_temperature: float = 0.04) -> GlobalLocalOutput:
        """Complete the masked views and compare them with the teacher's.

        Args:
            views: of B scans.
            step: training steps so far; the loss of a Gaussian autoencoder may depend on it.
            teacher_temperature: of the teacher's softmax. 0.04, DINO's: a guess.

        Raises:
            ValueError: views that do not fit the encoder, or a masking for others.
        """
        with torch.no_grad():
            taught = self.teach(views.whole.flatten(0, 1))[1].reshape(*views.whole.shape[:2], -1)  # (B, p, K)
            shares = teacher_shares(taught, self.center, teacher_temperature)
        terms: dict[str, Tensor] = {}
        terms["global_reconstruction"], pooled = self._see(views.whole, views.whole_masking, step)
        said = self.projector(pooled)
        terms["global_consistency"] = consistency(shares, said, self.student_temperature)
        if self.weights["koleo"]:
            terms["koleo"] = torch.stack([koleo(one) for one in pooled.unbind(1)]).mean()
        if views.part is not None and views.part_masking is not None:
            terms["local_reconstruction"], pooled = self._see(views.part, views.part_masking, step)
            local = consistency(shares, self.projector(pooled), self.student_temperature)
            terms["local_consistency"] = local
        loss = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        theirs = taught - self.center
        cosines = torch.cosine_similarity(_level(said.detach()).unsqueeze(2), _level(theirs).unsqueeze(1), dim=-1)
        seen = {"teacher_entropy": entropy(shares).mean(), "agreement": cosines.mean()}
        return GlobalLocalOutput(loss, {**terms, **seen}, taught.float().mean((0, 1)))

    def _see(self, views: Tensor, masking: Masking, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The loss of completing views (B, m, C, *size), and what the encoder makes of them, (B, m, F)."""
        x = views.flatten(0, 1)
        tokens, output = self.student.forward_with_tokens(x, self.student._masking(x, masking, None), step)
        pooled = self.student.encoder.forward_head(tokens, pre_logits=True)
        return output.loss, pooled.reshape(*views.shape[:2], -1)

    @torch.no_grad()
    def teach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher's encoder makes of complete views (n, C, *size), (n, F), and its projections, (n, K)."""
        encoder: Any = self.teacher["encoder"]
        features: Tensor = encoder.forward_head(encoder.forward_features(x), pre_logits=True)
        return features, self.teacher["projector"](features)

    @torch.no_grad()
    def follow(self, teacher_mean: Tensor, momentum: float, center_momentum: float) -> None:
        """After an update, teacher <- momentum teacher + (1 - momentum) student, and the centre the same way towards
        the mean of the teacher's projections.

        Args:
            teacher_mean: (K,), of the whole batch: all passes, all processes.
            momentum: of the teacher's weights.
            center_momentum: 0.9 is DINO's; 1 leaves the centre at 0, which is no centring.
        """
        student = chain(self.student.encoder.parameters(), self.projector.parameters())
        for ours, theirs in zip(self.teacher.parameters(), student, strict=True):
            ours.lerp_(theirs, 1 - momentum)
        self.center.lerp_(teacher_mean.to(self.center), 1 - center_momentum)

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
