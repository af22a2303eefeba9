"""A teacher behind a server is the teacher: the same numbers as in the process, whatever the network does."""

from __future__ import annotations

import json

import job_runs
import proxy as faults
import pytest
from proxy import KEY

from swift_gkd_plugin.responses import SamplingOptions
from swift_gkd_plugin.teachers.server import Question, ServerOptions, TeacherServer

K = 16
STEP = {
    'tuner_type': 'full',
    'max_steps': 3,
    'lmbda': 0,
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'gkd_logits_topk': K,
    'callbacks': 'recorder',
    'temperature': 1,
    'max_grad_norm': 1e6,
}
SAMPLED = {
    **STEP,
    'lmbda': 1,
    'gkd_logits_topk': None,
    'gkd_signal': 'sampled',
    'gkd_divergence': 'reverse_kl',
    'max_completion_length': 8,
}
MIXED = {**STEP, 'lmbda': 0.5, 'seq_kd': 'true', 'temperature': 0.7, 'top_p': 0.8, 'gkd_temperature': 1, 'max_steps': 2}


def asks(url: str, **options) -> dict:
    return {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': url, 'gkd_server_retry_seconds': 20, **options}


def dies_after(proxy: faults.FaultyProxy, requests: int) -> faults.FaultyProxy:
    proxy.faults, proxy.afterwards = [None] * requests, faults.dead
    return proxy


@pytest.fixture(scope='module')
def spoilt(vllm_server, proxies):
    proxy = proxies(vllm_server)
    kinds = (faults.error_500, faults.late(3), faults.cut, faults.dead, faults.short, faults.missing, faults.not_a_number, faults.too_few)
    proxy.faults = [None, *(one for kind in kinds for one in (kind, None))]  # the start-up's question; then one fault per question
    return proxy


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, vllm_server, deploy_server, proxies, spoilt, tmp_path_factory):
    kept = tmp_path_factory.mktemp('kept') / 'answers.jsonl'
    gone = dies_after(proxies(vllm_server), 1 + 2 * 4)
    nonsense, foreign = proxies(vllm_server), proxies(vllm_server)
    nonsense.faults, nonsense.afterwards = [None] * 5, faults.not_a_number
    foreign.faults, foreign.afterwards = [None] * 5, faults.other_tokens
    root = tmp_path_factory.mktemp('outputs')
    tags = json.dumps([{'url': vllm_server, 'tags': ['even']}, {'url': deploy_server, 'tags': ['odd']}])
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    tagged = root / 'tagged.jsonl'
    tagged.write_text(''.join(json.dumps({**row, 'kind': ('even', 'odd')[i % 2]}) + '\n' for i, row in enumerate(rows)))
    found = run_jobs(
        {
            'local': STEP,
            'vllm': {**STEP, **asks(vllm_server)},
            'local, sampled': SAMPLED,
            'vllm, sampled': {**SAMPLED, **asks(vllm_server)},
            'deploy, sampled': {**SAMPLED, **asks(deploy_server)},
            'deploy': {**STEP, **asks(deploy_server)},
            'two servers': {**STEP, **asks(tags), 'dataset': tagged, 'teacher_tag_key': 'kind'},
            'spoilt': {**STEP, **asks(spoilt.url, gkd_server_timeout=2, gkd_server_in_flight=1)},
            'gone': {**STEP, **asks(gone.url, gkd_server_retry_seconds=2), 'output_dir': root / 'gone'},
            'gone, resumed': {**STEP, **asks(vllm_server), 'resume_from_checkpoint': root / 'gone' / 'checkpoint-2'},
            # In their order: a question of the second step must not overtake one of the first.
            'nonsense': {**STEP, **asks(nonsense.url, gkd_server_in_flight=1)},
            'foreign': {**STEP, **asks(foreign.url, gkd_server_in_flight=1)},
            'mixed': {**MIXED, **asks(vllm_server), 'gkd_save_teacher_responses': kept, 'log_completions': 'true'},
            'mixed, deploy': {**MIXED, **asks(deploy_server)},
        },
        timeout=900,
    )
    return found, root, kept


