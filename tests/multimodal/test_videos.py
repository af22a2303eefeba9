"""Films, as files and as lists of their frames, with a tiny Qwen3-VL-MoE."""

from __future__ import annotations

import job_runs
import pytest

STEP = {
    'model_type': 'qwen3_vl_moe',
    'template': 'qwen3_vl',
    'teacher_model_type': 'qwen3_vl_moe',
    'tuner_type': 'full',
    'freeze_vit': 'false',
    'freeze_aligner': 'false',
    'max_steps': 1,
    'lmbda': 0,
    'learning_rate': 1e-3,
    'max_length': 256,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
}
SELF = {
    'tuner_type': 'lora',
    'freeze_vit': 'true',
    'freeze_aligner': 'true',
    'sft_alpha': 1,
    'lora_dropout': 0,
    'gkd_self_teacher': 'base',
    'teacher_model': None,
    'teacher_model_type': None,
}


@pytest.fixture(scope='module')
def runs(run_jobs, moe_models, omni):
    step = {**STEP, 'model': moe_models.student, 'teacher_model': moe_models.teacher}
    jobs = {kind: {**step, 'dataset': omni / f'{kind}.jsonl'} for kind in ('frames', 'films')}
    jobs['films, dense path'] = {**jobs['films'], 'dense': True}
    jobs['answers'] = {**jobs['films'], 'lmbda': 0.5, 'seq_kd': 'true', 'log_completions': 'true', 'max_steps': 4}  # all 16 rows
    jobs['shared'] = {**step, **SELF, 'dataset': omni / 'films.jsonl'}
    jobs['apart'] = {**jobs['shared'], 'nothing_shared': True}
    return run_jobs(jobs)


def test_equals_whole_logits(runs):
    ours, dense = runs['films'].ok(), runs['films, dense path'].ok()
    assert ours.losses == pytest.approx(dense.losses, rel=1e-5)
    assert job_runs.relative(ours.gradients(1), dense.gradients(1)) < 1e-4


def test_a_film_is_its_frames(runs):
    """To what its compression loses."""
    assert runs['frames'].ok().losses == pytest.approx(runs['films'].ok().losses, rel=0.01)


def test_student_and_teacher_answer(runs):
    lines = runs['answers'].ok().completions
    assert {line['source'] for line in lines} == {'student', 'teacher'} and all(line['length'] for line in lines)


def test_one_run_of_the_tower(runs):
    together, apart = runs['shared'].ok(), runs['apart'].ok()
    assert together.losses == apart.losses
    ours, theirs = together.gradients(1), apart.gradients(1)
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in theirs)
    assert apart.seen['towers'] - together.seen['towers'] == STEP['gradient_accumulation_steps']
