"""A vLLM engine for the teacher beside the training processes: a server of this rank's own, on its device, asleep outside its turn.

A process of its own keeps the teacher's engine apart from the student's: within one process vLLM has one memory pool that sleeps as a
whole, and one set of parallel groups. It speaks the protocol of :mod:`.server`, so retries and checks are the same.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests
import torch
from swift.utils import get_logger

from ..serving import START_SECONDS, NotServing, ServerProcess
from .server import TeacherServerError

logger = get_logger()

# What torchrun and the trainer set for this rank; an engine that saw it would join the trainer's process group.
RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'NPROC_PER_NODE')
# Settings of torch's allocator, by the names that its versions read.
ALLOCATOR_VARIABLES = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_HIP_ALLOC_CONF')


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def name_of_device(device: torch.device) -> list[str] | None:
    """A rank's GPU as CUDA_VISIBLE_DEVICES names it; None if it has none."""
    if device.type != 'cuda':
        return None
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return [visible.split(',')[device.index] if visible else str(device.index)]


def environment(devices: Sequence[str] | None) -> dict[str, str]:
    """Of an engine, made of this process's.

    Args:
        devices: Its GPUs, as in CUDA_VISIBLE_DEVICES; None without any.
    """
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES and not name.startswith('TORCHELASTIC')}
    env['VLLM_SERVER_DEV_MODE'] = '1'  # vLLM's switch for /sleep and /wake_up
    if devices is None:
        return env
    env['CUDA_VISIBLE_DEVICES'] = ','.join(devices)
    for name in ALLOCATOR_VARIABLES:
        entries = env.get(name, '').split(',')
        # The memory pool that sleeps cannot be made of such segments, and vLLM does not start with them.
        kept = [entry for entry in entries if entry.replace(' ', '').lower() != 'expandable_segments:true']
        if len(kept) < len(entries):
            logger.info(f"{name}={env.pop(name)}: the teacher's engine gets it without expandable_segments, with which it cannot sleep.")
            env |= {name: ','.join(kept)} if kept else {}
    return env


class TeacherEngine:
    """Starts the engine, which ends with this process, however that ends.

    Args:
        model: Directory of the teacher.
        dtype: Of its weights, as vLLM calls it.
        topk: Log-probabilities per token that it must be able to send.
        arguments: More of vLLM's command line (``--gkd_teacher_engine_args``).
        devices: GPUs of the engine, as in CUDA_VISIBLE_DEVICES; None without any.
        log: File for its output.
    """

    def __init__(self, model: str, dtype: str, topk: int, arguments: str, devices: Sequence[str] | None, log: Path):
        port = _free_port()
        self.url, self.log, self.sleeps = f'http://127.0.0.1:{port}', log, devices is not None
        argv = [sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--model', model, '--served-model-name', 'teacher']
        argv += ['--dtype', dtype, '--max-logprobs', str(max(topk, 1)), '--host', '127.0.0.1', '--port', str(port)]
        argv += ['--enable-sleep-mode'] if self.sleeps else []
        self.process = ServerProcess([*argv, *shlex.split(arguments)], self.url, environment(devices), log)

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            TeacherServerError: It ended, or was not ready in half an hour; with the last lines of its log.
        """
        try:
            seconds = self.process.until_it_answers()
        except NotServing as error:
            raise TeacherServerError(f'--gkd_teacher_engine vllm did not start: {error} (its output is in {self.log}).') from None
        logger.info(f'The teacher has an engine of its own, ready after {seconds:.0f} s ({self.log}).')

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Weights and cache are on the device inside; outside only on the host."""
        self._call('/wake_up')
        try:
            yield
        finally:
            self._call('/sleep?level=1')

    def sleep(self) -> None:
        self._call('/sleep?level=1')

    def _call(self, path: str) -> None:
        if not self.sleeps:
            return
        try:
            requests.post(self.url + path, timeout=START_SECONDS).raise_for_status()
        except requests.exceptions.RequestException as error:
            raise TeacherServerError(f'The teacher engine {self.url} failed at {path}: {error} (its output is in {self.log}).') from None
