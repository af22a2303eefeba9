"""What runs beside the ranks of a Ray run, on GPUs of its own: an engine, which is a server of ms-swift."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ray

from ..arguments import OptionError
from ..serving import NotServing, ServerProcess
from .ray_rank import enter_node

PORTS = range(20000, 32000)  # none that Linux gives to outgoing connections: the one for weights is taken minutes later


def free_port(host: str) -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError:
                continue
        return port


class Engine:
    """An actor that two calls are in at a time. Ray pickles it by its name, so that a node where the plugin is not installed cannot make
    one.

    Args:
        name: For messages.
    """

    def __init__(self, name: str):
        self.name = name
        self.server: ServerProcess | None = None
        self.answers, self.closing = threading.Event(), False

    def open(self, directory: str, version: str) -> tuple[str, int, int]:
        """
        Args:
            directory, version: See :func:`.ray_rank.enter_node`.

        Returns:
            This node's address, and two free ports there.
        """
        enter_node(directory, version)
        host = ray.util.get_node_ip_address()
        return host, free_port(host), free_port(host)

    def serve(self, command: str, argv: Sequence[str], url: str, log: str) -> float:
        """Start the server.

        Args:
            command: The module of ms-swift's command.
            argv: Its options.
            log: File for its output.

        Returns:
            The seconds until it answered.

        Raises:
            OptionError: It did not start.
        """
        self.server = ServerProcess([sys.executable, '-m', command, *argv], url, os.environ, Path(log))
        try:
            seconds = self.server.until_it_answers()
        except NotServing as error:
            raise OptionError(f'The {self.name} did not start: {error} ({self._where()}).') from None
        self.answers.set()
        return seconds

    def watch(self) -> None:
        """Return once the server is there and :meth:`close` has been called.

        Raises:
            OptionError: The server has ended by itself.
        """
        self.answers.wait()
        self.server.until_it_ends()
        if not self.closing:
            raise OptionError(f'The {self.name} has ended: {self.server.last_error()} ({self._where()}).')

    def close(self) -> None:
        """End the server."""
        self.closing = True
        if self.server is not None:
            self.server.close()

    def _where(self) -> str:
        return f'its output is in {self.server.log} on {os.uname().nodename}'
