"""Fine-tuning: from scans with labels in a table to a model that predicts them, and how well it does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medgmae.checkpoints.cards import WeightsError, list_weights
from medgmae.data import VolumeError, is_prepared, list_scans
from medgmae.data.manifest import found_path
from medgmae.data.nnunet import is_nnunet, nnunet_regions
from medgmae.factory import card_input, create_model
from medgmae.training.cases import View
from medgmae.training.corpus import Corpus, corpus_of
from medgmae.training.division import Part, divide
from medgmae.training.leaks import refuse_copies
from medgmae.training.machine import Machine, accelerator_for
from medgmae.training.masks import Masks, masks_of
from medgmae.training.results import METRICS, PREDICTIONS, joined, output_names, read_results, report, write_results
from medgmae.training.runs import Run
from medgmae.training.segmenting import SegmentTuning, summarize_cases
from medgmae.training.session import Job, Session
from medgmae.training.settings import TuneSettings
from medgmae.training.states import Checkpoints
from medgmae.training.stopping import Stopped, StopRequest
from medgmae.training.tables import TrainingError, expect
from medgmae.training.targets import Targets, read_targets
from medgmae.training.tuned import segmenter, tuned_model
from medgmae.training.tuning import FineTuning

if TYPE_CHECKING:
    from accelerate import Accelerator

MACHINE = Machine(checkpoint_every=None, picture_every=0)


def finetune(
    settings: TuneSettings,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    machine: Machine | None = None,
) -> Path:
    """Fine-tune an encoder on scans whose labels a table has.

    The same settings and data give the same weights, bit by bit on a CPU with the same number of threads, whether the
    run was interrupted or not. With ``settings.folds`` there is a run for each fold, in OUT/fold_0 and so on, each from
    the same start.

    Args:
        settings: see :class:`TuneSettings`; ``read_recipe(name, TuneSettings)`` has those of published systems.
        data: a .csv table, see :func:`~medgmae.data.read_manifest`.
        out: the run's folder.
        resume: go on with the run that is there, by its own settings, and without ``data`` with its own scans.
        machine: see :class:`Machine`.

    Returns:
        The folder. It, or with folds each of its folders, is a model that ``create_model("local-dir:FOLDER")`` opens;
        metrics.json and predictions.csv are about the cases held out.

    Raises:
        TrainingError: settings, data or a folder that cannot be used; a loss that is not finite; a disk that is full.
        Stopped: the run was asked to end (Ctrl-C, SIGTERM, SIGUSR1), and has saved its state.
    """
    machine, home = machine or MACHINE, Run(out)
    expect(not machine.sharded, "fine-tuning copies the model to every process; leave out sharded")
    settings = home.settings(TuneSettings) if resume else completed(settings, data)
    accelerator = accelerator_for(machine, settings.training.precision, home.folder)
    if accelerator.is_main_process:
        expect(resume or not home.exists, f"{out} holds a run; --resume goes on with it, or choose another folder")
        home.open()
    try:
        prepared = machine.prepared or home.folder / "prepared"
        source = data
        if resume and not data:
            start = home.starts()[0]
            source, prepared = start["data"], machine.prepared or Path(start["prepared"])
            data = [prepared] if is_prepared(prepared) else source
        study = study_of(settings, data, prepared, machine.skip_broken, accelerator, source)
        with StopRequest() as request:
            if not settings.folds:
                _train(study, 0, home, machine, accelerator, request, resume)
            else:
                _train_folds(study, home, machine, accelerator, request)
    except Stopped as stopped:
        raise Stopped(stopped.signal, stopped.step, out) from None
    finally:
        if accelerator.is_main_process:
            home.close()
    return home.folder


@dataclass(frozen=True)
class Study:
    """Cases, their targets, and how they are divided.

    corpus: prepared scans.
    parts: of every fold, or of the one run.
    groups: of each case, or None.
    masks: label maps of what is segmented.
    """

    settings: TuneSettings
    corpus: Corpus
    targets: Targets
    view: View
    parts: list[Part]
    groups: Any
    masks: Masks | None = None

    @property
    def names(self) -> list[str]:
        """Of the cases."""
        return [scan.name for scan in self.corpus.scans]


def study_of(
    settings: TuneSettings,
    data: Sequence[str | Path],
    folder: Path,
    skip_broken: bool,
    accelerator: Accelerator,
    source: Sequence[str | Path] | None = None,
) -> Study:
    """The cases of a table, prepared for what the model sees of them; ``source`` is what ``data`` was prepared of.

    Raises:
        TrainingError: scans or labels that cannot be used.
    """
    view = view_of(settings)
    source = data if source is None else source
    if not (len(data) == 1 and is_prepared(data[0])):
        listed(settings, data, skip_broken)  # reading the scans takes longer than finding a wrong label
    corpus = corpus_of(view.prepared, data, view.size, folder, skip_broken, accelerator, "float32")
    rows, names = [scan.labels for scan in corpus.scans], [scan.name for scan in corpus.scans]
    targets = read_targets(rows, names, settings.task)
    parts, groups = _divided(settings, targets, rows)
    refuse_copies(corpus.scans, parts)
    masks = None
    if settings.task.kind == "segment":
        files = [found_path(Path(source[0]).parent, row[settings.task.labels[0]]) for row in rows]
        masks = masks_of(settings.task, corpus.scans, Path(corpus.folder) / "masks", files)
    return Study(settings, replace(corpus, sources=source), targets, view, parts, groups, masks)


def listed(settings: TuneSettings, data: Sequence[str | Path], skip_broken: bool) -> tuple[Targets, list[Part]]:
    """The targets of a table and how its cases are divided, before any scan is read.

    Raises:
        TrainingError: a table, files or labels that cannot be used.
    """
    try:
        listing = list_scans(data, settings.input_block.get("contrasts"), arrays=True)
    except VolumeError as error:
        raise TrainingError(str(error)) from error
    if listing.errors and not skip_broken:
        shown = "; ".join(one["error"] for one in listing.errors[:5])
        raise TrainingError(f"{len(listing.errors)} scans cannot be read: {shown}; --skip-broken leaves them out")
    expect(bool(listing.scans), f"no scans in {', '.join(map(str, data))}")
    rows = [scan.labels for scan in listing.scans]
    targets = read_targets(rows, [scan.name for scan in listing.scans], settings.task)
    return targets, _divided(settings, targets, rows)[0]


def _divided(settings: TuneSettings, targets: Targets, rows: Sequence[dict[str, str]]) -> tuple[list[Part], Any]:
    try:
        return divide(settings, targets, rows)
    except ImportError as error:
        raise TrainingError(str(error)) from error


def completed(settings: TuneSettings, data: Sequence[str | Path] = ()) -> TuneSettings:
    """The settings with all that a name stands for: a tag in ``model`` becomes ``init``, the input of the weights the
    input of the run, the labels of an nnU-Net folder the regions.

    Raises:
        TrainingError: a model or weights that there are not, or nothing that says what the input is.
    """
    name, dot, _ = settings.model.partition(".")
    if dot:
        expect(settings.init is None, f"{settings.model} and init={settings.init!r} both name weights; leave one out")
        settings = replace(settings, model=name, init=settings.model)
    block: Any = settings.input
    if not block and settings.init:
        try:
            block = card_input(settings.init) if settings.init in list_weights() else _saved_input(settings.init)
        except (VolumeError, WeightsError, ValueError, OSError) as error:
            raise TrainingError(f"what {settings.init} takes is not known: {error}; give input") from error
    elif isinstance(block, str):
        block = settings.input_block
    expect(bool(block), "nothing says how scans are prepared; give input: the tag of a weight card, or a block")
    task = settings.task
    if task.kind == "segment" and not task.regions and len(data) == 1 and is_nnunet(Path(data[0])):
        try:
            regions, overlap = nnunet_regions(Path(data[0]))
        except VolumeError as error:
            raise TrainingError(str(error)) from error
        task = replace(task, regions=regions, multilabel=overlap)
    return replace(settings, input=dict(block), task=task)


def _saved_input(source: str) -> Any:
    """The input block of a model that was saved in a folder or on the hub."""
    folder = source if source.startswith(("hf-hub:", "local-dir:")) else f"local-dir:{os.path.abspath(source)}"
    return card_input(create_model(folder))


def view_of(settings: TuneSettings) -> View:
    """What the model of a run sees of a scan."""
    with torch.device("meta"):
        segments = settings.task.kind == "segment"
        build = segmenter(settings, 2, pretrained=False) if segments else tuned_model(settings, 1, pretrained=False)
    model: Any = build.encoder
    block = settings.input_block
    expect(
        (block.get("channels") or 1) == model.in_chans,
        f"input.channels is {block.get('channels') or 1} and the model takes {model.in_chans}; give "
        "model_options.in_chans",
    )
    return View.of(settings.view, block, model.img_size, model.patch_size)


def _train(
    study: Study,
    number: int,
    run: Run,
    machine: Machine,
    accelerator: Accelerator,
    request: StopRequest,
    resume: bool,
) -> None:
    """One run, from its last state or from the start."""
    state = Checkpoints(run.checkpoints, machine.keep).last() if resume else None
    settings = study.settings
    part, view = study.parts[number], study.view
    job: Job
    if study.masks is not None:
        network = segmenter(settings, len(study.masks.names), pretrained=state is None)
        job = SegmentTuning(settings, run, network, study.corpus, study.masks, view, part, number)
    else:
        model = tuned_model(settings, study.targets.outputs, pretrained=state is None)
        job = FineTuning(settings, run, model, study.corpus, study.targets, view, part, number, study.groups)
    Session(job, machine, run, accelerator, request).go(state)


def _train_folds(study: Study, home: Run, machine: Machine, accelerator: Accelerator, request: StopRequest) -> None:
    """A run for each fold that is not done, then what they say together."""
    main = accelerator.is_main_process
    if main:
        facts = {"data": [str(one) for one in study.corpus.sources], "prepared": str(study.corpus.folder)}
        home.begin(study.settings, {**facts, "folds": len(study.parts)}, 0)
    runs = [Run(home.folder / f"fold_{number}") for number in range(len(study.parts))]
    for number, run in enumerate(runs):
        if (run.folder / METRICS).exists():
            continue
        if main:
            run.open()
        try:
            own = accelerator_for(machine, study.settings.training.precision, run.folder)
            _train(study, number, run, machine, own, request, run.exists)
            own.free_memory()
        finally:
            if main:
                run.close()
    if main:
        _summarize(study, home, runs)


def _summarize(study: Study, home: Run, runs: Sequence[Run]) -> None:
    """Metrics of every fold, their mean, and those of all cases, each by the model that has not seen it."""
    if study.masks is not None:
        summarize_cases(home.folder, [run.folder for run in runs])
        return
    targets, outputs = study.targets, output_names(study.targets)
    results = [read_results(run.folder, study.names, outputs, number) for number, run in enumerate(runs)]
    for run, one in zip(runs, results, strict=True):
        expect(bool(one.cases), f"{run.folder / PREDICTIONS} has no cases; remove the folder and resume")
    folds = [_safely(targets, one, study.groups) for one in results]
    pooled = joined(results)
    about = {
        "cases": len(pooled.cases),
        "folds": folds,
        "mean": mean_of(folds),
        "pooled": report(targets, pooled, study.groups),
    }
    write_results(home.folder, targets, pooled, study.names, about)


def _safely(targets: Targets, results: Any, groups: Any) -> dict[str, Any]:
    """The metrics of a fold; none where it lacks a class."""
    try:
        return report(targets, results, groups)
    except ValueError as error:
        return {"undefined": str(error)}


def mean_of(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the folds of every metric that all of them have; nested as they are."""
    found: dict[str, Any] = {}
    for name in folds[0]:
        if not all(isinstance(fold.get(name), dict) for fold in folds):
            continue
        if "value" in folds[0][name]:
            values = [fold[name]["value"] for fold in folds]
            found[name] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}
        else:
            found[name] = mean_of([fold[name] for fold in folds])
    return found
