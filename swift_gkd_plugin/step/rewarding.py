"""What the student's responses are worth: scored once per generation cycle, compared with the others to their prompt on all ranks."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from swift.utils import get_logger

from ..feedback import ScoredResponse, grouped
from ..rewards import Reward, RewardError, Rewards
from ..sources import STUDENT
from .backend import Backend
from .books import Books
from .said import Few, in_one_line, names_of
from .samples import Sample, SampleEncoder

logger = get_logger()
T = TypeVar('T')

Place = tuple[int, int, int]  # of a response: epoch, row, repeat


@dataclass(frozen=True)
class Scored:
    """What all owners of rows know of a response.

    Attributes:
        attempt: Whose content its prompt is, as :attr:`Sample.attempt`.
        parts: What each reward function says.
        response: The same for a feedback, with the text; None without one.
    """

    place: Place
    attempt: int
    parts: tuple[float | None, ...]
    response: ScoredResponse | None


class Rewarding:
    """
    Args:
        rewards: The reward functions, and the feedback.
        backend: Whose responses they are.
        encoder: Has the responses in words.
        books: Where it is booked.
    """

    def __init__(self, rewards: Rewards, backend: Backend, encoder: SampleEncoder, books: Books):
        self.rewards, self.backend, self.ranks, self.encoder, self.books = rewards, backend, backend.ranks, encoder, books
        self._broken = Few('prompts had responses to different rows, one of which could not be encoded everywhere')
        self._unfit = Few('feedbacks could not be encoded')

    def judge(self, samples: list[Sample], taught: bool) -> None:
        """Give each response of the student that has none its reward, and its feedback. A collective call.

        Ranks score their own; the groups are put together from all of them, in the order of the dataset, so that an advantage and a
        feedback depend on nothing else.

        Args:
            taught: Whether a teacher will look at the responses; else nobody needs a feedback.

        Raises:
            RewardError: On every rank. No response has its reward then.
        """
        mine = [s for s in samples if s.row.counts and s.source == STUDENT and s.response is not None and s.reward is None]
        if not self.ranks.anywhere(len(mine)):
            return
        parts, tells = self._scored(mine), taught and self.rewards.feedback is not None
        scored = [self._told(sample, of, tells) for sample, of in zip(mine, parts, strict=True)]
        groups = self._groups(scored) if self.rewards.compares or tells else []
        texts = self._fed_back(mine, scored, groups) if tells else []
        judged = self._compared(groups) if self.rewards.compares else {}
        if not self.rewards.compares:
            self._measured(parts, '/mean')
        for sample, one in zip(mine, scored, strict=True):
            sample.reward = judged.get(one.place) or Reward(one.parts, self.rewards.total(one.parts), 0.0)
        if tells:
            self._take(mine, texts)

    def _told(self, sample: Sample, parts: tuple[float | None, ...], tells: bool) -> Scored:
        place = sample.row.epoch, sample.row.number, sample.row.repeat
        response = self.rewards.scored(*self.encoder.for_feedback(sample), parts) if tells else None
        return Scored(place, sample.attempt, parts, response)

    def _groups(self, scored: list[Scored]) -> list[list[Scored]]:
        """The responses of all ranks to each prompt, where it is the same one."""
        everyone = sorted(self.ranks.gathered(scored), key=lambda one: one.place)
        whole = []
        for (epoch, number), group in itertools.groupby(everyone, key=lambda one: one.place[:2]):
            group = list(group)
            if len(group) == self.rewards.group and len({one.attempt for one in group}) == 1:
                whole.append(group)
            else:
                self._broken.say(f'Row {number} of epoch {epoch}: the prompts of its responses differ, so they are not compared.')
        return whole

    def _compared(self, groups: list[list[Scored]]) -> dict[Place, Reward]:
        everyone = list(itertools.chain.from_iterable(groups))
        if not everyone:
            return {}
        judged, metrics = self.rewards.judged([one.parts for one in everyone])
        self._book(metrics, judged)
        return {one.place: reward for one, reward in zip(everyone, judged, strict=True)}

    def _fed_back(self, samples: list[Sample], scored: list[Scored], groups: list[list[Scored]]) -> list[str | None]:
        """The feedback on each response, which knows the others to the same prompt."""
        known = {
            one.place: response for group in groups for one, response in zip(group, grouped([one.response for one in group]), strict=True)
        }
        responses = [known.get(one.place, one.response) for one in scored]
        return self._asked(samples, lambda: self.rewards.feedback.of(responses, list(map(self.encoder.columns, samples))))

    def _take(self, samples: list[Sample], texts: list[str | None]) -> None:
        """The teacher will see the feedback, if all ranks with the same rows can encode it."""
        prompts, errors = [], []
        for sample, text in zip(samples, texts, strict=True):
            prompt = error = None
            try:
                prompt = None if text is None else self.encoder.prompt_with_feedback(sample, text)
            except Exception as caught:  # as in Cycle._attempts: templates raise anything
                error = caught
            prompts.append(prompt)
            errors.append(error)
        unfit = self.ranks.largest([int(error is not None) for error in errors])
        for sample, text, prompt, error, anywhere in zip(samples, texts, prompts, errors, unfit, strict=True):
            if anywhere:
                why = in_one_line(error) if error else 'on another rank'
                self._unfit.say(f'{sample}: its feedback cannot be encoded, the teacher does without: {why}.')
            elif text is not None:
                sample.take_feedback(text, prompt)
            self.books.metrics.add('feedback/share', float(sample.feedback is not None))

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
        """What the reward functions say."""
        return self._asked(samples, lambda: self.rewards.of([self.encoder.for_reward(sample) for sample in samples], self.backend.state))

    def _asked(self, samples: list[Sample], ask: Callable[[], list[T]]) -> list[T]:
        """What functions of the user's say about samples, the first of the ranks with the same rows having asked them."""
        with self.books.metrics.seconds('seconds/rewards'):
            found, problem = self.ranks.shared(lambda: self._caught(samples, ask))
        if self.ranks.anywhere(int(problem is not None)):
            raise RewardError(problem or 'A reward function or a feedback has failed on another rank, which says why.')
        return found

    def _caught(self, samples: list[Sample], ask: Callable[[], list[T]]) -> tuple[list[T], str | None]:
        """And what went wrong."""
        try:
            return ask(), None
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
