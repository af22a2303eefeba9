"""A run that was killed and resumed logs the same losses as one that was not: data order, sources, responses, dropout, cycle in flight."""

from __future__ import annotations

import json

import pytest

# 20 rows, 4 per step: an epoch has 5 steps. A cycle serves 2 steps, so of the checkpoints, 3 and 6 have half a cycle in flight.
COMMON = {
    'tuner_type': 'lora',
    'lora_dropout': 0.1,
    'max_steps': 11,
    'learning_rate': 1e-2,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'steps_per_generation': 4,
    'seq_kd': 'true',
    'lmbda': 0.5,
    'save_strategy': 'steps',
    'save_steps': 3,
    'log_completions': 'true',
    'save_total_limit': 10,
}


@pytest.fixture(scope='module')
def dataset(tiny_models):
    return f'{tiny_models.train}#20'


@pytest.fixture(scope='module')
def uninterrupted(run_jobs, dataset):
    # Twice, because the first run of a process finds other random numbers for its adapter than the ones after it.
    runs = run_jobs(
        {
            'first': {**COMMON, 'dataset': dataset, 'max_steps': 1},
            'whole': {**COMMON, 'dataset': dataset},
            'workers': {**COMMON, 'dataset': dataset, 'dataloader_num_workers': 2},
            'killed': {**COMMON, 'dataset': dataset, 'stop_at': 7, 'callbacks': 'stop_at'},
        }
    )
    assert runs['killed'].error.startswith('KeyboardInterrupt')
    return runs


def test_killed_run_agrees_up_to_the_kill(uninterrupted):
    whole, killed = uninterrupted['whole'].ok(), uninterrupted['killed']
    assert killed.losses == whole.losses[: len(killed.losses)]


def test_rows_that_worker_processes_encode_are_the_same(uninterrupted):
    whole, workers = (uninterrupted[name].ok() for name in ('whole', 'workers'))
    # Of the first epoch: a loader with workers that persist draws no seed for the second, which moves the numbers of dropout.
    assert workers.losses[:5] == whole.losses[:5]
    said = [[line['completion'] for line in run.completions if line['step'] <= 5] for run in (workers, whole)]
    assert said[0] == said[1]


@pytest.fixture(scope='module')
def resumed(uninterrupted, run_jobs, dataset):
    whole, killed = uninterrupted['whole'].output_dir, uninterrupted['killed'].output_dir
    return run_jobs(
        {
            'from 3': {**COMMON, 'dataset': dataset, 'resume_from_checkpoint': whole / 'checkpoint-3'},
            'from 6': {**COMMON, 'dataset': dataset, 'resume_from_checkpoint': killed / 'checkpoint-6', 'dataloader_num_workers': 1},
            'from 9': {**COMMON, 'dataset': dataset, 'resume_from_checkpoint': whole / 'checkpoint-9'},
            'other data': {**COMMON, 'dataset': dataset, 'resume_from_checkpoint': whole / 'checkpoint-3', 'data_seed': 7},
        }
    )


@pytest.mark.parametrize('step', [3, 6, 9])
def test_resumed_run_logs_the_same_losses(uninterrupted, resumed, step):
    whole, run = uninterrupted['whole'], resumed[f'from {step}'].ok()
    assert run.losses == pytest.approx(whole.losses[step:], rel=1e-6)
    for key in ('source/student', 'tokens/trained'):
        assert run.values(key) == whole.values(key)[step:]


def test_cycle_in_flight_is_kept_and_not_generated_again(uninterrupted, resumed):
    checkpoint = uninterrupted['whole'].output_dir / 'checkpoint-3'
    state = json.loads((checkpoint / 'gkd_cycle_rank0.json').read_text())
    assert len(state['micro_batches']) == 2 and all('token_ids' in one for batch in state['micro_batches'] for one in batch)
    assert not (uninterrupted['whole'].output_dir / 'checkpoint-9' / 'gkd_cycle_rank0.json').exists()
    kept = {(one['epoch'], one['row']) for batch in state['micro_batches'] for one in batch}
    dates = {(line['epoch'], line['row']): line['generated_at'] for line in resumed['from 3'].completions if line['step'] == 4}
    assert dates == dict.fromkeys(kept, 2)


def test_another_data_order_is_refused(resumed):
    assert 'OptionError' in resumed['other data'].error and 'the data gives' in resumed['other data'].error


@pytest.mark.e2e
def test_two_ranks(run_jobs, dataset):
    options = {**COMMON, 'dataset': dataset, 'per_device_train_batch_size': 1, 'max_steps': 5, 'save_steps': 3}
    whole = run_jobs({'first': {**options, 'max_steps': 1}, 'whole': options}, nproc=2)['whole'].ok()
    again = run_jobs({'again': {**options, 'resume_from_checkpoint': whole.output_dir / 'checkpoint-3'}}, nproc=2)['again'].ok()
    assert again.losses == pytest.approx(whole.losses[3:], rel=1e-6)
