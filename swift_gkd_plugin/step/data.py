"""Rows with their numbers, in an order that depends on the seed and the epoch only, shared out to the ranks without losing one.

ms-swift's own samplers drop the remainder of a dataset (``len // world_size``) and, with ``steps_per_generation``, most of a
stream; both hand over bare rows. Here each row carries the number that :mod:`swift_gkd_plugin.sources` draws from, and comes as often
as it has responses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from swift.dataloader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader

from ..sources import Draw
from ..world import this_rank

T = TypeVar('T')

ONCE = Draw()  # every row comes once


@dataclass(frozen=True)
class Row:
    """One row of the dataset on its way to a sample.

    Attributes:
        number: The row's number in the loaded dataset, or its position in the stream.
        epoch: The pass over the data that it belongs to.
        content: The row itself, as the dataset gives it.
        counts: False for a filler: a copy that keeps the ranks in step and must not weigh anywhere.
        repeat: Which of the prompt's ``--gkd_num_samples`` responses this is for, from 0.
        prepared: What :meth:`~swift_gkd_plugin.step.cycle.Cycle.prepared` has made of it.
    """

    number: int
    epoch: int
    content: dict[str, Any] = field(repr=False)
    counts: bool = True
    repeat: int = 0
    prepared: Any = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> tuple[int, int, int]:
        return self.number, self.epoch, self.repeat

    def filler(self) -> Row:
        return replace(self, counts=False, prepared=None)


class NumberedRows(torch.utils.data.Dataset):
    """A dataset with a length, indexed by (epoch, number, counts, repeat).

    Args:
        prepare: What is done to a row where it is read, in a worker process if the loader has any.
    """

    def __init__(self, dataset, prepare: Callable[[Row], Row] | None = None):
        self.dataset, self.prepare = dataset, prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, bool, int]) -> Row:
        epoch, number, counts, repeat = key
        row = Row(number, epoch, self.dataset[number], counts, repeat)
        return row if self.prepare is None else self.prepare(row)


def share_out(rows: list[T], batch_size: int, world_size: int, rank: int) -> list[list[tuple[T, bool]]]:
    """Micro-batches of one rank: consecutive rows go to the ranks in turn, so that any split of a step holds the same rows.

    A rank that gets nothing of what remains at the end gets one filler, for all ranks have to run the same number of micro-batches.

    Returns:
        One list per micro-batch with (row, counts).
    """
    batches = []
    for start in range(0, len(rows), batch_size * world_size):
        part = rows[start : start + batch_size * world_size]
        batches.append([(row, True) for row in part[rank::world_size]] or [(part[0], False)])
    return batches


class RowBatchSampler:
    """Batches of keys for :class:`NumberedRows`: this rank's share of the epoch's order.

    Trainers count on epochs of one length. Where the draws give each pass over the data another number of responses, the passes are one
    long sequence, an "epoch" is the next ``responses`` places of it, wherever that begins in a pass, and the keys name the true pass.
    So ``epochs`` of them hold all responses of as many passes, and fewer than ``epochs`` places of what comes after those.

    Args:
        num_rows: Length of the dataset.
        batch_size: Rows of one micro-batch of one rank.
        seed: Seed of the order; None keeps the order of the dataset.
        draw: Tells how often each row comes, one after the other.
        epochs: Epochs that the run is meant to last.
        skip: Micro-batches of the first epoch that are left out (a resumed run).
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int | None,
        draw: Draw = ONCE,
        epochs: float = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ):
        self.num_rows, self.batch_size, self.seed, self.draw = num_rows, batch_size, seed, draw
        self.responses = draw.epoch_length(num_rows, epochs)
        self.drop_last, self.rank, self.world_size, self.skip = drop_last, rank, world_size, skip
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        global_batch = self.batch_size * self.world_size
        total = self.responses // global_batch if self.drop_last else -(-self.responses // global_batch)
        return max(total - self.skip, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, bool, int]]]:
        window = self.draw.window(self.num_rows, self.epoch * self.responses, self.responses)
        order = torch.cat([self._pass(epoch)[part] for epoch, part in window])
        size = self.batch_size * self.world_size
        for batch in range(self.skip, self.skip + len(self)):
            (mine,) = share_out(order[batch * size : (batch + 1) * size].tolist(), self.batch_size, self.world_size, self.rank)
            yield [(epoch, number, counts, repeat) for (epoch, number, repeat), counts in mine]

    def _pass(self, epoch: int) -> torch.Tensor:
        """The responses of a pass over the data in their order, as (epoch, number, repeat)."""
        if self.seed is None:
            order = torch.arange(self.num_rows)
        else:
            order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + epoch))
        times = torch.tensor([self.draw.repeats(epoch, number) for number in order.tolist()], dtype=torch.int64)
        numbers = order.repeat_interleave(times)
        repeats = torch.arange(len(numbers)) - (times.cumsum(0) - times).repeat_interleave(times)
        return torch.stack((torch.full_like(numbers, epoch), numbers, repeats), 1)


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


