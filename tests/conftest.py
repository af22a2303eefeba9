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
ONE_WORKER = ('activation', 'engine', 'servers')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come first, then what runs commands: the last of them would leave the other workers with nothing to do."""
    runs_commands = {item.path for item in items if item.get_closest_marker('e2e')}
    items.sort(key=lambda item: 0 if item.path.parent.name in ONE_WORKER else 1 if item.path in runs_commands else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """``pytest -n``: a file, or one of these directories, goes to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split('::', 1)[0])
            return file.parent.name if file.parent.name in ONE_WORKER else file.name

    return Scheduling(config, log)


@pytest.fixture(scope='session')
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> helpers.TinyModels:
    return helpers.make_tiny_models(tmp_path_factory.mktemp('models'))
