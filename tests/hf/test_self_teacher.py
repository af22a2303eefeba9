"""--gkd_self_teacher: the base, the live student, and the moving average of the student."""

from __future__ import annotations

import job_runs
import pytest
import torch
from safetensors.torch import load_file

STEP = {
    'tuner_type': 'full',
    'max_steps': 4,
    'lmbda': 0,
    'sft_alpha': 1,
    'learning_rate': 1e-2,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'teacher_model': None,
    'teacher_model_type': None,
}
LORA = {**STEP, 'tuner_type': 'lora', 'target_modules': ['q_proj', 'v_proj', 'lm_head'], 'lora_rank': 4, 'lora_dropout': 0}
EMA = {'gkd_self_teacher': 'ema', 'gkd_ema_decay': 0.5}
SAVED = {'save_strategy': 'steps', 'save_steps': 1}


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, tmp_path_factory):
    whole = tmp_path_factory.mktemp('average')
    teacher = {'teacher_model': tiny_models.student, 'teacher_model_type': 'qwen3'}
    live = {'gkd_self_teacher': 'ema', 'gkd_ema_decay': 0}
    found = run_jobs(
        {
            'average': {**STEP, **EMA, **SAVED, 'output_dir': whole},
            'resumed': {**STEP, **EMA, 'resume_from_checkpoint': whole / 'checkpoint-2'},
            'start': {**STEP, 'gkd_self_teacher': 'ema', 'gkd_ema_decay': 1},
            'copy': {**STEP, **teacher},
            'live': {**STEP, **live},
            'live, mixed precision': {**STEP, **live, 'bf16': 'true'},
            'live, lora on head': {**LORA, **live},
            'live, head saved': {**LORA, **live, 'target_modules': ['q_proj'], 'modules_to_save': 'lm_head'},
            'lora': {**LORA, **EMA, **SAVED},
            'base': {**LORA, 'gkd_self_teacher': 'base'},
            'named base': {**LORA, **teacher},
            'answers': {**LORA, **EMA, 'seq_kd': 'true', 'log_completions': 'true'},
            'two teachers': {**STEP, **EMA, **teacher},
            'no adapter': {**STEP, 'gkd_self_teacher': 'base'},
            'decay': {**STEP, **EMA, 'gkd_ema_decay': 1.5},
            'plain': {**STEP, **SAVED, 'max_steps': 1, 'output_dir': whole / 'plain'},
            'no average': {**STEP, **EMA, 'resume_from_checkpoint': whole / 'plain' / 'checkpoint-1'},
        }
    )
    return found, whole


def test_average_of_the_checkpoints(runs, tiny_models):
    found, whole = runs
    found['average'].ok()
    expected = {name: value.double() for name, value in load_file(tiny_models.student / 'model.safetensors').items()}
    for step in (1, 2, 3, 4):
        checkpoint = whole / f'checkpoint-{step}'
        student, average = load_file(checkpoint / 'model.safetensors'), load_file(checkpoint / 'gkd_teacher_average.safetensors')
        assert average.keys() == student.keys()
        for name, value in student.items():
            expected[name] = 0.5 * expected[name] + 0.5 * value.double()
            assert torch.allclose(average[name].double(), expected[name], rtol=1e-5, atol=1e-7), (step, name)


def test_decay_one_is_a_copy_of_the_start(runs):
    start, copy = runs[0]['start'].ok(), runs[0]['copy'].ok()
    assert start.losses == pytest.approx(copy.losses, rel=1e-5)
    assert job_runs.relative(start.gradients(3), copy.gradients(3)) < 1e-4


@pytest.mark.parametrize('name', ['live', 'live, mixed precision', 'live, lora on head', 'live, head saved'])
def test_decay_zero_is_the_student_itself(runs, name):
    """Exactly: the divergence is 0 while the cross-entropy moves all that is trained, the output head too."""
    run = runs[0][name].ok()
    assert run.values('divergence') == [0, 0, 0, 0]
    assert run.losses[-1] != run.losses[0]


def test_an_average_is_an_adapter(runs):
    run = runs[0]['lora'].ok()
    average = load_file(run.output_dir / 'checkpoint-4' / 'gkd_teacher_average.safetensors')
    assert average and all('lora_' in name for name in average)
    assert run.values('divergence')[0] == 0 and all(d > 0 for d in run.values('divergence')[2:])


def test_the_base_by_either_name(runs):
    assert runs[0]['base'].ok().losses == pytest.approx(runs[0]['named base'].ok().losses, rel=1e-6)


def test_it_answers(runs):
    assert {line['source'] for line in runs[0]['answers'].ok().completions} == {'teacher'}


def test_resumes_with_its_average(runs):
    assert runs[0]['resumed'].ok().losses == pytest.approx(runs[0]['average'].losses[2:], rel=1e-5)


def test_refused(runs):
    found = runs[0]
    assert '--gkd_self_teacher ema and --teacher_model' in found['two teachers'].error
    assert 'there is no adapter to switch off' in found['no adapter'].error
    assert '--gkd_ema_decay 1.5: must be in [0, 1]' in found['decay'].error
    assert 'there is no gkd_teacher_average.safetensors in it' in found['no average'].error
