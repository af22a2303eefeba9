"""Rewards through the real command line: ms-swift's own GRPO on the same responses, layouts, checkpoints, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import commands
import helpers
import job_runs
import pytest
import reward_functions
import torch
from transformers import AutoModelForSequenceClassification

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
def hinted(dataset) -> Path:
    """The same rows, with what the feedback ``hint`` says about every response to them."""
    path = dataset.with_name('hinted.jsonl')
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    rows = [{**row, 'teacher_prompt': reward_functions.hint(None, row['messages'][:1])} for row in rows]
    return helpers.write_rows(path, rows)


@pytest.fixture(scope='module')
def runs(run_jobs, dataset, hinted, judges, tmp_path_factory):
    live = {**STEP, 'dataset': dataset, 'gkd_rl_weight': 0, 'teacher_model': None, 'teacher_model_type': None, 'log_completions': 'true'}
    alone = {**STEP, 'dataset': dataset, 'gkd_loss_weight': 0}
    both = {**STEP, 'dataset': dataset, 'gkd_rl_weight': 0.3}
    root, updates = (tmp_path_factory.mktemp(name) for name in ('twice', 'updates'))  # stock takes the responses of the run beside it
    twice, updated = {**alone, **TWICE}, {**alone, 'learning_rate': 1e-3}
    sampled, taught = {**updated, **SAMPLED}, {**updated, **TAUGHT, 'gkd_loss_weight': None}
    of_response, of_each = ({'importance_sampling_level': level} for level in ('sequence', 'sequence_token'))
    by_model = tmp_path_factory.mktemp('judged')
    judge = {'reward_model': judges['judge'], 'reward_model_type': 'qwen3', 'reward_template': 'qwen3'}
    judged, only = (
        {**alone, 'reward_funcs': 'ids', **judge, 'reward_weights': [1, 0.5]},
        {'reward_funcs': None, 'reward_weights': None, **judge},
    )
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
            'hint': {**live, 'gkd_feedback': 'hint'},
            'hint in a column': {**live, 'dataset': hinted},
            'judged': {**judged, 'output_dir': by_model / 'gkd', 'log_completions': 'true'},
            'judged, grpo': {**judged, **GRPO, 'gkd_loss_weight': None, 'output_dir': by_model / 'grpo'},
            'judged alone': {
                **alone,
                **only,
                'reward_model_type': None,
                'log_completions': 'true',
                'padding_free': 'true',
                'attn_impl': 'sdpa',
                'max_steps': 1,
            },
            'judged by none': {**alone, **only, 'reward_model': judges['none'], 'max_steps': 1},
            'two names': {**alone, **only, 'reward_model_plugin': ['default', 'default']},
            'no template': {**alone, **only, 'reward_template': None},
            'another plugin': {**alone, **only, 'reward_model_plugin': 'mine'},
            'another weight': {**judged, 'reward_weights': 1},
            'sibling': {**live, 'gkd_feedback': 'sibling', 'gkd_passing_reward': 0.9, 'max_length': 512},
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


def scores(judge: Path, lines: list[dict]) -> list[float]:
    """What a reward model says of conversations, one after the other, by transformers; ms-swift's template makes tokens of them."""
    from swift.model import get_model_processor
    from swift.template import get_template

    template = get_template(get_model_processor(str(judge), model_type='qwen3', load_model=False)[1], template_type='qwen3')
    template.set_mode('train')
    model, found = AutoModelForSequenceClassification.from_pretrained(judge), []
    for line in lines:
        answer = line['completion'].removesuffix('<|im_end|>') if line['finish_reason'] == 'stop' else line['completion']
        ids = template.encode({'messages': [*line['prompt'], {'role': 'assistant', 'content': answer}]})['input_ids']
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits[0, 0].item())
    return found


