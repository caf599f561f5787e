"""Save a model as a folder that anyone can load again, and upload such a folder to the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgmae._version import __version__
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.configs import described_model
from medgmae.checkpoints.download import writing
from medgmae.checkpoints.hub import HUB_PREFIX
from medgmae.checkpoints.json_files import parse_json
from medgmae.checkpoints.paths import as_path
from medgmae.checkpoints.refusals import check_endpoint, check_names, push_errors
from medgmae.checkpoints.safetensors_files import write_safetensors
from medgmae.checkpoints.settings import encoder_of
from medgmae.checkpoints.sources import CONFIG_FILE, LOCAL_PREFIX, SUFFIXES, WEIGHTS_FILE
from medgmae.checkpoints.wire import bounded_client, check_reachable
from medgmae.models.parts import unwrap
from medgmae.models.registry import model_builder

README_FILE = "README.md"


_SOURCES = ("hub", "url", "file", "md5", "sha256", "bytes", "page_file")

_log = logging.getLogger("medgmae")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model as ``model.safetensors``, ``config.json`` and a model card ``README.md``.

    Every file is replaced whole or not at all; other files in the folder stay. A wrapper such as
    ``DistributedDataParallel`` or ``torch.compile`` is taken off first. Load the folder with
    ``create_model("local-dir:FOLDER")`` or ``load_pretrained(model, FOLDER)``. The names of the classes, if
    ``model.label_names`` has them, go along.

    Args:
        model: a model of this library, made by ``create_model`` or by its class.
        folder: where to write; made if it does not exist.

    Returns:
        The folder.

    Raises:
        WeightsError: nothing says how to build the model again, a tensor has no values, or the folder cannot be
            written.
    """
    model = unwrap(model)
    config = model_config(model)
    tensors = _tensors(model)
    _check_rebuilds(config, model, tensors)
    folder = _place_of(folder)
    if folder.suffix in SUFFIXES:
        raise WeightsError(f"{folder}: a model is saved as a folder; leave out {folder.suffix!r}")
    with writing(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            _write_files(Path(name), config, tensors)
            for file in (WEIGHTS_FILE, CONFIG_FILE, README_FILE):
                os.replace(Path(name, file), folder / file)
    return folder


def _place_of(folder: str | os.PathLike[str]) -> Path:
    """The folder that is meant, also by the name under which it will be loaded."""
    if isinstance(folder, str) and folder.startswith(HUB_PREFIX):
        raise WeightsError(f"{folder}: a folder is expected; push_to_hub(model, 'org/repo') uploads a model")
    return as_path(folder.removeprefix(LOCAL_PREFIX) if isinstance(folder, str) else folder)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Save a model and upload it to the Hugging Face hub; the repository is made if it does not exist.

    Args:
        model: see :func:`save_pretrained`.
        repo_id: ``"org/name"``, or ``"name"`` for a repository of your own.
        private: make the repository private; one that exists and is public is refused.
        token: hub token; ``None`` for the one that ``hf auth login`` stored.
        revision: branch to upload to, made if it does not exist; ``None`` for ``main``.
        commit_message: first line of the commit.

    Returns:
        Address of the uploaded commit. Its last part is the revision to pin in ``"hf-hub:org/name@revision"``.

    Raises:
        WeightsError: the model cannot be saved, or the hub cannot be reached or refuses: no right to write, a quota, a
            model card that it does not accept; or the licence of the weights that the model began with forbids to
            share changed copies. The message says what to do.
    """
    check_endpoint()
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="medgmae", library_version=__version__)
    what = f"{HUB_PREFIX}{repo_id}"
    check_names(what, repo_id, {} if revision is None else {"branch": revision}, token)
    origin = getattr(unwrap(model), "pretrained_cfg", None) or {}
    if origin.get("redistribute") is False and not private:
        raise WeightsError(
            f"{what}: the model began with {origin.get('tag')}, whose licence ({origin.get('license')}) does not "
            "allow to share it; pass private=True, or share the head alone"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = save_pretrained(model, Path(name))
        with push_errors(what, api.endpoint):
            check_reachable(api.endpoint, what)
            with bounded_client():
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if private and not api.model_info(repo_id).private:  # it was there before
                    remedy = "make it private on the hub, leave out private=True or choose another name"
                    raise WeightsError(f"{what}: the repository exists and is public; {remedy}")
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                # The card names the repository, which is only known in full now.
                (folder / README_FILE).write_text(model_readme(model_config(unwrap(model)), repo_id), encoding="utf-8")
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
                )
    return f"{api.endpoint}/{repo_id}/tree/{commit.oid}"


def model_config(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` says of a model, in the layout that timm made common.

    ``architecture`` and ``model_args`` build it again: a registered name and its options or, for a model that was made
    by its class, the class and its arguments. ``grid`` is that of its table of positions; ``weight_card`` is the
    card of the weights it started from, without where to fetch them; the rest is there for readers.

    Raises:
        WeightsError: nothing says how to build the model again, or JSON cannot hold it.
    """
    made = _recipe(model)
    encoder = encoder_of(model)
    config = {
        "model_type": "medgmae",  # by which transformers knows that the model is not its own, nor timm's
        "architecture": made["architecture"],
        "task": _task(model),
        "num_classes": getattr(model, "num_classes", 0),
        "id2label": _labels(model),
        "num_features": getattr(model, "num_features", None),
        "model_args": made["model_args"],
        "grid": list(encoder.grid_size) if hasattr(encoder, "grid_size") else made.get("grid"),
        "weight_card": _origin(getattr(model, "pretrained_cfg", None)),
        "library_name": "medgmae",
        "library_version": __version__,
    }
    return _as_json(config)


def _task(model: nn.Module) -> str:
    """What a model does, in the hub's words."""
    classes = getattr(model, "num_classes", 0)
    return getattr(model, "TASK", "image-classification") if classes else "image-feature-extraction"


def _labels(model: nn.Module) -> dict[str, str] | None:
    """The names of a model's classes by number, as the hub's pages read them."""
    names: Any = getattr(model, "label_names", None)
    if names is None:
        return None
    classes = getattr(model, "num_classes", 0)
    if not isinstance(names, list | tuple) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise WeightsError(
            f"model.label_names is {names!r}: expected a list of {classes} names, one per class, or None"
        )
    return {str(number): name for number, name in enumerate(names)}


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary as JSON gives it back, by the rules that loading has."""
    try:
        text = json.dumps(config, allow_nan=False, default=_plain_number)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"model.config does not fit into JSON: {error}; use numbers, text and lists") from error
    return parse_json(text, "model.config with the names of the classes and the weight card")


def _plain_number(value: object) -> int | float:
    """A number of numpy's as one of Python's."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _recipe(model: nn.Module) -> Mapping[str, Any]:
    """What builds a model again: its config with what its methods have changed since, or its class and options."""
    made: Any = getattr(model, "config", None)
    described: Any = model
    if isinstance(made, Mapping) and {"architecture", "model_args"} <= set(made):
        if not hasattr(model, "options"):
            return made  # a module of the caller's own
        if made["architecture"] == type(model).__name__:
            return {**made, "model_args": described.options()}
        return {**made, "model_args": {**made["model_args"], **_changed(described, made)}}
    if hasattr(model, "options"):
        return {"architecture": type(model).__name__, "model_args": described.options()}
    raise WeightsError(
        f"{type(model).__name__} is not a model of this library and has no .config with 'architecture' and "
        "'model_args' to build it again from; save its state_dict() with torch.save instead"
    )


def _changed(model: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model that are not those of its config any more: what methods and hands have changed."""
    built: Any = _built(made["architecture"], _as_json(made["model_args"]))
    before, now = built.options(), model.options()
    plain = {name: value for name, value in now.items() if not isinstance(value, Mapping) or "class" not in value}
    changed = {
        name: value for name, value in plain.items() if _as_json({name: value}) != _as_json({name: before[name]})
    }
    if model.img_size != built.img_size:
        changed["img_size"] = model.img_size
    if "global_pool" in changed:  # the norms stay where they are, whatever pools
        changed |= {name: now[name] for name in ("fc_norm",) if name in now}
    return changed


def _built(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The model of a recipe, without storage."""
    try:
        with torch.device("meta"):
            return model_builder(architecture)(**model_args)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"create_model could not build {architecture!r} again ({error}); save the model's state_dict() with "
            "torch.save instead, or give its builder to medgmae.register_model"
        ) from error


def model_readme(config: Mapping[str, Any], repo_id: str | None = None) -> str:
    """A model card in the hub's format for a configuration that :func:`model_config` made.

    Args:
        config: the configuration.
        repo_id: hub repository that the usage example names; ``None`` for the folder itself.
    """
    from huggingface_hub import ModelCardData

    card = config["weight_card"] or {}
    data = ModelCardData(
        license=card.get("license"),
        library_name="medgmae",
        pipeline_tag=config["task"],
        tags=["medical-imaging", "3d", "masked-autoencoder"],
    )
    source = f"{HUB_PREFIX}{repo_id}" if repo_id else "local-dir:."
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id or config['architecture']}",
        f"A `{config['architecture']}`, saved by medgmae {config['library_version']}.",
        f'```python\nimport medgmae\n\nmodel = medgmae.create_model("{source}").eval()\n```',
    ]
    if config["model_args"]:
        parts.append("Built with " + ", ".join(f"`{key}={value!r}`" for key, value in config["model_args"].items()))
    if card:
        parts += [
            f"## Weights\n\nStarted from `{' '.join(card['tag'].replace('`', '').split())}`.",
            *_card_sections(card),
        ]
    return "\n\n".join(parts) + "\n"


