"""Time and memory of loading a full-size ViT-L/16 (256 voxels per axis), against the usual torch.load.

    python benchmarks/load.py [--folder DIR] [--repeats 5] [--cold]

Two files with the same random encoder are made in DIR (2.7 GB): the layout of an official pre-training checkpoint,
``{"model": state of the whole masked autoencoder, "optimizer": {} (left empty), "epoch", "scaler", "args":
Namespace}``, and the folder that ``save_pretrained`` writes. Each measurement is a fresh process; the ways take turns;
medians are reported. Memory is the peak resident size (VmHWM) above that of a process that only imports. Loading maps
the file, so the time until every parameter was read once is given beside the time to load. ``--cold`` drops the files
from the page cache before each measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import medgmae

NAME = "vit_large_patch16_256"
RESULTS = Path(__file__).parent / "results" / "load.json"
Load = Callable[[Path], "nn.Module | dict[str, Tensor]"]


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of our masked autoencoder under the names and shapes of the official file."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder."):
            name = name.removeprefix("encoder.")
        elif name != "decoder.mask_token":
            name = name.replace("decoder.", "decoder_", 1).replace("decoder_head.", "decoder_pred.0.")
        state[name.replace("decoder.mask_token", "mask_token")] = tensor
    del state["decoder_prefix_pos_embed"]
    for table in ("pos_embed", "decoder_pos_embed"):
        state[table] = torch.cat([torch.zeros_like(state[table][:, :1]), state[table]], 1)
    return state


def prepare(folder: Path) -> dict[str, Path]:
    """Write the files unless they are there."""
    official, ours = folder / "checkpoint-399.pth", folder / "ours"
    if not (ours / "model.safetensors").is_file() or not official.is_file():
        torch.manual_seed(0)
        mae: Any = medgmae.create_model(f"mae_{NAME}")
        content = {"model": official_state(mae), "optimizer": {}, "epoch": 399, "scaler": {"scale": 65536.0}}
        torch.save({**content, "args": argparse.Namespace(model="mae_vit_large_patch16", lr=1e-4)}, official)
        encoder: Any = medgmae.create_model(NAME)
        encoder.load_state_dict(mae.encoder.state_dict())
        medgmae.save_pretrained(encoder, ours)
    return {"official": official, "ours": ours / "model.safetensors"}


def by_hand(path: Path) -> nn.Module:
    """What a user writes today: build, read everything, pick out the encoder, fill."""
    model = medgmae.ViT(256, 16, embed_dim=1024, depth=24, num_heads=16)
    state = torch.load(path, map_location="cpu", weights_only=False)["model"]
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    model.load_state_dict(state)
    return model


WAYS: dict[str, tuple[str, Load]] = {
    "import only": ("official", lambda path: {}),
    "torch.load": ("official", lambda path: torch.load(path, map_location="cpu", weights_only=False)["model"]),
    "build, torch.load, load_state_dict": ("official", by_hand),
    "create_model, official file": ("official", lambda path: medgmae.create_model(NAME, pretrained=str(path))),
    "create_model, our file": ("ours", lambda path: medgmae.create_model(NAME, pretrained=str(path))),
}


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(way: str, path: Path) -> None:
    """One measurement, printed as JSON; runs in its own process."""
    _ = medgmae.create_model, medgmae.ViT  # public names are imported on first use: that is not what is timed
    import safetensors  # noqa: F401

    begin = time.perf_counter()
    loaded = WAYS[way][1](path)
    load = time.perf_counter() - begin
    peak_load = peak()
    tensors = loaded if isinstance(loaded, dict) else loaded.state_dict()
    for tensor in tensors.values():
        tensor.sum().item()
    touched, peak_touched = time.perf_counter() - begin, peak()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    row = {"load": load, "touched": touched, "peak_load": peak_load, "peak_touched": peak_touched}
    print(json.dumps({**row, "sha256": digest.hexdigest()}))


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget a file, so that it comes from disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def run_all(files: dict[str, Path], repeats: int, cold: bool) -> dict[str, dict[str, Any]]:
    """Medians per way, the ways taking turns."""
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(repeats + (not cold)):
        for way, (kind, _) in WAYS.items():
            if cold:
                drop_from_cache(files[kind])
            command = [sys.executable, __file__, "--way", way, "--path", str(files[kind])]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if cold or turn:  # the first warm turn only fills the page cache
                rows[way].append(row)
    keys = ("load", "touched", "peak_load", "peak_touched")
    medians = {way: {key: statistics.median(r[key] for r in runs) for key in keys} for way, runs in rows.items()}
    base = medians.pop("import only")
    for way, row in medians.items():
        row["peak_load"] -= base["peak_load"]
        row["peak_touched"] -= base["peak_touched"]
        row["file_bytes"] = files[WAYS[way][0]].stat().st_size
        row["sha256"] = rows[way][0]["sha256"]
    equal = {row["sha256"] for way, row in medians.items() if way != "torch.load"}
    if len(equal) != 1:
        raise SystemExit("the ways do not give the same parameters")
    return medians


def report(medians: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table; the figures that the promises are about."""
    print(f"{'':36}{'load s':>9}{'+ read all s':>14}{'peak / file':>13}{'peak GB':>9}")
    for way, row in medians.items():
        ratio = row["peak_touched"] / row["file_bytes"]
        print(f"{way:36}{row['load']:9.3f}{row['touched']:14.3f}{ratio:13.2f}{row['peak_touched'] / 1e9:9.2f}")
    plain, hand = medians["torch.load"], medians["build, torch.load, load_state_dict"]
    figures: dict[str, float] = {}
    for way in ("create_model, official file", "create_model, our file"):
        row = medians[way]
        figures[f"{way}: times faster than torch.load"] = plain["load"] / row["load"]
        figures[f"{way}: times faster than torch.load, all read"] = plain["touched"] / row["touched"]
        figures[f"{way}: times faster than by hand"] = hand["load"] / row["load"]
        figures[f"{way}: times faster than by hand, all read"] = hand["touched"] / row["touched"]
        figures[f"{way}: peak over file size, all read"] = row["peak_touched"] / row["file_bytes"]
    for name, value in figures.items():
        print(f"{name:66}{value:8.2f}")
    return figures


def main() -> None:
    """Parse the command line, measure, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "medgmae-bench-load")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.path)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    files = prepare(args.folder)
    medians = run_all(files, args.repeats, args.cold)
    figures = report(medians)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    machine = {"machine": platform.platform(), "cpus": os.cpu_count(), "torch": torch.__version__}
    kept["cold page cache" if args.cold else "warm page cache"] = {
        **machine, "repeats": args.repeats, "medians": medians, "figures": figures,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
