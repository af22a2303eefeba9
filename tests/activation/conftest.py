"""Commands that are given by markers: each in a process and, where it matters, an environment of its own, two at a time; or in a fork."""

from __future__ import annotations

import json
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import helpers
import pytest
import starts
from sites import ROOT, build_wheel, make_site

HERE = Path(__file__).parent
STAND_INS = {'PYTHONPATH': str(HERE / 'stand_ins'), 'WORLD_SIZE': '2'}  # for megatron-core
MEGATRON = 'swift.megatron.pipelines.train.rlhf'


@dataclass
class Finished:
    """How a command ended; ``probe`` is what probe.py has printed."""

    returncode: int
    output: str

    @property
    def probe(self) -> dict[str, Any]:
        assert self.returncode == 0, self.output[-4000:]
        (found,) = self.output.split('PROBE ')[1:]
        return json.JSONDecoder().raw_decode(found)[0]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        'markers',
        'command(line, site, env): runs before the test, which finds it in the fixture `finished`. In the line names of models, data, '
        'and files beside the test are filled in. site: editable, wheel or bare; fork or bare fork, where what has been imported is '
        'beside the point.',
    )


@pytest.fixture(scope='session')
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Python of each kind of environment: our own, one with the plugin from a wheel, one without it."""
    directory = tmp_path_factory.mktemp('sites')
    return {
        'editable': Path(sys.executable),
        'wheel': make_site(directory / 'wheel', wheel=build_wheel(directory)),
        'bare': make_site(directory / 'bare'),
    }


@pytest.fixture(scope='session')
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_models: helpers.TinyModels, sites: dict[str, Path]
) -> Iterator[dict[str, list[Future[Finished]]]]:
    """All commands of all tests of this session that use them, started in the order of the tests."""
    files = {file.stem: file for file in HERE.glob('*.py')} | {
        'external': ROOT / 'swift_gkd_plugin' / 'external.py',
        'stand_ins': HERE / 'stand_ins',
    }
    models = {'student': tiny_models.student, 'teacher': tiny_models.teacher, 'train': tiny_models.train}

    def run(line: str, *, site: str = 'editable', env: dict[str, str] | None = None) -> Finished:
        out = tmp_path_factory.mktemp('out')
        (out / 'same_student').symlink_to(tiny_models.student)
        words = shlex.split(line.format(**files, **models, out=out))
        # The launcher starts its child with the Python that runs it, so that this lives in the same environment.
        tool = {'swift': ['-m', 'swift.cli.main'], 'python': []}.get(words[0], [Path(sysconfig.get_path('purelib'), words[0])])
        if site in sites:
            return Finished(*helpers.run([sites[site], *tool, *words[1:]], env={'COLUMNS': '200', **(env or {})}, cwd=out))
        megatron = '_megatron' in words[0]
        how = {'modules': [MEGATRON] if megatron else starts.MODULES, 'env': STAND_INS if megatron else starts.ENVIRONMENT}
        words = [*([commands.COMMAND] if site == 'fork' else []), *tool, *words[1:]]
        status, output = starts.run(*words, **how, late={'COLUMNS': '200', **(env or {})}, cwd=out, timeout=300)
        return Finished(status, output.partition('nanobind: leaked')[0])  # of a fork, whose memory is not looked through when it ends

    with ThreadPoolExecutor(max_workers=2) as pool:
        started: dict[str, Future[Finished]] = {}  # a command that several tests look at runs once
        by_test: dict[str, list[Future[Finished]]] = {}
        for item in request.session.items:
            by_test[item.nodeid] = []
            for command in reversed(list(item.iter_markers('command'))):  # pytest lists the decorator nearest to the function first
                key = repr((command.args, command.kwargs))
                if key not in started:
                    started[key] = pool.submit(run, *command.args, **command.kwargs)
                by_test[item.nodeid].append(started[key])
        yield by_test
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def all_finished(request: pytest.FixtureRequest, running: dict[str, list[Future[Finished]]]) -> list[Finished]:
    return [future.result() for future in running[request.node.nodeid]]


@pytest.fixture
def finished(all_finished: list[Finished]) -> Finished:
    (only,) = all_finished
    return only
