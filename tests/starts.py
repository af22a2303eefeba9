"""Scripts of the tests, started by a process that has imported what they need."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helpers

FORK_SERVER = Path(__file__).with_name('fork_server.py')
MOST_SERVERS = 2  # half a gigabyte each

# Nothing reads these when it is imported; a server needs no other process for other values.
LATE = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'GKD_TEACHER_API_KEY', 'VLLM_API_KEY'}
LATE |= {'SWIFT_GKD_PLUGIN'}
# What every training run of transformers imports, the plugin's trainer too: it changes nothing before it is registered.
MODULES = (
    'deepspeed',
    'liger_kernel.transformers',
    'peft',
    'swift.pipelines.train.rlhf',
    'swift.rlhf_trainers.gkd_trainer',
    'swift_gkd_plugin.hf.trainer',
    'matplotlib.pyplot',  # at the end of a run
)
ENVIRONMENT = {'DS_ACCELERATOR': 'cpu'}


class Started:
    """A script that stays, in a session of its own: what this module needs of ``subprocess.Popen``, for a process that is not ours."""

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        """None while it lives."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX':
                return None
        return -1

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.02)


class ForkServer:
    """A process with modules in it, which runs scripts one after the other.

    Args:
        modules: What it imports.
        env: Its variables, on top of those of this process.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]):
        self.log = tempfile.NamedTemporaryFile('r', prefix='fork-server', suffix='.log', errors='replace')  # noqa: SIM115
        with open(self.log.name, 'w') as log:
            self.process = subprocess.Popen(
                [sys.executable, FORK_SERVER, *modules],
                env={**os.environ, **helpers.OFFLINE, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # what has been read is no longer seen by select
                start_new_session=True,
            )

    def run(
        self, script: Path | str, arguments: Sequence[Any], ranks: int, env: Mapping[str, str], cwd: Path, timeout: float
    ) -> tuple[int, str]:
        """The exit status of a script and what it printed. What it started dies with it.

        Args:
            ranks: How many run it, with gloo; 0 leaves their variables to ``env``.
        """
        with tempfile.NamedTemporaryFile('r', errors='replace') as output:
            pid = self._begin(script, arguments, env, cwd, output.name, ranks=ranks)
            try:
                status = self._answer(timeout)
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                self._answer(60)
                raise AssertionError(f'no end after {timeout} s: {script}\n{output.read()[-6000:]}') from None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return status, output.read()

    def start(self, script: Path | str, arguments: Sequence[Any], env: Mapping[str, str], cwd: Path, log: Path) -> Started:
        """A script that stays until it is stopped, and what it prints goes to ``log``."""
        log.touch()
        return Started(self._begin(script, arguments, env, cwd, str(log), stays=True))

    def _begin(
        self,
        script: Path | str,
        arguments: Sequence[Any],
        env: Mapping[str, str],
        cwd: Path,
        output: str,
        ranks: int = 0,
        stays: bool = False,
    ) -> int:
        what = {'script': str(script), 'arguments': list(map(str, arguments)), 'ranks': ranks, 'env': dict(env), 'stays': stays}
        what |= {'port': str(helpers.free_port()), 'cwd': str(cwd), 'output': output}
        with contextlib.suppress(BrokenPipeError):  # said below, with the reason
            self.process.stdin.write(json.dumps(what).encode() + b'\n')
        return self._answer(300)  # the first one waits for the imports

    def _answer(self, timeout: float) -> int:
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f'{FORK_SERVER.name} has ended:\n{self.log.read()[-6000:]}')
        return int(line)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


_servers: dict[tuple, ForkServer] = {}
_one_at_a_time = threading.Lock()


def run(
    script: Path | str,
    *arguments: Any,
    modules: Sequence[str],
    ranks: int = 0,
    env: Mapping[str, str],
    late: Mapping[str, str] | None = None,
    cwd: Path,
    timeout: float,
) -> tuple[int, str]:
    """Run a script, offline, and return its exit status and output; see :class:`ForkServer`.

    Args:
        late: More variables, which nothing reads when it is imported.
    """
    with _one_at_a_time:
        return _server(modules, env).run(script, arguments, ranks, {**env, **(late or {})}, cwd, timeout)


def start(
    script: Path | str,
    *arguments: Any,
    modules: Sequence[str],
    env: Mapping[str, str],
    late: Mapping[str, str] | None = None,
    cwd: Path,
    log: Path,
) -> Started:
    """Start a script that stays; see :class:`ForkServer`."""
    with _one_at_a_time:
        return _server(modules, env).start(script, arguments, {**env, **(late or {})}, cwd, log)


def _server(modules: Sequence[str], env: Mapping[str, str]) -> ForkServer:
    early = {name: value for name, value in env.items() if name not in LATE}
    key = (*modules, *sorted(early.items()))
    server = _servers.pop(key, None)
    if server is None or server.process.poll() is not None:
        server = ForkServer(modules, early)
    _servers[key] = server  # the last that was used
    while len(_servers) > MOST_SERVERS:
        _servers.pop(next(iter(_servers))).close()
    return server


@atexit.register
def close_all() -> None:
    for server in _servers.values():
        server.close()
