"""Train a small masked autoencoder on a few scans: plain PyTorch on the library's models, about an hour on one core.

The demonstration weights that the project ships were made with this script and its defaults (see their card:
`medgmae info mae_vit_tiny_patch8_64.demo`). A second run resumes where the first one stopped.

    python examples/pretrain_mae.py --out build/pretrain --held-out mni152.nii.gz
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch
from evaluate_mae import DATA, load_scan, masked_psnr, windows
from torch import Tensor
from tqdm import tqdm

from medgmae import Masking, create_model, random_masking, save_pretrained
from medgmae.training import cosine_schedule, param_groups

SCANS = [DATA / f"{name}.nii.gz" for name in ("ct_abdomen", "ct_thorax", "mr_brain_t1")]


def random_crop(scan: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A cube (1, size, size, size) from a scan (1, D, H, W) in [0, 1], mirrored and of other contrast at random."""
    d, h, w = (int(torch.randint(n - size + 1, (), generator=generator)) for n in scan.shape[1:])
    crop = scan[:, d : d + size, h : h + size, w : w + size]
    mirror, gamma, gain, shift = torch.rand(4, generator=generator).tolist()
    if mirror < 0.5:
        crop = crop.flip(3)  # left and right: the other axes are not mirrored, a body has a top and a front
    return (crop.pow(2 ** (gamma - 0.5)) * (0.8 + 0.4 * gain) + 0.1 * (shift - 0.5)).clamp(0, 1)


def replicas_of(model: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """Copies that share the weights of ``model`` but have gradients of their own: one for each thread."""
    replicas = [copy.deepcopy(model) for _ in range(count)]
    for replica in replicas:
        for ours, theirs in zip(replica.parameters(), model.parameters(), strict=True):
            ours.data = theirs.data
    return replicas


def backward(replica: torch.nn.Module, x: Tensor, keep: Tensor, restore: Tensor, mask: Tensor) -> float:
    """Gradients of one share of a batch, left in the replica; the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = replica(x, Masking(keep, restore, mask)).loss
    loss.backward()
    return loss.item()


@click.command()
@click.argument("scans", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint and the model.")
@click.option("--model", "name", default="mae_vit_tiny_patch8_64", show_default=True)
@click.option("--held-out", type=click.Path(exists=True, path_type=Path), help="Scan to measure on, not trained on.")
@click.option("--steps", default=3700, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Crops per step, a multiple of the workers.")
@click.option("--lr", default=1e-3, show_default=True, help="Peak of the learning rate.")
@click.option(
    "--warmup", default=200, show_default=True, help="Steps up to the peak; half a cosine follows, down to 0."
)
@click.option("--every", default=250, show_default=True, help="Steps between checkpoints and measurements.")
@click.option("--workers", default=2, show_default=True, help="Threads that share the batch.")
@click.option("--seed", default=0, show_default=True)
def main(
    scans: tuple[Path, ...],
    out: Path,
    name: str,
    held_out: Path | None,
    steps: int,
    batch: int,
    lr: float,
    warmup: int,
    every: int,
    workers: int,
    seed: int,
) -> None:
    """Pre-train a masked autoencoder on SCANS (the three of examples/data unless others are named)."""
    if warmup >= steps:
        raise click.UsageError(f"--warmup ({warmup}) must be less than --steps ({steps})")
    torch.manual_seed(seed)
    model = create_model(name)
    size = model.encoder.img_size[0]
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=lr, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, steps, warmup)
    volumes = [load_scan(path) for path in scans or SCANS]
    test = windows(load_scan(held_out), size) if held_out else None

    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    out.mkdir(parents=True, exist_ok=True)

    replicas = replicas_of(model, workers)
    torch.set_num_threads(1)  # each worker is a thread; matrices this small gain nothing from more
    pool = ThreadPoolExecutor(workers)
    smooth, bar = math.nan, tqdm(range(first, steps), initial=first, total=steps, unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # so that a resumed run sees the same crops
        schedule.step(step + 0.5)  # the middle of the step: neither the first nor the last one has a rate of 0
        x = torch.stack(
            [random_crop(volumes[(step * batch + i) % len(volumes)], size, generator) for i in range(batch)]
        )
        masking = random_masking(batch, math.prod(model.encoder.grid_size), model.mask_ratio, generator=generator)
        shares = [part.chunk(workers) for part in (x, *masking)]
        loss = sum(pool.map(backward, replicas, *shares)) / workers
        for parameter, *partial in zip(model.parameters(), *(r.parameters() for r in replicas), strict=True):
            if parameter.requires_grad:
                parameter.grad = torch.stack([p.grad for p in partial]).mean(0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for replica in replicas:
            replica.zero_grad()

        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        bar.set_postfix(loss=f"{smooth:.4f}", psnr=f"{-10 * math.log10(smooth):.2f} dB")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint)
            save_pretrained(copy.deepcopy(model).half(), out)
            if test is not None:
                bar.write(f"step {step + 1}: held-out scan {masked_psnr(model, test, seed):.2f} dB")
    bar.close()
    pool.shutdown()


if __name__ == "__main__":
    main()
