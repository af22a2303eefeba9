"""Commands of ms-swift in forks of a process that has imported it: a start of their own takes seven seconds, and two more by ``swift``.

Some tests start real commands, so that the way from the command line to the plugin is walked. Those of what a command then does need not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import helpers
import starts

COMMAND = Path(__file__).with_name('command_in_a_fork.py')
STAYING = ('rollout', 'deploy')

# In place of the launchers `swift` and `megatron`: hands its command line over, and ends as that did.
LAUNCHER = """#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    what = {{'argv': sys.argv, 'env': dict(os.environ), 'cwd': os.getcwd(), 'output': os.path.realpath('/proc/self/fd/1')}}
    connection.sendall(json.dumps(what).encode() + b'\\n')
    status, output = json.loads(connection.makefile().readline())
sys.stdout.write(output)
sys.exit(status)
"""


def run_here(
    script: Path | str,
    *arguments: Any,
    modules: Sequence[str] = starts.MODULES,
    env: Mapping[str, str] = starts.ENVIRONMENT,
    ranks: int = 0,
    cwd: Path,
    timeout: float = 300,
) -> tuple[int, str]:
    """A script of ms-swift, with the plugin installed; its exit status and output. See :func:`starts.run`."""
    return starts.run(COMMAND, script, *arguments, modules=modules, env=env, ranks=ranks, cwd=cwd, timeout=timeout)


@contextlib.contextmanager
def launchers(modules: Sequence[str] = starts.MODULES, env: Mapping[str, str] = starts.ENVIRONMENT) -> Iterator[str]:
    """A directory for PATH with a ``swift`` and a ``megatron`` whose commands run in forks, by as many ranks as NPROC_PER_NODE says.

    Args:
        modules: What the commands find imported.
        env: Their variables; those of the one who calls the launcher come late.
    """
    directory = Path(tempfile.mkdtemp())  # the address of a socket has at most 107 bytes

    def answer(connection: socket.socket) -> None:
        with connection:
            asked = json.loads(connection.makefile().readline())
            launcher, command, *arguments = asked['argv']
            megatron = Path(launcher).name == 'megatron'
            script = helpers.script(f'_megatron/{command}' if megatron else command)[1]
            late = {name: value for name, value in asked['env'].items() if os.environ.get(name) != value and name not in env}
            how = {'modules': modules, 'env': env, 'late': late, 'cwd': Path(asked['cwd'])}
            if command in STAYING:
                started = starts.start(COMMAND, script, *arguments, **how, log=Path(asked['output']))
                connection.recv(1)  # until whoever has called it is gone
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.pid, signal.SIGKILL)
            else:
                ranks = int(asked['env'].get('NPROC_PER_NODE', megatron))
                try:
                    ended = starts.run(COMMAND, script, *arguments, **how, ranks=ranks, timeout=300)
                except AssertionError as error:
                    ended = 1, str(error)
                connection.sendall(json.dumps(ended).encode() + b'\n')

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        address = str(directory / 'address')
        listener.bind(address)
        listener.listen()
        for name in ('swift', 'megatron'):
            (directory / name).write_text(LAUNCHER.format(python=sys.executable, address=address))
            (directory / name).chmod(0o700)
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield str(directory)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            shutil.rmtree(directory)
