"""From rows to the micro-batches of a step: sources, generation cycles of any length, prefetch, several responses, the end of an epoch."""

from __future__ import annotations

import threading

import pytest
from datasets import Dataset
from fake_backend import FakeServer, flat
from rank_cases import Stream

from swift_gkd_plugin import sources
from swift_gkd_plugin.arguments import OptionError

# -- sources -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('lmbda', 'seq_kd'), [(0, False), (1, False), (0, True), (0.5, False), (0.5, True)])
def test_each_sample_has_the_source_of_its_own_coin(make, lmbda, seq_kd):
    run = make(lmbda=lmbda, seq_kd=seq_kd).train()
    for one in flat(run):
        row, epoch, _ = one['key']
        assert one['source'] == sources.draw_source(sources.uniform(42, epoch, row), lmbda, seq_kd)
        assert (one['response'] is None) == (one['source'] == 'dataset')


@pytest.mark.parametrize('server', [False, True], ids=['local', 'server, which is asked ahead'])
def test_one_coin_for_a_cycle(make, server):
    """Of two micro-batches: --gkd_source_per batch."""
    teacher = {'teacher': 'server', 'server': FakeServer()} if server else {}
    sizes = {'gradient_accumulation_steps': 4, 'steps_per_generation': 2, 'per_device_train_batch_size': 1}
    run = make(gkd_source_per='batch', max_steps=8, **sizes, **teacher)
    drawn = set()
    for step, batches in enumerate(run.train().steps):
        for cycle, both in enumerate(zip(batches[::2], batches[1::2], strict=True)):
            (source,) = {one['source'] for batch in both for one in batch if one['counts']}
            assert source == sources.draw_source(sources.uniform(42, step, cycle, 'cycle'), 0.5, False)
            drawn.add(source)
    assert drawn == {'student', 'dataset'}


def test_a_response_depends_on_its_row_and_the_weights_alone(make):
    """Not on the micro-batch it is in, nor on who else is asked."""
    small = make(lmbda=1, per_device_train_batch_size=1, gradient_accumulation_steps=4, steps_per_generation=4)
    large = make(lmbda=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=1)
    assert flat(small.train()) == flat(large.train()) and small.losses == pytest.approx(large.losses, rel=1e-12)


def test_the_teacher_answers_and_looks_from_its_own_view(make):
    plain, told = (make(lmbda=0, seq_kd=True, gkd_teacher_system=system).train() for system in (None, 'You know it.'))
    assert all(a['response'] != b['response'] for a, b in zip(flat(plain), flat(told), strict=True))
    server = FakeServer(scores_with_answers=False)
    make('server', server, lmbda=0, gkd_teacher_system='You know it.', max_steps=1).train()
    text = [plain.backend.template.safe_decode(ids) for ids in server.scored]
    assert len(text) == 4 and all('You know it.' in one for one in text)


def test_the_teacher_has_limits_and_the_student_its_own(make):
    run = make(seq_kd=True, max_completion_length=3, gkd_teacher_max_completion_length=12, max_steps=8).train()
    longest = {source: max(len(one['response'][0]) for one in flat(run) if one['source'] == source) for source in ('student', 'teacher')}
    assert longest['student'] <= 3 < longest['teacher'] <= 12


# -- cycles --------------------------------------------------------------------------------------------------------------------------------

# (accumulation, micro-batches of a cycle): shorter than a step, as long, a multiple, and neither
LENGTHS = [(4, 1), (4, 2), (2, 2), (2, 4), (1, 3), (2, 3), (3, 2)]


