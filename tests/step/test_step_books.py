"""What is booked of a step: the denominator, metrics, completions, tables, warnings, saved answers; and the end of a run on NaN."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fake_backend import FakeServer, flat
from places import Places

from swift_gkd_plugin import metrics
from swift_gkd_plugin.divergence import TokenStats
from swift_gkd_plugin.responses.local import inference_template
from swift_gkd_plugin.teachers.server import TeacherServerError

# -- the loss ------------------------------------------------------------------------------------------------------------------------------


def test_a_step_is_divided_by_its_own_tokens_however_it_is_split(make):
    runs = [
        make(
            lmbda=0.5, seq_kd=True, per_device_train_batch_size=size, gradient_accumulation_steps=parts, steps_per_generation=parts
        ).train()
        for size, parts in ((1, 5), (5, 1))
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-12)
    assert torch.equal(runs[0].backend.weights > 0, runs[1].backend.weights > 0)
    assert runs[0].backend.weights.tolist() == pytest.approx(runs[1].backend.weights.tolist(), rel=1e-9)


def test_no_float64_on_the_device(make):
    """MPS has none, and not every library of collectives reduces it."""
    torch.manual_seed(0)
    books, device = make().conductor.books, torch.device('mps')
    books.ranks, books.metrics = dataclasses.replace(books.ranks, device=device), metrics.Metrics(device)
    lost = torch.rand(50, 7) + 1e-6
    with Places():
        for row in lost:
            batch = SimpleNamespace(imitated=torch.ones(7).to(device), lengths=[7], samples=[SimpleNamespace()], advantages=None)
            stats = TokenStats(True, *([row.to(device)] * 10))
            books.add_loss(batch, row.to(device).sum(), stats)
        books.metrics.total('tokens/generated', 2**40 + 1)
        found = books.metrics.pop()
    assert found.pop('tokens/generated') == 2**40 + 1
    assert len(found) == 10 and list(found.values()) == pytest.approx([lost.double().mean().item()] * 10, rel=1e-7)


@pytest.mark.parametrize('device', ['cpu', 'mps'])
def test_counts_are_exact(device):
    kept = metrics.Metrics(torch.device(device))
    with Places():
        for count in (2.0**24, 1.0, 2.0**30, 1.0, 1.0):
            kept.add('count', torch.tensor(count), 0)
        kept.add('count', 1, 1)
        assert kept.pop() == {'count': 2**30 + 2**24 + 4}


def test_a_server_and_a_local_teacher_teach_the_same(make):
    local = make(lmbda=0.5, max_steps=5).train()
    server = make('server', FakeServer(), lmbda=0.5, max_steps=5).train()
    assert server.losses == pytest.approx(local.losses, rel=1e-12) and server.steps == local.steps
    for looked, step in zip(local.backend.looked_at, local.steps, strict=True):
        assert sorted(row for batch in looked for row in batch) == sorted(one['key'][0] for batch in step for one in batch)
    assert server.backend.looked_at == []


def test_without_weight_nobody_looks(make):
    server = FakeServer()
    run = make('server', server, lmbda=0, seq_kd=True, gkd_loss_weight=0.0, sft_alpha=1.0, max_steps=2).train()
    local = make(lmbda=0, gkd_loss_weight=0.0, sft_alpha=1.0, max_steps=2).train()
    assert len(server.answered) == 8 and server.scored == [] and local.backend.looked_at == []
    for one in (run, local):
        assert all('divergence' not in log and log['loss'] == pytest.approx(log['cross_entropy']) for log in one.logs)


def test_cross_entropy_is_of_tokens_that_the_student_did_not_generate(make):
    run = make(lmbda=1, sft_alpha=1.0, max_steps=1).train()
    assert 'cross_entropy' not in run.logs[0] and run.logs[0]['loss'] == pytest.approx(run.logs[0]['divergence'])
    mixed = make(lmbda=0.5, sft_alpha=1.0, learning_rate=0, max_steps=3).train()
    log = next(log for log in mixed.logs if 0 < log['source/student'] < 1)
    assert log['cross_entropy'] == pytest.approx(1) and log['divergence'] < log['loss'] < log['divergence'] + 1


def test_a_step_without_a_trained_token_is_said_and_changes_nothing(make, rows, said):
    rows = [{'messages': [row['messages'][0], {'role': 'assistant', 'content': 'x'}]} for row in rows[:10]]
    run = make(dataset=Dataset.from_list(rows), lmbda=0, max_steps=1)
    views = run.conductor.encoder.views

    def untrained(sample):
        student, teacher = views(sample)
        return {**student, 'labels': [-100] * len(student['labels'])}, teacher

    run.conductor.encoder.views = untrained
    run.train()
    assert run.losses == [0] and not run.backend.weights.any() and run.conductor.tokens == 1
    (line,) = [line for line in said if 'no token of the whole step is trained' in line]
    assert line.startswith('Step 1') and all(f'row {one["key"][0]} of epoch 0' in line for one in flat(run))


# -- the end of a run ----------------------------------------------------------------------------------------------------------------------


def test_nan_stops_before_the_update_and_names_step_rows_and_checkpoint(make):
    whole = make(lmbda=1, save_steps=1, max_steps=2).train()
    batch = [one['key'][0] for one in whole.steps[1][1]]
    run = make(lmbda=1, save_steps=1, max_steps=4)
    run.backend.nan = {batch[0]}
    with pytest.raises(FloatingPointError) as error:
        run.train()
    message = str(error.value)
    assert 'The loss of step 2 is not finite' in message and 'checkpoint-1' in message and '--learning_rate' in message
    assert all(f'row {row} of epoch 0 (student)' in message for row in batch) and message.count('row ') == 2
    assert run.backend.step == 1 and torch.load(run.backend.checkpoint + '/weights.pt')[1].equal(run.backend.weights)
    assert run.completions == whole.completions  # those of the step are written down all the same


def test_nan_before_the_first_checkpoint(make):
    run = make(lmbda=0)
    run.backend.nan = set(range(10))
    with pytest.raises(FloatingPointError, match=r'step 1 .*the last checkpoint is not written yet'):
        run.train()


def test_a_step_that_a_server_has_ended_leaves_the_random_numbers_as_they_were(make):
    """So the resumed run drops the same units out."""
    run = make('server', FakeServer(2), lmbda=1)
    look = run.backend.look

    def with_dropout(batch) -> torch.Tensor:
        torch.rand(3)
        return look(batch)

    run.backend.look = with_dropout
    before = torch.get_rng_state()
    with pytest.raises(TeacherServerError):
        run.train()
    assert torch.equal(torch.get_rng_state(), before) and not run.backend.weights.any()
    assert all(log == {} for log in run.logs) and run.completions == []


# -- metrics -------------------------------------------------------------------------------------------------------------------------------


def test_sources_and_lengths_are_those_of_the_samples(make):
    run = make(lmbda=0.4, seq_kd=True, max_steps=5).train()
    for step, log in zip(run.steps, run.logs, strict=True):
        samples = [one for batch in step for one in batch]
        for source in ('student', 'teacher', 'dataset'):
            assert log[f'source/{source}'] == sum(one['source'] == source for one in samples) / len(samples)
        lengths = [len(one['response'][0]) for one in samples if one['response']]
        assert log['response/length'] == pytest.approx(sum(lengths) / len(lengths))
        cut = [one['response'][1] == 'length' for one in samples if one['response']]
        assert log['response/cut_off'] == pytest.approx(sum(cut) / len(cut))


@pytest.mark.parametrize('prefetch', [False, True], ids=['now', 'ahead'])
def test_speed_is_tokens_per_second_of_sampling(make, prefetch, monkeypatch):
    """Positive with prefetch too. Every look at the clock is a second later than the one before."""
    run = make(lmbda=1, use_vllm=True, gkd_prefetch=prefetch, steps_per_generation=1, gradient_accumulation_steps=1, max_steps=5)
    clock = iter(range(10**6))
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(clock))
    run.train()
    speeds = [log['generation/tokens_per_second'] for log in run.logs]
    assert all(speed > 0 for speed in speeds)
    if not prefetch:
        assert speeds == [sum(len(one['response'][0]) for batch in step for one in batch) for step in run.steps]


def test_no_speed_where_nothing_was_sampled_or_it_took_no_time(make, monkeypatch):
    quiet = make(lmbda=0, max_steps=1).train()
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: 0.0)
    instant = make(lmbda=1, max_steps=1).train()
    for run in (quiet, instant):
        assert 'generation/tokens_per_second' not in run.logs[0]
        assert not {'tokens/generated', 'seconds/sampling'} & run.logs[0].keys()


def test_metrics_of_an_evaluation_are_not_those_of_training(make, dataset):
    plain, evaluated = make(lmbda=1, max_steps=1), make(lmbda=1, max_steps=1, gkd_eval_source='student')
    evaluated.evaluate(dataset)
    evaluated.conductor.metrics.add('kept', 1)
    evaluated.evaluate(dataset)
    log = evaluated.train().logs[0]
    assert log.pop('kept') == 1
    expected = plain.train().logs[0]
    assert {k: v for k, v in log.items() if 'second' not in k} == {k: v for k, v in expected.items() if 'second' not in k}


# -- completions ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('learning_rate', [0, 0.5])
def test_completions_hold_each_response_with_its_mean_divergence(make, learning_rate):
    run = make(lmbda=0.5, seq_kd=True, learning_rate=learning_rate, max_steps=3).train()
    generated = [one for one in flat(run) if one['response']]
    assert len(run.completions) == len(generated) == 10
    for line, one in zip(run.completions, generated, strict=True):
        ids, reason = one['response']
        assert (line['row'], line['epoch'], line['source'], line['gen_step']) == (*one['key'][:2], one['source'], one['generated_at'])
        assert line['length'] == len(ids) and line['finish_reason'] == reason
        assert line['completion'] == run.backend.template.safe_decode(ids)
        assert line['prompt'][-1]['content'] == one['question'] and line['divergence'] > 0
        if learning_rate == 0:  # the student is 0 everywhere
            assert line['divergence'] == pytest.approx(sum((i * 37 % 101 / 101) ** 2 for i in ids) / len(ids), rel=1e-5)
    assert [line['step'] for line in run.completions] == [n + 1 for n, step in enumerate(run.steps) for batch in step for _ in batch]


def test_completions_without_a_divergence_and_without_any(make):
    run = make(lmbda=0, seq_kd=True, gkd_loss_weight=0.0, sft_alpha=1.0, max_steps=1).train()
    assert [line['divergence'] for line in run.completions] == [None] * 4
    assert make(lmbda=1, log_completions=False, max_steps=1).train().completions == []
    assert make(lmbda=0, max_steps=1).train().completions == []


def prompt_text(run, messages: list[dict]) -> str:
    with inference_template(run.backend.template) as template:
        return template.safe_decode(template.encode({'messages': messages})['input_ids'])


class Table:
    def __init__(self, columns=None, data=None):
        self.columns, self.rows = columns, data

    def add(self, columns, rows):
        self.columns, self.rows = columns, rows
        return self


@pytest.mark.parametrize('logger', ['wandb', 'swanlab'])
@pytest.mark.parametrize('unique', [False, True])
def test_a_table_of_completions_where_a_run_reports_to(make, monkeypatch, logger, unique):
    tables: list[Table] = []

    def log(what, commit=True) -> None:
        assert commit == (logger == 'swanlab')  # the step's own numbers follow
        tables.append(what['completions'])

    wandb = SimpleNamespace(run=object(), Table=Table, log=log)
    swanlab = SimpleNamespace(get_run=object, echarts=SimpleNamespace(Table=Table), log=log)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setitem(sys.modules, 'swanlab', swanlab)
    options = {'lmbda': 1, 'max_steps': 4, 'gkd_num_samples': 2, 'wandb_log_unique_prompts': unique}
    run = make(report_to=[logger], **options).train()
    assert len(tables) == 4 and make(report_to=['tensorboard'], **options).train() and len(tables) == 4
    for step, table in enumerate(tables, 1):
        lines = [line for line in run.completions if line['step'] == step]
        assert table.columns == list(lines[0])
        # Under the names and in the form of ms-swift's tables: the prompt is the text that the model reads.
        assert {'step', 'gen_step', 'prompt', 'completion'} <= set(table.columns)
        texts = [prompt_text(run, line['prompt']) for line in lines]
        place = table.columns.index('prompt')
        shown = list(dict.fromkeys(texts)) if unique and logger == 'wandb' else texts
        assert [row[place] for row in table.rows] == shown and len(set(texts)) < len(texts)
    wandb.run, swanlab.get_run = None, lambda: None
    make(report_to=[logger], **options).train()
    assert len(tables) == 4


# -- answers of the teacher, kept ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_teachers_answers_are_a_dataset_that_trains_the_same(make, tmp_path, template):
    kept = tmp_path / 'kept.jsonl'
    run = make(lmbda=0, seq_kd=True, gkd_save_teacher_responses=str(kept), gkd_eval_source='teacher', max_steps=3)
    run.evaluate(run.dataset)  # is not kept
    run.train()
    lines = read(kept)
    assert [line['response_token_ids'] for line in lines] == [one['response'][0] for one in flat(run)]
    by_row = {one['key'][0]: line for one, line in zip(flat(run), lines, strict=True)}
    again = make(lmbda=0, dataset=Dataset.from_list([by_row[row] for row in range(10)]), max_steps=3).train()
    assert again.losses == pytest.approx(run.losses, rel=1e-12)


def test_what_a_server_answered_before_it_gave_up_is_kept(make, tmp_path):
    kept = tmp_path / 'kept.jsonl'
    options = {'lmbda': 0, 'seq_kd': True, 'gkd_save_teacher_responses': str(kept), 'max_steps': 2}
    run = make('server', FakeServer(6), **options)
    with pytest.raises(TeacherServerError):
        run.train()
    assert len(read(kept)) == 6
    resumed = make('server', FakeServer(), **options).train(run.backend.checkpoint)
    lines = read(kept)
    assert len(lines) == 8 and [line['response_token_ids'] for line in lines[4:]] == [one['response'][0] for one in flat(resumed)]


# -- nothing to learn ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('is_student', 'column', 'options', 'warned'),
    [
        (True, None, {}, True),
        (False, None, {}, False),
        (True, 'teacher_prompt', {}, False),
        (True, 'teacher_images', {}, False),
        (True, 'unknown', {}, False),
        (True, None, {'sft_alpha': 0.1}, False),
        (True, None, {'gkd_teacher_system': ''}, False),
        (True, None, {'gkd_teacher_enable_thinking': False}, False),
        (True, None, {'gkd_feedback': 'short'}, False),
    ],
)
def test_nothing_to_learn_is_said_where_nothing_tells_the_teacher_from_the_student(make, rows, said, is_student, column, options, warned):
    run = make(**options)
    data = [] if column == 'unknown' else Dataset.from_list([{**row, **({column: 'x'} if column else {})} for row in rows[:2]])
    run.conductor.warn_if_nothing_to_learn(data, is_student)
    assert any('NOTHING TO LEARN: the teacher is a table' in line for line in said) == warned
