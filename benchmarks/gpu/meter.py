"""Time and memory on the device: CUDA's events and torch's allocator on a GPU, the wall clock on a CPU."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

WARM_UP = 3
SECONDS = 1.5  # that the repeats of a measurement may take
LEAST, MOST = 5, 40  # repeats
# Written before each repeat: more than an L2 cache, and long enough for the step's first launches to be queued behind it.
FLUSHED_BYTES = 512 << 20
NEEDED = ('torch', 'swift_gkd_plugin', 'divergence_reference')


class NotHere(Exception):
    """What cannot be measured on this machine, or with this version, and why."""


class Meter:
    def __init__(self, device: str, tiny: bool, scratch: Path):
        self.scratch = scratch
        self.device, self.tiny = torch.device(device, 0) if device == 'cuda' else torch.device(device), tiny
        self.cuda = device == 'cuda'
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit('torch sees no GPU')
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.flushed: torch.Tensor | None = None

    def fresh(self) -> None:
        """As if nothing had been run before: what a case reserves is its own."""
        self.flushed = None
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the GPU still does what it is told, after an error."""
        if not self.cuda:
            return True
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return float(torch.ones(2, device=self.device).sum()) == 2
        except Exception:
            return False

    @staticmethod
    def failure(error: Exception) -> dict:
        """The row of what could not be measured."""
        if isinstance(error, ModuleNotFoundError) and error.name.split('.')[0] not in NEEDED:
            return {'status': 'not installed', 'why': error.name}
        if isinstance(error, NotHere):
            return {'status': 'not here', 'why': str(error)}
        text = ' '.join(str(error).split()) or repr(error)
        return {'status': 'failed', 'why': f'{type(error).__name__}: {text}'[:300]}

    def flush(self) -> None:
        if not self.cuda:
            return
        if self.flushed is None:
            self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        self.flushed.zero_()

    def measure(self, step: Callable[[], object], repeats: int | None = None, kept: int = 0) -> dict:
        """Median and minimum of a step's time, and what it allocates at most beside what was there before it, and beside
        `kept` bytes that it was asked for.

        What the step returns is dropped. Enough is run before to have kernels compiled and memory reserved.
        """
        for _ in range(1 if self.tiny else WARM_UP):
            step()
        self.wait()
        start = time.perf_counter()
        step()
        self.wait()
        once = time.perf_counter() - start
        if repeats is None:
            repeats = 1 if self.tiny else max(LEAST, min(MOST, int(SECONDS / once)))
        found, extra = [], 0
        for _ in range(repeats):
            ms, more = self._once(step)
            found.append(ms)
            extra = max(extra, more - kept)
        row = {'ms': _round(statistics.median(found)), 'ms_min': _round(min(found)), 'repeats': repeats}
        if self.cuda:
            row |= {'extra_gb': round(extra / 1e9, 4), 'reserved_gb': self.reserved_gb()}
        return row

    def reserved_gb(self) -> float:
        """All that torch's allocator holds at most, but for the buffer that `flush` writes."""
        flushed = 0 if self.flushed is None else FLUSHED_BYTES
        return round((torch.cuda.max_memory_reserved() - flushed) / 1e9, 3) if self.cuda else 0.0

    def _once(self, step) -> tuple[float, int]:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return 1000 * (time.perf_counter() - start), 0
        torch.cuda.synchronize()
        self.flush()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), torch.cuda.max_memory_allocated() - before

    def span(self):
        return Span(self)


class Span:
    """The time between two points of a stream: `span.start()`, `span.end()`, and after `meter.wait()` `span.ms`."""

    def __init__(self, meter: Meter):
        self.cuda = meter.cuda
        if self.cuda:
            self.points = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        else:
            self.points = [0.0, 0.0]

    def start(self) -> None:
        self._set(0)

    def end(self) -> None:
        self._set(1)

    def _set(self, which: int) -> None:
        if self.cuda:
            self.points[which].record()
        else:
            self.points[which] = time.perf_counter()

    @property
    def ms(self) -> float:
        first, last = self.points
        return first.elapsed_time(last) if self.cuda else 1000 * (last - first)


def _round(ms: float) -> float:
    return float(f'{ms:.5g}')
