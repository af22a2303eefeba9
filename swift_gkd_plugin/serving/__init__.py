"""A server in a process of its own, which ends with the process that has started it, however that one ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests

KEEPER = Path(__file__).with_name('keeper.py')
START_SECONDS = 1800  # to load its weights
END_SECONDS = 5  # between SIGTERM and SIGKILL


class NotServing(RuntimeError):
    """A server that has not started. The message is its last error."""


class ServerProcess:
    """Starts the server.

    Args:
        command: Its command line.
        url: Where it will answer ``/health``.
        env: Its environment.
        log: File for its output.

    Attributes:
        pid: Of the server, which leads a process group.
        log: As given.
    """

    def __init__(self, command: Sequence[str], url: str, env: Mapping[str, str], log: Path):
        self.url, self.log = url, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, 'w') as output:
            self._keeper = subprocess.Popen(
                [sys.executable, '-IS', str(KEEPER), str(os.getpid()), str(END_SECONDS), *command],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # what ends this process from a terminal is not for the keeper, which has to end the server first
                text=True,
            )
        self.pid = int(self._keeper.stdout.readline())
        self._keeper.wait()  # it has forked
        self._ended, self._status = threading.Event(), 'no answer'
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)

    def _watch(self) -> None:
        status = self._keeper.stdout.readline().strip()
        if not status:  # the keeper has died, and without one the server would go on for ever
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._status = f'exit status {status or -signal.SIGKILL}'
        self._ended.set()

    def until_it_answers(self) -> float:
        """Returns:
            The seconds that it took.

        Raises:
            NotServing: It has ended, or was not ready in half an hour and is ended.
        """
        begin = time.monotonic()
        while time.monotonic() - begin < START_SECONDS and not self._ended.wait(0.5):
            with contextlib.suppress(requests.exceptions.RequestException):
                if requests.get(f'{self.url}/health', timeout=5).status_code == 200:
                    return time.monotonic() - begin
        error = self.last_error()
        self.close()
        raise NotServing(error)

    def until_it_ends(self) -> None:
        self._ended.wait()

    def last_error(self) -> str:
        """Of its output, the last line with an error in it; and how it ended."""
        lines = [line for line in self.log.read_text(errors='replace').splitlines() if 'Error' in line]
        return '; '.join([line.strip()[:300] for line in lines[-1:]] + [self._status])

    def close(self) -> None:
        """End it and what it has started."""
        atexit.unregister(self.close)
        self._keeper.stdin.close()
        self._ended.wait(END_SECONDS + 10)
