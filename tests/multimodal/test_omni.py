"""A tiny Qwen3-Omni-MoE: images, films and sounds, against plain transformers, and with all that teachers and responses can be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import helpers
import job_runs
import pytest
import tiny_omni
from engine_options import ENGINE

HERE = Path(__file__).parent
ROWS = 4  # of the first step; those that plain_omni.py looks at
KINDS = ('mixed', 'films', 'both')  # mixed: an image, text alone, a sound, frames of a film
IN_ORDER = {'train_dataloader_shuffle': 'false', 'dataset_shuffle': 'false'}
STEP = {
    **tiny_omni.NAMES,
    **IN_ORDER,
    'tuner_type': 'full',
    'freeze_vit': 'false',
    'freeze_aligner': 'false',
    'max_steps': 1,
    'lmbda': 0,
    'temperature': 1,
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': ROWS // 2,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
}
GREEDY = {'temperature': 0, 'gkd_temperature': 1, 'max_completion_length': 8, 'log_completions': 'true'}
SELF = {
    'tuner_type': 'lora',
    'freeze_vit': 'true',
    'freeze_aligner': 'true',
    'max_steps': 2,
    'sft_alpha': 1,
    'learning_rate': 1e-2,
    'lora_dropout': 0,
    'gkd_self_teacher': 'base',
    'teacher_model': None,
    'teacher_model_type': None,
    'target_modules': 'thinker.model.layers.1.self_attn.q_proj',
}
MICRO_BATCHES = SELF['max_steps'] * STEP['gradient_accumulation_steps']


def difference(ours: dict, theirs: dict) -> float:
    """Between two gradients; a bias of attention's keys has none, only noise."""
    without = [{name: value for name, value in gradient.items() if not name.endswith('k_proj.bias')} for gradient in (ours, theirs)]
    return job_runs.relative(*without)


@pytest.fixture(scope='module')
def plain(omni):
    _, output = helpers.run([sys.executable, HERE / 'plain_omni.py', omni, *KINDS], env=tiny_omni.environment(), timeout=300)
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope='module')
def privileged(omni):
    """Rows with an image and a sound: some whose teacher is told more, all of them, and rows whose teacher sees another image."""
    rows = [json.loads(line) for line in (omni / 'both.jsonl').read_text().splitlines()]
    told = [{**row, 'teacher_prompt': f'<image><audio>{row["messages"][1]["content"]} what colour is the square ?'} for row in rows]
    others = [{**row, 'teacher_images': rows[i - 1]['images']} for i, row in enumerate(rows)]
    return {name: helpers.write_rows(omni / f'{name}.jsonl', found) for name, found in (('told', told), ('other images', others))}


@pytest.fixture(scope='module')
def runs(run_omni, omni, privileged):
    jobs = {kind: {**STEP, 'dataset': omni / f'{kind}.jsonl'} for kind in KINDS}
    jobs |= {f'{kind}, dense path': {**jobs[kind], 'dense': True} for kind in ('mixed', 'both')}
    jobs['on host'] = {**jobs['both'], 'gkd_teacher_offload': 'model'}
    for source, who in (('student', {'lmbda': 1}), ('teacher', {'seq_kd': 'true'})):
        jobs |= {f'{kind}, {source} answers': {**jobs[kind], **GREEDY, **who} for kind in KINDS}
    shared = {kind: {**STEP, **SELF, 'dataset': omni / f'{kind}.jsonl'} for kind in ('both', 'mixed')}
    shared |= {name: {**STEP, **SELF, 'dataset': path} for name, path in privileged.items()}
    shared['mixed'] |= {'lmbda': 0.5, 'seq_kd': 'true'}
    shared['checkpointed'] = {**shared['both'], 'gradient_checkpointing': 'true', 'vit_gradient_checkpointing': 'true'}
    jobs |= {f'shared {name}': options for name, options in shared.items()}
    jobs |= {f'apart {name}': {**options, 'nothing_shared': True} for name, options in shared.items()}
    return run_omni(jobs, timeout=900)


@pytest.mark.parametrize('kind', KINDS)
def test_divergence_is_that_of_plain_transformers(runs, plain, kind):
    assert runs[kind].ok().losses == pytest.approx([plain[kind]['divergence']], rel=1e-5)


@pytest.mark.parametrize('kind', ['mixed', 'both'])
def test_gradient_is_that_of_whole_logits(runs, kind):
    ours, dense = runs[kind].ok(), runs[f'{kind}, dense path'].ok()
    assert ours.losses == pytest.approx(dense.losses, rel=1e-5)
    assert difference(ours.gradients(1), dense.gradients(1)) < 1e-4


def test_a_teacher_on_the_host_is_the_same(runs):
    assert runs['on host'].ok().losses == pytest.approx(runs['both'].ok().losses, rel=1e-6)


