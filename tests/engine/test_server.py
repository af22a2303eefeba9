"""The student's engine on a server of ``swift rollout``."""

from __future__ import annotations

import json

import helpers
import pytest
from engine_options import LORA, SHARES, STEP


@pytest.fixture(scope='module')
def runs(run_jobs, servers, tiny_models, tmp_path_factory):
    rows = [{**json.loads(line), 'split': True} for line in tiny_models.train.read_text().splitlines()]
    split = helpers.write_rows(tmp_path_factory.mktemp('split') / 'split.jsonl', rows)

    def on(server: str, step: dict, **more) -> dict:
        return {**step, **servers[server].options, **more}

    return run_jobs(
        {
            'without sync': on('plain', STEP, callbacks='without_sync'),
            'full': on('plain', STEP),
            'merged': on('plain', LORA),
            'adapter': on('adapter', LORA),
            'two turns': on('two turns', STEP),
            'two turns by the trainer': on('plain', STEP, multi_turn_scheduler='ask_again', max_turns=3),
            'split': on('two turns', STEP, vllm_server_pass_dataset='true', dataset=split),
        },
        env=helpers.one_rank(),
    )


@pytest.mark.parametrize('name', ['full', 'merged', 'adapter', 'two turns', 'two turns by the trainer'])
def test_samples_come_from_the_new_weights(runs, name):
    calls = runs[name].ok().lines('engine-rank0.jsonl')
    assert [call['step'] for call in calls] == [0, 1, 2] and all(call['tokens'] > 0 for call in calls)
    assert max(call['error'] for call in calls) < 1e-4
    assert all(call['turns'] == [2 if 'two turns' in name else 1] * 3 for call in calls)


def test_old_weights_would_be_seen(runs):
    calls = runs['without sync'].ok().lines('engine-rank0.jsonl')
    assert calls[0]['error'] < 1e-4 and all(call['error'] > 1 for call in calls[1:])


def test_a_row_stays_one_sample(runs):
    assert 'OptionError' in runs['split'].error and 'it made 6 samples of 3' in runs['split'].error


@pytest.mark.parametrize('shardings', [('deepspeed', 'zero2', 'zero3'), ('fsdp', 'fsdp2')], ids=' '.join)
def test_a_sharded_student_sends_its_new_weights(run_jobs, servers, shardings):
    option, *names = shardings
    on = {name: {**servers['plain'].options, option: name} for name in names}
    jobs = {f'{name} {how}': {**step, **on[name]} for name in names for how, step in (('full', STEP), ('merged', LORA))}
    for run in run_jobs(jobs, nproc=2).values():
        for rank in (0, 1):
            calls = run.ok().lines(f'engine-rank{rank}.jsonl')
            assert [call['step'] for call in calls] == [0, 1, 2] and max(call['error'] for call in calls) < 1e-4


@pytest.fixture(scope='module')
def two_ranks(run_jobs, servers):
    seed = helpers.seed_with_shares(SHARES, STEP['per_device_train_batch_size'], 0.5)
    parallel = {**STEP, 'max_steps': 4, 'lmbda': 0.5, 'seed': seed, 'train_dataloader_shuffle': 'false'}
    return run_jobs({name: {**parallel, **servers[name].options} for name in ('plain', 'two turns')}, nproc=2)


@pytest.mark.parametrize('name', ['plain', 'two turns'])
def test_shares_may_be_empty(two_ranks, name):
    run = two_ranks[name].ok()
    calls = [run.lines(f'engine-rank{rank}.jsonl') for rank in (0, 1)]
    assert [[call['share'] for call in step] for step in zip(*calls, strict=True)] == [step for step in SHARES if any(step)]
    assert max(call['error'] for rank in calls for call in rank) < 1e-4 and len(run.losses) == 4
