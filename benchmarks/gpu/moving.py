"""Weights that move: a teacher that lives on the host (`--gkd_teacher_offload`), pinned memory, the moving average.

The teacher has the shapes of a Qwen3 of 1.7B without its embeddings: 28 layers, 2.8 GB. Its answers with the weights on their way
are compared bit for bit with those of a teacher that stays, while other work takes and leaves memory on the main stream.
"""

import statistics
import time

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu


def run(case: dict, meter):
    torch.manual_seed(0)
    if 'how' in case:
        return offloaded(case['how'], meter)
    return pinned(meter) if case['name'] == 'pinned memory' else average(meter)


# ---- a teacher that visits ----


class Layer(nn.Module):
    """The weights and the products of a decoder layer, without its attention."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.q, self.k, self.v, self.o = (linear(hidden, n) for n in (hidden, hidden // 2, hidden // 2, hidden))
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)

    def forward(self, x):
        y = rms_norm(x, x.shape[-1:])
        x = x + self.o(self.q(y) + torch.cat([self.k(y), self.v(y)], -1))
        y = rms_norm(x, x.shape[-1:])
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Teacher(nn.Module):
    _no_split_modules = ('Layer',)

    def __init__(self, layers: int, hidden: int, inner: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(hidden, inner) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def teacher(meter) -> Teacher:
    with meter.device:
        model = Teacher(*((3, 16, 48) if meter.tiny else (28, 2048, 6144))).requires_grad_(False).to(torch.bfloat16)
    return model


@torch.no_grad()
def offloaded(how: str, meter):
    from swift_gkd_plugin.teachers.offload import HostCopy, LayerStream

    torch.manual_seed(0)
    model, hidden, tokens = teacher(meter), 16 if meter.tiny else 2048, 8 if meter.tiny else 8192
    inputs = [torch.randn(tokens, hidden, dtype=torch.bfloat16, device=meter.device) for _ in range(2 if meter.tiny else 6)]
    expected = [model(x) for x in inputs]
    bytes_all = sum(p.numel() * p.element_size() for p in model.parameters())
    meter.wait()
    start = time.perf_counter()
    copy = None
    if how != 'stays':
        copy = LayerStream(model, meter.device) if how == 'layer' else HostCopy(model.parameters(), meter.device)
    made = time.perf_counter() - start
    meter.fresh()

    def visit(x):
        if copy is None:
            return model(x)
        with copy.on_device():
            return model(x)

    def junk():
        """Memory that a student takes and leaves on the main stream, written so that a weight there would be seen to change."""
        for size in (1 << 10,) if meter.tiny else (64 << 20, 8 << 20, 128 << 20):
            torch.empty(size, dtype=torch.int8, device=meter.device).fill_(-1)

    different = 0
    for _ in range(1 if meter.tiny else 3):
        for x, right in zip(inputs, expected, strict=True):
            junk()
            found = visit(x)
            junk()
            different += not torch.equal(found, right)
    del found
    row = meter.measure(lambda: visit(inputs[0]))
    if copy is not None:
        row |= {'gb_per_s': copy.bytes / row['ms'] / 1e6, 'moved_gb': copy.bytes / 1e9, 'copy_made_s': made}
        row |= {'host_gb': copy.memory.bytes / 1e9, 'pinned': next(model.parameters()).is_pinned()}
    status = 'ok' if different == 0 else 'wrong'
    yield {'what': f'{bytes_all / 1e9:.2f} GB, {tokens} tokens', 'status': status, **row, 'different': different}
    if meter.cuda:
        segments = torch.cuda.memory_snapshot()
        expandable = any(segment.get('is_expandable', False) for segment in segments)
        yield {'what': 'allocator', 'segments': len(segments), 'expandable': expandable, 'reserved_gb': meter.reserved_gb()}


# ---- pinned memory ----


def pinned(meter):
    n = 1 << (16 if meter.tiny else 30)
    host, there = torch.ones(n, dtype=torch.int8), torch.empty(n, dtype=torch.int8, device=meter.device)
    start = time.perf_counter()
    fast = host.pin_memory() if meter.cuda else host.clone()
    yield {'what': 'to pin it', 'ms': 1000 * (time.perf_counter() - start), 'gb': n / 1e9}
    for what, step in (
        ('to the device, pageable', lambda: there.copy_(host)),
        ('to the device, pinned', lambda: there.copy_(fast, non_blocking=True)),
        ('to the host, pinned', lambda: fast.copy_(there, non_blocking=True)),
    ):
        row = meter.measure(step)
        yield {'what': what, **row, 'gb_per_s': n / row['ms'] / 1e6}
    if not meter.cuda:
        return
    # The same beside products, as a stream of its own does it: does either wait for the other?
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=meter.device)
    stream = torch.cuda.Stream(meter.device)

    def products():
        for _ in range(40):
            a @ a

    def both():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there.copy_(fast, non_blocking=True)
        products()
        torch.cuda.current_stream().wait_stream(stream)

    for what, step in (('products alone', products), ('products beside a copy', both)):
        yield {'what': what, **meter.measure(step)}


# ---- the moving average ----


def average(meter):
    from swift_gkd_plugin.teachers.average import MovingAverage, WholeParameters

    layers, hidden, inner, vocab = (2, 16, 48, 300) if meter.tiny else (28, 1024, 3072, 151_936)
    with meter.device:
        model = Teacher(layers, hidden, inner)
        model.embeddings = nn.Embedding(vocab, hidden)
    model.to(torch.bfloat16)
    gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    average = MovingAverage(0.999)
    meter.fresh()
    average.begin(WholeParameters(model))
    yield {'what': 'follow', **meter.measure(average.follow), 'student_gb': gb, 'average_gb': 2 * gb}

    def visit():
        with average.in_place_of_the_student():
            pass

    yield {'what': 'in place of the student', **meter.measure(visit)}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        average.follow()
        times.append(1000 * (time.perf_counter() - start))  # what the Python side takes, the GPU's aside
        meter.wait()
    yield {'what': 'follow, until it is queued', 'ms': statistics.median(times), 'ms_min': min(times)}
