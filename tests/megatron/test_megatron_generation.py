"""Student and teacher answer by megatron-core, in every layout as transformers would on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import starts
import torch
from cases import LORA, MOE, make_datasets
from peft import PeftModel
from runs import CPU, HERE, MODULES, Run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from swift_gkd_plugin.responses import SamplingOptions
from swift_gkd_plugin.responses.sampling import RowSeededSampling
from swift_gkd_plugin.sources import sampling_seed

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.timeout(900)]

GREEDY = {'temperature': 0, 'gkd_temperature': 1}
LIMITS = {'max_completion_length': 3, 'gkd_teacher_max_completion_length': 5}
BOTH = {**LIMITS, 'dataset': 'mixed', 'max_length': 256, 'seq_kd': 'true', 'lmbda': 0.5, 'train_iters': 2}
TRAINED = {**BOTH, **GREEDY, 'lr': 1e-2, 'eval_steps': 2, 'val_dataset': 'six', 'gkd_eval_source': 'student', 'export': True}
# Room for any one prompt with its answer, and seldom for three.
FEW = {'gkd_generation_tokens': BOTH['max_length'] + LIMITS['gkd_teacher_max_completion_length']}
SAMPLED = {
    **BOTH,
    **FEW,
    'train_iters': 3,  # both answer
    'temperature': 0.8,
    'top_p': 0.9,
    'top_k': 40,
    'repetition_penalty': 1.2,
    'gkd_teacher_temperature': 1.5,
    'gkd_num_samples': 2,
    'stop_words': ['a', 'e', 'n', '1'],
    'lr': 0,
}
SELF = {
    **LORA,
    **BOTH,
    **GREEDY,
    'teacher_model': 'student',
    'lr': 0,
    'eval_steps': 2,
    'val_dataset': 'six',
    'gkd_eval_source': 'teacher',
}
UNCACHED = {**SAMPLED, 'no_cache': True}
DENSE = {'trained': TRAINED, 'sampled': SAMPLED, 'self': SELF}
EXPERTS = {'experts': {**MOE, **TRAINED, **FEW}}
REFUSED = {
    'foreign student': {**TRAINED, 'foreign': True, 'seq_kd': 'false'},
    'foreign teacher': {**TRAINED, 'foreign': True, 'lmbda': 0, 'gkd_eval_source': 'dataset'},
}
# Beside what runs in each layout.
ALSO = {
    'CP2': REFUSED,
    'DP2': {
        'kept': {**BOTH, **GREEDY, 'lmbda': 0, 'train_iters': 3},
        'fallback': {**BOTH, **GREEDY, 'train_iters': 3, 'dataset': 'ten', 'seq_kd': 'false', 'gkd_on_missing_engine': 'dataset'},
    },
}
# What runs in each layout. PP2xVPP2 needs 4 layers, TP2 experts only with sequence parallelism.
JOBS = {
    '1': {**DENSE, **EXPERTS, 'uncached': UNCACHED},
    'TP2': DENSE,
    'TP2+SP': {'trained': TRAINED, **EXPERTS},
    'PP2': {**DENSE, **EXPERTS, 'uncached': UNCACHED},
    'CP2': {'trained': TRAINED, **EXPERTS, 'uncached': UNCACHED},
    'DP2': DENSE,
    'EP2': EXPERTS,
    'PP2xVPP2': {'trained': TRAINED},
    'TP2xPP2': {'trained': TRAINED, 'sampled': SAMPLED},
    'TP2xCP2': EXPERTS,
}


@pytest.fixture(scope='module')
def data(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """``mixed``: prompts of very different length, some of them longer for the teacher; ``six`` of them."""
    directory = tmp_path_factory.mktemp('data')
    rows = []
    for n in range(10):
        question = {'role': 'user', 'content': ' '.join(f'what is {i} plus {n} ?' for i in range(1 + 7 * (n % 4) + n))}
        row = {'messages': [question, {'role': 'assistant', 'content': f'{n} plus {n} is {2 * n} .'}]}
        rows.append(row | {'teacher_prompt': f'{question["content"]} think of {n}' if n % 3 == 0 else None})
    mixed = helpers.write_rows(directory / 'mixed.jsonl', rows)
    six = helpers.write_rows(directory / 'six.jsonl', rows[:6])
    return {**make_datasets(tiny_models.train, directory), 'mixed': mixed, 'six': six, 'kept': directory / 'kept.jsonl'}


@pytest.fixture(scope='module')
def answered(run_jobs, data):
    """The runs of a layout, made when they are first asked for."""
    made: dict[str, dict[str, Run]] = {}

    def of(layout: str) -> dict[str, Run]:
        if layout not in made:
            jobs = JOBS[layout] | ALSO.get(layout, {})
            jobs = {name: {k: data[v] if k.endswith('dataset') else v for k, v in job.items()} for name, job in jobs.items()}
            if layout == 'DP2':
                jobs['kept'] |= {'gkd_save_teacher_responses': data['kept']}
            made[layout] = run_jobs(jobs, layout, timeout=600)
        return made[layout]

    return of


def limit_of(answer: Mapping[str, Any], job: Mapping[str, Any]) -> int:
    return job['gkd_teacher_max_completion_length' if answer['source'] == 'teacher' else 'max_completion_length']


@torch.no_grad()
def likeliest(model, answer: Mapping[str, Any], job: Mapping[str, Any], tokenizer) -> bool:
    """Whether a response is the greedy one: in one pass, each of its tokens is the likeliest after those before it."""
    prompt, ids = answer['prompt'], answer['token_ids']
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    ended = ids[-1] == tokenizer.eos_token_id
    whole = tokenizer.eos_token_id not in ids[:-1] and (ended or len(ids) == limit_of(answer, job))
    return whole and logits.argmax(-1).tolist() == ids and answer['finish_reason'] == ('stop' if ended else 'length')


def of_transformers(model, answer: Mapping[str, Any], job: Mapping[str, Any], tokenizer) -> tuple[list[int], str]:
    """(ids, finish reason) of a response to the same prompt, by ``transformers.generate``."""
    teacher, limit = answer['source'] == 'teacher', limit_of(answer, job)
    temperature = job.get('gkd_teacher_temperature', job['temperature']) if teacher else job['temperature']
    penalty = job.get('repetition_penalty', 1.0)
    options = SamplingOptions(limit, temperature, job.get('top_k', -1), job.get('top_p', 1.0), 0.0, penalty)
    number, epoch, repeat = answer['key']
    warp = LogitsProcessorList()
    if temperature > 0:
        warp.append(RowSeededSampling(options, [sampling_seed(42, epoch, number, answer['source'], repeat)], torch.device('cpu')))
    prompt = torch.tensor([answer['prompt']])
    ids = model.generate(prompt, max_new_tokens=limit, do_sample=False, repetition_penalty=penalty, pad_token_id=0, logits_processor=warp)[
        0, prompt.shape[1] :
    ].tolist()
    for n in range(1, len(ids) + 1):
        if ids[n - 1] == tokenizer.eos_token_id or any(word in tokenizer.decode(ids[:n]) for word in job.get('stop_words', ())):
            return ids[:n], 'stop'
    return ids, 'length'


def which(answer: Mapping[str, Any]) -> tuple:
    return answer['training'], answer['source'], *answer['key']


def loaded(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_weights(path: Path, run: Run) -> Path:
    """A model's directory with the weights that a run has left. transformers puts experts together while it loads."""
    directory = run.output_dir / 'exported'
    shutil.copytree(path, directory)
    save_file({name: w.contiguous() for name, w in run.saved('weights').items()}, directory / 'model.safetensors', {'format': 'pt'})
    return directory


