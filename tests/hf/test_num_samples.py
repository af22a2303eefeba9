"""--gkd_num_samples: several responses per prompt; --gkd_save_teacher_responses: what the teacher answered, as a dataset."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from swift_gkd_plugin.sources import Draw

STEP = {
    'tuner_type': 'full',
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 4,
    'gradient_accumulation_steps': 2,
    'temperature': 1,
    'max_grad_norm': 1e6,
    'callbacks': 'recorder',
}


@pytest.fixture(scope='module')
def runs(run_jobs, tmp_path_factory, tiny_models):
    answers, whole = tmp_path_factory.mktemp('answers') / 'answers.jsonl', tmp_path_factory.mktemp('passes')
    taught = {**STEP, 'lmbda': 0, 'num_train_epochs': 1}
    passes = {
        **STEP,
        'gkd_num_samples': 3,
        'lmbda': 0.5,
        'log_completions': 'true',
        'save_strategy': 'steps',
        'save_steps': 1,
        'dataset': f'{tiny_models.train}#11',
        'num_train_epochs': 3,
        'steps_per_generation': 3,
    }
    found = run_jobs(
        {
            'live': {**taught, 'dataset': f'{tiny_models.train}#24', 'seq_kd': 'true', 'gkd_save_teacher_responses': answers},
            'reused': {**taught, 'seq_kd': 'false', 'dataset': answers, 'train_dataloader_shuffle': 'false', 'dataset_shuffle': 'false'},
            'passes': {**passes, 'output_dir': whole},
            'passes resumed': {**passes, 'resume_from_checkpoint': whole / 'checkpoint-4'},
        }
    )
    return found, answers


@pytest.mark.e2e
def test_sampled_before_and_sampled_live_are_the_same_training(runs):
    found, answers = runs
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 24 and all(row['messages'][-1]['role'] == 'assistant' for row in rows)
    assert found['reused'].ok().losses == pytest.approx(found['live'].ok().losses, rel=1e-6) and len(found['live'].losses) == 3


@pytest.mark.e2e
def test_several_responses_per_prompt(runs):
    run = runs[0]['passes'].ok()
    by_row: dict = {}
    for line in run.completions:
        by_row.setdefault((line['epoch'], line['row']), []).append(line['completion'])
    whole = [texts for texts in by_row.values() if len(texts) == 3]
    assert len(whole) >= 4 and all(len(set(texts)) > 1 for texts in whole)
    assert any(0 < share < 1 for share in run.values('source/student'))


@pytest.mark.e2e
def test_all_responses_of_all_epochs(runs):
    run, draw = runs[0]['passes'].ok(), Draw(seed=42, lmbda=0.5, num_samples=3)
    answered = Counter((line['epoch'], line['row']) for line in run.completions if line['epoch'] < 3)
    times = {(epoch, row): draw.repeats(epoch, row) for epoch in range(3) for row in range(11)}
    assert answered == {pair: 3 for pair, n in times.items() if n == 3}
    # 25, 21 and 17 responses: 21 in each of the trainer's epochs, in steps of 8. It would be 15 steps if each row took 3 places.
    assert sum(times.values()) == 63 and len(run.losses) == 9


@pytest.mark.e2e
def test_resumes_in_the_middle_of_a_prompt(runs):
    assert runs[0]['passes resumed'].ok().losses == pytest.approx(runs[0]['passes'].ok().losses[4:], rel=1e-6)
