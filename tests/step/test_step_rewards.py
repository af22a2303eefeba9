"""Rewards: which responses are compared, with what result, in every order and split; and what happens when a function fails."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fake_backend import REWARDS, FakeServer, flat, opinion
from swift.rewards import ORM, orms

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.divergence import Divergence
from swift_gkd_plugin.rewards import RewardError, Rewards, rewards_of
from swift_gkd_plugin.step.objective import LossOptions

GROUPED = {'lmbda': 1, 'gkd_num_samples': 4, 'steps_per_generation': 2, **REWARDS}
# The same eight rows of a step.
SPLITS = [
    {'per_device_train_batch_size': size, 'gradient_accumulation_steps': 8 // size, 'steps_per_generation': 8 // size} for size in (8, 2, 4)
]


def groups(run) -> dict[tuple[int, int], list[dict]]:
    """The student's samples by prompt."""
    found: dict[tuple[int, int], list[dict]] = {}
    for one in flat(run):
        if one['source'] == 'student':
            number, epoch, _ = one['key']
            found.setdefault((epoch, number), []).append(one)
    return found


def expected(parts: list[list[float | None]], weights=(1.0, 0.5)) -> list[float]:
    """(r - mean) / (std + 1e-4) of a prompt's responses (GRPO, Shao et al., 2024, arXiv 2402.03300)."""
    totals = [sum(w * (p or 0) for w, p in zip(weights, of, strict=True)) for of in parts]
    mean = sum(totals) / len(totals)
    std = math.sqrt(sum((r - mean) ** 2 for r in totals) / (len(totals) - 1))
    return [(r - mean) / (std + 1e-4) for r in totals]


@pytest.mark.parametrize(
    ('size', 'parts', 'cycle'), [(2, 2, 2), (4, 1, 1), (1, 4, 4), (2, 2, 4), (4, 2, 1), (2, 2, 6)], ids=lambda value: str(value)
)
def test_an_advantage_is_that_over_the_responses_to_one_prompt(make, size, parts, cycle):
    """However the step is split, and whether a generation batch is longer or shorter than it."""
    options = {**GROUPED, 'per_device_train_batch_size': size, 'gradient_accumulation_steps': parts, 'steps_per_generation': cycle}
    run = make(**options, max_steps=6).train()
    whole = {place: of for place, of in groups(run).items() if len(of) == 4}
    assert len(whole) >= 5
    for of in groups(run).values():  # the run may end in the middle of one
        for one in of:
            length, even = one['reward']['parts']
            assert length > 0 and even in (0.0, 1.0, None)
            assert one['reward']['total'] == pytest.approx(length + 0.5 * (even or 0))
    for of in whole.values():
        assert [one['reward']['advantage'] for one in of] == pytest.approx(
            expected([one['reward']['parts'] for one in of]), rel=1e-4, abs=1e-5
        )
    assert any(None in one['reward']['parts'] for of in whole.values() for one in of)


def test_groups_stay_whole_beside_responses_of_the_dataset(make):
    """A row of the dataset is there once, in the places that its prompt's responses would have had."""
    run = make(**{**GROUPED, 'lmbda': 0.5, 'max_steps': 20}).train()
    assert {len(of) for of in groups(run).values()} == {4}
    dataset = [one for one in flat(run) if one['source'] == 'dataset']
    assert dataset and all(one['key'][2] == 0 and one['reward'] is None for one in dataset)
    assert len(dataset) + len(groups(run)) == 20  # of four places each


def test_equal_rewards_teach_nothing(make, monkeypatch):
    """0.1 is not the mean of three times 0.1 in float32; divided by a standard deviation of 0 that would be something."""

    class Same(ORM):
        def __call__(self, completions, **kwargs):
            return [0.1] * len(completions)

    monkeypatch.setitem(orms, 'same', Same)
    for scale, estimator in itertools.product(('group', 'batch', 'none'), ('grpo', 'rloo', 'reinforce_plus_plus')):
        options = {'reward_funcs': ['same'], 'scale_rewards': scale, 'advantage_estimator': estimator, 'gkd_num_samples': 3}
        run = make(None, lmbda=1, gkd_loss_weight=0.0, steps_per_generation=3, gradient_accumulation_steps=3, max_steps=2, **options)
        run.train()
        assert not run.backend.weights.any() and run.losses == [0, 0]
        assert run.logs[0]['frac_reward_zero_std'] == 1 and run.logs[0]['reward'] == pytest.approx(0.1)


