"""``--gkd_teacher_offload layer`` on a GPU that is not there: streams that only say what they would wait for.

The host is infinitely far ahead of both streams: memory that a second stream uses (``record_stream``) does not become free while the
model runs. Every operation is held against those on the other stream: if they touch the same memory and one of them writes, one has to
be ordered after the other.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swift_gkd_plugin.teachers.offload import LayerStream

CPU = torch.device('cpu')


class Stream:
    """Operations in order, and up to which of each other stream's this one waits."""

    def __init__(self):
        self.length, self.waits_for = 0, {}

    def wait_event(self, event):
        for stream, length in event.after.items():
            self.waits_for[stream] = max(self.waits_for.get(stream, 0), length)

    def wait_stream(self, stream):
        event = Event()
        event.record(stream)
        self.wait_event(event)


class Event:
    def __init__(self):
        self.after = {}

    def record(self, stream):
        self.after = {**stream.waits_for, stream: stream.length}


class Device(TorchDispatchMode):
    """Two streams, and who touches what.

    Attributes:
        side: The stream for copies.
        races: Operations on the same memory of which nobody knows which comes first.
        held: Memory that is not free before the host waits.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.current, self.side = Stream(), Stream()
        self.touched: dict[int, list[tuple[Stream, int, bool, str]]] = {}
        self.races: list[str] = []
        self.held: list[torch.Tensor] = []
        monkeypatch.setattr(torch.cuda, 'stream', self.on)
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: self.current)
        monkeypatch.setattr(torch.cuda, 'Event', Event)
        monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: self.held.append(tensor))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        me = self.current
        me.length += 1
        written, read = ({t.untyped_storage().data_ptr() for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in (found, args))
        for memory in written | read:
            for other, number, wrote, name in self.touched.get(memory, ()):
                if other is not me and (wrote or memory in written) and me.waits_for.get(other, 0) < number:
                    self.races.append(f'{func} and {name}')
            self.touched.setdefault(memory, []).append((me, me.length, memory in written, str(func)))
        return found


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


class Layer(nn.Module):
    def __init__(self, inner: int, dtype: torch.dtype):
        super().__init__()
        self.up, self.down = nn.Linear(8, inner, dtype=dtype), nn.Linear(inner, 8, bias=False, dtype=dtype)
        self.coded = nn.Parameter(torch.randint(-9, 9, (8, 3), dtype=torch.int8).t(), requires_grad=False)
        self.shared = self.tied = None
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = x + self.down(self.up(x.to(self.up.weight.dtype)).relu()).float()
        x = x + (x @ self.coded.float().t()) @ self.coded.float() / 100
        return x if self.shared is None else x @ self.shared.t() @ self.tied


class Teacher(nn.Module):
    """Its layers differ in shapes and dtypes; two of them share a weight with each other and one with the embeddings."""

    _no_split_modules = ('Layer',)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Layer(8 + 5 * (n % 4), torch.bfloat16 if n % 3 else torch.float32) for n in range(12)])
        shared = nn.Parameter(torch.randn(8, 8) / 8)
        for n in (4, 5):
            self.layers[n].shared, self.layers[n].tied = shared, self.embedding.weight

    def forward(self, x, order=range(12)):
        x = self.embedding(x)
        for n in order:
            x = self.layers[n](x)
        return x


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Teacher().requires_grad_(False).eval()


def largest(teacher) -> int:
    return max(sum(-(-p.nbytes // 256) * 256 for p in layer.parameters()) for layer in teacher.layers)


ORDERS = {
    'a forward': [range(12)],
    'several': [range(12)] * 3,
    'visited again': [[n for n in range(12) for _ in range(2)], [*range(12), *reversed(range(12))]],
    'left out': [[0, 2, 3, 6, 7, 11], [5], [0, 1]],
}


@pytest.mark.parametrize('orders', ORDERS.values(), ids=ORDERS)
@torch.no_grad()
def test_two_layers_however_far_ahead_the_host_is(teacher, device, orders):
    inputs = [torch.randn(4, 8) for _ in orders]
    expected = [teacher(x, order) for x, order in zip(inputs, orders, strict=True)]
    stream = LayerStream(teacher, CPU)
    stream._stream = device.side
    host = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    taken = []

    def look(*_):
        of_weights = [p.data for p in teacher.parameters() if p.untyped_storage().data_ptr() not in host]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*of_weights, *device.held)}
        taken.append(sum(memory.values()))

    for layer in teacher.layers:
        layer.up.register_forward_hook(look)
    for x, order, right in zip(inputs, orders, expected, strict=True):
        with stream.on_device(), device:
            assert torch.equal(teacher(x, order), right)
        assert stream.present == 0
    assert max(taken) <= 2 * largest(teacher)
    assert not device.races


@torch.no_grad()
def test_memory_of_a_visit_has_other_uses_after_it(teacher, device):
    """A layer may still be on its way when a forward ends early."""
    stream = LayerStream(teacher, CPU)
    stream._stream = device.side
    with device:
        for _ in range(2):
            with stream.on_device():
                teacher(torch.randn(4, 8), [0, 1])
                memory = [buffer.room for buffer in stream._buffers.values()]
            for room in memory:
                room.fill_(255)
    assert len(memory) == 2 and not device.races


@torch.no_grad()
def test_shared_weights_and_buffers_stay(teacher):
    x = torch.randn(4, 8)
    expected = teacher(x)
    shared, tied = teacher.layers[4].shared, teacher.embedding.weight
    places = [shared.data_ptr(), tied.data_ptr()]
    stream = LayerStream(teacher, CPU)
    assert not {id(shared), id(tied)} & {id(weight) for weight in stream.weights}
    with stream.on_device():
        assert torch.equal(teacher(x), expected)
    assert [shared.data_ptr(), tied.data_ptr()] == places
    assert [layer.calls.item() for layer in teacher.layers] == [2.0] * 12
    assert stream.moved == stream.bytes == sum(weight.nbytes for weight in stream.weights)
    assert teacher.layers[0].coded.stride() == (1, 3)
