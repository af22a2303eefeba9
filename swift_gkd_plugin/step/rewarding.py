"""What the student's responses are worth: scored once per generation cycle, compared with the others to their prompt on all ranks."""

from __future__ import annotations

import itertools
import traceback
from typing import Any

from swift.utils import get_logger

from ..rewards import Reward, RewardError, Rewards
from ..sources import STUDENT
from .backend import Backend
from .books import Books
from .said import Few, in_one_line, names_of
from .samples import Sample, SampleEncoder

logger = get_logger()


class Rewarding:
    """
    Args:
        rewards: The reward functions.
        backend: Whose responses they are.
        encoder: Has the responses in words.
        books: Where it is booked.
    """

    def __init__(self, rewards: Rewards, backend: Backend, encoder: SampleEncoder, books: Books):
        self.rewards, self.backend, self.ranks, self.encoder, self.books = rewards, backend, backend.ranks, encoder, books
        self._broken = Few('prompts had responses to different rows, one of which could not be encoded everywhere')

    def judge(self, samples: list[Sample]) -> None:
        """Give each response of the student that has none its reward. A collective call.

        Ranks score their own; the groups are put together from all of them, in the order of the dataset, so that an advantage depends on
        nothing else.

        Raises:
            RewardError: On every rank.
        """
        mine = [s for s in samples if s.row.counts and s.source == STUDENT and s.response is not None and s.reward is None]
        if not self.ranks.anywhere(len(mine)):
            return
        parts = self._scored(mine)
        if not self.rewards.compares:
            for sample, of in zip(mine, parts, strict=True):
                sample.reward = Reward(of, self.rewards.total(of), 0.0)
            self._measured(parts, '/mean')
            return
        everyone = self.ranks.gathered([(*_place(sample), sample.attempt, of) for sample, of in zip(mine, parts, strict=True)])
        everyone.sort(key=lambda one: one[:3])
        whole = []
        for (epoch, number), group in itertools.groupby(everyone, key=lambda one: one[:2]):
            group = list(group)
            if len(group) == self.rewards.group and len({attempt for *_, attempt, _ in group}) == 1:
                whole += group
            else:
                self._broken.say(f'Row {number} of epoch {epoch}: the prompts of its responses differ, so they are not compared.')
        found: dict[tuple[int, int, int], Reward] = {}
        if whole:
            judged, metrics = self.rewards.judged([of for *_, of in whole])
            found = {one[:3]: reward for one, reward in zip(whole, judged, strict=True)}
            self._book(metrics, judged)
        for sample, of in zip(mine, parts, strict=True):
            sample.reward = found.get(_place(sample)) or Reward(of, self.rewards.total(of), 0.0)

    def measure(self, samples: list[Sample]) -> None:
        """Book the rewards of an evaluation's responses. A collective call.

        Raises:
            RewardError: On every rank.
        """
        self._measured(self._scored(samples))

    def _measured(self, parts: list[tuple[float | None, ...]], suffix: str = '') -> None:
        for of in parts:
            self.books.metrics.add('reward', self.rewards.total(of))
            for name, value in zip(self.rewards.names, of, strict=True):
                if value is not None:
                    self.books.metrics.add(f'rewards/{name}{suffix}', value)

    def _scored(self, samples: list[Sample]) -> list[tuple[float | None, ...]]:
        """What the functions say, the first of the ranks with the same rows having asked them."""
        with self.books.metrics.seconds('seconds/rewards'):
            parts, problem = self.ranks.shared(lambda: self._asked(samples))
        if self.ranks.anywhere(int(problem is not None)):
            raise RewardError(problem or 'A reward function has failed on another rank, which says why.')
        return parts

    def _asked(self, samples: list[Sample]) -> tuple[list[tuple[float | None, ...]], str | None]:
        """And what went wrong."""
        try:
            return self.rewards.of([self.encoder.for_reward(sample) for sample in samples], self.backend.state), None
        except Exception as error:  # of whatever people write; every rank has to hear of it
            if error.__cause__ is not None:
                logger.error(''.join(traceback.format_exception(error.__cause__)))
            place = getattr(error, 'place', None)
            about = samples if place is None else [samples[place]]
            step = self.backend.step
            when = f'Evaluation after step {step}' if self.books.evaluating else f'Step {step + 1}'
            return [], f'{when}: {in_one_line(error)}; it was asked about {names_of(list(dict.fromkeys(map(str, about))))}.'

    def _book(self, metrics: Any, judged: list[Reward]) -> None:
        """Every rank has the same numbers."""
        groups, add = len(judged) // self.rewards.group, self.books.metrics.add
        add('reward', metrics.reward_mean * groups, groups)
        add('reward_std', metrics.reward_std * groups, groups)
        add('frac_reward_zero_std', metrics.frac_reward_zero_std * groups, groups)
        add('advantage/abs', sum(abs(one.advantage) for one in judged), len(judged))
        for name in metrics.per_func_mean:
            add(f'rewards/{name}/mean', metrics.per_func_mean[name] * groups, groups)
            add(f'rewards/{name}/std', metrics.per_func_std[name] * groups, groups)


def _place(sample: Sample) -> tuple[int, int, int]:
    return sample.row.epoch, sample.row.number, sample.row.repeat
