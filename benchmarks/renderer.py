"""The Gaussian renderer: time, share of the machine's peak, accuracy and memory, against renderers in plain torch.

    python benchmarks/renderer.py [--variant avx2 avx512] [--rounds 5] [--threads 1 2] [--compile] [--quick]
    python benchmarks/renderer.py --device cuda

The CPU kernels are those of the processor's best instruction set, or of each that --variant names, which is held
against its own bound; what torch itself uses stays. The results of each are kept under its name.

A pair is a (voxel, Gaussian) with the voxel in the Gaussian's box, counted exactly. The bound is the fp32 peak of the
machine with that instruction set, measured in the same run, over what one pair needs: 2 fused multiply-adds forward
(the recurrence and the sum), 4 backward, 6 both; a fused multiply-add is 2 of the peak's FLOP, so peak / 4, / 8 and
/ 12. Times are through the public function, autograd and the chain rule to scales and quaternions included. All ways
take turns within a round; medians over rounds, ratios within each. Parameters: centres uniform, scales s times a
lognormal of 0.3, random rotations.

Dense torch renderers cost the same for every Gaussian: they are timed with a few and the time is scaled up, which the
results say ("gaussians_timed"). torch.compile takes half a minute to compile, which is not timed; --compile asks for
it. The committed results were measured with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 in the
environment, so that glibc keeps freed memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from renderer_checks import SCALES, SIZE, accuracy, gaussians, memory
from renderer_rivals import rivals
from torch import Tensor

from medgmae.ops import native_info, voxelize
from medgmae.ops.voxel import levels as _voxelize_levels
from medgmae.ops.voxel import native, reference

HERE = Path(__file__).parent
RESULT = HERE / "results/renderer.json"
Ways = dict[str, Callable[[], Any]]


def pairs(parameters: Sequence[Tensor], size: Sequence[int]) -> int:
    """Exact number of (voxel, Gaussian) pairs of the box support."""
    first, last = reference.box_bounds(parameters[0].detach(), parameters[1].detach(), size)
    return int((last - first + 1).clamp(min=0).prod(-1).sum())


# As setup.py compiles the kernels.
FLAGS = {"generic": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]}


def best_variant() -> str:
    """The instruction set that the kernels choose here."""
    return native_info().get("cpu_variant") or "generic"


def fma_peak(threads: int, variant: str = "") -> float:
    """Fp32 GFLOP/s of so many threads at once, each doing nothing but fused multiply-adds.

    They are those of an instruction set, "" for the best. One that has none multiplies and adds, which counts the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "fma_peak.so")
        compiler = os.environ.get("CC", "cc")
        command = [
            compiler,
            "-O3",
            *FLAGS[variant or best_variant()],
            "-shared",
            "-fPIC",
            "-o",
            library,
            str(HERE / "fma_peak.c"),
        ]
        subprocess.run(command, check=True)
        run = ctypes.CDLL(library).fma_peak
    run.restype, run.argtypes = ctypes.c_double, (ctypes.c_long, ctypes.c_int, ctypes.c_void_p)
    rates: list[float] = []

    def work() -> None:
        rates.append(run(4_000_000, 12, ctypes.addressof(ctypes.c_float())))  # ctypes lets go of the interpreter

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, after one call of each that does not count."""
    for run in ways.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            # Short calls are repeated, and the best is taken: a shared machine interrupts.
            once = seconds(run)
            repeats = min(10, int(0.05 / max(once, 1e-6)))
            times[name].append(min([once, *(seconds(run) for _ in range(repeats))]))
    return times


def ours(
    parameters: Sequence[Tensor], size: Sequence[int], cotangent: Tensor | None, **options: Any
) -> Callable[[], Any]:
    """The public function: forward alone, or with the gradients of all four tensors."""

    def forward() -> Tensor:
        with torch.no_grad():
            return voxelize(*parameters, size, **options)

    def both() -> Any:
        return torch.autograd.grad(voxelize(*parameters, size, **options), parameters, cotangent)

    return forward if cotangent is None else both


def rate(times: list[float], count: int, peak: float, flop: int) -> dict[str, float]:
    """Median time in ms, pairs per second, and the share of the bound."""
    median = statistics.median(times)
    gpairs = count / median / 1e9
    return {
        "ms": 1e3 * median,
        "best_ms": 1e3 * min(times),
        "gpairs_per_s": gpairs,
        "percent_of_fma_bound": 100 * gpairs / (peak / flop),
    }


def check(name: str, got: Tensor, expected: Tensor) -> None:
    """Stop where a rival does not compute the same thing."""
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise SystemExit(f"{name} differs from voxelize by {error:.1e} of the largest value")


def against_rivals(scale: float, threads: int, peak: float, options: argparse.Namespace) -> dict[str, Any]:
    """512 Gaussians in 96 voxels a side: ours and every rival in turns, forward and forward + backward."""
    count = 512
    parameters, cotangent = gaussians(count, scale), torch.rand(1, 1, *SIZE)
    ways: Ways = {
        "ours, forward": ours(parameters, SIZE, None, support="box"),
        "ours, both": ours(parameters, SIZE, cotangent, support="box"),
    }
    factor: dict[str, float] = {}
    for name, (run, few) in rivals(options.compile).items():
        some = [p[:, :few].detach().clone().requires_grad_() for p in parameters] if few else parameters
        check(name, run(some, SIZE, None), ours(some, SIZE, None, support="box")())
        ways[f"{name}, forward"] = lambda run=run, some=some: run(some, SIZE, None)  # type: ignore[misc]
        ways[f"{name}, both"] = lambda run=run, some=some: run(some, SIZE, cotangent)  # type: ignore[misc]
        factor[name] = count / few if few else 1
    times = take_turns(ways, options.rounds)
    visits = pairs(parameters, SIZE)
    row: dict[str, Any] = {"scale": scale, "threads": threads, "gaussians": count, "size": SIZE, "pairs": visits}
    for kind, flop in (("forward", 4), ("both", 12)):
        own = times[f"ours, {kind}"]
        row[kind] = rate(own, visits, peak, flop)
        row[f"rivals_{kind}"] = {
            name: {
                "ms": 1e3 * scaled * statistics.median(times[f"{name}, {kind}"]),
                "times_slower": scaled
                * statistics.median(t / o for t, o in zip(times[f"{name}, {kind}"], own, strict=True)),
                "gaussians_timed": round(count / scaled),
            }
            for name, scaled in factor.items()
        }
    return row


def grid(threads: int, peak: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours alone over numbers of Gaussians and sizes."""
    rows = []
    for side in options.sides:
        for count in options.counts:
            for scale in SCALES:
                parameters, size = gaussians(count, scale), (side,) * 3
                cotangent, visits = torch.rand(1, 1, *size), pairs(parameters, size)
                ways = {
                    kind: ours(parameters, size, c, support="box")
                    for kind, c in (("forward", None), ("both", cotangent))
                }
                times = take_turns(ways, options.rounds)
                row = {"scale": scale, "gaussians": count, "size": size, "threads": threads, "pairs": visits}
                flops = {"forward": 4, "both": 12}
                rows.append(row | {kind: rate(times[kind], visits, peak, flops[kind]) for kind in ways})
    return rows


