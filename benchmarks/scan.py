"""The selective scan and the causal convolution: time, share of the machine's floors, accuracy and memory.

    python benchmarks/scan.py [--lengths 1000 16000] [--threads 1 2] [--rounds 5] [--quick] [--variant avx2]
    python benchmarks/scan.py --device cuda [--lengths 1000 16000 64000]
    python benchmarks/scan.py --table

One direction of a mixer of the 3D Mamba MAE: batch 1, 768 channels, 16 states, with z, D, delta_bias and softplus, in
float32. Times are through the public function, autograd included; "both" is forward and backward to all eight tensors.
All ways take turns within a round. The first call of a way is checked against ours and does not count, unless it takes
seconds: such a way is run once or twice in all. Medians over rounds; ratios within each.

Floors: FLOP over the measured peak of fused multiply-adds, bytes over the measured bandwidth (three tensors read, one
written). Per step and state a forward has 6 FLOP and an exponential, a backward 21 and an exponential; per step and
channel 8 more. An exponential counts as EXP_FLOP, what it costs without a table in float32. The peak is that of the
instruction set in use, which --variant chooses. "channels first" is ours on contiguous (B, D, L) streams.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from renderer import fma_peak, machine
from scan_checks import (
    CHANNELS,
    STATES,
    Way,
    accuracy,
    conv_inputs,
    force,
    leaves,
    memory,
    ours,
    scan_inputs,
    swapped,
    way,
)
from scan_rivals import MAMBA, OWN_REFERENCE, Rival, rivals
from torch import Tensor
from torch.nn import functional as F

import medgmae
from medgmae.ops import causal_conv1d

RESULT = Path(__file__).parent / "results/scan.json"
EXP_FLOP = 16
CHANNELS_FIRST = "ours, channels first"
SLOW = 2.0  # seconds: what takes longer is run once or twice


def seconds(run: Way, device: str) -> tuple[float, Any]:
    """Time of one call, and what it gives."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def take_turns(
    ways: dict[str, Way], rounds: int, device: str, check: Callable[[str, Any], None]
) -> dict[str, list[float]]:
    """Seconds of every way in every round. The first result of each goes to `check`."""
    times: dict[str, list[float]] = {}
    planned = {}
    for name, run in ways.items():
        once, result = seconds(run, device)
        check(name, result)
        del result
        times[name] = [once] if once > SLOW else []
        planned[name] = rounds if once <= SLOW else int(once <= 4 * SLOW)
    for number in range(rounds):
        for name, run in ways.items():
            if number < planned[name]:
                once = seconds(run, device)[0]
                # Short calls are repeated, and the best is taken: a shared machine interrupts.
                repeats = min(10, int(0.05 / max(once, 1e-6)))
                times[name].append(min([once, *(seconds(run, device)[0] for _ in range(repeats))]))
    return times


class Agreement:
    """Stops where a way does not compute what the first one does."""

    def __init__(self, bound: float = 1e-4) -> None:
        self.bound = bound
        self.first: list[Tensor] = []

    def __call__(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Compare, or keep the first. Channels and tokens may be the other way round."""
        self.first = self.first or [t.clone() for t in tensors]
        for number, (got, expected) in enumerate(zip(tensors, self.first, strict=True)):
            got = got if got.shape == expected.shape else got.transpose(1, 2)
            error = float((got - expected).abs().max() / expected.abs().max())
            if not error < self.bound:
                raise SystemExit(f"{name} differs from ours by {error:.1e} of the largest value, tensor {number}")


def channels_first(*tensors: Tensor) -> Tensor:
    """The public function on streams and matrices in mamba-ssm's own layout, contiguous (B, D, L) and (B, N, L)."""
    u, delta, A, B, C, D, z, bias = tensors
    out: Tensor = medgmae.ops.selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)
    return out


