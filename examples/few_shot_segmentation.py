"""Does pre-training help? A UNETR on the encoder of the demonstration weights against one that starts at random.

    python examples/few_shot_segmentation.py                          # three tasks, one seed: minutes on two cores
    python examples/few_shot_segmentation.py --task aorta --seeds 3 --steps 300 --out DIR

Each task has one real scan: the network is trained on one part of it and tested on another. Both networks get the same
crops, steps and learning rates. The encoder was pre-trained on these very scans, test parts included, though without
labels: what is measured is whether that helps here, and not whether it would on another patient.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from medgmae import Volume, create_model, create_transform, dice_ce_loss, read_volume, segment_scan
from medgmae.data import label_channels, resample_like
from medgmae.evaluation import segmentation_metrics
from medgmae.training import cosine_schedule, param_groups

ROOT = Path(__file__).parent.parent
ENCODER = "vit_tiny_patch8_64.demo"
STARTS = {"pretrained": ENCODER, "random": None}
GAP = 2  # planes of 2 mm on either side of the cut that neither part has


class Task(NamedTuple):
    """A scan and its labels. The lower half of the labelled planes is trained on and the upper half tested, or along
    axis 2 the left and the right half; the axes are those of a prepared array, z, y, x in RAS."""

    scan: str
    labels: str
    classes: dict[str, Sequence[int]]
    axis: int
    crop: tuple[int, int, int]  # voxels of 2 mm
    steps: int
    first_slice: int | None = None  # of the scan that the labels' first slice belongs to, where their file does not say
    mirror: bool = False  # mirror the test part, so that a right half looks like a left one


class Part(NamedTuple):
    """A part of a scan, and its labels on the same grid: 0 for the background, 1 to K in the order of the classes."""

    scan: Volume
    labels: Volume


ORGANS: dict[str, Sequence[int]] = {"liver": [5], "spleen": [1], "kidneys": [2, 3], "stomach": [6], "colon": [20]}
REGIONS: dict[str, Sequence[int]] = {  # of the AAL atlas, by the first digit of its codes
    "frontal": range(1, 29),
    "insula, limbic": range(29, 43),
    "occipital": range(43, 57),
    "parietal": range(57, 71),
    "deep nuclei": range(71, 79),
    "temporal": range(79, 91),
    "cerebellum": range(91, 117),
}
TASKS = {
    "aorta": Task("ct_thorax", "ct_thorax_aorta_seg", {"aorta": [1]}, axis=0, crop=(48, 48, 48), steps=150),
    "organs": Task("ct_abdomen", "ct_abdomen_seg", ORGANS, axis=0, crop=(16, 64, 64), steps=300, first_slice=82),
    "brain": Task("mr_brain_t1", "mr_brain_aal_seg", REGIONS, axis=2, crop=(48, 48, 32), steps=150, mirror=True),
}


def planes(volume: Volume, axis: int, first: int, stop: int) -> Volume:
    """Planes ``first`` to ``stop`` - 1 of a volume, where they lie in the patient."""
    data, start = volume.data.narrow(axis + 1, first, stop - first), [0, 0, 0]
    start[axis] = first
    return Volume(data, volume.grid.part(start, data.shape[1:]))


def parts(task: Task) -> tuple[Part, Part]:
    """What to train on and what to test on, prepared as the encoder was pre-trained: RAS, 2 mm, the 0.5th to the 99.5th
    percentile of the whole scan to [0, 1], CT and MR alike.
    """
    file, labels = (read_volume(ROOT / f"examples/data/{name}.nii.gz") for name in (task.scan, task.labels))
    if task.first_slice is not None:
        labels = Volume(labels.data, file.grid.part((task.first_slice, 0, 0), labels.size))
    scan = create_transform(ENCODER, whole=True)(file)
    labels = resample_like(labels, scan, interpolation="nearest")
    masks = label_channels(labels, list(task.classes.values()))
    # A voxel has one label: the largest of k times its mask is its class.
    numbers = torch.arange(1, len(task.classes) + 1).reshape(-1, 1, 1, 1)
    classes = masks.with_data((masks.data * numbers).amax(0, keepdim=True))

    labelled = (labels.data[0] > 0).movedim(task.axis, 0).flatten(1).any(1).nonzero()
    first, stop = int(labelled[0]), int(labelled[-1]) + 1
    middle = (first + stop) // 2
    train, test = (
        Part(planes(scan, task.axis, *cut), planes(classes, task.axis, *cut))
        for cut in ((first, middle - GAP), (middle + GAP, stop))
    )
    if task.mirror:
        test = Part(*(volume.with_data(volume.data.flip(task.axis + 1)) for volume in test))
    return train, test


def random_crop(
    scan: Tensor, labels: Tensor, size: Sequence[int], places: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A crop (1, *size) of a scan (1, D, H, W) and of its labels around a voxel of a class, each class as likely."""
    of_class = places[int(torch.randint(len(places), (), generator=generator))]
    voxel = of_class[int(torch.randint(len(of_class), (), generator=generator))].tolist()
    starts = [min(max(v - s // 2, 0), n - s) for v, s, n in zip(voxel, size, scan.shape[1:], strict=True)]
    inside = (slice(None), *(slice(start, start + s) for start, s in zip(starts, size, strict=True)))
    return scan[inside], labels[inside]


def fit(task: Task, train: Part, start: str, steps: int, batch: int, lr: float, seed: int) -> Any:
    """A UNETR trained for ``steps`` steps of Dice and cross-entropy; the crops depend on the seed alone."""
    torch.manual_seed(seed)
    model: Any = create_model(
        "unetr_vit_tiny_patch8_64", pretrained=STARTS[start], num_classes=len(task.classes) + 1, img_size=task.crop
    )
    model.label_names = ["background", *task.classes]
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=lr)
    schedule = cosine_schedule(optimizer, steps, warmup_epochs=steps / 10)
    scan, labels = train.scan.data, train.labels.data
    places = [(labels[0] == number).nonzero() for number in range(1, len(task.classes) + 1)]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        schedule.step(step + 0.5)  # the middle of the step: neither the first nor the last one has a rate of 0
        crops = [random_crop(scan, labels, task.crop, places, generator) for _ in range(batch)]
        x, target = (torch.stack(both) for both in zip(*crops, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        loss = dice_ce_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation if there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(name: str, dice: dict[str, list[list[float]]]) -> str:
    """Dice of every class (of each start: per seed, one number per class), and their mean."""
    lines = [f"{name:16}{''.join(f'{start:>18}' for start in dice)}"]
    for k, label in enumerate(TASKS[name].classes):
        cells = (spread([seed[k] for seed in seeds]) for seeds in dice.values())
        lines.append(f"  {label:14}{''.join(f'{cell:>18}' for cell in cells)}")
    means = (spread([statistics.mean(seed) for seed in seeds]) for seeds in dice.values())
    return "\n".join([*lines, f"  {'mean':14}{''.join(f'{cell:>18}' for cell in means)}"])


def draw(rows: dict[str, tuple[Volume, dict[str, Volume]]], path: Path) -> None:
    """A row per task, a column per label map, in the test part's plane with the most labelled voxels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(rows)), layout="constrained", dpi=80)
    panels = figure.subplots(len(rows), 1 + len(STARTS), squeeze=False)
    for row, (name, (scan, maps)) in zip(panels, rows.items(), strict=True):
        axis = TASKS[name].axis
        plane = int((maps["label"].data[0] > 0).movedim(axis, 0).flatten(1).sum(1).argmax())
        for axes, (heading, labels) in zip(row, maps.items(), strict=True):
            # Flipped left to right: the patient's right, or the front, is on the left as radiologists look at it.
            grey, colours = (v.data[0].select(axis, plane).flip(1).numpy() for v in (scan, labels))
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, origin="lower")
            shown = {"cmap": "tab10", "vmin": 1, "vmax": 10, "interpolation": "nearest"}
            axes.imshow(colours, alpha=0.5 * (colours > 0), origin="lower", **shown)
            axes.set(xticks=[], yticks=[], title=f"{name}: {heading}")
    figure.savefig(path)


@click.command()
@click.option("--task", "names", multiple=True, type=click.Choice(list(TASKS)), help="All three by default.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Repeat with seeds 0, 1, ...")
@click.option("--steps", type=click.IntRange(1), help="150, or 300 for the organs, by default.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Crops per step.")
@click.option("--lr", default=3e-3, show_default=True, help="Peak of the learning rate.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results.json and segmentation.png.")
def main(names: tuple[str, ...], seeds: int, steps: int | None, batch: int, lr: float, out: Path | None) -> None:
    """Train UNETRs from pre-trained and from random weights on one part of a scan, and score them on another."""
    begin = time.perf_counter()
    results: dict[str, Any] = {}
    pictures: dict[str, tuple[Volume, dict[str, Volume]]] = {}
    for name in names or TASKS:
        task = TASKS[name]
        train, (scan, labels) = parts(task)
        maps = {"label": labels}
        scores: dict[str, dict[str, list[Any]]] = {start: {"dice": [], "hd95_mm": []} for start in STARTS}
        for seed in range(seeds):
            for start in STARTS:
                model = fit(task, train, start, steps or task.steps, batch, lr, seed)
                found = segment_scan(model, scan, overlap=0.25, autocast=torch.bfloat16, progress=False).labels
                metrics = segmentation_metrics(found, labels, classes=len(task.classes) + 1)
                scores[start]["dice"].append(metrics.dice.tolist())
                # A class that was not found has no distance.
                scores[start]["hd95_mm"].append([v if math.isfinite(v) else None for v in metrics.hd95.tolist()])
                maps.setdefault(start, found)
        click.echo(table(name, {start: score["dice"] for start, score in scores.items()}))
        click.echo(f"  after {time.perf_counter() - begin:.0f} s")
        results[name] = {"classes": list(task.classes), "steps": steps or task.steps, **scores}
        pictures[name] = scan, maps
    seconds = round(time.perf_counter() - begin)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"batch": batch, "lr": lr, "seeds": seeds, "seconds": seconds}
        (out / "results.json").write_text(json.dumps({"settings": settings, "tasks": results}, indent=1) + "\n")
        draw(pictures, out / "segmentation.png")
        click.echo(f"{out}/results.json; segmentation.png: labels of the first seed, in one plane of each test part")


if __name__ == "__main__":
    main()
