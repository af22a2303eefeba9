"""Several ranks, with rows of their own or with the same ones, do what one process does; and what ends one of them ends all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import helpers
import pytest
from rank_cases import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
SEVERAL = [name for name in LAYOUTS if name != 'alone']
SHARING = [name for name in LAYOUTS if LAYOUTS[name][1] > 1]


class Found(dict):
    """What each rank has seen, by layout: a list with a rank's cases."""

    def __init__(self, root: Path):
        for name, (owners, sharers) in LAYOUTS.items():
            files = [root / name / f'rank{rank}.json' for rank in range(owners * sharers)]
            self[name] = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        self.root = root

    def ranks(self, layout: str, case: str) -> list:
        cases = [one.get(case, 'this rank did not come so far') for one in self[layout]]
        for one in cases:
            assert not isinstance(one, str), one
        return cases

    def alone(self, case: str):
        return self.ranks('alone', case)[0]

    def completions(self, layout: str, directory: str) -> list[dict]:
        lines = (self.root / layout / directory / 'completions.jsonl').read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda line: (line['step'], line['row'], line['epoch']))


@pytest.fixture(scope='module')
def found(tiny_models, tmp_path_factory) -> Found:
    root = tmp_path_factory.mktemp('ranks')
    environment = {'PYTHONPATH': os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), 'GLOO_SOCKET_IFNAME': 'lo'}
    worker = Path(__file__).with_name('rank_cases.py')
    status, output = helpers.run([sys.executable, worker, root, tiny_models.student, tiny_models.train], env=environment, timeout=240)
    assert status == 0, output[-4000:]
    return Found(root)


def by_row(*samples: dict) -> list:
    """Samples of several ranks in one order; what ranks share comes once."""
    return sorted({json.dumps([one['key'], one], sort_keys=True) for one in samples})


def same_training(ranks: list[dict], alone: dict) -> None:
    """Every rank's losses and logs are those of one process, and together they trained on its samples."""
    for one in ranks:
        assert one['losses'] == pytest.approx(alone['losses'], rel=1e-9)
        assert len(one['logs']) == len(alone['logs'])
        for log, expected in zip(one['logs'], alone['logs'], strict=True):
            assert log == pytest.approx(expected, rel=1e-5)
    assert by_row(*(sample for one in ranks for sample in one['samples'])) == by_row(*alone['samples'])


@pytest.mark.parametrize('layout', SEVERAL)
@pytest.mark.parametrize('case', ['training', 'local_teacher', 'rewarded', 'fed_back'])
def test_any_layout_is_one_training(found, layout, case):
    alone = found.alone(case)
    assert {sample['source'] for sample in alone['samples']} >= {'student', 'teacher' if case == 'training' else 'dataset'}
    same_training(found.ranks(layout, case), alone)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_feedback_is_what_all_ranks_with_the_same_rows_can_encode(found, layout):
    sharers = LAYOUTS[layout][1]
    ranks = [one['elsewhere'] for one in found.ranks(layout, 'fed_back')]
    assert all(one['losses'] == ranks[0]['losses'] for one in ranks)
    told = [{json.dumps(s['key']): s['feedback'] for s in one['samples'] if s['feedback']} for one in ranks]
    everything = {json.dumps(s['key']) for one in found.ranks(layout, 'fed_back') for s in one['samples'] if s['feedback']}
    assert any(told) and {json.loads(key)[0] % 2 for key in everything} == {0, 1}
    for first in range(0, len(ranks), sharers):
        assert all(one == told[first] for one in told[first : first + sharers])
    assert not any(json.loads(key)[0] % 2 for key in told[-1])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_feedback_that_fails_on_one_rank_ends_all(found, layout):
    ranks, sharers = found.ranks(layout, 'feedback_fails'), LAYOUTS[layout][1]
    for number, error in enumerate(one['error'] for one in ranks):
        assert error.startswith('RewardError')
        assert ('--gkd_feedback short returned 7' if number >= len(ranks) - sharers else 'failed on another rank') in error


