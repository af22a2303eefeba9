"""The example scripts with a teacher server and a teacher's engine, and the one that samples beforehand, on tiny models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import commands
import helpers
import pytest
import serving
import starts
from proxy import KEY

EXAMPLES = Path(__file__).parents[2] / 'examples'


@pytest.fixture(scope='module')
def path() -> Iterator[str]:
    with commands.launchers() as directory:
        yield directory


@pytest.fixture(scope='module')
def path_with_vllm() -> Iterator[str]:
    with commands.launchers(serving.WITH_TRAINERS, {**starts.ENVIRONMENT, **helpers.vllm_environment()}) as directory:
        yield directory


def run(
    script: str, path: str, models: helpers.TinyModels, output_dir: Path, without: tuple[str, ...] = (), **variables: str
) -> list[float]:
    options = {k: v for k, v in models.with_teacher.items() if k not in without}
    argv = helpers.command_line(
        {**helpers.QUICK, **options, 'fp16': 'false', 'max_steps': 2, 'gradient_accumulation_steps': 1, 'output_dir': output_dir}
    )
    environment = {'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}', 'GKD_TEACHER_API_KEY': KEY, 'OUTPUT': str(output_dir)}
    returncode, output = helpers.run([EXAMPLES / script, *argv], env={**environment, **variables}, cwd=output_dir, timeout=600)
    assert returncode == 0, output[-6000:]
    return [row['loss'] for row in map(json.loads, (output_dir / 'logging.jsonl').read_text().splitlines()) if 'loss' in row]


def test_teacher_server(vllm_server, path, tiny_models, tmp_path):
    server = ('teacher_model', 'teacher_model_type')
    losses = run('teacher_server.sh', path, tiny_models, tmp_path, server, SERVER=vllm_server, K='8')
    assert len(losses) == 2
    assert all(json.loads(line)['response_token_ids'] for line in (tmp_path / 'answers.jsonl').read_text().splitlines())


def test_teacher_engine(path_with_vllm, tiny_models, tmp_path):
    losses = run('teacher_engine.sh', path_with_vllm, tiny_models, tmp_path, K='8', ENGINE=helpers.VLLM_ENGINE_FLAGS)
    assert len(losses) == 2


@pytest.mark.parametrize('backend', ['vllm', 'transformers'])
def test_presampled(request, tiny_models, tmp_path, backend):
    """Seed 001's two steps: `swift infer`, then training with --seq_kd false."""
    first = {
        'model_type': 'qwen3',
        'template': 'qwen3',
        'torch_dtype': 'float32',
        'max_new_tokens': 8,
        'vllm_max_model_len': 256,
        'vllm_enforce_eager': 'true',
        'vllm_engine_kwargs': helpers.VLLM_ENGINE_KWARGS,
        'external_plugins': serving.ON_CPU,
        'load_from_cache_file': 'false',
    }
    if backend == 'transformers':
        first = {name: value for name, value in first.items() if not name.startswith('vllm') and name != 'external_plugins'}
    variables = {'BACKEND': backend, 'TEACHER': str(tiny_models.teacher), 'DATASET': f'{tiny_models.train}#16', 'LMBDA': '0'}
    variables['INFER_OPTIONS'] = ' '.join(map(str, helpers.command_line(first)))
    answers = tmp_path / 'teacher_generated_data.jsonl'
    path = request.getfixturevalue('path_with_vllm' if backend == 'vllm' else 'path')
    losses = run('presampled.sh', path, tiny_models, tmp_path, ('dataset',), **variables)
    assert len(losses) == 2 and len(answers.read_text().splitlines()) == 16
