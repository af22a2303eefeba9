"""Feedback: what the teacher reads about a response, made of its rewards and of the other responses to its prompt."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from fake_backend import FEEDBACK, FakeServer, flat, short
from test_step_rewards import GROUPED, SPLITS, groups

from swift_gkd_plugin.arguments import GKDOptions, OptionError, check_values
from swift_gkd_plugin.feedback import ScoredResponse, feedbacks, grouped, sibling
from swift_gkd_plugin.rewards import RewardError, rewards_of

# Without rewards in the loss: what is told of them is all that they do.
TOLD = {**GROUPED, **FEEDBACK, 'gkd_rl_weight': 0.0}


def scored(*totals: float, passing: float = 1.0) -> list[ScoredResponse]:
    return grouped([ScoredResponse(f'answer {i}', {}, total, total >= passing, 'why ?') for i, total in enumerate(totals)])


@pytest.mark.parametrize(
    ('totals', 'best'),
    [((0, 2, 1), (1, 2, 1)), ((2, 2, 2), (1, 0, 0)), ((0, 0.5, 0.5), (1, 2, 1)), ((3, 1, 3), (2, 0, 0)), ((1,), (None,))],
)
def test_the_best_sibling_is_another_response_and_the_first_of_the_best(totals, best):
    found = scored(*totals)
    assert [one.best and one.best.text for one in found] == [None if place is None else f'answer {place}' for place in best]
    assert all(len(one.siblings) == len(totals) - 1 and one not in one.siblings for one in found)


def test_sibling_is_an_example_that_has_passed():
    failed, passed, better = scored(0, 1, 2)
    assert 'answer 2' in sibling(failed) and 'answer 2' in sibling(passed) and 'answer 1' in sibling(better)
    assert sibling(failed).startswith('why ?\n')
    (alone,), (_, best) = scored(3), scored(0.9, 3)
    assert sibling(alone) is None and sibling(best) is None  # its sibling has failed


def texts(run) -> dict[tuple, str | None]:
    return {(*one['key'],): one['feedback'] for one in flat(run)}


def expected(run, passing: float = FEEDBACK['gkd_passing_reward']) -> dict[tuple, str | None]:
    """What :func:`short` says, of what was seen of a run."""
    found, words = {}, run.backend.template.safe_decode
    for of in groups(run).values():
        for one in of:
            others = [other for other in of if other is not one]
            best = max(others, key=lambda other: other['reward']['total'])  # the first of several
            ids, reason = best['response']
            better = len(of) == 4 and best['reward']['total'] >= passing and best['reward']['total'] > one['reward']['total']
            found[(*one['key'],)] = f'{words(ids if reason == "length" else ids[:-1])} {one["question"]}' if better else None
    return found


def test_each_response_hears_of_the_best_other_one(make):
    run = make(**TOLD, max_steps=5).train()
    assert texts(run) == expected(run)
    of = list(texts(run).values())
    assert 0.1 < sum(text is not None for text in of) / len(of) < 0.9
    assert [line['feedback'] for line in run.completions] == of
    for log, step in zip(run.logs, run.steps, strict=True):
        told = [one['feedback'] is not None for batch in step for one in batch]
        assert log['feedback/share'] == pytest.approx(sum(told) / len(told))
        assert 'reward' in log and 'reward_std' not in log and 'pg_loss' not in log


def test_without_a_feedback_there_is_nothing_of_it(make):
    run = make(**{**TOLD, 'gkd_feedback': None}, max_steps=2).train()
    assert set(texts(run).values()) == {None} and not any('feedback' in line for line in run.completions)
    assert not any('feedback/share' in log for log in run.logs)


@pytest.mark.parametrize('weight', [0.0, 0.5])
def test_the_same_however_it_is_split(make, weight):
    """Whole groups, with or without rewards in the loss, also beside responses of the dataset, which get none."""
    runs = [make(**{**TOLD, 'lmbda': 0.6, 'max_steps': 4, 'gkd_rl_weight': weight, **how}).train() for how in SPLITS]
    assert {one['source'] for one in flat(runs[0])} == {'student', 'dataset'} and any(texts(runs[0]).values())
    assert {key: text for key, text in texts(runs[0]).items() if text} == {k: v for k, v in expected(runs[0]).items() if v}
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-9) and texts(run) == texts(runs[0])


def teachers_ids(run) -> dict[tuple, list[int]]:
    """What the teacher reads of each response of the next steps, by key."""
    found, views = {}, run.conductor.encoder.views

    def noted(sample):
        student, teacher = views(sample)
        found[sample.row.key] = (teacher or student)['input_ids']
        return student, teacher

    run.conductor.encoder.views = noted
    return found


@pytest.mark.parametrize('strategy', ['raise', 'left'])
@pytest.mark.parametrize('kind', ['plain', 'engine', 'scheduler', 'later step'])
def test_the_teacher_reads_it_as_it_would_the_column(make, template, rows, monkeypatch, kind, strategy):
    """Row by row the ids of a run whose dataset has the same text in ``teacher_prompt``; so is its loss."""
    monkeypatch.setitem(feedbacks, 'hint', lambda response, /, hint, **columns: hint)
    monkeypatch.setattr(template, 'truncation_strategy', strategy)
    data = [{**row, 'bonus': 1, 'half': False, 'hint': f'so {i} . {row["messages"][0]["content"]}'} for i, row in enumerate(rows[:10])]
    column = [{**row, 'teacher_prompt': row['hint']} for row in data]
    how = {
        'plain': {},
        'engine': {'use_vllm': True},
        'scheduler': {'use_vllm': True, 'multi_turn_scheduler': 'asks once more'},
        'later step': {'steps_per_generation': 6},
    }[kind]
    options = {**TOLD, 'gkd_num_samples': 2, 'max_steps': 3, **how}
    by_feedback = make(**options | {'gkd_feedback': 'hint'}, dataset=Dataset.from_list(data))
    by_column = make(**options | {'gkd_feedback': None}, dataset=Dataset.from_list(column))
    found = [teachers_ids(run) for run in (by_feedback, by_column)]
    assert by_feedback.train().losses == by_column.train().losses
    assert found[0] == found[1] and len(found[0]) == 12
    plain = make(**options | {'gkd_feedback': None}, dataset=Dataset.from_list(data)).train()
    assert by_feedback.losses[0] != plain.losses[0]


def test_a_server_is_asked_with_it(make):
    server = FakeServer()
    run = make('server', server, **TOLD, max_steps=2)
    found, requested, question = teachers_ids(run), [], run.conductor.encoder.question

    def noted(sample, *args):
        asked = question(sample, *args)
        requested.append((sample.feedback or sample.content['messages'][0]['content'], asked.request['messages'][0]['content']))
        return asked

    run.conductor.encoder.question = noted
    run.train()
    assert len(requested) == 8 and all(meant == sent for meant, sent in requested)  # as messages, which is what swift deploy takes
    assert sorted(map(tuple, server.scored)) == sorted(tuple(ids) for ids in found.values())
    words = run.backend.template.safe_decode
    told = [(key, text) for key, text in texts(run).items() if text]
    assert told and all(text in words(found[key]) for key, text in told)


class Judge:
    """A class, whose calls wait for each other's answers."""

    made: list = []

    def __init__(self, args):
        self.made.append(args.gkd_num_samples)
        self.waiting = 0

    async def __call__(self, response, messages, bonus, teacher_prompt=None, **columns):
        assert [message['role'] for message in messages] == ['user'] and set(response.rewards) == {'Length', 'Even'}
        assert response.question == (teacher_prompt or messages[0]['content'])
        self.waiting += 1
        while self.waiting < 2:
            await asyncio.sleep(0)
        return f'{bonus} {response.total:.3f} {response.question}' if response.rewards['Even'] else None


