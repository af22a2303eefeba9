"""``swift rollout`` for the tests, and the environment of every process with an engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helpers
import starts
from engine_options import ENGINE

HERE = Path(__file__).parent
ENVIRONMENT = {**helpers.vllm_environment(), 'VLLM_PLUGINS': 'vllm_on_cpu,engine_in_a_fork'}
MODULES = (
    'vllm_on_cpu',
    # What an engine imports when it starts.
    'vllm.entrypoints.llm',
    'vllm.model_executor.layers.quantization.online.base',
    'vllm.v1.worker.cpu_worker',
)


class RolloutServer:
    """What ``swift rollout`` starts, on the loopback, with the tiny student: a fork of the process from which the trainers beside it come.

    Args:
        options: On top of what every server of the tests has.
        log: File for its output.
        command: What takes the options, if it is not ms-swift's own script; it gets a process that has imported nothing.
        env: On top of the environment of every process with an engine.
    """

    def __init__(
        self,
        models: helpers.TinyModels,
        options: Mapping[str, Any],
        log: Path,
        command: Sequence[Any] | None = None,
        env: Mapping[str, str] | None = None,
    ):
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
        if command is None:
            script, own = helpers.script('rollout')[1], {**starts.ENVIRONMENT, **ENVIRONMENT, **(env or {})}
            self.process = starts.start(script, *argv, modules=(*MODULES, *starts.MODULES), env=own, cwd=log.parent, log=log)
            return
        self.process = subprocess.Popen(
            [*map(str, command), *argv],
            env={
                **os.environ,
                'PATH': f'{helpers.SCRIPTS}{os.pathsep}{os.environ["PATH"]}',
                **helpers.OFFLINE,
                **ENVIRONMENT,
                **(env or {}),
            },
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
