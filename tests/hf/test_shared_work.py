"""Decoder layers below the first adapted one run once for a teacher that lives in the student's model."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from swift_gkd_plugin.hf.shared_work import SharedWork
from swift_gkd_plugin.teachers.adapters import adapters_off

SAME = types.SimpleNamespace(samples=[], teacher_inputs=None, student_inputs={})
PRIVILEGED = types.SimpleNamespace(
    samples=[], teacher_inputs={'pixel_values': torch.ones(2)}, student_inputs={'pixel_values': torch.ones(2)}
)
STEP = {
    'tuner_type': 'lora',
    'max_steps': 2,
    'lmbda': 0,
    'sft_alpha': 1,
    'learning_rate': 1e-2,
    'lora_dropout': 0,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
    'gkd_self_teacher': 'base',
    'teacher_model': None,
    'teacher_model_type': None,
}
LAST = {'target_modules': ['layers.1.self_attn.q_proj', 'layers.1.mlp.up_proj']}


@pytest.fixture
def adapted(tiny_models):
    def make(**config):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_models.student)
        return get_peft_model(model, LoraConfig(init_lora_weights=False, **config)).train()

    return make


def logits(model, teacher: bool):
    ids = torch.arange(24).view(2, 12)
    if not teacher:
        return model(ids).logits
    with torch.no_grad(), adapters_off(model):
        return model(ids).logits


@pytest.mark.parametrize('checkpointing', [False, True])
def test_same_bits_and_half_the_work(adapted, checkpointing):
    model = adapted(target_modules=['q_proj', 'up_proj'], layers_to_transform=[1])
    if checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': False})
        model.enable_input_require_grads()
    plain = logits(model, True), logits(model, False)
    plain[1].logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ran = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    shared = SharedWork(model)
    assert len(shared.layers) == 1
    with shared.kept(SAME):
        teacher = logits(model, True)
    with shared.used(SAME):
        student = logits(model, False)
    student.logsumexp(-1).sum().backward()
    assert torch.equal(teacher, plain[0]) and torch.equal(student, plain[1]) and len(ran) == 1
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        assert p.grad is None or torch.equal(p.grad, gradients[name]), name
    assert torch.equal(logits(model, False), plain[1]) and len(ran) == 2  # nothing is kept for the next forward


def test_another_prompt_shares_no_layers(adapted):
    model = adapted(target_modules=['q_proj'], layers_to_transform=[1])
    shared = SharedWork(model)
    with shared.kept(PRIVILEGED):
        logits(model, True)
    ran = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    with shared.used(PRIVILEGED):
        logits(model, False)
    assert len(ran) == 1


@pytest.mark.parametrize(
    'config',
    [
        {'target_modules': ['q_proj']},
        {'target_modules': ['q_proj'], 'layers_to_transform': [1], 'modules_to_save': ['embed_tokens']},
        {'target_modules': ['embed_tokens']},
    ],
    ids=['lowest layer', 'embedding saved', 'embedding adapted'],
)
def test_nothing_to_share(adapted, config):
    assert not SharedWork(adapted(**config))


def test_in_training(run_jobs, gradient_difference):
    runs = run_jobs(
        {
            'shared': {**STEP, **LAST},
            'not': {**STEP, **LAST, 'nothing_shared': True},
            'checkpointed': {**STEP, **LAST, 'gradient_checkpointing': 'true'},
            'average': {**STEP, **LAST, 'gkd_self_teacher': 'ema'},
        }
    )
    plain = runs['not'].ok()
    for name in ('shared', 'checkpointed'):
        assert runs[name].ok().losses == plain.losses
        assert gradient_difference(runs[name].gradients(2), plain.gradients(2)) < 1e-6
    assert runs['average'].ok().values('divergence')[0] == 0
    assert 'the lowest 1 layers' in plain.output
    # Teacher, student and the start-up check of the heads.
    assert plain.seen['lowest_layers'] - runs['shared'].seen['lowest_layers'] == 2 * 2
