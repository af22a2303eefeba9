"""From rows to the micro-batches of a step: sources, generation cycles of any length, prefetch, several responses, the end of an epoch."""

from __future__ import annotations

import threading

import pytest
from datasets import Dataset
from fake_backend import FakeServer, flat
from rank_cases import Stream

from swift_gkd_plugin import sources
from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.step.said import how_to_find, in_one_line, names_of

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
    assert len(set(keys)) == len(keys)  # an engine's seeds are made of it
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


class NumberedLike:
    """A dataset with another row in one place."""

    def __init__(self, dataset, row: dict, number: int):
        self.dataset, self.row, self.number = dataset, row, number

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict:
        return self.row if number == self.number else self.dataset[number]


def test_a_stream_goes_round_and_leaves_out_what_does_not_fit(make, rows, said):
    rows = [too_long(rows[i]) if i == 2 else rows[i] for i in range(7)]
    run = make(dataset=Stream(rows), lmbda=0, max_steps=4).train()
    assert [one['key'][:2] for one in flat(run)] == [[row, epoch] for epoch in range(2) for row in range(7) if row != 2]
    assert sum('row 2 of epoch' in line and 'is left out' in line for line in said) == 2


def test_another_row_stands_in_for_one_that_does_not_fit(make, rows, said):
    rows = [too_long(rows[i]) if i == 2 else rows[i] for i in range(10)]
    run = make(dataset=Dataset.from_list(rows), lmbda=0, max_steps=3).train()
    other = sources.replacement_row(42, 0, 2, 0, 10)
    (found,) = [one for one in flat(run) if one['key'][0] == 2]
    assert found['question'] == rows[other]['messages'][0]['content'] and f'row {other} stands in' in ' '.join(said)


@pytest.mark.parametrize('number', [10, 1])
def test_a_dataset_of_which_nothing_fits_is_one_error_and_no_other_line(make, rows, said, number):
    run = make(dataset=Dataset.from_list([too_long(row) for row in rows[:number]]), lmbda=0, steps_per_generation=4)
    check, checked = run.conductor.encoder.check, []
    run.conductor.encoder.check = lambda sample: checked.append(1) or check(sample)
    with pytest.raises(OptionError) as error:
        run.train()
    message, tries = str(error.value), 51 if number > 1 else 1
    assert f'and {number - 1} other rows' in message and f'{tries} x MaxLengthError' in message and 'raise --max_length 128' in message
    assert len(message.splitlines()) == 1
    assert not [line for line in said if 'cannot be encoded' in line]
    assert len(checked) == 2 * tries  # of the first row, where it is read and where all ranks hear of it


def test_a_stream_of_which_nothing_fits_ends(make, rows):
    run = make(dataset=Stream([too_long(row) for row in rows[:10]]), lmbda=0, max_steps=100)
    with pytest.raises(OptionError, match=r'none of the first 51 rows of the stream can be encoded .*raise --max_length 128'):
        run.train()
    half = [too_long(row) for row in rows[:30]] + rows[30:31]
    assert len(make(dataset=Stream(half), lmbda=0, max_steps=30).train().steps) == 30


@pytest.mark.parametrize('streams', [False, True])
def test_of_many_rows_that_do_not_fit_a_few_are_named_and_the_rest_is_counted(make, rows, said, streams):
    rows = [too_long(row) if i % 2 else row for i, row in enumerate(rows[:20])]
    make(dataset=Stream(rows) if streams else Dataset.from_list(rows), lmbda=0, max_steps=20).train()
    about = [line for line in said if 'be encoded' in line]
    assert len(about) == 5 + 3 and sum('is left out' in line if streams else 'stands in' in line for line in about[:5]) == 5
    assert [line.split()[0] for line in about[5:]] == ['10', '20', '40']


def test_rows_of_an_evaluation_that_do_not_fit_are_not_named_again_and_again(make, rows, said):
    run = make(dataset=Dataset.from_list(rows[:4]))
    for _ in range(8):
        run.evaluate(Dataset.from_list([too_long(rows[0]), *rows[1:4]]))
    assert sum(line.startswith('evaluation: row 0 of epoch 0') for line in said) == 5
    assert sum('1 rows of the evaluation set cannot be encoded' in line for line in said) == 8


def test_a_row_is_named_by_what_its_user_knows_of_it(make, rows, said):
    """Its number is that after ms-swift has shuffled."""
    broken = {
        'messages': [{'role': 'user', 'content': 'What does\n<image> show? ' * 9}],
        'images': ['/photos/a.png', {'path': 'b.png'}, b'x'],
    }
    run = make(dataset=Dataset.from_list(rows[:10]), lmbda=0, max_steps=3)
    run.dataset = NumberedLike(run.dataset, broken, 2)

    def check(sample, stock=run.conductor.encoder.check) -> None:
        if sample.content is broken:
            raise OSError('no such file\nanywhere')
        stock(sample)

    run.conductor.encoder.check = check
    run.train()
    (line,) = [line for line in said if 'stands in' in line]
    assert 'row 2 of epoch 0 (dataset) "What does <image> show? What does <image…" with /photos/a.png, b.png, bytes cannot' in line
    assert line.endswith('stands in: no such file anywhere')


def test_what_is_said_of_odd_rows():
    assert how_to_find({}) == '""' and how_to_find({'messages': [{'role': 'system', 'content': 'x'}], 'images': None}) == '""'
    parts = [{'type': 'image'}, {'type': 'text', 'text': 'and this?'}]
    assert how_to_find({'messages': [{'role': 'user', 'content': parts}], 'videos': 'v.mp4'}) == '"and this?" with v.mp4'
    many = how_to_find({'messages': [], 'videos': [['1.png', '2.png']], 'images': [f'{i}.png' for i in range(9)]})
    assert many == '"" with 0.png, 1.png, 2.png, 3.png, 4.png and 5 more'
    assert len(how_to_find({'images': ['data:image/png;base64,' + 'A' * 10**6]})) < 400
    assert names_of(list(range(12))) == '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more' and in_one_line(ValueError()) == 'ValueError'


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
