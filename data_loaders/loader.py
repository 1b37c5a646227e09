"""Batches by number: batch k of a run is a pure function of (data, seed, k), on any rank, worker or restart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm.types import Batch


@runtime_checkable
class BatchSource(Protocol):
    """A set of examples that can make a batch of any of them."""

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """The examples at these positions as one batch; random augmentation draws from torch's generator."""
        ...


def step_seed(seed: int, micro_batch: int, purpose: str) -> int:
    """A seed for one micro-batch of a run. It does not depend on rank, so any number of processes draws the same."""
    digest = hashlib.sha256(f"{seed} {micro_batch} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class TrainOrder:
    """Examples in endless shuffled passes, cut into micro-batches.

    Every example appears exactly once a pass; a batch may hold the end of one pass and the beginning of the next.
    """

    num_examples: int
    batch_size: int
    seed: int

    def positions(self, micro_batch: int) -> list[int]:
        """Positions of the examples of micro-batch number `micro_batch`, counted over all ranks."""
        first = micro_batch * self.batch_size
        return [self._at(number) for number in range(first, first + self.batch_size)]

    def _at(self, number: int) -> int:
        epoch, place = divmod(number, self.num_examples)
        return int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> torch.Tensor:
        if _PERMUTATION.get("of") != (self, epoch):
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, "order"))
            _PERMUTATION.update(of=(self, epoch), value=torch.randperm(self.num_examples, generator=generator))
        return _PERMUTATION["value"]  # type: ignore[return-value]


_PERMUTATION: dict[str, object] = {}  # the last one made in this process; order is asked for pass by pass


class _Numbered(Dataset[Batch]):
    """Micro-batch number -> batch, with torch's generator seeded by the number around the augmentation."""

    def __init__(self, source: BatchSource, order: Callable[[int], Sequence[int]], seed: int) -> None:
        self.source, self.order, self.seed = source, order, seed

    def __getitem__(self, micro_batch: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step_seed(self.seed, micro_batch, "augmentation"))
            return self.source.batch(self.order(micro_batch))


class _Numbers(Sampler[int]):
    """The micro-batch numbers of one rank from `first` on."""

    def __init__(self, numbers: range, first: int) -> None:
        self.numbers, self.first = numbers, first

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers[self.first :])

    def __len__(self) -> int:
        return len(self.numbers)  # Lightning counts the batches before a restart too


def train_loader(
    source: BatchSource,
    batch_size: int,
    seed: int,
    num_batches: int,
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Micro-batches `rank`, `rank + world_size`, ... of the run, `num_batches` a rank, from the `first_batch`-th on.

    A run that is resumed after `first_batch` batches sees exactly what it would have seen, and reads nothing of what
    it has already consumed.
    """
    order = TrainOrder(len(source), batch_size, seed)
    numbers = range(rank, num_batches * world_size, world_size)
    dataset = _Numbered(source, order.positions, seed)
    return _loader(dataset, _Numbers(numbers, first_batch), num_workers)


def evaluation_loader(
    source: BatchSource,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    even: bool = False,
) -> DataLoader[Batch]:
    """Every example once, shared out among the ranks; the last batch may be short.

    `even` gives every rank as many by repeating a few from the start, for loops in which the ranks meet at each batch.
    """
    count = len(source)
    end = -(-count // world_size) * world_size if even else count
    mine = [position % count for position in range(rank, end, world_size)]

    def order(number: int) -> list[int]:
        return mine[number * batch_size : (number + 1) * batch_size]

    numbers = range(-(-len(mine) // batch_size))
    return _loader(_Numbered(source, order, 0), _Numbers(numbers, 0), num_workers)


def _loader(dataset: _Numbered, sampler: _Numbers, num_workers: int) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,
    )
