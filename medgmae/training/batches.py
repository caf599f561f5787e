"""The batches of a run: which crops an update sees and which of their patches are hidden, by its number alone."""

from __future__ import annotations

import signal
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medgmae.data import Crops, draws
from medgmae.layers.masking import Masking, random_masking
from medgmae.training.tables import expect

MASK = 1  # of the counters of a draw; crops have others


class Batch(Protocol):
    """Samples of one process, as a tuple of tensors.

    of: what each sample is, for error messages.
    """

    @property
    def of(self) -> list[str]:
        """See above."""

    def to(self, device: torch.device) -> Any:
        """The tensors on a device."""


class MaskedBatch(NamedTuple):
    """Crops of one process.

    x: (B, C, *size) float32.
    noise: (B, N), of which the masks are made, see :func:`~medgmae.random_masking`.
    of: what each crop is, for error messages.
    """

    x: Tensor
    noise: Tensor
    of: list[str]

    def to(self, device: torch.device) -> MaskedBatch:
        """The tensors on a device."""
        return MaskedBatch(self.x.to(device, non_blocking=True), self.noise.to(device, non_blocking=True), self.of)

    def masking(self, ratio: float) -> Masking:
        """The masks that the noise makes at a ratio."""
        batch, tokens = self.noise.shape
        return random_masking(batch, tokens, ratio=ratio, noise=self.noise)


class CaseBatch(NamedTuple):
    """Cases of one process.

    x: (B, K, C, *size) float32, K windows of each.
    targets: (B, T) float32.
    of: what each case is, for error messages.
    """

    x: Tensor
    targets: Tensor
    of: list[str]

    def to(self, device: torch.device) -> CaseBatch:
        """The tensors on a device."""
        return CaseBatch(self.x.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), self.of)


T = TypeVar("T", bound=Batch)


class Samples(Dataset[Any], Generic[T]):
    """Samples of a run: what a position gives, which counts on over the epochs, depends on the seed alone."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of an epoch."""

    @abstractmethod
    def stack(self, samples: Sequence[Any]) -> T:
        """One batch of samples."""


class MaskedCrops(Samples[MaskedBatch]):
    """Crops with the noise of their masks, drawn from (seed, epoch, index) as they are.

    Args:
        crops: of :class:`~medgmae.data.Crops`.
        patches: number N of patches of a crop.
        seed: of the masks.
    """

    def __init__(self, crops: Crops, patches: int, seed: int) -> None:
        self.crops, self.patches, self.seed = crops, patches, seed

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Position counts on over the epochs: (x, noise, what it is)."""
        sample = self.crops[position]
        noise = draws(self.seed, *divmod(position, len(self)), MASK).random(self.patches, dtype="float32")
        scan = self.crops.scans[sample["scan"]]
        return sample["x"], torch.from_numpy(noise), f"{scan.source} at {list(map(int, sample['start']))}"

    def stack(self, samples: Sequence[tuple[Tensor, Tensor, str]]) -> MaskedBatch:
        """One batch of samples.

        Raises:
            TrainingError: crops of several sizes.
        """
        x, noise, of = zip(*samples, strict=True)
        return MaskedBatch(stacked(x), torch.stack(noise), list(of))


def stacked(x: Sequence[Tensor]) -> Tensor:
    """Crops of one size as one tensor.

    Raises:
        TrainingError: crops of several sizes.
    """
    sizes = {tuple(one.shape) for one in x}
    expect(len(sizes) == 1, f"a batch has crops of {' and '.join(map(str, sorted(sizes)))}; expected one size")
    return torch.stack(list(x))


@dataclass(frozen=True)
class Share:
    """What one process does of every update.

    batch: crops per update, of all processes.
    rank, world: number of this process, and how many there are.
    micro: crops at once.
    """

    batch: int
    rank: int = 0
    world: int = 1
    micro: int = 1

    @property
    def passes(self) -> int:
        """Forward passes per update."""
        return self.batch // self.world // self.micro

    def positions(self, first: int, last: int) -> Iterator[list[int]]:
        """Positions of the crops of every pass, of updates ``first`` up to ``last``."""
        per_process = self.batch // self.world
        for update in range(first, last):
            start = update * self.batch + self.rank * per_process
            for at in range(start, start + per_process, self.micro):
                yield list(range(at, at + self.micro))


class _Positions:
    """A sampler of batches for torch's loader."""

    def __init__(self, share: Share, first: int, last: int) -> None:
        self.share, self.first, self.last = share, first, last

    def __iter__(self) -> Iterator[list[int]]:
        return self.share.positions(self.first, self.last)

    def __len__(self) -> int:
        return max(0, self.last - self.first) * self.share.passes


def load(samples: Samples[T], share: Share, first: int, last: int, workers: int, pin: bool) -> Iterator[T]:
    """The batches of updates ``first`` up to ``last``, as many per update as the share has passes."""
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=_Positions(share, first, last),
        num_workers=workers,
        collate_fn=samples.stack,
        pin_memory=pin,
        worker_init_fn=_leave_signals if workers else None,
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def _leave_signals(worker: int) -> None:
    """Let the process that trains decide when to stop: a terminal and SLURM send signals to all processes."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
