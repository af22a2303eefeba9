"""vLLM for the tests of this directory: in the training processes and as servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helpers
import job_runs
import pytest
from engine_options import ENGINE

HERE = Path(__file__).parent
ENVIRONMENT = {**helpers.vllm_environment(), 'PYTHONPATH': f'{helpers.VLLM}{os.pathsep}{HERE}', 'VLLM_PLUGINS': 'vllm_on_cpu'}
del ENVIRONMENT['VLLM_CPU_KVCACHE_SPACE']  # whole GiB, and it would win over engine_options.ENGINE


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
    return job_runs.JobRunner(tmp_path_factory, tiny_models, HERE / 'jobs_with_engine.py', ENVIRONMENT)


class RolloutServer:
    """``swift rollout`` on the loopback, with the tiny student.

    Args:
        options: On top of what every server of the tests has.
        log: File for its output.
    """

    def __init__(self, models: helpers.TinyModels, options: Mapping[str, Any], log: Path):
        self.port, self.log = helpers.free_port(), log
        argv = helpers.command_line(
            {
                'model': models.student,
                'model_type': 'qwen3',
                'template': 'qwen3',
                'torch_dtype': 'float32',
                'host': '127.0.0.1',
                'port': self.port,
                **ENGINE,
                'external_plugins': [HERE / 'vllm_on_cpu.py', HERE / 'schedulers.py'],
                **options,
            }
        )
        self.process = subprocess.Popen(
            [helpers.SCRIPTS / 'swift', 'rollout', *argv],
            env={**os.environ, **helpers.OFFLINE, **ENVIRONMENT},
            stdout=log.open('w'),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float = 240) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(f'no rollout server:\n{self.log.read_text()[-6000:]}')

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def options(self) -> dict[str, Any]:
        """Of a trainer that uses it; a new port for the weights each time, for the last one may not be free yet."""
        return {
            'vllm_mode': 'server',
            'vllm_server_host': '127.0.0.1',
            'vllm_server_port': self.port,
            'vllm_server_group_port': helpers.free_port(),
            'vllm_server_timeout': 60,
        }


@pytest.fixture(scope='session')
def servers(tmp_path_factory, tiny_models) -> Iterator[dict[str, RolloutServer]]:
    """Started together: most of their time is imports."""
    logs = tmp_path_factory.mktemp('servers')
    options = {
        'plain': {},
        'adapter': {'vllm_enable_lora': 'true', 'vllm_max_lora_rank': 8},
        'two turns': {'multi_turn_scheduler': 'ask_again', 'max_turns': 3},
    }
    started = {name: RolloutServer(tiny_models, more, logs / f'{name}.log') for name, more in options.items()}
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.stop()
