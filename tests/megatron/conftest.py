"""Runs of the Megatron trainer for the tests of this directory: megatron-core itself, on CPU and gloo."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from models import make_models


@pytest.fixture(scope='session')
def models(tmp_path_factory: pytest.TempPathFactory, tiny_models) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp('megatron_models'), tiny_models)


@pytest.fixture(scope='session')
def run_jobs(tmp_path_factory, models, tiny_models) -> Callable[..., dict[str, runs.Run]]:
    """Run several configurations in one process group and return them by name."""
    numbers = itertools.count()

    def run(jobs: runs.Jobs, layout: str = '1', **how) -> dict[str, runs.Run]:
        return runs.run_jobs(jobs, layout, tmp_path_factory.mktemp(f'megatron{next(numbers)}'), models, tiny_models.train, **how)

    return run


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
