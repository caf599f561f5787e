"""The projector of Gaussians: time, share of the machine's peak and accuracy, against projectors in plain torch.

    python benchmarks/project.py [--variant avx2 avx512] [--rounds 5] [--threads 1 2] [--quick]

One view of 256 x 256 pixels of 1.4 mm, source 1000 mm from the middle and 1500 mm from the detector, 10,000 Gaussians
with centres uniform within ±80 mm, scales s times a lognormal of 0.3, random rotations, support 4. Times are through
the public function with autograd. All ways take turns within a round; medians over rounds, ratios within each.

A pair is a (pixel, Gaussian) with the pixel in the Gaussian's support. A vector of pairs needs 28 instructions of
arithmetic forward (du 1, n 2, L 2, inverse root 5, exponent 2, exponential 13, sum 3) and 40 backward, counted on
paper before the kernels were written; so the bound is the measured peak of fused multiply-adds (2 FLOP each) over
2 x 28 and 2 x 68 FLOP a pair. The goals were set then, too: 40 % of the bound at s = 6 mm, torch by footprints 25 times
slower at 1.5 mm and 30 times at 6 mm, a parallel beam 3 times as fast as a cone at 6 mm.

The dense rival costs the same for every Gaussian: it is timed with a few and the time is scaled up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from project_rivals import dense, footprints, pairs
from renderer import Ways, best_variant, fma_peak, machine, take_turns
from torch import Tensor

from medgmae.ops import project
from medgmae.ops.projection import native, reference
from medgmae.ops.projection.inputs import ProjectInputs

RESULT = Path(__file__).parent / "results/project.json"
SIZE, SUPPORT, COUNT, FEW = (256, 256), 4.0, 10_000, 20
SCALES = (0.8, 1.5, 3.0, 6.0)
# Floating-point operations of a pair at the bound: instructions times 2.
FORWARD, BOTH = 2 * 28, 2 * 68


def gaussians(count: int, scale: float) -> list[Tensor]:
    """Random parameters that ask for gradients."""
    random = torch.Generator().manual_seed(0)
    means = (torch.rand(count, 3, generator=random) * 2 - 1) * 80
    scales = scale * (0.3 * torch.randn(count, 3, generator=random)).exp()
    quats, densities = torch.randn(count, 4, generator=random), 0.02 * torch.rand(count, generator=random)
    return [value.requires_grad_() for value in (means, scales, quats, densities)]


def view_of(beam: str) -> Tensor:
    """(1, 4, 3); a parallel beam's pixels are as large as the cone's in the middle."""
    pixel = 1.4 if beam == "cone" else 1.4 / 1.5
    first = [1000.0, 0, 0] if beam == "cone" else [-1.0, 0, 0]
    corner = [-500, -127.5 * pixel, 127.5 * pixel]
    return torch.tensor([[first, corner, [0, pixel, 0], [0, 0, -pixel]]], dtype=torch.float64)


def ours(parameters: Sequence[Tensor], beam: str, cotangent: Tensor | None, **options: Any) -> Callable[[], Tensor]:
    """The public function: forward alone, or with the gradients of all four tensors."""
    view = view_of(beam)

    def forward() -> Tensor:
        with torch.no_grad():
            return project(*parameters, view, SIZE, beam=beam, support=SUPPORT, **options)  # type: ignore[arg-type]

    def both() -> Any:
        image = project(*parameters, view, SIZE, beam=beam, support=SUPPORT, **options)  # type: ignore[arg-type]
        return torch.autograd.grad(image, parameters, cotangent)

    return forward if cotangent is None else both


def check(name: str, got: Tensor, expected: Tensor) -> None:
    """Stop where a rival does not compute the same thing. An edge pixel may be on either side."""
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise SystemExit(f"{name} differs from project by {error:.1e} of the largest value")


def check_gradients(name: str, run: Callable[..., Tensor], parameters: Sequence[Tensor], cotangent: Tensor) -> None:
    """Stop where a rival's gradients are others."""
    wanted = ours(parameters, "cone", cotangent[None])()
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    run(leaves, view_of("cone")[0], SIZE, SUPPORT, cotangent)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None
        error = float((leaf.grad - gradient).norm() / gradient.norm())
        if not error < 1e-2:
            raise SystemExit(f"a gradient of {name} differs from that of project by {error:.1e}")


