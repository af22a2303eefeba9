"""The runs whose loss and gradients must not depend on the layout, and plain transformers with autograd to hold them against."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import torch
from peft import PeftModel
from runs import LAYOUTS, Run, relative
from torch.nn.functional import cross_entropy, linear, log_softmax
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from swift_gkd_plugin.hf.routing import RoutingReplay

LORA = {'tuner_type': 'lora', 'adapters': 'adapter', 'target_modules': 'all-linear', 'lora_rank': 4, 'lora_alpha': 8}
CAPPED = {'model': 'capped', 'teacher_model': 'capped_teacher'}
MOE = {'model': 'moe', 'teacher_model': 'moe_teacher'}
# An adapter of the attention alone.
MOE_BASE = {**LORA, 'model': 'moe', 'teacher_model': 'moe', 'adapters': 'moe_adapter', 'target_modules': ['linear_qkv', 'linear_proj']}
# `privileged`: 6 rows of unequal length of which the teacher sees more; `ten`: 10 rows, so that the last step has micro-batches without
# a trained token. test_parity.py checks that every pair of axes is there, so what is beside the point of a case is not there for nothing.
FILLERS = {'dataset': 'ten', 'train_iters': 3, 'adam_eps': 1e-3}  # a large epsilon: see test_megatron_training.py
CASES: dict[str, dict[str, Any]] = {
    'dense beta 0.5': {},
    'dense beta 0': {'beta': 0},
    'dense beta 1': {'beta': 1},
    'three steps, fillers': {'dataset': 'ten', 'train_iters': 3, 'gkd_micro_batch_tokens': 64},
    'packed rows, sft_alpha': {'micro_batch_size': 2, 'sft_alpha': 0.5},
    'padded rows': {'micro_batch_size': 2, 'padding_free': 'false', 'beta': 1},
    'unequal vocabularies': {'teacher_model': 'wide', 'beta': 0, 'micro_batch_size': 2},
    'unequal vocabularies, tied': {'model': 'tied', 'teacher_model': 'wide', 'beta': 1, **FILLERS},
    'top-k': {'gkd_logits_topk': 8, 'beta': 0, 'micro_batch_size': 2, **FILLERS},
    'top-k renormalised': {'gkd_logits_topk': 8, 'gkd_tail': 'renormalize', 'teacher_model': 'wide'},
    'LoRA beta 0': {**LORA, 'beta': 0, 'teacher_model': 'wide'},
    'LoRA, shared base, beta 1': {**LORA, 'teacher_model': 'student', 'beta': 1, 'micro_batch_size': 2, **FILLERS},
    'LoRA, shared base, top-k': {**LORA, 'teacher_model': 'student', 'gkd_logits_topk': 8},
    'LoRA, live student, privileged': {**LORA, 'teacher_model': None, 'dataset': 'privileged'},
    'LoRA, extrapolated, privileged, soft caps': {
        **{**LORA, **CAPPED, 'gkd_extrapolation': 1.5, 'beta': 1, 'dataset': 'privileged', 'micro_batch_size': 2}
    },
    'LoRA, extrapolated, unequal vocabularies': {**LORA, 'gkd_extrapolation': 0.4, 'teacher_model': 'wide', **FILLERS},
    'separate teacher, privileged, soft caps': {**CAPPED, 'dataset': 'privileged', 'micro_batch_size': 2},
    'MoE beta 0.5': MOE,
    'MoE beta 1, recomputed': {
        **MOE,
        'beta': 1,
        'gkd_logits_topk': 8,
        'micro_batch_size': 2,
        'recompute_granularity': 'full',
        'recompute_method': 'uniform',
        'recompute_num_layers': 1,
    },
    'MoE, unequal vocabularies': {'model': 'moe', 'teacher_model': 'wide', 'beta': 0, **FILLERS},
    'MoE, LoRA, shared base': {**MOE_BASE, 'beta': 0},
    'MoE, routing of the teacher, recomputed': {
        **MOE,
        'gkd_routing': 'teacher',
        'micro_batch_size': 2,
        'recompute_granularity': 'full',
        'recompute_method': 'uniform',
        'recompute_num_layers': 1,
    },
    'MoE, routing of the teacher, privileged': {**MOE, 'gkd_routing': 'teacher', 'dataset': 'privileged'},
    'MoE, balanced experts': {**MOE, 'moe_aux_loss_coeff': 1, 'padding_free': 'false'},
    'MoE, moving average': {
        'model': 'moe',
        'teacher_model': None,
        'gkd_self_teacher': 'ema',
        'gkd_ema_decay': 0.5,
        'sft_alpha': 0.5,
        **FILLERS,
    },
    'no teacher': {'gkd_loss_weight': 0, 'sft_alpha': 1},
}

# On eight ranks, by layout: few of them, for each costs eight times as much.
EIGHT_ROWS = {'global_batch_size': 8}
DENSE = {**EIGHT_ROWS, 'teacher_model': 'wide', 'micro_batch_size': 2, 'sft_alpha': 0.5, 'beta': 0}
BALANCED = {**EIGHT_ROWS, **MOE, **FILLERS, 'moe_aux_loss_coeff': 1, 'beta': 1}
ADAPTED = {**EIGHT_ROWS, **LORA, **FILLERS, 'teacher_model': 'student', 'gkd_logits_topk': 8}
IN_BF16 = {**EIGHT_ROWS, 'torch_dtype': 'bfloat16', 'bf16': 'true'}
LONE_TEACHER = {**EIGHT_ROWS, **FILLERS, 'teacher_model': 'eight'}
EIGHT: dict[str, dict[str, dict[str, Any]]] = {
    'TP2xPP2xDP2': {'8 dense': DENSE, '8 LoRA': ADAPTED, '8 bf16': IN_BF16},
    'TP2xPP2xCP2': {'8 privileged': {**EIGHT_ROWS, 'dataset': 'privileged', 'micro_batch_size': 2}, '8 MoE': BALANCED},
    'TP2xCP2xDP2': {'8 MoE': BALANCED, '8 LoRA': ADAPTED},
    'TP2xDP4, EP2xETP2xDP2': {'8 MoE': BALANCED},
    'TP2xPP2xVPP2xDP2, overlapped': {'8 single': {**DENSE, 'micro_batch_size': 1}, '8 MoE': BALANCED, '8 bf16': IN_BF16},
    'DP8, teacher TP8': {'8 teacher': LONE_TEACHER, '8 teacher, top-k': {**EIGHT_ROWS, 'teacher_model': 'eight', 'gkd_logits_topk': 8}},
}
CASES |= {name: case for cases in EIGHT.values() for name, case in cases.items()}

# Of a teacher on a server, by the layout that asks it. Between them these have every kind of parallelism.
SERVED = {'gkd_logits_topk': 8, 'gkd_temperature': 1, 'train_iters': 3, 'adam_eps': 1e-3}
SERVER_CASES: dict[str, dict[str, Any]] = {
    'PP2xVPP2': {**SERVED, **LORA, 'beta': 0},
    'TP2xCP2': {**SERVED, 'model': 'moe', 'beta': 1, 'micro_batch_size': 2},
    'DP2': {**SERVED, 'model': 'tied', 'dataset': 'ten'},
}

# megatron-core trains experts under tensor parallelism only with sequence parallelism.
DENSE_ONLY = ('TP2',)
# What only the vocabulary can tell from another case, which tensor parallelism alone splits.
OF_THE_VOCABULARY = ('dense beta 0', 'dense beta 1', 'top-k renormalised', 'LoRA beta 0')


def cases_of(layout: str) -> dict[str, dict[str, Any]]:
    """None for the layouts of four ranks, whose kinds of parallelism are there together in those of eight."""
    ranks = LAYOUTS[layout][0]
    if ranks == 1:
        return CASES
    if ranks > 2:
        return EIGHT.get(layout, {})
    chosen = {name: case for name, case in CASES.items() if not name.startswith('8 ')}
    if not layout.startswith('TP'):
        chosen = {name: case for name, case in chosen.items() if name not in OF_THE_VOCABULARY}
    if layout in DENSE_ONLY:
        chosen = {name: case for name, case in chosen.items() if case.get('model') != 'moe'}
    if layout == 'EP2':
        chosen = {name: case for name, case in chosen.items() if case.get('model') == 'moe'}
    return chosen


# The axes of a run, of which every pair is to be run.
AXES: dict[str, tuple[Any, ...]] = {
    'parallelism': ('TP', 'SP', 'PP', 'VPP', 'CP', 'EP', 'DP'),
    'model': ('dense', 'MoE'),
    'tuner': ('full', 'lora'),
    'beta': (0, 0.5, 1),
    'logits': ('all', 'top-k'),
    'vocabularies': ('equal', 'unequal'),
    'teacher': ('separate', 'shared base', 'server'),
    'rows': ('one', 'packed'),
    'step': ('full', 'fillers'),
}
IMPOSSIBLE = {
    frozenset({('tuner', 'full'), ('teacher', 'shared base')}),
    frozenset({('vocabularies', 'unequal'), ('teacher', 'shared base')}),
    frozenset({('logits', 'all'), ('teacher', 'server')}),
}


def values_of(case: Mapping[str, Any], layout: str, server: bool = False) -> set[tuple[str, Any]]:
    """(axis, value) of a case in a layout; several kinds of parallelism may come together."""
    ranks, split = LAYOUTS[layout]
    names = ('tensor_model', 'pipeline_model', 'virtual_pipeline_model', 'context', 'expert_model')
    sizes = dict(zip(('TP', 'PP', 'VPP', 'CP', 'EP'), (split.get(f'{name}_parallel_size', 1) for name in names), strict=True))
    kinds = {kind for kind, size in sizes.items() if size > 1}
    kinds |= {'SP'} if split.get('sequence_parallel') else set()
    kinds |= {'DP'} if ranks > sizes['TP'] * sizes['PP'] * sizes['CP'] else set()
    model, teacher = case.get('model', 'student'), case.get('teacher_model', 'teacher')
    by_name = {'server': server, 'shared base': teacher == model, 'separate': teacher is not None and case.get('gkd_loss_weight') != 0}
    packed = case.get('micro_batch_size', 1) > 1 and case.get('padding_free') != 'false'
    return {('parallelism', kind) for kind in kinds} | {
        ('model', 'MoE' if model == 'moe' else 'dense'),
        ('tuner', case.get('tuner_type', 'full')),
        ('beta', case.get('beta', 0.5)),
        ('logits', 'top-k' if 'gkd_logits_topk' in case else 'all'),
        ('vocabularies', 'unequal' if model == 'tied' or teacher == 'wide' else 'equal'),
        ('teacher', next((name for name, applies in by_name.items() if applies), 'other')),
        ('rows', 'packed' if packed else 'one'),
        ('step', 'fillers' if case.get('dataset') == 'ten' else 'full'),
    }


def make_datasets(train: Path, directory: Path) -> dict[str, Path]:
    lines = train.read_text().splitlines(True)
    ten = directory / 'ten.jsonl'
    ten.write_text(''.join(lines[:10]))
    rows = []
    for n in range(8):
        answer = ' '.join(f'{n} plus {i} is {n + i} .' for i in range(n % 3 + 1))
        messages = [{'role': 'user', 'content': f'what is {n} plus ?'}, {'role': 'assistant', 'content': answer}]
        rows.append({'messages': messages, 'teacher_prompt': f'what is {n} plus ? think of the numbers {" ".join(map(str, range(n + 4)))}'})
    return {'ten': ten, 'privileged': helpers.write_rows(directory / 'privileged.jsonl', rows)}


def _sequences(inputs: Mapping[str, Any], index: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, places of the predicting states) of each row of a micro-batch, packed or padded."""
    ids, found = inputs['input_ids'], []
    if len(ids) > 1:
        for number, row in enumerate(ids):
            here = index[index // ids.shape[1] == number]
            found.append((row[: inputs['seq_lens'][number]], here - number * ids.shape[1]))
        return found
    starts = [*(inputs['position_ids'][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    for first, last in itertools.pairwise(starts):
        here = index[(index >= first) & (index < last)]
        if len(here):
            found.append((ids[0, first:last], here - first))
    return found


def _routed(student: torch.nn.Module, teacher: torch.nn.Module, views: list[list]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both models, the student's with the teacher's experts, by the other back end's replay, row by row."""
    routing = RoutingReplay(student, teacher)
    ours, theirs = [], []
    for (ids, here), (other_ids, there) in zip(*views, strict=True):
        sees_more = None if len(ids) == len(other_ids) else {}
        with routing.recorded(SimpleNamespace(teacher_inputs=sees_more, student_index=here, teacher_index=there)):
            theirs.append(teacher(input_ids=other_ids[None]).logits[0, there])
        with routing.replayed():
            ours.append(student(input_ids=ids[None]).logits[0, here])
    return torch.cat(ours), torch.cat(theirs)


def _balance(model: torch.nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """The auxiliary loss of a micro-batch, summed over layers; that of transformers is one for all of them, and k times as large."""
    by_row = [model(input_ids=ids[None], output_router_logits=True).router_logits for ids in rows]
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    return sum(load_balancing_loss_func((torch.cat(layer),), experts, k) / k for layer in zip(*by_row, strict=True))


def capped(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, 'final_logit_softcapping', None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


class InHalves(TorchFunctionMode):
    """Each product of matrices is the sum of two, as on two tensor-parallel ranks: the same mathematics in another order."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not linear:
            return function(*args, **(kwargs or {}))
        (x, weight), half = args[:2], args[1].shape[1] // 2
        return linear(x[..., :half], weight[:, :half]) + linear(x[..., half:], weight[:, half:])


def plain(
    run: Run, case: Mapping[str, Any], models: Mapping[str, Path], dtype: torch.dtype = torch.float32
) -> tuple[float, dict[str, torch.Tensor]]:
    """The first step's loss and gradients by transformers: whole logits, textbook formulas, autograd. An adapter of a dense student has
    one A for what Megatron has in one matrix.

    The gradients have the auxiliary loss of each layer's router in them.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[case.get(key, default)], dtype=dtype, attn_implementation='eager')
        for key, default in (('model', 'student'), ('teacher_model', 'teacher'))
    )
    if 'adapters' in case:
        student = PeftModel.from_pretrained(student, models[case['adapters']], is_trainable=True)
    temperature, beta, by, columns = 0.9, case.get('beta', 0.5), case.get('gkd_extrapolation', 1), None
    if student.config.vocab_size != teacher.config.vocab_size:
        columns = len(AutoTokenizer.from_pretrained(models['student']))
    total, auxiliary, tokens = 0.0, 0.0, 0
    for batch in run.saved('batches'):
        labels, weights, imitated = batch['labels'], batch['weights'], batch['imitated']
        if not len(labels):
            continue
        views = [_sequences(batch['student_inputs'], batch['student_index'])]
        views.append(_sequences(batch['teacher_inputs'], batch['teacher_index']) if batch['teacher_inputs'] else views[0])
        if case.get('gkd_routing') == 'teacher':
            ours, theirs = _routed(student, teacher, views)
        else:
            ours, theirs = (
                capped(model, torch.cat([model(input_ids=ids[None]).logits[0, here].float() for ids, here in view]))
                for model, view in zip((student, teacher), views, strict=True)
            )
        s = log_softmax(ours[:, :columns] / temperature, -1)
        t = log_softmax(theirs[:, :columns] / temperature, -1).detach()
        if by != 1:
            with torch.no_grad(), student.disable_adapter():
                base = capped(student, torch.cat([student(input_ids=ids[None]).logits[0, here].float() for ids, here in views[0]]))
            t = log_softmax(by * t + (1 - by) * log_softmax(base[:, :columns] / temperature, -1), -1)
        if beta in (0, 1):
            value = (t.exp() * (t - s) if beta == 0 else s.exp() * (s - t)).sum(-1)
        else:
            mixture = torch.logaddexp(t + torch.tensor(beta).log(), s + torch.tensor(1 - beta).log())
            value = (beta * t.exp() * (t - mixture) + (1 - beta) * s.exp() * (s - mixture)).sum(-1)
        # The cross-entropy is over the ids that both have, too.
        value = value * weights + case.get('sft_alpha', 0) * weights * imitated * cross_entropy(ours[:, :columns], labels, reduction='none')
        total, tokens = total + value.sum(), tokens + len(labels)
        if 'moe_aux_loss_coeff' in case:
            auxiliary = auxiliary + case['moe_aux_loss_coeff'] * len(labels) * _balance(student, [ids for ids, _ in views[0]])
    loss = total / tokens
    (loss + auxiliary / tokens).backward()
    gradients = {name.replace('.default.', '.'): p.grad for name, p in student.named_parameters() if p.grad is not None}
    for first, *others in (('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj')):
        for name in [name for name in gradients if f'{first}.lora_A' in name]:
            names = [name, *(name.replace(first, other) for other in others)]
            gradients |= dict.fromkeys(names, sum(gradients[one] for one in names))
    for name in [name for name in gradients if '.experts.' in name]:  # all of a layer in one tensor, while files have them one by one
        for number, of_expert in enumerate(gradients.pop(name)):
            kinds = ('gate_proj', 'up_proj') if name.endswith('gate_up_proj') else ('down_proj',)
            for kind, part in zip(kinds, of_expert.chunk(len(kinds)), strict=True):
                gradients[f'{name.rpartition(".")[0]}.{number}.{kind}.weight'] = part
    return loss.item(), gradients


def compared(run: Run, other: Run) -> tuple[float, float]:
    """(largest difference of the losses, worst relative difference of a gradient)."""
    assert len(run.losses) == len(other.losses)
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)), relative(run.gradients, other.gradients)
