"""The optimizer's state on the host while a teacher visits; with megatron-core's own optimizers in test_megatron_training.py."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.megatron import optimizer
from swift_gkd_plugin.megatron.optimizer import OptimizerState, leaving_state
from swift_gkd_plugin.metrics import Metrics
from swift_gkd_plugin.teachers import host_memory

CPU = torch.device('cpu')
OPTIMIZERS = {
    'adam': (lambda weights: torch.optim.Adam(weights, lr=0.1), 2),
    'momentum': (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), 1),
    'sgd': (lambda weights: torch.optim.SGD(weights, lr=0.1), 0),
}


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)


class Student:
    """Weights in one buffer each of fp32 and bf16, of which an optimizer has views and fp32 copies; a stage without any beside it."""

    def __init__(self, make):
        torch.manual_seed(0)
        wide, narrow = torch.randn(300), torch.randn(500).bfloat16()
        self.wide, self.narrow = [nn.Parameter(part) for part in wide.split(100)], [nn.Parameter(part) for part in narrow.split(250)]
        self.views = [nn.Parameter(p.detach().view(-1)[10:60]) for p in self.wide]
        self.copies = [nn.Parameter(p.detach().clone().float()) for p in self.narrow]
        self.optimizer = make([*self.views, *self.copies])
        self.chained = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=self.optimizer), SimpleNamespace(optimizer=None)])

    @property
    def weights(self):
        return [*self.wide, *self.narrow]

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in (*self.views, *self.copies):
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for p, mine in zip(self.narrow, self.copies, strict=True):
            p.data.copy_(mine)

    def seen(self):
        moments = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return copy.deepcopy([*self.weights, *self.copies, *moments])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_it_is_gone_and_then_as_it_was(name):
    make, moments = OPTIMIZERS[name]
    student, undisturbed = Student(make), Student(make)
    state, metrics = OptimizerState(student.chained, student.weights, CPU, 4 * moments), Metrics(CPU)
    for seed in range(3):
        before, of_model = student.seen(), [w.data.clone() for w in student.weights]
        bytes = 4 * 500 + (4 * moments * 650 if seed else 0)
        with state.away(metrics):
            tensors = [v for one in student.optimizer.state.values() for v in one.values() if isinstance(v, torch.Tensor) and v.dim()]
            assert len(tensors) == 5 * moments * bool(seed)
            assert not any(t.untyped_storage().nbytes() for t in (*tensors, *student.copies))
            assert all(w.untyped_storage().nbytes() for w in (*student.weights, *student.views))
            assert all(w.equal(kept) for w, kept in zip(student.weights, of_model, strict=True))
            for view in student.views:
                view.data.add_(0)  # it is still there
        assert 2**30 * metrics.pop()['optimizer/moved_gib'] == bytes
        assert all(a.equal(b) for a, b in zip(before, student.seen(), strict=True))
        student.step(seed), undisturbed.step(seed)
        assert all(a.equal(b) for a, b in zip(undisturbed.seen(), student.seen(), strict=True))
    assert not student.wide[0].equal(Student(make).wide[0])  # updates have reached the model


def test_it_comes_back_when_a_visit_fails():
    student = Student(OPTIMIZERS['adam'][0])
    student.step(0)
    before, metrics = student.seen(), Metrics(CPU)
    with pytest.raises(ZeroDivisionError), OptimizerState(student.chained, student.weights, CPU).away(metrics):
        raise ZeroDivisionError
    assert all(a.equal(b) for a, b in zip(before, student.seen(), strict=True))
    assert metrics.pop()['seconds/optimizer_offload'] > 0


@pytest.mark.parametrize(('moments', 'blocks'), [(8, 1), (0, 2)], ids=['foreseen', 'unknown'])
def test_the_room_is_pinned_once_or_grows(monkeypatch, moments, blocks):
    pinned, known = {}, []

    def register(start, size, _):
        pinned[start] = size
        known.append(size)
        return 0

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'cudart', lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop))
    student = Student(OPTIMIZERS['adam'][0])
    state = OptimizerState(student.chained, student.weights, CPU, moments)
    for seed in range(3):
        with state.away(Metrics(CPU)):
            pass
        student.step(seed)
    assert len(known) == blocks and len(pinned) == 1
    assert known[0] == state.room.bytes or moments == 0


def trainer(asked, **given):
    student = Student(OPTIMIZERS['adam'][0])
    args = dict(gkd_optimizer_offload=asked, gkd_teacher_offload='model', offload_teacher_model=False, optimizer_cuda_graph=False)
    chunk = SimpleNamespace(parameters=lambda: student.weights)
    return SimpleNamespace(args=SimpleNamespace(**args | given), teacher_models=[1], optimizer=student.chained, unwrapped_models=[chunk])


@pytest.mark.parametrize(
    ('asked', 'foretold', 'given', 'leaves'),
    [
        (True, False, {}, True),
        (False, True, {}, False),
        (None, True, {}, True),
        (None, False, {}, False),
        (None, True, {'optimizer_cuda_graph': True}, False),
        (True, True, {'gkd_teacher_offload': None}, False),
        (True, True, {'gkd_teacher_offload': None, 'offload_teacher_model': True}, True),
    ],
)
def test_when_it_leaves(asked, foretold, given, leaves):
    assert (leaving_state(trainer(asked, **given), foretold, 8) is not None) == leaves


def test_too_little_memory_of_the_host(monkeypatch, caplog):
    """Asked for, it is refused; a run that only may need it goes on."""
    monkeypatch.setattr(host_memory, 'available_bytes', lambda: 1000)
    monkeypatch.setattr(optimizer.logger, 'propagate', True)
    message = '--gkd_optimizer_offload: 1 x 0.00 GiB of optimizer on a machine take 0.00 GiB more of host memory than now, and 0.00'
    with pytest.raises(OptionError, match=message):
        leaving_state(trainer(True), False, 8)
    assert leaving_state(trainer(None), True, 8) is None
    assert 'The optimizer stays on the device while the teacher visits, which may not fit.' in caplog.text and message in caplog.text
