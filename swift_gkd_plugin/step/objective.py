"""What a training run minimises, for both back ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from swift.utils import get_logger

from .. import checks
from ..arguments import OptionError, learns_from_rewards
from ..divergence import Clipping, Divergence, TokenStats, topk_divergence
from ..sources import STUDENT
from ..teachers import Signal, TopK
from .gradient_norms import gradient_norms
from .samples import MicroBatch

logger = get_logger()


@dataclass(frozen=True)
class LossOptions:
    """What is minimised: the sum over trained tokens of ``weight · D(teacher, student) + alpha · imitated · cross-entropy``, and of
    ``reward_weight · advantage · -log S(token)`` where the student sampled the token, at the temperature that it was sampled at.

    Attributes:
        divergence: D, with its temperature.
        weight: Of the divergence (``--gkd_loss_weight``, times the squared temperature with ``--gkd_temperature_squared``);
            at 0 there is no teacher.
        alpha: Of the cross-entropy, on tokens that the student did not generate (``--sft_alpha``).
        tail: How a top-k teacher's remaining mass is treated (``--gkd_tail``).
        vocab_size: Number of token ids that both models have; None for all columns of a head.
        reward_weight: Of the rewards (``--gkd_rl_weight``).
        sampling_temperature: The student's.
        schedule: How the two weights change over the run (``--gkd_rl_schedule``), and the share of it after which they are switched.
        distilled: Which of the student's responses are compared with the teacher (``--gkd_on``), and the reward from which one has passed.
        extrapolation: How far the teacher is moved away from the student's base (``--gkd_extrapolation``); 1 for not at all.
        clip: How far the ratio of a token's probability to that under the student that sampled it may fall below 1, and rise above, before
            its reward teaches nothing more (``--epsilon``, ``--epsilon_high``), and the most that it counts for (``--delta``).
        ratio_of: Whose ratio that is, a ``token``'s or its whole response's (``--importance_sampling_level``).
        sampled: D is estimated from the teacher's log-probability of the token that the student sampled (``--gkd_signal sampled``).
    """

    divergence: Divergence
    weight: float
    alpha: float
    tail: str
    vocab_size: int | None
    reward_weight: float = 0.0
    sampling_temperature: float = 1.0
    clip: tuple[float, float, float | None] = (0.2, 0.2, None)
    schedule: tuple[str, float] = ('constant', 0.5)
    distilled: tuple[str, float] = ('all', 1.0)
    ratio_of: str = 'token'
    sampled: bool = False
    extrapolation: float = 1.0

    @classmethod
    def of(cls, args, student: int | None, teacher: int | None = None, tokens: tuple[int, int] | None = None) -> LossOptions:
        """
        Args:
            args: ms-swift's arguments.
            student, teacher: Columns of the output heads; None for a teacher that is the student or elsewhere.
            tokens: Lengths of the student's and the teacher's tokenizer; None if there is no other model.

        Raises:
            OptionError: More columns are asked for than the models have in common.
        """
        temperature = args.temperature if args.gkd_temperature is None else args.gkd_temperature
        weight = args.gkd_loss_weight * (temperature**2 if args.gkd_temperature_squared else 1)
        columns, topk = student, args.gkd_logits_topk
        if teacher is not None and tokens is not None:
            columns = checks.compared_columns(student, teacher, *tokens)
            if columns < max(student, teacher):
                logger.info(f'Output heads with {student} (student) and {teacher} (teacher) columns: the first {columns} are compared.')
        if topk is not None and columns is not None and topk > columns:
            raise OptionError(f'--gkd_logits_topk {topk}: the models have {columns} token ids in common; choose fewer.')
        return cls(
            Divergence(args.gkd_divergence, args.beta, temperature, args.gkd_skew),
            weight,
            args.sft_alpha,
            args.gkd_tail,
            columns,
            args.gkd_rl_weight if learns_from_rewards(args) else 0.0,
            args.temperature,
            (args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high, args.delta),
            (args.gkd_rl_schedule, args.gkd_rl_switch),
            (args.gkd_on, args.gkd_passing_reward),
            args.importance_sampling_level,
            args.gkd_signal == 'sampled',
            args.gkd_extrapolation,
        )

    @property
    def weighs_samples(self) -> bool:
        """Whether tokens that the student sampled have weights of their own, which hold under the student that did."""
        return self.reward_weight > 0 or self.sampled

    def shares(self, step: int, steps: int) -> tuple[float, float]:
        """Of the weights of divergence and rewards in a step.

        Args:
            step: Of the run, from 0.
            steps: Of the run; 0 before it is known.
        """
        kind, switch = self.schedule
        if kind == 'linear' and self.reward_weight:
            done = step / max(steps - 1, 1)
            return 1 - done, done
        if kind == 'switch' and self.reward_weight:
            return (1.0, 0.0) if step < switch * max(steps, 1) else (0.0, 1.0)
        return 1.0, 1.0


class LossInForward:
    """The loss of a micro-batch, computed inside the student's wrapped forward. The back ends know how that is reached.

    Args:
        options: What is minimised.
        head: The student's output head.
        teacher_adapter: Whether the teacher's head is read with its adapter on.

    Attributes:
        shares: Tells those of the weights of divergence and rewards in the step under way.
        whole: Sums over the ranks that each hold a part of a response's tokens.
        norms: Takes the squared norms of the gradients of rewards and divergence; None if nobody asks for them.
    """

    def __init__(self, options: LossOptions, head: Any, teacher_adapter: bool = True):
        self.options, self.head, self.teacher_adapter, self.shares = options, head, teacher_adapter, lambda: (1.0, 1.0)
        self.whole: Callable[[torch.Tensor], torch.Tensor] = lambda parts: parts
        self.norms: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def _of_tokens(
        self,
        batch: MicroBatch,
        here: Callable[[torch.Tensor], torch.Tensor],
        signal: Signal | None,
        stats: TokenStats,
        student: Callable[..., torch.Tensor],
        teacher: Callable[..., torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Arguments of every divergence: what is known of the tokens themselves, and where their values go.

        Args:
            here: Takes out of a per-token tensor what belongs to the tokens of this call, to their device.
            student, teacher: The operator over their hidden states and heads, without another model; no ``teacher`` if there are none.
        """
        options, weights, imitated = self.options, here(batch.weights), here(batch.imitated)
        of_divergence, of_rewards = self.shares()
        compared = 1 if batch.compared is None else here(batch.compared)
        token_weights = weights * compared * (options.weight * of_divergence)
        found = dict(token_weights=token_weights, labels=here(batch.labels), reduction='sum', stats=stats)
        sampled = options.sampled and signal is not None
        # Labels without weights are for the logged cross-entropy; without a teacher they would weigh 1.
        weighs = options.alpha or signal is None or sampled or batch.advantages is not None
        found['label_weights'] = weights * imitated * options.alpha if weighs else None
        if batch.advantages is not None:
            of_rewards = here(batch.advantages) * (options.reward_weight * of_rewards)
            found['label_weights'] += of_rewards
            if self.norms is not None and signal is not None:
                found['of_rewards'] = of_rewards
        elif not options.sampled:
            return found
        # One number for all tokens costs nothing where it is the divergence's.
        temperature = options.sampling_temperature
        one = temperature == 1 or all(sample.source == STUDENT or not sample.row.counts for sample in batch.samples)
        found['label_temperature'] = temperature if one else torch.where(imitated > 0, 1.0, temperature)
        of_labels = dict(labels=found['labels'], label_temperature=found['label_temperature'])
        old = None if batch.old_logprobs is None else here(batch.old_logprobs)
        if sampled:
            known = signal.logprobs[:, 0].to(imitated.device) if isinstance(signal, TopK) else _logprobs(teacher, of_labels)
            found['teacher_logprobs'] = known = known.masked_fill(imitated > 0, torch.nan)
            if old is not None:  # the estimate is that of the student that sampled
                advantage = token_weights * (known - old)
                found['label_weights'] += advantage.masked_fill(advantage.isnan(), 0)
                found['token_weights'] = token_weights.masked_fill(~advantage.isnan(), 0)
        if old is not None:
            ratios = None if options.ratio_of == 'token' else self._of_responses(batch, here, _logprobs(student, of_labels) - old)
            found['clipping'] = Clipping(old, *options.clip, ratios)
        return found

    def _of_responses(self, batch: MicroBatch, here: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
        """[n here] for each token the mean of ``values`` over all tokens of its response. A collective call of the ranks that hold them."""
        of_sample = here(torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths)))
        sums = values.new_zeros(2, len(batch.lengths))
        sums[0].index_add_(0, of_sample, values)
        sums[1].index_add_(0, of_sample, torch.ones_like(values))
        total, count = self.whole(sums)
        return (total / count)[of_sample]

    def _run(
        self, operator: Callable[..., torch.Tensor], *args: Any, of_rewards: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """An operator on a micro-batch; where there are rewards beside a divergence, their gradients' norms are taken too.

        Args:
            of_rewards: [n here], the part of ``label_weights`` that is theirs.
        """
        if of_rewards is not None and torch.is_grad_enabled():
            self.norms(*gradient_norms(operator, of_rewards, *args, **kwargs))
        return operator(*args, **kwargs)

    def _from_topk(self, chosen: torch.Tensor, weight: torch.Tensor | None, signal: TopK, **common: Any) -> torch.Tensor:
        """Against a teacher of which k log-probabilities are known; ``chosen`` are logits if ``weight`` is None."""
        return self._run(
            topk_divergence,
            chosen,
            weight,
            signal.logprobs.to(chosen.device),
            signal.ids.to(chosen.device),
            self.options.divergence,
            tail=self.options.tail,
            topk_temperature=signal.temperature,
            tail_logprobs=None if signal.tail is None else signal.tail.to(chosen.device),
            **common,
        )


def _logprobs(operator: Callable[..., torch.Tensor], of_labels: dict[str, Any]) -> torch.Tensor:
    """[n here] of the labels, under one model."""
    with torch.no_grad():
        operator(**of_labels, stats=(found := TokenStats()))
    return -found.cross_entropy
