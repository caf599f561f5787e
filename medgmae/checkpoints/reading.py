"""Reading checkpoint files safely: which sets of weights they hold, and the tensors of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.formats import HEAD, foreign, is_safetensors
from medgmae.checkpoints.json_files import parse_json
from medgmae.checkpoints.meanings import Described, Inert
from medgmae.checkpoints.safetensors_files import read_safetensors
from medgmae.checkpoints.tensors import MAX_NAME, check_names, check_tensors, listed
from medgmae.checkpoints.torch_files import read_torch_file

# Where training code puts the weights, in the order in which they are looked for. GL-MAE's student comes before all.
CONTAINER_KEYS = (
    *("student", "state_dict", "model", "model_state", "model_state_dict"),
    *("module", "network_weights", "network", "net", "weights", "params"),
)

# Name of the metadata entry of our own safetensors files: the model's config as JSON.
CONFIG_KEY = "medgmae"

# What stands between a file and the set of weights in it that is asked for: "last.ckpt::teacher".
SET_MARK = "::"

MAX_DEPTH = 5


class Checkpoint(NamedTuple):
    """The weights in a file.

    state: name to tensor, as the file spells them.
    container: entry that held them, "" for a bare dictionary.
    config: the model's config when the file is one of ours, else None.
    others: entries with further sets of weights, which were not read.
    """

    state: dict[str, Tensor]
    container: str
    config: dict[str, Any] | None
    others: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, wanted: str = "") -> Checkpoint:
    """Read a .safetensors file or anything that ``torch.save`` wrote; tensors are mapped from disk where possible.

    Args:
        path: the file.
        wanted: which set of weights to read where there are several, by the name of its entry.

    Raises:
        WeightsError: not a checkpoint, damaged, holds objects other than the allowed ones, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if what := foreign(head):
        raise WeightsError(f"{path}: {what}")
    if not is_safetensors(path, head):
        held = read_torch_file(path)
        return find_state(held.content, str(path), wanted, held.tensor)
    state, metadata = read_safetensors(path)
    if not state:
        raise WeightsError(f"{path}: the file holds no tensors")
    config = None
    if CONFIG_KEY in metadata:
        config = parse_json(metadata[CONFIG_KEY], f"{path}, its {CONFIG_KEY!r} entry")
    return find_state(state, str(path), wanted)._replace(config=config)


def find_state(
    content: Any, origin: str, wanted: str = "", tensor_of: Callable[[Described], Tensor | str] | None = None
) -> Checkpoint:
    """The state dictionary inside what a file held.

    Args:
        content: the object in the file.
        origin: the file's name, for messages.
        wanted: see :func:`read_checkpoint`.
        tensor_of: from the description of a tensor to the tensor, or the reason why there is none.

    Raises:
        WeightsError: no dictionary of tensors under any known entry, or not the one that is wanted.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{origin}: expected a dictionary of weights, found {_kind(content)}")
    sets = weight_sets(content)
    chosen, prefix = _wanted_set(sets, content, origin, wanted) if wanted else (_usual_set(content, sets, origin), "")
    found = {name: value for name, value in _at(content, chosen).items() if _is_tensor(value) or not _is_text(name)}
    check_names(found, origin)
    state = {
        name.removeprefix(prefix): tensor_of(value) if isinstance(value, Described) and tensor_of else value
        for name, value in found.items()
        if name.startswith(prefix)
    }
    others = tuple(_path(other) for other in sets if other != chosen)
    return Checkpoint(check_tensors(state, origin), _path((*chosen, prefix[:-1])), None, others)


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Inert) else "Tensor" if _is_tensor(value) else type(value).__name__


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, Described))


def _path(entries: tuple[str, ...]) -> str:
    return ".".join(entry for entry in entries if entry)


def _at(content: Mapping[Any, Any], entries: tuple[str, ...]) -> Mapping[Any, Any]:
    for entry in entries:
        content = content[entry]
    return content


def weight_sets(content: Mapping[Any, Any]) -> list[tuple[str, ...]]:
    """Where in a file there are weights of modules: dictionaries with tensors under dotted names, as paths to them."""
    sets: list[tuple[str, ...]] = []
    seen = {id(content)}
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for _ in range(MAX_DEPTH):
        below = []
        for path, here in level:
            if any(_is_text(name) and "." in name and _is_tensor(value) for name, value in here.items()):
                sets.append(path)
            for name, value in here.items():
                if _is_text(name) and len(name) <= MAX_NAME and isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    below.append(((*path, name), value))
        level = below
    return sets


def _wanted_set(
    sets: list[tuple[str, ...]], content: Mapping[Any, Any], origin: str, wanted: str
) -> tuple[tuple[str, ...], str]:
    """The set that is asked for: an entry of the file, or the names of the usual set that begin so."""
    choices = [path for path in sets if _path(path) == wanted] or [path for path in sets if path[-1:] == (wanted,)]
    if len(choices) == 1:
        return choices[0], ""
    prefix = wanted.removesuffix(".") + "."
    within = [path for path in sets if any(_is_text(n) and n.startswith(prefix) for n in _at(content, path))]
    if len(within) == 1:
        return within[0], prefix
    names = listed(repr(_path(path)) for path in (choices or within or sets) if path)
    raise WeightsError(f"{origin}: has no single set of weights {wanted!r}; there are {names or 'no named ones'}")


def _usual_set(content: Mapping[Any, Any], sets: list[tuple[str, ...]], origin: str) -> tuple[str, ...]:
    """The set under the entries where training code puts the weights to use."""
    path: tuple[str, ...] = ()
    here = content
    while not _is_state(here):
        entry = next((k for k in CONTAINER_KEYS if isinstance(here.get(k), Mapping)), None)
        if entry is None or len(path) > MAX_DEPTH - 2:
            entries = [repr(key)[:100] if _is_text(key) else _kind(key) for key in list(here)[:8]]
            spare = [_path(other) for other in sets if other]
            hint = f". There are weights under {listed(map(repr, spare))}, which are not taken without being asked for"
            hint += f": pass '{origin}{SET_MARK}{spare[0]}'" if spare else ""
            raise WeightsError(
                f"{origin}: no weights found. Expected tensors by name, or such a dictionary under one of "
                f"{', '.join(CONTAINER_KEYS)}; found {', '.join(entries) or 'nothing'}{hint if spare else ''}"
            )
        path, here = (*path, entry), here[entry]
    return path


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Whether a mapping is names to tensors; a container has its tensors one level down."""
    if any(isinstance(content.get(k), Mapping) for k in CONTAINER_KEYS):
        return False
    return any(_is_tensor(value) for value in content.values())
