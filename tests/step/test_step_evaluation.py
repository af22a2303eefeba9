"""An evaluation measures one thing: the mean over the trained tokens of the whole set, however it is batched."""

from __future__ import annotations

import pytest
from datasets import Dataset
from fake_backend import FakeServer, flat

from swift_gkd_plugin.step import teaching
from swift_gkd_plugin.teachers.server import TeacherServerError

WAYS = [(1, 1), (1, 3), (2, 1), (2, 4), (5, 2), (16, 1)]


@pytest.mark.parametrize('source', ['dataset', 'student', 'teacher'])
@pytest.mark.parametrize('engine', [False, True], ids=['in process', 'engine'])
def test_the_same_result_however_it_is_batched_and_at_any_time(make, dataset, source, engine):
    if engine and source == 'student':
        # An engine's seeds belong to the call: the same way gives the same result.
        run = make(gkd_eval_source=source, use_vllm=True, learning_rate=0, max_steps=2)
        before = run.evaluate(dataset)
        assert run.train() and run.evaluate(dataset) == before
        return
    found = [make(gkd_eval_source=source, use_vllm=engine).evaluate(dataset, *way) for way in WAYS]
    for one in found:
        assert one == pytest.approx(found[0], rel=1e-9) and one['rows'] == 10 and one['tokens'] > 10
    run = make(gkd_eval_source=source, use_vllm=engine, learning_rate=0, lmbda=1, steps_per_generation=4)
    before = run.evaluate(dataset)
    assert before == pytest.approx(found[0], rel=1e-9) and run.train() and run.evaluate(dataset) == before


def test_a_temperature_of_its_own(make):
    run = make(gkd_eval_source='student', gkd_eval_temperature=0.0, gkd_teacher_temperature=0.4)
    answers = run.conductor.answers
    assert [answers.temperature(source) for source in ('student', 'teacher')] == [1.0, 0.4]
    with run.conductor.books.of_evaluation():
        assert [answers.temperature(source) for source in ('student', 'teacher')] == [0.0, 0.0]


def test_it_is_divergence_plus_cross_entropy_of_every_token(make, dataset):
    found = {source: make(gkd_eval_source=source, sft_alpha=0.5).evaluate(dataset) for source in ('dataset', 'student', 'teacher')}
    for source, one in found.items():
        assert one['cross_entropy'] == pytest.approx(1)  # of the untrained student, on its own tokens too
        assert one['loss'] == pytest.approx(one['divergence'] + (0.5 if source != 'student' else 0))
    assert len({one['divergence'] for one in found.values()}) == 3


@pytest.mark.parametrize('source', ['dataset', 'student', 'teacher'])
@pytest.mark.parametrize(('kept', 'visits'), [(None, 10), (1, 1), (1 << 40, 10)])
def test_a_teacher_from_the_host_comes_for_as_much_as_may_be_kept(make, dataset, source, kept, visits):
    """An engine's seeds stay those of the rows that are answered together."""
    options = dict(gkd_eval_source=source, use_vllm=True)
    plain, run = make(**options), make(**options)
    run.backend.kept_per_token = kept
    assert run.evaluate(dataset, 1, 1) == pytest.approx(plain.evaluate(dataset, 1, 1), rel=1e-9)
    assert len(run.backend.looked_at) == visits
    assert run.backend.engine_calls == plain.backend.engine_calls


def test_what_is_kept_of_an_evaluation_has_a_limit(make, dataset, monkeypatch):
    run = make()
    run.backend.kept_per_token = 4
    lengths = []
    length = run.conductor.encoder.teacher_length
    monkeypatch.setattr(run.conductor.encoder, 'teacher_length', lambda sample: lengths.append(length(sample)) or lengths[-1])
    whole = run.evaluate(dataset, 1, 1)
    limit = 4 * max(lengths) * 3
    monkeypatch.setattr(teaching, 'KEPT_BYTES', limit)
    other = make()
    other.backend.kept_per_token = 4
    assert other.evaluate(dataset, 1, 1) == pytest.approx(whole, rel=1e-9)
    of_row = dict(zip(range(len(dataset)), lengths, strict=False))
    visits = [[row for batch in visit for row in batch] for visit in other.backend.looked_at]
    assert 1 < len(visits) < 10
    assert sorted(row for visit in visits for row in visit) == list(range(10))
    assert all(4 * sum(of_row[row] for row in visit) <= limit for visit in visits)


