"""A generation cycle: rows draw their sources and get their responses, and what of it a checkpoint has to keep.

What is left of a cycle when a checkpoint is written is stored in it as JSON, with the token ids of the responses and what a teacher's
server said while it answered, and is neither generated nor asked for again.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import numpy
import torch

from .. import sources
from ..arguments import OptionError
from ..responses import Response
from ..rewards import Reward
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..teachers.server import MEDIA, Scores, TeacherServerError
from ..world import this_rank, world_size
from .data import Row
from .ranks import Ranks
from .said import Few, in_one_line
from .samples import Sample, SampleEncoder

MAX_REPLACEMENTS = 50
STATE_VERSION = 4  # 3: a row may have stood in for itself; 2: kept neither the number of cycles nor which row stood in
READABLE = (2, 3, STATE_VERSION)

# What ms-swift's rollout sets in its samples.
FROM_ROLLOUT = ('messages', 'response_token_ids', 'response_loss_mask', 'finish_reason', 'add_eos')

# Fills in the responses of samples that all drew the same source; called on every rank, with none on some.
Answer = Callable[[list[Sample]], None]


class Unanswered(Exception):
    """A teacher server gave up in the middle of a cycle; the cause says why.

    Attributes:
        samples: The cycle's micro-batches; some samples have their responses.
    """

    def __init__(self, samples: list[list[Sample]]):
        super().__init__()
        self.samples = samples


class Cycle:
    """Turns the rows of a cycle into samples with responses.

    Args:
        args: ms-swift's arguments.
        dataset: The loaded dataset, for rows that stand in for others.
        encoder: Tells whether a row fits.
        answers: Who answers, by source.
        ranks: Those with the same rows have to agree on which of them can't be encoded.

    Attributes:
        draw: The draws of the run; the order of the rows is made with the same.
    """

    def __init__(self, args, dataset, encoder: SampleEncoder, answers: dict[Source, Answer], ranks: Ranks):
        self.args, self.dataset, self.encoder, self.answers, self.ranks = args, dataset, encoder, answers, ranks
        self.draw = sources.Draw.of(args)
        self._replaced = Few('times a row could not be encoded: another one stood in, or it was left out of a stream')
        self._anything_fits = False
        self._gave_up = False  # in a worker process; the main process says why

    def drawn(self, micro_batches: list[list[Row]], cycle_key: tuple[int, int]) -> list[list[Sample]]:
        """Draw a source for each row and replace what can't be encoded; no responses yet. A collective call.

        Args:
            micro_batches: The rows of this rank.
            cycle_key: (optimizer step, number of the cycle in it), for ``--gkd_source_per batch``.
        """
        return self.checked([[self._sample(row, source) for row, source in self._kept(rows, cycle_key)] for rows in micro_batches])

    @staticmethod
    def _sample(row: Row, source: Source) -> Sample:
        return Sample(row, row.content, source) if row.prepared is None else row.prepared.leave_shared_memory()

    def prepared(self, row: Row) -> Row:
        """The row with its sample: drawn, replaced if it can't be encoded, and encoded as far as that can be done without a response. Rows
        come to :meth:`drawn` with it or without; where they are read in worker processes, this is done there, ahead of time."""
        if self._gave_up or not (row.counts and self.draw.per_sample):
            return row
        sample = Sample(row, row.content, self._source(row, (0, 0)))
        if sample.source == DATASET and row.repeat:
            return row  # it will be dropped
        try:
            self._attempts(sample, 0)
        except OptionError:  # said where all ranks hear of it
            self._gave_up = True
            return row
        if sample.source == DATASET:
            self.encoder.views(sample)
        return replace(row, prepared=sample)

    def answer(self, micro_batches: list[list[Sample]]) -> list[list[Sample]]:
        """Responses for the samples that have none. Every rank calls it, for an answer may be a collective call.

        Raises:
            Unanswered: On every rank.
        """
        waiting = [s for samples in micro_batches for s in samples if s.row.counts and s.response is None]
        try:
            for source in (STUDENT, TEACHER):
                if source in self.answers:
                    self.answers[source]([sample for sample in waiting if sample.source == source])
        except TeacherServerError as error:
            raise Unanswered(micro_batches) from error
        return micro_batches

    def _kept(self, rows: list[Row], cycle_key: tuple[int, int]) -> list[tuple[Row, Source]]:
        """A micro-batch's rows with their sources. Where the cycle draws for all of its rows (``--gkd_source_per batch``), the order could
        not know which come once (``--gkd_num_samples``): repeats of a response of the dataset are dropped here, and a micro-batch without
        any other row keeps one as a filler."""
        drawn = [(row, self._source(row, cycle_key)) for row in rows]
        kept = [(row, source) for row, source in drawn if source != DATASET or row.repeat == 0]
        return kept or [(rows[0].filler(), DATASET)]

    def _source(self, row: Row, cycle_key: tuple[int, int]) -> Source:
        if not row.counts:
            return DATASET
        return self.draw.source(row.epoch, row.number) if self.draw.per_sample else self.draw.source(*cycle_key, purpose='cycle')

    def checked(self, micro_batches: list[list[Sample]]) -> list[list[Sample]]:
        """The samples with content that can be encoded for their sources: their own, or another row's. A collective call.

        What one of the ranks with the same rows can't encode (an image whose host does not answer it, say), none of them trains on.
        """
        attempts = [[s.attempt if s.fits else self._attempts(s, s.attempt) for s in samples] for samples in micro_batches]
        while (agreed := self._most_attempts(attempts)) is not None:
            attempts = [
                [mine if mine == most else self._attempts(sample, most) for sample, mine, most in zip(*both, strict=True)]
                for both in zip(micro_batches, attempts, agreed, strict=True)
            ]
        for sample in itertools.chain.from_iterable(micro_batches):
            self._say(sample)
        return micro_batches

    def _say(self, sample: Sample) -> None:
        """Tell of a sample that had to be replaced.

        Raises:
            OptionError: Nothing of a stream has fitted so far.
        """
        self._anything_fits |= sample.row.counts
        if sample.unfit is None:
            return
        if sample.row.counts:
            number, epoch, _ = sample.row.key
            other = sources.replacement_row(self.args.seed, epoch, number, sample.attempt - 1, len(self.dataset))
            self._replaced.say(f'{sample.of_row()} cannot be encoded, row {other} stands in: {sample.unfit}')
            return
        self._replaced.say(f'{sample.of_row()} is left out, it cannot be encoded: {sample.unfit}')
        if self._replaced.count > MAX_REPLACEMENTS and not self._anything_fits:
            raise OptionError(
                f'--dataset: none of the first {self._replaced.count} rows of the stream can be encoded (the last: {sample.unfit}); '
                f'{self._what_to_do()}.'
            )

    def _what_to_do(self) -> str:
        limit = self.encoder.template.max_length
        return 'correct the rows' if limit is None else f'raise --max_length {limit}, or correct the rows'

    def _most_attempts(self, attempts: list[list[int]]) -> list[list[int]] | None:
        """The largest of each number over the ranks with the same rows; None, on each of them, if they have the same numbers."""
        flat = list(itertools.chain.from_iterable(attempts))
        found = self.ranks.largest([*flat, *(-number for number in flat)])
        most, least = found[: len(flat)], [-number for number in found[len(flat) :]]
        return None if most == least else _like(attempts, most)

    def _attempts(self, sample: Sample, attempt: int) -> int:
        """Find content for the sample: its own (attempt 0) or another row's (1, 2, …), the first from this attempt on that fits.

        Returns:
            The attempt that it took.

        Raises:
            OptionError: None fits.
        """
        errors: list[Exception] = []
        others: set[int] = set()
        row, streams = sample.row, not hasattr(self.dataset, '__len__')
        if attempt:
            sample.unfit = sample.unfit or 'on another rank, or when it was drawn'
        for number in range(attempt, 1 + (MAX_REPLACEMENTS if streams or len(self.dataset) > 1 else 0)):
            if number and streams:
                sample.leave_out()
            elif number:
                other = sources.replacement_row(self.args.seed, row.epoch, row.number, number - 1, len(self.dataset))
                sample.content, sample.attempt, sample.views = self.dataset[other], number, None
                others.add(other)
            if not sample.row.counts:
                return number
            try:
                self.encoder.check(sample)
            except Exception as error:  # as ms-swift's resampling: templates raise anything on a broken image or an over-long row
                errors.append(error)
                sample.unfit = sample.unfit or in_one_line(error)
            else:
                return number
        kinds = ', '.join(f'{count} x {name}' for name, count in Counter(type(error).__name__ for error in errors).items())
        raise OptionError(
            f'--dataset: {sample.of_row()} and {len(others)} other rows, drawn to stand in for it, cannot be encoded '
            f'({kinds}; the last: {in_one_line(errors[-1]) if errors else sample.unfit}); {self._what_to_do()}.'
        )


def _like(nested: list[list[int]], flat: list[int]) -> list[list[int]]:
    """The numbers of a flat list, in lists of the same lengths."""
    numbers = iter(flat)
    return [list(itertools.islice(numbers, len(part))) for part in nested]


def dated(micro_batches: list[list[Sample]], step: int, student_at: int | None = None) -> list[Sample]:
    """Note when the responses that have no date yet were generated, and return their samples.

    Args:
        step: Optimizer steps that are done.
        student_at: Those that were done when the student was asked, if that was earlier (``--gkd_prefetch``).
    """
    new = [s for samples in micro_batches for s in samples if s.response is not None and s.generated_at is None]
    for sample in new:
        sample.generated_at = student_at if student_at is not None and sample.source == STUDENT else step
    return new


def state_of(ready: list[list[Sample]], drawn: int) -> dict[str, Any]:
    """What a checkpoint keeps of the micro-batches that wait for their optimizer step.

    Args:
        drawn: Cycles that this step has drawn already, for the numbers of the next ones.
    """

    def one(sample: Sample) -> dict[str, Any]:
        number, epoch, repeat = sample.row.key
        state = {'row': number, 'epoch': epoch, 'repeat': repeat, 'counts': sample.row.counts, 'source': sample.source}
        if sample.attempt:
            state['attempt'] = sample.attempt
        if sample.response is not None:
            state['token_ids'], state['finish_reason'] = sample.response.token_ids, sample.response.finish_reason
            state['generated_at'] = sample.generated_at
        if sample.reward is not None:
            state['reward'] = astuple(sample.reward)
        if sample.feedback is not None:
            state['feedback'] = sample.feedback
        if sample.old_logprobs is not None:
            state['old_logprobs'] = sample.old_logprobs.tolist()
        if sample.scores is not None:
            state['scores'] = _packed(sample.scores)
        if sample.generated is not None:
            infos = sample.generated.rollout_infos  # of a scheduler's own
            media = [name for name in MEDIA if name in infos]
            state['generated'] = {name: getattr(sample.generated, name) for name in (*FROM_ROLLOUT, *media)}
            state['rollout_infos'] = {name: value for name, value in infos.items() if name not in media and _fits_json(value)}
        return state

    micro_batches = [list(map(one, samples)) for samples in ready]
    return {'version': STATE_VERSION, 'world_size': world_size(), 'cycles': drawn, 'micro_batches': micro_batches}


def _fits_json(value: Any) -> bool:
    """Whether it comes back as it was; a tuple would be a list then, and the number that is a key a text."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _packed(scores: Scores) -> dict[str, Any]:
    """As JSON that is a third larger than the numbers: 0.5 MB for 512 tokens with 64 log-probabilities each."""
    parts = {'logprobs': scores.logprobs.astype('<f4'), 'ids': scores.ids.astype('<i4')}
    return {'shape': scores.ids.shape, **{name: base64.b64encode(part.tobytes()).decode() for name, part in parts.items()}}


