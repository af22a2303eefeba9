"""What a replica of a teacher on a layout of its own is asked: micro-batches of several owners, packed rows of them in one forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# Tokens in a batch of the teacher's, if the student's are not half as large already.
TOKENS = 4096

# What packed rows of text consist of. Media have their places elsewhere, and padded rows a mask.
PACKED = {'input_ids', 'position_ids', 'seq_lens'}


@dataclass(frozen=True)
class Question:
    """A micro-batch as the teacher is asked about it.

    Attributes:
        teacher_inputs, teacher_index: Those of :class:`~..step.samples.MicroBatch`.
        kept: Which of its trained tokens this rank keeps the states of, because it hands them on or has asked itself.
    """

    teacher_inputs: dict[str, Any] = field(repr=False)
    teacher_index: torch.Tensor = field(repr=False)
    kept: tuple[slice, ...] = ()

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self.teacher_inputs['input_ids'].numel()

    @property
    def end_of_rows(self) -> int:
        """Of packed rows: where the added tokens begin, which are sequences of their own, with places from 0 as each row has them."""
        begins = (self.teacher_inputs['position_ids'][0] == 0).nonzero()[:, 0]
        rows = len(self.teacher_inputs['seq_lens'])
        return int(begins[rows]) if len(begins) > rows else self.size

    @property
    def is_packed_text(self) -> bool:
        ids, places = (self.teacher_inputs.get(name) for name in ('input_ids', 'position_ids'))
        return self.teacher_inputs.keys() == PACKED and len(ids) == 1 and places.shape == ids.shape

    def keeping(self, whole: bool) -> Question:
        """The same, all of it kept or nothing."""
        return replace(self, kept=(slice(0, len(self.teacher_index)),) if whole else ())


def together(questions: Sequence[Question], answered: Sequence[bool], tokens: int, at_least: int = 1) -> list[list[int]]:
    """Places of questions that one forward is for, in their order.

    Args:
        answered: Whether somebody wants to know; the others are fillers.
        tokens: Of a forward at most; a larger question is alone.
        at_least: So many forwards are wanted, to keep a pipeline busy.
    """
    if not all(question.is_packed_text for question in questions):
        return [[place] for place in range(len(questions))]
    places = [place for place, wanted in enumerate(answered) if wanted] or [0]
    if at_least > 1:
        tokens = min(tokens, -(-sum(questions[place].size for place in places) // at_least))
    groups: list[list[int]] = []
    for place in places:
        if groups and sum(questions[other].size for other in (*groups[-1], place)) <= tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def joined(questions: Sequence[Question]) -> Question:
    """Packed rows of several questions as one, in their order, and what was added to them behind all rows, where layers expect it that
    look at as many sequences as there are rows."""
    if len(questions) == 1:
        return questions[0]
    inputs, ends = [question.teacher_inputs for question in questions], [question.end_of_rows for question in questions]

    def of_all(name: str) -> torch.Tensor:
        halves = [one[name].tensor_split([end], 1) for one, end in zip(inputs, ends, strict=True)]
        return torch.cat([*(rows for rows, _ in halves), *(added for _, added in halves)], 1)

    tokens = list(itertools.accumulate(ends, initial=0))
    trained = list(itertools.accumulate((len(question.teacher_index) for question in questions), initial=0))
    return Question(
        {
            'input_ids': of_all('input_ids'),
            'position_ids': of_all('position_ids'),
            'seq_lens': [length for one in inputs for length in one['seq_lens']],
        },
        torch.cat([question.teacher_index + start for question, start in zip(questions, tokens, strict=False)]),
        tuple(
            slice(first + part.start, first + part.stop)
            for question, first in zip(questions, trained, strict=False)
            for part in question.kept
        ),
    )


@dataclass(frozen=True)
class Groups:
    """Questions in the forwards that answer them.

    Attributes:
        questions: All of them.
        groups: The places of those in each forward.
        count: Forwards that are run; the last one is repeated as a filler.
    """

    questions: Sequence[Question] = field(repr=False)
    groups: list[list[int]]
    count: int

    @property
    def batches(self) -> list[Question]:
        """One for each forward."""
        batches = [joined([self.questions[place] for place in group]) for group in self.groups]
        return batches + [batches[-1].keeping(False)] * (self.count - len(batches))

    def apart(self, found: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """[n, dim] of each question, of what the forwards found; empty where nothing of the teacher's last stage is on this rank."""
        if not found:
            return []
        answers: list[torch.Tensor | None] = [None] * len(self.questions)
        for group, states in zip(self.groups, found, strict=False):
            lengths = [sum(part.stop - part.start for part in self.questions[place].kept) for place in group]
            for place, part in zip(group, states.split(lengths), strict=True):
                answers[place] = part
        return answers
