"""A teacher on a layout of its own says what it says in any other, and leaves no trace in the student's."""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import pytest
import torch
from cases import compared
from runs import CPU, Run
from teacher_cases import MOE, PAIRS, STEPS, WIDE, layout, run_alone, run_in

from swift_gkd_plugin.megatron.rota import Rota

pytestmark = [pytest.mark.megatron]


# A student with dropout, alone and with visits. These come first in their ranks: a trace that another run had left would hide one.
VISITS = {'TP2xCP2': layout(tp=1), 'PP2': layout(tp=2, pp=1), 'EP2': {**MOE, **layout(ep=1)}}
UNVISITED = {
    **STEPS,
    'gkd_loss_weight': 0,
    'sft_alpha': 1,
    'megatron_extra_kwargs': '{"hidden_dropout": 0.2}',
    'export': True,
}
VISITED = {**UNVISITED, 'external_plugins': Path(__file__).with_name('visitor.py'), 'callbacks': 'visitor'}
# The same sizes in process groups of their own.
THERE_AND_BACK = {'DP2': layout(tp=1), 'TP2': layout(tp=2)}


@pytest.fixture(scope='module')
def in_layout(tmp_path_factory, models, tiny_models):
    """All runs of a layout of the student, made when they are first asked for."""
    made: dict[str, dict[str, Run]] = {}

    def of(student: str) -> dict[str, Run]:
        if student not in made:
            jobs: dict[str, dict] = {}
            if student in VISITS:
                jobs |= {'alone': {**UNVISITED, **VISITS[student]}, 'visited': {**VISITED, **VISITS[student]}}
            if student in THERE_AND_BACK:
                jobs |= {'its own': {**STEPS, **WIDE, **THERE_AND_BACK[student]}, 'shared': {**STEPS, **WIDE}}
            jobs |= {name: {**trained, **own} for name, (trained, own) in PAIRS.get(student, {}).items()}
            made[student] = run_in(student, jobs, tmp_path_factory.mktemp('runs'), models, tiny_models.train)
        return made[student]

    return of


@pytest.fixture(scope='module')
def alone(tmp_path_factory, models, tiny_models) -> dict[str, dict[str, Run]]:
    return run_alone(tmp_path_factory.mktemp('alone'), models, tiny_models.train)


@pytest.mark.parametrize('student', PAIRS)
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_teacher_says_the_same_in_its_own_layout(alone, in_layout, student):
    runs = {name: in_layout(student)[name] for name in PAIRS[student]}
    differences = {name: compared(run, alone[student][name]) for name, run in runs.items()}
    assert {name: d for name, d in differences.items() if not (d[0] < 1e-6 and d[1] < 1e-5)} == {}
    for name, run in runs.items():
        assert 'a separate model on its own layout (TP ' in run.output, name
        assert run.values('eval_loss') == pytest.approx(alone[student][name].values('eval_loss'), abs=1e-6)
        assert len(run.values('eval_loss')) == ('evaluated' in name)
        if name == 'TP2, top-k':
            assert "NCCL communicator warm-up of the teacher's layout done (9 groups)." in run.output
        if 'offloaded' in name:
            assert min(run.values('teacher/moved_gib')) > 0 and run.values('optimizer/moved_gib')[-1] > 0


@pytest.mark.parametrize('student', THERE_AND_BACK)
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_way_there_and_back_changes_no_bit(in_layout, student):
    """The same sizes in process groups of their own: the hidden states and the head that come back are those that stay."""
    runs = in_layout(student)
    assert runs['its own'].losses == runs['shared'].losses
    own, shared = runs['its own'].gradients, runs['shared'].gradients
    assert own.keys() == shared.keys() and all(torch.equal(own[name], shared[name]) for name in own)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_rank_keeps_its_own(in_layout):
    """Each of the two ranks of a teacher with TP computes the states of all micro-batches of the step, and owns half of them."""
    for name in ('TP2, fillers', 'TP2, wide', 'TP2, another family'):
        seen = in_layout('DP2')[name].seen
        assert 0 < seen['kept'] == seen['payload'], name


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_replica_looks_at_packed_rows_of_all_owners_at_once(in_layout):
    """One replica and two owners, each with one batch of the teacher's own; padded rows stay apart."""
    runs = in_layout('DP2')
    assert [runs[name].seen['forwards'] for name in ('TP2, wide', 'CP2', 'CP2, padded')] == [1, 1, 2]
    assert runs['PP2, soft caps'].seen['forwards'] == 4  # as many as keep two stages busy


@pytest.mark.parametrize('student', VISITS)
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_visit_leaves_no_trace(in_layout, student):
    """A student with dropout trains bit by bit as if nobody had been in the other layout, whatever was drawn there."""
    runs = in_layout(student)
    alone, visited = runs['alone'], runs['visited']
    assert visited.loaded == alone.loaded + 1
    assert visited.losses == alone.losses and len(alone.losses) == 3
    for kind in ('gradients', 'weights'):
        a, b = alone.saved(kind), visited.saved(kind)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), kind


CHECK = """
import ast, inspect
import swift.megatron  # makes megatron-core fit for a CPU
from megatron.core import parallel_state
from mcore_bridge.bridge import gpt_bridge
from megatron.core.transformer.moe import fused_a2a, moe_utils
from swift_gkd_plugin.megatron.layouts import OTHER_STATE, fresh_parallel_state

def assigned(module):
    return {n for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Global) for n in node.names}

missing = assigned(parallel_state) - fresh_parallel_state().keys()
for module, values in OTHER_STATE:
    missing |= assigned(module) - values.keys()
    assert all(getattr(module, name) == value for name, value in values.items()), module
assert not missing, missing
before = dict(vars(parallel_state))
assert fresh_parallel_state() == {name: before[name] for name in fresh_parallel_state()}
print('all of it')
"""


@pytest.mark.e2e
def test_every_global_of_the_layout_is_exchanged():
    returncode, output = helpers.run([sys.executable, '-c', CHECK], env=CPU, cwd=Path(__file__).parent, timeout=120)
    assert returncode == 0 and 'all of it' in output, output[-3000:]


@pytest.mark.parametrize(
    ('counts', 'replicas', 'multiple', 'rounds'),
    [([4, 4], 1, 1, 8), ([3], 2, 1, 2), ([2, 2, 2, 2], 2, 1, 4), ([1], 4, 1, 1), ([2, 0, 3], 2, 1, 3), ([3, 3], 2, 2, 4)],
)
def test_every_micro_batch_is_answered_once(counts, replicas, multiple, rounds):
    rota = Rota.make(counts, replicas, multiple)
    assert rota.rounds == rounds
    assert [len(rota.of(replica)) for replica in range(replicas)] == [rounds] * replicas
    answered = [(replica, turn) for replica in range(replicas) for turn in range(rounds) if rota.answered(replica, turn) is not None]
    # What is answered is what was run in that place, and each micro-batch is answered once.
    assert all(rota.answered(replica, turn) == rota.of(replica)[turn] for replica, turn in answered)
    expected = [(owner, number) for owner, count in enumerate(counts) for number in range(count)]
    assert sorted(rota.answered(*place) for place in answered) == expected


def test_same_number_of_replicas_sends_nothing():
    rota = Rota.make([3, 3], 2)
    assert [{owner for owner, _ in rota.of(replica)} for replica in (0, 1)] == [{0}, {1}]
