"""What ``medgmae verify`` runs on scans: names and shapes cannot show a wrong order of tokens or axes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medgmae
from medgmae.cli.common import megabytes

if TYPE_CHECKING:
    import torch

MASKS = (0, 1)
"""Seeds of the masks under which hidden patches are filled."""
CLEAR = 1.2
"""The loss in the wrong order of tokens over that in the right one must be at least this."""
TOLERANCE = 0.001
"""Of the features in a new card; other processors and numbers of threads change less."""
EXAMPLES = {"CT": "ct_thorax.nii.gz", "MR": "mr_brain_t1.nii.gz"}


@dataclass
class Check:
    """One check of weights on a scan.

    Attributes:
        name: of the check and, where it is of one scan, of that.
        said: what was found, in words.
        passed: whether it is as it should be; None where nothing to compare with is known.
        numbers: what was measured.
        seconds: how long it took.
        peak_bytes: the most memory that the process had needed by its end; None where the system does not say.
    """

    name: str
    said: str = ""
    passed: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int | None = None

    def __str__(self) -> str:
        outcome = {True: "passed", False: "FAILED", None: "not compared"}[self.passed]
        return f"{outcome}: {self.said} ({self.seconds:.1f} s, peak {megabytes(self.peak_bytes)})"


def example_scans(card: medgmae.WeightCard) -> list[Path]:
    """The example scans of a checkout, that of the card's modality first; none where the package is installed alone."""
    folder = Path(__file__).parents[2] / "examples/data"
    modalities = list((card.trained_on or {}).get("modalities", []))
    names = sorted(EXAMPLES, key=lambda name: modalities.index(name) if name in modalities else len(modalities))
    return [folder / EXAMPLES[name] for name in names if (folder / EXAMPLES[name]).is_file()]


def run_checks(found: medgmae.Verification, scans: Sequence[Path]) -> list[Check]:
    """The card's own check on the first scan, then the features of all of them, in float32.

    Raises:
        WeightsError: the file does not fill the model of a check.
        VolumeError: a scan cannot be read.
    """
    card, checks = found.card, []
    if card.input is None or not scans:
        return []
    if card.acceptance is not None:
        run = {"reconstruction": _reconstruction, "orientation": _orientation}[card.acceptance["check"]]
        with _measured(f"{card.acceptance['check']} of {scans[0].name}") as check:
            run(check, found, scans[0])
        checks.append(check)
    model = _filled(found, card.architecture, card.token_order, card.model_args)
    for scan in scans:
        with _measured(f"features of {scan.name}") as check:
            _features(check, card, model, scan)
        checks.append(check)
    return checks


def known_features(checks: Sequence[Check]) -> dict[str, Any] | None:
    """The field ``features`` of a card, of what the checks found."""
    scans = {check.name.removeprefix("features of "): check.numbers for check in checks if "pooled" in check.numbers}
    return {"tolerance": TOLERANCE, "scans": scans} if scans else None


def _reconstruction(check: Check, found: medgmae.Verification, scan: Path) -> None:
    """The loss over hidden patches, in the card's order of tokens and in the other, and that of a constant."""
    card = found.card
    x = _prepared(card, scan)[None]
    spec = card.acceptance or {}
    orders = [card.token_order]
    if card.token_order is not None:
        orders += [order for order in ("raster", "swapped") if order != card.token_order]
    losses, constant = [], 0.0
    for order in orders:
        model = _filled(found, spec["model"], order, {})
        losses.append(sum(_loss(model, x, seed) for seed in MASKS) / len(MASKS))
        constant = sum(_constant_loss(model, x, seed) for seed in MASKS) / len(MASKS)
    check.passed = losses[0] < constant
    check.numbers = {"loss": losses[0], "loss_of_the_visible_mean": constant}
    check.said = f"loss {losses[0]:.4g} over hidden patches, that of the visible voxels' mean {constant:.4g}"
    if len(losses) > 1:
        ratio = losses[1] / losses[0]
        check.passed &= ratio >= CLEAR
        check.numbers |= {"loss_in_the_other_order": losses[1], "ratio": ratio}
        check.said += (
            f"; in the card's token order {orders[0]!r}, {losses[1]:.4g} in {orders[1]!r}: {ratio:.3g} times, expected "
            f"at least {CLEAR}"
        )


def _loss(model: Any, x: torch.Tensor, seed: int) -> float:
    import torch

    with torch.no_grad():
        return float(model(x, masking=_masking(model, x, seed)).loss)


def _constant_loss(model: Any, x: torch.Tensor, seed: int) -> float:
    """Of filling every hidden voxel with the mean of the visible ones."""
    hidden = _masking(model, x, seed).mask.bool()
    patches = medgmae.patchify(x, model.patch_size)
    return float((patches[hidden] - patches[~hidden].mean()).square().mean())