@pytest.mark.parametrize('layout', LAYOUTS)
def test_balanced_micro_batches_are_the_same_training(found, layout):
    """Also of a run that goes on from a checkpoint in the middle of a cycle."""
    ranks, (owners, sharers) = found.ranks(layout, 'balanced'), LAYOUTS[layout]
    plain = found.alone('balanced')['plain']
    for how in ('plain', 'balanced', 'tokens', 'server'):
        for one in ranks:
            assert one[how]['losses'] == pytest.approx(
                found.alone('balanced')['server' if how == 'server' else 'plain']['losses'], rel=1e-9
            )
            assert one[how]['resumed']['losses'] == one[how]['losses'][3:]
        trained = by_row(*(sample for one in ranks for sample in one[how]['samples']))
        assert how == 'server' or trained == by_row(*plain['samples'])
    slowest = {
        how: [max(map(sum, sizes)) for sizes in zip(*(one[how]['sizes'] for one in ranks), strict=True)] for how in ('plain', 'balanced')
    }
    if owners > 1:
        assert sum(slowest['balanced']) < 0.95 * sum(slowest['plain'])
        rows = [
            [{s['key'][0] for step in one[how]['steps'] for b in step for s in b} for one in ranks[::sharers]]
            for how in ('plain', 'server')
        ]
        assert rows[0] == rows[1]  # they stay where the server is asked about them
    for sizes in zip(*(one['tokens']['sizes'] for one in ranks), strict=True):
        assert len({len(of_rank) for of_rank in sizes}) == 1
        assert all(size <= 100 for of_rank in sizes for size in of_rank)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_one_rank_reads_a_stream_for_all(found, layout):
    ranks, alone = found.ranks(layout, 'stream'), found.alone('stream')
    same_training(ranks, alone)
    assert [one['passes'] for one in ranks] == [3] + [0] * (len(ranks) - 1)  # 40 of 14 rows
    for one in ranks:
        assert one['resumed']['losses'] == one['losses'][3:]
        assert one['evaluation'] == pytest.approx(alone['evaluation'], rel=1e-6) and one['evaluation']['rows'] == 7


@pytest.mark.parametrize('layout', SEVERAL)
def test_completions_have_each_response_once_with_the_divergence_of_all_its_tokens(found, layout):
    ours, expected = found.completions(layout, 'training'), found.completions('alone', 'training')
    divergences = [[line.pop('divergence') for line in lines] for lines in (ours, expected)]
    assert ours == expected and divergences[0] == pytest.approx(divergences[1], rel=1e-5)
    assert all(divergence > 0 for divergence in divergences[0])


@pytest.mark.parametrize('layout', SEVERAL)
def test_a_server_is_asked_once_for_ranks_with_the_same_rows(found, layout):
    sharers, ranks, alone = LAYOUTS[layout][1], found.ranks(layout, 'training'), found.alone('training')
    for what in ('scored', 'answered'):
        assert sum(one[what] for one in ranks) == alone[what] > 0
        assert all((one[what] > 0) == (number % sharers == 0) for number, one in enumerate(ranks))


@pytest.mark.parametrize('layout', SEVERAL)
def test_a_response_counts_once_for_ranks_with_the_same_rows(found, layout):
    for speeds in found.ranks(layout, 'speed'):
        assert speeds == pytest.approx(found.alone('speed'), rel=1e-9)


