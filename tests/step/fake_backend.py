"""A back end of a few numbers, and the loop around it: what the conductor does with a run is seen without a model, in milliseconds.

The student is one weight per token id. A token's divergence is the squared distance of its weight from what the teacher says about the
token, :func:`opinion`, and a little less where it has read more; a response is a function of the prompt, the seed and the weights, so that
each of them, if it were another one, would show in every step that follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from swift.rewards import ORM, AsyncORM, orms

from swift_gkd_plugin.arguments import GKDOptions, learns_from_rewards
from swift_gkd_plugin.divergence import Divergence, TokenStats
from swift_gkd_plugin.feedback import feedbacks
from swift_gkd_plugin.responses import Response
from swift_gkd_plugin.rewards import Rewards
from swift_gkd_plugin.sources import STUDENT, Draw, engine_seed
from swift_gkd_plugin.step.ahead import Ahead
from swift_gkd_plugin.step.backend import Backend
from swift_gkd_plugin.step.balance import Balancing
from swift_gkd_plugin.step.conductor import Conductor
from swift_gkd_plugin.step.data import filled_up, row_loader
from swift_gkd_plugin.step.objective import LossOptions
from swift_gkd_plugin.step.ranks import Ranks
from swift_gkd_plugin.step.remote import RemoteTeacher
from swift_gkd_plugin.step.samples import Counted
from swift_gkd_plugin.step.teaching import TeacherBatches
from swift_gkd_plugin.teachers import TopK
from swift_gkd_plugin.teachers.server import Scores, ServerOptions, TeacherServer, TeacherServerError, TeacherServers
from swift_gkd_plugin.world import from_all

CPU = torch.device('cpu')
TOPK = 2


def arguments(output_dir: Path, **changed: Any) -> SimpleNamespace:
    """What the conductor reads of ms-swift's arguments, and what this loop does."""
    defaults = {
        **dataclasses.asdict(GKDOptions()),
        'output_dir': str(output_dir),
        'seed': 42,
        'lmbda': 0.5,
        'seq_kd': False,
        'sft_alpha': 0.0,
        'use_vllm': False,
        'multi_turn_scheduler': None,
        'temperature': 1.0,
        'top_k': -1,
        'top_p': 1.0,
        'min_p': 0.0,
        'repetition_penalty': 1.0,
        'stop_words': [],
        'max_completion_length': 6,
        'log_completions': True,
        'report_to': ['none'],
        'wandb_log_unique_prompts': False,
        'teacher_tag_key': 'dataset',
        'learning_rate': 0.5,
        'per_device_train_batch_size': 2,
        'gradient_accumulation_steps': 2,
        'steps_per_generation': 2,  # micro-batches, as in ms-swift
        'max_steps': 4,
        'save_steps': 0,
        'reward_funcs': [],
        'reward_model': None,
        'reward_model_plugin': None,
        'reward_weights': None,
        'scale_rewards': None,
        'advantage_estimator': 'grpo',
    }
    assert not changed.keys() - defaults.keys()
    return SimpleNamespace(**{**defaults, **changed})


def opinion(tokens: torch.Tensor) -> torch.Tensor:
    """What the teacher says about tokens; a log-probability, as far as anybody can tell."""
    return -(tokens * 37 % 101) / 101


def more_read(sample) -> float:
    """What it says less about each token of a response of which it has read more than the student."""
    student, teacher = sample.views
    return 0.0 if teacher is None else (len(teacher['input_ids']) - len(student['input_ids'])) / 1000


def _ids(turns: list) -> list[int]:
    """Of a response, which an engine has in turns."""
    return list(itertools.chain.from_iterable(turns)) if isinstance(turns[0], list) else turns


class Length(ORM):
    """The longer, the better; the dataset says by how much."""

    def __call__(self, completions, response_token_ids, bonus, **kwargs):
        return [len(_ids(turns)) * one / 10 for turns, one in zip(response_token_ids, bonus, strict=True)]


class Even(AsyncORM):
    """Of responses that begin with an even id; of others nothing is said in the second half of the dataset."""

    async def __call__(self, completions, response_token_ids, half, **kwargs):
        await asyncio.sleep(0)
        return [1.0 if _ids(turns)[0] % 2 == 0 else None if of else 0.0 for turns, of in zip(response_token_ids, half, strict=True)]


