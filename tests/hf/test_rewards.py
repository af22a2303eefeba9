"""Rewards through the real command line: ms-swift's own GRPO on the same responses, layouts, checkpoints, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import helpers
import job_runs
import pytest
import reward_functions

EXAMPLES = Path(__file__).parents[2] / 'examples'
FUNCTIONS = {'external_plugins': reward_functions.__file__, 'reward_funcs': ['ids', 'short'], 'reward_weights': [1, 0.5]}
STEP = {
    **job_runs.ONE_STEP,
    **FUNCTIONS,
    **job_runs.IN_ORDER,
    'tuner_type': 'full',
    'max_steps': 2,
    'lmbda': 1,
    'gkd_num_samples': 4,
    'per_device_train_batch_size': 4,
    'temperature': 0.7,
    'max_completion_length': 12,
    'logging_steps': 1,
}
GRPO = {
    'rlhf_type': 'grpo',
    'num_generations': 4,
    'loss_type': 'dapo',
    'beta': 0,
    'teacher_model': None,
    'teacher_model_type': None,
    'lmbda': None,
    'gkd_num_samples': None,
}
# With a teacher, of whose log-probability of the sampled token a part of the advantage is made.
TAUGHT = {**{name: value for name, value in GRPO.items() if not name.startswith('teacher')}, 'teacher_kl_coef': 0.7}
SAMPLED = {'gkd_signal': 'sampled', 'gkd_divergence': 'reverse_kl', 'gkd_loss_weight': 0.7}

# Two updates per generation, the second of which is clipped here and there.
TWICE = {'steps_per_generation': 4, 'learning_rate': 0.1, 'weight_decay': 0, 'epsilon': 0.002, 'epsilon_high': 0.004}


@pytest.fixture(scope='module')
def dataset(tiny_models, tmp_path_factory) -> Path:
    """With a column for the reward functions."""
    path = tmp_path_factory.mktemp('rewarded') / 'rows.jsonl'
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    path.write_text(''.join(json.dumps({**row, 'worth': 1 + i % 3}) + '\n' for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope='module')
def runs(run_jobs, dataset, tmp_path_factory):
    alone = {**STEP, 'dataset': dataset, 'gkd_loss_weight': 0}
    both = {**STEP, 'dataset': dataset, 'gkd_rl_weight': 0.3}
    root, updates = (tmp_path_factory.mktemp(name) for name in ('twice', 'updates'))  # stock takes the responses of the run beside it
    twice, updated = {**alone, **TWICE}, {**alone, 'learning_rate': 1e-3}
    sampled, taught = {**updated, **SAMPLED}, {**updated, **TAUGHT, 'gkd_loss_weight': None}
    of_response, of_each = ({'importance_sampling_level': level} for level in ('sequence', 'sequence_token'))
    return run_jobs(
        {
            'gkd': {**alone, 'log_completions': 'true'},
            'grpo': {**alone, **GRPO, 'gkd_loss_weight': None},
            'twice': {**twice, 'output_dir': root / 'gkd'},
            'twice, grpo': {**twice, **GRPO, 'gkd_loss_weight': None, 'learning_rate': 0.2, 'output_dir': root / 'grpo'},
            'twice, of responses': {**twice, **of_response, 'output_dir': root / 'of responses'},
            'twice, of responses, grpo': {
                **twice,
                **GRPO,
                **of_response,
                'gkd_loss_weight': None,
                'learning_rate': 0.2,
                'output_dir': root / 'of responses, grpo',
            },
            'sampled': {**sampled, 'output_dir': updates / 'gkd'},
            'sampled, grpo': {**taught, 'output_dir': updates / 'grpo'},
            'sampled twice': {**sampled, **TWICE, **of_each, 'output_dir': root / 'sampled'},
            'sampled twice, grpo': {**taught, **TWICE, **of_each, 'learning_rate': 0.2, 'output_dir': root / 'sampled, grpo'},
            'sampled alone': {**sampled, 'reward_funcs': None, 'reward_weights': None, 'gkd_rl_weight': None},
            'both': {**both, 'gkd_detailed_metrics': 'true'},
            'split': {**both, 'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 4},
        }
    )


@pytest.mark.e2e
def test_without_a_divergence_it_is_grpo(runs):
    """One update per generation, loss_type dapo, no reference model; of ms-swift's own trainer on the same responses."""
    ours, stock = runs['gkd'].ok(), runs['grpo'].ok()
    assert ours.loaded == stock.loaded == 1  # no teacher
    for step in (1, 2):
        assert job_runs.relative(ours.gradients(step), stock.gradients(step)) < 1e-5
    for name in ('reward', 'reward_std', 'frac_reward_zero_std', 'rewards/Ids/mean', 'rewards/Short/std'):
        assert ours.values(name) == pytest.approx(stock.values(name), rel=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['twice', 'twice, of responses', 'sampled twice'])
