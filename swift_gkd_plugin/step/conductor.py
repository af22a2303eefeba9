"""One optimizer step, from top to bottom, whatever it is trained with:

    rows -> sources -> responses -> encode -> teacher -> divergence -> one number

:meth:`Conductor.next_step` brings a step's rows to the point where every response exists and is encoded, and where the number of trained
tokens of the whole step, over all ranks, is known: a back end divides each micro-batch's sum by it, so the step is the same however it is
split. What a back end has to do is in :mod:`.backend`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from swift.utils import get_logger

from .. import checks
from ..arguments import extrapolates
from ..divergence import TokenStats
from ..metrics import Metrics
from ..rewards import RewardError, Rewards
from ..sources import DATASET, STUDENT
from ..teachers import Signal
from ..teachers.server import TeacherServerError
from . import cycle as cycles
from .answers import Answers
from .backend import Backend
from .balance import balanced
from .books import Books, all_of
from .cycle import Cycle
from .data import Row
from .evaluation import Evaluation
from .objective import LossInForward, LossOptions
from .random_state import RandomState
from .remote import RemoteTeacher, asked_once
from .rewarding import Rewarding
from .said import names_of
from .samples import Counted, InTurn, MicroBatch, Sample, SampleEncoder, TeacherView
from .teaching import TeacherBatches

logger = get_logger()


class Conductor:
    """Owns a step from the rows to what is booked of it.

    Args:
        backend: What runs it.
        template: The student's.
        options: What is minimised.
        teacher: Who looks at the responses: a :class:`RemoteTeacher`, or the back end's own, of which ``description`` and ``host_copy``
            are read; None for nobody.
        answering: The teacher that answers by a server or an engine; None if it answers in the training processes.
        write_on_rank: The rank that writes files.
        rewards: What responses of the student are worth; None if nobody asks.

    Attributes:
        cycle: Of the dataset that it has begun with.
        books: Where a step is booked.
        tokens: Trained tokens of the step that is under way, over all ranks; at least 1.
        num_batches: Its micro-batches on this rank; at least 1.
    """

    def __init__(
        self,
        backend: Backend,
        template,
        options: LossOptions,
        teacher: Any,
        answering: RemoteTeacher | None,
        write_on_rank: Literal['master', 'last'] = 'master',
        rewards: Rewards | None = None,
    ):
        self.backend, self.ranks, self.args, self.template = backend, backend.ranks, backend.args, template
        self.teacher, self.answering = teacher, answering
        args = self.args
        view = TeacherView(args.gkd_teacher_system, args.gkd_teacher_enable_thinking)
        tag_key = args.teacher_tag_key if isinstance(teacher, RemoteTeacher) else None
        scored = teacher is not None and args.gkd_loss_weight > 0
        self.encoder = SampleEncoder(template, view, scored, tag_key, options.reward_weight > 0, options.sampled, options.distilled)
        self.options = options
        self.books = Books(backend, self.encoder, write_on_rank, rewards.names if rewards else ())
        if teacher is None:
            logger.info('No teacher: the loss has no divergence.')
        cut = {'top_k': args.top_k > 0, 'top_p': args.top_p < 1, 'min_p': args.min_p > 0}
        cut['repetition_penalty'] = args.repetition_penalty != 1
        if options.sampled and any(cut.values()):
            given = ' '.join(f'--{name} {getattr(args, name)}' for name, applies in cut.items() if applies)
            logger.warning(
                f'--gkd_signal sampled with {given}: tokens come from a part of the distribution, and the estimate is not that of the '
                'reverse KL; --top_k -1 --top_p 1 samples from all of it.'
            )
        self.rewarding = Rewarding(rewards, backend, self.encoder, self.books) if rewards else None
        self.answers = Answers(backend, self.encoder, self.books, answering, options.vocab_size, write_on_rank)
        self.evaluation = Evaluation(
            backend,
            self.encoder,
            self.answers,
            self.books,
            lambda samples: InTurn(self._taught(samples), self._in_turn),
            scored and self._scores_evaluations,
            self.rewarding,
        )
        self.cycle: Cycle | None = None
        self.tokens = 1
        self._cycles = 0  # of the step under way
        self._ready: deque[list[Sample]] = deque()  # micro-batches that have their responses and wait for their optimizer step
        self._resumed: dict[str, Any] | None = None  # what the checkpoint has kept of those
        self._begun: list[list[Sample]] = []  # the cycle that the rollout server answers while a step trains
        self._begun_at = 0
        self._ahead: list[list[Sample]] = []  # the next cycle without responses, drawn early to ask a server about it
        self._failure: TeacherServerError | None = None  # of this rank's server, in the middle of the step
        self._numbers: RandomState | None = None  # as they were in front of it
        self._step: list[list[Sample]] = []  # of the step under way, as they came
        self._running: list[list[Sample]] = []  # the same as they are run
        self.num_batches = 1
        self._visits: deque[tuple[TeacherBatches, list[Counted]]] = deque()  # of the local teacher, in this step, that are still to come

    def begin(self, dataset, checkpoint: str | None = None) -> None:
        """Start on a dataset, or go on where the responses in flight of a checkpoint were left."""
        self.cycle = Cycle(self.args, dataset, self.encoder, self.answers.by_source, self.ranks)
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
        other_signal = args.sft_alpha > 0 or self.options.reward_weight > 0
        if not is_student or other_signal or checks.teacher_sees_more(args, dataset):
            return
        logger.warning(
            f'NOTHING TO LEARN: the teacher is {self.teacher.description} and sees the same prompt, so both distributions are equal, the '
            'divergence is 0 and so is its gradient. What helps: a column teacher_prompt or teacher_images in the dataset, --gkd_feedback, '
            '--adapters with an adapter to start from, --sft_alpha > 0, or another --teacher_model.'
        )

    @property
    def metrics(self) -> Metrics:
        """What is logged next."""
        return self.books.metrics

    @property
    def cycle_key(self) -> tuple[int, int]:
        """Of the generation call under way; seeds of engines are made of it."""
        return self.answers.cycle_key

    @property
    def scored_by_server(self) -> bool:
        return isinstance(self.teacher, RemoteTeacher) and self._scores

    @property
    def scored_locally(self) -> bool:
        return self.teacher is not None and not isinstance(self.teacher, RemoteTeacher) and self._scores

    @property
    def _scores(self) -> bool:
        """Whether a teacher looks at what is run."""
        looks = self._scores_evaluations if self.books.evaluating else self.books.looked_up is None
        return looks and self.args.gkd_loss_weight > 0 and self.shares()[0] > 0

    @property
    def _scores_evaluations(self) -> bool:
        """One token says something of the student that has sampled it, at the temperature that it was sampled at."""
        args = self.args
        as_trained = args.gkd_eval_source == STUDENT and args.gkd_eval_temperature in (None, args.temperature)
        return not self.options.sampled or as_trained

    def shares(self) -> tuple[float, float]:
        """Of the weights of divergence and rewards, as they are in this step; an evaluation measures with the whole ones."""
        return (1.0, 1.0) if self.books.evaluating else self.options.shares(self.backend.step, self.backend.num_steps)

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def next_step(self, rows: Iterator[list[Row]], num_batches: int, cycle_length: int) -> InTurn:
        """The micro-batches of one optimizer step, every response in place. Whoever iterates over them gets each when its turn comes:
        collated, on the CPU, with what the teacher says about it. To be done once. Where a local teacher looks at a step in several
        visits, that is a collective call.

        A generation cycle may serve several steps, or a step may need several cycles; either way the weights do not change between the
        first cycle of a step and its last.

        Args:
            rows: Micro-batches of rows of this rank.
            num_batches: Of the step; fewer come back if the rows end, and others if the back end balances them.
            cycle_length: Micro-batches of a generation cycle.

        Raises:
            TeacherServerError, RewardError: On every rank, after a checkpoint.
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
        self._remember()
        for sample in itertools.chain.from_iterable(self._ready):
            sample.prompts = None  # their images would wait for a step of their own
        if self.args.gkd_prefetch and len(self._ready) < num_batches and not self.backend.is_last_step:
            self._begin_next_cycle(rows, cycle_length)
        self._running = self._balanced(self._step)
        self.num_batches = max(len(self._running), 1)
        try:
            batches = self._taught(self._running)
        except TeacherServerError:
            self._ready.extendleft(reversed(self._step))
            self._leave()
            raise
        self._count(batches)
        self._ask_ahead(rows, num_batches, cycle_length)
        return InTurn(batches, self._in_turn)

    def _remember(self) -> None:
        """The log-probabilities of responses whose tokens have weights of their own and that later steps will learn from, under the weights
        that gave them. A collective call."""
        if not self.options.weighs_samples:
            return
        waiting = [samples for samples in self._ready if any(self._weighed(s) and s.old_logprobs is None for s in samples)]
        if not self.ranks.anywhere(len(waiting)):
            return
        multiple = self.backend.multiple
        count = -(-self.ranks.at_most(len(waiting)) // multiple) * multiple
        spare = self._step[0] if self._step else waiting[0]
        batches = [*waiting, *([Sample(spare[0].row.filler(), spare[0].content)] for _ in range(count - len(waiting)))]
        self._check_same_rows([self.encoder.counted(samples) for samples in batches])
        with (
            self.metrics.seconds('seconds/old_logprobs'),
            self.backend.before_training(),
            self.books.looking_up() as found,
            torch.no_grad(),
        ):
            self.backend.run(InTurn(batches, self.encoder.micro_batch))
        mine = [self.backend.whole(logprobs).cpu() for logprobs in found]  # none on a rank without the head
        known = next(filter(None, self.ranks.among_sharers(mine)), mine)
        for samples, logprobs in zip(batches, known, strict=True):
            parts = logprobs.split([self.encoder.trained_tokens(sample) for sample in samples])
            for sample, part in zip(samples, parts, strict=True):
                if self._weighed(sample):
                    sample.old_logprobs = part.clone()
                    sample.views = None  # with its images

    def _weighed(self, sample: Sample) -> bool:
        if self.options.sampled:
            return sample.row.counts and sample.source == STUDENT and sample.response is not None
        return sample.reward is not None

    def _new_cycle(self, rows: Iterator[list[Row]], length: int) -> list[list[Sample]]:
        """A cycle's samples with their responses. Empty where the rows end."""
        key = self._next_key()
        drawn, self._ahead = self._ahead or self._drawn(rows, length, key), []
        self.answers.cycle_key = key
        return self._with_responses(lambda: self.cycle.answer(drawn))

    def _next_key(self) -> tuple[int, int]:
        number, self._cycles = self._cycles, self._cycles + 1
        return self.backend.step, number

    def _drawn(self, rows: Iterator[list[Row]], length: int, key: tuple[int, int]) -> list[list[Sample]]:
        return self.cycle.drawn(list(itertools.islice(rows, length)), key)

    def _begin_next_cycle(self, rows: Iterator[list[Row]], length: int) -> None:
        """``--gkd_prefetch``: the server answers the next cycle while this step trains, from the weights before this step."""
        self.answers.cycle_key = self._next_key()
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
        """A cycle, dated and rewarded; if the teacher's server or a reward function fails, what exists of it is in the checkpoint that is
        left behind."""
        try:
            cycle = make()
        except cycles.Unanswered as failure:
            cycles.dated(failure.samples, self.backend.step, student_at)
            self._ready.extend(failure.samples)
            self._leave()
            raise failure.__cause__ from None
        new = cycles.dated(cycle, self.backend.step, student_at)
        tokens = sum(len(sample.response.token_ids) for sample in new)
        self.metrics.total('tokens/generated', tokens / self.ranks.sharers)
        if self.rewarding is not None:
            try:
                self.rewarding.judge([sample for samples in cycle for sample in samples], taught=self.shares()[0] > 0)
            except RewardError:
                self._ready.extend(cycle)
                self._leave()
                raise
        return cycle

    def _balanced(self, step: list[list[Sample]]) -> list[list[Sample]]:
        """A step's micro-batches as the back end wants them. What a server is asked about a row, the rank asks that has drawn it."""
        how = self.backend.balancing
        if how is None or not step:
            return step
        return balanced(step, self.encoder, self.ranks, dataclasses.replace(how, moves=how.moves and not self.scored_by_server))

    def _check_same_rows(self, batches: list[Counted]) -> None:
        """Ranks with the same rows have to feed the same tokens to their parts of the models. A collective call.

        Raises:
            RuntimeError: On each of them, naming the rows that differ.
        """
        if self.ranks.sharers == 1:
            return
        samples = [sample for batch in batches for sample in batch.samples]
        digests = [sample.digest() for sample in samples]
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

    def _count(self, batches: list[Counted]) -> None:
        """The step's denominator."""
        (total,) = self.ranks.totals([sum(batch.num_tokens for batch in batches)])
        self.tokens = max(total, 1)
        if batches and total == 0:
            logger.warning(
                f'Step {self.backend.step + 1}: no token of the whole step is trained '
                f'({names_of([s for batch in batches for s in batch.samples])}); its gradient is 0.'
            )
        self.books.begin_step([sample for batch in batches for sample in batch.samples], total)

    # -- what the teacher says -----------------------------------------------------------------------------------------------------

    def _taught(self, samples: list[list[Sample]]) -> list[Counted]:
        """Samples with their responses, counted, with what the teacher says where that is known before the student's turn. A collective
        call.

        Raises:
            TeacherServerError: On every rank.
        """
        batches = [self.encoder.counted(one) for one in samples]
        self._check_same_rows(batches)
        self._teach(batches)
        return batches

    def _teach(self, batches: list[Counted]) -> None:
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
                self.teacher.make_room(self.ranks)
                asked_once(ask, lambda: [batch.signal for batch in batches], take, self.ranks, self.backend.step + 1)
        elif self.scored_locally and batches:
            plan = self.backend.teacher_batches(batches)
            if plan is None:
                with self.visited(1.0):
                    signals = self.backend.signals(InTurn(batches, lambda one: self.encoder.micro_batch(one.samples)))
                take(self._beside_reference(batches, signals))
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
        _give(batches, self._beside_reference(batches, signals))
        self.metrics.add('teacher/batches', count, share)

    def _beside_reference(self, batches: list[Counted], signals: list[Signal | None]) -> list[Signal | None]:
        """With what the student's base says about the same tokens, where that is known before the student's turn."""
        if not extrapolates(self.args):
            return signals
        others = self.backend.references(InTurn(batches, lambda one: self.encoder.micro_batch(one.samples).as_student_sees()))
        pairs = zip(signals, others, strict=True)
        return [signal if other is None else dataclasses.replace(signal, reference=other) for signal, other in pairs]

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
        return self.scored_by_server and self.teacher.is_free and self.ranks.sharers == 1 and not self.books.evaluating

    def _in_turn(self, counted: Counted) -> MicroBatch:
        """The micro-batch whose turn it is, with its signal."""
        if counted.signal is None and self._visits:
            self._visit()
        elif counted.signal is None and self._asks_along:
            with self.metrics.seconds('seconds/teacher'):
                try:
                    if self._failure is None:
                        self.teacher.ask([counted])
                except TeacherServerError as error:
                    self._failure = error
            if self._failure is not None:  # other ranks may be waiting for this one in the middle of the step, so it goes on to its end
                counted.signal = self.teacher.silence(counted)
        batch = self.encoder.micro_batch(counted.samples)
        for sample in counted.samples:
            sample.views = sample.encoded = None  # what was encoded, images above all, goes with the micro-batch
        batch.signal, counted.signal = counted.signal, None  # hidden states take room; these go when the micro-batch goes
        return batch

    def _ask_ahead(self, rows: Iterator[list[Row]], num_batches: int, cycle_length: int) -> None:
        """A server is asked about the next step's responses of the dataset while this step trains."""
        if not (self.scored_by_server and self.teacher.is_free) or self.backend.is_last_step or self.options.sampled:
            return
        if self.options.shares(self.backend.step + 1, self.backend.num_steps)[0] == 0:
            return
        if len(self._ready) < num_batches and not self._begun:
            self._ahead = self._drawn(rows, cycle_length, (self.backend.step + 1, 0))
        coming = itertools.islice(itertools.chain(self._ready, self._begun, self._ahead), num_batches)
        known = [s for samples in coming for s in samples if s.row.counts and s.source == DATASET]
        if self.ranks.asks:
            self.encoder.ask(known)
            self.teacher.begin(known)

    # -- around the update --------------------------------------------------------------------------------------------------------

    def add_loss(
        self, batch: MicroBatch, total: torch.Tensor, stats: TokenStats, part: Callable[[torch.Tensor], torch.Tensor] = all_of
    ) -> None:
        """Book what a micro-batch's forward has found: see :meth:`.books.Books.add_loss`."""
        self.books.add_loss(batch, total, stats, part)

    def connect(self, loss: LossInForward) -> None:
        """Give the loss what it needs to know of the step."""
        loss.shares, loss.whole = self.shares, self.backend.whole
        loss.norms = self.books.add_norms if self.args.gkd_detailed_metrics and self.encoder.with_rewards else None

    def before_update(self) -> None:
        """Between a step's last backward pass and its update. A collective call.

        Raises:
            TeacherServerError: On every rank, if the server of one gave up, after a checkpoint of the step before.
            FloatingPointError: On every rank, if the loss is not finite on one: no weight and no checkpoint takes part in it.
        """
        self._stop_without_server()
        self._cycles = 0
        self.books.write_completions([sample for samples in self._running for sample in samples])
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
        mine = self.books.not_finite()
        if not self.ranks.anywhere(len(mine)):
            return
        step = self.backend.step
        raise FloatingPointError(
            f'The loss of step {step + 1} is not finite'
            + (f', here with {names_of(mine)}' if mine else ' on other ranks')
            + f'. The weights are those of step {step}; the last checkpoint is {self.backend.last_checkpoint or "not written yet"}. '
            f'Look at these rows, or lower {self.backend.learning_rate}.'
        )

    # -- evaluation, logs ----------------------------------------------------------------------------------------------------------------

    def evaluate(self, rows: Iterable[list[Row]], at_once: int) -> dict[str, float]:
        """The mean over all trained tokens of the whole set, the same for any batch size and layout: no coin is tossed.

        Args:
            rows: Micro-batches of this rank, the same number on every rank.
            at_once: How many of them are answered together, looked at by the teacher and run; more of them are looked at together by a
                teacher that comes from the host.

        Returns:
            loss, divergence (with a teacher), cross_entropy, and the numbers of tokens and rows.

        Raises:
            TeacherServerError, RewardError: On every rank, after a checkpoint where training is under way.
        """
        self.finish_begun()
        try:
            return self.evaluation.of(rows, at_once)
        except (TeacherServerError, RewardError):
            if self._step:
                self._leave()
            raise

    def prepared_for_evaluation(self, row: Row) -> Row:
        """As :meth:`Cycle.prepared`, for a row of the evaluation set."""
        return self.evaluation.prepared(row)

    def logged(self) -> dict[str, float]:
        """What is to be logged since the last call. A collective call."""
        return self.books.logged()

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


def _give(batches: list[Counted], signals: list[Any]) -> None:
    for batch, signal in zip(batches, signals, strict=True):
        batch.signal = signal