def test_a_class_that_waits(make, rows, monkeypatch):
    """It is made once, and is asked about all responses at the same time; what it says nothing about has the row's own prompt."""
    monkeypatch.setitem(feedbacks, 'judge', Judge)
    monkeypatch.setattr(Judge, 'made', [])
    data = [
        {**row, 'bonus': 1 + i % 3, 'half': False, 'teacher_prompt': f'think : {row["messages"][0]["content"]}'}
        for i, row in enumerate(rows)
    ]
    run = make(**{**TOLD, 'gkd_feedback': 'judge', 'gkd_num_samples': 1, 'steps_per_generation': 1}, dataset=Dataset.from_list(data[:10]))
    found = teachers_ids(run)
    run.train()
    words = run.backend.template.safe_decode
    assert Judge.made == [1] and {text is None for text in texts(run).values()} == {True, False}
    for one in flat(run):
        row, (_, even) = data[one['key'][0]], one['reward']['parts']
        expected = f'{row["bonus"]} {one["reward"]["total"]:.3f} think : {one["question"]}' if even else None
        assert one['feedback'] == expected and (expected or f'think : {one["question"]}') in words(found[(*one['key'],)])


def wrong(how):
    def function(response, /, **columns):
        if how == 'raises':
            raise KeyError('stdout')
        return 7 if how == 'a number' else ''

    return function


