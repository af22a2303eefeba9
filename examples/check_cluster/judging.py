"""What a run left behind, and the judgements about it. Standard library only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

STEPS = 3
# Relative differences that rounding may make over these steps.
BOUNDS = {'float32': 1e-4, 'bfloat16': 0.05}

LAST_WORDS = 300  # characters of an error that go into the table


@dataclass(frozen=True)
class Run:
    """A configuration that has run.

    Attributes:
        name: Of the configuration.
        directory: With its output, its logs and what its ranks told.
        on_gpus: False in a dry run.
        dtype: Of weights and products: ``float32`` or ``bfloat16``.
        teacher_bytes: Of the teacher's weights on the disk, in fp32.
    """

    name: str
    directory: Path
    on_gpus: bool
    dtype: str
    teacher_bytes: int = 0

    @property
    def output(self) -> str:
        path = self.directory / 'output.log'
        return path.read_text(errors='replace') if path.exists() else ''

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def values(self, key: str) -> list[float]:
        """A logged number, step by step."""
        return [row[key] for row in self.lines('logging.jsonl') if key in row]

    @property
    def losses(self) -> list[float]:
        return self.values('loss')

    @property
    def peaks(self) -> list[int]:
        """Bytes, one for each rank and device that it sees."""
        return [json.loads(path.read_text()) for path in self.directory.glob('peak-*.json')]

    @property
    def peak(self) -> Optional[int]:
        return max(self.peaks, default=None)


# Returns what is wrong, or None. The second run is the one that the configuration is compared with, if there is one.
Check = Callable[[Run, Optional[Run]], Optional[str]]


def finite(run: Run) -> Optional[str]:
    if len(run.losses) != STEPS:
        return f'{len(run.losses)} losses of {STEPS} steps'
    wrong = [loss for loss in run.losses if not math.isfinite(loss) or loss < 0]
    return f'a loss of {wrong[0]}' if wrong else None


def difference(run: Run, other: Run, within: Optional[float] = None) -> float:
    """The largest relative difference of a loss or of a gradient's norm, evaluations included.

    Args:
        within: What the configuration allows on GPUs: where other answers may come out, norms of their gradients are not compared.
    """
    keys = ('loss', 'eval_loss', 'grad_norm')[: None if within is None else 2]
    pairs = [pair for key in keys for pair in zip(run.values(key), other.values(key), strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-8) for a, b in pairs)


def bound(run: Run, other: Run, within: Optional[float]) -> float:
    """What the difference may be."""
    if within is not None and run.on_gpus:
        return within
    return BOUNDS['float32' if run.dtype == other.dtype == 'float32' else 'bfloat16']


# --- what a configuration is asked besides ---


def frugal(run: Run, other: Optional[Run]) -> Optional[str]:
    """Its highest rank reserves no more than that of the other run."""
    if not run.on_gpus or run.peak is None or other.peak is None:
        return None
    return f'reserves {gib(run.peak)}, {other.name} {gib(other.peak)}' if run.peak > other.peak else None


def spares_half_the_teacher(run: Run, other: Optional[Run]) -> Optional[str]:
    if not run.on_gpus or run.peak is None or other.peak is None:
        return None
    spared = other.peak - run.peak
    return None if spared >= run.teacher_bytes / 2 else f'spares {gib(spared)} of a teacher of {gib(run.teacher_bytes)}'


def uses_two_devices(run: Run, other: Optional[Run]) -> Optional[str]:
    used = sum(peak > 1 << 20 for peak in run.peaks)
    return None if used == 2 else f'{used} devices are used'


def moves_the_teacher(run: Run, other: Optional[Run]) -> Optional[str]:
    moved = run.values('teacher/moved_gib')
    return None if len(moved) == STEPS and min(moved) > 0 else f'teacher/moved_gib {moved}'


def moves_the_optimizer(run: Run, other: Optional[Run]) -> Optional[str]:
    """Its moments are there from the second step on."""
    moved = run.values('optimizer/moved_gib')
    return None if len(moved) == STEPS and min(moved[1:]) > 0 else f'optimizer/moved_gib {moved}'


def teaches_nothing(run: Run, other: Optional[Run]) -> Optional[str]:
    """The first loss of a teacher that is a copy of the student."""
    return None if run.losses[0] < 1e-6 else f'a first loss of {run.losses[0]:.3g} between a model and its copy'


def student_answers(run: Run, other: Optional[Run]) -> Optional[str]:
    shares, speeds = run.values('source/student'), run.values('generation/tokens_per_second')
    if shares != [1] * STEPS:
        return f'source/student {shares}'
    return None if len(speeds) == STEPS and min(speeds) > 0 else f'generation/tokens_per_second {speeds}'


def teacher_answers(run: Run, other: Optional[Run]) -> Optional[str]:
    shares = run.values('source/teacher')
    return None if shares == [1] * STEPS else f'source/teacher {shares}'


def runs_ahead(run: Run, other: Optional[Run]) -> Optional[str]:
    """Responses come from weights that are one update old, those of the first step excepted."""
    ages = {line['step']: line['step'] - 1 - line['gen_step'] for line in run.lines('completions.jsonl')}
    expected = {step: min(step - 1, 1) for step in range(1, STEPS + 1)}
    return None if ages == expected else f'updates between weights and their use, by step: {ages}'


def few_batches_of_the_teacher(run: Run, other: Optional[Run]) -> Optional[str]:
    batches = run.values('teacher/batches')
    return None if len(batches) == STEPS and max(batches) == 1 else f'teacher/batches {batches}, one holds all rows of a step'


def engine_sleeps(run: Run, other: Optional[Run]) -> Optional[str]:
    """vLLM says in its log what it gives back."""
    if not run.on_gpus:
        return None  # there is nothing to give back
    logs = [path.read_text(errors='replace') for path in run.directory.glob('teacher_engine_rank*.log')] or [run.output]
    freed = [[float(x) for x in re.findall(r'Sleep mode freed ([\d.]+) GiB', log)] for log in logs]
    good = all(len(times) >= STEPS and min(times) > 1 for times in freed)
    return None if good else f'GiB that sleeping engines gave back: {freed}'


# --- words ---


def gib(size: float) -> str:
    return f'{size / 2**30:.2f} GiB'


def last_words(output: str) -> str:
    """The line of an output that says most about why a command failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith('swift-gkd-plugin: ')]
    # What torchrun says afterwards is that a rank has failed.
    errors = [line for line in lines if re.match(r'(\[rank\d+\]: *)?[\w.]*(Error|Exception|Interrupt)\b.*', line)]
    errors = [line for line in errors if 'ChildFailedError' not in line]
    return (ours or errors or lines or ['no output'])[-1][:LAST_WORDS]


def missing_module(error: str) -> Optional[str]:
    """The package that an error names as missing."""
    found = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", error)
    package = found and found.group(1).split('.')[0]
    return None if package in ('swift', 'swift_gkd_plugin') else package
