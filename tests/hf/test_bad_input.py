"""What can be wrong is said in one line that names the option and what to do, before any weights load."""

from __future__ import annotations

import json

import pytest
from helpers import write_rows

SHORT = {
    'tuner_type': 'full',
    'max_steps': 2,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 1,
    'lmbda': 0,
    'learning_rate': 1e-3,
}

# options, and what the message has to name
REFUSED = {
    'beta': ({'beta': 1.5}, ['--beta 1.5', '[0, 1]']),
    'lmbda': ({'lmbda': -0.1}, ['--lmbda -0.1', '[0, 1]']),
    'temperature': ({'temperature': 0}, ['--temperature 0', '> 0', '--gkd_temperature']),
    'gkd_temperature': ({'gkd_temperature': -1}, ['--gkd_temperature -1', '> 0']),
    'sft_alpha': ({'sft_alpha': -1}, ['--sft_alpha -1', '>= 0']),
    'no loss': ({'gkd_loss_weight': 0}, ['--gkd_loss_weight 0', '--sft_alpha']),
    'no loss for the student': ({'gkd_loss_weight': 0, 'sft_alpha': 1, 'lmbda': 0.5}, ['--gkd_loss_weight 0', '--lmbda 0']),
    'seq_kd without teacher': ({'seq_kd': 'true', 'teacher_model': None, 'teacher_model_type': None}, ['--seq_kd true', '--teacher_model']),
    'extrapolation 0': ({'gkd_extrapolation': 0}, ['--gkd_extrapolation 0', '> 0 and finite']),
    'extrapolation nan': ({'gkd_extrapolation': 'nan'}, ['--gkd_extrapolation nan', '> 0 and finite']),
    'extrapolation inf': ({'gkd_extrapolation': 'inf'}, ['--gkd_extrapolation inf', '> 0 and finite']),
    'extrapolation without adapter': ({'gkd_extrapolation': 1.5}, ['--gkd_extrapolation 1.5 with --tuner_type full', 'use lora']),
    'extrapolation, topk': ({'gkd_extrapolation': 1.5, 'gkd_logits_topk': 4}, ['--gkd_extrapolation 1.5 with --gkd_logits_topk 4']),
    'extrapolation, routing': (
        {'gkd_extrapolation': 1.5, 'gkd_routing': 'teacher'},
        ['--gkd_extrapolation 1.5 with --gkd_routing teacher'],
    ),
    'extrapolation, blind': ({'gkd_extrapolation': 1.5, 'gkd_loss_weight': 0}, ['--gkd_extrapolation 1.5 with --gkd_loss_weight 0']),
    'extrapolation, server': (
        {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': 'http://127.0.0.1:9'}
        | {'gkd_extrapolation': 1.5, 'gkd_logits_topk': 4},
        ['--gkd_extrapolation 1.5 and --teacher_model_server http://127.0.0.1:9'],
    ),
    'no room': ({'gkd_generation_tokens': 0}, ['--gkd_generation_tokens 0', '> 0']),
    'topk': ({'gkd_logits_topk': 0}, ['--gkd_logits_topk 0', '> 0']),
    'topk 1': ({'gkd_logits_topk': 1, 'gkd_tail': 'renormalize'}, ['--gkd_logits_topk 1', 'renormalize', 'bucket']),
    'two teachers': ({'teacher_model_server': 'http://127.0.0.1:9', 'gkd_logits_topk': 4}, ['--teacher_model', '--teacher_model_server']),
    'right truncation': ({'lmbda': 0.5, 'truncation_strategy': 'right'}, ['--truncation_strategy right', 'delete']),
    'server': (
        {'teacher_model': None, 'teacher_model_type': None, 'teacher_model_server': 'http://127.0.0.1:9', 'gkd_logits_topk': 4},
        ['--teacher_model_server', 'http://127.0.0.1:9', 'no connection'],
    ),
    'multi turn': ({'lmbda': 1, 'multi_turn_scheduler': 'math_tip_trick', 'max_turns': 2}, ['--multi_turn_scheduler', '--use_vllm']),
    'empty dataset': ({'dataset': 'EMPTY'}, ['--dataset', '0 rows']),
    'no responses': ({'dataset': 'QUESTIONS'}, ['--dataset', 'none of the first', '--lmbda 1']),
}


@pytest.fixture(scope='module')
def data(tiny_models, tmp_path_factory):
    root = tmp_path_factory.mktemp('bad')
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    questions = [{'messages': row['messages'][:1]} for row in rows]
    long = [
        {'messages': [row['messages'][0], {'role': 'assistant', 'content': 'very ' * 200}]} if i % 4 else row for i, row in enumerate(rows)
    ]
    # Cut on the right, a long question leaves nothing of its answer.
    masked = [{'messages': [{'role': 'user', 'content': 'please ' * 60 + 'add'}, row['messages'][1]]} for row in rows]
    return {
        'EMPTY': write_rows(root / 'empty.jsonl', []),
        'QUESTIONS': write_rows(root / 'questions.jsonl', questions),
        'LONG': write_rows(root / 'long.jsonl', long),
        'MASKED': write_rows(root / 'masked.jsonl', masked),
        'SEVEN': write_rows(root / 'seven.jsonl', rows[:7]),
    }


@pytest.fixture(scope='module')
def broken(tiny_models, tmp_path_factory):
    """A student whose weights hold a NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp('broken') / 'student'
    model = AutoModelForCausalLM.from_pretrained(tiny_models.student)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float('nan')
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_models.student).save_pretrained(path)
    return path


@pytest.fixture(scope='module')
def runs(run_jobs, data, broken):
    jobs = {name: {**SHORT, **options} for name, (options, _) in REFUSED.items()}
    jobs |= {
        'too few rows': {**SHORT, 'dataset': data['SEVEN'], 'per_device_train_batch_size': 4, 'gradient_accumulation_steps': 2},
        'questions are enough': {**SHORT, 'dataset': data['QUESTIONS'], 'lmbda': 1, 'max_steps': 1},
        'long rows': {**SHORT, 'dataset': data['LONG'], 'max_length': 96},
        'masked': {**SHORT, 'dataset': data['MASKED'], 'truncation_strategy': 'right', 'max_length': 48},
        'nan': {**SHORT, 'model': broken},
    }
    for options in jobs.values():
        if options.get('dataset') in data:
            options['dataset'] = data[options['dataset']]
    return run_jobs(jobs)


@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_one_line_before_weights_load(runs, name):
    run = runs[name]
    assert run.error is not None
    line = run.error.splitlines()
    assert len(line) == 1 and run.loaded == 0, (run.error, run.loaded)
    for part in REFUSED[name][1]:
        assert part in run.error


def test_dataset_smaller_than_a_generation_batch(runs):
    assert '7 rows' in runs['too few rows'].error and 'generation batch of 8' in runs['too few rows'].error


def test_questions_are_enough_where_the_student_answers(runs):
    assert len(runs['questions are enough'].ok().losses) == 1


def test_rows_that_are_too_long_are_replaced_and_said(runs):
    run = runs['long rows'].ok()
    assert len(run.losses) == 2 and 'stands in' in run.output


def test_rows_without_trained_tokens(runs):
    run = runs['masked'].ok()
    assert run.losses == [0, 0] and 'no token of the whole step is trained' in run.output


def test_nan_stops_and_names_step_and_rows(runs):
    run = runs['nan']
    assert run.error.startswith('FloatingPointError') and 'step 1' in run.error and 'row ' in run.error and 'epoch 0' in run.error
