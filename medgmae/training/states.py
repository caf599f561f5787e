"""States of a run on disk: weights, moments and counters in one safetensors file each, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from medgmae.training.tables import TrainingError

_NAME = re.compile(r"step_(\d{8})\.safetensors")


class State(NamedTuple):
    """Weights and optimiser, gathered from all processes, and the counters of a run.

    model: state dictionary on the CPU.
    optimizer: state of every parameter, by its name.
    groups: of the optimiser, with names for parameters.
    facts: step, best score, scale of the gradients and so on: plain data.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    facts: dict[str, Any]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> State:
    """The state of a model, whatever wraps it; every process has to call this, the first one gets the tensors."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: Any = get_state_dict(model, optimizer, options=options)
    weights, moments = gathered
    return State(dict(weights), dict(moments.get("state", {})), list(moments.get("param_groups", [])), dict(facts))


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a state back, on every process."""
    weights: Any = state.model
    moments: Any = {"state": state.optimizer, "param_groups": state.groups}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


def write_state(path: Path, state: State) -> None:
    """Write a state under its name when all of it is on the disk.

    Raises:
        TrainingError: it cannot be written, as on a full disk; what was there stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()}
    for name, values in state.optimizer.items():
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    about = json.dumps({"groups": state.groups, "facts": state.facts})
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, {"medgmae": about})
        partial.chmod(mode)  # safetensors lets the owner alone read what it writes
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TrainingError(
            f"the checkpoint {path} could not be written: {error}. Earlier ones are as they were; make room and "
            "run the same command with --resume"
        ) from error


def read_state(path: Path) -> State:
    """Read a state.

    Raises:
        TrainingError: it is not there, cut, or no state of a run.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["medgmae"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        groups, facts = about["groups"], about["facts"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is not a state of a run: {error}") from None
    model: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            model[rest] = tensor
        else:
            key, _, parameter = rest.partition(".")
            moments.setdefault(parameter, {})[key] = tensor
    return State(model, moments, groups, facts)


class Checkpoints:
    """The folder of a run's states: the last ``keep``, and a copy of the best by each score."""

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise TrainingError(f"keep is {keep}; expected at least 1 checkpoint")
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """States in the order of their steps."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))

    def save(self, state: State, best: Sequence[str]) -> Path:
        """Write a state, under the names of the scores by which it is the best too, and remove the oldest.

        It is the last one only when it is the best one, too: a process that is killed between resumes from the state
        before, and measures again.
        """
        path, fresh = self.folder / f"step_{state.facts['step']:08d}.safetensors", self.folder / "next.safetensors"
        write_state(fresh, state)
        for name in best:
            self._copy(fresh, self._best(name))
        os.replace(fresh, path)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def _copy(self, path: Path, to: Path) -> None:
        """A second name for the same file where the file system has that."""
        partial = to.with_name(f".{to.name}.writing")
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            try:
                shutil.copyfile(path, partial)
            except OSError as error:
                raise TrainingError(f"{to} could not be written: {error}") from error
        os.replace(partial, to)

    def best(self, name: str) -> State | None:
        """The state with the best of a score, None where none was measured."""
        path = self._best(name)
        return read_state(path) if path.exists() else None

    def _best(self, name: str) -> Path:
        return self.folder / f"best_{name}.safetensors"

    def last(self) -> State | None:
        """The last state, None of a run that has none."""
        paths = self.paths()
        return read_state(paths[-1]) if paths else None
