"""Updates of a model on one process or many: forward, backward, clip, step."""

from __future__ import annotations

import fnmatch
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from medgmae.training.batches import Batch, Share
from medgmae.training.optim import cosine_schedule, scale_lr
from medgmae.training.settings import TrainingSettings
from medgmae.training.states import State, gather, restore
from medgmae.training.tables import TrainingError, expect

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Plan:
    """Numbers of a run.

    samples: crops of an epoch.
    batch: crops of an update.
    steps: updates in all.
    warmup: of them until the peak of the rate.
    """

    samples: int
    batch: int
    steps: int
    warmup: float

    @classmethod
    def of(cls, training: TrainingSettings, samples: int) -> Plan:
        """The plan for so many crops in an epoch."""
        per_step = training.batch_size / samples
        steps = training.steps or max(1, round((training.epochs or 0) / per_step))
        warmup = training.warmup_steps or (training.warmup_epochs or 0) / per_step
        expect(
            warmup < steps,
            f"the warm-up takes {warmup:g} steps, the run {steps}; give training.warmup_steps=0, or more steps",
        )
        return cls(samples, training.batch_size, steps, warmup)

    @property
    def per_epoch(self) -> int:
        """Updates of an epoch."""
        return max(1, round(self.samples / self.batch))

    def epoch(self, step: float) -> float:
        """Epochs, with their fractions, after so many updates."""
        return step * self.batch / self.samples


