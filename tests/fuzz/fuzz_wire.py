"""Weights over a hostile wire: what loads is what the repository holds, or one WeightsError says what to do.

    python tests/fuzz/fuzz_wire.py hub --count 10000 --seed 0
    python tests/fuzz/fuzz_wire.py shards --count 10000
    python tests/fuzz/fuzz_wire.py url --count 10000

A server of its own (wire_server.py) answers some requests as wire_faults.py says. Caches are empty, left from an
earlier call, from an older commit or from a download that broke off; with links and without; pinned, forced, offline or
not; some cases have two processes. Every case runs in a process of its own, which may take 10 s of a core, 20 s in all
and 4 GB. A crash, a hang, memory, an exception that is not ours, a message without a name or a remedy, wrong values and
another configuration are findings. So is what goes wrong in a call after it, with the same cache and a sound server.

Not findings: contents that are wrong where the same server hides the hash too, a commit that it gives a wrong name, and
a file that it denies in the hub's own words. Nobody could notice; force_download=True has to repair the cache then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - sets the path and the number of threads

os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1,localhost")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fuzz-wire-")  # before the client is imported, which reads it once

import fuzz_hostile
import torch
from fuzz_hostile import Finding
from huggingface_hub import constants
from safetensors.torch import save
from small_models import randomize, state_copy
from wire_faults import CLASSES, hostile_index
from wire_server import COMMITS, REPO, Server, config_of, hash_of

import medgmae
from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightCard
from medgmae.checkpoints.opening import open_source

SECONDS = 20  # of the clock, of which a silent server is given up in less than one here
HOSTILE, SOUND = 0.25, 5.0  # seconds of silence
REMEDY = re.compile(
    "call again|check|force_download|log in|copy|name another|accept|give a |set |unset|fetch|look at|pass|expected|"
    "remove"
)
INDEX = "model.safetensors.index.json"


def patience(seconds: float) -> None:
    """Wait so long for a server instead of the usual times: little for a hostile one, much for a sound one."""
    wire.CONNECT = wire.ANSWER = wire.SOON = wire.TIMEOUT = seconds
    wire.BACKOFF, wire.LONGEST_WAIT = 0.005, 0.2


class Cases:
    """Two editions of a repository, whole and in parts, and one method for each kind of source."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        options = {**fuzz_hostile.SIZES, "num_classes": 3}
        self.states, self.whole, self.parts = {}, {}, {}
        for seed, commit in enumerate(COMMITS):
            model = randomize(medgmae.create_model("vit_nano_patch8_32", **options), seed=seed)
            saved = medgmae.save_pretrained(model, folder / commit)
            state = self.states[commit] = state_copy(model)
            config = config_of(commit, json.loads((saved / "config.json").read_text()))
            self.whole[commit] = {
                "model.safetensors": (saved / "model.safetensors").read_bytes(),
                "config.json": config,
            }
            names = sorted(state)
            places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
            parts = {file: save({n: state[n] for n in names if places[n] == file}) for file in set(places.values())}
            index = json.dumps({"metadata": {}, "weight_map": places}).encode()
            self.parts[commit] = {INDEX: index, "config.json": config, **parts}
        self.other = save({"x": torch.zeros(20_000)})
        patience(SOUND)
        open_source(str(folder / COMMITS[0]))  # loads what every fork then has

    def hub(self, rng: random.Random, path: Path) -> str:
        """One file of weights."""
        return self._case(rng, path, self.whole)

    def shards(self, rng: random.Random, path: Path) -> str:
        """Several files of weights and their index."""
        files = {commit: dict(held) for commit, held in self.parts.items()}
        if rng.random() < 0.25:
            kind, index = hostile_index(rng, files[COMMITS[0]][INDEX])
            files[COMMITS[0]][INDEX] = index
            server = Server(files, redirects=rng.random() < 0.5)
            server.start()
            self._point(server)
            try:
                self._load(self._source(server, "hub", "main"), path)
            except medgmae.WeightsError as error:
                _check_message(error, server)
                return f"index {kind}: refused"
            if kind == "twice":
                return f"index {kind}: loaded"
            raise Finding(f"index {kind}: loaded")
        return self._case(rng, path, files)

    def url(self, rng: random.Random, path: Path) -> str:
        """A plain address with the hash of a card."""
        return self._case(rng, path, self.whole, plain=True)

    def _case(self, rng: random.Random, path: Path, files: dict[str, dict[str, bytes]], plain: bool = False) -> str:
        server = Server(files, redirects=rng.random() < 0.5)
        constants.HF_HUB_DISABLE_SYMLINKS = rng.random() < 0.4
        revision = rng.choice(["main", "main", "pr/7", COMMITS[0]])
        kind = "url" if plain else "hub"
        source = self._source(server, kind, revision)
        second = rng.random() < 0.15
        child = _second_process(lambda: self._load(source, path)) if second else None
        server.start()
        self._point(server)
        was = self._prepare(rng, server, source, path, files)
        asked, offline = len(server.asked), rng.random() < 0.05
        faults = []
        share = rng.choice([0.0, 0.2, 0.4, 0.4, 0.8, 1.0])
        chosen = [rng.choice(CLASSES)(rng, self.other)] if share == 1 else None
        for index in range(60):
            if rng.random() < share:
                named = chosen[0] if chosen else rng.choice(CLASSES)(rng, self.other)
                server.plan[asked + index] = named[1]
                faults.append((asked + index, named[0]))
        if rng.random() < 0.3:
            server.moves_at = asked + rng.randrange(6)
        force = rng.random() < 0.2
        constants.HF_HUB_OFFLINE = offline
        patience(HOSTILE if share else SOUND)
        outcome, error = self._attempt(source, path, force)
        constants.HF_HUB_OFFLINE = False
        patience(SOUND)
        if child is not None:
            _finish(child)
        used = {what for index, what in faults if index < len(server.asked)}
        blind = _blind(used, revision, plain)
        if error is None:
            self._check(outcome, server, revision, was, plain, blind, "loaded")
        else:
            _check_message(error, server)
            if not share and not offline:
                raise Finding(f"{was}: refused by a sound server: {error}")
        server.plan.clear()
        server.moves_at = None
        again, error = self._attempt(source, path, blind != "")
        if error is not None:
            raise Finding(f"{was}, {sorted(used)}, afterwards: {error}")
        self._check(again, server, revision, "now", plain, "", f"{was}, {sorted(used)}, afterwards")
        if again[0] != (server.refs.get(revision, revision) if not plain else COMMITS[0]):
            raise Finding(f"{was}, {sorted(used)}, afterwards: of another commit")
        return f"{kind}{', blind' if blind else ''}: {'refused' if outcome is None else 'loaded'}, then loaded"

    def _source(self, server: Server, kind: str, revision: str) -> Any:
        if kind == "hub":
            return f"hf-hub:{REPO}@{revision}"
        content = self.whole[COMMITS[0]]["model.safetensors"]
        md5, url = hashlib.md5(content).hexdigest(), f"{server.url}/url/{COMMITS[0]}/model.safetensors"
        return WeightCard("vit_nano_patch8_32.fuzz", url=url, md5=md5, bytes=len(content))

    def _point(self, server: Server) -> None:
        constants.ENDPOINT = server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"

    def _prepare(self, rng: random.Random, server: Server, source: Any, path: Path, files: Any) -> str:
        """What an earlier call has left in the cache."""
        was = rng.choice(["empty", "empty", "whole", "older", "broken off", "damaged leftover", "long leftover"])
        if was == "whole":
            self._load(source, path)
        elif was == "older":
            self._load(source, path)
            server.refs["main"] = COMMITS[1]
        elif was != "empty":
            content = files[COMMITS[0]].get("model.safetensors") or files[COMMITS[0]]["model-0.safetensors"]
            begin = content[: rng.randrange(1, len(content))]
            if was == "damaged leftover":
                begin = bytes([begin[0] ^ 1]) + begin[1:]
            left = begin + (content if was == "long leftover" else b"")
            blobs = path / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
            if not isinstance(source, str):
                blobs = path / "url" / source.md5[:16]
            blobs.mkdir(parents=True)
            name = f"{hash_of('x.safetensors', content)}.incomplete"
            (blobs / (name if isinstance(source, str) else "model.safetensors.part")).write_bytes(left)
        return was

    def _load(self, source: Any, path: Path, force: bool = False) -> tuple[str, Any]:
        """The commit whose weights came, and the configuration."""
        opened = open_source(source, cache_dir=path, progress=False, force_download=force)
        for commit, state in self.states.items():
            found = opened.checkpoint.state
            if found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state):
                return commit, opened.config
        return "none", opened.config

    def _attempt(self, source: Any, path: Path, force: bool) -> tuple[Any, Exception | None]:
        try:
            return self._load(source, path, force), None
        except medgmae.WeightsError as error:
            return None, error

    def _check(self, got: Any, server: Server, revision: str, was: str, plain: bool, blind: str, what: str) -> None:
        commit, config = got
        if blind:
            return
        if commit == "none":
            raise Finding(f"{what}: wrong values")
        if (plain or revision != "main") and commit != COMMITS[0]:
            raise Finding(f"{what}: of another commit")
        if not plain and config.get("edition") != commit:
            raise Finding(f"{what}: weights of {commit[:4]}, configuration of {config.get('edition')}")


