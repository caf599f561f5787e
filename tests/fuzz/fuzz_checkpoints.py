"""Corrupted checkpoints through ``load_pretrained``: each one loads what the sound file holds, or raises WeightsError.

    python tests/fuzz/fuzz_checkpoints.py --count 10000 --seed 0

Small checkpoints of several dialects, zipped, legacy and safetensors, are damaged (see checkpoint_damage.py). Each goes
into a model that exists or into one that is being built, in a worker process that is watched for crashes, hangs and
memory.

Allowed: a WeightsError that leaves the model as it was; a load in which every parameter of the encoder was filled. Of
a load whose values differ from the sound file's, ``values`` counts damage that hit the bytes of tensors, ``forged``
files whose structure was rewritten so that it is valid again, ``legacy`` files of a kind that has no checksums. No
format can tell these from other weights: the sha256 of a weight card does. Everything else is a finding, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoint_damage import RAW, STRUCTURED, inject_code, payload

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, whatever is installed

MEMORY = 2 << 30  # bytes of address space that the worker may take beyond its imports
GROWTH = 512 << 20  # bytes of memory that all loads together may leave it with at its peak
PATIENCE = 20.0  # seconds for one file
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 2}
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}

# Name of a sound file: dialect, container, kind of file, architecture to fill.
SOURCES = {
    "tangerine": ("tangerine", "mae", "zip", "mae_vit_nano_patch8_32"),
    "glmae": ("glmae", "dino", "zip", "vit_nano_patch8_32"),
    "selfmedmae": ("mae3d", "best model", "zip", "mae_vit_nano_patch8_32"),
    "bare": ("timm encoder", "bare", "zip", "vit_nano_patch8_32"),
    "legacy": ("plain mae", "mae", "legacy", "vit_nano_patch8_32"),
    "legacy uva": ("uva", "best model", "legacy", "mae_vit_nano_patch8_32"),
    "ours": ("ours", "bare", "safetensors", "vit_nano_patch8_32"),
}


def build(architecture: str, sigmoid: bool, **options: Any) -> Any:
    """A very small model."""
    import medgmae

    more = {**DECODER, "sigmoid": sigmoid} if architecture.startswith("mae") else {}
    return medgmae.create_model(architecture, **SIZES, **more, **options)


def sound_file(source: str, folder: Path) -> bytes:
    """The content of an undamaged checkpoint."""
    import torch
    from dialects import CONTAINERS, DIALECTS
    from small_models import randomize

    import medgmae

    dialect, container, kind, architecture = SOURCES[source]
    torch.manual_seed(0)
    if kind == "safetensors":
        return (
            medgmae.save_pretrained(randomize(build(architecture, False)), folder) / "model.safetensors"
        ).read_bytes()
    model = randomize(build("mae_vit_nano_patch8_32", dialect == "tangerine"))
    buffer = io.BytesIO()
    content = CONTAINERS[container](DIALECTS[dialect][0](model.state_dict()))
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


class Fuzzer:
    """Sound files, what they load as, and the check of one damaged file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, bytes] = {}
        self.clean: dict[str, tuple[dict[str, Any], Any]] = {}
        for source in SOURCES:
            self.files[source] = sound_file(source, folder / "ours")
            path = folder / f"sound{self._suffix(source)}"
            path.write_bytes(self.files[source])
            model = self._model(source, pretrained=str(path))
            assert set(model.load_report.loaded) == set(model.state_dict())
            self.clean[source] = ({n: t.clone() for n, t in model.state_dict().items()}, model.load_report)

    def _suffix(self, source: str) -> str:
        return ".safetensors" if SOURCES[source][2] == "safetensors" else ".pth"

    def _model(self, source: str, **options: Any) -> Any:
        return build(SOURCES[source][3], SOURCES[source][0] == "tangerine", **options)

    def check(self, seed: int, index: int) -> str:
        """Damage a file, load it, say how it went: ``finding: ...`` is what must not be."""
        import torch

        rng = random.Random(f"{seed}-{index}")
        source = rng.choice(list(SOURCES))
        kind = SOURCES[source][2]
        data = bytearray(self.files[source])
        structured = rng.random() < 0.5
        damage = rng.choice(STRUCTURED[kind] if structured else RAW)
        damage(data, rng)
        path = self.folder / f"{index}{self._suffix(source)}"
        path.write_bytes(data)
        try:
            outcome, values = self._load(source, path, existing=rng.random() < 0.5)
        finally:
            path.unlink()
        if outcome == "loaded":
            expected = self.clean[source][0]
            if all(torch.equal(values[name], expected[name]) for name in expected):
                outcome = "equal"
            elif structured:
                outcome = "forged" if damage is not inject_code else "finding: other values from injected code"
            elif kind == "legacy":
                outcome = "legacy"
            else:
                outcome = self._other_values(source, bytes(data))
        return f"{damage.__name__} {kind}: {outcome}"

    def _other_values(self, source: str, data: bytes) -> str:
        """Whether only the bytes of tensors were hit."""
        sound = self.files[source]
        spans = payload(sound, SOURCES[source][2])
        hit = [i for i, (a, b) in enumerate(zip(sound, data, strict=False)) if a != b]
        if len(data) == len(sound) and any(start <= i < end for i in hit for start, end in spans):
            return "values"
        return "finding: other values, though no tensor was hit"

    def _load(self, source: str, path: Path, existing: bool) -> tuple[str, dict[str, Any]]:
        from small_models import randomize, state_copy

        import medgmae
        from medgmae import WeightsError

        model, before = None, {}
        if existing:
            model = randomize(self._model(source), seed=3)
            before = state_copy(model)
        try:
            if model is None:
                model = self._model(source, pretrained=str(path))
                report = model.load_report
            else:
                report = medgmae.load_pretrained(model, path)
        except WeightsError:
            if model is not None and not _equal(model.state_dict(), before):
                return "finding: refused, yet the model changed", {}
            return "refused", {}
        except Exception as error:
            return f"finding: {type(error).__name__}: {str(error)[:200]}", {}
        if set(report.loaded) != set(self.clean[source][1].loaded) or report.missing:
            return f"finding: loaded in part, missing {report.missing}", {}
        if (report.adapted, report.resized) != ({}, {}):
            return "adapted, as reported", {}
        state = model.state_dict()
        if any(value.is_meta for value in state.values()):
            return "finding: a parameter without values", {}
        return "loaded", {name: value.clone() for name, value in state.items()}


