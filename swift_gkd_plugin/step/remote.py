"""A teacher elsewhere: it is asked by HTTP, before the step begins, whatever the student is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from .. import checks
from ..arguments import OptionError
from ..responses import SamplingOptions
from ..teachers import TopK
from ..teachers.server import Question, Scores, ServerOptions, TeacherServerError, TeacherServers
from .samples import MicroBatch, Sample


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
    options = ServerOptions(args.gkd_logits_topk, args.gkd_server_timeout, 0, 1)
    try:
        servers = TeacherServers(args.teacher_model_server, options).servers
        if len(servers) > 1:
            checks.check_tags(datasets, args.teacher_tag_key, [set(server.tags) for server in servers])
        for server in servers:
            server.connect()
            server.check(tokenizer, checks.has_media(datasets))
    except TeacherServerError as error:
        raise OptionError(f'--teacher_model_server: {error}') from None


class RemoteTeacher:
    """A teacher behind a server. It is asked before the step begins, so that a failure finds every rank at the same place.

    Args:
        servers: Connected.
        topk: Log-probabilities per token.
        awake: A context in which the servers can answer.
    """

    adapter = True
    model = bare = None

    def __init__(self, servers: TeacherServers, topk: int, awake: Callable[[], AbstractContextManager] = nullcontext):
        self.servers, self.topk, self.awake = servers, topk, awake
        self.description = ' and '.join(f'the server {server.url}' for server in servers.servers)

    def ask(self, batches: list[MicroBatch]) -> None:
        """Give each micro-batch its signal. What a server said while it answered is not asked for again.

        Raises:
            TeacherServerError: A server gave up.
        """
        asked, found = [], {}
        for number, batch in enumerate(batches):
            for place, (sample, question) in enumerate(zip(batch.samples, batch.questions, strict=True)):
                known = self._known(sample, question)
                if known is None:
                    asked.append((number, place, question))
                else:
                    found[number, place] = known
        with self.awake() if any(question.positions for *_, question in asked) else nullcontext():
            scores = self.servers.each(lambda server, question: server.score(question), [(q, q) for *_, q in asked])
        found |= {(number, place): one for (number, place, _), one in zip(asked, scores, strict=True)}
        for number, batch in enumerate(batches):
            parts = [found[number, place] for place in range(len(batch.samples))] or [Scores.empty(0, self.topk)]
            logprobs, ids = (torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])) for name in ('logprobs', 'ids'))
            batch.signal = TopK(logprobs, ids, temperature=1.0)

    def _known(self, sample: Sample, question: Question) -> Scores | None:
        """The scores that came with the answer, if every one of its tokens is trained and no other."""
        trained = [question.ids[position] for position in question.positions]
        return sample.scores if sample.scores is not None and trained == sample.response.token_ids else None

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
