"""The transformers trainer, run for real: the same step however it is split, every teacher, every source."""

from __future__ import annotations

import math

import pytest

STEP = {
    'tuner_type': 'full',
    'max_steps': 2,
    'optim': 'sgd',
    'learning_rate': 0.01,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'seq_kd': 'true',
    'lmbda': 0.4,
    'log_completions': 'true',
    'sft_alpha': 0.3,
}


def split(batch: int, accumulation: int) -> dict:
    return {**STEP, 'per_device_train_batch_size': batch, 'gradient_accumulation_steps': accumulation}


@pytest.fixture(scope='module')
def one_process(run_jobs):
    return run_jobs(
        {
            '4x1': split(4, 1),
            '2x2': split(2, 2),
            '1x4': {**split(1, 4), 'steps_per_generation': 2},
            'checkpointing': {**split(2, 2), 'gradient_checkpointing': 'true'},
            'padding_side': {**split(4, 1), 'padding_side': 'right'},
            'lora': {**split(2, 2), 'tuner_type': 'lora'},
            'dropout': {**split(2, 2), 'tuner_type': 'lora', 'lora_dropout': 0.5},
            'bf16': {**split(2, 2), 'torch_dtype': 'bfloat16', 'bf16': 'true'},
        }
    )


@pytest.fixture(scope='module')
def two_ranks(run_jobs):
    return run_jobs({'2x1': split(2, 1), '1x2': split(1, 2)}, nproc=2)


def by_row(run) -> dict:
    return {(line['step'], line['row']): (line['source'], line['completion']) for line in run.completions}


@pytest.mark.parametrize('name', ['2x2', '1x4', 'checkpointing', 'padding_side'])
def test_micro_batches_do_not_change_the_step(one_process, gradient_difference, name):
    whole, other = one_process['4x1'].ok(), one_process[name].ok()
    assert by_row(other) == by_row(whole)
    assert other.losses == pytest.approx(whole.losses, rel=1e-5)
    for step in (1, 2):
        assert gradient_difference(other.gradients(step), whole.gradients(step)) < 2e-5


def test_divergence_of_each_response(one_process):
    # Every response is generated in this run, so the responses of a step make up its mean.
    run = one_process['2x2'].ok()
    for step, logged in enumerate(run.values('divergence'), 1):
        lines = [line for line in run.completions if line['step'] == step]
        assert len(lines) == 4 and len({line['divergence'] for line in lines}) == 4
        tokens = sum(line['length'] for line in lines)
        assert sum(line['divergence'] * line['length'] for line in lines) / tokens == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize('name', ['2x1', '1x2'])
def test_ranks_do_not_change_the_step(one_process, two_ranks, gradient_difference, name):
    whole, other = one_process['4x1'].ok(), two_ranks[name].ok()
    assert by_row(other) == by_row(whole)
    assert other.losses == pytest.approx(whole.losses, rel=1e-5)
    for step in (1, 2):
        assert gradient_difference(other.gradients(step), whole.gradients(step)) < 2e-5


def test_three_sources_in_one_step(one_process):
    lines = one_process['4x1'].completions
    assert {line['source'] for line in lines} == {'student', 'teacher'}
    run = one_process['4x1']
    assert run.values('source/student')[0] + run.values('source/teacher')[0] == 1
    for key in (
        'divergence',
        'cross_entropy',
        'tokens/trained',
        'response/length',
        'response/cut_off',
        'seconds/generation',
        'generation/tokens_per_second',
        'seconds/teacher',
        'seconds/student',
    ):
        assert len(run.values(key)) == 2 and all(math.isfinite(v) for v in run.values(key)), key


def test_lora_dropout_is_respected(one_process):
    assert one_process['dropout'].ok().losses[1] != pytest.approx(one_process['lora'].ok().losses[1], rel=1e-7)


def test_bf16_is_close(one_process):
    assert one_process['bf16'].ok().losses[0] > 0