def _equal(state: dict[str, Any], expected: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(state[name], value) for name, value in expected.items())


def work(pipe: multiprocessing.connection.Connection, seed: int, start: int, count: int, canary: str) -> None:
    """Check files ``start`` to ``count`` and send each outcome."""
    import warnings

    os.environ["FUZZ_CANARY"] = canary
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        warnings.simplefilter("error")
        for index in range(start, count):
            pipe.send((index, None))
            pipe.send((index, fuzzer.check(seed, index)))
        pipe.send((count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) * 1024))


def fuzz(seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Counts by damage, kind and outcome; the findings."""
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    findings: list[str] = []
    canary = Path(tempfile.mkdtemp()) / "executed"
    done = 0
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(theirs, seed, done, count, str(canary)))
        worker.start()
        theirs.close()
        current, end = done, "crashed"
        try:
            while done < count or worker.is_alive():
                if not ours.poll(PATIENCE if current > done or done else 300.0):
                    end = f"took more than {PATIENCE} s"
                    break
                current, outcome = ours.recv()
                if isinstance(outcome, str):
                    done = current + 1
                    counts[outcome] += 1
                    if "finding" in outcome:
                        findings.append(f"{current}: {outcome}")
                if isinstance(outcome, int):
                    done = count
                    if outcome > GROWTH:
                        findings.append(f"memory grew by {outcome >> 20} MiB")
                    break
        except EOFError:
            pass
        worker.join(1)
        if worker.is_alive():
            worker.kill()
            worker.join()
        if done < count:
            findings.append(f"{current}: the worker {end} (exit code {worker.exitcode})")
            counts["worker lost"] += 1
            done = current + 1
        if canary.exists():
            findings.append(f"code was executed, at the latest by file {done - 1}")
            canary.unlink()
    return counts, findings


def main() -> None:
    """Parse the command line, run, print the table; exit status 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    counts, findings = fuzz(args.seed, args.count)
    lines = [f"{number:7} {what}" for what, number in sorted(counts.items())]
    lines += findings
    lines.append(f"{args.count} files, seed {args.seed}, {time.monotonic() - begin:.0f} s, {len(findings)} findings")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
