"""Numbers that are logged: sums and counts over tokens, samples and seconds, added up over micro-batches and ranks.

A mean of means would weigh short micro-batches too much, so only sums travel and the division comes last. Nothing is moved to the
host before the numbers are asked for.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .world import from_all, world_size

# Types of devices: MPS has none, HCCL does not reduce it.
WITHOUT_FLOAT64 = ('mps', 'npu')


def widest(device: torch.device) -> torch.dtype:
    """In which numbers are added up there."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


class Sum:
    """Numbers, as they come, and tensors on their device: in float64, or in two parts of fp32, together as exact as 48 bits."""

    def __init__(self):
        self.known, self.parts = 0.0, ()

    def add(self, amount, device: torch.device) -> None:
        if not isinstance(amount, torch.Tensor):
            self.known += amount
            return
        amount = amount.to(device, widest(device), non_blocking=True)
        if not self.parts:
            self.parts = (amount.clone(),) if amount.dtype == torch.float64 else (amount.clone(), torch.zeros_like(amount))
        elif amount.dtype == torch.float64:
            self.parts[0].add_(amount)
        else:
            high, low = self.parts
            total = high + amount
            added = total - high
            self.parts = total, low + ((high - (total - added)) + (amount - added))  # what rounding took away (Knuth's TwoSum)


class Metrics:
    """Named ratios ``sum / count`` and named totals, over all ranks.

    Args:
        device: Where the sums of tensors are kept.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, Sum] = defaultdict(Sum)
        self._counts: dict[str, Sum] = defaultdict(Sum)
        self._clocks: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, name: str, total, count=1.0) -> None:
        """Add ``total`` to the numerator and ``count`` to the denominator of ``name``; numbers or scalar tensors without gradient."""
        self._sums[name].add(total, self.device)
        self._counts[name].add(count, self.device)

    def total(self, name: str, amount: float) -> None:
        """Add ``amount`` to a total over all ranks. If one rank calls it between two calls of :meth:`pop`, all of them do."""
        self.add(name, amount, 0)
        self._counts[name].known = 1 / world_size()

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

        A rank may have had nothing to add for a name.
        """
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._clocks[name] += start.elapsed_time(end) / 1000
        mine = self._on_host(), dict(self._clocks)
        everyone = from_all(mine)
        for store in (self._sums, self._counts, self._clocks, self._events):
            store.clear()
        result = {}
        for name in sorted({name for ratios, _ in everyone for name in ratios}):
            total, count = (math.fsum(ratios[name][i] for ratios, _ in everyone if name in ratios) for i in (0, 1))
            if count > 0:
                result[name] = total / count
        for name in sorted({name for _, clocks in everyone for name in clocks}):
            result[name] = max(clocks.get(name, 0.0) for _, clocks in everyone)
        return result

    def _on_host(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each name of this rank."""
        sums = [store[name] for name in self._sums for store in (self._sums, self._counts)]
        parts = [part for one in sums for part in one.parts]
        values = iter(torch.stack(parts).tolist() if parts else ())
        totals = [one.known + sum(next(values) for _ in one.parts) for one in sums]
        return {name: (totals[2 * i], totals[2 * i + 1]) for i, name in enumerate(self._sums)}