@pytest.mark.parametrize(
    ('how', 'says'),
    [
        ('raises', r"--gkd_feedback wrong failed: KeyError: 'stdout' \(.*test_step_feedback.py, line \d+\)"),
        ('a number', '--gkd_feedback wrong returned 7; it must be a text'),
        ('no text', "--gkd_feedback wrong returned ''"),
    ],
)
def test_a_feedback_that_fails_costs_no_response(make, monkeypatch, how, says):
    """One line with feedback and row; the responses are in the checkpoint without their rewards, and get both when the run goes on."""
    monkeypatch.setitem(feedbacks, 'wrong', short)
    options = {**TOLD, 'gkd_feedback': 'wrong'}
    whole, run = make(**options).train(), make(**options)
    step = run.one_step

    def then_fail(*args) -> None:
        step(*args)
        run.conductor.rewarding.rewards.feedback.function = wrong(how)

    run.one_step = then_fail
    with pytest.raises(RewardError, match=says) as error:
        run.train()
    assert '\n' not in str(error.value) and 'Step 2' in str(error.value) and str(error.value).count('(student)') == 1
    kept = json.loads(Path(run.backend.checkpoint, 'gkd_cycle_rank0.json').read_text())
    assert all('token_ids' in one and not {'reward', 'feedback'} & one.keys() for samples in kept['micro_batches'] for one in samples)
    resumed = make(**options).train(run.backend.checkpoint)
    assert resumed.steps == whole.steps[1:] and resumed.losses == whole.losses[1:] and any(texts(resumed).values())


def test_what_does_not_fit_is_left_out_and_said(make, monkeypatch, said):
    """The question would be cut, or what the feedback says; the teacher sees what it would without."""
    monkeypatch.setitem(
        feedbacks, 'long', lambda response, /, **columns: 'so ' * 200 if response.rewards['Even'] else response.question + ' ?'
    )
    run = make(**{**TOLD, 'gkd_feedback': 'long'}, max_steps=10).train()
    for one in flat(run):
        even = one['reward']['parts'][1]
        assert one['feedback'] == (None if even else one['question'] + ' ?')
    lines = [line for line in said if 'its feedback cannot be encoded' in line]
    assert len(lines) == 5 and all('(student)' in line and 'tokens, more than --max_length 128' in line for line in lines)
    assert any('10 feedbacks could not be encoded; the first 5 are named above' in line for line in said)


