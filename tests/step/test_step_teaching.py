"""A local teacher's own micro-batches, and a teacher server that is asked while something trains."""

from __future__ import annotations

import itertools
import json
import threading
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_backend import FakeServer, flat

from swift_gkd_plugin.step import cycle as cycles
from swift_gkd_plugin.step import remote, teaching
from swift_gkd_plugin.step.data import Row
from swift_gkd_plugin.step.samples import Sample
from swift_gkd_plugin.step.teaching import TeacherBatches
from swift_gkd_plugin.teachers import HiddenStates, TopK, joined, split
from swift_gkd_plugin.teachers import server as server_module
from swift_gkd_plugin.teachers.server import Question, ServerOptions, TeacherServerError, TeacherServers

# -- how rows are grouped ------------------------------------------------------------------------------------------------------------------

LENGTHS = [5, 90, 7, 30, 31, 8, 8, 60, 1]


@pytest.mark.parametrize('plan', [TeacherBatches(None, 64), TeacherBatches(4, 1), TeacherBatches(None, 10**6, at_least=4)])
def test_every_row_is_looked_at_once_longest_first(plan):
    groups = plan.grouped(LENGTHS)
    assert sorted(place for group in groups for place in group) == list(range(len(LENGTHS)))
    assert [LENGTHS[place] for group in groups for place in group] == sorted(LENGTHS, reverse=True)


def test_limits_of_a_batch():
    for group in TeacherBatches(None, 64).grouped(LENGTHS):
        assert len(group) == 1 or len(group) * max(LENGTHS[place] for place in group) <= 64
    for group in (packed := TeacherBatches(None, 100).grouped(LENGTHS, packed=True)):
        assert len(group) == 1 or sum(LENGTHS[place] for place in group) <= 100
    assert len(packed) < len(TeacherBatches(None, 100).grouped(LENGTHS))  # nothing is spent on padding
    assert list(map(len, TeacherBatches(4, tokens=1).grouped(LENGTHS))) == [4, 4, 1]  # rows, whatever their lengths
    assert len(TeacherBatches(None, 10**6, at_least=4).grouped(LENGTHS)) >= 4
    assert TeacherBatches(None, 64).grouped([]) == []


def test_what_is_split_can_be_joined():
    signal = TopK(torch.rand(6, 2), torch.arange(12).view(6, 2), temperature=1.0)
    parts = split(signal, [1, 0, 5])
    assert [len(part.ids) for part in parts] == [1, 0, 5]
    again = joined(parts)
    assert torch.equal(again.logprobs, signal.logprobs) and torch.equal(again.ids, signal.ids) and again.temperature == 1
    head = object()
    assert joined(split(HiddenStates(torch.rand(3, 4), head), [2, 1])).head is head


# -- in a run ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make):
    return make(seq_kd=True, per_device_train_batch_size=2, gradient_accumulation_steps=3, steps_per_generation=3).train()


