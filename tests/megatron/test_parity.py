"""Every layout has the loss and the gradients of one process, and one process has those of plain transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from cases import AXES, CASES, IMPOSSIBLE, SERVER_CASES, InHalves, cases_of, compared, plain, values_of
from parity import run_cases
from runs import LAYOUTS, Run, relative

pytestmark = [pytest.mark.e2e, pytest.mark.megatron, pytest.mark.timeout(900)]

PLAIN = (
    'dense beta 0.5',
    'dense beta 0',
    'dense beta 1',
    'packed rows, sft_alpha',
    'padded rows',
    'three steps, fillers',
    'unequal vocabularies',
    'LoRA, extrapolated, privileged, soft caps',
    'LoRA, extrapolated, unequal vocabularies',
    'separate teacher, privileged, soft caps',
    'MoE, balanced experts',
    'MoE, routing of the teacher, recomputed',
    'MoE, routing of the teacher, privileged',
)


@pytest.fixture(scope='module')
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('parity')


@pytest.fixture(scope='module')
def alone(directory, models, tiny_models) -> dict[str, Run]:
    return run_cases('1', directory / '1', models, tiny_models.train)


def test_every_pair_of_axes_is_run():
    runs = [values_of(case, layout) for layout in LAYOUTS for case in cases_of(layout).values()]
    runs += [values_of(case, layout, server=True) for layout, case in SERVER_CASES.items()]
    run = {frozenset(pair) for values in runs for pair in itertools.combinations(values, 2)}
    wanted = {
        frozenset({(axis, a), (other, b)})
        for (axis, values), (other, others) in itertools.combinations(AXES.items(), 2)
        for a, b in itertools.product(values, others)
    }
    assert sorted(map(sorted, wanted - run - IMPOSSIBLE), key=str) == []
    assert not IMPOSSIBLE & run
    together = {pair for values in runs for pair in itertools.combinations(sorted(v for axis, v in values if axis == 'parallelism'), 2)}
    assert set(itertools.combinations(sorted(AXES['parallelism']), 2)) - together == {('CP', 'VPP')}


@pytest.mark.parametrize('name', PLAIN)
def test_one_process_is_plain_transformers(alone, models, name):
    loss, gradients = plain(alone[name], CASES[name], models)
    assert abs(alone[name].losses[0] - loss) < 1e-6
    assert relative(alone[name].gradients, gradients) < 1e-5


def test_micro_batches_by_tokens(alone):
    """One row each would be four."""
    batches = alone['three steps, fillers'].saved('batches')
    assert 1 < len(batches) < 4
    assert all(batch['student_inputs']['input_ids'].numel() <= 64 for batch in batches)


@pytest.fixture(scope='module')
def rounding(alone, models) -> tuple[float, float]:
    """How far loss and gradients of plain transformers in bf16 are from themselves with another order of summation."""
    of = alone['8 bf16'], CASES['8 bf16'], models, torch.bfloat16
    loss, gradients = plain(*of)
    with InHalves():
        other_loss, other_gradients = plain(*of)
    return abs(loss - other_loss), relative(gradients, other_gradients)


def test_one_process_in_bf16_is_plain_transformers(alone, models, rounding):
    loss, gradients = plain(alone['8 bf16'], CASES['8 bf16'], models, torch.bfloat16)
    assert abs(alone['8 bf16'].losses[0] - loss) < 2 * rounding[0]
    assert relative(alone['8 bf16'].gradients, gradients) < 2 * rounding[1] < 0.1


@pytest.mark.parametrize('layout', [name for name in LAYOUTS if name != '1' and cases_of(name)])
def test_layout_changes_nothing(request, alone, directory, models, tiny_models, layout):
    runs = run_cases(layout, directory / layout, models, tiny_models.train)
    assert runs.keys() == cases_of(layout).keys()
    differences = {name: compared(run, alone[name]) for name, run in runs.items()}
    bounds = dict.fromkeys(runs, (1e-6, 1e-5))
    if '8 bf16' in runs:
        bounds['8 bf16'] = tuple(2 * value for value in request.getfixturevalue('rounding'))
    assert {name: d for name, d in differences.items() if not (d[0] < bounds[name][0] and d[1] < bounds[name][1])} == {}
    for name, run in runs.items():  # by which gradients are clipped
        assert run.values('grad_norm') == pytest.approx(alone[name].values('grad_norm'), rel=max(1e-5, bounds[name][1] / 10)), name
