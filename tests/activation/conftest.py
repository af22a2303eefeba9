"""Commands that are given by markers and run two at a time, each in a process and, where it matters, an environment of its own."""

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

import helpers
import pytest
from sites import ROOT, build_wheel, make_site

HERE = Path(__file__).parent


@dataclass
class Finished:
    """How a command ended; ``probes`` are what probe.py has printed, one per rank."""

    returncode: int
    output: str

    @property
    def probes(self) -> list[dict[str, Any]]:
        assert self.returncode == 0, self.output[-4000:]
        # Ranks may print into one line.
        return [json.JSONDecoder().raw_decode(rest)[0] for rest in self.output.split('PROBE ')[1:]]

    @property
    def probe(self) -> dict[str, Any]:
        (probe,) = self.probes
        return probe


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        'markers',
        'command(line, site, env, config): runs before the test, which finds it in the fixture `finished`. In the line and in config, '
        'the text of {out}/config.yaml, names of models, data, and files beside the test are filled in. site: editable, wheel or bare.',
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

    def run(line: str, *, site: str = 'editable', env: dict[str, str] | None = None, config: str = '') -> Finished:
        out = tmp_path_factory.mktemp('out')
        names = {**files, **models, 'out': out, 'port': helpers.free_port()}
        (out / 'same_student').symlink_to(tiny_models.student)
        (out / 'config.yaml').write_text(config.format(**names))
        words = shlex.split(line.format(**names))
        # The launchers start their children with the Python that runs them, so that these live in the same environment.
        launchers = {'swift': ['-m', 'swift.cli.main'], 'megatron': ['-m', 'swift.cli._megatron.main'], 'python': []}
        tool = launchers[words[0]] if words[0] in launchers else [Path(sysconfig.get_path('purelib'), words[0])]
        return Finished(*helpers.run([sites[site], *tool, *words[1:]], env={'COLUMNS': '200', **(env or {})}, cwd=out))

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
