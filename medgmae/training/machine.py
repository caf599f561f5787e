"""Where a run runs: device, processes, precision; and what it writes on the way, none of which changes its outcome."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medgmae.training.tables import TrainingError, expect

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Machine:
    """What a run needs that does not change what comes out of it.

    device: "cpu", "cuda", or None: a GPU where there is one.
    workers: processes of each training process that read crops; None: up to 8 beside a GPU, none beside a CPU.
    sharded: spread weights and moments over the processes (FSDP2) instead of copying them to each.
    log_every: updates between lines of the log.
    checkpoint_every: updates between states, each with a measurement and the model itself; None: an epoch.
    picture_every: updates between pictures, a multiple of ``checkpoint_every`` where they are shown; 0: none.
    keep: states that are kept, beside the best.
    log: "tensorboard", "wandb" or both, beside metrics.jsonl.
    skip_broken: leave out scans that cannot be prepared, and count them.
    prepared: folder of the prepared scans; None: RUN/prepared.
    progress: show a bar; by default in terminals and notebooks.
    """

    device: str | None = None
    workers: int | None = None
    sharded: bool = False
    log_every: int = 10
    checkpoint_every: int | None = 500
    picture_every: int = 500
    keep: int = 3
    log: Sequence[str] = ()
    skip_broken: bool = False
    prepared: Path | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("workers", 0),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("picture_every", 0),
            ("keep", 1),
        ):
            value = getattr(self, name)
            expect(value is None or value >= least, f"{name} is {value}; expected at least {least}")
        unknown = sorted(set(self.log) - set(TRACKERS))
        expect(not unknown, f"log is {', '.join(unknown)}; expected some of {', '.join(TRACKERS)}")
        expect(self.device in (None, "cpu", "cuda"), f"device is {self.device!r}; expected 'cpu' or 'cuda'")


def workers_of(machine: Machine, accelerator: Accelerator) -> int:
    """Processes that read crops for this one."""
    if machine.workers is not None:
        return machine.workers
    if accelerator.device.type == "cpu":
        return 0  # they would take the cores that compute
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, (os.cpu_count() or 1) // beside)


def accelerator_for(machine: Machine, precision: str, folder: Path) -> Accelerator:
    """accelerate's view of this process: its device, its precision, the processes beside it.

    Raises:
        TrainingError: accelerate is not installed, there is no such device, or it has no such precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise TrainingError("pre-training needs accelerate: pip install 'medgmae[train]'") from error
    gpu = machine.device != "cpu" and torch.cuda.is_available()
    expect(gpu or machine.device != "cuda", "there is no GPU that torch can use; leave out --device cuda")
    if precision == "auto":
        precision = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    expect(
        precision != "fp16" or (gpu and not machine.sharded),
        "training.precision=fp16 needs a GPU and weights that are not sharded; give bf16 or fp32",
    )
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not gpu,
        log_with=list(machine.log) or None,
        project_dir=str(folder),
        # Others wait while the first process prepares scans. That a process died is noticed by what started it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
