"""An evaluation: the mean over all trained tokens of a whole set, however it is batched.

No coin is tossed, and no row stands in for another: the set stays what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from swift.utils import get_logger

from ..sources import DATASET, STUDENT
from . import teaching
from .answers import Answers
from .backend import Backend
from .books import Books
from .data import Row
from .rewarding import Rewarding
from .said import Few, in_one_line
from .samples import InTurn, Sample, SampleEncoder

logger = get_logger()


class Evaluation:
    """
    Args:
        backend: What runs it.
        encoder: Tells whether a row fits.
        answers: Who answers, with ``--gkd_eval_source`` student or teacher.
        books: Where it is booked.
        taught: Makes micro-batches of samples that have their responses, with what the teacher says about them; a collective call.
        has_divergence: Whether a teacher looks at them.
        rewarding: Measures what the student's responses are worth; None if nobody asks.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: SampleEncoder,
        answers: Answers,
        books: Books,
        taught: Callable[[list[list[Sample]]], InTurn],
        has_divergence: bool,
        rewarding: Rewarding | None,
    ):
        self.backend, self.ranks, self.source = backend, backend.ranks, backend.args.gkd_eval_source
        self.encoder, self.answers, self.books, self.taught = encoder, answers, books, taught
        self.has_divergence = has_divergence
        self.rewarding = rewarding if self.source == STUDENT else None
        self._left_out = Few('times a row of an evaluation set could not be encoded')

    def of(self, rows: Iterable[list[Row]], at_once: int) -> dict[str, float]:
        """As :meth:`.conductor.Conductor.evaluate`."""
        with self.books.of_evaluation() as metrics:
            tokens, count, left_out = self._counted(iter(rows), at_once)
            means = metrics.pop()
        if left_out:
            limit = self.encoder.template.max_length
            logger.warning(f'{left_out} rows of the evaluation set cannot be encoded (--max_length {limit}) and are left out.')
        found = {'loss': means.get('loss', 0.0)}
        if self.has_divergence:
            found['divergence'] = means.get('divergence', 0.0)
        found |= {name: value for name, value in means.items() if name == 'reward' or name.startswith('rewards/')}
        return {**found, 'cross_entropy': means.get('all_cross_entropy', 0.0), 'tokens': tokens, 'rows': count}

    def _counted(self, rows: Iterator[list[Row]], at_once: int) -> list[int]:
        """Numbers of trained tokens, of rows and of rows that were left out, over all ranks."""
        numbers = [0, 0, 0]
        for samples in self._together(self._answered(rows, at_once, numbers)):
            batches = self.taught(samples)
            with torch.no_grad():
                self.backend.run(batches)
            numbers[0] += sum(batch.num_tokens for batch in batches.counted)
        return self.ranks.totals(numbers)

    def _answered(self, rows: Iterator[list[Row]], at_once: int, numbers: list[int]) -> Iterator[list[list[Sample]]]:
        """Micro-batches with their responses, those that are answered together at a time; rows are counted."""
        for number in itertools.count():
            part = list(itertools.islice(rows, at_once))
            if not part:
                return
            self.answers.cycle_key = -1, number  # the same at every evaluation
            samples = [[self._sample(row) for row in micro_batch] for micro_batch in part]
            counted = [sample for one in samples for sample in one if sample.row.counts]
            self._leave_out_what_does_not_fit(counted)
            answered = [sample for sample in counted if sample.row.counts]
            if self.source != DATASET:
                self.answers.by_source[self.source](answered)
            if self.rewarding is not None:
                self.rewarding.measure(answered)
            numbers[1] += len(answered)
            numbers[2] += len(counted) - len(answered)
            yield samples

    def _together(self, parts: Iterator[list[list[Sample]]]) -> Iterator[list[list[Sample]]]:
        """Micro-batches that the teacher looks at in one visit: a part, or where its weights come for it as many as may be kept."""
        waiting, kept = [], 0
        for part in parts:
            more = self._kept(part)
            if waiting and kept + more > teaching.KEPT_BYTES:
                yield waiting
                waiting, kept = [], 0
            waiting, kept = waiting + part, kept + more
            if kept >= teaching.KEPT_BYTES:
                yield waiting
                waiting, kept = [], 0
        if waiting:
            yield waiting

    def _kept(self, part: list[list[Sample]]) -> int:
        """Bytes that stay of a part, as if every token were trained: its encoded rows wait too, with their images."""
        per_token = self.backend.kept_per_token
        if per_token is None:
            return teaching.KEPT_BYTES
        return self.ranks.at_most(per_token * sum(self.encoder.teacher_length(sample) for one in part for sample in one))

    def _sample(self, row: Row) -> Sample:
        if row.prepared is not None:
            return row.prepared.leave_shared_memory()
        return Sample(row, row.content, self.source if row.counts else DATASET)

    def prepared(self, row: Row) -> Row:
        """As :meth:`.cycle.Cycle.prepared`, for a row of the evaluation set."""
        sample = self._sample(row)
        try:
            if not sample.fits:
                self.encoder.check(sample)
        except Exception:  # see Cycle._attempts; said where all ranks hear of it
            return row
        if sample.encoded is not None:
            self.encoder.views(sample)
        return replace(row, prepared=sample)

    def _leave_out_what_does_not_fit(self, samples: list[Sample]) -> None:
        failed = []
        for sample in samples:
            try:
                if not sample.fits:
                    self.encoder.check(sample)
            except Exception as error:  # see Cycle._attempts
                self._left_out.say(f'evaluation: {sample} cannot be encoded: {in_one_line(error)}')
                failed.append(1)
            else:
                failed.append(0)
        for sample, anywhere in zip(samples, self.ranks.largest(failed), strict=True):
            if anywhere:
                sample.leave_out()