def test_rewards_are_what_is_learnt(make):
    """Of the fake student: each token's weight moves by its response's advantage, times what its cross-entropy says."""
    run = make(None, **{**GROUPED, 'gkd_loss_weight': 0.0, 'gkd_rl_weight': 0.3, 'max_steps': 1}).train()
    samples = flat(run)
    tokens = sum(len(one['response'][0]) for one in samples)
    weights = torch.zeros(512, dtype=torch.float64)
    for one in samples:
        for token in one['response'][0]:  # of (weight - 1)², at 0
            weights[token] += 0.5 * 0.3 * one['reward']['advantage'] * 2 / tokens
    assert run.backend.weights.tolist() == pytest.approx(weights.tolist(), rel=1e-6, abs=1e-9)
    loss = sum(0.3 * one['reward']['advantage'] * len(one['response'][0]) for one in samples) / tokens
    assert run.losses == pytest.approx([loss], rel=1e-5) and run.logs[0]['pg_loss'] == pytest.approx(loss / 0.3, rel=1e-5)


@pytest.mark.parametrize('lmbda', [0.5, 1])
def test_at_weight_0_rewards_are_measured_only(make, lmbda):
    """Also where the rows of a generation batch are no multiple of the responses."""
    options = {**GROUPED, 'lmbda': lmbda, 'gkd_num_samples': 3, 'max_steps': 4}
    plain, measured = make(**{**options, 'reward_funcs': []}).train(), make(**options, gkd_rl_weight=0.0).train()
    assert measured.losses == plain.losses and torch.equal(measured.backend.weights, plain.backend.weights)
    assert any('reward' in log for log in measured.logs) and not any('pg_loss' in log or 'reward_std' in log for log in measured.logs)
    assert not any('reward' in log for log in plain.logs)


def test_what_is_logged_does_not_depend_on_micro_batches(make):
    """Of some of which nothing is rewarded."""
    options = {**GROUPED, 'lmbda': 0.5, 'max_steps': 3}
    runs = [make(**{**options, **how}).train() for how in SPLITS]
    assert {sample['source'] for sample in flat(runs[0])} == {'student', 'dataset'}
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-9)
        for log, expected in zip(run.logs, runs[0].logs, strict=True):
            assert log['pg_loss'] == pytest.approx(expected['pg_loss'], rel=1e-6)


def test_from_distillation_to_rewards(make):
    """In both schedules the first step is the divergence's, and the last the rewards'; without a divergence nobody asks the teacher."""
    for schedule, asked in (('linear', [0, 1, 2]), ('switch', [0, 1])):
        options = {**GROUPED, 'max_steps': 4}
        run = make(**options, gkd_rl_schedule=schedule).train()
        assert len(run.backend.looked_at) == len(asked) and ['divergence' in log for log in run.logs] == [i in asked for i in range(4)]
        distilled = make(**{**options, 'gkd_rl_weight': 0.0, 'max_steps': 1}).train()
        assert run.losses[0] == distilled.losses[0] and run.losses[-1] == pytest.approx(run.logs[-1]['pg_loss'], rel=1e-5)


@pytest.mark.parametrize('schedule', [('constant', 0.5), ('linear', 0.5), ('switch', 0.25)])
def test_weights_over_a_run(schedule):
    options = LossOptions(Divergence(), 1.0, 0.0, 'bucket', None, reward_weight=1.0, schedule=schedule)
    found = [options.shares(step, 5) for step in range(5)]
    expected = {
        'constant': [(1, 1)] * 5,
        'linear': [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)],
        'switch': [(1, 0), (1, 0), (0, 1), (0, 1), (0, 1)],
    }
    assert found == expected[schedule[0]]
    assert dataclasses.replace(options, reward_weight=0.0).shares(4, 5) == (1, 1)


@pytest.mark.parametrize('which', ['failed', 'passed'])
def test_only_some_responses_are_compared_with_the_teacher(make, which):
    """The others keep their reward, and their tokens keep counting."""
    options = {**GROUPED, 'gkd_rl_weight': 1e-9, 'max_steps': 1}
    whole = make(**options).train()
    first = flat(whole)
    passing = sorted(one['reward']['total'] for one in first)[2]
    run = make(**options, gkd_on=which, gkd_passing_reward=passing).train()
    counts = [(one['reward']['total'] >= passing) == (which == 'passed') for one in first]
    assert 0 < sum(counts) < len(counts)
    opinions = [sum(float(opinion(torch.tensor(token))) ** 2 for token in one['response'][0]) for one in first]
    total = sum(len(one['response'][0]) for one in first)  # weights are 0: a token's divergence is the square of what the teacher says
    assert run.losses[0] == pytest.approx(sum(o for o, c in zip(opinions, counts, strict=True) if c) / total, rel=1e-5)
    assert whole.losses[0] == pytest.approx(sum(opinions) / total, rel=1e-5)


