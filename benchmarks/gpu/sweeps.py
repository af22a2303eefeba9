"""The operator's Triton kernels, each by itself, as one call starts them; and all that the GPU does in a call.

`columns` counts a kernel's rows times columns, `ps_per_column` is its time over them, `gb_per_s` what it moves by the table in
`operator_kernels.py`; the part `products` says what the memory gives. Without a GPU Triton's interpreter stands in.
"""

import os
import statistics
from contextlib import contextmanager, nullcontext

import torch
from operator_kernels import BYTES_PER_COLUMN, ONE_LOAD, kernel_launches, one_load_off_by, sweep_of

KINDS = {
    'jsd': dict(temperature=0.9),
    'jsd 0.2': dict(beta=0.2),
    'forward_kl': dict(kind='forward_kl'),
    'reverse_kl': dict(kind='reverse_kl'),
    'skew_forward_kl': dict(kind='skew_forward_kl'),
    'skew_reverse_kl': dict(kind='skew_reverse_kl'),
    'tvd': dict(kind='tvd'),
}
REPEATS = 12


def run(case: dict, meter):
    if case.get('one_load'):
        yield from one_load(case, meter)
        return
    with pretended(meter):
        step, tokens = call(case, meter)
        for _ in range(1 if meter.tiny else 3):
            step()
        if case.get('profiled'):
            yield from profiled(step, meter)
        else:
            yield from by_kernel(step, tokens, meter)


def pretended(meter):
    """On a CPU: tensors say that they are on a GPU, so that the operator starts kernels."""
    if meter.cuda:
        return nullcontext()
    import interpreted
    from pretended_gpu import PretendedGPU

    interpreted.patch_once()
    return PretendedGPU()


def call(case: dict, meter):
    """One call of the operator. Its matrix products are small, so that most of it is sweeps."""
    from swift_gkd_plugin.divergence import Divergence, TokenStats, linear_divergence, topk_divergence

    torch.manual_seed(0)
    tokens, vocab, hidden = (2, 300, 8) if meter.tiny else (4096, case.get('vocab', 151_936), 64)
    half = dict(dtype=torch.bfloat16, device=meter.device)
    weight, head = (torch.randn(vocab, hidden, **half).mul_(0.25) for _ in range(2))
    x, other = torch.randn(tokens, hidden, **half).requires_grad_(), torch.randn(tokens, hidden, **half)
    labels = torch.randint(vocab, (tokens,), device=meter.device)
    divergence, what = Divergence(**KINDS[case['kind']]), case.get('what')
    more = {'reduction': 'sum'}
    if what == 'labels':
        more |= {'labels': labels, 'label_weights': torch.ones(tokens, device=meter.device)}
    if what == 'statistics':
        more |= {'stats': TokenStats(detail=True)}
    if what == 'top-k':
        ids = torch.stack([torch.randperm(vocab, device=meter.device)[:64] for _ in range(8)]).repeat(-(-tokens // 8), 1)[:tokens]
        logprobs = torch.full(ids.shape, -6.0, device=meter.device)
        return lambda: topk_divergence(x, weight, logprobs, ids, divergence, **more).backward(), tokens
    if what == 'cross-entropy':
        return lambda: linear_divergence(x, weight, None, None, divergence, labels=labels, **more).backward(), tokens
    return lambda: linear_divergence(x, weight, other, head, divergence, **more).backward(), tokens


def by_kernel(step, tokens: int, meter):
    runs = []
    for _ in range(1 if meter.tiny else REPEATS):
        meter.flush()
        with kernel_launches(meter) as launches:
            step()
            meter.wait()
        found = {}
        for launch in launches:
            ms, columns, number = found.get(launch.kernel, (0, 0, 0))
            found[launch.kernel] = ms + launch.span.ms, columns + launch.columns, number + 1
        runs.append(found)
    if not runs[0]:
        yield {
            'what': 'no kernel',
            'status': 'not here',
            'why': 'no Triton kernel is started: torch operations, or see sweeps.log',
        }
    for kernel, (_, columns, number) in runs[0].items():
        times = [found[kernel][0] for found in runs]
        row = {'what': kernel, 'ms': statistics.median(times), 'ms_min': min(times), 'launches': number, 'columns': columns}
        row['ps_per_column'] = 1e9 * row['ms'] / max(columns, 1)
        moved = BYTES_PER_COLUMN.get(sweep_of(kernel))
        yield row | ({'gb_per_s': moved * columns / row['ms'] / 1e6} if moved else {})
    yield {'what': 'whole call', **meter.measure(step), 'tokens': tokens}


def profiled(step, meter):
    """What torch's profiler saw of a call on the GPU, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if meter.cuda else [])]) as profiler:
        step()
        meter.wait()
    events = profiler.key_averages()
    if meter.cuda:  # an operation of the CPU's counts what it has started, too
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    time_of = (lambda event: event.self_device_time_total) if meter.cuda else (lambda event: event.self_cpu_time_total)
    seen = sorted((event for event in events if time_of(event) > 0), key=time_of, reverse=True)
    for event in seen[:12]:
        yield {'what': event.key[:80], 'ms': time_of(event) / 1000, 'launches': event.count}
    yield {'what': 'all', 'ms': sum(map(time_of, seen)) / 1000, 'launches': sum(event.count for event in seen)}


def one_load(case: dict, meter):
    """The kernel that reads a row once, against the three sweeps, turn by turn: values and time."""
    from swift_gkd_plugin.divergence import Divergence

    with pretended(meter):
        off_by = one_load_off_by(Divergence(**KINDS[case['kind']]), 300 if meter.tiny else 151_936, meter.device)
        yield {'what': 'one load', 'status': 'ok' if off_by < 1e-4 else 'wrong', 'gradient_off': off_by, 'allowed': 1e-4}
        step, _ = call(case, meter)
        for turn in range(1 if meter.tiny else 2):
            for what, value in (('three sweeps', '0'), ('one load', '1')):
                with environment(ONE_LOAD, value):
                    step()  # the first one is tried beside the other
                    with kernel_launches(meter) as launches:
                        step()
                    found = meter.measure(step)
                names = ' '.join(sorted({launch.kernel for launch in launches}))
                yield {'what': f'{what}, turn {turn + 1}', **found, 'kernels': names}


@contextmanager
def environment(name: str, value: str):
    """Later cases of this process are not to find it."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
