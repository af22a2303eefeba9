"""Options that the tests of both modes share."""

from __future__ import annotations

import helpers

# Of an engine, colocated or in a server.
ENGINE = {
    'vllm_max_model_len': 256,
    'vllm_enforce_eager': 'true',
    'vllm_gpu_memory_utilization': 0.3,
    'vllm_engine_kwargs': helpers.VLLM_ENGINE_KWARGS,
}
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
    'ddp_backend': 'gloo',
    **ENGINE,
}
LORA = {**STEP, 'tuner_type': 'lora', 'lora_rank': 8, 'learning_rate': 0.1}


# Samples of the student, by step and rank: none on one rank, none on the other, none at all, some on both.
SHARES = [[3, 0], [0, 3], [0, 0], [2, 1]]
