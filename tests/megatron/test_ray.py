"""``megatron rlhf --use_ray`` on the real Ray: two nodes on the loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import runs
import yaml
from models import QUICK, make_models
from runs import CPU

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))
from engine_options import ENGINE
from rollout_server import ENVIRONMENT

RAY = Path(sys.prefix) / 'ray'
HERE = Path(__file__).parent
ENGINE_ON_CPU = HERE.parent / 'engine' / 'vllm_on_cpu.py'
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not RAY.is_dir(), reason=f'there is no Ray in {RAY}; scripts/setup.sh installs it'),
]

ON_POLICY = {'train_iters': 4, 'lmbda': 0.5, 'max_completion_length': 6, 'save_steps': 2, 'no_save_optim': 'false'}


@pytest.fixture(scope='module')
def ray_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Variables of a process that uses the cluster."""
    env = {**CPU, 'PYTHONPATH': os.pathsep.join([CPU['PYTHONPATH'], str(RAY), str(HERE)])}  # of HERE, fake_server.py
    env |= {'PATH': f'{helpers.SCRIPTS}{os.pathsep}{os.environ["PATH"]}', 'RAY_USAGE_STATS_ENABLED': '0'}
    env['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'  # Ray's switch for staying on the loopback
    env |= {'ALSO_AT_START': str(HERE / 'ray_without_plugin.py'), 'WITHOUT_PLUGIN': str(tmp_path_factory.mktemp('ray') / 'none')}
    devices = {name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'}  # Ray counts what is in there
    nodes = subprocess.Popen(
        [sys.executable, HERE / 'ray_nodes.py'], env={**devices, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = next(line for line in nodes.stdout if line.startswith('127.0.0.1:'))
        yield {**env, 'RAY_ADDRESS': address.strip()}
    finally:
        nodes.stdin.close()
        nodes.wait(60)


def run_file(content: Mapping[str, Any], directory: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """``megatron rlhf --use_ray`` on a file with these options, groups among them."""
    options = {name: value for name, value in QUICK.items() if name != 'report_to'} | dict(content)
    (directory / 'ray.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(options, default=str))))
    argv = [*helpers.script('_megatron/rlhf'), '--use_ray', 'true', '--config', 'ray.yaml']
    return helpers.run(argv, env=env, cwd=directory, timeout=600)


def logged(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / 'logging.jsonl').read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def test_a_resumed_run_on_two_nodes(ray_environment, run_jobs, models, tiny_models, tmp_path):
    """Half of the samples are answered by the student. The first two steps are run without Ray, as torchrun would run them."""
    reference = run_jobs({'run': {**ON_POLICY, 'save': True, 'output_dir': tmp_path / 'reference'}}, 'DP2')['run'].ok()
    assert len(reference.losses) == 4
    options = {'model': models['student'], 'teacher_model': models['teacher'], 'teacher_model_type': 'qwen3', 'dataset': tiny_models.train}
    resumed = {'mcore_model': tmp_path / 'reference' / 'checkpoint-2', 'finetune': False}
    # The output is relative to where the command is given.
    groups = {'nnodes': 2, 'train': {'gpus': 2, 'output_dir': 'out'}}
    returncode, output = run_file({**ON_POLICY, **options, **resumed, **groups}, tmp_path, ray_environment)
    assert returncode == 0, output[-6000:]
    assert '2 ranks on 2 Ray nodes' in output
    assert 'swift_gkd_plugin.megatron.trainer.GKDTrainer of swift-gkd-plugin' in output
    rows = logged(tmp_path / 'out')
    assert [row['loss'] for row in rows] == pytest.approx(reference.losses[2:], abs=1e-6)
    assert [row['source/student'] for row in rows] == reference.values('source/student')[2:]
    assert any(0 < row['source/student'] < 1 for row in rows)
    assert (tmp_path / 'out' / 'checkpoint-4').is_dir()


@pytest.mark.vllm
@pytest.mark.skipif(helpers.why_no_vllm() is not None, reason=str(helpers.why_no_vllm()))
def test_engines_on_gpus_of_their_own(ray_environment, tiny_models, tmp_path_factory, tmp_path):
    """Greedy answers, so that the student's engine, with the weights of each step, says what megatron-core says; and the teacher's says of
    them what a copy of it in the training process says."""
    models = make_models(tmp_path_factory.mktemp('engine_models'), tiny_models, head_dim=32)  # vLLM's attention on a CPU has no 16
    options = {**ON_POLICY, 'train_iters': 3, 'save_steps': 1000, 'lr': 1e-2, 'temperature': 0, 'gkd_temperature': 1, 'gkd_logits_topk': 20}
    reference = runs.run_jobs({'run': options}, '1', tmp_path, models, tiny_models.train)['run'].ok()
    assert 0 < sum(reference.values('source/student')) < 3
    groups = {
        'train': {'gpus': 1, 'output_dir': 'out'},
        'rollout': {'gpus': 1, **ENGINE},
        'teacher': {'gpus': 1, 'model': models['teacher'], 'model_type': 'qwen3', **ENGINE},
        'external_plugins': [ENGINE_ON_CPU],
    }
    # Only the workers of this job have it: ms-swift imports a vLLM that it finds.
    with_vllm = {**ENVIRONMENT, 'PYTHONPATH': os.pathsep.join([ray_environment['PYTHONPATH'], ENVIRONMENT['PYTHONPATH']])}
    env = {**ray_environment, 'RAY_JOB_CONFIG_JSON_ENV_VAR': json.dumps({'runtime_env': {'env_vars': with_vllm}})}
    returncode, output = run_file({**options, 'model': models['student'], 'dataset': tiny_models.train, **groups}, tmp_path, env)
    assert returncode == 0, output[-6000:]
    assert [row['loss'] for row in logged(tmp_path / 'out')] == pytest.approx(reference.losses, rel=1e-5)
    assert [row['source/student'] for row in logged(tmp_path / 'out')] == reference.values('source/student')
    assert sorted(log.stem.split('-', 2)[2] for log in (tmp_path / 'out' / 'engines').iterdir()) == ['rollout-0', 'teacher-0']
    commands = [path.read_bytes() for path in Path('/proc').glob('[0-9]*/cmdline')]
    assert not [line for line in commands if str(models['student']).encode() in line or str(models['teacher']).encode() in line]


ONE = {'nnodes': 1, 'gkd_logits_topk': 8}
REFUSED = {
    'no gpus': ({'train': {}}, 'train.gpus 0'),
    'options of nobody': ({'rollout': {'vllm_max_model_len': 99}}, 'rollout.vllm_max_model_len: the group rollout has no gpus'),
    'too many': ({'train': {'gpus': 8}}, 'train.gpus 8 on nnodes 2: needs 2 x 4 GPUs with 4 CPUs'),
    'too many together': (
        {'rollout': {'gpus': 4}},
        'train.gpus 2, rollout.gpus 4 on nnodes 2: needs 2 x 2 GPUs with 2 CPUs, 2 x 1 GPUs with 1 CPUs, each of them on one node',
    ),
    'not the engine': (
        {'rollout': {'gpus': 2, 'lr': 1}, 'colocate_groups': [['train', 'rollout']]},
        'rollout.lr: not an option of the engine',
    ),
    'not the server': ({'rollout': {'gpus': 2, 'lr': 1}}, 'rollout.lr: not an option of swift rollout'),
    'a port': ({'teacher': {'gpus': 2, 'port': 1}, **ONE}, 'teacher.port: the plugin gives it'),
    'not at once': ({'rollout': {'gpus': 2}, 'vllm_mode': 'colocate'}, 'rollout.gpus 2 with vllm_mode colocate'),
    'two servers': ({'rollout': {'gpus': 2}, 'vllm_server_host': ['a']}, "rollout.gpus 2 and vllm_server_host ['a']"),
    'unequal': ({'rollout': {'gpus': 3}}, 'rollout.gpus 3 on nnodes 2: a group has as many GPUs on each'),
    'two nodes': (
        {'rollout': {'gpus': 2, 'vllm_tensor_parallel_size': 2}},
        'rollout.gpus 2 on nnodes 2: an engine has vllm_tensor_parallel_size 2 GPUs of one node, and each node has 1 for this group',
    ),
    'no k': ({'teacher': {'gpus': 2, 'model': 'teacher'}}, 'teacher.gpus 2 without gkd_logits_topk'),
    'two teachers': ({'teacher': {'gpus': 2, 'model': 'one'}, 'teacher_model': 'two', **ONE}, 'teacher.model one and teacher_model two'),
    'no model': ({'rollout': {'gpus': 2}, 'model': None}, 'rollout.gpus 2 without a model'),
}
# What the ranks do, what is beside them, the error, and how many processes there were at least.
FAILURES = {
    'one refuses': (['waits', 'refuses'], {}, ['OptionError', '--lmbda 2: too much.'], 2),
    # The one who waited for it is heard first.
    'one dies': (['raises', 'dies'], {}, ['ActorDiedError', 'died'], 2),
    'one raises': (['raises', 'waits'], {}, ['RayTaskError(ValueError)', 'something else'], 2),
    'an engine fails': (
        ['waits'],
        {'rollout': {'gpus': 1, 'model': 'fails'}},
        ['OptionError', 'The rollout engine 0 on 127.0.0.1 did not start: ValueError: no such model; exit status 1 (its output is in '],
        1,
    ),
    'an engine ends': (
        ['waits'],
        {'rollout': {'gpus': 1, 'model': 'ends'}},
        ['OptionError', 'The rollout engine 0 on 127.0.0.1 has ended: exit status -9 (its output is in '],
        1,  # perhaps before the rank has begun
    ),
    # The ranks end by themselves.
    'a teacher ends': (
        ['asks'],
        {'rollout': {'gpus': 1, 'model': 'answers'}, 'teacher': {'gpus': 1, 'model': 'ends'}},
        ['OptionError', 'The teacher engine 0 on 127.0.0.1 has ended: exit status -9 (its output is in '],
        3,
    ),
}
# Stock's examples/ray/gkd, both groups alone.
GROUPS = {
    **ONE,
    'template': 'qwen3',
    'torch_dtype': 'bfloat16',
    'max_length': 64,
    'truncation_strategy': 'left',
    'vllm_max_model_len': 99,
    'use_vllm': True,
    'offload_model': True,
    'train': {'gpus': 2, 'tuner_type': 'lora', 'tensor_model_parallel_size': 2},
    'rollout': {'gpus': 4, 'vllm_tensor_parallel_size': 2, 'vllm_gpu_memory_utilization': 0.8},
    'teacher': {'gpus': 2, 'model': 'large', 'vllm_max_model_len': 100, 'vllm_engine_kwargs': {'max_logprobs': 64, 'seed': 1}},
}


def test_what_ends_a_run(ray_environment, tmp_path):
    """In one process, since each has to import ms-swift."""
    cases = {name: {'yaml': groups} for name, (groups, _) in REFUSED.items()}
    for name, (ranks, beside, _, _) in FAILURES.items():
        groups = {**ONE, 'train': {'gpus': 1, 'ranks': ranks}, **beside} if beside else {}
        cases[name] = {'ranks': ranks, 'yaml': groups}
    cases |= {'not installed': {'without_plugin': True}, 'groups': {'options': True, 'yaml': GROUPS}}
    (tmp_path / 'cases.json').write_text(json.dumps(cases))
    begin = time.monotonic()
    argv = [sys.executable, HERE / 'ray_failures.py', 'cases.json']
    returncode, output = helpers.run(argv, env=ray_environment, cwd=tmp_path, timeout=500)
    assert returncode == 0, output[-6000:]
    found = json.loads((tmp_path / 'cases.json').read_text())
    for name, (_, line) in REFUSED.items():
        kind, text = found[name]['error']
        assert kind == 'OptionError' and text.startswith(line) and not found[name]['pids'], (name, text)
    for name, (_, _, (kind, text), processes) in FAILURES.items():
        assert found[name]['error'][0] == kind and text in found[name]['error'][1], found[name]
        assert len(found[name]['pids']) >= processes, name
        for pid in found[name]['pids']:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                pytest.fail(f'{name}: process {pid} is still there')
    kind, text = found['not installed']['error']
    assert (kind, text) == ('OptionError', '--use_ray: swift-gkd-plugin is not installed on 127.0.0.1; install it on every node.')
    check_options(found['groups']['options'])
    assert time.monotonic() - begin < 500  # a rank that waits does so for 10 minutes


def check_options(options: Mapping[str, Any]) -> None:
    rank, student, teacher = (options[name] for name in ('train', 'rollout', 'teacher'))
    assert (rank['use_vllm'], rank['vllm_mode'], rank['tuner_type'], rank['model']) == (True, 'server', 'lora', 'student')
    assert 'teacher_model' not in rank and 'vllm_gpu_memory_utilization' not in rank
    assert (student['command'], student['size'], student['engines']) == ('swift.cli.rollout', 2, 2)
    both = {'template': 'qwen3', 'torch_dtype': 'bfloat16'}
    cut = {'truncation_strategy': 'left', 'max_length': 64}
    own = {'vllm_tensor_parallel_size': 2, 'vllm_gpu_memory_utilization': 0.8, 'vllm_max_model_len': 99}
    assert student['options'] == {'model': 'student', **both, **cut, **own}
    assert (teacher['command'], teacher['size'], teacher['engines']) == ('swift.cli.deploy', 1, 2)
    own = {'vllm_max_model_len': 100, 'vllm_engine_kwargs': {'seed': 1}, 'max_logprobs': 64, 'infer_backend': 'vllm'}
    assert teacher['options'] == {'model': 'large', **both, **own}