def test_after_two_updates_it_is_grpo(runs, name):
    """ms-swift divides by the tokens of a generation batch, not by those of a step, so its steps are half as large."""
    ours, stock = runs[name].ok(), runs[f'{name}, grpo'].ok()
    assert ours.values('tokens/trained') == [96, 96]
    for step in (1, 2):
        halves = {name: gradient / 2 for name, gradient in ours.gradients(step).items()}
        assert job_runs.relative(halves, stock.gradients(step)) < 1e-5
    (clipped,) = ours.values('clip_ratio')
    assert 0.05 < clipped < 0.95


@pytest.mark.e2e
def test_with_a_sampled_signal_it_is_grpo_with_a_teacher(runs):
    """ms-swift's --teacher_kl_coef, of a local teacher at the temperature of the student."""
    ours, stock = runs['sampled'].ok(), runs['sampled, grpo'].ok()
    for step in (1, 2):
        assert job_runs.relative(ours.gradients(step), stock.gradients(step)) < 1e-5
    parts = [0.7 * d + p for d, p in zip(ours.values('distill_loss'), ours.values('pg_loss'), strict=True)]
    assert ours.losses == pytest.approx(parts, rel=1e-5)
    alone = runs['sampled alone'].ok()
    assert alone.losses == pytest.approx([0.7 * value for value in alone.values('kl_sampled')], rel=1e-5)
    assert alone.values('kl_sampled') == alone.values('divergence')


@pytest.mark.e2e
def test_the_same_however_it_is_split(runs):
    whole, split = runs['both'].ok(), runs['split'].ok()
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert job_runs.relative(split.gradients(2), whole.gradients(2)) < 1e-5
    assert split.values('pg_loss') == pytest.approx(whole.values('pg_loss'), rel=1e-5)


@pytest.mark.e2e
def test_the_loss_is_the_divergence_and_the_rewards(runs):
    run = runs['both'].ok()
    parts = [d + 0.3 * p for d, p in zip(run.values('distill_loss'), run.values('pg_loss'), strict=True)]
    assert run.values('distill_loss') == run.values('divergence')
    assert len(run.values('gradient_ratio')) == 2 and min(run.values('gradient_ratio')) > 0
    assert run.losses == pytest.approx(parts, rel=1e-5)


@pytest.mark.e2e
def test_completions_have_their_rewards(runs):
    lines = runs['gkd'].ok().completions
    assert len(lines) == 16
    for line in lines:
        assert line['reward'] == pytest.approx(line['rewards/Ids'] + 0.5 * line['rewards/Short'])
    for start in range(0, 16, 4):
        assert sum(line['advantage'] for line in lines[start : start + 4]) == pytest.approx(0, abs=1e-5)


@pytest.mark.e2e
def test_the_example(tiny_models, tmp_path):
    """As it stands, but for the models, the dataset and sizes, which are given behind it or by its variables."""
    options = {
        **helpers.QUICK,
        'model_type': 'qwen3',
        'teacher_model_type': 'qwen3',
        'template': 'qwen3',
        'max_steps': 1,
        'max_completion_length': 4,
        'max_length': 128,
    }
    places = {'MODEL': tiny_models.student, 'TEACHER': tiny_models.teacher, 'DATASET': f'{tiny_models.train}#4', 'OUTPUT': tmp_path}
    environment = {'PATH': f'{helpers.SCRIPTS}{os.pathsep}{os.environ["PATH"]}', **{name: str(place) for name, place in places.items()}}
    returncode, output = helpers.run([EXAMPLES / 'rewards.sh', *helpers.command_line(options)], env=environment, cwd=tmp_path)
    assert returncode == 0, output[-4000:]
    (log,) = [row for row in map(json.loads, (tmp_path / 'logging.jsonl').read_text().splitlines()) if 'loss' in row]
    assert log['reward'] >= 0 and 'rewards/Concise/mean' in log and log['source/student'] == 1