def _blind(used: set[str], revision: str, plain: bool) -> str:
    """Why nobody could have noticed; empty where somebody could."""
    if plain:
        return ""
    if "absent" in used:
        return "absent"
    if "etag commit" in used and revision not in COMMITS:
        return "commit"
    words = {word for what in used for word in what.split()}
    return "hash" if {"bytes", "etag"} <= words else ""


def _check_message(error: Exception, server: Server) -> None:
    text = str(error)
    if not 10 < len(text) < 3000:
        raise Finding(f"a message of {len(text)} characters: {text[:200]}")
    if not (REPO in text or f"models--{REPO.replace('/', '--')}" in text or server.url in text):
        raise Finding(f"a message without a name: {text}")
    if not REMEDY.search(text):
        raise Finding(f"a message without a remedy: {text}")
    if not text.replace("\n", "").isprintable():
        raise Finding(f"a message that no terminal shows: {text!r}")


def _second_process(load: Any) -> int:
    """Another process, which loads the same into the same cache at the same time."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            time.sleep(0.02)
            patience(HOSTILE)
            load()
        except medgmae.WeightsError:
            pass
        except BaseException:  # nothing may leave the fork
            status = 3
        os._exit(status)
    return child


def _finish(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        raise Finding("the second process ended with an exception that is not ours")


def main() -> None:
    """Parse the command line, run, print the table; exit status 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["hub", "shards", "url"])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    args = parser.parse_args()
    begin, longest, most = time.monotonic(), 0.0, 0
    counts: Counter[str] = Counter()
    findings = []
    with tempfile.TemporaryDirectory() as name:
        cases = Cases(Path(name))
        if args.only is not None:
            outcome = getattr(cases, args.kind)(
                random.Random(f"{args.kind}-{args.seed}-{args.only}"), cases.folder / f"case{args.only}"
            )
            sys.exit(outcome)
        for index in range(args.count):
            began = time.monotonic()
            outcome, taken = fuzz_hostile.run_one(cases, args.kind, args.seed, index)
            shutil.rmtree(cases.folder / f"case{index}", ignore_errors=True)
            took = time.monotonic() - began
            if took > SECONDS and "finding" not in outcome:
                outcome = f"finding: took {took:.0f} s"
            longest, most = max(longest, took), max(most, taken)
            counts[outcome if "finding" not in outcome else "finding"] += 1
            if "finding" in outcome:
                findings.append(f"{index}: {outcome}")
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    lines = [f"{number:7} {what}" for what, number in sorted(counts.items())] + findings
    lines.append(
        f"{args.count} {args.kind}, seed {args.seed}, {time.monotonic() - begin:.0f} s, longest {longest:.1f} s, "
        f"most memory {most >> 20} MiB, {len(findings)} findings"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
