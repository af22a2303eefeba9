"""A teacher on a layout of its own says what it says in any other, and leaves no trace in the student's."""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import pytest
import torch
from cases import compared, make_datasets
from runs import CPU, Run

from swift_gkd_plugin.megatron.rota import Rota

pytestmark = [pytest.mark.megatron]


def layout(tp=None, pp=None, cp=None, ep=None, etp=None) -> dict[str, int]:
    names = ('tensor_model', 'pipeline_model', 'context', 'expert_model', 'expert_tensor')
    sizes = zip(names, (tp, pp, cp, ep, etp), strict=True)
    return {f'teacher_{name}_parallel_size': size for name, size in sizes if size is not None}


# A large epsilon: see test_megatron_training.py.
STEPS = {'dataset': 'ten', 'train_iters': 3, 'adam_eps': 1e-3}
PRIVILEGED = {'dataset': 'privileged', 'micro_batch_size': 2}
WIDE, TIED = {'teacher_model': 'wide', 'beta': 0}, {'model': 'tied', 'teacher_model': 'wide'}
TOPK = {'gkd_logits_topk': 8, 'teacher_model': 'wide'}
MOE = {'model': 'moe', 'teacher_model': 'moe_teacher'}
PADDED = {'micro_batch_size': 2, 'padding_free': 'false'}
# Micro-batches that two replicas, or four, cannot share evenly.
THREE, SIX = {'global_batch_size': 3}, {'global_batch_size': 6}
DP4 = {'tensor_model_parallel_size': 1, 'pipeline_model_parallel_size': 1}

# By the student's layout: what is trained, and the layout of the teacher.
PAIRS: dict[str, dict[str, tuple[dict, dict]]] = {
    'DP2': {
        'TP2, fillers': (STEPS, layout(tp=2)),
        'TP2, offloaded': ({**STEPS, 'offload_teacher_model': 'true'}, layout(tp=2)),
        'TP2, wide': (WIDE, layout(tp=2)),
        'TP2, top-k': (TOPK, layout(tp=2)),
        'TP2, another family': ({'teacher_model': 'qwen2'}, layout(tp=2)),
        'PP2': (PRIVILEGED, layout(pp=2)),
        'CP2': (PRIVILEGED, layout(cp=2)),
        'CP2, padded': (PADDED, layout(cp=2)),
        'EP2': (MOE, layout(ep=2)),
        'TP2, experts whole': (MOE, layout(tp=2)),
        'TP2, experts split': (MOE, layout(tp=2, etp=2)),
        'PP2, experts': (MOE, layout(pp=2)),
    },
    'TP2': {
        'DP2, filler': (THREE, layout(tp=1)),
        'DP2, tied student': (TIED, layout(tp=1)),
        'PP2, top-k': (TOPK, layout(tp=1, pp=2)),
        'CP2': (PRIVILEGED, layout(tp=1, cp=2)),
    },
    'PP2': {
        'DP2, filler': (THREE, layout(pp=1)),
        'TP2, wide': (WIDE, layout(tp=2, pp=1)),
        'EP2': (MOE, layout(pp=1, ep=2)),
    },
    'CP2': {
        'DP2, filler': (THREE, layout(cp=1)),
        'DP2': (PRIVILEGED, layout(cp=1)),
        'TP2': (PRIVILEGED, layout(tp=2, cp=1)),
        'EP2': (MOE, layout(ep=2)),
    },
    'EP2': {'EP1': (MOE, layout(ep=1)), 'TP2': (MOE, layout(tp=2, ep=1, etp=2)), 'PP2': (MOE, layout(pp=2, ep=1))},
    # The teacher has the student's virtual stages as long as it has its stages.
    'PP2xVPP2': {'VPP2': ({'teacher_model': 'wide'}, layout(tp=1)), 'TP2': (STEPS, layout(tp=2, pp=1))},
    'TP2xPP2': {
        'DP4, fillers': (SIX, layout(tp=1, pp=1)),
        'PP4': (WIDE, layout(tp=1, pp=4)),
        'TP2xCP2': (PRIVILEGED, layout(pp=1, cp=2)),
        'DP2xPP2, tied student': (TIED, layout(tp=1)),
    },
    'TP2xCP2': {'EP4': (MOE, layout(tp=1, cp=1, ep=4)), 'PP2': (PRIVILEGED, layout(pp=2, cp=1))},
    'DP4': {
        'TP2xDP2': ({**STEPS, **WIDE}, layout(tp=2)),
        'EP2': (MOE, layout(ep=2)),
        'TP2xPP2': (PRIVILEGED | {'global_batch_size': 8}, layout(tp=2, pp=2)),
    },
}


