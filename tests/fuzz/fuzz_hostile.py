"""Hostile checkpoints through the library: each one loads what is right, or raises WeightsError, in time and memory.

    python tests/fuzz/fuzz_hostile.py pickles --count 10000 --seed 0
    python tests/fuzz/fuzz_hostile.py tensors --count 10000
    python tests/fuzz/fuzz_hostile.py configs --count 10000

Unlike fuzz_checkpoints.py, which damages bytes, these attack meaning: see hostile_pickles.py and hostile_states.py.
Every case runs in a process of its own (a fork of this one), which may take 10 s of a core and 4 GB. A crash, a hang,
too much memory, an exception that is not ours, code that ran, values that are not the file's, parameters that share
memory, and a model that a refusal has changed are findings; the exit status is then 1. POSIX only.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - sets the path and the number of threads
import torch
from hostile_pickles import hostile_value, inject
from hostile_states import NAMES, TENSORS, hostile_config, hostile_header, with_metadata
from small_models import randomize, state_copy

import medgmae

SECONDS = 10
MEMORY = 4 << 30
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 2}
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
# A name and options for each family of configs.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_nano_patch8_32", {**SIZES, "num_classes": 3, "head_hidden": (5,)}),
    "mae": ("mae_vit_nano_patch8_32", {**SIZES, **DECODER}),
    "vim": ("vim_nano_patch8_32", {"img_size": 8, "patch_size": 4, "embed_dim": 12}),
    "gmae": ("gmae_vit_nano_patch8_32", {**SIZES, **DECODER, "num_gaussians": 5}),
}


class Finding(Exception):
    """What must not be."""


class Cases:
    """Sound files and what they load as; one method for each class of attacks."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.models = {name: randomize(medgmae.create_model(arch, **more)) for name, (arch, more) in FAMILIES.items()}
        self.saved = {name: medgmae.save_pretrained(model, folder / name) for name, model in self.models.items()}
        self.state = state_copy(self.models["vit"])
        self.files = {}
        for layout in ("zip", "legacy"):
            for held, content in {"bare": self.state, "model": {"model": self.state, "epoch": 3}}.items():
                torch.save(content, folder / "sound.pth", _use_new_zipfile_serialization=layout == "zip")
                self.files[layout, held] = (folder / "sound.pth").read_bytes()
        medgmae.inspect_checkpoint(self.saved["vit"])  # fills the caches that every fork then has
        gc.freeze()

    def pickles(self, rng: random.Random, path: Path) -> str:
        """A hostile value somewhere in the pickle of a sound file."""
        layout, held = rng.choice(list(self.files))
        place = rng.choice(["value", "value", "key", "first", "whole"])
        name = (
            rng.choice([*self.state, "extra", "args"]) if held == "bare" else rng.choice(["model", "teacher", "args"])
        )
        kind, value = hostile_value(rng)
        path = path.with_suffix(".pth")
        path.write_bytes(inject(self.files[layout, held], place, name, value))
        replaced = place == "value" and (name in self.state or name == "model")
        outcome = self._load(path, rng, {} if replaced else self.state)
        return f"{kind} as {place}, {layout}: {outcome}"

    def tensors(self, rng: random.Random, path: Path) -> str:
        """One tensor of another kind; names that share memory; a state in memory that lives in the model."""
        state, name = dict(self.state), rng.choice(list(self.state))
        kind = rng.choice([*TENSORS, "shared", "own memory", "header", "name", "long patch"])
        if kind == "header":
            path = path.with_suffix(".safetensors")
            path.write_bytes(hostile_header((self.saved["vit"] / "model.safetensors").read_bytes(), rng))
            return f"{kind}: {self._load(path, rng, {})}"
        if kind == "own memory":
            return f"{kind}: {self._own_memory(rng)}"
        if kind == "shared":
            alike = [other for other in state if state[other].shape == state[name].shape]
            state[name] = state[rng.choice(alike)]
        elif kind == "name":
            state[rng.choice(NAMES)] = torch.ones(2)
        elif kind == "long patch":  # to resize it by a matrix would take gigabytes
            name = "patch_embed.proj.weight"
            state[name] = torch.zeros(len(state[name]), 1, rng.choice([600, 50_000]), 1, 1)
        else:
            try:
                state[name] = TENSORS[kind](state[name], rng)
            except (RuntimeError, TypeError, IndexError):  # not every kind can be made of every shape
                return f"{kind}: not made"
        value = state[name]
        expected = dict(self.state)
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            small = not value.is_quantized and value.numel() < 10**6 and not value.is_complex()
            expected[name] = value.detach().as_subclass(torch.Tensor).float().clone() if small else expected[name]
        source: Any = state
        if rng.random() < 0.7:
            source = path.with_suffix(".pth")
            torch.save({"model": state}, source, _use_new_zipfile_serialization=rng.random() < 0.5)
        return f"{kind}: {self._load(source, rng, expected)}"

    def configs(self, rng: random.Random, path: Path) -> str:
        """A config that lies, beside the weights or in their header."""
        family = rng.choice(list(FAMILIES))
        saved = self.saved[family]
        text = hostile_config(json.loads((saved / "config.json").read_text()), rng)
        weights = (saved / "model.safetensors").read_bytes()
        path.mkdir()
        inside = rng.random() < 0.3
        (path / "model.safetensors").write_bytes(with_metadata(weights, text) if inside else weights)
        if not inside:
            (path / "config.json").write_bytes(text)
        target = path / "model.safetensors" if inside else path
        expected = state_copy(self.models[family])
        how = rng.choice(["load", "info"] if inside else ["create", "create", "random", "load", "info"])
        if how == "load":
            return f"{family}, load: {self._into(self.models[family], target, expected)}"
        try:
            if how == "info":
                medgmae.inspect_checkpoint(target)
                return f"{family}, info: told"
            model = medgmae.create_model(f"local-dir:{path}", pretrained=False if how == "random" else None)
        except medgmae.WeightsError as error:
            _check_message(error)
            return f"{family}, {how}: refused"
        if how == "create":
            _check_values(model, expected)
        return f"{family}, {how}: built"

    def _load(self, source: Any, rng: random.Random, expected: dict[str, Any]) -> str:
        if rng.random() < 0.5:
            return self._into(self.models["vit"], source, expected)
        architecture, options = FAMILIES["vit"]
        try:
            model = medgmae.create_model(architecture, pretrained=source, **options)
        except medgmae.WeightsError as error:
            _check_message(error)
            return "refused"
        _check_values(model, expected, model.load_report)
        return "loaded"

    def _into(self, model: Any, source: Any, expected: dict[str, Any]) -> str:
        before = state_copy(randomize(model, seed=4))
        try:
            report = medgmae.load_pretrained(model, source)
        except medgmae.WeightsError as error:
            _check_message(error)
            if not all(torch.equal(model.state_dict()[name], value) for name, value in before.items()):
                raise Finding("refused, yet the model changed") from error
            return "refused"
        _check_values(model, expected, report)
        return "loaded"

    def _own_memory(self, rng: random.Random) -> str:
        """The model's own tensors under each other's names."""
        model: Any = randomize(self.models["vit"], seed=5)
        state = dict(model.state_dict())
        groups: dict[Any, list[str]] = {}
        for name, value in state.items():
            groups.setdefault(value.shape, []).append(name)
        mixed = {}
        for names in groups.values():
            mixed |= dict(zip(names, rng.sample([state[name] for name in names], len(names)), strict=True))
        return self._into_own(model, mixed)

    def _into_own(self, model: Any, mixed: dict[str, Any]) -> str:
        expected = {name: value.clone() for name, value in mixed.items()}
        medgmae.load_pretrained(model, mixed)
        _check_values(model, expected)
        return "loaded"


