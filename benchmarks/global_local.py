"""Does GL-MAE's pre-training live on real scans: its losses, what shows a collapse, and what its features are worth.

    OMP_NUM_THREADS=1 python benchmarks/global_local.py [--seeds 3] [--work build/global_local]
    python benchmarks/global_local.py --table   # of docs/training.md, from the results that there are

Held out is the right half of each of the three scans of examples/data; what is trained on, without labels, is the left
half. The halves meet at the midline and share no voxel, and both have all regions, which no other cut of three scans
of three parts of the body gives: with a scan held out, its regions would have no example. It is the same three people
on both sides, and a body is nearly its own mirror image: what is measured is whether the encoder tells parts of these
scans apart, and not how it would do in another patient.

The crops of 32 voxels of 2 mm and their labels are those of examples/anatomy_labels.py: the upper or lower half of
abdomen, chest or brain, six regions. Each right crop gets the vote of the five left crops whose pooled features have
the largest cosine with its own. Pooled are the class token, or the mean of the patches.

  untrained   the weights that GL-MAE begins with
  mae         recipe quick, the plain masked autoencoder of the same encoder
  glmae       recipe glmae_quick, teacher and student

Both recipes on crops of 32 voxels (local views of 16) in bfloat16, for STEPS updates, in the same seconds of one core.
A run of glmae is shorter than the recipe's 2000 updates: the teacher's momentum is the recipe's at the same share of
the run, the warm-up has the recipe's 100 updates. Runs that should collapse, in both precisions, end where the library
notices it. Results are written after every run, and the same command goes on where it was ended.

Bound on the effective rank of the teacher's features of 24 crops (0 to 23), set before the first run: above 2 in every
measurement of glmae after a fifth of the run, and above 3 at its end.

First runs, 300 updates at a learning rate of 1e-3: with a warm-up of 15 updates all scans had the same prototypes until
the centre had come near the teacher's mean, and the teacher of one seed of three ended with 3e-5 nats. With 100 updates
all lived, 0.12 to 0.14 nats, but the consistencies ended hardly below log 1024 = 6.93, the effective rank missed its
bound in two of three (2.9, 2.9, 3.3), and no encoder was better than the untrained one by more than seeds differ.
Single trials of 750 updates then ended at 6.4 and 6.6 nats and a rank of 4.1 with 3e-4, now that of the recipe.

Prediction for 3e-4 and 900 updates, written before. All four losses end below their highest value, the consistencies by
0.3 nats or more; rank above 3.5; the teacher's information above 0.1 nats. Accuracy by class token: untrained 0.53 as
it was, teacher 0.60, mae 0.52; by mean of patches teacher and mae 0.58. Runs without centring or at a temperature of 1
still end where the library notices; a rate of 0.1 too; a warm-up of 15 updates does no harm any more.

Outcome. All four losses of all seeds end below their highest, the reconstructions at a twelfth to a fifteenth, the
consistencies by 0.26 to 0.48 nats, and the bound held: rank 4.0 or more, 5.5 to 6.6 at the end, information 0.37 to
0.47 nats. Accuracy of regions by class token: teacher 0.55, untrained 0.53, mae 0.48 with one seed at 0.29; by mean of
patches: teacher 0.59, untrained 0.54, mae 0.51. All runs without centring, at a temperature of 1 and at a rate of 0.1
end after 180 updates, as foreseen; both with a warm-up of 15 updates live.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from renderer import cpu_name
from torch import Tensor
from torch.nn.functional import normalize

from medgmae import Volume, create_model, write_volume
from medgmae.data import PreparedScan, list_scans, open_prepared, prepare_scans
from medgmae.evaluation import knn_shares
from medgmae.training import Machine, Settings, TrainingError, pretrain, read_metrics, read_recipe

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from anatomy_labels import SOURCES, Anatomy, crops  # noqa: E402

RESULT = HERE / "results/global_local.json"
RECIPES = {"mae": "quick", "glmae": "glmae_quick"}
STEPS = {"mae": 3300, "glmae": 900}
SIZE, LOCAL = 32, 16  # voxels of a crop or global view, and of a local one
ENCODER, POOLINGS = "vit_tiny_patch8_64", {"token": "class token", "avg": "mean of patches"}
NEIGHBOURS = 5
HALVES = 2  # regions of a scan; they follow each other in the order of their names
BOUND = {"after": 0.2, "always": 2.0, "end": 3.0}  # of the effective rank
LOSSES = ("global_reconstruction", "local_reconstruction", "global_consistency", "local_consistency")
SPREAD = ("teacher_information", "effective_rank", "feature_variance", "prototypes_used")
COLLAPSING: dict[str, dict[str, Any]] = {
    "no centring": {"global_local.center_momentum": 1.0},
    "temperature of 1": {"global_local.teacher_temperature": 1.0},
    "learning rate 0.1": {"training.lr": 0.1},
    "warm-up of 15 updates": {"training.warmup_steps": 15, "training.seed": 2},
}


class Half(NamedTuple):
    """Crops (n, 1, 32, 32, 32) of one side of the scans, prepared, and the number of the region of each."""

    x: Tensor
    labels: list[int]


def write_halves(work: Path) -> None:
    """Both sides of each scan as files, in whole intensities, and the places and regions of their crops."""
    rng, places = np.random.default_rng(0), []  # as examples/anatomy_labels.py draws
    for source in SOURCES:
        anatomy = Anatomy(source, SIZE)
        scan, midline = anatomy.scan, anatomy.midline
        for side, part in {"left": slice(midline), "right": slice(midline, None)}.items():
            data = scan.data[..., part].round().contiguous()
            grid = scan.grid.part((0, 0, part.start or 0), data.shape[1:])
            (work / side).mkdir(parents=True, exist_ok=True)
            write_volume(Volume(data, grid), work / side / f"{source.scan}.nii.gz")
        for _, at in crops(anatomy, 3, rng):
            label = anatomy.labels(at)
            x = at[2] - (midline if label["side"] == "right" else 0)
            places.append({**label, "scan": source.scan, "at": [at[0], at[1], x]})
    (work / "places.json").write_text(json.dumps(places))


def halves(work: Path) -> tuple[dict[str, Half], list[str]]:
    """Crops of the left and of the right side, and the names of the regions."""
    if not (work / "places.json").exists():
        write_halves(work)
    places = json.loads((work / "places.json").read_text())
    regions, found = sorted({place["region"] for place in places}), {}
    for side in ("left", "right"):
        prepare_scans(list_scans([work / side]).scans, prepared(work, side), read_recipe("quick").input_block)
        scans: dict[str, PreparedScan] = {Path(s.source).name: s for s in open_prepared(prepared(work, side)).scans}
        own = [place for place in places if place["side"] == side]
        x = torch.stack([scans[f"{p['scan']}.nii.gz"].read(p["at"], [SIZE] * 3).float() for p in own])
        found[side] = Half(x, [regions.index(p["region"]) for p in own])
    return found, regions


def prepared(work: Path, side: str) -> Path:
    """Folder of the prepared scans of a side."""
    return work / f"prepared_{side}"


def settings_of(kind: str, seed: int, steps: int, changes: dict[str, Any]) -> Settings:
    """The recipe, on small crops and for as many steps as there is time for."""
    settings = read_recipe(RECIPES[kind])
    small: dict[str, Any] = {
        "model_options.img_size": SIZE,
        "crops.size": [SIZE] * 3,
        "held_out": 0.0,  # what is held out is in no file that the run sees
        "training.precision": "bf16",
        "training.seed": seed,
    }
    if settings.global_local is not None:
        shorter = (settings.training.steps or steps) / steps
        small["global_local.local_size"] = [LOCAL] * 3
        small["global_local.momentum"] = 1 - (1 - settings.global_local.momentum) * shorter
        small["training.warmup_steps"] = settings.training.warmup_steps  # what the centre needs is updates
    return settings.lasting(steps=steps).changed({**small, **changes})


def accuracy(weights: Any, half: dict[str, Half]) -> dict[str, float]:
    """Share of right crops whose region, and whose scan, the nearest left crops tell, by each way to pool.

    Args:
        weights: anything that an encoder can be filled with; a seed for those that a run begins with.
        half: the crops.
    """
    shares = {}
    for pool, word in POOLINGS.items():
        options: Any = {"img_size": SIZE, "global_pool": pool, "fc_norm": False}
        if isinstance(weights, int):
            torch.manual_seed(weights)
            first: Any = create_model(read_recipe(RECIPES["glmae"]).model, img_size=SIZE)
            encoder: Any = create_model(ENCODER, **options)
            encoder.load_state_dict(first.encoder.state_dict())
        else:
            encoder = create_model(ENCODER, pretrained=weights, **options)
        encoder.eval()
        with torch.inference_mode():
            pooled = {
                side: normalize(torch.cat([encoder.forward_head(encoder.forward_features(x), True) for x in part]))
                for side, part in ((side, one.x.split(32)) for side, one in half.items())
            }
        left, right = half["left"].labels, torch.tensor(half["right"].labels)
        votes = knn_shares(pooled["left"], left, pooled["right"], NEIGHBOURS).argmax(1)
        shares[f"region, {word}"] = float((votes == right).double().mean())
        shares[f"scan, {word}"] = float((votes // HALVES == right // HALVES).double().mean())
    return shares


def train(kind: str, seed: int, steps: int, out: Path, work: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A run, or what is left of one that was ended: its numbers, and what the library said of a collapse."""
    if (out / "numbers.json").exists():
        found: dict[str, Any] = json.loads((out / "numbers.json").read_text())
        return found
    shutil.rmtree(out, ignore_errors=True)
    settings = settings_of(kind, seed, steps, changes)
    machine = Machine(device="cpu", workers=0, checkpoint_every=steps // 20, picture_every=0, keep=1, progress=False)
    begin, said = time.process_time(), None
    try:
        pretrain(settings, [prepared(work, "left")], out, machine=machine)
    except TrainingError as error:
        said = str(error).replace(str(out), "RUN")
    seconds = time.process_time() - begin
    lines = read_metrics(out / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    names = [name for name in ("loss", *LOSSES) if name in losses[0]]
    numbers: dict[str, Any] = {
        "seed": settings.training.seed,
        "steps": lines[-1]["step"],
        "processor_seconds": round(seconds, 1),
        "losses": {name: course([line[name] for line in losses]) for name in names},
        "spread": {
            str(line["step"]): {name: float(f"{line[name]:.4g}") for name in SPREAD}
            for line in lines
            if "effective_rank" in line
        },
        "said": said,
    }
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of some 100 MB each
    (out / "numbers.json").write_text(json.dumps(numbers))
    return numbers


def course(values: Sequence[float]) -> dict[str, float]:
    """First, highest and last of a loss; each value is the mean of the updates since the one before."""
    return {"start": values[0], "highest": max(values), "end": values[-1]}


def settled(run: dict[str, Any], steps: int) -> list[dict[str, float]]:
    """What was measured after the share of the run from which the bound holds."""
    return [one for step, one in run["spread"].items() if int(step) >= BOUND["after"] * steps]


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Mean and range of the accuracies over the seeds, and whether the bound held."""
    accuracies: dict[str, Any] = {}
    for name, runs in results["accuracy"].items():
        for what in runs[0]:
            values = [run[what] for run in runs]
            about = {"mean": statistics.mean(values), "range": [min(values), max(values)]}
            accuracies.setdefault(name, {})[what] = about
    ranks = [[one["effective_rank"] for one in settled(run, STEPS["glmae"])] for run in results["runs"]["glmae"]]
    least, end = min(map(min, ranks)), min(values[-1] for values in ranks)
    told = [one["teacher_information"] for run in results["runs"]["glmae"] for one in settled(run, STEPS["glmae"])]
    return {
        "accuracy": accuracies,
        "effective_rank": {"bound": BOUND, "least": least, "least_at_end": end}
        | {"held": least > BOUND["always"] and end > BOUND["end"]},
        "least_teacher_information": min(told),
    }


def table(results: dict[str, Any]) -> str:
    """Accuracies as docs/training.md has them."""
    rows = results["summary"]["accuracy"]
    heads = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = (f"{one['mean']:.2f} ({one['range'][0]:.2f} to {one['range'][1]:.2f})" for one in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def facts(half: dict[str, Half], regions: Sequence[str]) -> dict[str, Any]:
    """Of the crops, and of the machine."""
    most = max(half["right"].labels.count(number) for number in range(len(regions)))
    return {
        "crops": {side: len(one.labels) for side, one in half.items()},
        "regions": list(regions),
        "largest_region": most / len(half["right"].labels),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        | {"instruction_set": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "accelerate", "timm")},
    }


def main() -> None:
    """Run what has not been run, and write results/global_local.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="repeat with seeds 0, 1, ...")
    parser.add_argument("--work", type=Path, default=Path("build/global_local"), help="scans and runs, to go on")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the results that there are as a table")
    options = parser.parse_args()
    if options.table:
        return print(table(json.loads(options.out.read_text())))
    torch.set_num_threads(1)
    work: Path = options.work
    half, regions = halves(work)
    results: dict[str, Any] = facts(half, regions)
    results |= {"runs": {kind: [] for kind in RECIPES}, "accuracy": {}, "collapsing": {}}

    def add(name: str, weights: Any) -> None:
        results["accuracy"].setdefault(name, []).append(accuracy(weights, half))

    for seed in range(options.seeds):
        add("untrained", seed)
        for kind in RECIPES:
            out = work / f"{kind}_{seed}"
            results["runs"][kind].append(train(kind, seed, STEPS[kind], out, work, {}))
            places = {"mae": out} if kind == "mae" else {"glmae teacher": out, "glmae student": out / "student"}
            for name, place in places.items():
                add(name, place)
        print(seed, json.dumps({name: found[-1] for name, found in results["accuracy"].items()}), flush=True)
        results["summary"] = summary(results)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, changes in COLLAPSING.items():
        for precision in ("bf16", "fp32"):
            out = work / f"{name} {precision}".replace(" ", "_")
            run = train("glmae", 0, STEPS["glmae"], out, work, {**changes, "training.precision": precision})
            results["collapsing"][f"{name}, {precision}"] = {"changes": changes, **run}
            print(name, precision, run["said"], flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
