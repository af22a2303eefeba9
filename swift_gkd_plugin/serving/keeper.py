"""Runs a server and ends it: ``python keeper.py PID SECONDS COMMAND …``, started by :class:`ServerProcess`.

A process between the two, because one that is killed runs nothing at its exit. It prints the server's process id and, once the server
has ended, its exit status. When the process PID is gone, or has closed this one's standard input, the server and what it has started get
SIGTERM and, SECONDS later, SIGKILL. Its standard error is the server's output.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time


def main(starter: int, seconds: float, command: list[str]) -> None:
    if os.fork():
        os._exit(0)  # Ray kills the children of a worker that ends, and this process has to outlive it
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)

    def end(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)

    def end_with_starter() -> None:
        watched = [sys.stdin.fileno()]
        # The other end of standard input may live on in what the starter has forked. A kernel before 5.3 has no such descriptors.
        with contextlib.suppress(AttributeError, OSError):
            watched.append(os.pidfd_open(starter))
        select.select(watched, [], [])
        end(signal.SIGTERM)
        time.sleep(seconds)
        end(signal.SIGKILL)

    print(server.pid, flush=True)
    threading.Thread(target=end_with_starter, daemon=True).start()
    status = server.wait()
    end(signal.SIGKILL)  # what it has left behind
    with contextlib.suppress(BrokenPipeError):
        print(status, flush=True)
    os._exit(0)


if __name__ == '__main__':
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