@pytest.mark.parametrize('layout', SEVERAL)
def test_the_engine_is_asked_by_all_ranks_or_by_none(found, layout):
    ranks = found.ranks(layout, 'empty_shares')
    shares = list(zip(*(one['students'] for one in ranks), strict=True))
    asked = [step for step, share in enumerate(shares) if any(share)]
    assert len(asked) < len(shares) and (layout == '2 sharers' or any(min(share) == 0 < max(share) for share in shares))
    for number, one in enumerate(ranks):
        assert [(key, prompts) for key, prompts, _ in one['calls']] == [([step, 0], shares[step][number]) for step in asked]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_prefetch_resumes_and_has_a_speed_on_every_rank(found, layout):
    for one in found.ranks(layout, 'prefetch'):
        assert one['resumed']['losses'] == pytest.approx(one['losses'][2:], rel=1e-12)
        assert all(speed > 0 for speed in one['speeds'])


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('case', ['gone_while_scoring', 'gone_while_answering'])
def test_a_server_that_is_gone_for_one_ends_all_ranks_and_nothing_is_lost(found, layout, case):
    ranks, sharers = found.ranks(layout, case), LAYOUTS[layout][1]
    for dies_after in ('1', '9'):
        gone = [one[dies_after] for one in ranks]
        for number, one in enumerate(gone):
            assert one['error'].startswith('TeacherServerError') and one['complete'] and one['step'] == gone[0]['step']
            failed = number == len(ranks) - sharers  # it asks for the last owner's rows
            assert ('http://teacher:1 is gone' if failed else 'of 1 other ranks gave up') in one['error']
            whole, rest = ranks[number]['whole'], one['resumed']
            assert rest['losses'] == pytest.approx(whole['losses'][one['step'] :], rel=1e-12)
            assert rest['samples'] == whole['samples'][len(whole['samples']) - len(rest['samples']) :]
        for first in range(0, len(ranks), sharers):  # ranks with the same rows keep the same
            assert all(one['responses'] == gone[first]['responses'] for one in gone[first : first + sharers])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_server_that_is_gone_in_an_evaluation_leaves_a_checkpoint(found, layout):
    for one in found.ranks(layout, 'gone_while_evaluating'):
        assert one['error'].startswith('TeacherServerError') and one['complete']
        assert one['resumed']['losses'] == pytest.approx(one['whole']['losses'][2:], rel=1e-12)
        assert one['resumed']['samples'] == one['whole']['samples'][-len(one['resumed']['samples']) :]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_loss_that_is_no_number_stops_all_ranks_before_the_update(found, layout):
    sharers = LAYOUTS[layout][1]
    for number, one in enumerate(found.ranks(layout, 'not_a_number')):
        assert one['error'].startswith('FloatingPointError: The loss of step 2 is not finite')
        assert (f'here with row {one["row"]} of epoch 0' if number < sharers else 'on other ranks') in one['error']
        assert one['step'] == 1 and one['losses'] == one['whole'][:1]


@pytest.mark.parametrize('layout', SEVERAL)
def test_evaluation_is_the_same_in_any_layout(found, layout):
    alone = found.alone('evaluation')
    for one in found.ranks(layout, 'evaluation'):
        for source, results in one.items():
            for result in results:
                assert result == pytest.approx(alone[source][0], rel=1e-6) and result['rows'] == 13


@pytest.mark.parametrize('case', ['one_rank_cannot_encode', 'one_rank_cannot_encode_of_a_stream'])
def test_what_one_rank_cannot_encode_none_of_those_with_the_same_rows_trains(found, case):
    """The same row stands in on both, or, of a stream, both leave it out: as one process does that fails on all these rows."""
    alone = found.alone(case)
    same_training(found.ranks('2 sharers', case), alone)
    if case == 'one_rank_cannot_encode':
        content = [row['key'] for row in alone['samples']]
        assert [3, 0, 0] in content and [8, 0, 0] in content  # other rows stand in under their numbers
    else:
        assert not {3, 8} & {row['key'][0] for row in alone['samples']}


def test_owners_need_not_agree_on_rows(found):
    """Those of 2 x 2 that have the same rows train on the same ones."""
    ranks = found.ranks('2 x 2', 'one_rank_cannot_encode')
    assert ranks[0]['samples'] == ranks[1]['samples'] and ranks[2]['samples'] == ranks[3]['samples']


@pytest.mark.parametrize('layout', ['alone', *SHARING])
def test_what_one_rank_cannot_encode_is_left_out_of_an_evaluation(found, layout):
    for one in found.ranks(layout, 'one_rank_cannot_encode_in_an_evaluation'):
        assert one['rows'] == (found.alone('one_rank_cannot_encode_in_an_evaluation')['rows'] if layout != '2 x 2' else one['rows'])
        assert one['rows'] < 14 and one['loss'] == found.ranks(layout, 'one_rank_cannot_encode_in_an_evaluation')[0]['loss']


def test_ranks_that_encode_a_row_differently_stop_and_name_it(found):
    for one in found.ranks('2 sharers', 'another_encoding'):
        for error in (one['error'], one['evaluation']):
            assert error.startswith('RuntimeError: Step') and 'encoded them differently' in error
            assert 'row 5 of epoch 0' in error and error.count('row ') == 1
        assert 5 not in one['rows']


def test_owners_may_have_what_rows_they_like(found):
    assert all(one['error'] == 'no error' and one['steps'] == 4 for one in found.ranks('2 owners', 'another_encoding'))
