"""What `import medgmae` costs beside `import torch`.

Fresh processes, one after the other in turn, byte code compiled before; each starts the clock inside Python, so that
the start of the interpreter does not blur the ratio. The import is lazy, so the cost with the model families loaded is
shown too. Goal: at most 1.1 times torch for all of them.

    python benchmarks/import_time.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

RESULT = Path(__file__).parent / "results/import_time.json"
GOAL = 1.1
CASES = {
    "torch": "import torch",
    "medgmae": "import medgmae",
    "torch, medgmae": "import torch, medgmae",
    "medgmae and its models": "import medgmae; medgmae.list_models()",
}
TIMER = "import time; start = time.perf_counter(); {}; import sys; sys.stdout.write(str(time.perf_counter() - start))"


def seconds(statement: str) -> float:
    """Time one statement in a fresh process."""
    command = [sys.executable, "-c", TIMER.format(statement)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> int:
    """Measure, print a table, write the JSON; the exit code says whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for statement in CASES.values():
        seconds(statement)  # fills the byte code and the page cache
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, statement in CASES.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    # Rounds share the machine's mood, so the ratio is taken within each.
    ratios = {
        name: statistics.median(own / torch_s for own, torch_s in zip(values, times["torch"], strict=True))
        for name, values in times.items()
    }
    for name in CASES:
        print(f"{name:24} {medians[name]:7.3f} s   {ratios[name]:5.2f} x torch")
    met = all(ratio <= GOAL for ratio in ratios.values())
    print(f"goal: at most {GOAL} x torch: {'met' if met else 'MISSED'}")
    result = {
        "rounds": rounds,
        "seconds": medians,
        "ratio_to_torch": ratios,
        "goal": GOAL,
        "met": met,
        "all_seconds": times,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
