"""Rows with images: a local teacher, teacher servers and vLLM for the student."""

from __future__ import annotations

import helpers
import job_runs
import pytest
from engine_options import ENGINE

K = 16
DENSE = {'model_type': 'qwen3_vl', 'template': 'qwen3_vl', 'teacher_model_type': 'qwen3_vl'}
STEP = {
    **DENSE,
    'tuner_type': 'full',
    'freeze_vit': 'false',
    'freeze_aligner': 'false',
    'max_steps': 2,
    'lmbda': 0,
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 1,
    'gkd_logits_topk': K,
    'callbacks': 'recorder',
    'temperature': 1,
    'max_grad_norm': 1e6,
}
MIXED = {**STEP, 'lmbda': 0.5, 'seq_kd': 'true', 'gradient_accumulation_steps': 4, 'log_completions': 'true'}


def asks(url: str) -> dict:
    return {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': url, 'gkd_server_retry_seconds': 5}


@pytest.fixture(scope='module')
def runs_with_servers(run_jobs, vllm_server, deploy_server):
    return run_jobs(
        {
            'local': STEP,
            'whole': {**STEP, 'gkd_logits_topk': None},
            'dense path': {**STEP, 'gkd_logits_topk': None, 'dense': True},
            'vllm': {**STEP, **asks(vllm_server)},
            'deploy': {**STEP, **asks(deploy_server)},
            'mixed': MIXED,
            'mixed, greedy': {**MIXED, 'temperature': 0, 'gkd_temperature': 1},
            'mixed, greedy, vllm': {**MIXED, 'temperature': 0, 'gkd_temperature': 1, 'dataloader_num_workers': 1, **asks(vllm_server)},
            'mixed, greedy, deploy': {**MIXED, 'temperature': 0, 'gkd_temperature': 1, **asks(deploy_server)},
        },
        timeout=900,
    )


def test_equals_whole_logits(runs_with_servers):
    ours, dense = runs_with_servers['whole'].ok(), runs_with_servers['dense path'].ok()
    assert ours.losses == pytest.approx(dense.losses, rel=1e-5)
    assert job_runs.relative(ours.gradients(1), dense.gradients(1)) < 1e-4


@pytest.mark.parametrize('name', ['vllm', 'deploy'])
def test_servers_equal_the_local_teacher(runs_with_servers, name):
    found, local = runs_with_servers[name].ok(), runs_with_servers['local'].ok()
    assert found.losses == pytest.approx(local.losses, rel=1e-5)
    assert job_runs.relative(found.gradients(1), local.gradients(1)) < 1e-4


def test_student_and_teacher_answer(runs_with_servers):
    lines = runs_with_servers['mixed'].ok().completions
    assert {line['source'] for line in lines} == {'student', 'teacher'}


@pytest.mark.parametrize('name', ['vllm', 'deploy'])
def test_servers_answer_as_the_local_teacher(runs_with_servers, name):
    found, local = runs_with_servers[f'mixed, greedy, {name}'].ok(), runs_with_servers['mixed, greedy'].ok()
    assert [line['completion'] for line in found.completions] == [line['completion'] for line in local.completions]
    assert found.losses == pytest.approx(local.losses, rel=1e-4)


def test_engines_see_the_images(run_jobs_with_engine, rollout_server):
    """vLLM's log-probabilities of what it sampled are the live student's, with the images, after every update."""
    job = {**STEP, 'lmbda': 1, 'learning_rate': 1e-2, 'top_p': 1, 'top_k': -1, 'use_vllm': 'true', 'ddp_backend': 'gloo', **ENGINE}
    runs = run_jobs_with_engine(
        {'colocate': {**job, 'vllm_mode': 'colocate'}, 'server': {**job, **rollout_server.options}}, env=helpers.one_rank()
    )
    for run in runs.values():
        calls = run.ok().lines('engine-rank0.jsonl')
        assert len(calls) == 2 and all(call['tokens'] > 0 and call['error'] < 1e-4 for call in calls)
