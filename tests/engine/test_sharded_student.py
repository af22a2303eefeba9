"""Students whose weights, gradients or optimizer are spread over two ranks, and vLLM beside them: it samples from the new weights."""

from __future__ import annotations

import pytest
from engine_options import LORA, STEP

# FSDP2 gathers the student for the comparison, a collective call: every rank has answers in every step.
ADAPTER = {**LORA, 'vllm_enable_lora': 'true'}
DEEPSPEED = {
    'zero2 full': {**STEP, 'deepspeed': 'zero2'},
    'zero3 full': {**STEP, 'deepspeed': 'zero3'},
    'zero3 merged': {**LORA, 'deepspeed': 'zero3', 'move_model_batches': 2},
    'zero3 adapter': {**ADAPTER, 'deepspeed': 'zero3'},
}
FSDP = {
    'fsdp2 full': {**STEP, 'fsdp': 'fsdp2'},
    'fsdp2 merged': {**LORA, 'fsdp': 'fsdp2'},
    'fsdp2 adapter': {**ADAPTER, 'fsdp': 'fsdp2'},
}


@pytest.fixture(scope='module')
def deepspeed(run_jobs):
    return run_jobs(DEEPSPEED, nproc=2)


@pytest.fixture(scope='module')
def fsdp(run_jobs):
    return run_jobs(FSDP, nproc=2)


@pytest.mark.parametrize('name', [*DEEPSPEED, *FSDP])
def test_samples_come_from_the_new_weights(request, name):
    run = request.getfixturevalue('deepspeed' if name in DEEPSPEED else 'fsdp')[name].ok()
    for rank in (0, 1):
        calls = run.lines(f'engine-rank{rank}.jsonl')
        assert [call['step'] for call in calls] == [0, 1, 2] and all(call['tokens'] > 0 for call in calls)
        assert max(call['error'] for call in calls) < 1e-4