def test_what_is_logged(make):
    run = make(**GROUPED, max_steps=1).train()
    (log,), of = run.logs, [one['reward'] for one in flat(run)]
    assert log['reward'] == pytest.approx(sum(one['total'] for one in of) / len(of))
    assert log['advantage/abs'] == pytest.approx(sum(abs(one['advantage']) for one in of) / len(of))
    assert log['rewards/Length/mean'] == pytest.approx(sum(one['parts'][0] for one in of) / len(of))
    assert {'reward_std', 'frac_reward_zero_std', 'rewards/Length/std', 'rewards/Even/mean', 'seconds/rewards'} <= set(log)
    for line, reward in zip(run.completions, of, strict=True):
        assert [line['reward'], line['rewards/Length'], line['rewards/Even'], line['advantage']] == [
            reward['total'],
            *reward['parts'],
            reward['advantage'],
        ]


def test_what_has_one_name_has_a_number(make):
    """Two files of models end in checkpoint-500, say: what is logged of the one is not that of the other."""
    run = make(**{**GROUPED, 'reward_funcs': ['length', 'even', 'length'], 'reward_weights': [1.0, 0.5, 0.0]}, max_steps=1).train()
    assert {'rewards/Length/mean', 'rewards/Even/mean', 'rewards/Length-2/mean'} <= set(run.logs[0])
    rewards = Rewards(run.args)
    rewards.take([SimpleNamespace(name='checkpoint-500'), SimpleNamespace(name='checkpoint-500')])
    assert rewards.names == ['Length', 'Even', 'Length-2', 'checkpoint-500', 'checkpoint-500-2']


SAMPLED = {'gkd_signal': 'sampled', 'lmbda': 0.5, 'sft_alpha': 0.5, 'gkd_num_samples': 1}


def test_a_server_is_asked_about_what_the_student_sampled_only(make):
    server = FakeServer()
    run = make('server', server, **SAMPLED, max_steps=6).train()
    counted = flat(run)
    assert {one['source'] for one in counted} == {'student', 'dataset'}
    answers = [str(one['response'][0])[1:-1] for one in counted if one['source'] == 'student']
    assert len(server.scored) == len(answers) and all(any(answer in str(ids) for answer in answers) for ids in server.scored)
    assert all(math.isfinite(loss) for loss in run.losses)


@pytest.mark.parametrize('options', [{}, {**REWARDS, 'gkd_num_samples': 2}])
def test_later_steps_of_a_cycle_know_the_student_that_sampled(make, options):
    """With rewards and without, and of no other responses."""
    run = make(None, **{**SAMPLED, **options, 'steps_per_generation': 4, 'max_steps': 2})
    found, look = [], run.backend.look
    run.backend.look = lambda batch: found.append((run.backend.step, batch)) or look(batch)
    run.train()
    for step, batch in found:
        if not run.conductor.books.training or step == 0:
            continue
        old = batch.old_logprobs if batch.old_logprobs is not None else torch.full((batch.num_tokens,), torch.nan)
        assert torch.equal(old.isnan(), batch.imitated.bool())
    assert any(batch.old_logprobs is not None for step, batch in found if step == 1)


def test_a_part_of_the_distribution_is_warned_of(make, said):
    make(**SAMPLED)
    assert not any('a part of the distribution' in line for line in said)
    make(**SAMPLED, top_p=0.9, top_k=50)
    (line,) = (line for line in said if 'a part of the distribution' in line)
    assert '--gkd_signal sampled with --top_k 50 --top_p 0.9: ' in line


def test_an_evaluation_of_others_has_no_divergence(make, dataset):
    """Nor has one of tokens that were sampled at another temperature, or greedily: their mean estimates no KL."""
    for source, at, has in (('dataset', None, False), ('student', None, True), ('student', 1.0, True), ('student', 0.0, False)):
        run = make(**{**SAMPLED, 'gkd_eval_source': source, 'gkd_eval_temperature': at})
        assert ('divergence' in run.evaluate(dataset)) == has and bool(run.backend.looked_at) == has


@pytest.mark.parametrize('weight', [0.0, 1.0])
def test_an_evaluation_measures_rewards(make, dataset, weight):
    run = make(**{**GROUPED, 'gkd_eval_source': 'student', 'gkd_rl_weight': weight})
    found = [run.evaluate(dataset, *way) for way in ((1, 1), (3, 2), (10, 1))]
    for one in found:
        assert one == pytest.approx(found[0], rel=1e-9) and one['reward'] > 0 and {'rewards/Length', 'rewards/Even'} <= set(one)
    assert 'reward' not in make(**{**GROUPED, 'gkd_eval_source': 'dataset'}).evaluate(dataset)


class Wrong(ORM):
    def __call__(self, completions):
        return [1.0] * len(completions)


