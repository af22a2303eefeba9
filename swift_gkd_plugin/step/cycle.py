"""A generation cycle: rows draw their sources and get their responses, and what of it a checkpoint has to keep.

A cycle is ``steps_per_generation`` micro-batches. What is left of one when a checkpoint is written is stored in it as JSON, with the
token ids of the responses, and is not generated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from swift.utils import get_logger

from .. import sources
from ..arguments import OptionError
from ..responses import Response
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..teachers.server import MEDIA, TeacherServerError
from .data import Row
from .samples import Sample, SampleEncoder

logger = get_logger()

MAX_REPLACEMENTS = 50
STATE_VERSION = 2

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
        args: The trainer's arguments.
        dataset: The loaded dataset, for rows that stand in for others.
        encoder: Tells whether a row fits.
        answers: Who answers, by source.

    Attributes:
        draw: The draws of the run; the order of the rows is made with the same.
    """

    def __init__(self, args, dataset, encoder: SampleEncoder, answers: dict[Source, Answer]):
        self.args, self.dataset, self.encoder, self.answers = args, dataset, encoder, answers
        self.draw = sources.Draw.of(args)

    def samples(self, micro_batches: list[list[Row]], cycle_key: tuple[int, int]) -> list[list[Sample]]:
        """Draw a source for each row, replace what can't be encoded, and generate.

        Args:
            micro_batches: The rows of this rank.
            cycle_key: (optimizer step, number of the cycle in it), for ``--gkd_source_per batch``.

        Raises:
            Unanswered: On every rank.
        """
        result = self.drawn(micro_batches, cycle_key)
        self.answer(result)
        return result

    def drawn(self, micro_batches: list[list[Row]], cycle_key: tuple[int, int]) -> list[list[Sample]]:
        """The same without responses."""
        return [self._drawn(rows, cycle_key) for rows in micro_batches]

    def answer(self, micro_batches: list[list[Sample]]) -> None:
        """Responses for the samples that have none. Every rank calls it, for an answer may be a collective call."""
        waiting = [s for samples in micro_batches for s in samples if s.row.counts and s.response is None]
        try:
            for source in (STUDENT, TEACHER):
                if source in self.answers:
                    self.answers[source]([sample for sample in waiting if sample.source == source])
        except TeacherServerError as error:
            raise Unanswered(micro_batches) from error

    def _drawn(self, rows: list[Row], cycle_key: tuple[int, int]) -> list[Sample]:
        """A micro-batch's rows with their sources. Where the cycle draws for all of its rows (``--gkd_source_per batch``), the order could
        not know which come once (``--gkd_num_samples``): repeats of a response of the dataset are dropped here, and a micro-batch without
        any other row keeps one as a filler."""
        drawn = [(row, self._source(row, cycle_key)) for row in rows]
        kept = [(row, source) for row, source in drawn if source != DATASET or row.repeat == 0]
        return [self.sample(row, source) for row, source in kept or [(rows[0].filler(), DATASET)]]

    def _source(self, row: Row, cycle_key: tuple[int, int]) -> Source:
        if not row.counts:
            return DATASET
        return self.draw.source(row.epoch, row.number) if self.draw.per_sample else self.draw.source(*cycle_key, purpose='cycle')

    def sample(self, row: Row, source: Source) -> Sample:
        """The row as a sample that can be encoded for its source: with its own content, or with another row's."""
        sample = Sample(row, row.content, source)
        if not row.counts:
            return sample
        for attempt in range(MAX_REPLACEMENTS):
            try:
                self.encoder.check(sample)
            except Exception as error:  # as ms-swift's resampling: templates raise anything on a broken image or an over-long row
                if not hasattr(self.dataset, '__len__'):
                    logger.warning(f'{sample} is left out, it cannot be encoded: {error}')
                    return Sample(row.filler(), row.content)
                number = sources.replacement_row(self.args.seed, row.epoch, row.number, attempt, len(self.dataset))
                logger.info(f'{sample} cannot be encoded, row {number} stands in: {error}')
                sample = Sample(row, self.dataset[number], source)
                last_error = error
            else:
                return sample
        raise OptionError(
            f'{sample} and {MAX_REPLACEMENTS} other rows cannot be encoded (last: {last_error}); raise --max_length or look at the dataset.'
        )


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


