"""GL-MAE's pre-training: views of scans, a teacher that follows the student, and what shows that they collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation, PreparedScan, View, ViewSampler, VolumeError, draws
from medgmae.data.crops import epoch_order
from medgmae.data.input_block import padding
from medgmae.layers.masking import Masking, random_masking
from medgmae.layers.projection import Projector
from medgmae.models.autoencoder import Autoencoder
from medgmae.models.consistency import effective_rank, entropy, teacher_shares
from medgmae.models.glmae import GlobalLocalMAE, Group, Taught, Views
from medgmae.training.batches import MASK, MaskedBatch, Samples
from medgmae.training.engine import Engine, Objective, Plan
from medgmae.training.global_local_settings import GlobalLocalSettings
from medgmae.training.optim import param_groups
from medgmae.training.pretraining import Pretraining, crop_size
from medgmae.training.progress import Progress
from medgmae.training.settings import Settings
from medgmae.training.states import State
from medgmae.training.tables import TrainingError, expect

_MEASURED = 24  # crops of which it is measured how different the teacher finds them
_SAYS_NOTHING = 3e-4  # nats that its softmax tells of them at least, between what benchmarks/global_local.py measures
_SETTLED = 0.2  # share of the run before which it may say less


class ViewBatch(NamedTuple):
    """Views of the scans of one process.

    whole: (B, p, C, *size), the global views; likewise ``part``, (B, q, C, *size), the local ones, None for none.
    whole_noise: (B, p, N), of which the masks are made; likewise ``part_noise``.
    of: what each scan is, for error messages.
    """

    whole: Tensor
    whole_noise: Tensor
    part: Tensor | None
    part_noise: Tensor | None
    of: list[str]

    def to(self, device: torch.device) -> ViewBatch:
        """The tensors on a device."""

        def moved(one: Tensor | None) -> Any:
            return None if one is None else one.to(device, non_blocking=True)

        whole, part = (moved(self.whole), moved(self.whole_noise)), (moved(self.part), moved(self.part_noise))
        return ViewBatch(*whole, *part, self.of)

    def views(self, ratio: float, part_ratio: float) -> Views:
        """With the masks that the noise makes at these ratios."""
        part = None if self.part_noise is None else _masking(self.part_noise, part_ratio)
        return Views(self.whole, _masking(self.whole_noise, ratio), self.part, part)


def _masking(noise: Tensor, ratio: float) -> Masking:
    """The masks that noise (B, m, N) makes, of (B m)."""
    return random_masking(math.prod(noise.shape[:2]), noise.shape[2], ratio, noise=noise.flatten(0, 1))


class ScanViews(Samples[ViewBatch]):
    """Views of scans with the noise of their masks: what a position gives depends on the seed alone, as with
    :class:`~medgmae.data.Crops`.

    Args:
        scans: prepared volumes with one number of channels.
        sampler: of their views.
        patch: voxels per axis of a patch.
        per_scan: samples of each volume in an epoch.
        seed: of everything.
    """

    def __init__(
        self, scans: Sequence[PreparedScan], sampler: ViewSampler, patch: Sequence[int], per_scan: int, seed: int
    ) -> None:
        self.scans, self.sampler, self.per_scan, self.seed = list(scans), sampler, per_scan, seed
        sizes = (sampler.global_size, sampler.local_size)
        self.patches = [math.prod(n // p for n, p in zip(size, patch, strict=True)) for size in sizes]

    def __len__(self) -> int:
        return len(self.scans) * self.per_scan

    def __getitem__(self, position: int) -> tuple[list[Tensor], list[Tensor], str]:
        """Position counts on over the epochs: (views, noise, what it is)."""
        views, scan = self.views(position)
        rng = draws(self.seed, *divmod(position, len(self)), MASK)
        counts = [self.patches[view.kind == "local"] for view in views]
        noise = [torch.from_numpy(rng.random(count, dtype="float32")) for count in counts]
        return [view.x for view in views], noise, scan.source

    def views(self, position: int) -> tuple[list[View], PreparedScan]:
        """The views of a sample, and the scan."""
        epoch, index = divmod(position, len(self))
        scan = self.scans[int(epoch_order(self.seed, epoch, len(self))[index]) // self.per_scan]
        return self.sampler(scan, draws(self.seed, epoch, index)), scan

    def stack(self, samples: Sequence[tuple[list[Tensor], list[Tensor], str]]) -> ViewBatch:
        """One batch of samples."""
        count, local = self.sampler.global_views, self.sampler.local_views
        spans = [slice(count), slice(count, count + local)][: 1 + (local > 0)]
        x = [torch.stack([torch.stack(views[at]) for views, _, _ in samples]) for at in spans]
        noise = [torch.stack([torch.stack(drawn[at]) for _, drawn, _ in samples]) for at in spans]
        part, part_noise = (x[1], noise[1]) if len(spans) == 2 else (None, None)
        return ViewBatch(x[0], noise[0], part, part_noise, [source for _, _, source in samples])


class Compare(Objective):
    """The losses of views, and what follows an update."""

    def __init__(self, model: GlobalLocalMAE, settings: Settings, options: GlobalLocalSettings, steps: int) -> None:
        self.ratio, self.options, self.steps = model.mask_ratio, options, steps
        self.weight_decay = settings.training.weight_decay
        self._means: list[Tensor] = []
        self._patch_means: list[Tensor] = []

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Those of the student and of the projector: the teacher has no gradients."""
        return param_groups(model, weight_decay=self.weight_decay)

    def parts(
        self, model: nn.Module, batch: ViewBatch, step: int
    ) -> list[tuple[Views, Taught]] | list[tuple[Group, Taught]]:
        """All views, or one group of them after the other, and what the teacher makes of the complete global ones."""
        views = batch.views(self.ratio, self.options.local_mask_ratio)
        taught: Taught = cast(Any, model).taught(views, self.options.temperature(step / self.steps))
        self._means.append(taught.mean)
        if taught.patch_mean is not None:
            self._patch_means.append(taught.patch_mean)
        if not self.options.views_at_once:
            return [(views, taught)]
        return [(group, taught) for group in views.groups(self.options.views_at_once)]

    def __call__(
        self, model: nn.Module, part: tuple[Views | Group, Taught] | MaskedBatch, step: int
    ) -> dict[str, Tensor]:
        """The loss and its terms; of crops, each as the one global view of its scan."""
        if isinstance(part, MaskedBatch):
            alone = Views(part.x.unsqueeze(1), part.masking(self.ratio))
            output = model(alone, step, self.options.temperature(step / self.steps))
        else:
            views, taught = part
            output = model(views, step, taught=taught)
        return {"loss": output.loss, **output.terms}

    def follow(self, engine: Engine, step: int) -> None:
        """The teacher and the centres, after all passes of an update on all processes."""
        mean, patch_mean = _mean(self._means, engine), _mean(self._patch_means, engine)
        start, done = self.options.momentum, (step + 1) / self.steps
        momentum = 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2
        cast(Any, engine.plain).follow(mean, momentum, self.options.center_momentum, patch_mean)