def _unpacked(packed: dict[str, Any]) -> Scores:
    def numbers(name: str, dtype: str) -> numpy.ndarray:
        return numpy.frombuffer(base64.b64decode(packed[name]), dtype).reshape(packed['shape'])

    return Scores(numbers('logprobs', '<f4').astype(numpy.float32), numbers('ids', '<i4').astype(numpy.int64))


def restored(cycle: Cycle, state: dict[str, Any], micro_batches: list[list[Row]]) -> list[list[Sample]]:
    """The samples of :func:`state_of`, on the same rows.

    Raises:
        OptionError: The rows are others than those of the checkpoint: the dataset, its order or the batch size changed.
    """
    kept_rows = [[(one['row'], one['epoch'], one['repeat']) for one in kept] for kept in state['micro_batches']]
    # Rows that were dropped, see Cycle._kept, are dropped again.
    found_rows = [[row for row in rows if row.repeat == 0 or row.key in kept] for rows, kept in zip(micro_batches, kept_rows, strict=False)]
    if kept_rows != [[row.key for row in rows] for rows in found_rows]:
        raise OptionError(
            f'--resume_from_checkpoint: the checkpoint has responses for (row, epoch, repeat) {kept_rows}, the data gives '
            f'{[[row.key for row in rows] for rows in micro_batches]}; use the same dataset, seeds, batch sizes and --num_train_epochs, or '
            '--ignore_data_skip true.'
        )
    result = cycle.checked(
        [
            [
                # What stood in for a row still does, even if the row could be encoded now: the response belongs to it.
                Sample(row if one['counts'] else row.filler(), row.content, one['source'], attempt=_attempt(cycle, state, one))
                for row, one in zip(rows, kept, strict=True)
            ]
            for rows, kept in zip(found_rows, state['micro_batches'], strict=True)
        ]
    )
    for samples, kept in zip(result, state['micro_batches'], strict=True):
        for sample, one in zip(samples, kept, strict=True):
            if 'token_ids' in one:
                sample.response = Response(one['token_ids'], one['finish_reason'])
                sample.generated_at = one['generated_at']
            if 'scores' in one:
                sample.scores = _unpacked(one['scores'])
            if 'reward' in one:
                parts, *rest = one['reward']
                sample.reward = Reward(tuple(parts), *rest)
            if 'feedback' in one:
                sample.take_feedback(one['feedback'])
            if 'old_logprobs' in one:
                sample.old_logprobs = torch.tensor(one['old_logprobs'])
            if 'generated' in one:
                sample.generated = cycle.encoder.inner(sample)
                for name, value in one['generated'].items():
                    setattr(sample.generated, name, value)
                media = {name: value for name, value in one['generated'].items() if name in MEDIA}
                sample.generated.rollout_infos = {**one.get('rollout_infos', {}), **media}
    # A teacher server may have failed in the middle of the cycle.
    unanswered = any(s.row.counts and s.source != DATASET and s.response is None for samples in result for s in samples)
    return cycle.answer(result) if cycle.ranks.anywhere(int(unanswered)) else result