def state_of(ready: list[list[Sample]]) -> dict[str, Any]:
    """What a checkpoint keeps of the micro-batches that wait for their optimizer step."""

    def one(sample: Sample) -> dict[str, Any]:
        number, epoch, repeat = sample.row.key
        state = {'row': number, 'epoch': epoch, 'repeat': repeat, 'counts': sample.row.counts, 'source': sample.source}
        if sample.response is not None:
            state['token_ids'], state['finish_reason'] = sample.response.token_ids, sample.response.finish_reason
            state['generated_at'] = sample.generated_at
        if sample.generated is not None:
            media = [name for name in MEDIA if name in sample.generated.rollout_infos]  # of a scheduler's own
            state['generated'] = {name: getattr(sample.generated, name) for name in (*FROM_ROLLOUT, *media)}
        return state

    return {'version': STATE_VERSION, 'world_size': _world_size(), 'micro_batches': [list(map(one, samples)) for samples in ready]}


def restored(cycle: Cycle, state: dict[str, Any], micro_batches: list[list[Row]]) -> list[list[Sample]]:
    """The samples of :func:`state_of`, on the same rows.

    Raises:
        OptionError: The rows are others than those of the checkpoint: the dataset, its order or the batch size changed.
    """
    kept_rows = [[(one['row'], one['epoch'], one['repeat']) for one in kept] for kept in state['micro_batches']]
    # Rows that were dropped, see Cycle._drawn, are dropped again.
    found_rows = [[row for row in rows if row.repeat == 0 or row.key in kept] for rows, kept in zip(micro_batches, kept_rows, strict=False)]
    if kept_rows != [[row.key for row in rows] for rows in found_rows]:
        raise OptionError(
            f'--resume_from_checkpoint: the checkpoint has responses for (row, epoch, repeat) {kept_rows}, the data gives '
            f'{[[row.key for row in rows] for rows in micro_batches]}; use the same dataset, seeds, batch sizes and --num_train_epochs, or '
            '--ignore_data_skip true.'
        )
    result = []
    for rows, kept in zip(found_rows, state['micro_batches'], strict=True):
        samples = []
        for row, one in zip(rows, kept, strict=True):
            sample = cycle.sample(row if one['counts'] else row.filler(), one['source'])
            if 'token_ids' in one:
                sample.response = Response(one['token_ids'], one['finish_reason'])
                sample.generated_at = one['generated_at']
            if 'generated' in one:
                sample.generated = cycle.encoder.inner(sample)
                for name, value in one['generated'].items():
                    setattr(sample.generated, name, value)
            samples.append(sample)
        result.append(samples)
    # A teacher server may have failed in the middle of the cycle.
    unanswered = any(s.row.counts and s.source != DATASET and s.response is None for samples in result for s in samples)
    if total_over_ranks(int(unanswered), cycle.args.device):
        cycle.answer(result)
    return result


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _path(checkpoint: str) -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return os.path.join(checkpoint, f'gkd_cycle_rank{rank}.json')


def save(checkpoint: str, ready: list[list[Sample]]) -> None:
    """Write this rank's part of the cycle in flight, if there is one."""
    if not ready:
        return
    os.makedirs(checkpoint, exist_ok=True)
    path = _path(checkpoint)
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        json.dump(state_of(ready), file)
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
    for name, value in (('version', STATE_VERSION), ('world_size', _world_size())):
        if state[name] != value:
            raise OptionError(
                f'--resume_from_checkpoint {checkpoint}: its responses in flight have {name} {state[name]}, this run has '
                f'{value}; resume on the same number of ranks, or delete gkd_cycle_rank*.json to generate them again.'
            )
    return state


def stop_together(error: TeacherServerError | None, device: torch.device, step: int) -> None:
    """Raise on every rank if a teacher server has given up on one. A collective call.

    Args:
        error: This rank's.

    Raises:
        TeacherServerError: With this rank's reason, or naming the number of other ranks that failed.
    """
    failed = total_over_ranks(int(error is not None), device)
    if failed:
        raise error or TeacherServerError(f'The teacher server of {failed} other ranks gave up at step {step}.')


def total_over_ranks(value: int, device: torch.device) -> int:
    """The sum of a number over all ranks. A collective call."""
    if _world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return int(tensor)
