"""Defects of ms-swift 4.6.0's own GKD: each has one test function that runs on both trainers. Stock is seen to fail it, the plugin passes.

The numbers are those of the README's table: D1 … D15 were seen in runs, R1 … R14 in the code.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import write_rows

TRAINERS = ('stock', 'plugin')
FULL = {
    'tuner_type': 'full',
    'max_steps': 2,
    'lmbda': 0,
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 1,
    'temperature': 1.0,
}


@pytest.fixture(scope='module')
def variants(tiny_models, tmp_path_factory):
    """Models and data that bring a defect out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    root = tmp_path_factory.mktemp('variants')
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.student)
    student = AutoModelForCausalLM.from_pretrained(tiny_models.student)

    def save(name, model, tokens=tokenizer):
        model.save_pretrained(root / name)
        tokens.save_pretrained(root / name)

    torch.manual_seed(3)
    close = AutoModelForCausalLM.from_pretrained(tiny_models.student)
    with torch.no_grad():
        close.lm_head.weight.add_(0.02 * close.lm_head.weight.std() * torch.randn_like(close.lm_head.weight))
    save('close', close)

    wide = AutoModelForCausalLM.from_pretrained(tiny_models.student)
    wide.resize_token_embeddings(student.config.vocab_size + 64, mean_resizing=False)
    save('wide', wide)

    shifted = AutoTokenizer.from_pretrained(tiny_models.student)
    vocab = json.loads(shifted.backend_tokenizer.to_str())
    tokens = vocab['model']['vocab']
    by_id = {i: t for t, i in tokens.items()}
    tokens[by_id[300]], tokens[by_id[301]] = 301, 300
    shifted._tokenizer = shifted.backend_tokenizer.from_str(json.dumps(vocab))
    save('other tokens', AutoModelForCausalLM.from_pretrained(tiny_models.teacher), shifted)

    torch.manual_seed(4)
    config = Qwen3MoeConfig(
        **{
            **student.config.to_dict(),
            'model_type': 'qwen3_moe',
            'architectures': ['Qwen3MoeForCausalLM'],
            'num_experts': 4,
            'num_experts_per_tok': 2,
            'moe_intermediate_size': 16,
            'decoder_sparse_step': 1,
        }
    )
    save('moe', Qwen3MoeForCausalLM(config))

    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    for i, row in enumerate(rows):
        row['messages'][0]['content'] += ' please' * (2 + 8 * (i % 2))
    write_rows(root / 'long.jsonl', rows)
    return root


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, variants, tmp_path_factory):
    """All runs of this file, on both trainers."""
    moe = {
        **FULL,
        'model': variants / 'moe',
        'teacher_model': variants / 'moe',
        'model_type': 'qwen3_moe',
        'teacher_model_type': 'qwen3_moe',
        'teacher_adapters': None,
        'sft_alpha': 0.1,
    }
    resume = {
        'tuner_type': 'full',
        'temperature': 1.0,
        'lmbda': 0.5,
        'learning_rate': 1e-3,
        'max_steps': 7,
        'per_device_train_batch_size': 2,
        'gradient_accumulation_steps': 2,
        'steps_per_generation': 4,
        'save_strategy': 'steps',
        'save_steps': 3,
        'dataset': f'{tiny_models.train}#20',
        'save_total_limit': 9,
    }
    jobs = {
        'D1 bf16': {**FULL, 'teacher_model': variants / 'close', 'torch_dtype': 'bfloat16'},
        'D1 fp32': {**FULL, 'teacher_model': variants / 'close'},
        'D3 4x1': {**FULL, 'dataset': variants / 'long.jsonl', 'per_device_train_batch_size': 4},
        'D3 1x4': {**FULL, 'dataset': variants / 'long.jsonl', 'per_device_train_batch_size': 1, 'gradient_accumulation_steps': 4},
        'D4': {
            **FULL,
            'lmbda': 0.5,
            'learning_rate': 0,
            'max_steps': 2,
            'eval_strategy': 'steps',
            'eval_steps': 1,
            'val_dataset': tiny_models.val,
        },
        'D6': {**FULL, 'dataset': variants / 'long.jsonl', 'max_length': 32, 'truncation_strategy': 'left', 'callbacks': 'recorder'},
        'D7': {**FULL, 'lmbda': 1, 'multi_turn_scheduler': 'math_tip_trick', 'max_turns': 2},
        'D10': {**FULL, 'model': variants / 'wide', 'callbacks': 'recorder'},
        'D15': {**FULL, 'tuner_type': 'lora', 'lora_dropout': 0.25, 'callbacks': 'recorder'},
        'R5 with': {**moe, 'router_aux_loss_coef': 0.5},
        'R5 without': moe,
        'R6': {**FULL, 'teacher_model': variants / 'other tokens'},
        'R8 R9': {**FULL, 'dataset': variants / 'long.jsonl', 'padding_side': 'right', 'callbacks': 'recorder'},
    }
    result = {}
    for trainer in TRAINERS:
        root = tmp_path_factory.mktemp(trainer)
        jobs['D5'] = {**resume, 'output_dir': root}
        jobs['D5 again'] = {**resume, 'resume_from_checkpoint': root / 'checkpoint-3'}
        result[trainer] = run_jobs(jobs, plugin=trainer == 'plugin')
    return result