def test_without_a_teacher_there_is_no_divergence(make, dataset):
    found = make(None, gkd_loss_weight=0.0, sft_alpha=1.0, lmbda=0).evaluate(dataset)
    assert set(found) == {'loss', 'cross_entropy', 'tokens', 'rows'} and found['loss'] == pytest.approx(1)


def test_by_a_server_it_is_the_same(make, dataset):
    for source in ('dataset', 'teacher'):
        server = make('server', FakeServer(), gkd_eval_source=source).evaluate(dataset, 3, 2)
        again = make('server', FakeServer(scores_with_answers=False), gkd_eval_source=source).evaluate(dataset, 2, 1)
        assert server == pytest.approx(again, rel=1e-9)
        if source == 'dataset':
            assert server == pytest.approx(make().evaluate(dataset), rel=1e-6)


def test_rows_that_do_not_fit_are_left_out_and_counted(make, rows, said):
    long = {'messages': [rows[2]['messages'][0], {'role': 'assistant', 'content': 'very ' * 200}]}
    whole, part = Dataset.from_list([*rows[:2], long, *rows[3:10]]), Dataset.from_list([*rows[:2], *rows[3:10]])
    for way in WAYS:
        assert make().evaluate(whole, *way) == pytest.approx(make().evaluate(part, *way), rel=1e-9)
    assert sum('1 rows of the evaluation set cannot be encoded (--max_length 128)' in line for line in said) == len(WAYS)


def test_training_goes_on_as_if_there_had_been_none(make, dataset):
    """Also where a cycle is under way, and with engines."""
    for options in ({'steps_per_generation': 4}, {'use_vllm': True, 'gkd_prefetch': True, 'gkd_eval_source': 'student'}):
        plain, evaluated = make(max_steps=4, **options), make(max_steps=4, **options)
        step = evaluated.one_step

        def and_evaluate(*arguments, run=evaluated, step=step) -> None:
            step(*arguments)
            run.evaluate(dataset)

        evaluated.one_step = and_evaluate
        assert flat(evaluated.train()) == flat(plain.train()) and evaluated.losses == plain.losses
        assert evaluated.completions == plain.completions


@pytest.mark.parametrize('source', ['dataset', 'teacher'])
def test_a_server_that_is_gone_leaves_a_checkpoint_with_what_exists(make, dataset, said, source):
    """Of the cycle that waits for its step, nothing is asked for again."""
    options = {'lmbda': 0.4, 'seq_kd': True, 'steps_per_generation': 4, 'max_steps': 2, 'gkd_eval_source': source}
    whole = make('server', FakeServer(), **options).train()
    server = FakeServer()
    run = make('server', server, **{**options, 'max_steps': 1}).train()
    run.conductor.metrics.add('kept', 1)
    server.left = 3
    with pytest.raises(TeacherServerError, match='is gone'):
        run.evaluate(dataset)
    assert run.backend.is_complete(run.backend.checkpoint) and f'--resume_from_checkpoint {run.backend.checkpoint}' in ' '.join(said)
    assert run.conductor.logged()['kept'] == 1
    later = FakeServer()
    resumed = make('server', later, **options).train(run.backend.checkpoint)
    assert resumed.steps == whole.steps[1:] and resumed.losses == whole.losses[1:] and later.answered == []


def test_before_any_training_there_is_nothing_to_keep(make, dataset):
    run = make('server', FakeServer(3))
    with pytest.raises(TeacherServerError):
        run.evaluate(dataset)
    assert run.backend.saved == []
