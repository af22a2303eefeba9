"""--gkd_num_samples: several responses per prompt; --gkd_save_teacher_responses: what the teacher answered, as a dataset."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from swift_gkd_plugin.step.data import RowBatchSampler

STEP = {
    'tuner_type': 'full',
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 4,
    'gradient_accumulation_steps': 2,
    'temperature': 1,
    'max_grad_norm': 1e6,
    'callbacks': 'recorder',
}


@pytest.mark.parametrize('world_size', [1, 2])
def test_each_row_comes_as_often_as_it_has_responses(world_size):
    samplers = [RowBatchSampler(10, 4, seed=3, num_samples=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for sampler in samplers for batch in sampler]
    keys = [(number, repeat) for batch in batches for _, number, counts, repeat in batch if counts]
    assert sorted(keys) == [(number, repeat) for number in range(10) for repeat in range(3)]
    assert all(len(sampler) == len(list(sampler)) for sampler in samplers)


@pytest.fixture(scope='module')
def runs(run_jobs, tmp_path_factory):
    answers = tmp_path_factory.mktemp('answers') / 'answers.jsonl'
    taught = {**STEP, 'lmbda': 0, 'num_train_epochs': 1}
    several = {
        **STEP,
        'gkd_num_samples': 3,
        'lmbda': 0.5,
        'max_steps': 6,
        'log_completions': 'true',
        'save_strategy': 'steps',
        'save_steps': 1,
    }
    root = tmp_path_factory.mktemp('several')
    found = run_jobs(
        {
            'live': {**taught, 'seq_kd': 'true', 'gkd_save_teacher_responses': answers},
            'reused': {**taught, 'seq_kd': 'false', 'dataset': answers, 'train_dataloader_shuffle': 'false', 'dataset_shuffle': 'false'},
            'several': {**several, 'output_dir': root / 'whole', 'steps_per_generation': 3},
            'resumed': {**several, 'steps_per_generation': 3, 'resume_from_checkpoint': root / 'whole' / 'checkpoint-4'},
            'batch coin': {**several, 'gkd_source_per': 'batch', 'max_steps': 3},
        }
    )
    return found, answers


@pytest.mark.e2e
def test_sampled_before_and_sampled_live_are_the_same_training(runs):
    found, answers = runs
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 64 and all(row['messages'][-1]['role'] == 'assistant' for row in rows)
    assert found['reused'].ok().losses == pytest.approx(found['live'].ok().losses, rel=1e-6)


@pytest.mark.e2e
def test_several_responses_per_prompt(runs):
    run = runs[0]['several'].ok()
    by_row: dict = {}
    for line in run.completions:
        by_row.setdefault((line['epoch'], line['row']), []).append(line['completion'])
    whole = [texts for texts in by_row.values() if len(texts) == 3]
    assert len(whole) >= 4 and all(len(set(texts)) > 1 for texts in whole)
    shares = run.values('source/student')
    assert Counter(0 < share < 1 for share in shares)[True] >= 1
    assert runs[0]['batch coin'].ok().losses


@pytest.mark.e2e
def test_resumes_in_the_middle_of_a_prompt(runs):
    assert runs[0]['resumed'].ok().losses == pytest.approx(runs[0]['several'].losses[4:], rel=1e-6)
