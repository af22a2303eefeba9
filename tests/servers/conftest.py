"""Real teacher servers on the loopback: vLLM with its OpenAI-compatible API, and ``swift deploy``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import helpers
import job_runs
import pytest
from proxy import KEY, FaultyProxy

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items) -> None:
    missing = helpers.why_no_vllm()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.vllm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory) -> helpers.TinyModels:
    return helpers.make_tiny_models(tmp_path_factory.mktemp('models'), head_dim=32)  # vLLM's attention on a CPU has no 16


@pytest.fixture(scope='session')
def run_jobs(tmp_path_factory, tiny_models) -> job_runs.JobRunner:
    return job_runs.JobRunner(tmp_path_factory, tiny_models, HERE.parent / 'hf' / 'jobs.py', {'GKD_TEACHER_API_KEY': KEY})


@contextmanager
def serving(argv: list, port: int, log: Path) -> Iterator[str]:
    """A server process; its URL once it answers."""
    url = f'http://127.0.0.1:{port}'
    with open(log, 'w') as output:
        process = subprocess.Popen(
            [str(a) for a in argv],
            env={**os.environ, **helpers.OFFLINE, **helpers.vllm_environment(), 'VLLM_API_KEY': KEY},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the command starts processes of its own; all of them end with it
        )
    try:
        for _ in range(240):
            assert process.poll() is None, f'the server ended:\n{log.read_text()[-6000:]}'
            try:
                urllib.request.urlopen(f'{url}/health', timeout=2).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(f'no server after 120 s:\n{log.read_text()[-6000:]}')
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope='session')
def vllm_server(tiny_models, tmp_path_factory) -> Iterator[str]:
    port = helpers.free_port()
    options = {
        'model': tiny_models.teacher,
        'served-model-name': 'teacher',
        'dtype': 'float32',
        'max-model-len': 512,
        'max-num-seqs': 16,
        'host': '127.0.0.1',
        'port': port,
        'max-logprobs': 32,
    }
    argv = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--enforce-eager', *helpers.command_line(options)]
    with serving(argv, port, tmp_path_factory.mktemp('vllm') / 'log.txt') as url:
        yield url


@pytest.fixture(scope='session')
def deploy_server(tiny_models, tmp_path_factory) -> Iterator[str]:
    port = helpers.free_port()
    options = {
        'model': tiny_models.teacher,
        'model_type': 'qwen3',
        'template': 'qwen3',
        'infer_backend': 'vllm',
        'torch_dtype': 'float32',
        'vllm_max_model_len': 512,
        'vllm_enforce_eager': 'true',
        'host': '127.0.0.1',
        'port': port,
        'api_key': KEY,
        'max_logprobs': 32,
        'external_plugins': HERE.parent / 'engine' / 'vllm_on_cpu.py',
    }
    argv = [helpers.SCRIPTS / 'swift', 'deploy', *helpers.command_line(options)]
    with serving(argv, port, tmp_path_factory.mktemp('deploy') / 'log.txt') as url:
        yield url


@pytest.fixture(scope='session')
def proxies() -> Iterator[Callable[[str], FaultyProxy]]:
    made: list[FaultyProxy] = []

    def proxy(upstream: str) -> FaultyProxy:
        made.append(FaultyProxy(upstream))
        return made[-1]

    yield proxy
    for one in made:
        one.close()
