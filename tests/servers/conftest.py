"""Real teacher servers on the loopback: vLLM with its OpenAI-compatible API, and ``swift deploy``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import job_runs
import pytest
import serving
from proxy import KEY, FaultyProxy

HERE = Path(__file__).parent


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
    return job_runs.JobRunner(tmp_path_factory, tiny_models, HERE.parent / 'hf' / 'jobs.py', {'GKD_TEACHER_API_KEY': KEY})


@pytest.fixture(scope='session')
def run_jobs_with_vllm(tmp_path_factory, tiny_models) -> job_runs.JobRunner:
    """Where vLLM can be imported."""
    return job_runs.JobRunner(
        tmp_path_factory, tiny_models, HERE.parent / 'hf' / 'jobs.py', helpers.vllm_environment(), [serving.API_SERVER]
    )


@pytest.fixture(scope='session')
def vllm_server(tiny_models, tmp_path_factory) -> Iterator[str]:
    with serving.vllm_serve(tiny_models.teacher, tmp_path_factory.mktemp('vllm'), modules=serving.WITH_TRAINERS) as url:
        yield url


@pytest.fixture(scope='session')
def deploy_server(tiny_models, tmp_path_factory) -> Iterator[str]:
    with serving.swift_deploy(tiny_models.teacher, tmp_path_factory.mktemp('deploy'), modules=serving.WITH_TRAINERS) as url:
        yield url


@pytest.fixture(scope='session')
def proxies() -> Iterator[Callable[[str], FaultyProxy]]:
    made: list[FaultyProxy] = []

    def proxy(upstream: str) -> FaultyProxy:
        made.append(FaultyProxy(upstream))
        return made[-1]

    yield proxy
    for one in made:
        one.close()
