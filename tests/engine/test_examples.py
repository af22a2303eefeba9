"""The example scripts with vLLM, on tiny models: what follows on their command line wins over what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import commands
import helpers
import pytest
import starts
from engine_options import ENGINE
from rollout_server import ENVIRONMENT, HERE, MODULES, RolloutServer

EXAMPLES = HERE.parents[1] / 'examples'


def small(models: helpers.TinyModels, output_dir: Path) -> list[str]:
    return helpers.command_line(
        {
            **helpers.QUICK,
            **models.with_teacher,
            **{name: value for name, value in ENGINE.items() if name != 'vllm_gpu_memory_utilization'},
            'fp16': 'false',
            'max_steps': 2,
            'gradient_accumulation_steps': 1,
            'output_dir': output_dir,
            'external_plugins': HERE / 'vllm_on_cpu.py',
        }
    )


@pytest.fixture(scope='module')
def path() -> Iterator[str]:
    with commands.launchers((*MODULES, *starts.MODULES), {**starts.ENVIRONMENT, **ENVIRONMENT}) as directory:
        yield f'{directory}{os.pathsep}{os.environ["PATH"]}'


@pytest.fixture(scope='module')
def server(tiny_models, tmp_path_factory, path) -> Iterator[RolloutServer]:
    log = tmp_path_factory.mktemp('server') / 'server.log'
    started = RolloutServer(tiny_models, {}, log, [EXAMPLES / 'vllm_server.sh', 'rollout'], {'PATH': path})
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.mark.parametrize('example', ['vllm_colocate', 'vllm_server', 'vllm_prefetch'])
def test_example(request, tiny_models, tmp_path, path, example):
    variables = {'PATH': path}
    script, argv = EXAMPLES / f'{example}.sh', small(tiny_models, tmp_path)
    if example == 'vllm_colocate':
        argv += ['--ddp_backend', 'gloo']
    else:
        variables['PORT'] = str(request.getfixturevalue('server').port)
        argv += ['--vllm_server_group_port', str(helpers.free_port())]
    returncode, output = helpers.run([script, *argv], env=variables, cwd=tmp_path)
    assert returncode == 0, output[-6000:]
    logs = [json.loads(line) for line in (tmp_path / 'logging.jsonl').read_text().splitlines()]
    assert len([row for row in logs if 'loss' in row]) == 2 or logs[-1]['global_step/max_steps'] == '2/2'
    assert len((tmp_path / 'completions.jsonl').read_text().splitlines()) == 8
