"""Servers of the tests: real ones, on the loopback, that end with the test."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import helpers
import pytest
import starts
from proxy import KEY

ON_CPU = Path(__file__).parent / 'engine' / 'vllm_on_cpu.py'
API_SERVER = 'vllm.entrypoints.openai.api_server'
# For servers beside training runs with vLLM: all of them come from one process.
WITH_TRAINERS = (API_SERVER, *starts.MODULES)
LENGTH = 512  # tokens that a server takes
MOST = 32  # log-probabilities per token that it sends


@contextmanager
def serving(
    script: Path | str, options: Sequence[Any], port: int, log: Path, env: Mapping[str, str] | None, modules: Sequence[str]
) -> Iterator[str]:
    """A server process; its URL once it answers.

    Args:
        env: On top of what a process with vLLM needs.
        modules: What is imported before it starts, once for all that name the same ones and have the same variables.
    """
    url = f'http://127.0.0.1:{port}'
    env = {**starts.ENVIRONMENT, **helpers.vllm_environment(), 'VLLM_API_KEY': KEY, **(env or {})}
    process = starts.start(script, *options, modules=modules, env=env, cwd=log.parent, log=log)
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


@contextmanager
def vllm_serve(
    model: Path, directory: Path, env: Mapping[str, str] | None = None, *flags: str, modules: Sequence[str] = (API_SERVER,)
) -> Iterator[str]:
    """vLLM's OpenAI-compatible server."""
    port = helpers.free_port()
    options = {
        'model': model,
        'served-model-name': 'teacher',
        'dtype': 'float32',
        'max-model-len': LENGTH,
        'max-num-seqs': 16,
        'kv-cache-memory-bytes': helpers.KV_CACHE_BYTES,
        'host': '127.0.0.1',
        'port': port,
        'max-logprobs': MOST,
    }
    argv = ['--enforce-eager', *flags, *helpers.command_line(options)]
    with serving(API_SERVER, argv, port, directory / 'log.txt', env, modules) as url:
        yield url


@contextmanager
def swift_deploy(
    model: Path, directory: Path, env: Mapping[str, str] | None = None, *, modules: Sequence[str] = (API_SERVER,), **options: Any
) -> Iterator[str]:
    """``swift deploy`` with vLLM behind it."""
    port = helpers.free_port()
    options = {
        'model': model,
        'model_type': 'qwen3',
        'template': 'qwen3',
        'infer_backend': 'vllm',
        'torch_dtype': 'float32',
        'vllm_max_model_len': LENGTH,
        'vllm_enforce_eager': 'true',
        'vllm_engine_kwargs': helpers.VLLM_ENGINE_KWARGS,
        'host': '127.0.0.1',
        'port': port,
        'api_key': KEY,
        'max_logprobs': MOST,
        'external_plugins': ON_CPU,
        **options,
    }
    with serving(helpers.script('deploy')[1], helpers.command_line(options), port, directory / 'log.txt', env, modules) as url:
        yield url