def _check_message(error: Exception) -> None:
    if not all(char.isprintable() or char == "\n" for char in str(error)):
        raise Finding("a message that steers a terminal")
    if not 10 < len(str(error)) < 20_000:
        raise Finding(f"a message of {len(str(error))} characters")


def _check_values(model: Any, expected: dict[str, Any], report: Any = None) -> None:
    state = model.state_dict()
    said = {name for name in report.missing if name.startswith("head.")} if report else set()  # of another shape, say
    wrong = [name for name, value in expected.items() if name not in state or not torch.equal(state[name], value)]
    other = [name for name in wrong if name not in said]
    if other:
        raise Finding(f"other values: {other[:4]}")
    addresses = [value.data_ptr() for value in state.values() if value.numel()]
    if len(set(addresses)) < len(addresses):
        raise Finding("parameters share memory")
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise Finding("values that are not finite")


def run_one(cases: Cases, attack: str, seed: int, index: int) -> tuple[str, int]:
    """The outcome of one case in a fork, and the memory that it took beyond this process's."""
    reader, writer = os.pipe()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        os.close(reader)
        faulthandler.enable(file=writer, all_threads=False)
        faulthandler.register(signal.SIGXCPU, file=writer, all_threads=False, chain=True)
        cpu = int(time.process_time())  # a machine that is busy with other things must not look like a hang
        resource.setrlimit(resource.RLIMIT_CPU, (cpu + SECONDS, cpu + SECONDS + 5))
        signal.alarm(12 * SECONDS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * MEMORY, taken + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            outcome = getattr(cases, attack)(random.Random(f"{attack}-{seed}-{index}"), cases.folder / f"case{index}")
        except BaseException as error:  # nothing may leave the fork
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"finding: {type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        os.write(writer, outcome.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status, usage = os.wait4(child, 0)
    if status:
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        where = " < ".join(line.strip() for line in outcome.splitlines() if "File" in line)[:600]
        outcome = f"finding: {'took too long' if late else f'crashed (status {status})'} {where}"
    taken = max(usage.ru_maxrss - before, 0) * 1024
    return (f"finding: took {taken >> 20} MiB" if taken > MEMORY else outcome), taken


def fuzz(attack: str, seed: int, count: int) -> tuple[Counter[str], list[str], int, float]:
    """Counts by outcome, findings, the most memory and the longest time that a case took."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    most, longest = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canary = folder / "executed"
        os.environ["FUZZ_CANARY"] = str(canary)
        cases = Cases(folder)
        for index in range(count):
            begin = time.monotonic()
            outcome, taken = run_one(cases, attack, seed, index)
            most, longest = max(most, taken), max(longest, time.monotonic() - begin)
            counts[outcome if "finding" not in outcome else "finding"] += 1
            if canary.exists():
                outcome = "finding: code was executed"
                canary.unlink()
            if "finding" in outcome:
                findings.append(f"{index}: {outcome}")
            for left in folder.glob(f"case{index}*"):
                if left.is_dir():
                    for file in left.iterdir():
                        file.unlink()
                    left.rmdir()
                else:
                    left.unlink()
    return counts, findings, most, longest


def main() -> None:
    """Parse the command line, run, print the table; exit status 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attack", choices=["pickles", "tensors", "configs"])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    counts, findings, most, longest = fuzz(args.attack, args.seed, args.count)
    lines = [f"{number:7} {what}" for what, number in sorted(counts.items())] + findings
    lines.append(
        f"{args.count} {args.attack}, seed {args.seed}, {time.monotonic() - begin:.0f} s, longest {longest:.1f} s, "
        f"most memory {most >> 20} MiB, {len(findings)} findings"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
