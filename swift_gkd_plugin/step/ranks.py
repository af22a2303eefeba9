"""What the ranks of a run have to say to each other about rows: few, small collective calls, the same on both back ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..world import exchange_objects, from_all, world_size

T = TypeVar('T')


@dataclass(frozen=True)
class Ranks:
    """Which ranks have rows of their own, and which work on the same ones. Every method is a collective call of all ranks.

    Attributes:
        device: Where the tensors of a collective call have to be.
        owners: The group of ranks that hold each row once (data parallelism); None for all ranks of the run.
        sharing: The group of ranks with the same rows as this one (tensor, context and pipeline parallelism); None for this rank alone.
    """

    device: torch.device
    owners: Any = None
    sharing: Any = None

    @property
    def sharers(self) -> int:
        """How many ranks work on the rows of this one."""
        return dist.get_world_size(self.sharing) if self.sharing is not None else 1

    @property
    def owner(self) -> int:
        """Of the owners, which one this rank is."""
        return dist.get_rank(self.owners) if world_size() > 1 else 0

    @property
    def asks(self) -> bool:
        """Whether it is this rank that asks for all with the same rows."""
        return self.sharing is None or dist.get_rank(self.sharing) == 0

    def totals(self, values: list[int]) -> list[int]:
        """Sums over the rows of all owners."""
        if world_size() == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, group=self.owners)
        return tensor.tolist()

    def anywhere(self, value: int) -> int:
        """The sum over all ranks of the run."""
        if world_size() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def gathered(self, lines: list[T]) -> list[T]:
        """The lines of all owners, in the order of their ranks."""
        return list(itertools.chain.from_iterable(from_all(lines, self.owners)))

    def of_owners(self, thing: T) -> list[T]:
        """What each owner has, in the order of their ranks."""
        return from_all(thing, self.owners)

    def exchanged(self, outgoing: list[T]) -> list[T]:
        """Something for each owner and something from each, in the order of their ranks."""
        return exchange_objects(outgoing, self.device, self.owners)

    def shared(self, make: Callable[[], T]) -> T:
        """What the first of the ranks with the same rows makes, on all of them."""
        if self.sharers == 1:
            return make()
        found = [make() if self.asks else None]
        dist.broadcast_object_list(found, dist.get_global_rank(self.sharing, 0), group=self.sharing)
        return found[0]

    def largest(self, values: list[int]) -> list[int]:
        """The largest of each number over the ranks with the same rows."""
        if self.sharers == 1 or not values:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.sharing)
        return tensor.tolist()

    def among_sharers(self, thing: T) -> list[T]:
        """What each of the ranks with the same rows has, in the order of their ranks."""
        return [thing] if self.sharers == 1 else from_all(thing, self.sharing)

    def at_most(self, value: int) -> int:
        """The largest of a number over all ranks of the run."""
        if world_size() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)