def row_of(scale: float, threads: int, peak: float, options: argparse.Namespace) -> dict[str, Any]:
    """Ours, cone, affine and parallel, and both rivals in turns."""
    parameters, cotangent = gaussians(COUNT, scale), torch.rand(SIZE)
    few = [p[:FEW].detach().clone().requires_grad_() for p in parameters]
    cone = view_of("cone")
    rivals = {"footprints": (footprints, parameters, 1.0)}
    if threads == 1 and not options.quick:
        rivals["dense"] = (dense, few, COUNT / FEW)
    ways: Ways = {}
    for kind, c in (("forward", None), ("both", cotangent[None])):
        ways[f"cone, {kind}"] = ours(parameters, "cone", c)
        ways[f"parallel, {kind}"] = ours(parameters, "parallel", c)
        ways[f"affine, {kind}"] = ours(parameters, "cone", c, affine=True)
    for name, (run, some, _) in rivals.items():
        check(name, run(some, cone[0], SIZE, SUPPORT, None), ours(some, "cone", None)()[0])
        check_gradients(name, run, some, cotangent)
        for kind, c in (("forward", None), ("both", cotangent)):
            ways[f"{name}, {kind}"] = lambda run=run, some=some, c=c: run(some, cone[0], SIZE, SUPPORT, c)  # type: ignore[misc]
    times = take_turns(ways, options.rounds)
    visits = pairs(parameters, cone[0], SIZE, SUPPORT)
    row: dict[str, Any] = {"scale": scale, "threads": threads, "pairs": visits, "load": os.getloadavg()[0]}
    row["ms"] = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    row["best_ms"] = {name: 1e3 * min(values) for name, values in times.items()}
    for name, (_, _, factor) in rivals.items():
        for kind in ("forward", "both"):
            row["ms"][f"{name}, {kind}"] *= factor
            ratios = [factor * a / b for a, b in zip(times[f"{name}, {kind}"], times[f"cone, {kind}"], strict=True)]
            row[f"{name} over ours, {kind}"] = statistics.median(ratios)
    ratios = [a / b for a, b in zip(times["cone, both"], times["parallel, both"], strict=True)]
    row["cone over parallel, both"] = statistics.median(ratios)
    for kind, flop in (("forward", FORWARD), ("both", BOTH)):
        row[f"% of the bound, {kind}"] = 100 * visits * flop / (statistics.median(times[f"cone, {kind}"]) * peak * 1e9)
    return row


def accuracy() -> list[dict[str, Any]]:
    """Float32 against the reference in float64: largest error over the largest value, and relative L2 of gradients."""
    rows = []
    cotangent = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    for scale in SCALES:
        for beam in ("cone", "parallel"):
            parameters = [p.detach()[None] for p in gaussians(300, scale)]
            rest = (view_of(beam)[None], list(SIZE), 7.0, beam == "parallel", False)
            exact = ProjectInputs(*(p.double() for p in parameters), *rest)
            expected, wanted = reference.forward(exact), reference.backward(cotangent.double(), exact)
            inputs = ProjectInputs(*parameters, *rest)
            image, got = native.forward(inputs), native.backward(cotangent, inputs)
            errors = [float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]
            peak = float((image - expected).abs().max() / expected.max())
            rows.append({"scale": scale, "beam": beam, "forward": peak, "gradients": max(errors)})
    return rows


@contextlib.contextmanager
def forced(variant: str) -> Iterator[None]:
    """The CPU kernels of one instruction set, in the public function too."""
    run = native._C.project
    with mock.patch.object(native._C, "project", lambda *arguments: run(*arguments[:-1], variant)):
        yield


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that were promised."""
    found: dict[str, float] = {}
    by = {(row["scale"], row["threads"]): row for row in rows}
    for (scale, threads), row in by.items():
        if scale in (1.5, 6.0):
            goal = 25 if scale == 1.5 else 30
            found[f"footprints over ours, s={scale}, {threads} thread(s), goal {goal}"] = row[
                "footprints over ours, both"
            ]
            if "dense over ours, both" in row:
                found[f"dense over ours, s={scale}, goal 5000"] = row["dense over ours, both"]
        if scale == 1.5:
            found[f"ms, s=1.5, {threads} thread(s), goal 10"] = row["ms"]["cone, both"]
        if scale == 6.0:
            found[f"% of the bound, s=6, {threads} thread(s), goal 40"] = row["% of the bound, both"]
            found[f"cone over parallel, s=6, {threads} thread(s), goal 3"] = row["cone over parallel, both"]
        if threads == 2 and (scale, 1) in by:
            found[f"1 thread over 2, s={scale}, goal 1.8"] = by[scale, 1]["ms"]["cone, both"] / row["ms"]["cone, both"]
    return found


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", choices=("generic", "avx2", "avx512"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="without the dense rival")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for variant in options.variant or [best_variant()]:
        report: dict[str, Any] = {
            "machine": machine(variant),
            "rounds": options.rounds,
            "rows": [],
            "fma_peak_gflops": {},
        }
        with forced(variant):
            for threads in options.threads:
                torch.set_num_threads(threads)
                report["fma_peak_gflops"][threads] = peak = fma_peak(threads, variant)
                for scale in SCALES:
                    row = row_of(scale, threads, peak, options)
                    report["rows"].append(row)
                    print(variant, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            report["accuracy"] = accuracy()
        report["goals"] = goals(report["rows"])
        kept[variant] = report
        for name, value in report["goals"].items():
            print(f"{variant:7} {name:60} {value:10.3g}")
    options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
