"""A tiny Qwen3-VL-MoE learns from another one about images, its experts on two ranks, its vision tower trained too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiny_vision
import torch
from cases import compared
from runs import HERE, Run, run_jobs
from safetensors.torch import load_file, save_file
from teacher_cases import layout
from torch.nn.functional import log_softmax

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(tiny_vision.why_none()), reason=str(tiny_vision.why_none())),
]

IMAGES = {
    'model_type': 'qwen3_vl_moe',
    'teacher_model_type': 'qwen3_vl_moe',
    'template': 'qwen3_vl',
    'vit_attn_impl': 'eager',
    'freeze_vit': 'false',
    'freeze_aligner': 'false',
    'max_length': 256,
}


def trained(own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {'one': {**own}, 'packed': {'micro_batch_size': 2, **own}, 'steps': {'train_iters': 2, 'adam_eps': 1e-3, **own}}


GREEDY = {'temperature': 0, 'gkd_temperature': 1, 'max_completion_length': 8}
ANSWERS = {'student answers': {**GREEDY, 'lmbda': 1}, 'teacher answers': {**GREEDY, 'lmbda': 0, 'seq_kd': 'true'}}
# What runs in each layout.
JOBS: dict[str, dict[str, dict[str, Any]]] = {
    '1': {**trained({}), **ANSWERS},
    'EP2': {**trained({}), **ANSWERS},
    'DP2': trained(layout(ep=2)),
    'TP2+SP': ANSWERS,
    'PP2': ANSWERS,
    'CP2': {'one': {'lmbda': 1}},
}


def as_on_the_hub(path: Path) -> None:
    """Qwen's own files have the experts' matrices as [experts, in, out], which is what the bridge expects. transformers reads that, and
    writes [experts, out, in]."""
    weights = load_file(path)
    for name, weight in weights.items():
        if '.experts.' in name:
            weights[name] = weight.transpose(1, 2).contiguous()
    save_file(weights, path, metadata={'format': 'pt'})


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> helpers.TinyModels:
    directory = tmp_path_factory.mktemp('vision')
    helpers.run([sys.executable, Path(tiny_vision.__file__), directory, 'moe'], env=tiny_vision.environment(), cwd=directory)
    for name in ('student', 'teacher'):
        as_on_the_hub(directory / name / 'model.safetensors')
    return helpers.TinyModels(directory / 'student', directory / 'teacher', directory / 'train.jsonl', directory / 'val.jsonl')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, tiny) -> Callable[[str], dict[str, Run]]:
    """The runs of a layout, made when they are first asked for."""
    environment = tiny_vision.environment()
    first, *others = environment['PYTHONPATH'].split(':')
    environment |= {'PYTHONPATH': ':'.join([str(HERE / 'cpu'), *others]), 'ALSO_AT_START': f'{first}/sitecustomize.py'}

    made: dict[str, dict[str, Run]] = {}

    def of(split: str) -> dict[str, Run]:
        if split not in made:
            jobs = {name: {**IMAGES, 'model': tiny.student, 'teacher_model': tiny.teacher, **job} for name, job in JOBS[split].items()}
            made[split] = run_jobs(jobs, split, tmp_path_factory.mktemp('images'), {}, tiny.train, env=environment)
        return made[split]

    return of


@pytest.fixture(scope='module')
def plain(tiny) -> dict[str, Callable[[dict], torch.Tensor]]:
    """Logits [tokens, vocab] of the trained tokens of a micro-batch with one row, by transformers."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    def logits(path: Path) -> Callable[[dict], torch.Tensor]:
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation='eager')

        @torch.no_grad()
        def of(batch: dict) -> torch.Tensor:
            inputs = batch['student_inputs']
            given = {name: inputs[name] for name in ('input_ids', 'pixel_values', 'image_grid_thw') if name in inputs}
            given['mm_token_type_ids'] = (inputs['input_ids'] == tiny_vision.SPECIAL['<|image_pad|>']).long()
            return model(**given).logits[0, batch['student_index']]

        return of

    return {'student': logits(tiny.student), 'teacher': logits(tiny.teacher)}


def test_one_process_is_plain_transformers(runs, plain):
    alone, total, tokens, images = runs('1'), 0.0, 0, 0
    for batch in alone['one'].ok().saved('batches'):
        images += len(batch['student_inputs']['image_grid_thw'])
        s, t = (log_softmax(plain[side](batch) / 0.9, -1) for side in ('student', 'teacher'))
        mixture = torch.logaddexp(s, t) - torch.tensor(2.0).log()
        total += 0.5 * (t.exp() * (t - mixture) + s.exp() * (s - mixture)).sum().item()
        tokens += len(batch['labels'])
    assert images == 4
    assert alone['one'].losses[0] == pytest.approx(total / tokens, abs=1e-6)


@pytest.mark.parametrize('split', ['EP2', 'DP2'])
def test_layout_changes_nothing(runs, split):
    differences = {name: compared(runs(split)[name].ok(), runs('1')[name].ok()) for name in trained({})}
    assert {name: d for name, d in differences.items() if not (d[0] < 1e-6 and d[1] < 1e-5)} == {}
    # The vision tower has learnt something, on whatever rank.
    assert any('visual' in name and gradient.abs().max() > 0 for name, gradient in runs(split)['one'].gradients.items())


@pytest.mark.parametrize('split', ['1', 'EP2', 'TP2+SP', 'PP2'])
def test_answers_in_the_training_processes(runs, plain, split):
    """What is sampled greedily is what transformers holds to be likeliest at each place."""
    for side in ('student', 'teacher'):
        images = 0
        for batch in runs(split)[f'{side} answers'].ok().saved('batches'):
            images += len(batch['student_inputs'].get('image_grid_thw', []))
            assert plain[side](batch).argmax(-1).tolist() == batch['labels'].tolist()
            assert len(batch['labels']) > 1
        assert images > 0


def test_answers_only_with_whole_sequences(runs):
    assert 'use --use_vllm true, or --context_parallel_size 1' in runs('CP2')['one'].error
