"""A run that was killed and resumed logs the same losses as one that was not: data order, sources, responses, dropout, cycle in flight."""

from __future__ import annotations

import json

import pytest

# Workers that persist take five seconds each to end, in a process that goes on.
WORKERS = {'dataloader_num_workers': 2, 'dataloader_persistent_workers': 'false'}
# 20 rows, 4 per step: an epoch has 5 steps. A cycle serves 2 steps, so of the checkpoints, 3 and 6 have half a cycle in flight.
COMMON = {
    'tuner_type': 'lora',
    'lora_dropout': 0.1,
    'max_steps': 9,
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
def runs(run_jobs, dataset, tmp_path_factory):
    common, whole, killed = {**COMMON, 'dataset': dataset}, tmp_path_factory.mktemp('whole'), tmp_path_factory.mktemp('killed')
    found = run_jobs(
        {
            # The first run of a process finds other random numbers for its adapter than the ones after it.
            'first': {**common, 'max_steps': 1},
            'whole': {**common, 'output_dir': whole},
            'workers': {**common, **WORKERS},
            'killed': {**common, 'output_dir': killed, 'stop_at': 7, 'callbacks': 'stop_at'},
            'from 3': {**common, 'resume_from_checkpoint': whole / 'checkpoint-3'},
            'from 6': {**common, 'resume_from_checkpoint': killed / 'checkpoint-6', **WORKERS},
            'other data': {**common, 'resume_from_checkpoint': whole / 'checkpoint-3', 'data_seed': 7},
        }
    )
    assert found['killed'].error.startswith('KeyboardInterrupt')
    return found


def test_killed_run_agrees_up_to_the_kill(runs):
    whole, killed = runs['whole'].ok(), runs['killed']
    assert killed.losses == whole.losses[: len(killed.losses)]


def test_rows_that_worker_processes_encode_are_the_same(runs):
    whole, workers = (runs[name].ok() for name in ('whole', 'workers'))
    assert workers.losses == whole.losses
    assert [line['completion'] for line in workers.completions] == [line['completion'] for line in whole.completions]


@pytest.mark.parametrize('step', [3, 6])
def test_resumed_run_logs_the_same_losses(runs, step):
    whole, run = runs['whole'], runs[f'from {step}'].ok()
    assert run.losses == pytest.approx(whole.losses[step:], rel=1e-6)
    for key in ('source/student', 'tokens/trained'):
        assert run.values(key) == whole.values(key)[step:]


def test_cycle_in_flight_is_kept_and_not_generated_again(runs):
    checkpoint = runs['whole'].output_dir / 'checkpoint-3'
    state = json.loads((checkpoint / 'gkd_cycle_rank0.json').read_text())
    assert len(state['micro_batches']) == 2 and all('token_ids' in one for batch in state['micro_batches'] for one in batch)
    assert not (runs['whole'].output_dir / 'checkpoint-9' / 'gkd_cycle_rank0.json').exists()
    kept = {(one['epoch'], one['row']) for batch in state['micro_batches'] for one in batch}
    dates = {(line['epoch'], line['row']): line['gen_step'] for line in runs['from 3'].completions if line['step'] == 4}
    assert dates == dict.fromkeys(kept, 2)


def test_another_data_order_is_refused(runs):
    assert 'OptionError' in runs['other data'].error and 'the data gives' in runs['other data'].error


@pytest.mark.e2e
def test_two_ranks(run_jobs, dataset, tmp_path):
    options = {**COMMON, 'dataset': dataset, 'per_device_train_batch_size': 1, 'max_steps': 5, 'save_steps': 3}
    jobs = {'first': {**options, 'max_steps': 1}, 'whole': {**options, 'output_dir': tmp_path}}
    runs = run_jobs({**jobs, 'again': {**options, 'resume_from_checkpoint': tmp_path / 'checkpoint-3'}}, nproc=2)
    assert runs['again'].ok().losses == pytest.approx(runs['whole'].ok().losses[3:], rel=1e-6)
