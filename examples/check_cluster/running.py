"""Processes of a configuration: started, given a limit, and gone afterwards. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MARK = 'CHECK_CLUSTER_RUN'
PATIENCE = 10  # seconds to end by itself, when asked


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class Processes:
    """Of one configuration. torchrun's ranks and engines are in sessions of their own, so all of them are known by a variable of their
    environment."""

    def __init__(self, env: Mapping[str, str]):
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, **env, MARK: self.mark}
        self.children: list[subprocess.Popen] = []

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        with log.open('w') as output:
            child = subprocess.Popen(
                list(argv),
                env={**self.env, **(env or {})},
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def serve(self, argv: Sequence[str], log: Path, port: int, until: float, env: Mapping[str, str] | None = None) -> bool:
        """Start a server; whether it answers on this port before ``until`` (of the monotonic clock)."""
        server = self.start(argv, log, env)
        while time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5).close()
                return True
            time.sleep(0.5)
        return False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error) -> None:
        """End what is left: politely, for an engine has files and other processes to leave, then for certain."""
        with contextlib.suppress(KeyboardInterrupt):
            for child in self.children:
                if child.poll() is None:
                    _signal_group(child.pid, signal.SIGTERM)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and any(child.poll() is None for child in self.children):
                time.sleep(0.1)
        for child in self.children:
            _signal_group(child.pid, signal.SIGKILL)
        for pid in self._marked():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for child in self.children:
            child.wait()

    def _marked(self) -> Iterator[int]:
        for directory in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):  # gone, or somebody else's
                if f'{MARK}={self.mark}'.encode() in (directory / 'environ').read_bytes().split(b'\0'):
                    yield int(directory.name)


def _signal_group(pid: int, which: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, which)