def test_the_head_is_the_thinkers(runs):
    output = runs['mixed'].ok().output
    assert output.count('runs with whole logits') == 2 * 2  # student and teacher of the two jobs that ask for it


@pytest.mark.parametrize('source', ['student', 'teacher'])
@pytest.mark.parametrize('kind', KINDS)
def test_answers_are_those_of_plain_transformers(runs, plain, kind, source):
    lines = sorted(runs[f'{kind}, {source} answers'].ok().completions, key=lambda line: line['row'])
    assert [line['source'] for line in lines] == [source] * ROWS
    assert [line['completion'] for line in lines] == plain[kind][source]


@pytest.mark.parametrize(
    ('name', 'vision', 'audio', 'layers'),
    [
        ('both', 1, 1, 1),
        ('mixed', 1, 0.5, 1),  # every other micro-batch has no sound
        ('told', 1, 1, 0),
        ('other images', 0, 1, 0),
        ('checkpointed', 1, 1, 2),  # apart, the student's backward pass runs the layer again
    ],
)
def test_towers_run_once_and_give_the_same(runs, name, vision, audio, layers):
    """How many runs of a part less for each micro-batch."""
    together, apart = runs[f'shared {name}'].ok(), runs[f'apart {name}'].ok()
    assert together.losses == apart.losses
    for step in (1, 2):
        ours, theirs = together.gradients(step), apart.gradients(step)
        assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in theirs)
    for part, saved in (('towers', vision), ('audio_towers', audio), ('lowest_layers', layers)):
        assert apart.seen[part] - together.seen[part] == saved * MICRO_BATCHES, part


@pytest.fixture(scope='module')
def some_told(omni):
    """Four kinds of rows in turn, every other of which has a ``teacher_prompt``; two ranks never see the same kind at the same time."""
    rows = [json.loads(line) for line in (omni / 'mixed.jsonl').read_text().splitlines()]
    for row in rows[::2]:
        question, answer = (message['content'] for message in row['messages'])
        row['teacher_prompt'] = question.replace('>', f'>{answer} ', 1)
    return helpers.write_rows(omni / 'some told.jsonl', rows)


@pytest.fixture(scope='module')
def mixed_ranks(run_omni, omni, some_told):
    """The same steps in one process and by two ranks under ZeRO-3, with an image on one rank and text on the other, then a sound and a
    film."""
    step = {**STEP, 'dataset': omni / 'mixed.jsonl', 'optim': 'sgd', 'max_steps': 2, 'max_completion_length': 8, 'log_completions': 'true'}
    jobs = {
        'dataset': step,
        'student answers': {**step, 'lmbda': 1},
        'teacher answers': {**step, 'seq_kd': 'true'},
        'shared': {**step, **SELF, 'dataset': some_told},
        'shared, student answers': {**step, **SELF, 'dataset': some_told, 'lmbda': 1},
    }
    sharded = {name: {**options, 'per_device_train_batch_size': 1, 'deepspeed': 'zero3'} for name, options in jobs.items()}
    return run_omni(jobs), run_omni(sharded, nproc=2, timeout=600)


@pytest.mark.parametrize('name', ['dataset', 'student answers', 'teacher answers', 'shared', 'shared, student answers'])
def test_ranks_with_other_media_under_zero3(mixed_ranks, name):
    whole, sharded = (runs[name].ok() for runs in mixed_ranks)
    assert sharded.seen['sharded'] and sharded.losses == pytest.approx(whole.losses, rel=1e-5)
    answers = [sorted((line['step'], line['row'], line['completion']) for line in run.completions) for run in (sharded, whole)]
    assert answers[0] == answers[1] and bool(answers[0]) == ('answers' in name)
    for step in (1, 2):
        assert difference(sharded.gradients(step), whole.gradients(step)) < 1e-4


def test_vllm_is_refused_before_weights_load(run_omni_with_engine, omni):
    """Once ms-swift has sent it weights, its log-probabilities of what it samples are off by more than 4."""
    unknown = shutil.copytree(omni / 'student', omni / 'unknown')
    config = json.loads((unknown / 'config.json').read_text())
    (unknown / 'config.json').write_text(json.dumps({**config, 'architectures': ['NobodyKnows']}))
    job = {**STEP, **ENGINE, 'lmbda': 1, 'use_vllm': 'true', 'vllm_mode': 'colocate', 'ddp_backend': 'gloo'}
    runs = run_omni_with_engine({'omni': job, 'unknown': {**job, 'model': unknown}}, env=helpers.one_rank())
    assert 'was not the student after' in runs['omni'].error and runs['omni'].loaded == 0
    assert 'does not know the architecture NobodyKnows' in runs['unknown'].error and runs['unknown'].loaded == 0
