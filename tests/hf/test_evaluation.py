"""Evaluation measures one thing: at learning rate 0 every evaluation gives the same number, however it is batched or sharded."""

from __future__ import annotations

import pytest

COMMON = {
    'tuner_type': 'full',
    'max_steps': 2,
    'learning_rate': 0,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 1,
    'lmbda': 0.5,
    'eval_strategy': 'steps',
    'eval_steps': 1,
}


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models):
    common = {**COMMON, 'val_dataset': f'{tiny_models.val}#13'}
    one = run_jobs(
        {
            'by 1': {**common, 'per_device_eval_batch_size': 1},
            'student': {**common, 'per_device_eval_batch_size': 5, 'gkd_eval_source': 'student'},
            'teacher': {**common, 'per_device_eval_batch_size': 2, 'gkd_eval_source': 'teacher'},
            'dense': {**common, 'per_device_eval_batch_size': 5, 'sft_alpha': 0.5},
        }
    )
    two = run_jobs({'two ranks': {**common, 'per_device_eval_batch_size': 2}}, nproc=2)
    return {**one, **two}


@pytest.mark.parametrize('name', ['by 1', 'student', 'teacher', 'two ranks'])
def test_every_evaluation_is_the_same(runs, name):
    values = runs[name].ok().values('eval_loss')
    assert len(values) == 2
    assert values == pytest.approx([values[0]] * 2, rel=1e-7)


def test_batches_and_ranks_do_not_matter(runs):
    alone, two = (runs[name].ok() for name in ('by 1', 'two ranks'))
    assert two.values('eval_loss')[0] == pytest.approx(alone.values('eval_loss')[0], rel=1e-6)
    assert two.values('eval_tokens')[0] == alone.values('eval_tokens')[0]


def test_generated_sources_differ_from_the_dataset(runs):
    assert len({round(runs[name].values('eval_loss')[0], 6) for name in ('by 1', 'student', 'teacher')}) == 3


def test_loss_is_divergence_plus_cross_entropy(runs):
    row = next(row for row in runs['dense'].ok().logs if 'eval_loss' in row)
    assert row['eval_loss'] == pytest.approx(row['eval_divergence'] + 0.5 * row['eval_cross_entropy'], rel=1e-5)