class StreamOfRows(DataLoaderDispatcher):
    """Micro-batches from a dataset without a length: the first rank reads and numbers, all ranks get their share, those with the same rows
    the same one.

    A training stream starts again when it ends, as a new epoch with new numbers; a shorter last batch is used, not thrown away.

    Args:
        batch_size: Rows of one micro-batch of one rank.
        draw: Tells how often each row comes, one after the other.
        rank: Which share this rank gets.
        world_size: How many shares there are.
        shares: Which one each rank of the run gets; None for its own.
        endless: Start again when the stream ends.
        skip: Micro-batches that are left out (a resumed run).
    """

    def __init__(
        self,
        dataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shares: list[int] | None = None,
        draw: Draw = ONCE,
        skip: int = 0,
        endless: bool = True,
        **loader_options,
    ):
        loader = DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, **loader_options)
        super().__init__(loader, device=None, skip_batches=skip)
        self.batch_size, self._world_size, self._endless = batch_size, world_size, endless
        self._shares = list(range(world_size)) if shares is None else shares
        self._reads = rank == 0 if shares is None else this_rank() == 0
        self._draw = draw

    def _rows(self) -> Iterator[Row]:
        for epoch in itertools.count() if self._endless else (0,):
            super().set_epoch(epoch)
            number = -1
            for number, content in enumerate(self.base_dataloader):
                for repeat in range(self._draw.repeats(epoch, number)):
                    yield Row(number, epoch, content, repeat=repeat)
            if number < 0:
                raise ValueError('--streaming: the stream holds no row; check --dataset.')

    def _global_batches(self) -> Iterator[list[list[Row]]]:
        size = self.batch_size * self._world_size
        for _, epoch_rows in itertools.groupby(self._rows(), key=lambda row: row.epoch):
            while part := list(itertools.islice(epoch_rows, size)):
                shares = [share_out(list(range(len(part))), self.batch_size, self._world_size, r)[0] for r in range(self._world_size)]
                yield [[part[i] if counts else part[i].filler() for i, counts in share] for share in shares]

    def set_epoch(self, epoch: int) -> None:
        """The stream counts its own epochs: transformers calls every ``max_steps`` one epoch."""

    def __iter__(self) -> Iterator[list[Row]]:
        batches = itertools.islice(self._global_batches(), self.skip_batches, None) if self._reads else None
        ranks = len(self._shares)
        while True:
            shares = next(batches, None) if self._reads else None
            everyone = [None] * ranks if shares is None else [shares[share] for share in self._shares]
            if ranks > 1:
                mine: list[Any] = [None]
                dist.scatter_object_list(mine, everyone, src=0)
            else:
                mine = everyone
            if mine[0] is None:
                return
            yield mine[0]


def worker_options(args, cycle_length: int = 1) -> dict[str, Any]:
    """Options of a loader whose workers read the rows (``--dataloader_num_workers`` and what belongs to it).

    Args:
        cycle_length: Micro-batches that are wanted at once. The workers have as many ready, whatever ``--dataloader_prefetch_factor`` says.
    """
    workers = args.dataloader_num_workers
    if workers == 0:
        return {'num_workers': 0}
    prefetch = max(args.dataloader_prefetch_factor, -(-cycle_length // workers))
    return {'num_workers': workers, 'persistent_workers': args.dataloader_persistent_workers, 'prefetch_factor': prefetch}


def row_loader(
    dataset,
    batch_size: int,
    *,
    seed: int | None,
    drop_last: bool,
    rank: int,
    world_size: int,
    draw: Draw = ONCE,
    epochs: float = 1,
    skip: int = 0,
    endless: bool = False,
    shares: list[int] | None = None,
    prepare: Callable[[Row], Row] | None = None,
    **loader_options,
):
    """The loader of one rank; each item is the list of :class:`Row` of one micro-batch.

    Args:
        dataset: ms-swift's loaded dataset, with or without a length.
        seed: Seed of the order of a dataset with a length; None keeps its order.
        draw: Tells how often each row comes, one after the other.
        epochs: Epochs that the run is meant to last.
        skip: Micro-batches of this rank that an earlier run has trained on.
        endless: Start a dataset without a length again when it ends.
        shares: Which rank's rows each rank of the run gets of a dataset without a length, where several get the same; None for its own.
        prepare: What is done to a row where it is read. Not to one of a stream, which one rank reads for all.
    """
    if hasattr(dataset, '__len__'):
        sampler = RowBatchSampler(
            len(dataset),
            batch_size,
            seed=seed,
            draw=draw,
            epochs=epochs,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            skip=skip,
        )
        return DataLoaderShard(NumberedRows(dataset, prepare), batch_sampler=sampler, collate_fn=list, **loader_options)
    how = {'shares': shares, 'draw': draw, 'skip': skip, 'endless': endless}
    return StreamOfRows(dataset, batch_size, rank=rank, world_size=world_size, **how, **loader_options)


def filled_up(micro_batches: Iterable[list[Row]], multiple: int) -> Iterator[list[Row]]:
    """Micro-batches, and after the last one as many fillers as it takes to a multiple."""
    count = 0
    for rows in micro_batches:
        yield rows
        count += 1
    for _ in range(-count % multiple):
        yield [rows[0].filler()]