def _attempt(cycle: Cycle, state: dict[str, Any], kept: dict[str, Any]) -> int:
    """Which row's content a kept response belongs to, as :attr:`Sample.attempt`."""
    attempt = kept.get('attempt', 0)
    drawn = (kept['epoch'], kept['row'], attempt - 1, len(cycle.dataset)) if attempt and state['version'] < STATE_VERSION else None
    return 0 if drawn and sources.drew_itself(cycle.args.seed, *drawn) else attempt


def _path(checkpoint: str) -> str:
    return os.path.join(checkpoint, f'gkd_cycle_rank{this_rank()}.json')


def save(checkpoint: str, ready: list[list[Sample]], drawn: int) -> None:
    """Write this rank's part of the cycle in flight, if there is one, in the place of what an earlier run has left."""
    path = _path(checkpoint)
    if not ready:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    os.makedirs(checkpoint, exist_ok=True)
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        json.dump(state_of(ready, drawn), file)
    os.replace(f'{path}.part', path)


def load(checkpoint: str) -> dict[str, Any] | None:
    """This rank's part of a cycle in flight; None if there was none.

    Raises:
        OptionError: It was written by another number of ranks or another version of the format.
    """
    path = _path(checkpoint)
    if not os.path.isfile(path):
        return None
    with open(path, encoding='utf-8') as file:
        state = json.load(file)
    state.setdefault('cycles', 0)
    version = state['version'] if state['version'] in READABLE else STATE_VERSION
    for name, value in (('version', version), ('world_size', world_size())):
        if state[name] != value:
            raise OptionError(
                f'--resume_from_checkpoint {checkpoint}: its responses in flight have {name} {state[name]}, this run has '
                f'{value}; resume on the same number of ranks, or delete gkd_cycle_rank*.json to generate them again.'
            )
    return state


def stop_together(error: TeacherServerError | None, ranks: Ranks, step: int) -> None:
    """Raise on every rank if a teacher server has given up on one. A collective call.

    Args:
        error: This rank's.

    Raises:
        TeacherServerError: With this rank's reason, or naming the number of other ranks that failed.
    """
    failed = ranks.anywhere(int(error is not None))
    if failed:
        raise error or TeacherServerError(f'The teacher server of {failed} other ranks gave up at step {step}.')
