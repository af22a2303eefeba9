"""vLLM in the training processes."""

from __future__ import annotations

import helpers
import pytest

# Large steps: an engine with old weights is off by far more than a comparison allows.
STEP = {
    'tuner_type': 'full',
    'max_steps': 3,
    'gradient_accumulation_steps': 1,
    'learning_rate': 1e-2,
    'per_device_train_batch_size': 3,
    'lmbda': 1,
    'temperature': 1,
    'top_p': 1,
    'top_k': -1,
    'log_completions': 'true',
    'use_vllm': 'true',
    'vllm_mode': 'colocate',
    'vllm_max_model_len': 256,
    'vllm_enforce_eager': 'true',
    'vllm_gpu_memory_utilization': 0.3,
    'ddp_backend': 'gloo',
}
LORA = {**STEP, 'tuner_type': 'lora', 'lora_rank': 8, 'learning_rate': 0.1}


@pytest.fixture(scope='module')
def runs(run_jobs):
    return run_jobs(
        {
            'full': STEP,
            'full without sync': {**STEP, 'callbacks': 'without_sync'},
            'merged': LORA,
            'adapter': {**LORA, 'vllm_enable_lora': 'true'},
            'adapter without sync': {**LORA, 'vllm_enable_lora': 'true', 'callbacks': 'without_sync'},
            'sleep 1': {**STEP, 'sleep_level': 1, 'offload_model': 'true', 'offload_optimizer': 'true'},
            'sleep 2': {**LORA, 'vllm_enable_lora': 'true', 'sleep_level': 2, 'move_model_batches': 2},
            'two turns': {**STEP, 'multi_turn_scheduler': 'ask_again', 'max_turns': 3},
        },
        env=helpers.one_rank(),
    )


@pytest.mark.parametrize('name', ['full', 'merged', 'adapter', 'sleep 1', 'sleep 2', 'two turns'])
def test_samples_come_from_the_new_weights(runs, name):
    calls = runs[name].ok().lines('engine-rank0.jsonl')
    assert [call['step'] for call in calls] == [0, 1, 2] and all(call['tokens'] > 0 for call in calls)
    assert max(call['error'] for call in calls) < 1e-4
