"""One optimizer step, from top to bottom, whatever it is trained with:

    rows -> sources -> responses -> encode -> teacher -> divergence -> one number

:meth:`Conductor.next_step` brings a step's rows to the point where every response exists and is encoded, and where the number of trained
tokens of the whole step, over all ranks, is known: a back end divides each micro-batch's sum by it, so the step is the same however it is
split. What a back end has to do is in :mod:`.backend`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from swift.utils import JsonlWriter, get_logger

from .. import sources
from ..divergence import TokenStats
from ..metrics import Metrics
from ..responses import Prompt, SamplingOptions
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..teachers.server import TeacherServerError
from . import cycle as cycles
from .backend import Backend
from .completions import Completions
from .cycle import Answer, Cycle
from .data import Row
from .objective import LossOptions
from .random_state import RandomState
from .remote import RemoteTeacher, asked_once
from .samples import MicroBatch, Sample, SampleEncoder, TeacherView
from .teaching import TeacherBatches

logger = get_logger()

# Values of TokenStats that are logged as means over trained tokens with --gkd_detailed_metrics.
DETAILS = (
    'forward_kl',
    'reverse_kl',
    'student_entropy',
    'teacher_entropy',
    'top1_agreement',
    'teacher_prob_of_label',
    'student_mass_on_topk',
)


def _all(per_token: torch.Tensor) -> torch.Tensor:
    return per_token


class Conductor:
    """Owns a step from the rows to what is booked of it.

    Args:
        backend: What runs it.
        template: The student's.
        options: What is minimised.
        teacher: Who looks at the responses: a :class:`RemoteTeacher`, or the back end's own; None for nobody.
        answering: The teacher that answers by a server or an engine; None if it answers in the training processes.
        write_on_rank: The rank that writes files.

    Attributes:
        metrics: What is logged next.
        tokens: Trained tokens of the step that is under way, over all ranks; at least 1.
        num_batches: Its micro-batches on this rank; at least 1.
        cycle_key: (optimizer step, number of the generation cycle in it); (-1, n) in an evaluation. Seeds of engines are made of it.
    """

    def __init__(
        self,
        backend: Backend,
        template,
        options: LossOptions,
        teacher: Any,
        answering: RemoteTeacher | None,
        write_on_rank: Literal['master', 'last'] = 'master',
    ):
        self.backend, self.ranks, self.args, self.template = backend, backend.ranks, backend.args, template
        self.options, self.teacher, self.answering = options, teacher, answering
        args = self.args
        view = TeacherView(args.gkd_teacher_system, args.gkd_teacher_enable_thinking)
        tag_key = args.teacher_tag_key if isinstance(teacher, RemoteTeacher) else None
        self.encoder = SampleEncoder(template, view, teacher is not None, tag_key, engine=args.use_vllm)
        self.metrics = Metrics(self.ranks.device)
        self.completions = Completions(args, write_on_rank)
        if args.gkd_save_teacher_responses:
            self.teacher_responses = JsonlWriter(args.gkd_save_teacher_responses, write_on_rank=write_on_rank)
        self.answers = self._answers()
        self.cycle: Cycle | None = None
        self.cycle_key = 0, 0
        self.tokens = 1
        self._cycles = 0  # of the step under way
        self._ready: deque[list[Sample]] = deque()  # micro-batches that have their responses and wait for their optimizer step
        self._resumed: dict[str, Any] | None = None  # what the checkpoint has kept of those
        self._begun: list[list[Sample]] = []  # the cycle that the rollout server answers while a step trains
        self._begun_at = 0
        self._ahead: list[list[Sample]] = []  # the next cycle without responses, drawn early to ask a server about it
        self._failure: TeacherServerError | None = None  # of this rank's server, in the middle of the step
        self._numbers: RandomState | None = None  # as they were in front of it
        self._step: list[list[Sample]] = []  # of the step under way
        self.num_batches = 1
        self._losses: list[tuple[torch.Tensor, list[Sample]]] = []
        self._visits: deque[tuple[TeacherBatches, list[MicroBatch]]] = deque()  # of the local teacher, in this step, that are still to come
        self._evaluating = False

    def begin(self, dataset, checkpoint: str | None = None) -> None:
        """Start on a dataset, or go on where the responses in flight of a checkpoint were left."""
        self.cycle = Cycle(self.args, dataset, self.encoder, self.answers, self.ranks)
        self._ready.clear()
        self._begun, self._ahead, self._step, self._failure = [], [], [], None
        self._visits.clear()
        self._resumed = None if checkpoint is None else cycles.load(checkpoint)

    def warn_if_nothing_to_learn(self, dataset, is_student: bool) -> None:
        """A teacher that is the student, asked the same question, has nothing to say.

        Args:
            is_student: Whether teacher and student are one model when training begins.
        """
        args = self.args
        columns = getattr(dataset, 'column_names', None)
        privileged = columns is None or {'teacher_prompt', 'teacher_images'} & set(columns)
        sees_more = privileged or args.gkd_teacher_system is not None or args.gkd_teacher_enable_thinking is not None
        if not is_student or sees_more or args.sft_alpha > 0:
            return
        logger.warning(
            f'NOTHING TO LEARN: the teacher is {self.teacher.description} and sees the same prompt, so both distributions are equal, the '
            'divergence is 0 and so is its gradient. What helps: a column teacher_prompt or teacher_images in the dataset, --adapters '
            'with an adapter to start from, --sft_alpha > 0, or another --teacher_model.'
        )

    @property
    def scored_by_server(self) -> bool:
        return isinstance(self.teacher, RemoteTeacher) and self.args.gkd_loss_weight > 0

    @property
    def scored_locally(self) -> bool:
        return self.teacher is not None and not isinstance(self.teacher, RemoteTeacher) and self.args.gkd_loss_weight > 0

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def next_step(self, rows: Iterator[list[Row]], num_batches: int, cycle_length: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step, encoded, every response in place, with what the teacher says about them.

        A generation cycle may serve several steps, or a step may need several cycles; either way the weights do not change between the
        first cycle of a step and its last.

        Args:
            rows: Micro-batches of rows of this rank.
            num_batches: Of the step; fewer come back if the rows end.
            cycle_length: Micro-batches of a generation cycle.

        Raises:
            TeacherServerError: On every rank, after a checkpoint.
        """
        self._cycles = 0
        self._numbers = self.backend.random_state() if self._asks_along else None
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            self._cycles = state['cycles']
            kept = list(itertools.islice(rows, len(state['micro_batches'])))
            self._ready.extend(self._with_responses(lambda: cycles.restored(self.cycle, state, kept)))
        while len(self._ready) < num_batches:
            cycle = self._finished() if self._begun else self._new_cycle(rows, cycle_length)
            if not cycle:
                break
            self._ready.extend(cycle)
        self._step = [self._ready.popleft() for _ in range(min(num_batches, len(self._ready)))]
        if self.args.gkd_prefetch and len(self._ready) < num_batches and not self.backend.is_last_step:
            self._begin_next_cycle(rows, cycle_length)
        batches = [self.encoder.micro_batch(samples) for samples in self._step]
        self.num_batches = max(len(batches), 1)
        self._check_same_rows(batches)
        try:
            self._teach(batches)
        except TeacherServerError:
            self._ready.extendleft(reversed(self._step))
            self._leave()
            raise
        self._count(batches)
        self._ask_ahead(rows, num_batches, cycle_length)
        return batches

    def _new_cycle(self, rows: Iterator[list[Row]], length: int) -> list[list[Sample]]:
        """A cycle's samples with their responses. Empty where the rows end."""
        key = self._next_key()
        drawn, self._ahead = self._ahead or self._drawn(rows, length, key), []
        self.cycle_key = key
        return self._with_responses(lambda: self.cycle.answer(drawn))

    def _next_key(self) -> tuple[int, int]:
        number, self._cycles = self._cycles, self._cycles + 1
        return self.backend.step, number

    def _drawn(self, rows: Iterator[list[Row]], length: int, key: tuple[int, int]) -> list[list[Sample]]:
        return self.cycle.drawn(list(itertools.islice(rows, length)), key)

    def _begin_next_cycle(self, rows: Iterator[list[Row]], length: int) -> None:
        """``--gkd_prefetch``: the server answers the next cycle while this step trains, from the weights before this step."""
        self.cycle_key = self._next_key()
        self._begun, self._begun_at = self._drawn(rows, length, self.cycle_key), self.backend.step
        of_student = [s for samples in self._begun for s in samples if s.row.counts and s.source == STUDENT]
        if self.ranks.anywhere(len(of_student)):
            self.backend.roll_out_ahead(of_student)

    def _finished(self) -> list[list[Sample]]:
        """The cycle that was begun a step ago, with its responses."""
        begun, self._begun = self._begun, []
        return self._with_responses(lambda: self.cycle.answer(begun), student_at=self._begun_at)

    def finish_begun(self) -> None:
        """Collect what is under way on a server, which has to be free, or whose answers a checkpoint is to keep."""
        if self._begun:
            self._ready.extend(self._finished())

    def _with_responses(self, make: Callable[[], list[list[Sample]]], student_at: int | None = None) -> list[list[Sample]]:
        """A cycle, dated; if the teacher's server fails while it is made, what exists of it is in the checkpoint that is left behind."""
        try:
            cycle = make()
        except cycles.Unanswered as failure:
            cycles.dated(failure.samples, self.backend.step, student_at)
            self._ready.extend(failure.samples)
            self._leave()
            raise failure.__cause__ from None
        new = cycles.dated(cycle, self.backend.step, student_at)
        for sample in new:
            sample.prompt = None  # it may hold images
        tokens = sum(len(sample.response.token_ids) for sample in new)
        self.metrics.total('tokens/generated', tokens / self.ranks.sharers)
        return cycle

    def _check_same_rows(self, batches: list[MicroBatch]) -> None:
        """Ranks with the same rows have to feed the same tokens to their parts of the models. A collective call.

        Raises:
            RuntimeError: On each of them, naming the rows that differ.
        """
        if self.ranks.sharers == 1:
            return
        samples = [sample for batch in batches for sample in batch.samples]
        digests = [_digest(sample) for sample in samples]
        whole = int.from_bytes(hashlib.blake2b(repr(digests).encode(), digest_size=7).digest(), 'big')
        largest, smallest = self.ranks.largest([whole, -whole])
        if largest == -smallest:
            return
        everyone = self.ranks.among_sharers(list(zip(digests, map(str, samples), strict=True)))
        different = [row for rows in zip(*everyone, strict=False) if len(set(rows)) > 1 for _, row in rows]
        raise RuntimeError(
            f'Step {self.backend.step + 1}: ranks with the same rows encoded them differently ({", ".join(dict.fromkeys(different))}), '
            'compare the data, images and package versions of the machines.'
        )

    def _count(self, batches: list[MicroBatch]) -> None:
        """The step's denominator."""
        (total,) = self.ranks.totals([sum(batch.num_tokens for batch in batches)])
        self.tokens = max(total, 1)
        self._losses.clear()
        if batches and total == 0:
            logger.warning(
                f'Step {self.backend.step + 1}: no token of the whole step is trained '
                f'({", ".join(str(s) for batch in batches for s in batch.samples)}); its gradient is 0.'
            )
        self._add_sample_metrics([sample for batch in batches for sample in batch.samples])
        self.metrics.add('tokens/trained', total)

    # -- who answers -------------------------------------------------------------------------------------------------------------

    def _answers(self) -> dict[Source, Answer]:
        args = self.args
        answers: dict[Source, Answer] = {}
        if args.lmbda > 0 or args.gkd_eval_source == STUDENT:
            answers[STUDENT] = self._engine_answers if args.use_vllm else self._student_answers
        if args.seq_kd or args.gkd_eval_source == TEACHER:
            answer = self._teacher_answers if self.answering is None else self._server_answers
            answers[TEACHER] = self._kept(answer) if args.gkd_save_teacher_responses else answer
        return answers

    def _student_answers(self, samples: list[Sample]) -> None:
        self._generate(STUDENT, samples, self.encoder.student_prompt)

    def _teacher_answers(self, samples: list[Sample]) -> None:
        self._generate(TEACHER, samples, self.encoder.teacher_prompt)

    def _generate(self, source: Source, samples: list[Sample], inputs: Callable[[Sample], dict[str, Any]]) -> None:
        prompts = [Prompt(inputs(sample), sample.prompt) for sample in samples]
        with self.metrics.seconds('seconds/generation'), self.metrics.seconds('seconds/sampling'):
            responses = self.backend.generate(source, prompts, self._seeds(samples), self._sampling_options(source))
        for sample, response in zip(samples, responses, strict=True):
            sample.response = response

    def _engine_answers(self, samples: list[Sample]) -> None:
        if self.ranks.anywhere(len(samples)):  # else the engine sleeps on, with the weights that it has
            with self.metrics.seconds('seconds/generation'):
                self.backend.roll_out(samples)

    def _server_answers(self, samples: list[Sample]) -> None:
        """A teacher server answers. Every rank calls it, and all of them stop if one has no answer."""
        seeds, stop_ids = self._seeds(samples), sorted(self.backend.ending_ids())
        prompts = [self.encoder.question(sample, sample.prompt, prompt_only=True) for sample in samples]

        def told() -> list[Any]:
            return [(sample.response, sample.scores) for sample in samples]

        def take(answers: list[Any]) -> None:
            for sample, (response, scores) in zip(samples, answers, strict=True):
                sample.response, sample.scores = response, scores
                if response is not None:
                    self.encoder.cut_before_media(sample)

        with self.metrics.seconds('seconds/generation'), self.metrics.seconds('seconds/sampling'):
            self._asked(lambda: self.answering.answer(samples, prompts, seeds, self._sampling_options(TEACHER), stop_ids), told, take)

    def _asked(self, ask: Callable[[], Any], told: Callable[[], Any], take: Callable[[Any], None]) -> None:
        asked_once(ask, told, take, self.ranks, self.backend.step + 1)

    def _kept(self, answer: Answer) -> Answer:
        """``answer``, and what was answered in training goes to ``--gkd_save_teacher_responses``."""

        def kept(samples: list[Sample]) -> None:
            try:
                answer(samples)
            except TeacherServerError:  # on every rank; some samples may have their answers
                self._keep(samples)
                raise
            self._keep(samples)

        return kept

    def _keep(self, samples: list[Sample]) -> None:
        """Append rows with the teacher's answers to a dataset on disk. A collective call."""
        if not self._evaluating:
            lines = [self.encoder.row_with_response(sample) for sample in samples if sample.response is not None]
            self.teacher_responses.append(self.ranks.gathered(lines))

    def _seeds(self, samples: list[Sample]) -> list[int]:
        return [sources.sampling_seed(self.args.seed, s.row.epoch, s.row.number, s.source, s.row.repeat) for s in samples]

    def _sampling_options(self, source: Source) -> SamplingOptions:
        args = self.args
        temperature, limit = args.temperature, args.max_completion_length
        if source == TEACHER:
            temperature = temperature if args.gkd_teacher_temperature is None else args.gkd_teacher_temperature
            limit = args.gkd_teacher_max_completion_length or limit
        words, vocab_size = tuple(args.stop_words or ()), self.options.vocab_size
        return SamplingOptions(limit, temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, words, vocab_size)

    # -- what the teacher says -----------------------------------------------------------------------------------------------------

    def _teach(self, batches: list[MicroBatch]) -> None:
        """Give each micro-batch its signal, where it has one before the student's turn.

        Raises:
            TeacherServerError: On every rank.
        """
        take = partial(_give, batches)
        self._visits.clear()
        if self._asks_along:
            self.teacher.begin((sample for batch in batches for sample in batch.samples), again=True)
        elif self.scored_by_server:

            def ask() -> None:
                if self.teacher.is_free:
                    self.teacher.begin((sample for batch in batches for sample in batch.samples), again=True)
                self.teacher.ask(batches)

            with self.metrics.seconds('seconds/teacher'):
                self._asked(ask, lambda: [batch.signal for batch in batches], take)
        elif self.scored_locally and batches:
            plan = self.backend.teacher_batches(batches)
            if plan is None:
                with self.visited(1.0):
                    take(self.backend.signals(batches))
                return
            size = plan.per_visit(batches, self.ranks)
            self._visits.extend((plan, batches[start : start + size]) for start in range(0, len(batches), size))
            self._visit()

    def _visit(self) -> None:
        """The local teacher looks at the next part of the step."""
        plan, batches = self._visits.popleft()
        share = len(batches) / self.num_batches
        with self.visited(share):
            signals, count = plan.taught(batches, self.encoder, self.ranks, self.backend.signals)
        _give(batches, signals)
        self.metrics.add('teacher/batches', count, share)

    @contextmanager
    def visited(self, share: float) -> Iterator[None]:
        """Book the bytes that a teacher from the host moves for this share of a step."""
        host_copy = self.teacher.host_copy
        moved = host_copy.moved if host_copy else 0
        yield
        if host_copy and host_copy.moved > moved:
            self.metrics.add('teacher/moved_gib', (host_copy.moved - moved) / 2**30, share)

    @property
    def _asks_along(self) -> bool:
        """Whether a server is asked about a step's later micro-batches while earlier ones train. Ranks with the same rows would have to
        share what it says in the middle of the step."""
        return self.scored_by_server and self.teacher.is_free and self.ranks.sharers == 1 and not self._evaluating

    def before_forward(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch whose turn it is, with its signal. Where a local teacher looks at a step in several visits, a collective call."""
        if batch.signal is not None:
            return batch
        if self._visits:
            self._visit()
        elif self._asks_along:
            with self.metrics.seconds('seconds/teacher'):
                try:
                    if self._failure is None:
                        self.teacher.ask([batch])
                except TeacherServerError as error:
                    self._failure = error
            if self._failure is not None:  # other ranks may be waiting for this one in the middle of the step, so it goes on to its end
                batch.signal = self.teacher.silence(batch)
        return batch

    def _ask_ahead(self, rows: Iterator[list[Row]], num_batches: int, cycle_length: int) -> None:
        """A server is asked about the next step's responses of the dataset while this step trains."""
        if not (self.scored_by_server and self.teacher.is_free) or self.backend.is_last_step:
            return
        if len(self._ready) < num_batches and not self._begun:
            self._ahead = self._drawn(rows, cycle_length, (self.backend.step + 1, 0))
        coming = itertools.islice(itertools.chain(self._ready, self._begun, self._ahead), num_batches)
        known = [s for samples in coming for s in samples if s.row.counts and s.source == DATASET]
        if self.ranks.asks:
            self.encoder.ask(known)
            self.teacher.begin(known)

    # -- what a micro-batch's forward has found ----------------------------------------------------------------------------------------

    def add_loss(
        self, batch: MicroBatch, total: torch.Tensor, stats: TokenStats, part: Callable[[torch.Tensor], torch.Tensor] = _all
    ) -> None:
        """Book a micro-batch.

        Args:
            total: The loss, summed over the tokens that are on this rank; a scalar without a graph.
            stats: Per-token values of these tokens.
            part: Takes out of a per-token tensor what belongs to these tokens.
        """
        device = self.ranks.device
        imitated = part(batch.imitated).to(device)
        count = len(imitated)
        self.metrics.add('loss', total.detach(), count)
        if stats.divergence is not None:
            self.metrics.add('divergence', _sum(stats.divergence), count)
        if stats.cross_entropy is not None:
            cross_entropy = stats.cross_entropy.to(device)
            self.metrics.add('cross_entropy', _sum(cross_entropy * imitated), imitated.sum())
            if self._evaluating:
                self.metrics.add('all_cross_entropy', _sum(cross_entropy), count)
        for name in DETAILS if stats.detail else ():
            values = getattr(stats, name)
            if values is not None:
                self.metrics.add(name, _sum(values), count)
        if self._evaluating:
            return
        self._losses.append((total.detach(), batch.samples))
        if self.args.log_completions and stats.divergence is not None:
            of_sample = part(torch.repeat_interleave(torch.arange(len(batch.samples)), torch.tensor(batch.lengths))).to(device)
            sums = torch.zeros(2, len(batch.samples), device=device)
            sums[0].index_add_(0, of_sample, stats.divergence.to(device))
            sums[1].index_add_(0, of_sample, torch.ones_like(sums[0])[of_sample])
            for sample, sum_and_count in zip(batch.samples, sums.unbind(1), strict=True):
                sample.divergence = sum_and_count

    def before_update(self) -> None:
        """Between a step's last backward pass and its update. A collective call.

        Raises:
            TeacherServerError: On every rank, if the server of one gave up, after a checkpoint of the step before.
            FloatingPointError: On every rank, if the loss is not finite on one: no weight and no checkpoint takes part in it.
        """
        self._stop_without_server()
        self._cycles = 0
        if self.args.log_completions:
            self._write_completions()
        self._stop_on_nan()

    def stop_together(self) -> None:
        """End the run where :meth:`before_update` says so; for a loop that updates in its last backward pass, in front of that."""
        self._stop_without_server()
        self._stop_on_nan()

    def _stop_without_server(self) -> None:
        if not self._asks_along:
            return
        try:
            cycles.stop_together(self._failure, self.ranks, self.backend.step + 1)
        except TeacherServerError:
            self._ready.extendleft(reversed(self._step))
            self._numbers.restore()
            self._leave()
            raise

    def _stop_on_nan(self) -> None:
        """The error names the step and this rank's samples."""
        finite = torch.stack([loss for loss, _ in self._losses]).isfinite().tolist() if self._losses else []
        mine = [str(sample) for (_, samples), ok in zip(self._losses, finite, strict=True) if not ok for sample in samples]
        if not self.ranks.anywhere(len(mine)):
            return
        step = self.backend.step
        raise FloatingPointError(
            f'The loss of step {step + 1} is not finite'
            + (f', here with {", ".join(mine)}' if mine else ' on other ranks')
            + f'. The weights are those of step {step}; the last checkpoint is {self.backend.last_checkpoint or "not written yet"}. '
            f'Look at these rows, or lower {self.backend.learning_rate}.'
        )

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluate(self, rows: Iterable[list[Row]], at_once: int) -> dict[str, float]:
        """The mean over all trained tokens of the whole set, the same for any batch size and layout: no coin is tossed.

        Args:
            rows: Micro-batches of this rank, the same number on every rank.
            at_once: How many of them are answered, looked at by the teacher and run together.

        Returns:
            loss, divergence (with a teacher), cross_entropy, and the numbers of tokens and rows.

        Raises:
            TeacherServerError: On every rank, after a checkpoint where training is under way.
        """
        self.finish_begun()
        training, self.metrics, self._evaluating = self.metrics, Metrics(self.ranks.device), True
        try:
            tokens, count, left_out = self._evaluated(iter(rows), at_once)
            means = self.metrics.pop()
        except TeacherServerError:
            self.metrics, self._evaluating = training, False
            if self._step:
                self._leave()
            raise
        finally:
            self.metrics, self._evaluating = training, False
        if left_out:
            logger.warning(
                f'{left_out} rows of the evaluation set cannot be encoded (--max_length {self.template.max_length}) and are left out.'
            )
        found = {'loss': means.get('loss', 0.0)}
        if self.teacher is not None and self.args.gkd_loss_weight > 0:
            found['divergence'] = means.get('divergence', 0.0)
        return {**found, 'cross_entropy': means.get('all_cross_entropy', 0.0), 'tokens': tokens, 'rows': count}

    def _evaluated(self, rows: Iterator[list[Row]], at_once: int) -> list[int]:
        """Numbers of trained tokens, of rows and of rows that were left out, over all ranks."""
        source = self.args.gkd_eval_source
        numbers = [0, 0, 0]
        for number in itertools.count():
            part = list(itertools.islice(rows, at_once))
            if not part:
                return self.ranks.totals(numbers)
            self.cycle_key = -1, number  # the same at every evaluation
            samples = [[self._eval_sample(row) for row in micro_batch] for micro_batch in part]
            counted = [sample for one in samples for sample in one if sample.row.counts]
            self._leave_out_what_does_not_fit(counted)
            answered = [sample for sample in counted if sample.row.counts]
            if source != DATASET:
                self.answers[source](answered)
            batches = [self.encoder.micro_batch(one) for one in samples]
            self._check_same_rows(batches)
            self._teach(batches)
            with torch.no_grad():
                self.backend.run(batches)
            found = sum(batch.num_tokens for batch in batches), len(answered), len(counted) - len(answered)
            numbers = [sum(pair) for pair in zip(numbers, found, strict=True)]

    def _eval_sample(self, row: Row) -> Sample:
        if row.prepared is not None:
            return row.prepared.leave_shared_memory()
        return Sample(row, row.content, self.args.gkd_eval_source if row.counts else DATASET)

    def prepared_for_evaluation(self, row: Row) -> Row:
        """As :meth:`Cycle.prepared`, for a row of the evaluation set."""
        sample = self._eval_sample(row)
        try:
            if not sample.fits:
                self.encoder.check(sample)
        except Exception:  # see Cycle._attempts; said where all ranks hear of it
            return row
        if sample.encoded is not None:
            self.encoder.views(sample)
        return replace(row, prepared=sample)

    def _leave_out_what_does_not_fit(self, samples: list[Sample]) -> None:
        """No row stands in for another here: the set stays what it is."""
        failed = []
        for sample in samples:
            try:
                if not sample.fits:
                    self.encoder.check(sample)
            except Exception as error:  # see Cycle._attempts
                logger.warning(f'evaluation: {sample} cannot be encoded: {error}')
                failed.append(1)
            else:
                failed.append(0)
        for sample, anywhere in zip(samples, self.ranks.largest(failed), strict=True):
            if anywhere:
                sample.leave_out()

    # -- what is logged --------------------------------------------------------------------------------------------------------------

    def _add_sample_metrics(self, samples: list[Sample]) -> None:
        samples = [sample for sample in samples if sample.row.counts]
        for source in sources.ALL_SOURCES:
            self.metrics.add(f'source/{source}', sum(sample.source == source for sample in samples), len(samples))
        for sample in samples:
            if sample.response is not None:
                self.metrics.add('response/length', len(sample.response.token_ids))
                self.metrics.add('response/cut_off', sample.response.cut_off)

    def _write_completions(self) -> None:
        """One line per generated response of this step into completions.jsonl. A collective call."""
        samples = [s for samples in self._step for s in samples]
        divergences = torch.zeros(2, len(samples), device=self.ranks.device)
        for number, sample in enumerate(samples):
            if sample.divergence is not None:
                divergences[:, number] = sample.divergence
        sums, counts = self.backend.whole(divergences).tolist()
        lines = [
            {
                'step': self.backend.step + 1,
                'generated_at': sample.generated_at,
                'row': sample.row.number,
                'epoch': sample.row.epoch,
                'source': sample.source,
                'prompt': self.encoder.student_prompt(sample)['messages'],
                'completion': self.template.safe_decode(sample.response.token_ids),
                'length': len(sample.response.token_ids),
                'finish_reason': sample.response.finish_reason,
                'divergence': total / count if count else None,
            }
            for sample, total, count in zip(samples, sums, counts, strict=True)
            if sample.row.counts and sample.response is not None
        ]
        self.completions.append(self.ranks.gathered(lines))

    def logged(self) -> dict[str, float]:
        """What is to be logged since the last call. A collective call."""
        metrics = self.metrics.pop()
        tokens, seconds = metrics.pop('tokens/generated', 0), metrics.pop('seconds/sampling', 0)
        if tokens and seconds > 0:
            metrics['generation/tokens_per_second'] = tokens / seconds
        self.completions.show()
        return metrics

    # -- checkpoints -------------------------------------------------------------------------------------------------------------------

    def save(self, checkpoint: str) -> None:
        """Write this rank's responses in flight. Before the rest: a checkpoint that looks complete has to be."""
        cycles.save(checkpoint, list(self._ready), self._cycles)

    def _leave(self) -> None:
        """A checkpoint of the last finished step, with the responses that exist. A collective call."""
        for teacher in (self.teacher, self.answering):
            if isinstance(teacher, RemoteTeacher):
                teacher.servers.stop()
        if self._begun:  # the run that goes on begins it again, from the same weights and under the same key
            self._begun, self._cycles = [], self._cycles - 1
        checkpoint = self.backend.checkpoint
        if not self.ranks.anywhere(int(self.backend.is_complete(checkpoint))):
            self.backend.save()
        elif not self.backend.saves_only_weights:
            self.save(checkpoint)
        logger.error(f'The run ends here. To go on: {self.backend.how_to_resume(checkpoint)}')


def _give(batches: list[MicroBatch], signals: list[Any]) -> None:
    for batch, signal in zip(batches, signals, strict=True):
        batch.signal = signal


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.double().sum()


def _digest(sample: Sample) -> str:
    """Of what the models see of a sample: row, source, token ids and the shapes of everything else."""
    seen = hashlib.blake2b(repr((sample.row.key, sample.row.counts, sample.source)).encode(), digest_size=7)
    for view in sample.views:
        for name, value in sorted((view or {}).items()):
            text = tuple(value.shape) if isinstance(value, torch.Tensor) else value if isinstance(value, list) else type(value).__name__
            seen.update(f'{name} {text}'.encode())
    return seen.hexdigest()
