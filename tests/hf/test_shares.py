"""Generation by transformers where a rank may have nothing to generate, for any way of holding the weights."""

from __future__ import annotations

import json

import helpers
import pytest

# Samples of the student, by step and rank; the rest are of the dataset.
SHARES = [[3, 0], [0, 3], [0, 0], [2, 1]]
STEP = {
    'tuner_type': 'full',
    'max_steps': len(SHARES),
    'learning_rate': 1e-2,
    'lmbda': 0.5,
    'per_device_train_batch_size': 3,
    'gradient_accumulation_steps': 1,
    'train_dataloader_shuffle': 'false',
    'log_completions': 'true',
    'torch_dtype': 'bfloat16',
    'bf16': 'true',
}


@pytest.fixture(scope='module')
def runs(run_jobs, tmp_path_factory):
    fsdp = tmp_path_factory.mktemp('fsdp') / 'fsdp.json'
    config = {'fsdp_version': 2, 'auto_wrap_policy': 'TRANSFORMER_BASED_WRAP', 'activation_checkpointing': False}
    fsdp.write_text(json.dumps({'fsdp': 'full_shard auto_wrap', 'fsdp_config': config}))
    step = {**STEP, 'seed': helpers.seed_with_shares(SHARES, STEP['per_device_train_batch_size'], STEP['lmbda'])}
    plain = run_jobs({'ddp': step, 'fsdp2': {**step, 'fsdp': fsdp}}, nproc=2, timeout=900)
    sharded = {'zero3': {**step, 'deepspeed': 'zero3'}}
    sharded['zero3 no gather'] = {**sharded['zero3'], 'ds3_gather_for_generation': 'false'}
    return plain | run_jobs(sharded, nproc=2, timeout=900)


@pytest.mark.e2e
@pytest.mark.parametrize('name', ['ddp', 'fsdp2', 'zero3', 'zero3 no gather'])
def test_shares_may_be_empty(runs, name):
    run = runs[name].ok()
    assert run.values('source/student') == pytest.approx([sum(step) / 6 for step in SHARES])
    assert len(run.losses) == len(SHARES) and all(0 < loss < 6 for loss in run.losses)
    rows = [[line['row'] for line in run.completions if line['step'] == step + 1] for step in range(len(SHARES))]
    assert [[sum(row % 2 == rank for row in one) for rank in (0, 1)] for one in rows] == SHARES
    assert all(line['length'] > 0 and line['divergence'] > 0 for line in run.completions)
