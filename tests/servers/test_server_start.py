"""What is wrong with a server is said before weights load."""

from __future__ import annotations

import json

import helpers
import numpy as np
import proxy as faults
import pytest
from test_teacher_server import STEP, asks

from swift_gkd_plugin.responses import SamplingOptions
from swift_gkd_plugin.teachers.server import Question, ServerOptions, TeacherServer, TeacherServerError


@pytest.fixture(scope='module')
def refused(run_jobs, tiny_models, tmp_path_factory, vllm_server, deploy_server):
    other = helpers.make_tiny_models(tmp_path_factory.mktemp('other'), vocab_size=400)
    rows = [{**json.loads(line), 'images': ['a.png']} for line in tiny_models.train.read_text().splitlines()]
    images = helpers.write_rows(tmp_path_factory.mktemp('images') / 'rows.jsonl', rows)
    return run_jobs(
        {
            'k vllm': {**STEP, **asks(vllm_server), 'gkd_logits_topk': 64},
            'k deploy': {**STEP, **asks(deploy_server), 'gkd_logits_topk': 64},
            'tokenizer vllm': {**STEP, **asks(vllm_server), 'model': other.student},
            'tokenizer deploy': {**STEP, **asks(deploy_server), 'model': other.student},
            'images': {**STEP, **asks(vllm_server), 'dataset': images},
            'password': {**STEP, **asks('http://me:secret@127.0.0.1:9')},
            'tags': {**STEP, **asks(f'[{{"url": "{vllm_server}", "tags": ["a"]}}, {{"url": "{deploy_server}", "tags": ["b"]}}]')},
        }
    )


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('k vllm', ['--gkd_logits_topk 64', '32', '--max-logprobs']),
        ('k deploy', ['--gkd_logits_topk 64', 'max_logprobs']),
        ('tokenizer vllm', ['tokenizers differ']),
        ('tokenizer deploy', ['tokenizers differ']),
        ('images', ['--enable-scale-out', 'vLLM 0.32']),
        ('password', ['GKD_TEACHER_API_KEY']),
        ('tags', ['--teacher_tag_key dataset', 'row 0', 'a, b']),
    ],
)
def test_refused_before_weights_load(refused, name, words):
    run = refused[name]
    assert run.loaded == 0 and run.error.startswith('OptionError') and '\n' not in run.error
    assert all(word in run.error for word in words), run.error
    assert 'secret' not in run.error


def test_without_the_key(vllm_server, monkeypatch):
    monkeypatch.setenv('GKD_TEACHER_API_KEY', '')
    server = TeacherServer(vllm_server, ServerOptions(topk=16, timeout=60, retry_seconds=0, in_flight=1))
    with pytest.raises(TeacherServerError, match=r'HTTP 401.*GKD_TEACHER_API_KEY'):
        server.connect()


def test_scores_of_an_answer_are_those_of_a_scoring_pass(tiny_models, vllm_server, monkeypatch):
    """Raw log-probabilities, whatever the sampling options."""
    from transformers import AutoTokenizer

    monkeypatch.setenv('GKD_TEACHER_API_KEY', faults.KEY)
    server = TeacherServer(vllm_server, ServerOptions(topk=16, timeout=60, retry_seconds=0, in_flight=1))
    server.connect()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.teacher)
    prompt = tokenizer.encode('what is 2 plus 3 ?')
    response, scores = server.answer(
        Question(prompt, [], prompt, {}), SamplingOptions(24, temperature=0.7, top_p=0.8, top_k=20), 7, [tokenizer.eos_token_id]
    )
    ids = prompt + response.token_ids
    again = server.score(Question(ids, list(range(len(prompt), len(ids))), ids, {}))
    assert np.array_equal(scores.ids, again.ids) and np.abs(scores.logprobs - again.logprobs).max() < 1e-5
