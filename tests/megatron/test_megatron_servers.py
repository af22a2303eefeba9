"""A teacher behind vLLM's server is the teacher, in every layout: its scores, its answers, and what happens when it goes away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import helpers
import proxy as faults
import pytest
import runs
import serving
from models import make_models
from runs import Run, relative

WHY_NO_VLLM = helpers.why_no_vllm()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.megatron,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NO_VLLM is not None, reason=str(WHY_NO_VLLM)),
]

# Adam's large epsilon: see test_megatron_training.py.
SCORED = {'gkd_logits_topk': 8, 'gkd_temperature': 1, 'train_iters': 3, 'adam_eps': 1e-3}
LONG = {'gkd_teacher_max_completion_length': 12, 'seq_kd': 'true', 'temperature': 0}
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
        return runs.run_jobs(jobs, layout, root, vllm_models, tiny_models.train, env={'GKD_TEACHER_API_KEY': faults.KEY})

    return run


def asks(url: str, **options) -> dict:
    return {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': url, **options}


@pytest.fixture(scope='module')
def local(run_here) -> dict[str, Run]:
    """The teacher in the training process."""
    return run_here({'scored': SCORED, 'answered': {**SCORED, **LONG}}, '1')


@pytest.mark.parametrize('layout', ['TP2xPP2', 'CP2', 'DP2'])
def test_server_is_the_local_teacher(local, run_here, server, layout):
    found = run_here({'scored': {**SCORED, **asks(server)}, 'answered': {**SCORED, **LONG, **asks(server)}}, layout)
    for name, run in found.items():
        assert run.ok().losses == pytest.approx(local[name].ok().losses, abs=1e-5)
        assert relative(run.gradients, local[name].gradients) < 1e-3
        assert run.loaded == 1
    tokens = [sorted((a['key'], a['token_ids']) for a in run.answers) for run in (local['answered'], found['answered'])]
    assert len(tokens[0]) == 12 and all(any(a == b for b in tokens[0]) for a in tokens[1])


def test_server_that_goes_away(run_here, server, tmp_path):
    """The last finished step is saved with the answers that exist, and the resumed run goes on as if nothing had happened."""
    proxy = faults.FaultyProxy(server)
    # A short question at the start, then 4 answers a step, which bring their scores.
    proxy.faults, proxy.afterwards = [None] * (1 + 4 + 2), faults.dead
    gone = tmp_path / 'gone'
    try:
        found = run_here(
            {
                'whole': {**SAVED, **asks(server)},
                'gone': {**SAVED, **asks(proxy.url, gkd_server_retry_seconds=1, gkd_server_in_flight=1), 'output_dir': gone},
                'resumed': {**SAVED, **asks(server), 'mcore_model': gone / 'checkpoint-1', 'finetune': 'false'},
                'nobody': {**SAVED, **asks('http://127.0.0.1:9')},
                'too many': {**SAVED, **asks(server), 'gkd_logits_topk': 64},
            },
            'TP2',
        )
    finally:
        proxy.close()
    assert 'TeacherServerError' in found['gone'].error and len(found['gone'].losses) == 1
    kept = sorted((gone / 'checkpoint-1').glob('gkd_cycle_rank*.json'))
    assert [path.name for path in kept] == ['gkd_cycle_rank0.json', 'gkd_cycle_rank1.json']
    assert kept[0].read_text().count('token_ids') == kept[1].read_text().count('token_ids') == 2
    assert found['resumed'].ok().losses == pytest.approx(found['whole'].ok().losses[1:], abs=1e-6)
    for name, word in (('nobody', 'no connection'), ('too many', '--max-logprobs 64')):
        assert found[name].loaded == 0 and found[name].error.startswith('OptionError') and word in found[name].error