def test_nobody_is_told_where_no_teacher_looks(make):
    """After a switch to rewards alone."""
    run = make(**{**TOLD, 'gkd_rl_weight': 1.0, 'gkd_rl_schedule': 'switch', 'gkd_passing_reward': 0.5}, max_steps=4).train()
    assert ['feedback/share' in log for log in run.logs] == [True, True, False, False]
    assert any(text for step in run.steps[:2] for batch in step for text in [one['feedback'] for one in batch])


def test_a_feedback_that_cannot_be(make, rows, monkeypatch):
    with pytest.raises(OptionError, match=r'--gkd_feedback siblings: no such feedback; there are .*short, sibling, and what a file of'):
        make(**{**TOLD, 'gkd_feedback': 'siblings'})
    monkeypatch.setitem(feedbacks, 'text', 'a text')
    with pytest.raises(OptionError, match='--gkd_feedback text: it must be a function'):
        make(**{**TOLD, 'gkd_feedback': 'text'})
    monkeypatch.setitem(feedbacks, 'plain', lambda response: None)
    with pytest.raises(OptionError, match=r'--gkd_feedback plain: it takes no \*\*kwargs'):
        make(**{**TOLD, 'gkd_feedback': 'plain'})
    monkeypatch.setitem(feedbacks, 'class', type('Broken', (), {'__init__': lambda self, args: args['x']}))
    with pytest.raises(OptionError, match='--gkd_feedback class: TypeError'):
        make(**{**TOLD, 'gkd_feedback': 'class'})
    monkeypatch.setitem(feedbacks, 'needs', lambda response, /, stdout, **columns: stdout)
    args = make(**{**TOLD, 'gkd_feedback': 'needs'}).args
    data = Dataset.from_list([{**row, 'bonus': 1, 'half': False} for row in rows[:2]])
    with pytest.raises(OptionError, match='--gkd_feedback needs needs the column stdout; as ms-swift has loaded it'):
        rewards_of(args, 8, 'the rows of a step', data)
    with pytest.raises(OptionError, match=r'--gkd_num_samples 4: --gkd_feedback needs looks at all .*, 6, are no multiple'):
        rewards_of(args, 6, 'the rows of a step', None)


@pytest.mark.parametrize(
    ('changed', 'says'),
    [
        ({'reward_funcs': []}, '--gkd_feedback sibling without --reward_funcs'),
        ({'gkd_loss_weight': 0.0}, '--gkd_feedback sibling with --gkd_loss_weight 0: no teacher looks'),
        ({'lmbda': 0.0, 'gkd_eval_source': 'student'}, '--gkd_feedback sibling with --lmbda 0'),
        ({'gkd_num_samples': 1}, '--gkd_feedback sibling with --gkd_num_samples 1'),
        ({'temperature': 0.0, 'gkd_temperature': 1.0}, '--gkd_feedback sibling with .* --temperature 0.0'),
        ({'gkd_num_samples': 1, 'gkd_feedback': 'short'}, None),
        ({}, None),
    ],
)
def test_options(changed, says):
    given = {
        **vars(GKDOptions()),
        **{'beta': 0.5, 'lmbda': 1.0, 'temperature': 1.0, 'max_completion_length': 9, 'sft_alpha': 0.0, 'seq_kd': False},
        **{'teacher_model': 'x', 'teacher_model_server': None, 'teacher_adapters': [], 'offload_teacher_model': False},
        **{'gkd_logits_topk': None, 'use_vllm': False, 'multi_turn_scheduler': None, 'truncation_strategy': 'delete'},
        **{'reward_funcs': ['x'], 'reward_model': None, 'reward_weights': None, 'metric_for_best_model': None},
        **{'epsilon': 0.2, 'epsilon_high': None, 'delta': None},
        **{'gkd_feedback': 'sibling', 'gkd_num_samples': 2, 'gkd_rl_weight': 0.0},
        **changed,
    }
    if says is None:
        check_values(SimpleNamespace(**given))
        return
    with pytest.raises(OptionError, match=says):
        check_values(SimpleNamespace(**given))