@pytest.fixture(scope='module')
def sampled() -> dict[str, tuple[list[int], str]]:
    """What transformers has been asked so far."""
    return {}


@pytest.mark.parametrize('layout', JOBS)
def test_same_tokens_as_transformers(answered, models, sampled, layout):
    runs = answered(layout)
    tokenizer = AutoTokenizer.from_pretrained(models['student'])
    for name, job in JOBS[layout].items():
        run = runs[name].ok()
        student = loaded(models[job.get('model', 'student')])
        teacher = loaded(models[job.get('teacher_model', 'teacher')])
        before = PeftModel.from_pretrained(loaded(models['student']), models['adapter']) if name == 'self' else student
        after = loaded(with_weights(models[job.get('model', 'student')], run)) if job.get('export') else before
        found = {which(a): a for a in run.answers}
        assert all(found[which(a)]['token_ids'] == a['token_ids'] for a in run.answers)  # ranks with the same rows agree
        compared = 0
        for answer in found.values():
            if answer['source'] == 'teacher':
                model = teacher
            elif not answer['training']:
                model = after
            elif answer['step'] == 0 or job['lr'] == 0:
                model = before
            else:
                continue  # of weights that the next step has changed
            if job['temperature'] == 0:
                assert likeliest(model, answer, job, tokenizer), (name, answer)
            else:  # of weights that no run changes: the same in all layouts
                key = repr((answer['source'], answer['prompt'], answer['key'], {**job, 'no_cache': False}))
                if key not in sampled:
                    sampled[key] = of_transformers(model, answer, job, tokenizer)
                assert (answer['token_ids'], answer['finish_reason']) == sampled[key], (name, answer)
            compared += 1
        assert compared >= 8, name
        trained = [a for a in found.values() if a['training']]
        assert {a['source'] for a in trained} == {'student', 'teacher'}
        if 'val_dataset' in job:
            assert sum(not a['training'] for a in found.values()) == 6 and len(run.values('eval_loss')) == 1
        if name == 'sampled':
            assert {a['finish_reason'] for a in trained} == {'stop', 'length'}
            assert {a['key'][2] for a in trained} == {0, 1}
        if job.get('export'):  # what was trained changes what is answered
            changed = [a for a in found.values() if a['source'] == 'student' and not a['training']]
            assert not all(likeliest(before, a, job, tokenizer) for a in changed)


