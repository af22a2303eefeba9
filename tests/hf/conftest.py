"""Runs of the trainer for the tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import job_runs
import pytest


@pytest.fixture(scope='session')
def run_jobs(tmp_path_factory, tiny_models) -> job_runs.JobRunner:
    return job_runs.JobRunner(tmp_path_factory, tiny_models, Path(__file__).with_name('jobs.py'))


@pytest.fixture(scope='session')
def gradient_difference() -> Callable[..., float]:
    return job_runs.relative
