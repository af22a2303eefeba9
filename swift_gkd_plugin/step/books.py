"""What is booked of a step: what is logged, the lines of completions.jsonl, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from .. import sources
from ..divergence import TokenStats
from ..metrics import Metrics, widest
from .backend import Backend
from .completions import Completions
from .samples import MicroBatch, Sample, SampleEncoder

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


def all_of(per_token: torch.Tensor) -> torch.Tensor:
    return per_token


class Books:
    """
    Args:
        backend: Whose steps are booked.
        encoder: Puts responses into words.
        write_on_rank: The rank that writes files.
        reward_names: Of the reward functions.

    Attributes:
        metrics: What is logged next; of an evaluation, while there is one.
        evaluating: Whether there is one.
        looked_up: Of each micro-batch that :meth:`looking_up` runs, [n] log-probabilities of its tokens, 0 of those elsewhere; None else,
            when everything is booked.
    """

    def __init__(
        self, backend: Backend, encoder: SampleEncoder, write_on_rank: Literal['master', 'last'], reward_names: Sequence[str] = ()
    ):
        self.backend, self.ranks, self.encoder, self.reward_names = backend, backend.ranks, encoder, reward_names
        self.logs_completions, self.logs_feedback = backend.args.log_completions, backend.args.gkd_feedback is not None
        self.metrics, self.evaluating = Metrics(self.ranks.device), False
        self.completions = Completions(backend.args, write_on_rank)
        self.looked_up: list[torch.Tensor] | None = None
        self._losses: list[tuple[torch.Tensor, list[Sample]]] = []  # of the step under way

    @property
    def training(self) -> bool:
        """Whether what runs is a step."""
        return not self.evaluating and self.looked_up is None

    @contextmanager
    def of_evaluation(self) -> Iterator[Metrics]:
        """Metrics of their own; those of training are kept, and nothing is written down."""
        training, self.metrics, self.evaluating = self.metrics, Metrics(self.ranks.device), True
        try:
            yield self.metrics
        finally:
            self.metrics, self.evaluating = training, False

    @contextmanager
    def looking_up(self) -> Iterator[list[torch.Tensor]]:
        """Nothing is booked; what the tokens' log-probabilities are is noted."""
        self.looked_up = []
        try:
            yield self.looked_up
        finally:
            self.looked_up = None

    def begin_step(self, samples: list[Sample], tokens: int) -> None:
        """Of a training step.

        Args:
            samples: This rank's.
            tokens: That are trained, over all ranks.
        """
        self._losses.clear()
        self.metrics.add('tokens/trained', tokens)
        samples = [sample for sample in samples if sample.row.counts]
        for source in sources.ALL_SOURCES:
            self.metrics.add(f'source/{source}', sum(sample.source == source for sample in samples), len(samples))
        for sample in samples:
            if sample.response is not None:
                self.metrics.add('response/length', len(sample.response.token_ids))
                self.metrics.add('response/cut_off', sample.response.cut_off)

    def add_loss(
        self, batch: MicroBatch, total: torch.Tensor, stats: TokenStats, part: Callable[[torch.Tensor], torch.Tensor] = all_of
    ) -> None:
        """Book a micro-batch.

        Args:
            total: The loss, summed over the tokens that are on this rank; a scalar without a graph.
            stats: Per-token values of these tokens.
            part: Takes out of a per-token tensor what belongs to these tokens.
        """
        device = self.ranks.device
        if self.looked_up is not None:
            logprobs = torch.zeros(len(batch.labels), device=device)
            logprobs[part(torch.arange(len(batch.labels))).to(device)] = -stats.cross_entropy.to(device)
            self.looked_up.append(logprobs)
            return
        imitated = part(batch.imitated).to(device)
        count = len(imitated)
        self.metrics.add('loss', total.detach(), count)
        by_student = 1 - imitated
        if stats.divergence is not None:
            self.metrics.add('divergence', _sum(stats.divergence), count)
            if self.encoder.sampled:
                self.metrics.add('kl_sampled', _sum(stats.divergence.to(device) * by_student), by_student.sum())
            if self.training and self.encoder.with_rewards:
                compared = part(batch.weights if batch.compared is None else batch.weights * batch.compared)
                self.metrics.add('distill_loss', _sum(stats.divergence.to(device) * compared.to(device)), count)
        if stats.cross_entropy is not None:
            cross_entropy = stats.cross_entropy.to(device)
            self.metrics.add('cross_entropy', _sum(cross_entropy * imitated), imitated.sum())
            if self.evaluating:
                self.metrics.add('all_cross_entropy', _sum(cross_entropy), count)
            else:
                advantages = torch.zeros_like(imitated) if batch.advantages is None else part(batch.advantages).to(device)
                if self.encoder.with_rewards:
                    self.metrics.add('pg_loss', _sum(cross_entropy * advantages), count)
                if stats.clipped is not None:
                    weighed = advantages != 0
                    if self.encoder.sampled and stats.divergence is not None:
                        counts = by_student if batch.compared is None else by_student * part(batch.compared).to(device)
                        weighed = weighed | (counts != 0)
                    self.metrics.add('clip_ratio', _sum(stats.clipped), weighed.sum())
        for name in DETAILS if stats.detail else ():
            values = getattr(stats, name)
            if values is not None:
                self.metrics.add(name, _sum(values), count)
        if self.evaluating:
            return
        self._losses.append((total.detach(), batch.samples))
        if self.logs_completions and stats.divergence is not None:
            of_sample = part(torch.repeat_interleave(torch.arange(len(batch.samples)), torch.tensor(batch.lengths))).to(device)
            sums = torch.zeros(2, len(batch.samples), device=device)
            sums[0].index_add_(0, of_sample, stats.divergence.to(device))
            sums[1].index_add_(0, of_sample, torch.ones_like(sums[0])[of_sample])
            for sample, sum_and_count in zip(batch.samples, sums.unbind(1), strict=True):
                sample.divergence = sum_and_count

    def add_norms(self, of_rewards: torch.Tensor, of_divergence: torch.Tensor) -> None:
        """Book the squared norms of a micro-batch's gradients."""
        if self.training:
            self.metrics.add('gradient_ratio', of_rewards, of_divergence)

    def not_finite(self) -> list[Sample]:
        """This rank's samples of micro-batches whose loss is not."""
        finite = torch.stack([loss for loss, _ in self._losses]).isfinite().tolist() if self._losses else []
        return [sample for (_, samples), ok in zip(self._losses, finite, strict=True) if not ok for sample in samples]

    def write_completions(self, samples: list[Sample]) -> None:
        """One line per generated response of this step into completions.jsonl, if asked for. A collective call."""
        if not self.logs_completions:
            return
        divergences = torch.zeros(2, len(samples), device=self.ranks.device)
        for number, sample in enumerate(samples):
            if sample.divergence is not None:
                divergences[:, number] = sample.divergence
        sums, counts = self.backend.whole(divergences).tolist()
        made = [
            (sample, total / count if count else None)
            for sample, total, count in zip(samples, sums, counts, strict=True)
            if sample.row.counts and sample.response is not None
        ]
        decode = self.encoder.template.safe_decode
        lines = [
            {
                'step': self.backend.step + 1,
                'gen_step': sample.generated_at,  # the column of Megatron-SWIFT's table
                'row': sample.row.number,
                'epoch': sample.row.epoch,
                'source': sample.source,
                'prompt': self.encoder.student_prompt(sample)['messages'],
                'completion': decode(sample.response.token_ids),
                'length': len(sample.response.token_ids),
                'finish_reason': sample.response.finish_reason,
                'divergence': divergence,
                **self._rewards(sample),
                **({'feedback': sample.feedback} if self.logs_feedback else {}),
            }
            for sample, divergence in made
        ]
        prompts = [decode(sample.prompt_ids) if self.completions.has_tables else '' for sample, _ in made]
        self.completions.append(self.ranks.gathered(list(zip(lines, prompts, strict=True))))

    def _rewards(self, sample: Sample) -> dict[str, float | None]:
        """Columns of a line, the same in all of them."""
        if not self.reward_names:
            return {}
        reward, names = sample.reward, [f'rewards/{name}' for name in self.reward_names]
        if reward is None:
            return dict.fromkeys(['reward', *names, 'advantage'])
        return {'reward': reward.total, **dict(zip(names, reward.parts, strict=True)), 'advantage': reward.advantage}

    def logged(self) -> dict[str, float]:
        """What is to be logged since the last call. A collective call."""
        metrics = self.metrics.pop()
        tokens, seconds = metrics.pop('tokens/generated', 0), metrics.pop('seconds/sampling', 0)
        if tokens and seconds > 0:
            metrics['generation/tokens_per_second'] = tokens / seconds
        if 'gradient_ratio' in metrics:
            metrics['gradient_ratio'] = math.sqrt(metrics['gradient_ratio'])
        self.completions.show()
        return metrics


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dtype=widest(values.device))