@pytest.mark.parametrize('size', [1, 2, 4, 100])
def test_the_same_step_for_any_batch_of_the_teacher(make, run, size):
    other = make(
        seq_kd=True, per_device_train_batch_size=2, gradient_accumulation_steps=3, steps_per_generation=3, gkd_teacher_batch_size=size
    ).train()
    assert flat(other) == flat(run) and other.losses == pytest.approx(run.losses, rel=1e-12)
    assert all(len(batch) <= size for visit in other.backend.looked_at for batch in visit)
    for log, step in zip(other.logs, other.steps, strict=True):
        rows = sum(one['counts'] for batch in step for one in batch)
        assert log['teacher/batches'] == -(-rows // size)


def test_by_default_the_teacher_looks_at_a_step_at_once(run):
    assert all(len(visit) == 1 for visit in run.backend.looked_at) and len(run.backend.looked_at) == len(run.steps)


def test_a_step_of_too_many_tokens_takes_several_visits(make, run, monkeypatch):
    monkeypatch.setattr(teaching, 'KEPT_BYTES', 60)
    other = make(seq_kd=True, per_device_train_batch_size=2, gradient_accumulation_steps=3, steps_per_generation=3)
    other.backend.kept_bytes = 2
    visits = []
    look = other.backend.look

    def watched(batch):
        gradient = look(batch)
        visits.append(len(other.backend.looked_at))
        return gradient

    other.backend.look = watched
    assert other.train().losses == pytest.approx(run.losses, rel=1e-12)
    assert len(other.backend.looked_at) > len(other.steps) and visits[0] < visits[2]  # not all of them before the first forward


def test_ranks_that_share_weights_run_the_same_number_of_batches(template, rows, make):
    """This one has two rows, another rank has enough for four batches."""
    run = make(lmbda=0, max_steps=1).train()
    for sample in itertools.chain.from_iterable(run.conductor._step):
        assert sample.encoded is None and sample.views is None  # they have gone with their micro-batches
        run.conductor.encoder.check(sample)
    counted = [run.conductor.encoder.counted(samples) for samples in run.conductor._step]
    ranks, looked = SimpleNamespace(at_most=lambda number: max(number, 4)), []

    def look(theirs):
        found = [TopK(batch.labels[:, None].float(), batch.labels[:, None]) for batch in theirs]
        looked.append(len(found))
        return found

    signals, count = TeacherBatches(100, 1, lockstep=True).taught(counted, run.conductor.encoder, ranks, look)
    assert looked == [4] and count == 4
    batches = [run.conductor.encoder.micro_batch(one.samples) for one in counted]
    assert all(torch.equal(signal.ids[:, 0], batch.labels) for signal, batch in zip(signals, batches, strict=True))


# -- rows that come prepared ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, {'gkd_source_per': 'batch'}, {'gkd_num_samples': 3}, {'seq_kd': True}], ids=str)
def test_rows_may_be_encoded_where_they_are_read(make, options):
    ahead, now = make(**options), make(**options)
    now.prepares = False
    assert flat(ahead.train()) == flat(now.train()) and ahead.losses == now.losses


# -- a server ------------------------------------------------------------------------------------------------------------------------------


class Watched(FakeServer):
    """Tells when it has been asked often enough."""

    def __init__(self):
        super().__init__()
        self.asked = threading.Condition()

    def score(self, question):
        found = super().score(question)
        with self.asked:
            self.asked.notify_all()
        return found

    def wait_for(self, number: int) -> bool:
        with self.asked:
            return self.asked.wait_for(lambda: len(self.scored) >= number, timeout=10)


def test_a_server_is_asked_about_the_next_step_while_this_one_trains(make):
    server = Watched()
    run = make('server', server, lmbda=0, max_steps=2)
    look, waited = run.backend.look, []

    def watched(batch):
        gradient = look(batch)
        waited.append(server.wait_for(8))
        return gradient

    run.backend.look = watched
    run.train()
    assert all(waited) and len(server.scored) == 8  # each row once, and none of a step that does not come


def test_a_server_is_asked_about_later_micro_batches_while_the_first_trains(make):
    server = Watched()
    run = make('server', server, lmbda=1, max_steps=2)
    look, waited = run.backend.look, []

    def watched(batch):
        gradient = look(batch)
        waited.append(server.wait_for(4 * (run.backend.step + 1)))
        return gradient

    run.backend.look = watched
    run.train()
    assert all(waited) and len(server.scored) == 8


def test_a_server_that_shares_the_students_device_is_asked_when_its_turn_is(make, monkeypatch):
    server = Watched()
    run = make('server', server, lmbda=0, max_steps=2)
    awake = []

    class Awake:
        def __enter__(self):
            awake.append(True)

        def __exit__(self, *error):
            awake.append(False)

    run.conductor.teacher.awake, run.conductor.teacher.is_free = Awake, False
    monkeypatch.setattr(remote, 'empty_cache', lambda: awake.append('room is made'))
    score = server.score

    def only_awake(question):
        assert awake[-1]
        return score(question)

    server.score = only_awake
    run.train()
    assert awake == ['room is made', True, False] * 2 and len(server.scored) == 8


def test_there_is_room_before_an_engine_answers(make, monkeypatch):
    run = make('local', FakeServer(), lmbda=0, seq_kd=True, max_steps=2)
    happened = []
    run.conductor.answering.awake, run.conductor.answering.is_free = lambda: nullcontext(happened.append('awake')), False
    monkeypatch.setattr(remote, 'empty_cache', lambda: happened.append('room is made'))
    run.train()
    assert happened == ['room is made', 'awake'] * 2


class Flaky(Watched):
    """Fails once on each question from the fifth on."""

    def __init__(self):
        super().__init__()
        self.failed: set[str] = set()

    def score(self, question):
        if len(self.scored) >= 4 and str(question.ids) not in self.failed:
            self.failed.add(str(question.ids))
            with self.asked:
                self.asked.notify_all()
            raise TeacherServerError('the server starts again')
        return super().score(question)


def test_what_a_server_failed_to_say_ahead_of_time_is_asked_again_when_it_is_needed(make):
    server = Flaky()
    run = make('server', server, lmbda=0, max_steps=2)
    look = run.backend.look

    def watched(batch):
        if run.backend.step == 0:
            with server.asked:
                assert server.asked.wait_for(lambda: len(server.failed) == 4, timeout=10)
        return look(batch)

    run.backend.look = watched
    assert len(run.train().losses) == 2 and len(server.failed) == 4 and len(server.scored) == 8


def question(tag=None):
    return Question([1, 2], [1], [1, 2], {}, tag)


def test_questions_that_wait_for_a_dead_server_do_not_keep_a_run_from_its_end():
    servers = TeacherServers('http://127.0.0.1:9', ServerOptions(2, timeout=1, retry_seconds=600, in_flight=2))
    servers.servers[0].protocol = SimpleNamespace(score=lambda question, k: ('/', {}, lambda reply: reply))
    futures = [servers.begin(lambda server, one: server.score(one), question(), question()) for _ in range(6)]
    time.sleep(0.5)
    servers.stop()
    under_way = [future for future in futures if not future.cancelled()]
    assert len(under_way) == 2 and all(isinstance(future.exception(timeout=10), TeacherServerError) for future in under_way)


def test_a_server_that_will_not_come_back_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(server_module, 'for_good', threading.Event())
    servers = TeacherServers('http://127.0.0.1:9', ServerOptions(2, timeout=1, retry_seconds=60, in_flight=1))
    servers.servers[0].protocol = SimpleNamespace(score=lambda question, k: ('/', {}, lambda reply: reply))
    asked = servers.begin(lambda server, one: server.score(one), question(), question())
    time.sleep(0.5)
    assert not asked.done()
    server_module.for_good.set()
    assert isinstance(asked.exception(timeout=10), TeacherServerError)


def test_replicas_have_as_many_requests_each():
    servers = TeacherServers('http://a:1,http://b:2, http://c:3', ServerOptions(2, timeout=1, retry_seconds=0, in_flight=2))
    full = threading.Barrier(6)

    def ask(server, number):
        full.wait(10)
        return server.url

    asked = servers.each(ask, [(question(), number) for number in range(6)])
    assert sorted(asked) == ['http://a:1', 'http://a:1', 'http://b:2', 'http://b:2', 'http://c:3', 'http://c:3']
    tagged = json.dumps([{'url': 'http://a:1,http://b:2', 'tags': ['x']}, {'url': 'http://c:3', 'tags': ['y']}])
    servers = TeacherServers(tagged, ServerOptions(2, timeout=1, retry_seconds=0, in_flight=2))
    full = threading.Barrier(3)
    assert sorted(servers.each(ask, [(question(tag), tag) for tag in 'xxy'])) == ['http://a:1', 'http://b:2', 'http://c:3']


def test_a_question_that_no_server_is_for_fails_with_the_others():
    two = [{'url': f'http://127.0.0.1:{port}', 'tags': [tag]} for port, tag in ((9, 'a'), (10, 'b'))]
    servers = TeacherServers(json.dumps(two), ServerOptions(2, timeout=1, retry_seconds=0, in_flight=1))
    failed = servers.begin(lambda server, one: server.score(one), question('c'), question('c'))
    assert isinstance(failed.exception(timeout=10), TeacherServerError)


# -- what is kept, and for how long --------------------------------------------------------------------------------------------------------


class Alive:
    """How many collated micro-batches there are at a time, of the student and of the teacher."""

    def __init__(self, encoder):
        self.now = self.most = self.made = 0
        for name in ('micro_batch', 'teacher_batch'):
            setattr(encoder, name, self.counting(getattr(encoder, name)))

    def counting(self, collate):
        def counted(samples):
            batch = collate(samples)
            self.now, self.made = self.now + 1, self.made + 1
            self.most = max(self.most, self.now)
            weakref.finalize(batch, self.gone)
            return batch

        return counted

    def gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize('who', ['nobody', 'local', 'as the student', 'in visits', 'server', 'server on the device'])
def test_of_a_step_two_micro_batches_are_collated_at_a_time(make, dataset, monkeypatch, who):
    """The one that has been used, and the next."""
    options = {'per_device_train_batch_size': 1, 'gradient_accumulation_steps': 5, 'gkd_teacher_batch_size': 1, 'max_steps': 2}
    if who == 'nobody':
        options |= {'lmbda': 0, 'gkd_loss_weight': 0.0, 'sft_alpha': 1.0}
    run = make('server' if 'server' in who else 'local', FakeServer() if 'server' in who else None, **options)
    run.backend.as_the_student = who == 'as the student'
    if who == 'in visits':
        monkeypatch.setattr(teaching, 'KEPT_BYTES', 30)
        run.backend.kept_bytes = 2
    if who == 'server on the device':
        run.conductor.teacher.is_free = False
    alive = Alive(run.conductor.encoder)
    run.train()
    assert alive.made == (10 if who == 'nobody' or 'server' in who else 20) and alive.most == 2
    run.evaluate(dataset, batch_size=1, at_once=5)
    assert alive.most == 2 and alive.made in (20, 40)


def test_what_is_known_of_a_micro_batch_before_it_is_collated_is_what_it_will_be(run):
    for samples in run.conductor._step:
        counted, batch = run.conductor.encoder.counted(samples), run.conductor.encoder.micro_batch(samples)
        assert (counted.samples, counted.lengths, counted.num_tokens) == (batch.samples, batch.lengths, batch.num_tokens)
        assert counted.size == batch.student_inputs['input_ids'].numel()


def test_a_signal_is_let_go_once_its_micro_batch_has_been_used(run):
    """transformers keeps a micro-batch until the next one is there."""
    from swift_gkd_plugin.hf.trainer import GKDTrainer

    batch = run.conductor.encoder.micro_batch(run.conductor._step[0])
    signal = batch.signal = TopK(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device('cpu')))
    here = GKDTrainer._prepare_inputs(trainer, batch)
    assert here.signal.ids is signal.ids and batch.signal is None


def test_what_a_worker_process_has_encoded_leaves_its_memory(run):
    pixels = torch.rand(3).share_memory_()
    encoded = {'input_ids': [1], 'pixel_values': pixels}
    sample = Sample(Row(0, 0, {}), {}, encoded=encoded, views=(dict(encoded), None)).leave_shared_memory()
    kept = sample.encoded['pixel_values']
    assert torch.equal(kept, pixels) and not kept.is_shared() and sample.views[0]['pixel_values'] is kept


def test_nothing_in_flight_leaves_no_file_of_an_earlier_run(run, tmp_path):
    cycles.save(str(tmp_path), run.conductor._step and [run.conductor._step[0]], 1)
    assert cycles.load(str(tmp_path)) is not None
    cycles.save(str(tmp_path), [], 1)
    assert cycles.load(str(tmp_path)) is None
