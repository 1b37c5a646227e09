"""Batches by number: batch k of a run is a pure function of (data, seed, k), on any rank, worker or restart."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm.errors import UserError
from vlm.types import Batch

READ_AHEAD = 4096  # examples: a shard of the usual size is on its way before it is needed


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


@runtime_checkable
class ShardedSource(BatchSource, Protocol):
    """A batch source that reads shards."""

    def shard_cuts(self) -> tuple[int, ...]:
        """The places among the examples at which another shard begins."""
        ...

    def read_ahead(self, positions: Sequence[int]) -> None:
        """Begin to fetch what the examples at these positions need, where it is remote."""
        ...


@dataclass(frozen=True)
class TrainOrder:
    """Examples in endless shuffled passes, cut into micro-batches.

    Every example appears exactly once a pass; a batch may hold the end of one pass and the beginning of the next.
    With `shuffle_shards`, and more shards than that, a pass goes through the shards in shuffled groups of so many, and
    through the examples of each group in shuffled order. Both are pure index arithmetic in the memory of one group.
    """

    num_examples: int
    batch_size: int
    seed: int
    shard_cuts: tuple[int, ...] = ()  # places at which another shard begins, ascending
    shuffle_shards: int | None = None  # None: every pass is one permutation of all examples

    def positions(self, micro_batch: int) -> list[int]:
        """Positions of the examples of micro-batch number `micro_batch`, counted over all ranks."""
        first, end = micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size
        found: list[int] = []
        while first < end:
            epoch, place = divmod(first, self.num_examples)
            starts, _ = _groups(self, epoch)
            group = bisect.bisect_right(starts, place) - 1
            start = place - starts[group]
            found += _group_order(self, epoch, group)[start : start + end - first].tolist()
            first = micro_batch * self.batch_size + len(found)
        return found


# Order is asked for group by group, and a little ahead: the last two of this process are enough.
@functools.lru_cache(maxsize=2)
def _groups(order: TrainOrder, epoch: int) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Where each group of shards begins in a pass, and the shards of each: (first, end) among the examples."""
    ends = (*order.shard_cuts, order.num_examples)
    shards = list(zip((0, *order.shard_cuts), ends, strict=True))
    size = order.shuffle_shards
    if size is None or len(shards) <= size:
        return [0], [[(0, order.num_examples)]]
    generator = torch.Generator().manual_seed(step_seed(order.seed, epoch, "shards"))
    shuffled = [shards[number] for number in torch.randperm(len(shards), generator=generator).tolist()]
    groups = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
    lengths = [sum(end - first for first, end in group) for group in groups]
    return [0, *itertools.accumulate(lengths[:-1])], groups


@functools.lru_cache(maxsize=2)
def _group_order(order: TrainOrder, epoch: int, group: int) -> torch.Tensor:
    """The examples of a group in the order of this pass. A single group is the permutation of all."""
    shards = _groups(order, epoch)[1][group]
    purpose = "order" if group == 0 else f"order {group}"
    generator = torch.Generator().manual_seed(step_seed(order.seed, epoch, purpose))
    shuffled = torch.randperm(sum(end - first for first, end in shards), generator=generator)
    return shuffled if shards == [(0, order.num_examples)] else torch.cat([torch.arange(*s) for s in shards])[shuffled]


@dataclass(frozen=True)
class EvaluationOrder:
    """The share of one rank, in the order of the source: every `world_size`-th example, cut into batches."""

    num_examples: int
    batch_size: int
    rank: int
    world_size: int
    even: bool  # as many for every rank, by repeating a few from the start

    @property
    def num_batches(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    @property
    def _mine(self) -> range:
        end = -(-self.num_examples // self.world_size) * self.world_size if self.even else self.num_examples
        return range(self.rank, end, self.world_size)

    def positions(self, batch: int) -> list[int]:
        """Positions of the examples of batch number `batch` of this rank; the last one may be short."""
        mine = self._mine[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [position % self.num_examples for position in mine]


@dataclass(frozen=True)
class _Failure:
    """What stopped a worker. As a value it keeps its one line; raised, it would come with the worker's trace."""

    message: str


class _Numbered(Dataset[Batch | _Failure]):
    """Micro-batch number -> batch, with torch's generator seeded by the number around the augmentation."""

    def __init__(self, source: BatchSource, order: TrainOrder | EvaluationOrder, seed: int, end: int) -> None:
        self.source, self.order, self.seed = source, order, seed
        self.end = end  # no micro-batch has this number
        self.ahead = -(-READ_AHEAD // order.batch_size)

    def __getitem__(self, micro_batch: int) -> Batch | _Failure:
        try:
            positions = self.order.positions(micro_batch)
            if isinstance(self.source, ShardedSource):  # what is needed now comes first, all of it at once
                later = micro_batch + self.ahead
                self.source.read_ahead([*positions, *(self.order.positions(later) if later < self.end else ())])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step_seed(self.seed, micro_batch, "augmentation"))
                return self.source.batch(positions)
        except UserError as error:
            return _Failure(str(error))


class _Batches(DataLoader[Any]):
    """A loader that raises what stopped a worker, as one line."""

    batches_of_step = 1

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # Lightning asks for no more than an iterator
        batches = map(_batch_or_error, super().__iter__())
        return batches if self.batches_of_step == 1 else _by_step(batches, self.batches_of_step)


def _batch_or_error(item: Batch | _Failure) -> Batch:
    if isinstance(item, _Failure):
        raise UserError(item.message)
    return item


def _by_step(batches: Iterator[Batch], batches_of_step: int) -> Iterator[Batch]:
    """The same batches; the first one of each step knows the others, which are read before it is handed over."""
    while step := list(itertools.islice(batches, batches_of_step)):
        step[0].later = tuple(step[1:])
        while step:  # what has been trained on is let go
            yield step.pop(0)


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
    shuffle_shards: int | None = None,
    batches_of_step: int = 1,
) -> DataLoader[Batch]:
    """Micro-batches `rank`, `rank + world_size`, ... of the run, `num_batches` a rank, from the `first_batch`-th on.

    A run that is resumed after `first_batch` batches sees exactly what it would have seen, and reads nothing of what
    it has already consumed. `batches_of_step`: that many of this rank make an optimizer step, and the first of them
    knows the others (`Batch.later`).
    """
    cuts = source.shard_cuts() if isinstance(source, ShardedSource) and shuffle_shards is not None else ()
    order = TrainOrder(len(source), batch_size, seed, cuts, shuffle_shards)
    numbers = range(rank, num_batches * world_size, world_size)
    dataset = _Numbered(source, order, seed, numbers.stop)
    loader = _loader(dataset, _Numbers(numbers, first_batch), num_workers)
    loader.batches_of_step = batches_of_step
    return loader


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
    order = EvaluationOrder(len(source), batch_size, rank, world_size, even)
    numbers = range(order.num_batches)
    return _loader(_Numbered(source, order, 0, numbers.stop), _Numbers(numbers, 0), num_workers)


def _loader(dataset: _Numbered, sampler: _Numbers, num_workers: int) -> _Batches:
    return _Batches(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,
    )
