"""What the rows of the training set are like once they are encoded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..step.data import Row
from ..step.said import in_one_line
from ..step.samples import Sample, SampleEncoder, TeacherView
from .findings import Findings

LOOKED_AT = 256  # rows, evenly spread: a second or two
MANY = 0.05  # share from which on something is a warning


@dataclass
class Length:
    """Of a row, in tokens; ``response`` is None without one, ``ends`` is whether its last tokens have an end token among them."""

    prompt: int
    response: int | None = None
    ends: bool = True

    @property
    def whole(self) -> int:
        return self.prompt + (self.response or 0)


def sampled(dataset: Any) -> list[dict[str, Any]]:
    if not hasattr(dataset, '__len__'):
        return list(itertools.islice(dataset, LOOKED_AT))
    step = max(len(dataset) // LOOKED_AT, 1)
    return [dataset[i] for i in range(0, len(dataset), step)][:LOOKED_AT]


def examine(args: Any, template: Any, dataset: Any, ends: set[int], found: Findings) -> dict[str, float]:
    """
    Args:
        args: ms-swift's arguments.
        template: Of the student, in its mode ``train``.
        dataset: For training; None for a cached one.
        ends: Ids that end a response.

    Returns:
        Tokens of a row in the mean, of its ``prompt`` and of its ``response``, where there are any.
    """
    found.section = 'data'
    if dataset is None:
        return {}
    rows = sampled(dataset)
    encoder = SampleEncoder(template, TeacherView(args.gkd_teacher_system, args.gkd_teacher_enable_thinking), needs_teacher=False)
    lengths, errors = [], []
    limit, strategy = template.max_length, template.truncation_strategy
    template.max_length = None  # to see how long they are
    try:
        for number, row in enumerate(rows):
            try:
                lengths.append(_length(encoder, Sample(Row(number, 0, row), row), ends))
            except Exception as error:  # whatever a template raises: a run replaces the row
                errors.append(in_one_line(error))
    finally:
        template.max_length = limit
    if errors:
        tell = found.error if not lengths else found.warning
        tell('encoding', f'{_share(len(errors), rows)} cannot be encoded, the first: {errors[0]}', 'Mend them; other rows stand in.')
    if not lengths:
        return {}
    _too_long(args, lengths, strategy, found)
    answered = [length for length in lengths if length.response is not None]
    from_dataset = args.lmbda < 1 and not args.seq_kd
    if from_dataset or args.gkd_eval_source == 'dataset':
        _endless(args, answered, limit, strategy, found)
        _thoughts(template, rows, found)
    means = {'prompt': sum(length.prompt for length in lengths) / len(lengths)}
    if answered:
        means['response'] = sum(length.response for length in answered) / len(answered)
    said = ', '.join(f'{n:.0f} tokens of {name}' for name, n in means.items())
    found.ok('rows', f'{len(rows)} rows looked at; in the mean {said}.', data=means)
    return means


def _length(encoder: SampleEncoder, sample: Sample, ends: set[int]) -> Length:
    if not checks.has_response(sample.content):
        sample.source = 'student'
        encoder.check(sample)
        return Length(len(sample.prompt_ids))
    encoder.check(sample)
    labels = sample.encoded['labels']
    trained = [label for label in labels if label != -100]
    # Behind the end token some templates train a line break.
    return Length(len(labels) - len(trained), len(trained), bool(set(trained[-3:]) & ends))


def _share(count: int, rows: list[Any]) -> str:
    return f'{count} of {len(rows)} sampled rows ({count / len(rows):.1%})'


def _too_long(args: Any, lengths: list[Length], strategy: str, found: Findings) -> None:
    """Prompts count alone where a response is generated, with it where the dataset's is learnt."""
    limit = args.max_length
    if limit is None:
        return
    sides = {'prompt': [length.prompt for length in lengths]} if args.lmbda > 0 or args.seq_kd else {}
    if args.lmbda < 1 and not args.seq_kd:
        sides['prompt and response'] = [length.whole for length in lengths]
    for what, sizes in sides.items():
        over = [size for size in sizes if size > limit]
        if not over:
            found.ok('max_length', f'All sampled rows fit --max_length {limit} with their {what}; the longest has {max(sizes)} tokens.')
            continue
        line = f'{_share(len(over), sizes)} have more than --max_length {limit} tokens of {what}, up to {max(over)}; '
        line += 'other rows stand in for them.' if strategy == 'raise' else f'--truncation_strategy {strategy} cuts them.'
        do = f'Raise --max_length, up to {max(over)}, or leave long rows out of the dataset.'
        data = {'share': len(over) / len(sizes), 'longest': max(over)}
        if len(over) == len(sizes) and strategy == 'raise':
            found.error('max_length', line.replace('other rows stand in for them', 'none is left'), do, data=data)
        elif len(over) >= MANY * len(sizes):
            found.warning('max_length', line, do, data=data)
        else:
            found.note('max_length', line, do, data=data)


def _endless(args: Any, answered: list[Length], limit: int | None, strategy: str, found: Findings) -> None:
    def cut(length: Length) -> bool:
        return strategy == 'right' and limit is not None and length.whole > limit

    endless = [length for length in answered if not length.ends or cut(length)]
    if endless:
        tell = found.warning if len(endless) >= MANY * len(answered) else found.note
        tell(
            'responses_end',
            f'{_share(len(endless), answered)} with a response are trained without its end token: they teach the student to go on.',
            'Train whole responses (a larger --max_length, --truncation_strategy delete), and a --template with an end token.',
        )
    elif answered:
        found.ok('responses_end', 'All sampled responses of the dataset are trained with their end token.')


def _thoughts(template: Any, rows: list[dict[str, Any]], found: Findings) -> None:
    answers = [str(row['messages'][-1]['content']) for row in rows if checks.has_response(row)]
    thinking = sum('</think>' in answer for answer in answers)
    if answers and thinking < len(answers) and template.enable_thinking:
        found.warning(
            'thoughts',
            f'The template has the student think, and {len(answers) - thinking} of {len(answers)} sampled responses have no </think>.',
            'Add --enable_thinking false, or answers with their thoughts.',
        )
    elif thinking and not template.enable_thinking:
        found.warning(
            'thoughts',
            f'{thinking} of {len(answers)} sampled responses have thoughts, and the template has the student answer without.',
            'Add --enable_thinking true, or take the thoughts out.',
        )
