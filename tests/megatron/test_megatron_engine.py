"""The student answers through the real vLLM, in the training processes and on a server, with the weights of now."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import helpers
import pytest
import runs
from cases import make_datasets
from models import make_models
from runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))
from engine_options import ENGINE
from rollout_server import ENVIRONMENT, MODULES, RolloutServer

WHY_NO_VLLM = helpers.why_no_vllm()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.megatron,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NO_VLLM is not None, reason=str(WHY_NO_VLLM)),
]

# Large steps: an engine with old weights is off by far more than a comparison allows. 3 samples a step, which no two ranks can halve.
STEP = {
    'train_iters': 3,
    'global_batch_size': 3,
    'lr': 1e-2,
    'lmbda': 1,
    'temperature': 1,
    'top_p': 1,
    'top_k': -1,
    'max_completion_length': 6,
    'use_vllm': 'true',
    'vllm_mode': 'colocate',
    'offload_bridge': 'false',
    **ENGINE,
}
ADAPTER = {**STEP, 'tuner_type': 'lora', 'target_modules': 'all-linear', 'lora_rank': 8, 'lora_alpha': 16, 'lr': 0.1}
PART = {**STEP, 'dataset': 'ten', 'global_batch_size': 4, 'lmbda': 0.4, 'train_iters': 4, 'gkd_num_samples': 2}
AHEAD = {
    **STEP,
    'temperature': 0,
    'gkd_temperature': 1,
    'train_iters': 4,
    'gkd_prefetch': 'true',
    'log_completions': 'true',
}
FROZEN = {**AHEAD, **PART, 'temperature': 0, 'gkd_prefetch': 'false', 'gkd_num_samples': 1, 'lr': 0}
SHARDED = {'use_distributed_optimizer': 'true', 'overlap_grad_reduce': 'true', 'overlap_param_gather': 'true'}


@pytest.fixture(scope='module')
def engine_models(tmp_path_factory, tiny_models) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp('engine_models'), tiny_models, head_dim=32)  # vLLM's attention on a CPU has no 16


@pytest.fixture(scope='module')
def run_here(tmp_path_factory, engine_models, tiny_models):
    cpu = f'{runs.CPU["PYTHONPATH"]}{os.pathsep}{ENVIRONMENT["PYTHONPATH"]}'

    def run(jobs: runs.Jobs, layout: str) -> dict[str, Run]:
        root = tmp_path_factory.mktemp('engine')
        data = make_datasets(tiny_models.train, root)
        jobs = {name: {k: data[v] if k.endswith('dataset') else v for k, v in job.items()} for name, job in jobs.items()}
        environment = {**ENVIRONMENT, 'PYTHONPATH': cpu}
        return runs.run_jobs(jobs, layout, root, engine_models, tiny_models.train, env=environment, timeout=300, modules=MODULES)

    return run


def calls(run: Run) -> list[list[dict]]:
    """What the engine was asked, by rank."""
    paths = sorted(run.output_dir.glob('engine-rank*.jsonl'))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def check(run: Run, steps: list[int]) -> None:
    for rank in calls(run.ok()):
        assert [call['step'] for call in rank] == steps
        assert max(call['error'] for call in rank) < 1e-4


def steps_that_sample(run: Run) -> list[int]:
    """The engine sleeps in the others."""
    return [step for step, share in enumerate(run.ok().values('source/student')) if share]


def check_old_weights(run: Run) -> None:
    """What the comparison says of an engine that keeps the weights it was built with."""
    errors = [max(call['error'] for call in step) for step in zip(*calls(run.ok()), strict=True)]
    assert errors[0] < 1e-4 and min(errors[1:]) > 0.1


def test_samples_come_from_the_new_weights(run_here):
    adapter = {**ADAPTER, 'vllm_enable_lora': 'true'}
    evaluated = {**STEP, 'lmbda': 0, 'val_dataset': 'ten', 'eval_steps': 3, 'gkd_eval_source': 'student'}
    turns = {**STEP, 'multi_turn_scheduler': 'ask_again', 'max_turns': 3}
    jobs = {
        'full': STEP,
        'turns': turns,
        'merged': ADAPTER,
        'adapter': adapter,
        'without sync': STEP,
        'adapter without sync': adapter,
        'eval': evaluated,
    }
    found = run_here(jobs, '1')
    assert found['eval'].ok().values('eval_loss')[0] > 0
    check(found['eval'], [3, 3, 3, 3])  # in training the student answers nothing
    for name in ('full', 'turns', 'merged', 'adapter'):
        check(found[name], [0, 1, 2])
        turns = 2 if name == 'turns' else 1
        assert all(call['share'] == 3 and 0 < call['tokens'] <= turns * 18 for call in calls(found[name])[0])
    assert max(call['tokens'] for call in calls(found['turns'])[0]) > 18
    for name in ('without sync', 'adapter without sync'):
        check_old_weights(found[name])


@pytest.mark.parametrize(('layout', 'more'), [('TP2', {}), ('PP2', {}), ('CP2', {}), ('DP2', {**SHARDED, 'global_batch_size': 2})])
def test_ranks_share_the_samples_out(run_here, layout, more):
    """Those of some rows, and of all."""
    found = run_here({'part': {**PART, **more}, 'merged': {**ADAPTER, **more}}, layout)
    check(found['merged'], [0, 1, 2])
    check(found['part'], steps_that_sample(found['part']))
    shares = [call['share'] for rank in calls(found['part']) for call in rank]
    assert 0 < sum(shares) < 4 * len(shares)


@pytest.fixture(scope='module')
def served(run_here, engine_models, tiny_models, tmp_path_factory) -> dict[str, Run]:
    """With a server of ``swift rollout``."""
    root = tmp_path_factory.mktemp('served')
    models = helpers.TinyModels(engine_models['student'], engine_models['teacher'], tiny_models.train, tiny_models.val)
    jobs = {
        'without sync': STEP,
        'full': STEP,
        'part': PART,
        'merged': ADAPTER,
        'frozen': FROZEN,
        'frozen, ahead': {**FROZEN, 'gkd_prefetch': 'true', 'val_dataset': 'privileged', 'eval_steps': 2, 'gkd_eval_source': 'student'},
        'ahead': AHEAD,
    }
    server = RolloutServer(models, {}, root / 'rollout.log')
    try:
        server.wait()
        return run_here({name: {**job, **server.options} for name, job in jobs.items()}, 'TP2xPP2')
    finally:
        server.stop()


def test_server(served):
    check(served['full'], [0, 1, 2])
    check(served['merged'], [0, 1, 2])
    check(served['part'], steps_that_sample(served['part']))
    check_old_weights(served['without sync'])


def test_one_step_ahead(served):
    """Where the weights stay, it is the same training, with evaluations in between too; where they move, the responses are one update
    old."""
    frozen = served['frozen'].ok(), served['frozen, ahead'].ok()
    assert frozen[1].losses == pytest.approx(frozen[0].losses, rel=1e-5) and len(frozen[0].losses) == 4
    assert 0 < sum(frozen[0].values('source/student')) < 4
    first, second = frozen[1].values('eval_loss')
    assert first == pytest.approx(second, rel=1e-5) and first > 0

    def ages(run: Run) -> set[tuple[int, int]]:
        lines = map(json.loads, (run.output_dir / 'completions.jsonl').read_text().splitlines())
        return {(line['step'], line['step'] - 1 - line['gen_step']) for line in lines}

    assert ages(served['ahead'].ok()) == {(1, 0), (2, 1), (3, 1), (4, 1)}
    assert {age for step, age in ages(frozen[0])} == {0}
    assert {age for step, age in ages(frozen[1]) if step > 1} == {1}  # beyond the end of an epoch too
