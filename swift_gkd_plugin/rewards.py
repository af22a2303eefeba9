"""What responses are worth: ms-swift's reward functions and models, and the advantage of a response over the others to its prompt."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from swift.rewards import orms, rm_plugins
from swift.rl_core.advantage import RewardMetrics, compute_advantages, compute_reward_metrics
from swift.rl_core.grpo_algorithm import score_completions
from swift.rlhf_trainers.utils import make_reward_weights, resolve_reward_funcs
from swift.utils import get_logger

from .arguments import OptionError, has_rewards, learns_from_rewards
from .feedback import Feedback, ScoredResponse
from .user_functions import RewardError, failed, missing, takes_anything

logger = get_logger()

# Beside the dataset's columns, what ms-swift gives a reward function by name (4.6.0, rl_core/data.py: to_reward_row).
GIVEN = ('trainer_state', 'messages', 'prompt_id', 'request_id', 'finish_reason', 'is_truncated', 'rollout_infos', 'response_token_ids')


@dataclass(frozen=True)
class Reward:
    """Of one response.

    Attributes:
        parts: By reward function and model; None where it has no opinion.
        total: Their weighted sum.
        advantage: What the log-probability of each of its tokens is weighted with.
    """

    parts: tuple[float | None, ...]
    total: float
    advantage: float


class RewardModel:
    """A frozen model that scores conversations, by a plugin of ms-swift's (``--reward_model_plugin``).

    Args:
        model: In the state in which it scores, on its device.
        template: Its own, in no other use.
        plugin: A name in ``swift.rewards.rm_plugins``.
        rows: That ms-swift's ``default`` plugin, which makes one batch of what it is given, looks at together. Others get all.

    Attributes:
        name: As ms-swift logs it.
    """

    def __init__(self, model: torch.nn.Module, template: Any, plugin: str, rows: int):
        template.set_mode('train')
        template.max_length = None  # the prompt was checked, and its response is not cut
        template.padding_free = False  # a score for each row
        template.remove_unused_columns = True  # what the model is not called with
        self.model, self.name = model, model.config._name_or_path.split('/')[-1]
        self.plugin = rm_plugins[plugin](model=model, template=template)
        self.rows = rows if plugin == 'default' else None

    def __call__(self, rows: list[dict[str, Any]], **columns: Any) -> list[float | None]:
        """Args:
        rows: Conversations with their columns, as ms-swift has them (``to_reward_row``).
        columns: The same by name, as reward functions are given them.
        """
        size, found = self.rows or max(len(rows), 1), []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            of_part = {name: value[part] if isinstance(value, list) else value for name, value in columns.items()}
            scores = self.plugin(inputs=rows[part], **of_part)
            found += scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
        return found


class Rewards:
    """The reward functions and models of a run, with ms-swift's names and meaning: ``--reward_funcs``, ``--reward_model``,
    ``--reward_weights``, ``--scale_rewards``, ``--advantage_estimator``.

    Args:
        args: ms-swift's arguments; ``--external_plugins`` are loaded.

    Attributes:
        names: Of the functions, and once they are loaded of the models behind them, as ms-swift logs them.
        labels: The same as they were given.
        models: Which score too, once they are loaded.
        group: Responses to a prompt.
        compares: Whether rewards are in the loss, and the responses to a prompt are compared; else they are measured only.
        feedback: What the teacher hears of them; None for nothing.

    Raises:
        OptionError: A function or a feedback that does not exist or cannot be made, or another number of weights.
    """

    def __init__(self, args: Any):
        unknown = [name for name in args.reward_funcs if name not in orms]
        if unknown:
            raise OptionError(
                f'--reward_funcs {unknown[0]}: not a reward function; there are {", ".join(sorted(orms))}, and what a file of '
                '--external_plugins puts into swift.rewards.orms.'
            )
        wrong = [name for name in args.reward_funcs if not isinstance(orms[name], type)]
        if wrong:
            raise OptionError(f'--reward_funcs {wrong[0]}: it must be a class, of swift.rewards.ORM or AsyncORM.')
        # These two as ms-swift has them for grpo alone (4.6.0, arguments/rlhf_args.py: _init_grpo).
        if 'cosine' in args.reward_funcs:
            args.cosine_max_len = args.cosine_max_len or args.max_completion_length
        if 'soft_overlong' in args.reward_funcs:
            if args.soft_cache_length is None:
                raise OptionError(
                    '--reward_funcs soft_overlong without --soft_cache_length: say how many of the last tokens cost something.'
                )
            args.soft_max_length = args.soft_max_length or args.max_completion_length
        try:
            self.functions, names = resolve_reward_funcs(args.reward_funcs, args=args)
        except Exception as error:
            raise OptionError(f'--reward_funcs {" ".join(args.reward_funcs)}: {error}') from error
        self.names = distinct(names)
        self.labels = [f'{given} ({name})' for given, name in zip(args.reward_funcs, self.names, strict=True)]
        self.models: list[RewardModel] = []
        models = args.reward_model or []
        for plugin in (models and args.reward_model_plugin) or ():
            if plugin not in rm_plugins:
                raise OptionError(
                    f'--reward_model_plugin {plugin}: there are {", ".join(sorted(rm_plugins))}, and what a file of --external_plugins '
                    'puts into swift.rewards.rm_plugins.'
                )
        self.labels += models
        count = len(args.reward_weights or self.labels)
        if count != len(self.labels):
            named = ', '.join([*self.names, *models])
            what = 'reward functions and models' if models else 'reward functions'
            raise OptionError(f'--reward_weights has {count} numbers for {len(self.labels)} {what} ({named}).')
        self.weights = make_reward_weights(args.reward_weights or None, count, torch.device('cpu'))
        self.group, self.estimator, self.compares = args.gkd_num_samples, args.advantage_estimator, learns_from_rewards(args)
        self.scale = args.scale_rewards or {'grpo': 'group', 'rloo': 'none', 'reinforce_plus_plus': 'batch'}[self.estimator]
        self.passing = args.gkd_passing_reward
        self.feedback = Feedback(args) if args.gkd_feedback else None

    def take(self, models: Sequence[RewardModel]) -> None:
        """``--reward_model``, loaded; before the first response is scored."""
        self.models += models
        self.names[:] = distinct([*self.names, *(model.name for model in models)])

    @property
    def groups(self) -> str | None:
        """Why the responses to a prompt belong together; None if they need not."""
        if self.compares:
            return 'rewards compare the responses to a prompt'
        return None if self.feedback is None else f'{self.feedback.label} looks at all responses to a prompt'

    def missing_columns(self, columns: Sequence[str]) -> list[tuple[str, str]]:
        """(function, column) for each column that a function or the feedback has no value for without the dataset's."""
        known = {*GIVEN, *columns}
        needed = [(f'--reward_funcs: {name}', missing(function, known)) for name, function in zip(self.names, self.functions, strict=False)]
        if self.feedback is not None:
            needed.append((self.feedback.label, self.feedback.missing_columns(columns)))
        return [(name, column) for name, found in needed for column in found]

    def of(self, samples: Sequence[Any], state: Any) -> list[tuple[float | None, ...]]:
        """What each function says about each sample.

        Args:
            samples: ms-swift's, with the response as the last message.
            state: The trainer's, which functions are given as ``trainer_state``.

        Raises:
            RewardError: A function raised, or returned another number of values, or a value that is neither finite nor None.
        """
        if not samples:
            return []
        rows = [sample.to_reward_row() for sample in samples] if self.models else []
        models = [lambda completions, model=model, **columns: model(rows, **columns) for model in self.models]
        whats = [
            f'{"reward model" if place >= len(self.functions) else "reward function"} {name}' for place, name in enumerate(self.labels)
        ]
        functions = [_checked(function, what) for what, function in zip(whats, [*self.functions, *models], strict=True)]
        found = score_completions(samples, functions, [None] * len(functions), False, torch.device('cpu'), trainer_state=state)
        return [tuple(None if math.isnan(value) else value for value in row) for row in found.tolist()]

    def judged(self, parts: Sequence[tuple[float | None, ...]]) -> tuple[list[Reward], RewardMetrics]:
        """The advantages of whole groups, one after the other, and what there is to log of them.

        Args:
            parts: Of each response, as :meth:`of` returns them.
        """
        table = torch.tensor([[math.nan if value is None else value for value in row] for row in parts], dtype=torch.float32)
        advantages, totals = compute_advantages(table, self.weights, self.group, self.estimator, self.scale)
        if self.scale != 'gdpo':  # which standardises over all groups in the end
            # The mean of equal numbers may be off by a rounding, which would be divided by a standard deviation of none.
            groups = totals.view(-1, self.group)
            advantages = advantages.masked_fill((groups == groups[:, :1]).all(1).repeat_interleave(self.group), 0)
        metrics = compute_reward_metrics(totals, table, self.names, self.group, self.scale)
        return [Reward(*one) for one in zip(parts, totals.tolist(), advantages.tolist(), strict=True)], metrics

    def total(self, parts: tuple[float | None, ...]) -> float:
        """The weighted sum of what the functions say about one response."""
        return sum(weight * value for weight, value in zip(self.weights.tolist(), parts, strict=True) if value is not None)

    def scored(self, text: str, question: str, parts: tuple[float | None, ...]) -> ScoredResponse:
        """A response as a feedback is told of it."""
        total = self.total(parts)
        return ScoredResponse(text, dict(zip(self.names, parts, strict=True)), total, has_passed(total, self.passing), question)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where one has been there: what is logged by name would be that of the last of them else."""
    found: list[str] = []
    for name in names:
        others = itertools.chain([name], (f'{name}-{number}' for number in itertools.count(2)))
        found.append(next(one for one in others if one not in found))
    return found


def has_passed(total: float, passing: float) -> bool:
    """Whether a weighted sum of rewards, of numbers in float32, is ``--gkd_passing_reward`` or more."""
    return total >= passing - 1e-6 * max(abs(passing), 1)


def rewards_of(args: Any, unit: int, explained: str, *datasets: Any) -> Rewards | None:
    """The reward functions of a run, checked against its data; None if it has none.

    Args:
        unit: Rows of which the responses to a prompt must not be in two.
        explained: What those rows are.
        datasets: Of ms-swift, or None.

    Raises:
        OptionError: A function cannot be used, or a column that one needs is in no dataset, or the responses to a prompt do not fit.
    """
    if not has_rewards(args):
        return None
    rewards = Rewards(args)
    if rewards.groups and unit % rewards.group:
        raise OptionError(
            f'--gkd_num_samples {rewards.group}: {rewards.groups}, and {explained}, {unit}, are no multiple of it; change the batch sizes, '
            'or the number of responses.'
        )
    for label, function in zip(rewards.labels, rewards.functions, strict=False):
        if not takes_anything(function):
            raise OptionError(f'--reward_funcs: {label} takes no **kwargs, and is given more than it names; add it to its __call__.')
    for dataset in datasets:
        columns = getattr(dataset, 'column_names', None)
        for name, column in rewards.missing_columns(columns) if columns else ():
            raise OptionError(
                f'{name} needs the column {column}; as ms-swift has loaded it, the dataset has '
                f'{", ".join(sorted(columns))}. Add it; what ms-swift takes for the response (answer, output, target and the like) needs '
                'another name, say solution.'
            )
    parts = ', '.join(f'{label} × {weight:g}' for label, weight in zip(rewards.labels, rewards.weights.tolist(), strict=True))
    how = f'weight in the loss {args.gkd_rl_weight:g} ({args.gkd_rl_schedule}), {rewards.group} responses to a prompt ({rewards.estimator})'
    told = f'; the teacher is told of them ({rewards.feedback.label})' if rewards.feedback else ''
    logger.info(f'Rewards: {parts}; {how if rewards.compares else "measured only"}{told}.')
    return rewards


def _checked(function: Callable, what: str) -> Callable:
    """The function, with what is wrong with it or its values as a :class:`RewardError`; ms-swift would take a NaN for no opinion."""

    def number(value: Any, place: int) -> float | None:
        try:
            found = None if value is None else float(value)
        except (TypeError, ValueError):
            raise RewardError(f'{what} returned {value!r}, which is no number', place) from None
        if found is not None and not math.isfinite(found):
            raise RewardError(f'{what} returned {found} (None is for what it has no opinion about)', place)
        return found

    def values_of(found: Any, count: int) -> list[float | None]:
        if not isinstance(found, Iterable) or isinstance(found, str):
            raise RewardError(f'{what} returned {found!r}, not a list with a number for each of {count} responses')
        values = list(found)
        if len(values) != count:
            raise RewardError(f'{what} returned {len(values)} values for {count} responses')
        return [number(value, place) for place, value in enumerate(values)]

    def call(completions: list[str], **columns: Any) -> list[float | None]:
        try:
            return values_of(function(completions, **columns), len(completions))
        except Exception as error:
            raise failed(what, error) from error

    async def call_async(completions: list[str], **columns: Any) -> list[float | None]:
        try:
            return values_of(await function(completions, **columns), len(completions))
        except Exception as error:
            raise failed(what, error) from error

    return call_async if any(map(asyncio.iscoroutinefunction, (function, type(function).__call__))) else call