@pytest.mark.parametrize('name', ['vllm', 'deploy', 'two servers', 'vllm, sampled', 'deploy, sampled'])
def test_equals_the_local_teacher(runs, name):
    """Of k log-probabilities, and of the one of the token that the student sampled."""
    found, local = runs[0][name].ok(), runs[0]['local, sampled' if 'sampled' in name else 'local'].ok()
    assert found.losses == pytest.approx(local.losses, rel=1e-5)
    for step in (1, 2, 3):
        assert job_runs.relative(found.gradients(step), local.gradients(step)) < (1e-4 if step > 1 else 1e-5)


def test_failures_that_pass_cost_only_time(runs, spoilt):
    run = runs[0]['spoilt'].ok()
    assert run.losses == pytest.approx(runs[0]['vllm'].losses, rel=1e-6)
    assert not spoilt.faults  # each of them happened
    for reason in ('HTTP 500 {"message": "out of memory"}', 'no answer within 2 s', 'no connection', 'next try in 1 s', 'is back after'):
        assert reason in run.output


def test_a_server_that_is_gone(runs):
    """A checkpoint first, then server, step and reason; and the resumed run is the one that was never interrupted."""
    found, root, _ = runs
    error = found['gone'].error
    assert error.startswith('TeacherServerError') and '127.0.0.1' in error and 'no connection' in error
    assert 'step 2' in error or 'step 3' in error  # the third step's rows are asked for while the second trains
    assert (root / 'gone' / 'checkpoint-2' / 'trainer_state.json').exists()
    resumed = found['gone, resumed'].ok()
    assert resumed.losses == pytest.approx(found['vllm'].losses[2:], rel=1e-5)


@pytest.mark.parametrize(
    ('name', 'reason'), [('nonsense', 'NaN'), ('foreign', 'another tokenizer or another template')], ids=['nonsense', 'foreign']
)
def test_replies_that_stay_unusable(runs, name, reason):
    found = runs[0][name]
    assert found.error.startswith('TeacherServerError') and reason in found.error and ('step 1' in found.error or 'step 2' in found.error)
    assert (found.output_dir / 'checkpoint-1' / 'trainer_state.json').exists()


def test_answers_of_the_server(runs):
    mixed, deploy = runs[0]['mixed'].ok(), runs[0]['mixed, deploy'].ok()
    assert {line['source'] for line in mixed.completions} == {'student', 'teacher'}
    assert all(0 < loss < 6 for loss in mixed.losses + deploy.losses)


@pytest.mark.parametrize('temperature', [0, 0.7])
def test_scores_that_come_with_an_answer_are_those_of_a_scoring_pass(vllm_server, temperature, monkeypatch):
    """Raw ones: neither the temperature nor top_p has touched them."""
    monkeypatch.setenv('GKD_TEACHER_API_KEY', KEY)
    server = TeacherServer(vllm_server, ServerOptions(topk=K, timeout=60, retry_seconds=5, in_flight=1))
    server.connect()
    for seed in range(4):
        prompt = list(range(20 + seed, 32 + seed))
        options = SamplingOptions(max_tokens=24, temperature=temperature, top_p=0.8)
        response, scores = server.answer(Question(prompt, [], prompt, {}), options, seed, [])
        ids = prompt + response.token_ids
        scored = server.score(Question(ids, list(range(len(prompt), len(ids))), ids, {}))
        assert scores.logprobs.shape == (len(response.token_ids), K)
        assert abs(scores.logprobs - scored.logprobs).max() < 1e-4
        order = [ids.argsort() for ids in (scores.ids, scored.ids)]
        assert all((ours[o] == theirs[t]).all() for ours, o, theirs, t in zip(scores.ids, order[0], scored.ids, order[1], strict=True))


def test_two_ranks_are_one(runs, run_jobs, vllm_server):
    two = run_jobs({'two': {**STEP, **asks(vllm_server), 'gradient_accumulation_steps': 1}}, nproc=2)['two'].ok()
    assert two.losses == pytest.approx(runs[0]['vllm'].ok().losses, rel=1e-5)


def test_no_key_anywhere(runs):
    for run in runs[0].values():
        assert KEY not in run.output
        for path in run.output_dir.rglob('*'):
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
