"""What a run is made of, as far as memory goes, whatever trains it."""

from __future__ import annotations

from dataclasses import dataclass

from .estimates import Rows
from .sizes import ModelSize
from .verdict import Card


@dataclass(frozen=True)
class Setup:
    """
    Attributes:
        student: The model that is trained.
        teacher: A separate one that is loaded into the training processes; None for none.
        rows: Of a rank.
        scores: Whether a teacher in the training processes, or an engine beside them, scores.
        topk: ``--gkd_logits_topk``.
        vllm: Share of the card that the student's colocated engine takes; None without it.
        sleeps: Whether that engine leaves the card outside its turn.
        card: None where none is to be compared with.
    """

    student: ModelSize
    teacher: ModelSize | None
    rows: Rows
    scores: bool
    topk: int | None
    vllm: float | None
    sleeps: bool
    card: Card | None
