"""Settings of GL-MAE's pre-training: views, a teacher, and how the student is compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from medgmae.training.tables import expect


@dataclass(frozen=True)
class GlobalLocalSettings:
    """Views of a scan, and a teacher that follows the student, see :class:`~medgmae.models.GlobalLocalMAE`.

    A sample of a batch is a scan with all of its views; ``crops.size`` is that of the global ones.

    global_views, local_views: numbers p and q.
    local_size: voxels (d, h, w) of a local view, (h, w) of a model of images.
    local_mask_ratio: share of its patches that are hidden; that of the global ones is the model's.
    scale: least and largest factor on the spacing of a view, see :class:`~medgmae.data.ViewSampler`.
    overlap: share of a local view that is scanned and within a global one.
    local_reconstruction, global_consistency, local_consistency: weights of the losses beside the reconstruction of
        global views.
    views_at_once: views of one kind of each scan that go forward and backward together; 0: all of both kinds. The
        memory of a step is that of the largest group, the gradient the sum over all of them: the same as of all views
        at once but for rounding, and for what the student draws anew in every pass (drop path).
    koleo: weight of the KoLeo regulariser, which is taken over the scans of a pass: with ``training.micro_batch`` over
        those of each micro-batch, and a batch of one has none.
    student_temperature, teacher_temperature: of the softmax of the projections.
    first_temperature: of the teacher at the start; linear to ``teacher_temperature`` over ``temperature_warmup``, a
        share of the run.
    momentum: of the teacher's weights at the start; half a cosine to 1 at the end.
    center_momentum: of the centre; 1: no centring.
    projector: widths of the projector: of the layers between, of the bottleneck, and the number of prototypes.
    patch_distillation: weight of the cross-entropy of hidden patches of global views with the teacher's, after iBOT
        (Zhou et al. 2022, https://arxiv.org/abs/2111.07832); 0: none, and no networks for it.
    patch_projector: widths of the projector of patches; iBOT's number of prototypes.
    patch_temperature: of the teacher's softmax of patches; iBOT's.
    """

    global_views: int = 2
    local_views: int = 8
    local_size: list[int] = field(default_factory=lambda: [96, 96, 96])
    local_mask_ratio: float = 0.6
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    overlap: float = 1.0
    local_reconstruction: float = 1.0
    global_consistency: float = 1.0
    local_consistency: float = 1.0
    views_at_once: int = 0
    koleo: float = 0.0
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    first_temperature: float = 0.04
    temperature_warmup: float = 0.0
    momentum: float = 0.996
    center_momentum: float = 0.9
    projector: list[int] = field(default_factory=lambda: [2048, 256, 65536])
    patch_distillation: float = 0.0
    patch_projector: list[int] = field(default_factory=lambda: [2048, 256, 8192])
    patch_temperature: float = 0.04

    def __post_init__(self) -> None:
        for name, least in (("global_views", 1), ("local_views", 0), ("views_at_once", 0)):
            value = getattr(self, name)
            expect(value >= least, f"global_local.{name} is {value}; expected at least {least}")
        for name in ("local_reconstruction", "global_consistency", "local_consistency", "koleo", "patch_distillation"):
            value = getattr(self, name)
            expect(value >= 0, f"global_local.{name} is {value}; expected a weight of at least 0")
        for name in ("student_temperature", "teacher_temperature", "first_temperature", "patch_temperature"):
            value = getattr(self, name)
            expect(value > 0, f"global_local.{name} is {value}; expected more than 0")
        for name in ("momentum", "center_momentum", "temperature_warmup", "overlap"):
            value = getattr(self, name)
            expect(0 <= value <= 1, f"global_local.{name} is {value}; expected 0 to 1")
        ratio = self.local_mask_ratio
        expect(0 <= ratio < 1, f"global_local.local_mask_ratio is {ratio}; expected 0 to below 1")
        size, widths = ("voxels (d, h, w) or (h, w)", (2, 3)), ("three widths", (3,))
        for name, (what, lengths) in {"local_size": size, "projector": widths, "patch_projector": widths}.items():
            value = getattr(self, name)
            expect(len(value) in lengths and min(value) > 0, f"global_local.{name} is {value}; expected {what}")
        low_high = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]
        expect(low_high, f"global_local.scale is {self.scale}; expected [low, high] with 0 < low <= high")

    def temperature(self, done: float) -> float:
        """That of the teacher at a share of the run."""
        if done >= self.temperature_warmup:
            return self.teacher_temperature
        return self.first_temperature + (self.teacher_temperature - self.first_temperature) * (
            done / self.temperature_warmup
        )