def direct(parameters: Sequence[Tensor], size: Sequence[int], cotangent: Tensor | None) -> Callable[[], Any]:
    """The same untruncated rendering without coarse lattices: every Gaussian at every voxel."""
    run = ours(parameters, size, cotangent, support=None)

    def fine() -> Any:
        with mock.patch.object(_voxelize_levels, "strides", return_value=()):
            return run()

    return fine


def supports(threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each support costs, the untruncated one against its direct kernel, and a quarter of the patches."""
    rows = []
    patches = torch.randperm(216, generator=torch.Generator().manual_seed(0))[None, :54]
    for scale in SCALES:
        parameters, cotangent = gaussians(512, scale), torch.rand(1, 1, *SIZE)
        choices: dict[str, Any] = {"box": "box", "3 sigma": 3.0, "4 sigma": 4.0, "everywhere": None}
        ways: Ways = {}
        for kind, c in (("forward", None), ("both", cotangent)):
            ways |= {f"{name}, {kind}": ours(parameters, SIZE, c, support=s) for name, s in choices.items()}
            ways[f"everywhere, direct kernel, {kind}"] = direct(parameters, SIZE, c)
            part = None if c is None else torch.rand(1, 54, 4096)
            for name in ("box", "4 sigma"):
                ways[f"{name}, 25 % of the patches, {kind}"] = ours(
                    parameters, SIZE, part, support=choices[name], patches=patches, patch_size=16
                )
        check("the direct kernel", direct(parameters, SIZE, None)(), ours(parameters, SIZE, None, support=None)())
        times = take_turns(ways, options.rounds)
        ratio = [
            a / b for a, b in zip(times["everywhere, direct kernel, both"], times["everywhere, both"], strict=True)
        ]
        medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        rows.append(
            {"scale": scale, "threads": threads, "ms": medians, "direct_over_everywhere": statistics.median(ratio)}
        )
    return rows


def cpu_name() -> str:
    """The processor as the kernel names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@contextlib.contextmanager
def forced(variant: str) -> Iterator[None]:
    """The CPU kernels of one instruction set, in the public functions too."""

    def fixed(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: run(*arguments[:-1], variant)

    module = native._C
    names = {"voxelize": fixed(module.voxelize), "banded": fixed(module.banded)}
    with contextlib.ExitStack() as stack:
        for name, run in names.items():
            stack.enter_context(mock.patch.object(module, name, run))
        yield


def machine(variant: str = "") -> dict[str, Any]:
    """Where this runs, and with what."""
    info = native_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "variant": variant or info.get("cpu_variant"),
        "compiler": info.get("compiler"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def on_cpu(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """All tables, with the kernels of one instruction set."""
    report: dict[str, Any] = {"machine": machine(variant), "rounds": options.rounds}
    report |= {"fma_peak_gflops": {}, "rivals": []}
    report |= {"grid": [], "supports": [], "accuracy": accuracy()}
    for threads in options.threads:
        torch.set_num_threads(threads)
        peak = fma_peak(threads, variant)
        report["fma_peak_gflops"][threads] = peak
        print(f"{variant}, {threads} thread(s), fp32 peak {peak:.0f} GFLOP/s", flush=True)
        for scale in SCALES:
            row = against_rivals(scale, threads, peak, options)
            report["rivals"].append(row)
            print_row(row)
        if not options.quick:
            report["grid"] += grid(threads, peak, options)
            report["supports"] += supports(threads, options)
    if variant == best_variant():  # a fresh process is not forced to another
        report["memory"] = [memory(n, s, 1) for n in (512, 4096) for s in ("box", None)]
    return report | {"goals": goals(report)}


def print_row(row: dict[str, Any]) -> None:
    """One case as a line, its rivals below."""
    print(f"s={row['scale']} N={row['gaussians']} {row['pairs'] / 1e6:.2f} M pairs", flush=True)
    for kind in ("forward", "both"):
        own = row[kind]
        speed = f"{own['gpairs_per_s']:7.2f} Gpairs/s {own['percent_of_fma_bound']:5.1f} %"
        print(f"  ours, {kind:8} {own['ms']:9.2f} ms {speed}")
        for name, rival in row[f"rivals_{kind}"].items():
            print(f"    {name:50} {rival['ms']:10.1f} ms {rival['times_slower']:8.1f} x", flush=True)


def goals(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that were promised, and whether they are met."""
    rows = {(row["scale"], row["threads"]): row for row in report["rivals"]}
    figures: dict[str, Any] = {}
    for (scale, threads), row in rows.items():
        slower = {name: rival["times_slower"] for name, rival in row["rivals_both"].items()}
        figures[f"times faster than the best torch, s={scale}, {threads} thread(s), goal 100"] = min(slower.values())
        if scale == 0.1:
            name = f"times faster than textbook dense, s=0.1, {threads} thread(s), goal 5000"
            figures[name] = slower["torch, textbook dense"]
        if scale == 0.2:
            figures[f"% of the FMA bound, s=0.2, {threads} thread(s), goal 45"] = row["both"]["percent_of_fma_bound"]
        if threads == 2 and (scale, 1) in rows and scale >= 0.1:
            one = rows[scale, 1]["both"]["ms"]
            figures[f"2 threads over 1, s={scale}, goal 1.8"] = one / row["both"]["ms"]
    for row in report["supports"]:
        if row["scale"] == 0.2:
            name = f"direct over multi-resolution, s=0.2, {row['threads']} thread(s), goal 5"
            figures[name] = row["direct_over_everywhere"]
    figures["largest forward error, goal 2e-6"] = max(row["forward"] for row in report["accuracy"])
    figures["largest gradient error, goal 1e-5"] = max(max(row["gradients"].values()) for row in report["accuracy"])
    return figures


def table(path: Path) -> None:
    """The results as Markdown, for docs/renderer.md."""
    reports = json.loads(path.read_text())["cpu"]
    names = list(next(iter(reports.values()))["rivals"][0]["rivals_both"])
    print("| | s | threads | pairs | forward, ms | both, ms | % of the FMA bound | " + " | ".join(names) + " |")
    print("|---|" + "---|" * (len(names) + 6))
    for variant, report in reports.items():
        for row in report["rivals"]:
            own = [variant, row["scale"], row["threads"], f"{row['pairs'] / 1e6:.1f} M"]
            own += [f"{row['forward']['ms']:.2f}", f"{row['both']['ms']:.2f}"]
            own += [f"{row['both']['percent_of_fma_bound']:.0f}"]
            slower = [f"{row['rivals_both'][name]['times_slower']:.0f} ×" for name in names]
            print("| " + " | ".join(map(str, own + slower)) + " |")
        for row in report["supports"]:
            times = ", ".join(f"{name}: {ms:.2f}" for name, ms in row["ms"].items() if name.endswith("both"))
            print(f"\n{variant}, s = {row['scale']}, {row['threads']} thread(s), ms: {times}")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variant", nargs="+", choices=FLAGS, help="instruction sets; the best one if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=[128, 512, 4096])
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--compile", action="store_true", help="torch.compile among the rivals")
    parser.add_argument("--quick", action="store_true", help="only the comparison with the rivals")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed results as Markdown, measure nothing")
    options = parser.parse_args()
    if options.table:
        return table(options.out)
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.device == "cuda":
        from renderer_cuda import on_cuda

        reports = {"cuda": on_cuda(options.rounds, HERE)}
        kept |= reports
    else:
        reports = {}
        for variant in options.variant or [best_variant()]:
            with forced(variant):
                reports[variant] = on_cpu(variant, options)
        kept["cpu"] = kept.get("cpu", {}) | reports
    for where, report in reports.items():
        for name, value in report["goals"].items():
            print(f"{where:7} {name:70} {value:10.3g}")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