def _mean(passes: list[Tensor], engine: Engine) -> Tensor | None:
    """Over the passes of an update, whose list is emptied, and over all processes; None of none."""
    if not passes:
        return None
    mean: Tensor = engine.accelerator.reduce(torch.stack(passes).mean(0), "mean")
    passes.clear()
    return mean


class GlobalLocalPretraining(Pretraining):
    """A masked autoencoder completes views of scans, and agrees with its teacher about them.

    Args:
        settings: of the run, with ``global_local``.
        run: its folder.
        model: see :func:`with_teacher`.
        corpus: the scans.
    """

    model: GlobalLocalMAE
    collapsed = ""  # what to say of a run that has

    @property
    def options(self) -> GlobalLocalSettings:
        """The settings of views and teacher."""
        options = self.settings.global_local
        assert options is not None
        return options

    def _learn(self, scans: Sequence[PreparedScan]) -> None:
        settings, options, encoder = self.settings, self.options, self.model.student.encoder
        size, local = crop_size(settings, self.model.student), tuple(options.local_size)
        patch = encoder.patch_size
        fits = len(local) == len(patch) and all(n % p == 0 for n, p in zip(local, patch, strict=True))
        expect(
            fits,
            f"global_local.local_size is {list(local)} and the model's patch {list(patch)}; expected as many axes, and "
            "views made of whole patches",
        )
        expect(
            not options.patch_distillation or self.model.mask_ratio > 0,
            "global_local.patch_distillation compares hidden patches, and model_options.mask_ratio is 0; give a larger "
            "one, or patch_distillation=0",
        )
        patches, share = math.prod(local) // math.prod(encoder.patch_size), options.local_mask_ratio
        expect(
            round(patches * (1 - share), 6) >= 1,
            f"global_local.local_mask_ratio={share} of {patches} patches leaves none visible; give a smaller one, or "
            "larger views",
        )
        try:
            sampler = ViewSampler(
                size,
                local,
                options.global_views,
                options.local_views,
                (options.scale[0], options.scale[1]),
                options.overlap,
                settings.crops.foreground,
                padding(self.corpus.input),
                settings.crops.normalize,
                Augmentation.of(settings.augmentation),
            )
            for scan in scans:
                sampler.check(scan)
        except VolumeError as error:
            raise TrainingError(str(error)) from None
        self.samples = ScanViews(scans, sampler, encoder.patch_size, settings.crops.per_scan, settings.training.seed)
        steps = Plan.of(settings.training, len(self.samples)).steps
        self.objective = Compare(self.model, settings, options, steps)

    def updated(self, engine: Engine, step: int) -> None:
        """The teacher follows."""
        cast(Compare, self.objective).follow(engine, step)

    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Beside what is measured of every masked autoencoder, how different the teacher finds the scans."""
        values, score = super().measure(engine, step)
        spread = self.spread(engine, step)
        if step >= _SETTLED * cast(Compare, self.objective).steps and spread["teacher_information"] < _SAYS_NOTHING:
            self.collapsed = (
                f"step {step}: {_collapse(spread, self.options)}. The weights are in {self.run.checkpoints}"
            )
        return {**values, **spread}, score

    def enough(self, progress: Progress) -> bool:
        """Never before its time, but for a run that has collapsed.

        Raises:
            TrainingError: it has: log and weights are written.
        """
        expect(not self.collapsed, self.collapsed)
        return False

    def spread(self, engine: Engine, step: int) -> dict[str, float]:
        """Of fixed crops, as the teacher sees them complete.

        ``feature_variance``: of its features, the mean over them; ``effective_rank`` of these; ``prototypes_used``:
        entropy of the mean of its softmax, in nats; ``teacher_information``: that less the mean of the entropies, what
        the softmax tells of which crop it is.
        """
        model, crops = cast(Any, engine.plain), self.validation.crops
        taught = []
        for position in range(_MEASURED):
            x = crops[position][0].unsqueeze(0).to(engine.accelerator.device)
            with engine.accelerator.autocast():
                taught.append(model.teach(x))
        features, logits = (torch.cat(part).double() for part in zip(*taught, strict=True))
        temperature = self.options.temperature(step / cast(Compare, self.objective).steps)
        shares = teacher_shares(logits, model.center, temperature)
        return {
            "feature_variance": float(features.var(0).mean()),
            "effective_rank": float(effective_rank(features)),
            "prototypes_used": float(entropy(shares.mean(0))),
            "teacher_information": float(entropy(shares.mean(0)) - entropy(shares).mean()),
        }

    def rebuilt(self, state: State) -> nn.Module:
        """See :class:`~medgmae.training.session.Job`."""
        model = with_teacher(self._built(), self.settings)
        model.load_state_dict(state.model)
        return model

    @property
    def _autoencoder(self) -> Any:
        """The student."""
        return self.model.student

    def export(self, model: Any, plan: Plan, step: int) -> None:
        """The teacher's encoder as the run's model; the student, a whole autoencoder, in the folder ``student``."""
        parts = {"student": (model.student, "student"), "teacher": (model.teacher["encoder"], ".")}
        for name, (part, folder) in parts.items():
            part.pretrained_cfg = self._card(plan, step, name)
            save_pretrained(part, self.run.folder / folder)

    def picture(self, model: Any, path: Path, title: str) -> None:
        """What the student makes of the first measured crop."""
        self.validation.picture(model.student, path, title)


def _collapse(spread: dict[str, float], options: GlobalLocalSettings) -> str:
    """What has become of a teacher that finds all crops alike, and which setting is likely to blame."""
    prototypes, used = options.projector[2], spread["prototypes_used"]
    said = (
        f"collapsed: the teacher's softmax tells {spread['teacher_information']:.2g} nats of the measured crops, "
        f"expected at least {_SAYS_NOTHING:g}; "
    )
    if used < math.log(prototypes) / 2:
        off = options.center_momentum == 1
        centre = "is 1, no centring: give 0.9" if off else f"is {options.center_momentum:g}: try a smaller one"
        return (
            f"{said}a few of its {prototypes} prototypes have it all. global_local.center_momentum {centre}; a larger "
            f"global_local.teacher_temperature (is {options.teacher_temperature:g}) and a longer training.warmup_steps "
            "work the same way"
        )
    return (
        f"{said}all of its {prototypes} prototypes have alike. Lower global_local.teacher_temperature (is "
        f"{options.teacher_temperature:g}), which must be well below student_temperature (is "
        f"{options.student_temperature:g}), or training.lr, or lengthen training.warmup_steps"
    )


def with_teacher(model: Autoencoder, settings: Settings) -> GlobalLocalMAE:
    """A masked autoencoder as the student of a run; the projectors are drawn by its seed.

    Raises:
        TrainingError: patch distillation of a model that has no tokens for it.
    """
    options = settings.global_local
    assert options is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        projector = Projector(model.num_features, *options.projector)
        patches = Projector(model.encoder.embed_dim, *options.patch_projector) if options.patch_distillation else None
        try:
            return GlobalLocalMAE(
                model,
                projector,
                local_reconstruction=options.local_reconstruction,
                global_consistency=options.global_consistency,
                local_consistency=options.local_consistency,
                koleo_weight=options.koleo,
                student_temperature=options.student_temperature,
                patch_projector=patches,
                patch_distillation=options.patch_distillation,
                patch_temperature=options.patch_temperature,
            )
        except ValueError as error:
            raise TrainingError(f"{settings.model}: {error}; give global_local.patch_distillation=0") from None