def d1_bf16_divergence_of_close_models(runs):
    bf16, fp32 = (runs[name].ok().losses[0] for name in ('D1 bf16', 'D1 fp32'))
    assert bf16 >= 0 and bf16 == pytest.approx(fp32, rel=0.1), (bf16, fp32)


def d3_split_into_micro_batches(runs):
    whole, parts = runs['D3 4x1'].ok(), runs['D3 1x4'].ok()
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert parts.values('grad_norm') == pytest.approx(whole.values('grad_norm'), rel=1e-3)


def d4_evaluation_at_learning_rate_zero(runs):
    values = runs['D4'].ok().values('eval_loss')
    assert len(values) == 2 and values == pytest.approx([values[0]] * 2, rel=1e-6)


def d5_resume(runs):
    assert runs['D5 again'].ok().losses == pytest.approx(runs['D5'].ok().losses[3:], rel=1e-5)


def d6_max_length(runs):
    assert runs['D6'].ok().seen['longest'] <= 32


def d7_multi_turn_scheduler_is_not_dropped(runs):
    assert runs['D7'].error and 'multi_turn_scheduler' in runs['D7'].error


def d10_columns_that_the_teacher_lacks(runs):
    gradient = runs['D10'].ok().gradients()['lm_head.weight']
    assert gradient.shape[0] == 576 and not gradient[512:].any()


def d15_lora_dropout(runs):
    assert runs['D15'].ok().seen['dropout'] == 0.25


def r5_router_auxiliary_loss(runs):
    # At the very start the student is the teacher, so what differs is 0.5 times the auxiliary loss, which is about 1 per layer or more.
    difference = runs['R5 with'].ok().losses[0] - runs['R5 without'].ok().losses[0]
    assert difference > 0.25, difference


def r6_different_tokenizers(runs):
    assert runs['R6'].error and 'id 300' in runs['R6'].error


def r8_forward_context(runs):
    assert runs['R8 R9'].ok().seen['forward_contexts'] > 0


def r9_padding_side(runs):
    seen = runs['R8 R9'].ok().seen
    assert seen['padded_right'] and not seen['padded_left']


@pytest.mark.parametrize(
    'check',
    [
        d1_bf16_divergence_of_close_models,
        d3_split_into_micro_batches,
        d4_evaluation_at_learning_rate_zero,
        d5_resume,
        d6_max_length,
        d7_multi_turn_scheduler_is_not_dropped,
        d10_columns_that_the_teacher_lacks,
        d15_lora_dropout,
        r5_router_auxiliary_loss,
        r6_different_tokenizers,
        r8_forward_context,
        r9_padding_side,
    ],
)
@pytest.mark.parametrize('trainer', TRAINERS)
def test_in_runs(runs, trainer, check):
    if trainer == 'stock':
        with pytest.raises(AssertionError):
            check(runs['stock'])
    else:
        check(runs['plugin'])


def _stock_loss(student, teacher, labels):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    trainer = SimpleNamespace(gkd_logits_topk=None, beta=0.5, temperature=1.0)
    return GKDTrainer._compute_jsd_loss(trainer, student, TeacherOutput(full_logits=teacher, labels=labels), labels)


def _our_loss(student, teacher, labels):
    from swift_gkd_plugin.divergence import Divergence, logits_divergence
    from swift_gkd_plugin.step.samples import predicting_positions

    index = predicting_positions(labels)
    flat = [logits.reshape(-1, logits.shape[-1])[index] for logits in (student, teacher)]
    return logits_divergence(*flat, Divergence('jsd', 0.5), reduction='sum') / len(index)


LOSSES = {'stock': _stock_loss, 'plugin': _our_loss}


def d12_same_column_of_minus_infinity(loss):
    student, teacher = torch.randn(2, 1, 5, 11)
    student[..., 4] = teacher[..., 4] = -torch.inf
    student.requires_grad_()
    value = loss(student, teacher, torch.tensor([[-100, -100, 3, 5, 6]]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def r14_first_token_of_a_row_that_is_trained(loss):
    # The first token of a row is predicted by nothing; rolled labels have it predicted by the last position.
    student, teacher = torch.randn(2, 1, 5, 11)
    labels = torch.tensor([[7, -100, 3, 5, 6]])
    changed = student.clone()
    changed[:, -1] += torch.randn(11)
    assert loss(student, teacher, labels) == pytest.approx(loss(changed, teacher, labels).item(), rel=1e-6)


@pytest.mark.parametrize('check', [d12_same_column_of_minus_infinity, r14_first_token_of_a_row_that_is_trained])
@pytest.mark.parametrize('trainer', TRAINERS)
def test_in_the_loss(trainer, check):
    torch.manual_seed(0)
    if trainer == 'stock':
        with pytest.raises(AssertionError):
            check(LOSSES['stock'])
    else:
        check(LOSSES['plugin'])
