"""Markers, an offline environment and the models that most tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that every directory of tests finds helpers.py

import helpers

os.environ.update(helpers.OFFLINE)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'e2e: runs whole commands of ms-swift in processes of their own (10 seconds and more each)')
    config.addinivalue_line('markers', 'vllm: runs the real vLLM on a CPU')
    config.addinivalue_line('markers', 'megatron: runs megatron-core on CPU and gloo, in process groups of up to four ranks')


# Directories whose tests share servers or environments, which take longer to start than the tests that use them.
ONE_WORKER = ('activation', 'engine', 'servers', 'multimodal')


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share out the tests over ``pytest -n``: a file, or one of these directories, goes to one worker (``--dist loadgroup``)."""
    for item in items:
        directory = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(directory if directory in ONE_WORKER else item.path.stem))


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> helpers.TinyModels:
    return helpers.make_tiny_models(tmp_path_factory.mktemp('models'))
