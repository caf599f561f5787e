"""The results of scan.py as Markdown, for docs/scan.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(head: list[str], rows: list[list[Any]]) -> None:
    """Print one table."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def against(rows: list[dict[str, Any]]) -> None:
    """Ours in ms, the others in multiples of it."""
    names = list(dict.fromkeys(name for row in rows for name in row["others"]))
    floor = "percent_of_floor" in rows[0]
    head = ["L", "threads", "what", "ours, ms", *(["share of the floor"] if floor else []), *names]
    table = []
    for row in rows:
        cells = [row["length"], row["threads"], row["kind"], f"{row['ms']:.2f}"]
        cells += [f"{row['percent_of_floor']:.0f} %"] if floor else []
        others = (row["others"].get(name) for name in names)
        table.append([*cells, *("-" if other is None else f"{other['times_slower']:.1f} ×" for other in others)])
    lines(head, table)


def table(path: Path) -> None:
    """Everything that docs/scan.md quotes."""
    for device, report in json.loads(path.read_text()).items():
        print(f"## {device}: {report['machine']}\n")
        lines(["threads", "GFLOP/s", "GB/s"], [[p["threads"], p["fma_gflops"], p["gb_per_s"]] for p in report["peaks"]])
        against(report["scan"])
        against(report["convolution"])
        mixer = [[m["length"], m["threads"], m["kind"], f"{m['ms']:.2f}", f"{m['scans_percent']:.0f} %"]
                 for m in report["mixer"]]  # fmt: skip
        lines(["L", "threads", "what", "mixer, ms", "of it scans"], mixer)
        threads = [[r["length"], r["kind"], n, f"{r['ms'][n]:.2f}", f"{r['faster'][n]:.2f} ×"]
                   for r in report["scaling"] for n in r["ms"]]  # fmt: skip
        lines(["L", "what", "threads", "ours, ms", "over the first"], threads)
        names = list(report["accuracy"][0]["ours"])
        errors = [[row["length"], who, *(f"{row[who][name]:.1e}" for name in names)]
                  for row in report["accuracy"] for who in row if who != "length"]  # fmt: skip
        lines(["L", "who", *names], errors)
        keys = ("length", "both", "who", "inputs_mb", "outputs_mb", "extra_mb", "extra_over_tensors")
        memory = [[f"{row[k]:.2f}" if isinstance(row[k], float) else row[k] for k in keys] for row in report["memory"]]
        lines(list(keys), memory)
        for name, value in report["goals"].items():
            print(f"- {name}: {value if isinstance(value, bool) else format(value, '.3g')}")
