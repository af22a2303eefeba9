"""``megatron rlhf --use_ray`` on the real Ray: two nodes on the loopback, a rank on each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest
import yaml
from models import QUICK
from runs import CPU

RAY = Path(sys.prefix) / 'ray'
HERE = Path(__file__).parent
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
    env = {**CPU, 'PYTHONPATH': f'{CPU["PYTHONPATH"]}{os.pathsep}{RAY}'}
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


def test_a_resumed_run_on_two_nodes(ray_environment, run_jobs, models, tiny_models, tmp_path):
    """Half of the samples are answered by the student. The first two steps are run without Ray, as torchrun would run them."""
    reference = run_jobs({'run': {**ON_POLICY, 'save': True, 'output_dir': tmp_path / 'reference'}}, 'DP2')['run'].ok()
    assert len(reference.losses) == 4
    options = {name: value for name, value in QUICK.items() if name != 'report_to'} | ON_POLICY
    options |= {'model': models['student'], 'teacher_model': models['teacher'], 'teacher_model_type': 'qwen3', 'dataset': tiny_models.train}
    options |= {'mcore_model': tmp_path / 'reference' / 'checkpoint-2', 'finetune': False}
    text = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    # The output is relative to where the command is given.
    (tmp_path / 'ray.yaml').write_text(yaml.safe_dump({**text, 'nnodes': 2, 'train': {'gpus': 2, 'output_dir': 'out'}}))
    argv = [sys.executable, '-m', 'swift.cli._megatron.main', 'rlhf', '--use_ray', 'true', '--config', 'ray.yaml']
    returncode, output = helpers.run(argv, env=ray_environment, cwd=tmp_path, timeout=600)
    assert returncode == 0, output[-6000:]
    assert '2 ranks on 2 Ray nodes' in output
    assert 'swift_gkd_plugin.megatron.trainer.GKDTrainer of swift-gkd-plugin' in output
    logs = [json.loads(line) for line in (tmp_path / 'out' / 'logging.jsonl').read_text().splitlines()]
    rows = [row for row in logs if 'loss' in row]
    assert [row['loss'] for row in rows] == pytest.approx(reference.losses[2:], abs=1e-6)
    assert [row['source/student'] for row in rows] == reference.values('source/student')[2:]
    assert any(0 < row['source/student'] < 1 for row in rows)
    assert (tmp_path / 'out' / 'checkpoint-4').is_dir()


REFUSED = {
    'no gpus': ({'train': {}}, 'train.gpus 0'),
    'teacher': ({'teacher': {'gpus': 2, 'model': 'teacher'}}, 'teacher.gpus 2: there are no workers for the teacher alone'),
    'rollout': ({'rollout': {'gpus': 2}}, 'rollout.gpus 2: there are no workers for the rollout alone'),
    'options of nobody': ({'rollout': {'vllm_max_model_len': 99}}, 'rollout.vllm_max_model_len: the group rollout has no gpus'),
    'too many': ({'train': {'gpus': 4}}, 'train.gpus 4 on nnodes 2: each node needs 2 GPUs and 2 CPUs'),
    'not the engine': (
        {'rollout': {'gpus': 2, 'lr': 1}, 'colocate_groups': [['train', 'rollout']]},
        'rollout.lr: not an option of the engine',
    ),
}
FAILURES = {
    'one refuses': (['waits', 'refuses'], ['OptionError', '--lmbda 2: too much.']),
    # The one who waited for it is heard first.
    'one dies': (['raises', 'dies'], ['ActorDiedError', 'died']),
    'one raises': (['raises', 'waits'], ['RayTaskError(ValueError)', 'something else']),
}


def test_what_ends_a_run(ray_environment, tmp_path):
    """In one process, since each has to import ms-swift."""
    cases = {name: {'yaml': groups} for name, (groups, _) in REFUSED.items()} | {n: {'ranks': r} for n, (r, _) in FAILURES.items()}
    cases['not installed'] = {'without_plugin': True}
    (tmp_path / 'cases.json').write_text(json.dumps(cases))
    begin = time.monotonic()
    returncode, output = helpers.run([sys.executable, HERE / 'ray_failures.py', 'cases.json'], env=ray_environment, cwd=tmp_path)
    assert returncode == 0, output[-6000:]
    found = json.loads((tmp_path / 'cases.json').read_text())
    for name, (_, line) in REFUSED.items():
        kind, text = found[name]['error']
        assert kind == 'OptionError' and text.startswith(line) and not found[name]['pids'], name
    for name, (_, (kind, text)) in FAILURES.items():
        assert found[name]['error'][0] == kind and text in found[name]['error'][1], found[name]
        assert len(found[name]['pids']) == 2
        for pid in found[name]['pids']:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                pytest.fail(f'{name}: rank {pid} is still there')
    kind, text = found['not installed']['error']
    assert (kind, text) == ('OptionError', '--use_ray: swift-gkd-plugin is not installed on 127.0.0.1; install it on every node.')
    assert time.monotonic() - begin < 200  # a rank that waits does so for 10 minutes