class Failing(ORM):
    """Does as it is told."""

    how = None

    def __call__(self, completions, messages, **kwargs):
        if self.how == 'raises':
            raise KeyError('solution')
        values = [1.0] * len(completions)
        if self.how == 'too few':
            return values[1:]
        if self.how == 'no list':
            return 1.0
        if self.how in ('not a number', 'a text'):
            values[2] = {'not a number': float('nan'), 'a text': 'good'}[self.how]
        return values


@pytest.mark.parametrize(
    ('how', 'says'),
    [
        ('raises', r'reward function failing \(Failing\) failed: KeyError.*line \d+\)'),
        ('too few', 'returned 3 values for 4 responses;'),
        ('not a number', r'\(Failing\) returned nan \(None is'),
        ('a text', r"\(Failing\) returned 'good', which is no number"),
        ('no list', r'\(Failing\) returned 1.0, not a list with a number for each of 4 responses'),
    ],
)
def test_a_function_that_fails_costs_no_response(make, monkeypatch, how, says):
    """One line with function and row; the responses are in the checkpoint, and are scored when the run goes on."""
    monkeypatch.setitem(orms, 'failing', Failing)
    options = {**GROUPED, 'reward_funcs': ['failing'], 'reward_weights': None}
    whole = make(**options).train()
    run = make(**options)
    step = run.one_step

    def then_fail(*args) -> None:
        step(*args)
        monkeypatch.setattr(Failing, 'how', how)

    run.one_step = then_fail
    with pytest.raises(RewardError, match=says) as error:
        run.train()
    assert '\n' not in str(error.value) and 'Step 2' in str(error.value) and 'of epoch 0 (student)' in str(error.value)
    assert str(error.value).count('(student)') == 1  # of the four
    kept = json.loads(Path(run.backend.checkpoint, 'gkd_cycle_rank0.json').read_text())
    assert all('token_ids' in one and 'reward' not in one for samples in kept['micro_batches'] for one in samples)
    monkeypatch.setattr(Failing, 'how', None)
    resumed = make(**options).train(run.backend.checkpoint)
    assert resumed.steps == whole.steps[1:] and resumed.losses == whole.losses[1:]


def test_what_a_scheduler_says_is_there_when_the_run_goes_on(make, monkeypatch):
    """As far as a checkpoint can hold it."""
    seen = []

    class OfTurns(ORM):
        fails = True

        def __call__(self, completions, rollout_infos, **kwargs):
            if self.fails:
                raise ValueError('not now')
            seen.extend(rollout_infos)
            return [float(infos['turns']) for infos in rollout_infos]

    monkeypatch.setitem(orms, 'of_turns', OfTurns)
    options = {**GROUPED, 'reward_funcs': ['of_turns'], 'reward_weights': None, 'use_vllm': True, 'multi_turn_scheduler': 'asks once more'}
    run = make(**options, max_steps=1)
    with pytest.raises(RewardError, match='not now'):
        run.train()
    monkeypatch.setattr(OfTurns, 'fails', False)
    resumed = make(**options, max_steps=1).train(run.backend.checkpoint)
    assert len(seen) == 4 and set(seen[0]) == {'turns'}  # what JSON would change is no better than what it cannot hold
    assert [one['reward']['total'] for one in flat(resumed)] == [infos['turns'] for infos in seen]


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'reward_funcs': ['lenght']}, '--reward_funcs lenght: not a reward function; there are .*length'),
        ({'reward_weights': [1.0]}, '--reward_weights has 1 numbers for 2 reward functions .Length, Even.'),
    ],
)
def test_what_cannot_be_scored_with(make, options, says):
    with pytest.raises(OptionError, match=says):
        make(**{**GROUPED, **options})


def test_what_the_data_and_the_functions_must_have(make, rows, monkeypatch):
    args = make(**GROUPED).args
    with pytest.raises(OptionError, match='Length needs the column bonus; as ms-swift has loaded it, the dataset has messages'):
        rewards_of(args, 4, 'the rows of a step', Dataset.from_list(rows[:2]), None)
    with pytest.raises(OptionError, match=r'--gkd_num_samples 4: .* the rows of a step, 6, are no multiple'):
        rewards_of(args, 6, 'the rows of a step', None)
    with monkeypatch.context() as patch:
        patch.setitem(orms, 'wrong', Wrong)
        args.reward_funcs, args.reward_weights = ['wrong'], None
        with pytest.raises(OptionError, match=r'wrong \(Wrong\) takes no \*\*kwargs'):
            rewards_of(args, 8, 'the rows of a step', None)
        patch.setitem(orms, 'wrong', len)
        with pytest.raises(OptionError, match='wrong: it must be a class'):
            rewards_of(args, 8, 'the rows of a step', None)
        args.reward_funcs = ['length']
    assert isinstance(rewards_of(args, 8, 'the rows of a step', None), Rewards)