orms.update(length=Length, even=Even)
REWARDS = {'reward_funcs': ['length', 'even'], 'reward_weights': [1.0, 0.5]}


def short(response, /, **columns) -> str | None:
    """The best other response in front of the question, in few tokens; nothing about a response that is better."""
    best = response.best
    return f'{best.text} {response.question}' if best is not None and best.passed and best.total > response.total else None


feedbacks['short'] = short
FEEDBACK = {'gkd_feedback': 'short', 'gkd_passing_reward': 0.8}


class FakeServer(TeacherServer):
    """A teacher server without a network.

    Args:
        dies_after: Requests that it answers; None for all.
        scores_with_answers: As vLLM does, and swift deploy does not.
    """

    def __init__(self, dies_after: int | None = None, scores_with_answers: bool = True):
        super().__init__('http://teacher:1', ServerOptions(TOPK, timeout=1, retry_seconds=0, in_flight=1))
        self.left, self.scores_with_answers = dies_after, scores_with_answers
        self.scored: list[list[int]] = []
        self.answered: list[int] = []  # the seeds
        self._lock = threading.Lock()

    def _spend(self) -> None:
        with self._lock:
            if self.left == 0:
                raise TeacherServerError(f'Teacher server {self.url} is gone.')
            if self.left is not None:
                self.left -= 1

    def score(self, question) -> Scores:
        if not question.positions:
            return Scores.empty(0, TOPK)
        self._spend()
        self.scored.append(question.ids)
        return self._scores([question.ids[position] for position in question.positions])

    def answer(self, question, options, seed, stop_ids):
        self._spend()
        self.answered.append(seed)
        response = respond(f'teacher {question.ids} {seed}', options.max_tokens, stop_ids[0])
        return response, self._scores(response.token_ids) if self.scores_with_answers else None

    @staticmethod
    def _scores(tokens: list[int]) -> Scores:
        scores = Scores.empty(len(tokens), TOPK)
        scores.logprobs[:, 0], scores.ids[:, 0] = opinion(torch.tensor(tokens)).numpy(), np.array(tokens)
        return scores


def remote_teacher(server: FakeServer) -> RemoteTeacher:
    servers = TeacherServers(server.url, server.options)
    servers.servers = [server]
    return RemoteTeacher(servers, TOPK)


def respond(seed: str, limit: int, ending: int) -> Response:
    draw = random.Random(seed)
    length = draw.randrange(1, limit + 1)
    ids = [draw.randrange(20, 400) for _ in range(length)]
    return Response(ids, 'length') if length == limit else Response([*ids, ending], 'stop')