@pytest.mark.e2e
def test_a_reward_model_scores_as_by_transformers(runs, judges):
    for name in ('judged', 'judged alone'):
        run = runs[name].ok()
        # --loss_scale decides whether a space at the beginning makes one token with what the template has in front of it.
        lines = [line for line in run.completions if not line['completion'].startswith(' ')]
        expected = scores(judges['judge'], lines)
        assert [line['rewards/judge'] for line in lines] == pytest.approx(expected, rel=1e-4)
        assert len(lines) > 4 and max(expected) - min(expected) > 0.1
        for line in run.completions:
            assert line['reward'] == pytest.approx(line.get('rewards/Ids', 0.5 * line['rewards/judge']) + 0.5 * line['rewards/judge'])
        held, foretold = run.memory
        assert run.loaded == 2 and held == foretold and held['reward model weights'] > 0


@pytest.mark.e2e
def test_with_a_reward_model_it_is_grpo(runs):
    ours, stock = runs['judged'].ok(), runs['judged, grpo'].ok()
    for name in ('reward', 'reward_std', 'rewards/Ids/mean', 'rewards/judge/mean', 'rewards/judge/std'):
        assert len(ours.values(name)) == 2 and ours.values(name) == pytest.approx(stock.values(name), rel=1e-4)
    for step in (1, 2):
        assert job_runs.relative(ours.gradients(step), stock.gradients(step)) < 1e-4


@pytest.mark.e2e
def test_reward_models_that_cannot_be(runs):
    error = runs['judged by none'].error
    assert error.startswith('RewardError: Step 1: reward model ') and 'none returned nan (None is for what it has no opinion' in error
    for name, says in {
        'two names': '--reward_model_plugin has 2 values for 1 of --reward_model; give one for each',
        'no template': "Multiple possible types found: ['qwen3', ",
        'another plugin': '--reward_model_plugin mine: there are default, genrm, and what a file of',
        'another weight': '--reward_weights has 1 numbers for 2 reward functions and models (Ids, ',
    }.items():
        assert says in runs[name].error and runs[name].loaded == 0, name


@pytest.mark.e2e
def test_a_feedback_is_a_teacher_prompt(runs):
    """Of a teacher that is the student itself: what it has read is all that it knows better."""
    told, column = runs['hint'].ok(), runs['hint in a column'].ok()
    assert told.losses == pytest.approx(column.losses, rel=1e-6) and min(told.losses) > 1e-4
    assert told.values('divergence') == pytest.approx(told.losses, rel=1e-6)
    for step in (1, 2):
        assert job_runs.relative(told.gradients(step), column.gradients(step)) < 1e-5
    assert told.values('feedback/share') == [1, 1] and not column.values('feedback/share')
    assert all(line['feedback'] == reward_functions.hint(None, line['prompt']) for line in told.completions)


@pytest.mark.e2e
def test_the_best_sibling_is_read(runs):
    run = runs['sibling'].ok()
    lines = run.completions
    groups = [lines[start : start + 4] for start in range(0, 16, 4)]
    told = 0
    for group in groups:
        for line in group:
            others = [other for other in group if other is not line]
            best = max(others, key=lambda other: other['reward'])
            assert (line['feedback'] is not None) == (best['reward'] > 0.9 - 1e-6)
            if line['feedback'] is None:
                assert line['divergence'] < 1e-9
                continue
            told += 1
            assert best['completion'].removesuffix('<|im_end|>') in line['feedback'] and line['divergence'] > 1e-6
            assert line['feedback'].startswith(line['prompt'][0]['content'])
    assert 0 < told < 16 and sum(run.values('feedback/share')) * 8 == pytest.approx(told)


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['rewards', 'feedback'])
def test_the_example(tiny_models, tmp_path, name):
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
    with commands.launchers() as path:
        environment = {'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}', **{name: str(place) for name, place in places.items()}}
        returncode, output = helpers.run([EXAMPLES / f'{name}.sh', *helpers.command_line(options)], env=environment, cwd=tmp_path)
    assert returncode == 0, output[-4000:]
    (log,) = [row for row in map(json.loads, (tmp_path / 'logging.jsonl').read_text().splitlines()) if 'loss' in row]
    assert log['reward'] >= 0 and 'rewards/Concise/mean' in log and log['source/student'] == 1
    assert ('feedback/share' in log) == (name == 'feedback')