def scan_ways(length: int, device: str, both: bool) -> dict[str, Way]:
    """Ours and every rival that can run at this length."""
    tokens = [t.to(device) for t in scan_inputs(length)]
    grad = torch.randn(1, length, CHANNELS, generator=torch.Generator().manual_seed(1)).to(device)
    ways: dict[str, Way] = {}
    everyone = {"ours": Rival(lambda *tensors: ours(tensors), True)}
    everyone[CHANNELS_FIRST] = Rival(channels_first, False)
    everyone |= rivals(device)
    for name, rival in everyone.items():
        if both and length > rival.longest_backward:
            continue
        tensors = leaves(tokens if rival.tokens else swapped(tokens))
        cotangent = grad if rival.tokens else grad.transpose(1, 2).contiguous()
        ways[name] = way(rival.run, tensors, cotangent if both else None)
    return ways


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in ms, and how many times slower than ours the others are, round by round."""
    own = times["ours"]
    row: dict[str, Any] = {"ms": 1e3 * statistics.median(own), "best_ms": 1e3 * min(own), "others": {}}
    for name, values in times.items():
        if name != "ours":
            ratios = [t / own[min(i, len(own) - 1)] for i, t in enumerate(values)]
            row["others"][name] = {
                "ms": 1e3 * statistics.median(values),
                "times_slower": statistics.median(ratios),
                "rounds": len(values),
            }
    return row


def floors(length: int, both: bool, gflops: float, gbytes: float) -> dict[str, float]:
    """What the scan cannot beat, in ms: by arithmetic and by memory."""
    steps = length * CHANNELS
    flop = steps * STATES * (6 + EXP_FLOP) + 8 * steps
    moved = 16 * steps + 8 * length * STATES
    if both:
        flop += steps * STATES * (21 + EXP_FLOP) + 16 * steps
        moved += 28 * steps + 16 * length * STATES + math.ceil(length / 64) * CHANNELS * STATES * 8
    return {"flop_ms": 1e-6 * flop / gflops, "memory_ms": 1e-6 * moved / gbytes}


def bandwidth(device: str) -> float:
    """GB/s of three tensors read and one written, 192 MB each."""
    a, b, c, out = (torch.ones(48_000_000, device=device) for _ in range(4))
    best = min(seconds(lambda: torch.addcmul(a, b, c, out=out), device)[0] for _ in range(6))
    return 4 * 4e-9 * len(a) / best


def scans(threads: int | None, peaks: tuple[float, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The scan at every length, against its rivals and its floors."""
    rows = []
    for length in options.lengths:
        for both in (False, True):
            ways = scan_ways(length, options.device, both)
            if options.quick:
                ways = {name: run for name, run in ways.items() if name in ("ours", CHANNELS_FIRST, OWN_REFERENCE)}
            timing = summary(take_turns(ways, options.rounds, options.device, Agreement()))
            floor = floors(length, both, *peaks)
            row = {"length": length, "kind": "both" if both else "forward", "threads": threads, **timing, **floor}
            row |= {"percent_of_floor": 100 * max(floor.values()) / timing["ms"]}
            row |= {"giga_state_steps_per_s": 1e-6 * length * CHANNELS * STATES / timing["ms"]}
            rows.append(row)
            print_row(row, f"scan, L={length}, {row['kind']}")
    return rows


