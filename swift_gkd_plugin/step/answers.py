"""Who answers: the student, in the training processes or by its engine; the teacher, likewise or by a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from swift.utils import JsonlWriter

from .. import sources
from ..responses import Prompt, SamplingOptions
from ..sources import STUDENT, TEACHER, Source
from ..teachers.server import TeacherServerError
from .backend import Backend
from .books import Books
from .cycle import Answer
from .remote import RemoteTeacher, asked_once
from .samples import Sample, SampleEncoder


class Answers:
    """
    Args:
        backend: Whose models and engine answer.
        encoder: Makes the prompts.
        books: Where the seconds are booked.
        server: The teacher that answers by a server or an engine; None if it answers in the training processes.
        vocab_size: Number of token ids to choose from; None for all columns of a head.
        write_on_rank: The rank that writes ``--gkd_save_teacher_responses``.

    Attributes:
        by_source: For each source that may be drawn, who fills in the responses; a collective call.
        cycle_key: (optimizer step, number of the generation cycle in it); (-1, n) in an evaluation. Seeds of engines are made of it.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: SampleEncoder,
        books: Books,
        server: RemoteTeacher | None,
        vocab_size: int | None,
        write_on_rank: Literal['master', 'last'],
    ):
        self.backend, self.ranks, self.args, self.encoder, self.books = backend, backend.ranks, backend.args, encoder, books
        self.server, self.vocab_size, self.cycle_key = server, vocab_size, (0, 0)
        args = self.args
        if args.gkd_save_teacher_responses:
            self._saved = JsonlWriter(args.gkd_save_teacher_responses, write_on_rank=write_on_rank)
        self.by_source: dict[Source, Answer] = {}
        if args.lmbda > 0 or args.gkd_eval_source == STUDENT:
            self.by_source[STUDENT] = self._of_engine if args.use_vllm else self._of_student
        if args.seq_kd or args.gkd_eval_source == TEACHER:
            answer = self._of_teacher if server is None else self._of_server
            self.by_source[TEACHER] = self._kept(answer) if args.gkd_save_teacher_responses else answer

    def _of_student(self, samples: list[Sample]) -> None:
        self._generate(STUDENT, samples, self.encoder.student_prompt)

    def _of_teacher(self, samples: list[Sample]) -> None:
        self._generate(TEACHER, samples, self.encoder.teacher_prompt)

    def _generate(self, source: Source, samples: list[Sample], inputs: Callable[[Sample], dict[str, Any]]) -> None:
        prompts, metrics = [Prompt(inputs(sample), sample.prompt) for sample in samples], self.books.metrics
        with metrics.seconds('seconds/generation'), metrics.seconds('seconds/sampling'):
            responses = self.backend.generate(source, prompts, self._seeds(samples), self._sampling_options(source))
        for sample, response in zip(samples, responses, strict=True):
            sample.response = response

    def _of_engine(self, samples: list[Sample]) -> None:
        if self.ranks.anywhere(len(samples)):  # else the engine sleeps on, with the weights that it has
            with self.books.metrics.seconds('seconds/generation'):
                self.backend.roll_out(samples)

    def _of_server(self, samples: list[Sample]) -> None:
        """All ranks stop if one has no answer."""
        seeds, stop_ids = self._seeds(samples), sorted(self.backend.ending_ids())
        prompts = [self.encoder.question(sample, sample.prompt, prompt_only=True) for sample in samples]
        options, metrics = self._sampling_options(TEACHER), self.books.metrics

        def told() -> list[Any]:
            return [(sample.response, sample.scores) for sample in samples]

        def take(answers: list[Any]) -> None:
            for sample, (response, scores) in zip(samples, answers, strict=True):
                sample.response, sample.scores = response, scores
                if response is not None:
                    self.encoder.cut_before_media(sample)

        with metrics.seconds('seconds/generation'), metrics.seconds('seconds/sampling'):
            self.server.make_room(self.ranks)
            asked_once(
                lambda: self.server.answer(samples, prompts, seeds, options, stop_ids), told, take, self.ranks, self.backend.step + 1
            )

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
        if not self.books.evaluating:
            lines = [self.encoder.row_with_response(sample) for sample in samples if sample.response is not None]
            self._saved.append(self.ranks.gathered(lines))

    def _seeds(self, samples: list[Sample]) -> list[int]:
        return [sources.sampling_seed(self.args.seed, s.row.epoch, s.row.number, s.source, s.row.repeat) for s in samples]

    def temperature(self, source: Source) -> float:
        """Of what is sampled now."""
        args = self.args
        if self.books.evaluating and args.gkd_eval_temperature is not None:
            return args.gkd_eval_temperature
        if source == TEACHER and args.gkd_teacher_temperature is not None:
            return args.gkd_teacher_temperature
        return args.temperature

    def _sampling_options(self, source: Source) -> SamplingOptions:
        args = self.args
        temperature, limit = self.temperature(source), args.max_completion_length
        if source == TEACHER:
            limit = args.gkd_teacher_max_completion_length or limit
        words = tuple(args.stop_words or ())
        return SamplingOptions(limit, temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, words, self.vocab_size)