@pytest.mark.parametrize(('accumulation', 'length'), LENGTHS)
@pytest.mark.parametrize('prefetch', [False, True], ids=['now', 'ahead'])
def test_every_row_once_per_epoch_from_the_weights_that_its_cycle_has(make, accumulation, length, prefetch):
    steps = -(-10 // accumulation)  # of an epoch; its last window has what is left
    options = {'per_device_train_batch_size': 1, 'gradient_accumulation_steps': accumulation, 'steps_per_generation': length}
    run = make(lmbda=1, use_vllm=True, gkd_prefetch=prefetch, max_steps=2 * steps, **options).train()
    samples = flat(run)
    assert sorted((one['key'][1], one['key'][0]) for one in samples) == [(epoch, row) for epoch in range(2) for row in range(10)]
    for number, one in enumerate(samples):
        epoch, place = divmod(number, 10)
        first = place - place % length  # the cycle's first micro-batch
        needed = first // accumulation
        # One cycle can be under way while a step trains: the first that the next step lacks, and none across the end of an epoch.
        ahead = prefetch and first > 0 and (first - length) // accumulation < needed
        assert one['generated_at'] == epoch * steps + needed - ahead
    keys = [key for key, _, _ in run.backend.engine_calls]
    assert len(set(keys)) == len(keys)  # F22: an engine's seeds are made of it
    assert len({str(one['response']) for one in samples}) == len(samples)


@pytest.mark.parametrize('prefetch', [False, True], ids=['now', 'ahead'])
def test_fewer_micro_batches_come_where_rows_end(make, prefetch):
    run = make(lmbda=1, use_vllm=True, gkd_prefetch=prefetch, steps_per_generation=3)
    run.conductor.begin(run.dataset)
    rows, _ = next(run.epochs())
    lengths = []
    for step in range(4):
        run.backend.step = step
        lengths.append(len(run.conductor.next_step(rows, 2, 3)))
        assert run.conductor.num_batches == max(lengths[-1], 1)
    assert lengths == [2, 2, 1, 0] and run.conductor.tokens == 1


@pytest.mark.parametrize('prefetch', [False, True], ids=['now', 'ahead'])
def test_rows_without_end_fill_the_last_step_of_an_epoch(make, prefetch):
    """As Megatron needs it; the fillers weigh nothing."""
    options = {'use_vllm': True, 'gkd_prefetch': prefetch, 'learning_rate': 0, 'steps_per_generation': 4, 'max_steps': 6}
    endless, epochs = make(endless=True, **options).train(), make(**options).train()
    assert [len(step) for step in endless.steps] == [2] * 6 and [len(step) for step in epochs.steps] == [2, 2, 1] * 2
    assert [one['key'] for one in flat(endless)] == [one['key'] for one in flat(epochs)]
    assert [log['source/student'] for log in endless.logs] == [log['source/student'] for log in epochs.logs]


def test_the_engine_is_asked_ahead_and_not_in_the_last_step(make):
    run = make(lmbda=1, use_vllm=True, gkd_prefetch=True, steps_per_generation=1, max_steps=5).train()
    assert [key for key, _, ahead in run.backend.engine_calls if ahead] == [(0, 2), (1, 1), (3, 2)]  # of 5 micro-batches in an epoch
    assert not run.backend.ahead


def test_a_step_does_not_wait_for_the_cycle_that_it_has_begun(make):
    """The engine does not answer before the step has trained."""
    run = make(lmbda=1, use_vllm=True, gkd_prefetch=True)
    run.conductor.begin(run.dataset)
    rows, _ = next(run.epochs())
    begin = run.backend.ahead.begin

    def slowly(*arguments) -> None:
        run.backend.slow = threading.Event()
        begin(*arguments)

    run.backend.ahead.begin = slowly
    run.one_step(rows, 2)
    assert run.backend.ahead and not run.backend.slow.is_set()
    run.backend.slow.set()
    run.one_step(rows, 2)
    assert [one['generated_at'] for one in flat(run)] == [0] * 8


def too_long(row: dict) -> dict:
    return {'messages': [row['messages'][0], {'role': 'assistant', 'content': 'very ' * 200}]}


def test_a_stream_goes_round_and_leaves_out_what_does_not_fit(make, rows, said):
    rows = [
        {'messages': [rows[i]['messages'][0], {'role': 'assistant', 'content': 'very ' * 200}]} if i == 2 else rows[i] for i in range(7)
    ]
    run = make(dataset=Stream(rows), lmbda=0, max_steps=4).train()
    assert [one['key'][:2] for one in flat(run)] == [[row, epoch] for epoch in range(2) for row in range(7) if row != 2]
    assert sum('row 2 of epoch' in line and 'is left out' in line for line in said) == 2


def test_another_row_stands_in_for_one_that_does_not_fit(make, rows, said):
    rows = [
        {'messages': [rows[i]['messages'][0], {'role': 'assistant', 'content': 'very ' * 200}]} if i == 2 else rows[i] for i in range(10)
    ]
    run = make(dataset=Dataset.from_list(rows), lmbda=0, max_steps=3).train()
    other = next(n for n in (sources.replacement_row(42, 0, 2, i, 10) for i in range(50)) if n != 2)
    (found,) = [one for one in flat(run) if one['key'][0] == 2]
    assert found['question'] == rows[other]['messages'][0]['content'] and f'row {other} stands in' in ' '.join(said)


def test_a_dataset_of_which_nothing_fits_is_said(make, rows):
    rows = [too_long(row) for row in rows[:10]]
    with pytest.raises(OptionError, match=r'50 other rows cannot be encoded .*raise --max_length'):
        make(dataset=Dataset.from_list(rows), lmbda=0).train()


# -- several responses per prompt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seq_kd', [False, True])
def test_several_responses_per_prompt_and_one_of_the_dataset(make, seq_kd):
    run = make(gkd_num_samples=3, seq_kd=seq_kd, learning_rate=0, max_steps=8).train()
    by_row: dict = {}
    for one in flat(run):
        if one['key'][1] == 0:
            by_row.setdefault(one['key'][0], []).append(one)
    assert sorted(by_row) == list(range(10))
    for row, samples in by_row.items():
        source = sources.draw_source(sources.uniform(42, 0, row), 0.5, seq_kd)
        assert {one['source'] for one in samples} == {source}
        assert sorted(one['key'][2] for one in samples) == ([0] if source == 'dataset' else [0, 1, 2])
        assert len({str(one['response']) for one in samples}) == len(samples)


def test_a_filler_is_kept_where_all_responses_of_a_micro_batch_are_there_already(make):
    """--gkd_source_per batch tells too late for the order of the rows that a response of the dataset comes once."""
    run = make(gkd_num_samples=4, gkd_source_per='batch', per_device_train_batch_size=2, max_steps=8).train()
    batches = [batch for step in run.steps for batch in step]
    assert {one['source'] for one in flat(run)} == {'student', 'dataset'} and all(batches)
    assert all(one['key'][2] == 0 for one in flat(run) if one['source'] == 'dataset')
    assert any(not one['counts'] for batch in batches for one in batch)
    assert len(flat(run)) == len({str(one['key']) for one in flat(run)})


def test_a_filler_weighs_nothing(make):
    run = make(gkd_num_samples=4, gkd_source_per='batch', per_device_train_batch_size=2, max_steps=8).train()
    for step, log in zip(run.steps, run.logs, strict=True):
        counted = [one for batch in step for one in batch if one['counts']]
        assert (log['tokens/trained'] > 0) == bool(counted)
        generated = sum(len(one['response'][0]) for one in counted if one['response'])
        assert log['tokens/trained'] == generated or any(one['source'] == 'dataset' for one in counted)
