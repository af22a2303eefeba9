"""vLLM in the training processes."""

from __future__ import annotations

import helpers
import pytest
from engine_options import LORA, SHARES, STEP


@pytest.fixture(scope='module')
def runs(run_jobs, tmp_path_factory):
    in_flight = {**STEP, 'steps_per_generation': 2, 'max_steps': 5, 'save_strategy': 'steps', 'save_steps': 3, 'lmbda': 0.6}
    whole = tmp_path_factory.mktemp('whole')
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
            'whole': {**in_flight, 'output_dir': whole},
            'resumed': {**in_flight, 'resume_from_checkpoint': whole / 'checkpoint-3'},
        },
        env=helpers.one_rank(),
    )


@pytest.mark.parametrize('name', ['full', 'merged', 'adapter', 'sleep 1', 'sleep 2', 'two turns'])
def test_samples_come_from_the_new_weights(runs, name):
    calls = runs[name].ok().lines('engine-rank0.jsonl')
    assert [call['step'] for call in calls] == [0, 1, 2] and all(call['tokens'] > 0 for call in calls)
    assert max(call['error'] for call in calls) < 1e-4


@pytest.mark.parametrize('name', ['full', 'adapter'])
def test_old_weights_would_be_seen(runs, name):
    calls = runs[f'{name} without sync'].ok().lines('engine-rank0.jsonl')
    assert calls[0]['error'] < 1e-4 and all(call['error'] > 1 for call in calls[1:])


def test_every_response_is_written_with_its_divergence(runs):
    run = runs['full'].ok()
    assert [(line['step'], line['gen_step']) for line in run.completions] == [(step + 1, step) for step in range(3) for _ in range(3)]
    for step, logged in enumerate(run.values('divergence')):
        lines = [line for line in run.completions if line['step'] == step + 1]
        tokens = sum(line['length'] for line in lines)
        assert sum(line['divergence'] * line['length'] for line in lines) / tokens == pytest.approx(logged, rel=1e-5)
        assert {line['source'] for line in lines} == {'student'} and {line['finish_reason'] for line in lines} <= {'stop', 'length'}


def test_seconds_and_tokens(runs):
    run = runs['full'].ok()
    for i, call in enumerate(run.lines('engine-rank0.jsonl')):
        generation, sync, rate = (run.values(k)[i] for k in ('seconds/generation', 'seconds/weight_sync', 'generation/tokens_per_second'))
        # What a call needs beside the engine's own work is none of its speed.
        assert 0 < sync < generation and call['tokens'] / (generation - sync) <= rate


def test_a_scheduler_is_not_dropped(runs):
    run = runs['two turns'].ok()
    for call in run.lines('engine-rank0.jsonl'):
        assert call['turns'] == [2] * 3 and call['roles'] == [['user', 'assistant', 'user', 'assistant']] * 3
    # Two turns of at most 8 tokens each; what the template puts in front of a turn is not counted.
    assert all(8 < line['length'] <= 16 for line in run.completions)


def test_resumed_run_goes_on_as_if_nothing_had_happened(runs):
    whole, resumed = runs['whole'].ok(), runs['resumed'].ok()
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    # The cycle of steps 3 and 4 was in flight; it is not generated again.
    assert [call['step'] for call in whole.lines('engine-rank0.jsonl')] == [0, 2, 4]
    assert [call['step'] for call in resumed.lines('engine-rank0.jsonl')] == [4]
    text = [(line['step'], line['gen_step'], line['row'], line['completion']) for line in whole.completions if line['step'] > 3]
    assert [(line['step'], line['gen_step'], line['row'], line['completion']) for line in resumed.completions] == text


@pytest.fixture(scope='module', params=[1, 2])
def two_ranks(request, run_jobs):
    seed = helpers.seed_with_shares(SHARES, STEP['per_device_train_batch_size'], 0.5)
    parallel = {'max_steps': 4, 'lmbda': 0.5, 'seed': seed, 'train_dataloader_shuffle': 'false', 'vllm_tensor_parallel_size': request.param}
    turns = {'multi_turn_scheduler': 'ask_again', 'max_turns': 3, 'completion_length_limit_scope': 'total'}
    return run_jobs(
        {
            'full': {**STEP, **parallel},
            'adapter': {**LORA, **parallel, 'vllm_enable_lora': 'true', 'sleep_level': 1},
            'two turns': {**STEP, **parallel, **turns},
        },
        nproc=2,
    )


@pytest.mark.parametrize('name', ['full', 'adapter', 'two turns'])
def test_shares_may_be_empty(two_ranks, name):
    run = two_ranks[name].ok()
    calls = [run.lines(f'engine-rank{rank}.jsonl') for rank in (0, 1)]
    assert [[call['share'] for call in step] for step in zip(*calls, strict=True)] == [step for step in SHARES if any(step)]
    assert max(call['error'] for rank in calls for call in rank) < 1e-4
    assert run.values('source/student') == pytest.approx([sum(step) / 6 for step in SHARES]) and len(run.losses) == 4
    if name == 'two turns':
        assert all(set(call['turns']) <= {2} for rank in calls for call in rank)
