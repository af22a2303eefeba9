"""Numbers that are logged: sums and counts over tokens, samples and seconds, added up over micro-batches and ranks.

A mean of means would weigh short micro-batches too much, so only sums travel and the division comes last. Nothing is moved to the
host before the numbers are asked for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Metrics:
    """Named ratios ``sum / count`` and named totals, over all ranks.

    Args:
        device: Where the sums are kept and reduced.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
        self._counts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
        self._clocks: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, name: str, total, count=1.0) -> None:
        """Add ``total`` to the numerator and ``count`` to the denominator of ``name``; numbers or tensors without gradient."""
        self._sums[name] += torch.as_tensor(total, dtype=torch.float64).to(self.device, non_blocking=True)
        self._counts[name] += torch.as_tensor(count, dtype=torch.float64).to(self.device, non_blocking=True)

    def total(self, name: str, amount: float) -> None:
        """Add ``amount`` to a total over all ranks. If one rank calls it between two calls of :meth:`pop`, all of them do."""
        self.add(name, amount, 0)
        self._counts[name].fill_(1 / (dist.get_world_size() if dist.is_initialized() else 1))

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add what was timed elsewhere."""
        self._clocks[name] += seconds

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Time a block. On a GPU by events, so that no kernel has to be waited for."""
        if self.device.type == 'cuda':
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._clocks[name] += time.perf_counter() - begin

    def pop(self) -> dict[str, float]:
        """The ratios of all ranks together, and the seconds of the slowest one, since the last call. A collective call.

        Names must be known to every rank, so ranks that had nothing to add for a name are asked for it too.
        """
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._clocks[name] += start.elapsed_time(end) / 1000
        names, clocks = sorted(self._sums), sorted(self._clocks)
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        if distributed:
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (names, clocks))
            names = sorted(set().union(*(n for n, _ in everyone)))
            clocks = sorted(set().union(*(c for _, c in everyone)))
        if not names and not clocks:
            return {}
        ratios = (
            torch.stack([self._sums[n] for n in names] + [self._counts[n] for n in names]) if names else torch.zeros(0, device=self.device)
        )
        slowest = torch.tensor([self._clocks[n] for n in clocks], dtype=torch.float64, device=self.device)
        if distributed:
            dist.all_reduce(ratios)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        values = ratios.tolist()
        result = {n: values[i] / values[len(names) + i] for i, n in enumerate(names) if values[len(names) + i] > 0}
        result |= dict(zip(clocks, slowest.tolist(), strict=True))
        for store in (self._sums, self._counts, self._clocks):
            store.clear()
        self._events.clear()
        return result
