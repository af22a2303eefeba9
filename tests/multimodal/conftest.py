"""Tiny multimodal models and runs with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import helpers
import job_runs
import pytest
import serving
import tiny_omni
import tiny_vision
from proxy import KEY

HERE = Path(__file__).parent
ENGINE_TESTS = HERE.parent / 'engine'
sys.path.insert(0, str(ENGINE_TESTS))

from rollout_server import ENVIRONMENT, MODULES, RolloutServer  # noqa: E402


def pytest_collection_modifyitems(items) -> None:
    no_vision, no_vllm = tiny_vision.why_none(), helpers.why_no_vllm()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.e2e)
        needs_engine = {
            'vllm_server',
            'deploy_server',
            'run_jobs_with_engine',
            'run_omni_with_engine',
            'runs_with_servers',
        } & set(item.fixturenames)
        if needs_engine:
            item.add_marker(pytest.mark.vllm)
        missing = no_vision or (needs_engine and no_vllm)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def made(directory: Path, *options: str) -> helpers.TinyModels:
    helpers.run([sys.executable, HERE.parent / 'tiny_vision.py', directory, *options], env=tiny_vision.environment(), cwd=directory)
    return helpers.TinyModels(directory / 'student', directory / 'teacher', directory / 'train.jsonl', directory / 'val.jsonl')


@pytest.fixture(scope='session')
def vision_models(tmp_path_factory) -> helpers.TinyModels:
    return made(tmp_path_factory.mktemp('dense'))


@pytest.fixture(scope='session')
def moe_models(tmp_path_factory) -> helpers.TinyModels:
    return made(tmp_path_factory.mktemp('moe'), 'moe')


@pytest.fixture(scope='session')
def run_jobs(tmp_path_factory, vision_models) -> job_runs.JobRunner:
    environment = {**tiny_vision.environment(), 'GKD_TEACHER_API_KEY': KEY}
    return job_runs.JobRunner(tmp_path_factory, vision_models, HERE.parent / 'hf' / 'jobs.py', environment)


@pytest.fixture(scope='session')
def omni(tmp_path_factory) -> Path:
    """A directory with ``student``, ``teacher`` and the datasets of tiny_omni.py."""
    directory = tmp_path_factory.mktemp('omni')
    helpers.run([sys.executable, HERE.parent / 'tiny_omni.py', directory], env=tiny_omni.environment(), cwd=directory)
    return directory


def omni_models(omni: Path) -> helpers.TinyModels:
    return helpers.TinyModels(omni / 'student', omni / 'teacher', omni / 'mixed.jsonl', omni / 'text.jsonl')


@pytest.fixture(scope='session')
def run_omni(tmp_path_factory, omni) -> job_runs.JobRunner:
    return job_runs.JobRunner(tmp_path_factory, omni_models(omni), HERE.parent / 'hf' / 'jobs.py', tiny_omni.environment())


@pytest.fixture(scope='session')
def run_omni_with_engine(tmp_path_factory, omni) -> job_runs.JobRunner:
    return job_runs.JobRunner(tmp_path_factory, omni_models(omni), ENGINE_TESTS / 'jobs_with_engine.py', with_engine(tiny_omni), MODULES)


def with_engine(models=tiny_vision) -> dict[str, str]:
    both = f'{models.environment()["PYTHONPATH"]}:{ENVIRONMENT["PYTHONPATH"]}'
    return {**models.environment(vllm=True), **ENVIRONMENT, 'PYTHONPATH': both}


@pytest.fixture(scope='session')
def run_jobs_with_engine(tmp_path_factory, vision_models) -> job_runs.JobRunner:
    """With vLLM for the student; what it samples is compared with the live student."""
    return job_runs.JobRunner(tmp_path_factory, vision_models, ENGINE_TESTS / 'jobs_with_engine.py', with_engine(), MODULES)


@pytest.fixture(scope='session')
def rollout_server(tmp_path_factory, vision_models) -> Iterator[RolloutServer]:
    names = {'model_type': 'qwen3_vl', 'template': 'qwen3_vl'}
    server = RolloutServer(vision_models, names, tmp_path_factory.mktemp('rollout') / 'log.txt', env=with_engine())
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope='session')
def vllm_server(vision_models, tmp_path_factory) -> Iterator[str]:
    directory, environment = tmp_path_factory.mktemp('vllm'), tiny_vision.environment(vllm=True)
    with serving.vllm_serve(vision_models.teacher, directory, environment, '--enable-scale-out') as url:
        yield url


@pytest.fixture(scope='session')
def deploy_server(vision_models, tmp_path_factory) -> Iterator[str]:
    names = {'model_type': 'qwen3_vl', 'template': 'qwen3_vl'}
    environment = tiny_vision.environment(vllm=True)
    with serving.swift_deploy(vision_models.teacher, tmp_path_factory.mktemp('deploy'), environment, **names) as url:
        yield url
