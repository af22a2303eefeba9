"""vLLM for the tests of this directory: in the training processes and as servers."""

from __future__ import annotations

from collections.abc import Iterator

import helpers
import job_runs
import pytest
from rollout_server import ENVIRONMENT, HERE, MODULES, RolloutServer


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
    return job_runs.JobRunner(tmp_path_factory, tiny_models, HERE / 'jobs_with_engine.py', ENVIRONMENT, MODULES)


@pytest.fixture(scope='session')
def servers(tmp_path_factory, tiny_models) -> Iterator[dict[str, RolloutServer]]:
    """Started together."""
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
