"""A teacher elsewhere: it is asked by HTTP, before the step begins, whatever the student is trained with."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from swift.utils import empty_cache, get_logger

from .. import checks
from ..arguments import OptionError, engine_scores
from ..responses import SamplingOptions
from ..sources import TEACHER
from ..teachers import TopK
from ..teachers.engine import TeacherEngine, name_of_device
from ..teachers.server import Question, Scores, ServerOptions, TeacherServerError, TeacherServers
from ..world import this_rank
from .cycle import stop_together
from .ranks import Ranks
from .samples import Counted, Sample

logger = get_logger()
T = TypeVar('T')


def check_servers(args, tokenizer, datasets: Iterable[Iterable[dict[str, Any]] | None]) -> None:
    """One short question to each teacher server: is it there, does it know our tokens, does it send enough of them?

    Args:
        args: The options.
        tokenizer: The student's.
        datasets: Whose rows will be asked about.

    Raises:
        OptionError: In one line, what to change.
    """
    if args.teacher_model_server is None or (args.gkd_loss_weight == 0 and not args.seq_kd):
        return
    options = ServerOptions(args.gkd_logits_topk or 0, args.gkd_server_timeout, 0, 1)
    try:
        servers = TeacherServers(args.teacher_model_server, options)
        if len(servers.teachers) > 1:
            checks.check_tags(datasets, args.teacher_tag_key, list(map(set, servers.teachers)))
        for server in servers.servers:
            server.connect()
            server.check(tokenizer, checks.has_media(datasets))
    except TeacherServerError as error:
        raise OptionError(f'--teacher_model_server: {error}') from None


def asked_once(ask: Callable[[], Any], told: Callable[[], T], take: Callable[[T], Any], ranks: Ranks, step: int) -> None:
    """The first of the ranks with the same rows asks a server, and the others get what it was told, all of it or a part. A collective call.

    Args:
        ask: Asks; may raise a TeacherServerError.
        told: What there is to tell after that, whether it raised or not.
        take: Gets it, on every rank.
        step: Number of the optimizer step, for the message.

    Raises:
        TeacherServerError: On every rank, if a server gave up.
    """
    error = None

    def first() -> T:
        nonlocal error
        try:
            ask()
        except TeacherServerError as caught:
            error = caught
        return told()

    take(ranks.shared(first))
    stop_together(error, ranks, step)


def teacher_that_answers(
    args, ranks: Ranks, url: str | None, model: str | None, dtype: torch.dtype, step: Callable[[], int]
) -> RemoteTeacher | None:
    """The teacher's servers or its engine; None if a model of the training processes is all there is. A collective call.

    Args:
        args: ms-swift's arguments.
        url: ``--teacher_model_server``.
        model, dtype: Directory and dtype of the weights that an engine loads.
        step: Optimizer steps that are done.

    Raises:
        TeacherServerError: A server or an engine can't be reached.
    """
    engine, topk, answers = None, args.gkd_logits_topk or 0, args.seq_kd or args.gkd_eval_source == TEACHER
    elsewhere = url is not None
    if not elsewhere:
        scores = engine_scores(args) and args.gkd_loss_weight > 0
        if args.gkd_teacher_engine != 'vllm' or not (scores or answers):
            return None
        engine, url = _engine(args, ranks, model, dtype)
    options = ServerOptions(topk, args.gkd_server_timeout, args.gkd_server_retry_seconds, args.gkd_server_in_flight)
    servers = TeacherServers(url, options, lambda: str(step() + 1))

    def connect() -> None:
        servers.connect(args.gkd_server_retry_seconds)
        if engine is not None:
            engine.sleep()

    asked_once(connect, lambda: None, lambda _: None, ranks, step() + 1)
    if elsewhere and args.seq_kd and ranks.asks and not servers.sends_scores_with_answers:
        logger.info('swift deploy sends no log-probabilities with its answers: each of them takes a second, scoring request.')
    return RemoteTeacher(servers, topk, engine.awake if engine is not None else nullcontext, elsewhere)


def _engine(args, ranks: Ranks, model: str, dtype: torch.dtype) -> tuple[TeacherEngine | None, str]:
    """An engine for the ranks with the same rows, and its address. It belongs to the first of them, which asks for all, and may use the
    devices of those that are on the same machine."""
    here = host, _ = socket.gethostname(), name_of_device(ranks.device)
    devices = list(itertools.chain.from_iterable(names for other, names in ranks.among_sharers(here) if other == host and names)) or None
    started: list[TeacherEngine] = []
    urls: list[str] = []

    def start() -> None:
        log = Path(args.output_dir) / f'teacher_engine_rank{this_rank()}.log'
        name = str(dtype).removeprefix('torch.')
        started.append(TeacherEngine(model, name, args.gkd_logits_topk or 0, args.gkd_teacher_engine_args, devices, log))
        started[0].wait()

    asked_once(start, lambda: started[0].url, urls.append, ranks, 0)
    return started[0] if started else None, urls[0]


class RemoteTeacher:
    """A teacher behind a server. It is asked before the step begins, so that a failure finds every rank at the same place.

    Args:
        servers: Connected.
        topk: Log-probabilities per token, as :attr:`ServerOptions.topk`.
        awake: A context in which the servers can answer.
        is_free: Whether they may be asked at any time, because they share no device with the student; the same on every rank.
    """

    adapter = True
    model = bare = None

    def __init__(self, servers: TeacherServers, topk: int, awake: Callable[[], AbstractContextManager] = nullcontext, is_free: bool = True):
        self.servers, self.topk, self.awake, self.is_free = servers, max(topk, 1), awake, is_free
        self.description = ' and '.join(f'the server {server.url}' for server in servers.servers)

    def make_room(self, ranks: Ranks) -> None:
        """What ranks have reserved of a device and do not use goes back before an engine wakes there. A collective call of the ranks with
        the same rows, whose devices the engine may have."""
        if not self.is_free:
            empty_cache()
            ranks.largest([0])  # all of them have

    def begin(self, samples: Iterable[Sample], again: bool = False) -> None:
        """Have the questions about samples on their way; :meth:`ask` waits for what is said. What a server said while it answered is not
        asked for again.

        Args:
            samples: With their ``question``.
            again: Also what a server has failed to say ahead of time, when nobody needed it yet.
        """
        for sample in samples:
            if sample.question is None:
                continue
            if again and sample.asked is not None and sample.asked.done() and sample.asked.exception() is not None:
                sample.asked = None
            if sample.asked is None and self._known(sample) is None:
                sample.asked = self.servers.begin(lambda server, question: server.score(question), sample.question, sample.question)

    def ask(self, batches: list[Counted]) -> None:
        """Give each micro-batch its signal.

        Raises:
            TeacherServerError: A server gave up.
        """
        samples = [sample for batch in batches for sample in batch.samples]
        needed = any(sample.question and sample.question.positions and self._known(sample) is None for sample in samples)
        with self.awake() if needed else nullcontext():
            self.begin(samples)
            wait([sample.asked for sample in samples if sample.asked is not None])
        for batch in batches:
            parts = [self._scores(sample, n) for sample, n in zip(batch.samples, batch.lengths, strict=True)]
            batch.signal = self._signal(parts or [Scores.empty(0, self.topk)])

    def _scores(self, sample: Sample, n: int) -> Scores:
        if sample.question is None:
            return Scores.unknown(n, self.topk)
        return sample.asked.result() if sample.asked is not None else self._known(sample)

    def silence(self, batch: Counted) -> TopK:
        """A signal that says nothing, for a step that will not be taken."""
        n, k = batch.num_tokens, self.topk
        return self._signal([Scores(np.full((n, k), -np.log(2 * k), np.float32), np.tile(np.arange(k), (n, 1)))])

    @staticmethod
    def _signal(parts: list[Scores]) -> TopK:
        logprobs, ids = (torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])) for name in ('logprobs', 'ids'))
        return TopK(logprobs, ids, temperature=1.0)

    @staticmethod
    def _known(sample: Sample) -> Scores | None:
        """The scores that came with the answer, if every one of its tokens is trained and no other."""
        if sample.scores is None:
            return None
        trained = [sample.question.ids[position] for position in sample.question.positions]
        return sample.scores if trained == sample.response.token_ids else None

    def answer(
        self, samples: list[Sample], prompts: list[Question], seeds: list[int], options: SamplingOptions, stop_ids: list[int]
    ) -> None:
        """Give each sample the response of its server.

        Raises:
            TeacherServerError: A server gave up; samples that were answered have their responses.
        """

        def one(server, argument):
            sample, question, seed = argument
            sample.response, sample.scores = server.answer(question, options, seed, stop_ids)

        with self.awake() if samples else nullcontext():
            self.servers.each(one, [(q, (s, q, seed)) for s, q, seed in zip(samples, prompts, seeds, strict=True)])
