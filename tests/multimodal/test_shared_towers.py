"""A frozen vision tower runs once for a teacher that lives in the student's model, dense and with experts."""

from __future__ import annotations

import json

import helpers
import job_runs
import pytest

STEP = {
    'model_type': 'qwen3_vl',
    'template': 'qwen3_vl',
    'tuner_type': 'lora',
    'max_steps': 2,
    'lmbda': 0,
    'sft_alpha': 1,
    'learning_rate': 1e-2,
    'lora_dropout': 0,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'gkd_self_teacher': 'base',
    'teacher_model': None,
    'teacher_model_type': None,
}
LAST = {'target_modules': ['language_model.layers.1.self_attn.q_proj']}
TOWER = {'freeze_vit': 'false'}
MICRO_BATCHES = 2 * 2


@pytest.fixture(scope='module')
def privileged(vision_models, tmp_path_factory):
    rows = [json.loads(line) for line in vision_models.train.read_text().splitlines()]
    directory = tmp_path_factory.mktemp('privileged')
    told = [{**row, 'teacher_prompt': '<image>the square has a colour . what colour is the square ?'} for row in rows]
    others = [{**row, 'teacher_images': rows[i - 1]['images']} for i, row in enumerate(rows)]
    return helpers.write_rows(directory / 'told.jsonl', told), helpers.write_rows(directory / 'others.jsonl', others)


@pytest.fixture(scope='module')
def runs(run_jobs, moe_models, privileged):
    moe = {'model': moe_models.student, 'model_type': 'qwen3_vl_moe', 'dataset': moe_models.train}
    kinds = {
        'dense': STEP,
        'last layer': {**STEP, **LAST},
        'told': {**STEP, **LAST, 'dataset': privileged[0]},
        'other images': {**STEP, **LAST, 'dataset': privileged[1]},
        'moe': {**STEP, **moe},
        'moe, last layer': {**STEP, **moe, **LAST},
        'tower trained': {**STEP, **TOWER},
        'checkpointed': {**STEP, **LAST, 'gradient_checkpointing': 'true', 'vit_gradient_checkpointing': 'true'},
    }
    return run_jobs({**kinds, **{f'{name}, apart': {**options, 'nothing_shared': True} for name, options in kinds.items()}}, timeout=900)


@pytest.mark.parametrize(
    ('name', 'shared'),
    [
        ('dense', True),
        ('last layer', True),
        ('told', True),
        ('other images', False),
        ('moe', True),
        ('moe, last layer', True),
        ('tower trained', False),
        ('checkpointed', True),
    ],
)
def test_one_run_of_the_tower(runs, name, shared):
    together, apart = runs[name].ok(), runs[f'{name}, apart'].ok()
    assert together.losses == apart.losses
    assert job_runs.relative(together.gradients(2), apart.gradients(2)) < 1e-6
    assert apart.seen['towers'] - together.seen['towers'] == (MICRO_BATCHES if shared else 0)


def test_layers_below_the_adapter(runs):
    assert runs['last layer, apart'].ok().seen['lowest_layers'] - runs['last layer'].ok().seen['lowest_layers'] == MICRO_BATCHES
    assert runs['told, apart'].ok().seen['lowest_layers'] == runs['told'].ok().seen['lowest_layers']
