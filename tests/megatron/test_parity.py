"""Every layout has the loss and the gradients of one process, and one process has those of plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import CASES, cases_of, compared, plain
from parity import run_cases
from runs import LAYOUTS, Run, relative

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.timeout(900)]

PLAIN = (
    'dense beta 0.5',
    'dense beta 0',
    'dense beta 1',
    'packed rows, sft_alpha',
    'padded rows',
    'unequal vocabularies',
    'separate teacher, privileged',
)


@pytest.fixture(scope='module')
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('parity')


@pytest.fixture(scope='module')
def alone(directory, models, tiny_models) -> dict[str, Run]:
    return run_cases('1', directory / '1', models, tiny_models.train)


@pytest.mark.parametrize('name', PLAIN)
def test_one_process_is_plain_transformers(alone, models, name):
    loss, gradients = plain(alone[name], CASES[name], models)
    assert abs(alone[name].losses[0] - loss) < 1e-6
    assert relative(alone[name].gradients, gradients) < 1e-5


@pytest.mark.parametrize('layout', [name for name in LAYOUTS if name != '1'])
def test_layout_changes_nothing(alone, directory, models, tiny_models, layout):
    runs = run_cases(layout, directory / layout, models, tiny_models.train)
    assert runs.keys() == cases_of(layout).keys()
    differences = {name: compared(run, alone[name]) for name, run in runs.items()}
    assert {name: d for name, d in differences.items() if not (d[0] < 1e-6 and d[1] < 1e-5)} == {}
