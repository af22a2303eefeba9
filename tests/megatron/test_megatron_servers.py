"""A teacher behind vLLM's server is the teacher, in every layout: its scores, its answers, and what happens when it goes away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import helpers
import proxy as faults
import pytest
import runs
import serving
from cases import SERVER_CASES, make_datasets
from models import make_models
from runs import CPU, Run, relative

WHY_NO_VLLM = helpers.why_no_vllm()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.megatron,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NO_VLLM is not None, reason=str(WHY_NO_VLLM)),
]

ENVIRONMENT = {
    **helpers.vllm_environment(),
    'PYTHONPATH': f'{CPU["PYTHONPATH"]}{os.pathsep}{helpers.vllm_environment()["PYTHONPATH"]}',
    'GKD_TEACHER_API_KEY': faults.KEY,
}
# Adam's large epsilon: see test_megatron_training.py.
SCORED = {'gkd_logits_topk': 8, 'gkd_temperature': 1, 'train_iters': 3, 'adam_eps': 1e-3}
# Of the student's own tokens, of each its log-probability alone.
SAMPLED = {
    'gkd_signal': 'sampled',
    'gkd_divergence': 'reverse_kl',
    'lmbda': 1,
    'temperature': 1,
    'max_completion_length': 6,
    'train_iters': 2,
    'adam_eps': 1e-3,
}
LONG = {'gkd_teacher_max_completion_length': 12, 'seq_kd': 'true', 'temperature': 0}
FULL = {**SCORED, **LONG, 'gkd_logits_topk': None}
ENGINE = {'gkd_teacher_engine': 'vllm', 'gkd_teacher_engine_args': helpers.VLLM_ENGINE_FLAGS}
SAVED = {**SCORED, **LONG, 'no_save_optim': 'false', 'save_steps': 100}


@pytest.fixture(scope='module')
def vllm_models(tmp_path_factory, tiny_models) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp('vllm_models'), tiny_models, head_dim=32)  # vLLM's attention on a CPU has no 16


@pytest.fixture(scope='module')
def server(vllm_models, tmp_path_factory) -> Iterator[str]:
    with serving.vllm_serve(vllm_models['teacher'], tmp_path_factory.mktemp('vllm')) as url:
        yield url


@pytest.fixture(scope='module')
def run_here(tmp_path_factory, vllm_models, tiny_models):
    def run(jobs: runs.Jobs, layout: str) -> dict[str, Run]:
        root = tmp_path_factory.mktemp('servers')
        data = make_datasets(tiny_models.train, root)
        jobs = {name: {k: data[v] if k == 'dataset' else v for k, v in job.items()} for name, job in jobs.items()}
        return runs.run_jobs(jobs, layout, root, vllm_models, tiny_models.train, env=ENVIRONMENT, timeout=600)

    return run


def asks(url: str, **options) -> dict:
    return {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': url, **options}


@pytest.fixture(scope='module')
def local(run_here, server) -> dict[str, Run]:
    """The teacher in the training process; a server where the two would differ, for it knows nothing of the student's vocabulary."""
    jobs = {layout: case | asks(server) if case.get('model') == 'tied' else case for layout, case in SERVER_CASES.items()}
    jobs |= {'answered': {**SCORED, **LONG}, 'scored': SCORED, 'answered, whole distributions': FULL, 'sampled': SAMPLED}
    return run_here(jobs, '1')


@pytest.mark.parametrize('layout', SERVER_CASES)
def test_server_is_the_local_teacher(local, run_here, server, layout):
    jobs = {'answered': {**SCORED, **LONG}, 'sampled': SAMPLED, layout: SERVER_CASES[layout]}
    found = run_here({name: {**job, **asks(server)} for name, job in jobs.items()}, layout)
    for name, run in found.items():
        assert run.ok().losses == pytest.approx(local[name].ok().losses, abs=1e-5)
        assert relative(run.gradients, local[name].gradients) < 1e-3
        assert run.loaded == (2 if name == 'PP2xVPP2' else 1)  # the student, and its adapter
    tokens = [sorted((a['key'], a['token_ids']) for a in run.answers) for run in (local['answered'], found['answered'])]
    assert len(tokens[0]) == 12 and all(any(a == b for b in tokens[0]) for a in tokens[1])


@pytest.fixture(scope='module')
def in_two(run_here, server, tmp_path_factory) -> dict[str, Run]:
    """Runs on two ranks with the same rows."""
    proxy = faults.FaultyProxy(server)
    # A short question at the start, then 4 answers a step, which bring their scores.
    proxy.faults, proxy.afterwards = [None] * (1 + 4 + 2), faults.dead
    gone = tmp_path_factory.mktemp('gone')
    try:
        return run_here(
            {
                'whole': {**SAVED, **asks(server)},
                'gone': {**SAVED, **asks(proxy.url, gkd_server_retry_seconds=1, gkd_server_in_flight=1), 'output_dir': gone},
                'resumed': {**SAVED, **asks(server), 'mcore_model': gone / 'checkpoint-1', 'finetune': 'false'},
                'nobody': {**SAVED, **asks('http://127.0.0.1:9')},
                'too many': {**SAVED, **asks(server), 'gkd_logits_topk': 64},
                'engine scores': {**SCORED, **ENGINE},
                'engine answers': {**FULL, **ENGINE},
                'broken engine': {**SCORED, **ENGINE, 'no_path': True},  # where it finds no vLLM
            },
            'TP2',
        )
    finally:
        proxy.close()


def test_server_that_goes_away(in_two):
    """The last finished step is saved with the answers that exist, and the resumed run goes on as if nothing had happened."""
    found, gone = in_two, in_two['gone'].output_dir
    assert 'TeacherServerError' in found['gone'].error and len(found['gone'].losses) == 1
    kept = sorted((gone / 'checkpoint-1').glob('gkd_cycle_rank*.json'))
    assert [path.name for path in kept] == ['gkd_cycle_rank0.json', 'gkd_cycle_rank1.json']
    assert kept[0].read_text().count('token_ids') == kept[1].read_text().count('token_ids') == 2
    assert found['resumed'].ok().losses == pytest.approx(found['whole'].ok().losses[1:], abs=1e-6)
    for name, word in (('nobody', 'no connection'), ('too many', '--max-logprobs 64')):
        assert found[name].loaded == 0 and found[name].error.startswith('OptionError') and word in found[name].error


def test_engine_of_its_own_scores_without_another_copy(local, in_two):
    run = in_two['engine scores'].ok()
    assert run.loaded == 1
    assert run.losses == pytest.approx(local['scored'].ok().losses, abs=1e-5)
    assert relative(run.gradients, local['scored'].gradients) < 1e-3
    assert [path.name for path in run.output_dir.glob('teacher_engine_rank*.log')] == ['teacher_engine_rank0.log']


def test_engine_of_its_own_answers(local, in_two):
    """Greedy, so the same answers; the whole distributions are those of a copy in the training processes."""
    run, other = in_two['engine answers'].ok(), local['answered, whole distributions'].ok()
    assert run.loaded == 2
    assert run.losses == pytest.approx(other.losses, abs=1e-5)
    assert {(*a['key'], *a['token_ids']) for a in run.answers} == {(*a['key'], *a['token_ids']) for a in other.answers}


def test_engine_that_does_not_start(in_two):
    error = in_two['broken engine'].error
    assert error.startswith('TeacherServerError') and '\n' not in error  # of the rank without an engine; the other one says why
    log = in_two['broken engine'].output
    assert '--gkd_teacher_engine vllm did not start' in log and 'teacher_engine_rank0.log' in log