def _card_sections(card: Mapping[str, Any]) -> list[str]:
    sections = []
    titles = {"page": "Source", "license": "Licence", "training_data": "Training data", "notes": "Notes"}
    for name, title in titles.items():
        if card.get(name):
            sections.append(f"**{title}:** {_plain(card[name])}")
    if card.get("input"):
        stated = {key: value for key, value in card["input"].items() if value not in (None, [])}
        rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in stated.items())
        sections.append(f"## Input\n\n| | |\n|---|---|\n{rows}")
    if card.get("citation"):
        sections.append(f"## Citation\n\n{_plain(card['citation'])}")
    return sections


def _cell(value: Any) -> str:
    return _plain(value) if isinstance(value, str) else f"`{json.dumps(value)}`"


def _plain(text: str) -> str:
    """Text of a card, which may be a stranger's, on one line and without a meaning in Markdown and HTML; addresses stay
    links."""
    words = [
        word if re.fullmatch(r"https?://[\w./:~#?=&%+,;-]+", word) else re.sub(r"([\\`*_\[\]<>|&#!~])", r"\\\1", word)
        for word in text.split()
    ]
    return " ".join(words)


def _origin(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """The card without where to fetch it: hashes and addresses are those of another file.

    Without a card an empty object and not null: timm then says that it does not know the architecture.
    """
    if card is not None and not isinstance(card, Mapping):
        raise WeightsError(
            f"model.pretrained_cfg is a {type(card).__name__}, expected a weight card's dictionary or {{}}"
        )
    plain = {name: None if name in _SOURCES else value for name, value in (card or {}).items()}
    if plain:
        WeightCard.from_saved(_as_json(plain), "model.pretrained_cfg", __version__)  # or it could not be loaded again
    return plain


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as safetensors can hold it: dense, contiguous, no memory shared between two names."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            kind = "a tensor without values" if isinstance(value, Tensor) else type(value).__name__
            raise WeightsError(f"{name}: {kind} cannot be saved; give every entry of the state values (dense tensors)")
        value = value.detach()
        storage = value.untyped_storage()
        whole = value.is_contiguous() and storage.nbytes() == value.nbytes
        if not whole or storage.data_ptr() in seen:
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        tensors[name] = value
    return tensors


def _check_rebuilds(config: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless ``config`` builds the model again: what was changed by hand would be lost."""
    if not hasattr(model, "options"):
        return  # a module of the caller's own
    again: Any = _built(config["architecture"], config["model_args"])
    described: Any = model
    before = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    after = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    before |= _flat(again.options())
    after |= _flat(described.options())
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed:
        raise WeightsError(
            f"the model is not what create_model({config['architecture']!r}) with its options builds and could not be "
            f"loaded again: {', '.join(changed[:6])} changed. Use create_model's options, reset_classifier, or "
            "set_input_size of the whole model instead of replacing parts, or save your own state_dict()"
        )
    described_model(config, tensors, "the model")  # its bounds are those of loading


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _write_files(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "pt", "medgmae": json.dumps(config)})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / README_FILE).write_text(model_readme(config), encoding="utf-8")
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors makes files that only the owner may read
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