def conv_ways(length: int, device: str, both: bool) -> dict[str, Way]:
    """Ours on tokens; torch on its own layout, and torch on tokens, which a mixer has."""
    x, weight, bias = (t.to(device) for t in conv_inputs(length))
    grad = torch.randn(1, length, CHANNELS, generator=torch.Generator().manual_seed(1)).to(device)

    def by_channel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=CHANNELS))

    def on_tokens(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return by_channel(x.transpose(1, 2), weight, bias).transpose(1, 2).contiguous()

    def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    turned = x.transpose(1, 2).contiguous()
    cases = {
        "ours": (own, x, grad),
        "torch conv1d and silu, channels first": (by_channel, turned, grad.transpose(1, 2).contiguous()),
        "torch conv1d and silu, tokens first": (on_tokens, x, grad),
    }
    return {
        name: way(run, leaves([x, weight, bias]), cotangent if both else None)
        for name, (run, x, cotangent) in cases.items()
    }


def convolutions(threads: int | None, peaks: tuple[float, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The convolution at every length."""
    rows = []
    for length in options.lengths:
        for both in (False, True):
            ways = conv_ways(length, options.device, both)
            timing = summary(take_turns(ways, options.rounds, options.device, Agreement()))
            moved = 4e-9 * length * CHANNELS * (5 if both else 2)
            row = {"length": length, "kind": "both" if both else "forward", "threads": threads, **timing}
            row |= {"memory_ms": 1e3 * moved / peaks[1]}
            rows.append(row)
            print_row(row, f"convolution, L={length}, {row['kind']}")
    return rows


def mixers(threads: int | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A whole bidirectional mixer of the small model, 384 wide: what share of it the scans are."""
    torch.manual_seed(0)
    mixer = medgmae.Vim(16, 16, embed_dim=384, depth=1).blocks[0].mixer.to(options.device)
    rows = []
    for length in options.lengths:
        x = torch.randn(1, length, 384, device=options.device, requires_grad=True)
        grad = torch.randn_like(x)
        for both in (False, True):
            ways: dict[str, Way] = {
                "ours": way(mixer, [x], grad if both else None),
                "one of its two scans": scan_ways(length, options.device, both)["ours"],
            }
            timing = summary(take_turns(ways, options.rounds, options.device, lambda *_: None))
            row = {"length": length, "kind": "both" if both else "forward", "threads": threads, "ms": timing["ms"]}
            row["scans_percent"] = 200 * timing["others"]["one of its two scans"]["ms"] / timing["ms"]
            rows.append(row)
            print(
                f"mixer, L={length}, {row['kind']}: {row['ms']:.2f} ms, scans {row['scans_percent']:.0f} %", flush=True
            )
    return rows


def scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours with every number of threads, in turns."""

    def with_threads(threads: int, run: Way) -> Way:
        def call() -> Any:
            torch.set_num_threads(threads)
            return run()

        return call

    rows = []
    for length in options.lengths:
        for both in (False, True):
            run = scan_ways(length, options.device, both)["ours"]
            ways = {f"{threads}": with_threads(threads, run) for threads in options.threads}
            times = take_turns(ways, 2 * options.rounds, options.device, lambda *_: None)
            one = times[str(options.threads[0])]
            faster = {
                n: statistics.median(a / b for a, b in zip(one, values, strict=True)) for n, values in times.items()
            }
            row = {"length": length, "kind": "both" if both else "forward", "faster": faster}
            rows.append(row | {"ms": {name: 1e3 * statistics.median(values) for name, values in times.items()}})
            print(f"threads, L={length}, {row['kind']}: {faster}", flush=True)
    return rows


def print_row(row: dict[str, Any], title: str) -> None:
    """One case as a line, the others below."""
    share = f", {row['percent_of_floor']:.0f} % of the floor" if "percent_of_floor" in row else ""
    print(f"{title}: ours {row['ms']:.2f} ms{share}", flush=True)
    for name, other in row["others"].items():
        print(f"    {name:50} {other['ms']:10.1f} ms {other['times_slower']:8.1f} x", flush=True)


def repeatable(options: argparse.Namespace) -> bool:
    """Whether forward and backward give the same bits, run to run and with one, two and three threads."""
    run = scan_ways(options.lengths[0], options.device, True)["ours"]
    before, results = torch.get_num_threads(), []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(before)
    return all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All tables for one device."""
    report: dict[str, Any] = {
        "machine": machine(options.variant),
        "rounds": options.rounds,
        "channels": CHANNELS,
        "states": STATES,
    }
    report |= {"peaks": [], "scan": [], "convolution": [], "mixer": []}
    cuda = options.device == "cuda"
    if options.variant:
        force(options.variant)
    if cuda:
        report["machine"] |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for threads in [None] if cuda else options.threads:
        torch.set_num_threads(threads or 1)
        peaks = (math.inf if cuda else fma_peak(threads or 1, options.variant), bandwidth(options.device))
        report["peaks"].append({"threads": threads, "fma_gflops": None if cuda else peaks[0], "gb_per_s": peaks[1]})
        print(f"{options.device}, {threads} thread(s): {peaks[0]:.0f} GFLOP/s, {peaks[1]:.1f} GB/s", flush=True)
        report["scan"] += scans(threads, peaks, options)
        report["convolution"] += convolutions(threads, peaks, options)
        report["mixer"] += mixers(threads, options)
    report["scaling"] = [] if cuda else scaling(options)
    report["bitwise"] = repeatable(options)
    report["accuracy"] = [accuracy(length, options.device) for length in options.lengths]
    report["memory"] = [] if cuda else [memory(length, both, name) for length, both, name in memory_cases(options)]
    return report | {"goals": goals(report)}


def memory_cases(options: argparse.Namespace) -> list[tuple[int, bool, str]]:
    """Ours at every length; the others at the shortest, as theirs grows in proportion (or faster)."""
    cases = [(length, both, "ours") for length in options.lengths for both in (False, True)]
    if not options.quick:
        cases += [(options.lengths[0], False, name) for name in rivals("cpu")]
        cases += [
            (options.lengths[0], True, n) for n, r in rivals("cpu").items() if options.lengths[0] <= r.longest_backward
        ]
    return cases


def goals(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that were promised."""
    figures: dict[str, Any] = {}
    for row in report["scan"]:
        where = f"{row['threads']} thread(s)" if row["threads"] else "GPU"
        title = f"L={row['length']}, {row['kind']}, {where}"
        own = (OWN_REFERENCE, MAMBA, CHANNELS_FIRST)
        torch_only = {n: other for n, other in row["others"].items() if n not in own}
        if torch_only and row["threads"]:
            goal = {"forward": 80, "both": 40}[row["kind"]]
            best = min(other["times_slower"] for other in torch_only.values())
            figures[f"times faster than the best rival, {title}, goal {goal}"] = best
        if not row["threads"]:
            figures[f"multiple of the memory floor, {title}, goal 3"] = row["ms"] / row["memory_ms"]
        if MAMBA in row["others"]:
            figures[f"times faster than mamba-ssm, {title}, goal 1"] = row["others"][MAMBA]["times_slower"]
    for row in report["scaling"]:
        for threads, faster in row["faster"].items():
            if threads == "2":
                figures[f"two threads over one, L={row['length']}, {row['kind']}, goal 1.8"] = faster
    for row in report["accuracy"]:
        figures[f"largest error, L={row['length']}, goal 1e-6"] = max(row["ours"].values())
    for row in report["memory"]:
        if row["who"] == "ours":
            kind = "both" if row["both"] else "forward"
            figures[f"extra memory over inputs and outputs, L={row['length']}, {kind}, goal 1"] = row[
                "extra_over_tensors"
            ]
    return figures | {"same bits on every run and number of threads": report["bitwise"]}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 16000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--variant", default="", help="CPU instruction set: generic, avx2 or avx512; the best by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="no rivals, only the torch reference of this library")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed results as Markdown, measure nothing")
    options = parser.parse_args()
    if options.table:
        from scan_table import table

        return table(options.out)
    report = measure(options)
    for name, value in report["goals"].items():
        print(f"{name:80} {value if isinstance(value, bool) else format(value, '10.3g')}")
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(
        json.dumps(kept | {" ".join(filter(None, (options.device, options.variant))): report}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