def _masking(model: Any, x: torch.Tensor, seed: int) -> medgmae.Masking:
    import torch

    count = math.prod(n // p for n, p in zip(x.shape[2:], model.patch_size, strict=True))
    return medgmae.random_masking(1, count, model.mask_ratio, generator=torch.Generator().manual_seed(seed))


def _orientation(check: Check, found: medgmae.Verification, scan: Path) -> None:
    """Pooled features in both orientations; numbers alone do not say which of them the weights were trained in."""
    import torch

    card, spec = found.card, found.card.acceptance or {}
    model = _filled(found, card.architecture, card.token_order, {**card.model_args, **spec["model_args"]})
    own = (card.input or {})["orientation"]
    vectors = {}
    for orientation in (own, spec["other"]):
        volume = medgmae.create_transform({**(card.input or {}), "orientation": orientation})(scan)
        head: Any = "projected" if "projection_dim" in spec["model_args"] else None
        vectors[orientation] = medgmae.extract_features(model, volume, overlap=0.0, head=head).pooled
    first, second = vectors.values()
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    check.numbers = {"cosine": cosine, "vectors": {name: vector.tolist() for name, vector in vectors.items()}}
    lengths = ", ".join(f"{name} {float(vector.norm()):.4g}" for name, vector in vectors.items())
    check.said = f"lengths of the pooled vectors: {lengths}; their cosine {cosine:.4f}. {spec['decides']}"


def _features(check: Check, card: medgmae.WeightCard, model: Any, scan: Path) -> None:
    """A few numbers of the features of what the card's input cuts out of a scan, and those of the card."""
    volume = medgmae.create_transform(card.input)(_with_channels(card, scan))
    features = medgmae.extract_features(model, volume, overlap=0.0)
    # Of a patch off all diagonals of the grid, so that axes that are exchanged or turned show.
    d, h, w = (round(share * (n - 1)) for share, n in zip((0.25, 0.5, 0.75), features.map.data.shape[1:], strict=True))
    check.numbers = {"pooled": _some(features.pooled), "patch": _some(features.map.data[:, d, h, w])}
    check.said = ", ".join(f"{name} {value}" for name, value in check.numbers.items())
    known = (card.features or {"scans": {}})["scans"].get(scan.name)
    if known is not None:
        apart = _apart(known, check.numbers)
        check.passed = apart <= card.features["tolerance"]  # type: ignore[index]
        check.said += f"; {apart:.2g} from the card's {dict(known)}, expected up to {card.features['tolerance']}"  # type: ignore[index]


def _apart(known: Mapping[str, Sequence[float]], numbers: Mapping[str, Sequence[float]]) -> float:
    """The largest difference by the largest of the six numbers, or of lengths by the length."""
    worst = 0.0
    for name, new in numbers.items():
        old = known[name]
        scale = max(map(abs, old[:-1]))
        worst = max(
            worst,
            abs(new[-1] - old[-1]) / old[-1],
            *(abs(a - b) / scale for a, b in zip(new[:-1], old[:-1], strict=True)),
        )
    return worst


def _some(vector: torch.Tensor) -> list[float]:
    """Six numbers of a vector, spread over it, and its length."""
    places = [round(i * (len(vector) - 1) / 5) for i in range(6)]
    return [float(f"{value:.6g}") for value in [*vector[places].tolist(), float(vector.norm())]]


def _prepared(card: medgmae.WeightCard, scan: Path) -> torch.Tensor:
    return medgmae.create_transform(card.input)(_with_channels(card, scan)).data


def _with_channels(card: medgmae.WeightCard, scan: Path) -> medgmae.Volume:
    """A scan as every channel of the card's input: for the numbers of a model it need not be the right contrast."""
    volume = medgmae.read_volume(scan)
    channels = int((card.input or {}).get("channels") or 1)
    return volume if volume.channels == channels else medgmae.data.stack_channels([volume] * channels)


def _filled(found: medgmae.Verification, architecture: str, order: str | None, options: Mapping[str, Any]) -> Any:
    """The model of an architecture with the file's weights, in float32 and for evaluation."""
    wanted = found.card.hub_file[1]
    path = f"{found.path}::{wanted}" if wanted else str(found.path)
    made: dict[str, Any] = {"checkpoint_path": path, "token_order": order, **options}
    return medgmae.create_model(architecture, **made).float().eval()


@contextmanager
def _measured(name: str) -> Iterator[Check]:
    check, start = Check(name), time.perf_counter()
    yield check
    check.seconds, check.peak_bytes = time.perf_counter() - start, _peak_bytes()


def _peak_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