class Objective(Protocol):
    """What a model learns."""

    def groups(self, model: nn.Module) -> Sequence[dict[str, Any]]:
        """Parameter groups of the model."""

    def parts(self, model: nn.Module, batch: Any, step: int) -> Sequence[Any]:
        """What goes forward and backward at once; ``model`` is not wrapped. By default the batch as it is."""
        return [batch]

    def __call__(self, model: nn.Module, part: Any, step: int) -> Mapping[str, Tensor]:
        """The ``loss`` of a part in this update, and its terms, which add up over the parts; ``model`` may be wrapped.
        The last part has to go through every parameter that learns."""


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; the weights are as before the update."""

    def __init__(self, what: str, of: list[str]) -> None:
        super().__init__(what)
        self.what, self.of = what, of


class Engine:
    """A model with its optimiser and schedule on the devices of this process.

    Args:
        model: what learns.
        objective: what it learns.
        training: settings of the run.
        plan: of the run.
        accelerator: of accelerate.
        sharded: spread weights, gradients and moments over the processes (FSDP2).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        training: TrainingSettings,
        plan: Plan,
        accelerator: Accelerator,
        sharded: bool = False,
    ) -> None:
        self.objective, self.training, self.plan, self.accelerator = objective, training, plan, accelerator
        self.share = share_of(training, accelerator)
        self.plain, self.sharded = model, sharded
        if training.checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        if training.compile:
            model.compile()
        self.model = shard(model, accelerator) if sharded else accelerator.prepare(model)
        rate = scale_lr(training.lr, training.batch_size) if training.lr_per_256 else training.lr
        groups = list(objective.groups(model))
        betas = (training.betas[0], training.betas[1])
        # Fused: one pass over weights and moments. Torch's default on a CPU makes eight, with copies.
        self.prepared = accelerator.prepare(torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True))
        self.optimizer = self.prepared.optimizer
        self.schedule = cosine_schedule(self.optimizer, plan.steps, plan.warmup, training.min_lr)
        self.names = [name for name, _ in model.named_parameters()]

    def update(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """Update number ``step``, counted from 0: the means of the loss and its terms over the batch, rate and norm.

        Raises:
            NotFinite: see there.
        """
        self.schedule.step(step)
        totals: dict[str, Tensor] = {}
        waited, of = 0.0, []
        for number in range(self.share.passes):
            begin = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - begin
            of += batch.of
            self._seed(step, number)
            parts = self.parts(batch.to(self.accelerator.device), step)
            for left, part in zip(reversed(range(len(parts))), parts, strict=True):
                with self._without_sync(last=number == self.share.passes - 1 and left == 0):
                    values = self.values(part, step)
                    for name, value in values.items():
                        totals[name] = totals.get(name, 0) + value.detach().float() / self.share.passes
                    self.accelerator.backward(values["loss"] / self.share.passes)
        means = self._means(totals)
        if not math.isfinite(means["loss"]):
            raise NotFinite(f"the loss is {means['loss']}", of)
        norm = self._step(step, of)
        rate = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)
        return {**means, "lr": rate, "grad_norm": norm, "waited": waited}

    def parts(self, batch: Batch, step: int) -> Sequence[Any]:
        """What of a batch on this device goes forward and backward at once."""
        with self.accelerator.autocast():
            return self.objective.parts(self.plain, batch, step)

    def values(self, part: Any, step: int) -> Mapping[str, Tensor]:
        """The loss of a part of a batch, and its terms."""
        with self.accelerator.autocast():
            return self.objective(self.model, part, step)

    def _step(self, step: int, of: list[str]) -> float:
        self._freeze(step)
        norm = self._clipped_norm()
        scaled = self.accelerator.scaler is not None  # which leaves out updates that overflow in half precision
        if not math.isfinite(norm) and not scaled:
            raise NotFinite(f"the norm of the gradient is {norm}", of)
        self.prepared.step()
        self.prepared.zero_grad()
        return norm

    def _clipped_norm(self) -> float:
        """The norm of the gradient before it is clipped."""
        if self.training.clip is not None:
            found: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip)
        else:  # clipping to infinity would write every gradient once more
            self.accelerator.unscale_gradients()
            found = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return float(found.full_tensor() if hasattr(found, "full_tensor") else found)

    def _freeze(self, step: int) -> None:
        """Take their gradients from parameters that do not learn in this phase."""
        now = step if self.training.steps else self.plan.epoch(step)
        phase = next((phase for phase in self.training.phases if now < phase.until), None)
        if phase is None:
            return
        learns = [any(fnmatch.fnmatch(name, one) for one in phase.train) for name in self.names]
        expect(any(learns), f"phases: no parameter matches {phase.train}; the names are as in model.named_parameters()")
        for parameter, kept in zip(self.model.parameters(), learns, strict=True):
            if not kept:
                parameter.grad = None

    def _seed(self, step: int, number: int) -> None:
        """What a model draws by itself (drop path) depends on the update, the pass and the process."""
        counters = [self.training.seed, step, number, self.share.rank]
        torch.manual_seed(int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged with the last backward pass of an update only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _means(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Over all processes, in one exchange."""
        means = self.accelerator.reduce(torch.stack(list(totals.values())), "mean")
        return dict(zip(totals, means.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        if self.share.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def state(self, facts: dict[str, Any]) -> State:
        """The state of the run; every process has to ask for it."""
        scaler = self.accelerator.scaler
        return gather(self.model, self.optimizer, {**facts, "scaler": None if scaler is None else scaler.state_dict()})

    def resume(self, state: State) -> None:
        """Go on from a state.

        Raises:
            TrainingError: it is that of another model.
        """
        try:
            restore(state, self.model, self.optimizer)
        except (RuntimeError, KeyError, ValueError) as error:
            raise TrainingError(f"the state does not fit the model of these settings: {error}") from error
        if self.accelerator.scaler is not None and state.facts["scaler"]:
            self.accelerator.scaler.load_state_dict(state.facts["scaler"])


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model with its parameters spread over the processes, block by block (FSDP2, ``fully_shard``).

    accelerate's own plugin knows accelerators only, and a plan for it is longer than these lines.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = accelerator.device
    expect(accelerator.num_processes > 1, "sharded needs several processes: torchrun --nproc-per-node N -m medgmae ...")
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    model.to(device)
    for part in list(model.modules()):
        for block in getattr(part, "blocks", ()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("reconstruct", "teach", "taught"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def share_of(training: TrainingSettings, accelerator: Accelerator) -> Share:
    """What this process does of a batch."""
    world = accelerator.num_processes
    own = training.batch_size // world
    expect(
        own * world == training.batch_size,
        f"training.batch_size={training.batch_size} cannot be shared by {world} processes; give a multiple of {world}",
    )
    micro = min(training.micro_batch or own, own)
    expect(
        own % micro == 0,
        f"training.micro_batch={micro} does not divide the {own} crops of a process; give a divisor of {own}",
    )
    return Share(training.batch_size, accelerator.process_index, world, micro)


def memory(device: torch.device) -> float:
    """The most memory that this process has had, in MB: of the GPU, or of the system."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