class FakeBackend(Backend):
    """
    Args:
        args: See :func:`arguments`.
        ranks: Ranks with the same rows have a part of each sample's tokens, as with context parallelism.
        template: The student's.

    Attributes:
        step: Optimizer steps that are done.
        weights: The student.
        engine_calls: (cycle key, number of prompts, whether ahead) of every request to the engine.
        looked_at: Rows of each call of the local teacher.
        nan: Numbers of rows whose loss is none.
        slow: What the engine waits for before it answers.
        kept_bytes: Of each token that the local teacher has looked at; None for nothing.
        kept_per_token: The same, of a teacher from the host.
        as_the_student: The local teacher looks at the student's micro-batches.
        balancing: How rows are arranged in micro-batches.
    """

    step = 0
    kept_per_token: int | None = None
    balancing: Balancing | None = None

    def __init__(self, args, ranks: Ranks, template):
        self.args, self.ranks, self.template = args, ranks, template
        self.weights = torch.zeros(512, dtype=torch.float64)
        self.ahead = Ahead('fake-engine')
        self.engine_calls: list[tuple[tuple[int, int], int, bool]] = []
        self.looked_at: list[list[list[int]]] = []
        self.nan: set[int] = set()
        self.saved: list[str] = []
        self.slow: threading.Event | None = None
        self.kept_bytes: int | None = None
        self.as_the_student = False
        self.conductor: Conductor | None = None

    @property
    def num_steps(self) -> int:
        return self.args.max_steps

    @property
    def state(self) -> SimpleNamespace:
        return SimpleNamespace(global_step=self.step)

    def ending_ids(self) -> list[int]:
        return [self.template.tokenizer.eos_token_id]

    # -- who answers -------------------------------------------------------------------------------------------------------------

    def _prompts(self, inputs: list[dict[str, Any]]) -> list[list[int]]:
        with self.template.generate_context():
            return [self.template.encode(one)['input_ids'] for one in inputs]

    def generate(self, source, prompts, seeds, options) -> list[Response]:
        ids = [prompt.encoded['input_ids'] for prompt in prompts]
        assert ids == self._prompts([prompt.inputs for prompt in prompts])
        return self._answers(source, ids, seeds, options.max_tokens, self.weights.sum().item())

    def _answers(self, source, prompts, seeds, limit, weights) -> list[Response]:
        if self.slow is not None:
            assert self.slow.wait(10)
        who = f'student {weights}' if source == STUDENT else 'teacher'
        return [respond(f'{who} {ids} {seed}', limit, self.ending_ids()[0]) for ids, seed in zip(prompts, seeds, strict=True)]

    def _request(self, samples, ahead: bool) -> tuple:
        """With the seeds of an engine, which belong to the call and not to the rows."""
        key = self.conductor.cycle_key
        self.engine_calls.append((key, len(samples), ahead))
        first = engine_seed(self.args.seed, key, 0, 0)
        prompts = self._prompts([self.conductor.encoder.student_prompt(sample) for sample in samples])
        return STUDENT, prompts, [first + i for i in range(len(samples))], self.args.max_completion_length, self.weights.sum().item()

    def roll_out(self, samples) -> None:
        metrics = self.conductor.metrics
        if self.ahead:
            responses, seconds = self.ahead.collected()
            metrics.add_seconds('seconds/sampling', seconds)
        else:
            with metrics.seconds('seconds/sampling'):
                responses = self._answers(*self._request(samples, ahead=False))
        for sample, response in zip(samples, responses, strict=True):
            inner = self.conductor.encoder.inner(sample)
            turns = [response.token_ids]
            if self.args.multi_turn_scheduler and len(response.token_ids) > 1:
                turns = [response.token_ids[:1], response.token_ids[1:]]
            inner.messages.pop()
            for turn in turns:
                inner.messages += [{'role': 'assistant', 'content': self.template.safe_decode(turn)}, {'role': 'user', 'content': 'sure ?'}]
            inner.messages.pop()
            inner.response_token_ids, inner.finish_reason, inner.add_eos = turns, response.finish_reason, False
            inner.rollout_infos = {'turns': len(turns), 'engine': self, 'by turn': {0: 'yes'}, 'pair': (1, 2)}
            sample.generated, sample.response = inner, response

    def roll_out_ahead(self, samples) -> None:
        self.ahead.begin(self._answers, *self._request(samples, ahead=True))

    # -- what a micro-batch says ---------------------------------------------------------------------------------------------------

    def teacher_batches(self, batches) -> TeacherBatches | None:
        if self.as_the_student:
            return None
        return TeacherBatches(self.args.gkd_teacher_batch_size, tokens=10**6, bytes_per_token=self.kept_bytes)

    def signals(self, batches):
        self.looked_at.append([])
        signals = []
        for batch in batches:
            self.looked_at[-1].append([sample.row.number for sample in batch.samples])
            more = torch.tensor([more_read(sample) for sample in batch.samples]).repeat_interleave(torch.tensor(batch.lengths))
            signals.append(TopK((opinion(batch.labels) - more)[:, None], batch.labels[:, None]))
        return signals

    def part(self, per_token: torch.Tensor) -> torch.Tensor:
        """Of a micro-batch's tokens, those of this rank."""
        if self.ranks.sharers == 1:
            return per_token
        return per_token[dist.get_rank(self.ranks.sharing) :: self.ranks.sharers]

    def look(self, batch) -> torch.Tensor:
        """[513] The gradient of the loss, and the loss, summed over the tokens of this rank; it is booked."""
        labels = self.part(batch.labels)
        weights = self.weights[labels].requires_grad_()
        cross_entropy = (weights - 1) ** 2
        weight = self.args.sft_alpha * self.part(batch.imitated)
        loss = weight * cross_entropy
        stats = TokenStats(cross_entropy=cross_entropy.detach().float())
        if batch.advantages is not None:
            loss = loss + self._of_rewards(batch, cross_entropy, stats)
        if batch.signal is not None:
            says = self.part(batch.signal.logprobs)[:, 0]  # NaN where a server was not asked
            divergence = (weights - says.nan_to_num()) ** 2 * ~says.isnan()
            counts = 1 if batch.compared is None else self.part(batch.compared)
            loss = loss + self.args.gkd_loss_weight * self.conductor.shares()[0] * counts * divergence
            stats.divergence = divergence.detach().float()
        total = (loss * self.part(batch.weights)).sum()
        if any(sample.row.number in self.nan for sample in batch.samples):
            total = total * torch.nan
        gradient = torch.zeros(len(self.weights) + 1, dtype=torch.float64)
        gradient[-1] = total.detach()
        if torch.is_grad_enabled():
            gradient.index_add_(0, labels, torch.autograd.grad(total, weights)[0])
        self.conductor.add_loss(batch, total.detach(), stats, self.part)
        return gradient

    def _of_rewards(self, batch, cross_entropy: torch.Tensor, stats: TokenStats) -> torch.Tensor:
        """Clipped (PPO, Schulman et al., 2017, arXiv 1707.06347) where it was another student that sampled the token."""
        advantages = self.args.gkd_rl_weight * self.conductor.shares()[1] * self.part(batch.advantages)
        if batch.old_logprobs is None:
            return advantages * cross_entropy
        old = self.part(batch.old_logprobs)
        ratio = (-cross_entropy - old.nan_to_num()).exp()
        clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        stats.clipped = (~old.isnan() & (clipped != ratio * advantages)).float()
        return torch.where(old.isnan(), advantages * cross_entropy, -clipped)

    def before_training(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def run(self, batches) -> None:
        for batch in batches:
            self.look(batch)

    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        if self.ranks.sharers > 1:
            dist.all_reduce(parts, group=self.ranks.sharing)
        return parts

    # -- checkpoints -------------------------------------------------------------------------------------------------------------------

    @property
    def last_checkpoint(self) -> str | None:
        return self.saved[-1] if self.saved else None

    def is_complete(self, checkpoint: str) -> bool:
        return os.path.isfile(os.path.join(checkpoint, 'weights.pt'))

    def save(self) -> None:
        """As both back ends do it, whoever asks."""
        self.conductor.finish_begun()
        if not self.saves_only_weights:
            self.conductor.save(self.checkpoint)
        os.makedirs(self.checkpoint, exist_ok=True)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save((self.step, self.weights), os.path.join(self.checkpoint, 'weights.pt'))
        if dist.is_initialized():
            dist.barrier()
        self.saved.append(self.checkpoint)

    def how_to_resume(self, checkpoint: str) -> str:
        return f'--resume_from_checkpoint {checkpoint}'


class FakeRun:
    """A training run.

    Args:
        template, args, dataset, ranks: Of the run.
        teacher: 'local', a server, or None for nobody.
        server: The server that answers, and scores if ``teacher`` is 'server'.
        rank, world_size: Of the owners of rows.
        prepares: Rows are encoded where they are read.
        endless: The rows go on behind an epoch and every step has all its micro-batches, as in Megatron; else as in transformers.

    Attributes:
        steps: What each step was trained on: see :func:`seen`.
        counted: The micro-batches of each step.
        losses: Of each step, over all ranks.
        logs: What each step has logged.
    """

    def __init__(
        self,
        template,
        args,
        dataset,
        ranks: Ranks | None = None,
        teacher: str | None = 'local',
        server: FakeServer | None = None,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = False,
        prepares: bool = True,
    ):
        self.args, self.dataset, self.server, self.endless, self.prepares = args, dataset, server, endless, prepares
        self.share = {'rank': rank, 'world_size': world_size}
        self.backend = FakeBackend(args, ranks or Ranks(CPU), template)
        remote = None if server is None else remote_teacher(server)
        who = {None: None, 'local': SimpleNamespace(description='a table', host_copy=None), 'server': remote}[teacher]
        weighs = args.gkd_rl_weight if learns_from_rewards(args) else 0.0
        how = {'schedule': (args.gkd_rl_schedule, args.gkd_rl_switch), 'distilled': (args.gkd_on, args.gkd_passing_reward)}
        how['sampled'] = args.gkd_signal == 'sampled'
        options = LossOptions(Divergence(), args.gkd_loss_weight, args.sft_alpha, 'bucket', None, weighs, args.temperature, **how)
        rewards = Rewards(args) if args.reward_funcs else None
        self.conductor = self.backend.conductor = Conductor(self.backend, template, options, who, remote, rewards=rewards)
        self.steps: list[list[list[dict[str, Any]]]] = []
        self.counted: list[list[Counted]] = []
        self.losses: list[float] = []
        self.logs: list[dict[str, float]] = []

    def rows(self, dataset, batch_size: int, seed: int | None, **how):
        how['shares'] = from_all(self.share['rank'])
        return row_loader(dataset, batch_size, seed=seed, drop_last=False, **self.share, **how)

    def epochs(self):
        """(micro-batches of an epoch that are left, how many)."""
        args, per_step = self.args, self.args.gradient_accumulation_steps
        if not hasattr(self.dataset, '__len__'):
            skip = self.backend.step * per_step
            stream = self.rows(self.dataset, args.per_device_train_batch_size, args.seed, skip=skip, num_workers=0, endless=True)
            yield iter(stream), 10**9
        how = {'draw': Draw.of(args), 'prepare': self.conductor.cycle.prepared if self.prepares else None}
        whole = len(self.rows(self.dataset, args.per_device_train_batch_size, args.seed, **how))
        first, skipped = divmod(self.backend.step, -(-whole // per_step))
        for epoch in itertools.count(first):
            loader = self.rows(self.dataset, args.per_device_train_batch_size, args.seed, skip=skipped * per_step, **how)
            loader.set_epoch(epoch)
            yield iter(loader), len(loader)
            skipped = 0

    def train(self, checkpoint: str | None = None) -> FakeRun:
        if checkpoint is not None:
            self.backend.step, self.backend.weights = torch.load(os.path.join(checkpoint, 'weights.pt'))
        self.conductor.begin(self.dataset, checkpoint)
        per_step = self.args.gradient_accumulation_steps
        if self.endless:
            rows = itertools.chain.from_iterable(filled_up(epoch, per_step) for epoch, _ in self.epochs())
            while self.backend.step < self.args.max_steps:
                self.one_step(rows, per_step)
            return self
        for rows, left in self.epochs():
            while left and self.backend.step < self.args.max_steps:
                self.one_step(rows, min(per_step, left))
                left -= min(per_step, left)
            if self.backend.step >= self.args.max_steps:
                return self

    def one_step(self, rows, num_batches: int) -> None:
        backend, conductor = self.backend, self.conductor
        batches = conductor.next_step(rows, num_batches, self.args.steps_per_generation)
        assert len(batches) == conductor.num_batches
        assert num_batches == len(batches) or (backend.balancing is not None and backend.balancing.tokens is not None)
        sums = torch.stack([backend.look(batch) for batch in batches]).sum(0)
        conductor.before_update()
        if dist.is_initialized():
            dist.all_reduce(sums)
        backend.weights = backend.weights - self.args.learning_rate * sums[:-1] / conductor.tokens
        backend.step += 1
        self.counted.append(batches.counted)
        self.steps.append([[seen(sample) for sample in batch.samples] for batch in batches.counted])
        self.losses.append(sums[-1].item() / conductor.tokens)
        self.logs.append(conductor.logged())
        if self.args.save_steps and backend.step % self.args.save_steps == 0:
            backend.save()

    def evaluate(self, dataset, batch_size: int = 2, at_once: int = 1) -> dict[str, float]:
        return self.conductor.evaluate(
            filled_up(
                self.rows(dataset, batch_size, None, prepare=self.conductor.prepared_for_evaluation if self.prepares else None), at_once
            ),
            at_once,
        )

    @property
    def completions(self) -> list[dict[str, Any]]:
        path = Path(self.args.output_dir, 'completions.jsonl')
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seen(sample) -> dict[str, Any]:
    """What a sample was, as JSON can hold it."""
    response = sample.response
    return {
        'key': list(sample.row.key),
        'counts': sample.row.counts,
        'source': sample.source,
        'question': sample.content['messages'][0]['content'],
        'response': None if response is None else [response.token_ids, response.finish_reason],
        'generated_at': sample.generated_at,
        'reward': sample.reward and dataclasses.asdict(sample.reward),
        'feedback': sample.feedback,
    }


def flat(run: FakeRun) -> list[dict[str, Any]]:
    """Every sample that counts, in the order of training."""
    return [one for step in run.steps for batch in step for one in batch if one['counts']]