@pytest.fixture(scope='module')
def data(tmp_path_factory, tiny_models):
    return make_datasets(tiny_models.train, tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def in_layout(run_jobs, data):
    def run(jobs, student: str, **how) -> dict[str, Run]:
        jobs = {name: {**job, 'dataset': data[job['dataset']]} if 'dataset' in job else job for name, job in jobs.items()}
        if student == 'DP4':  # four ranks of any kind
            student, jobs = 'TP2xPP2', {name: {**DP4, **job} for name, job in jobs.items()}
        return run_jobs(jobs, student, **how)

    return run


@pytest.fixture(scope='module')
def alone(in_layout) -> dict[str, Run]:
    """Each of the configurations in one process."""
    jobs = {}
    for pairs in PAIRS.values():
        for trained, _ in pairs.values():
            jobs[repr(trained)] = trained
    return dict(zip(jobs, in_layout({str(n): job for n, job in enumerate(jobs.values())}, '1', timeout=600).values(), strict=True))


@pytest.mark.parametrize('student', PAIRS)
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_teacher_says_the_same_in_its_own_layout(alone, in_layout, student):
    pairs = PAIRS[student]
    runs = in_layout({name: {**trained, **own} for name, (trained, own) in pairs.items()}, student, timeout=600)
    differences = {name: compared(run.ok(), alone[repr(pairs[name][0])].ok()) for name, run in runs.items()}
    assert {name: d for name, d in differences.items() if not (d[0] < 1e-6 and d[1] < 1e-5)} == {}
    for name, run in runs.items():
        assert 'a separate model on its own layout (TP ' in run.output, name
        if 'offload_teacher_model' in pairs[name][0]:
            assert min(run.values('teacher/moved_gib')) > 0


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_way_there_and_back_changes_no_bit(in_layout):
    """The same sizes in process groups of their own: the hidden states and the head that come back are those that stay."""
    for student in ('DP2', 'TP2'):
        sizes = layout(tp=int(student[2]) if student == 'TP2' else 1)
        runs = in_layout({'its own': {**STEPS, **WIDE, **sizes}, 'shared': {**STEPS, **WIDE}}, student)
        assert runs['its own'].ok().losses == runs['shared'].ok().losses
        own, shared = runs['its own'].gradients, runs['shared'].gradients
        assert own.keys() == shared.keys() and all(torch.equal(own[name], shared[name]) for name in own)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_visit_leaves_no_trace(in_layout):
    """A student with dropout trains bit by bit as if nobody had been in the other layout, whatever was drawn there."""
    job = {
        **STEPS,
        'gkd_loss_weight': 0,
        'sft_alpha': 1,
        'megatron_extra_kwargs': '{"hidden_dropout": 0.2}',
        'export': True,
    }
    visitor = {'external_plugins': Path(__file__).with_name('visitor.py'), 'callbacks': 'visitor'}
    for student, own in (('TP2+SP', layout(tp=1)), ('PP2', layout(tp=2, pp=1)), ('EP2', layout(ep=1))):
        model = MOE if student == 'EP2' else {}
        runs = in_layout({'alone': {**job, **model, **own}, 'visited': {**job, **model, **own, **visitor}}, student)
        alone, visited = runs['alone'].ok(), runs['visited'].ok()
        assert visited.loaded == alone.loaded + 1
        assert visited.losses == alone.losses and len(alone.losses) == 3
        for kind in ('gradients', 'weights'):
            a, b = alone.saved(kind), visited.saved(kind)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), (student, kind)


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
