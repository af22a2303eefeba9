"""Whole steps of `swift rlhf --rlhf_type gkd`, where ms-swift is installed: a student of 0.6B, a teacher of 1.7B, random weights.

Each case is a command of its own, its first step left out of the seconds. `ms` is of one step, `extra_gb` what it allocates above
the weights at most: gradients, optimizer and activations with it.
"""

import statistics
import sys
from pathlib import Path

import torch
from worker import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks' / 'training'))
import step as steps

SHAPES = {
    'student': dict(hidden_size=1024, intermediate_size=3072),
    'teacher': dict(hidden_size=2048, intermediate_size=6144),
}
COMMON = dict(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
LORA = {'tuner_type': 'lora', 'target_modules': 'all-linear'}
WAYS = {
    'full': {'ours': {}, 'ms-swift': {}},
    'lora': {'ours': LORA, 'ms-swift': LORA},
    'shared base': {
        'ours': {**LORA, 'gkd_self_teacher': 'base', 'teacher_model': None, 'teacher_model_type': None},
        'ms-swift': {**LORA, 'teacher_model': 'student'},
    },
    'offloaded': {'ours': {'gkd_teacher_offload': 'model'}, 'ms-swift': {'offload_teacher_model': 'true'}},
    'offloaded by layers': {'ours': {'gkd_teacher_offload': 'layer'}},
}


def run(case: dict, meter):
    import swift  # noqa: F401

    directory = inputs(meter)
    changed = dict(WAYS[case['way']][case['who']])
    if changed.get('teacher_model'):
        changed['teacher_model'] = directory / changed['teacher_model']
    batch, words, number = (1, 20, 2) if meter.tiny else (4, 1000, 8)
    changed |= {'max_length': words + 100, 'gradient_checkpointing': str(not meter.tiny).lower()}
    command = [sys.executable, ROOT / 'benchmarks' / 'training' / 'rlhf.py']
    dtype = 'float32' if meter.tiny else 'bfloat16'
    try:
        found = steps.run(directory, case['who'], dtype, batch, number, meter.device.type, command, **changed)
    except RuntimeError as error:
        print(error)
        raise RuntimeError(' '.join(str(error).split())[-250:]) from None  # its last words
    ms = [1000 * step['seconds'] for step in found[1:]]
    row = {'what': f'{batch} rows of {words} tokens', 'ms': statistics.median(ms), 'ms_min': min(ms), 'repeats': len(ms)}
    row['extra_gb'] = max(step['above_weights_gb'] for step in found)
    yield row | {name: max(step[name] for step in found) for name in ('weights_gb', 'reserved_gb') if name in found[0]}


def inputs(meter) -> Path:
    """Made once a run."""
    directory = meter.scratch / 'training'
    if (directory / 'rows.jsonl').exists():  # the last thing that is written
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    if meter.tiny:
        steps.make_inputs(directory, {name: steps.small(32) for name in SHAPES}, words=20, vocab=2000)
    else:
        shapes = {name: shape | COMMON for name, shape in SHAPES.items()}
        steps.make_inputs(directory, shapes, words=1000, dtype=torch.bfloat16, device=meter.device)
    meter.fresh()
    return directory