@pytest.mark.parametrize('layout', JOBS)
def test_caches_and_passes_keep_to_their_limits(answered, layout):
    for name, job in JOBS[layout].items():
        seen = answered(layout)[name].ok().seen
        held = seen['cached_tokens']
        assert 100 < seen['pass_tokens'] <= 300, name
        if job.get('no_cache'):
            assert held == 0
        elif 'gkd_generation_tokens' in job:
            assert 0 < held <= job['gkd_generation_tokens'], name
        elif layout == '1':
            assert held > FEW['gkd_generation_tokens'], name


@pytest.mark.parametrize('layout', [name for name in JOBS if name != '1'])
def test_training_on_answers_is_the_same_in_every_layout(answered, layout):
    for name in JOBS[layout]:
        run, alone = answered(layout)[name], answered('1')[name].ok()
        assert run.ok().losses == pytest.approx(alone.losses, abs=1e-6), name
        assert run.values('eval_loss') == pytest.approx(alone.values('eval_loss'), abs=1e-6), name


def test_prompts_go_to_those_who_answer_them(tmp_path):
    """With their images; of all that every rank is given nothing has the size of one."""
    returncode, output = starts.run(HERE / 'shares.py', modules=MODULES, ranks=2, env=CPU, cwd=tmp_path, timeout=120)
    assert returncode == 0 and output.count('each its own') == 2, output[-3000:]


def test_attention_that_cannot_answer_is_refused_before_any_weights(answered, models):
    for name, option in (('student', '--model'), ('teacher', '--teacher_model')):
        run = answered('CP2')[f'foreign {name}']
        assert run.error.startswith(f'OptionError: {option} {models[name]}: ') and '\n' not in run.error
        assert '--context_parallel_size 2 cannot answer in the training processes' in run.error and run.loaded == 0


def test_kept_answers_are_those_of_the_run(answered, data):
    runs = answered('DP2')
    rows = [json.loads(line) for line in data['kept'].read_text().splitlines()]
    answers = [a['token_ids'] for a in runs['kept'].ok().answers]
    assert sorted(row['response_token_ids'] for row in rows) == sorted(answers) and len(rows) == 10
    assert not runs['fallback'].ok().answers and runs['fallback'].values('source/dataset') == [1, 1, 1]
    assert 'responses of the dataset instead' in runs['fallback'].output
