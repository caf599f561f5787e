"""What features of one scan cost with each published encoder: seconds and memory on one core.

Each encoder runs in a process of its own with one thread, on what its card's input cuts out of an example scan (the
chest CT, or the brain MR if the weights are of MR alone), which is one window for all of them but VoxelFM, which reads
whole scans (this one in four windows); of a scan that has more windows, the cost is this many times higher. Weights are
random where they are not shipped: the cost does not depend on them. One pass, without a warm-up.

Seconds are those of the processor, which other programs on the machine lengthen little; those on the clock are beside
them. Memory is the most that the process held, beside it what it held before the model was built (python, torch and the
prepared scan); the difference is the model's.

results/encoders.json has the run, with the load of the machine, which other work shared.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py [--only TAG ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import medgmae

HERE = Path(__file__).parent
SCANS = HERE.parent / "examples/data"
TAGS = (
    "vit_tiny_patch8_64.demo",
    "vit_base_patch16_96.glmae",
    "vit_large_patch16_112.3dino",
    "seqvit_base_patch16_128.bmmae",
    "vim_small_patch16_160.mamba_mae",
    "vit_wide_patch12_96.hiendmae",
    "vit_base_patch14_112.voxelfm",
    "vit_base_patch4x16x16_32x256x256.segvol",
    "vit_base_patch4x16x16_32x256x256.m3dclip",
    "vit_large_patch16_256.tangerine",
    "primus_m_patch8_160.openmind_mae",
    "primus_m_patch8_192.colipri",
)


def measure(tag: str) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    card = medgmae.weight_card(tag)
    modalities = (card.trained_on or {"modalities": ["CT"]})["modalities"]
    scan = SCANS / ("mr_brain_t1.nii.gz" if "CT" not in modalities else "ct_thorax.nii.gz")
    channels = (card.input or {}).get("channels", 1)
    start = time.process_time()
    volume = medgmae.read_volume(scan)
    if channels > 1:
        volume = medgmae.data.stack_channels([volume] * channels)
    volume = medgmae.create_transform(tag)(volume)
    prepared = time.process_time()
    before = peak_bytes()
    model = medgmae.create_model(tag, pretrained=card.availability == "package").eval()
    begin, begun = time.process_time(), time.perf_counter()
    features = medgmae.extract_features(model, volume, overlap=0.0, progress=False)
    seconds, passed = time.process_time() - begin, time.perf_counter() - begun
    return {
        "tag": tag,
        "scan": scan.name,
        "input": [channels, *volume.size],
        "tokens": features.map.data[0].numel(),
        "width": features.map.data.shape[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_to_prepare": round(prepared - start, 2),
        "seconds": round(seconds, 2),
        "seconds_on_the_clock": round(passed, 2),
        "peak_bytes": peak_bytes(),
        "peak_bytes_before_the_model": before,
        "load": round(os.getloadavg()[0], 1),
    }


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints a table and writes results/encoders.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=TAGS, help="these encoders")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--out", type=Path, default=HERE / "results/encoders.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    machine = {"instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": 1}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "medgmae": medgmae.__version__}
    rows: list[dict[str, Any]] = []
    for tag in options.only:
        command = [sys.executable, __file__, "--one", tag]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows.append(json.loads(done.stdout))
        row = rows[-1]
        gigabytes = row["peak_bytes"] / 1e9
        print(f"{tag:42} {row['tokens']:6} tokens {row['seconds']:8.1f} s {gigabytes:6.2f} GB", flush=True)
        report = {"encoders": rows, "machine": machine, "versions": versions, "passes": 1}
        options.out.write_text(json.dumps(report, indent=1) + "\n")  # after each: the last ones take minutes


if __name__ == "__main__":
    main()
