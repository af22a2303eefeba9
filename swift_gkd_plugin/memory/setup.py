"""What a run is made of, as far as memory goes, whatever trains it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..arguments import engine_scores
from .estimates import Rows
from .sizes import ModelSize
from .table import GENERATION, PHASES, TEACHER, Part
from .verdict import Card

# Share of a card that vLLM takes unless it is told.
VLLM_SHARE = 0.9


@dataclass(frozen=True)
class Engines:
    """vLLM on the card of a rank.

    Attributes:
        student: Share of the card that the student's colocated engine takes; None without it.
        sleeps: Whether it leaves the card outside its turn.
        teacher: Share that the engine of ``--gkd_teacher_engine vllm`` takes; None without it.
        awake: The phases in which that one does not sleep.
    """

    student: float | None = None
    sleeps: bool = False
    teacher: float | None = None
    awake: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Any) -> Engines:
        """Args: ms-swift's arguments."""
        teacher = _share(args.gkd_teacher_engine_args) if args.gkd_teacher_engine == 'vllm' else None
        awake = (TEACHER,) * engine_scores(args) + (GENERATION,) * bool(args.seq_kd)
        return cls(
            args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == 'colocate' else None,
            args.sleep_level > 0,
            teacher,
            awake if teacher is not None else (),
        )

    @property
    def phases(self) -> set[str]:
        """Those that a step has because of them."""
        return {*self.awake, *([GENERATION] if self.student is not None else [])}

    def asleep(self, card: Card | None) -> int:
        """Bytes that the student's engine leaves to others outside its turn."""
        return int(self.student * card.bytes) if self.student is not None and self.sleeps and card is not None else 0

    def parts(self, card: Card | None) -> Iterable[Part]:
        """Of the card at most: a part of the share is for activations, which are not always there."""
        if card is not None and self.student is not None:
            yield Part('vLLM', int(self.student * card.bytes), (GENERATION,) if self.sleeps else PHASES, False)
        if card is not None and self.teacher is not None:
            yield Part("the teacher's engine", int(self.teacher * card.bytes), self.awake, False)

    def not_counted(self, card: Card | None) -> Iterable[str]:
        if card is None and (self.student is not None or self.teacher is not None):
            yield 'vLLM, whose share of no card is known'


def _share(line: str) -> float:
    """Of the card, by vLLM's own command line."""
    words = shlex.split(line.replace('=', ' '))
    name = '--gpu-memory-utilization'
    return float(words[words.index(name) + 1]) if name in words[:-1] else VLLM_SHARE


@dataclass(frozen=True)
class Setup:
    """
    Attributes:
        student: The model that is trained.
        teacher: A separate one that is loaded into the training processes; None for none.
        rows: Of a rank.
        scores: Whether a teacher in the training processes, or an engine beside them, scores.
        topk: ``--gkd_logits_topk``.
        extrapolates: Whether the student's base is looked at beside the teacher.
        engines: Beside them.
        card: None where none is to be compared with.
    """

    student: ModelSize
    teacher: ModelSize | None
    rows: Rows
    scores: bool
    topk: int | None
    extrapolates: bool
    engines: Engines
    card: Card | None


def visiting(bytes: int, in_turn: int, answers: bool, sure: bool) -> Iterable[Part]:
    """The weights of a teacher that comes from the host to look, and to answer.

    Args:
        in_turn: What has left by the time that it answers, and was there while the student did.
    """
    yield Part('teacher weights, visiting', bytes, (TEACHER,), sure)
    if answers:
        yield Part('teacher weights, visiting to answer', max(bytes - in_turn, 0), (GENERATION,), False)
