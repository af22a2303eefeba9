"""The operator on the device against the definitions of `tests/divergence/divergence_reference.py`, in float64.

A row says how far the loss and the gradients are off, relative to their norms, and what is allowed; beyond that its status is
'wrong'. `kernels` counts the Triton kernels that were started: 0 where the operator had to do without.
"""

import math

import divergence_reference as reference
import plan
import torch
from operator_kernels import kernel_launches

from swift_gkd_plugin.divergence import Divergence, LogitTransform, TokenStats, linear_divergence, logits_divergence, topk_divergence

KINDS = {
    'jsd': Divergence('jsd', 0.5, 0.9),
    'jsd 0.2': Divergence('jsd', 0.2, 1.3),
    'jsd 0.001': Divergence('jsd', 0.001),
    'jsd 0.999': Divergence('jsd', 0.999),
    'forward_kl': Divergence('forward_kl', temperature=2.0),
    'reverse_kl': Divergence('reverse_kl'),
    'skew_forward_kl': Divergence('skew_forward_kl', skew=0.1),
    'skew_reverse_kl': Divergence('skew_reverse_kl', skew=0.1),
    'tvd': Divergence('tvd'),
}
# Of the loss and of the gradients, whose products are in half precision for half precision.
ALLOWED = {
    torch.float64: (1e-9, 1e-8),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (5e-5, 1e-2),
    torch.float16: (5e-5, 1e-2),
}
NAMES = ('hidden', 'weight', 'bias', 'a', 'b')


def run(case: dict, meter):
    torch.manual_seed(0)
    if 'kind' in case:
        yield from dense(case, meter)
    elif 'topk' in case:
        yield from topk(case, meter)
    else:
        name = case['name']
        yield from {
            'machine': machine,
            'cross-entropy': cross_entropy,
            'statistics': statistics,
            'ready logits': ready_logits,
            'extremes': extremes,
            'more than 2^31 logits': many_logits,
            'the same twice': twice,
        }[name](meter)


def machine(meter):
    """What all other rows are of."""
    import platform

    row = {'torch': torch.__version__, 'cuda': torch.version.cuda, 'python': platform.python_version()}
    try:
        import triton

        row['triton'] = triton.__version__
    except ModuleNotFoundError:
        row['triton'] = None
    if meter.cuda:
        about = torch.cuda.get_device_properties(meter.device)
        row |= {'gpu': about.name, 'gb': round(about.total_memory / 1e9, 1), 'capability': f'{about.major}.{about.minor}'}
        row |= {'multiprocessors': about.multi_processor_count, 'l2_mb': getattr(about, 'L2_cache_size', 0) / 1e6}
        row |= {'free_gb': round(torch.cuda.mem_get_info()[0] / 1e9, 1), 'fp32_products': torch.get_float32_matmul_precision()}
        row |= nvidia_smi()
    yield {'what': 'machine', **row}


def nvidia_smi() -> dict:
    import subprocess

    fields = ('driver_version', 'clocks.max.sm', 'clocks.max.mem', 'power.limit', 'pcie.link.gen.max', 'pcie.link.width.max')
    try:
        command = ['nvidia-smi', '-i', plan.gpu(), f'--query-gpu={",".join(fields)}', '--format=csv,noheader,nounits']
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return dict(zip(fields, (x.strip() for x in found.stdout.strip().split(',')), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


# ---- dense ----


def problem(meter, case: dict) -> dict:
    """Inputs in float64 on the device: two models whose divergences are of the order of 0.1 to 1."""
    tokens, dim, other_dim, vocab, teacher_vocab, rank = (9, 16, 12, 300, 310, 4) if meter.tiny else (70, 64, 48, 151_665, 151_936, 8)
    variant = case.get('variant')

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=meter.device)

    found = {
        'hidden': random(tokens, dim),
        'weight': random(vocab, dim) * 2 * dim**-0.5,
        'other': random(tokens, other_dim),
        'head': random(teacher_vocab, other_dim) * 2 * other_dim**-0.5,
        'token_weights': torch.rand(tokens, device=meter.device),
        'bias': None,
        'a': None,
        'b': None,
    }
    if variant in ('close', 'one head', 'offset'):
        found['other'] = found['hidden'] + (0 if variant == 'offset' else 1e-2) * random(tokens, dim)
        found['head'] = found['weight'] + (1e-2 if variant == 'close' else 0) * random(vocab, dim)
    if variant == 'offset':  # a row of logits far from 0 is the same distribution
        found['head'] = found['weight'] * 1.01
        found['bias'] = torch.full((vocab,), 1000.0, dtype=torch.float64, device=meter.device)
    if variant == 'bias and LoRA':
        found |= {'bias': random(vocab), 'a': random(rank, dim), 'b': random(vocab, rank) * 0.1}
    if variant == 'labels':
        labels = torch.randint(vocab, (tokens,), device=meter.device)
        labels[::5] = -100
        found |= {'labels': labels, 'label_weights': torch.rand(tokens, device=meter.device)}
    return found


def rounded(inputs: dict, dtype: torch.dtype, variant: str | None, trained: bool) -> dict:
    """In the precision that is checked, so that both sides start from the same numbers."""
    kept = ('token_weights', 'labels', 'label_weights')
    found = {name: x if x is None or name in kept else x.to(dtype) for name, x in inputs.items()}
    if variant == 'one head':
        found['head'] = found['weight']
    for name in NAMES:
        if found[name] is not None and (trained or name == 'hidden'):
            found[name].requires_grad_()
    return found


def dense(case: dict, meter):
    """A row for each dtype: the worst of a frozen head, of a trained one, and of losses per token, whose backward is another pass."""
    inputs = problem(meter, case)
    for dtype in dtypes(meter):
        ways = [(False, 'sum')] if case.get('variant') == 'one head' else [(False, 'sum'), (True, 'sum'), (True, 'none')]
        rows = [dense_row(case, inputs, dtype, trained, reduction, meter) for trained, reduction in ways]
        yield max(rows, key=lambda row: (row['status'] == 'wrong', row['gradient_off']))


def dense_row(case: dict, inputs: dict, dtype, trained: bool, reduction: str, meter) -> dict:
    divergence, variant = KINDS[case['kind']], case.get('variant')
    transform = LogitTransform(scale=1.5, softcap=3.0) if variant == 'soft cap' else None
    x = rounded(inputs, dtype, variant, trained)
    extra = {'labels': x['labels'], 'label_weights': x['label_weights']} if 'labels' in x else {}
    if variant == 'many chunks':
        extra['chunk_tokens'] = 4 if meter.tiny else 16
    with kernel_launches(meter) as launches:
        loss = linear_divergence(
            x['hidden'],
            x['weight'],
            x['other'],
            x['head'],
            divergence,
            token_weights=x['token_weights'],
            reduction=reduction,
            student_bias=x['bias'],
            student_lora=None if x['a'] is None else (x['a'], x['b'], 0.5),
            student_transform=transform,
            **extra,
        )
        gradients = grad(loss, x)
    with torch.device(meter.device):  # the definitions make small tensors of their own
        y = wide(x)
        lora = None if y['a'] is None else (y['a'], y['b'], 0.5)
        student = reference.logits(y['hidden'], y['weight'], y['bias'], lora, transform)
        expected = y['token_weights'] * reference.divergence_of_logits(divergence, student, reference.logits(y['other'], y['head']))
        if 'labels' in y:
            common = min(len(y['weight']), len(y['head']))
            expected = expected + y['label_weights'] * reference.cross_entropy(student, y['labels'], common)
        expected = expected.sum() if reduction == 'sum' else expected
        right = grad(expected, y)
    what = f'{str(dtype)[6:]}, {"trained" if trained else "frozen"}, {reduction}'
    # Logits of 1000 are rounded to 6e-5 each, and the other two are as close as their logits are rounded.
    factor = {'close': 100, 'one head': 100, 'offset': 1e4}.get(variant, 1) if dtype != torch.float64 else 1000
    row = compared(what, dtype, loss, expected, gradients, right, len(launches), factor)
    if meter.cuda and dtype != torch.float64 and not launches:
        row |= {'status': 'wrong', 'why': 'no Triton kernel was started: see checks.log'}
    return row


def dtypes(meter) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if meter.tiny else list(ALLOWED)


def wide(x: dict) -> dict:
    """In float64, with gradients wanted of the same tensors."""
    found = {}
    for name, value in x.items():
        if value is None or not value.is_floating_point():
            found[name] = value
        else:
            found[name] = value.detach().double().requires_grad_(value.requires_grad)
    return found


def grad(loss, x: dict) -> list:
    wanted = [x[name] for name in NAMES if x.get(name) is not None and x[name].requires_grad]
    return list(torch.autograd.grad(loss.sum(), wanted))


def compared(what: str, dtype, loss, expected, gradients, right, launches: int, factor: float = 1) -> dict:
    allowed, allowed_gradient = ALLOWED[dtype]
    off = reference.relative(loss, expected)
    worst = max((reference.relative(one, other) for one, other in zip(gradients, right, strict=True)), default=0.0)
    allowed, allowed_gradient = min(1e-2, allowed * factor), min(2e-2, allowed_gradient * factor)
    good = off <= allowed and worst <= allowed_gradient  # not so for a nan either
    row = {'what': what, 'status': 'ok' if good else 'wrong', 'loss_off': finite(off), 'gradient_off': finite(worst)}
    return row | {'allowed': allowed, 'allowed_gradient': allowed_gradient, 'kernels': launches}


def finite(x: float) -> float:
    return x if math.isfinite(x) else 1e300  # JSON knows neither infinity nor nan


# ---- top-k, cross-entropy, statistics ----


def teacher_of(x: dict, temperature: float, k: int):
    logits = reference.logits(x['other'].double(), x['head'].double())[:, : len(x['weight'])] / temperature
    logprobs, ids = torch.log_softmax(logits, -1).topk(k)
    return logprobs.float(), ids


def topk(case: dict, meter):
    variant, divergence = case['topk'], KINDS['jsd']
    tail = 'renormalize' if variant == 'renormalize' else 'bucket'
    taken_at = 1.0 if variant == 'temperature' else divergence.temperature
    inputs = problem(meter, {'variant': 'labels' if variant == 'labels' else None})
    for dtype in dtypes(meter):
        x = rounded(inputs, dtype, None, trained=True)
        logprobs, ids = teacher_of(x, taken_at, 8 if meter.tiny else 64)
        if variant == 'bucket':
            logprobs[::3, 5:] = -torch.inf  # ragged rows
        more = {'labels': x['labels'], 'label_weights': x['label_weights']} if 'labels' in x else {}
        with kernel_launches(meter) as launches:
            more |= {'tail': tail, 'topk_temperature': taken_at, 'token_weights': x['token_weights'], 'reduction': 'sum'}
            loss = topk_divergence(x['hidden'], x['weight'], logprobs, ids, divergence, **more)
            gradients = grad(loss, x)
        y = wide(x)
        with torch.device(meter.device):
            student = reference.logits(y['hidden'], y['weight'])
            slack = 2**-15 if variant == 'temperature' else 0.0  # fp32 log-probabilities, as the operator takes them
            values = reference.divergence_of_buckets(divergence, student, logprobs.double(), ids, tail, taken_at, slack=slack)
            expected = (y['token_weights'] * values).sum()
            if 'labels' in y:
                expected = expected + (y['label_weights'] * reference.cross_entropy(student, y['labels'])).sum()
            right = grad(expected, y)
        # The log-probabilities are fp32, and what is left of 1 beside them is as uncertain.
        factor = 1e5 if dtype == torch.float64 else 10
        yield compared(str(dtype)[6:], dtype, loss, expected, gradients, right, len(launches), factor)


def cross_entropy(meter):
    inputs = problem(meter, {'variant': 'labels'})
    for dtype in dtypes(meter):
        x = rounded(inputs, dtype, None, trained=True)
        more = {'labels': x['labels'], 'label_weights': x['label_weights'], 'reduction': 'sum'}
        with kernel_launches(meter) as launches:
            loss = linear_divergence(x['hidden'], x['weight'], None, None, Divergence(), **more)
            gradients = grad(loss, x)
        y = wide(x)
        expected = (y['label_weights'] * reference.cross_entropy(reference.logits(y['hidden'], y['weight']), y['labels'])).sum()
        yield compared(str(dtype)[6:], dtype, loss, expected, gradients, grad(expected, y), len(launches))


def statistics(meter):
    x = rounded(problem(meter, {'variant': 'labels'}), torch.bfloat16, None, trained=False)
    stats = TokenStats(detail=True)
    with kernel_launches(meter) as launches:
        linear_divergence(x['hidden'], x['weight'], x['other'], x['head'], Divergence(), labels=x['labels'], stats=stats)
    y = wide(x)
    common = len(x['weight'])
    s, t = (
        torch.log_softmax(reference.logits(a.detach(), b)[:, :common], -1) for a, b in ((y['hidden'], y['weight']), (y['other'], y['head']))
    )
    label = y['labels'].clamp_min(0)
    has_label = (y['labels'] >= 0).double()
    expected = {
        'forward_kl': (t.exp() * (t - s)).sum(-1),
        'reverse_kl': (s.exp() * (s - t)).sum(-1),
        'student_entropy': -(s.exp() * s).sum(-1),
        'teacher_entropy': -(t.exp() * t).sum(-1),
        'top1_agreement': (s.argmax(-1) == t.argmax(-1)).double(),
        'teacher_prob_of_label': t.exp().gather(1, label[:, None])[:, 0] * has_label,
        'cross_entropy': -s.gather(1, label[:, None])[:, 0] * has_label,
    }
    for name, right in expected.items():
        off = float((getattr(stats, name).double() - right).norm() / right.norm().clamp_min(1e-30))
        yield {'what': name, 'status': 'ok' if off <= 1e-4 else 'wrong', 'loss_off': finite(off), 'allowed': 1e-4, 'kernels': len(launches)}


def ready_logits(meter):
    inputs = problem(meter, {})
    for dtype in dtypes(meter):
        x = {name: inputs[name].to(dtype) for name in ('hidden', 'weight', 'other', 'head')}
        student, teacher = (x['hidden'] @ x['weight'].t()).requires_grad_(), x['other'] @ x['head'].t()
        with kernel_launches(meter) as launches:
            loss = logits_divergence(student, teacher, KINDS['jsd'])
            gradients = torch.autograd.grad(loss.sum(), [student])
        y = student.detach().double().requires_grad_()
        expected = reference.divergence_of_logits(KINDS['jsd'], y, teacher.double())
        yield compared(str(dtype)[6:], dtype, loss, expected, gradients, torch.autograd.grad(expected.sum(), [y]), len(launches))


# ---- the edges ----


def extremes(meter):
    """Columns 1e-7 to 1e30 apart, masked ones, temperatures of 0.1 to 4: against the same operator in float64, which has no kernels."""
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        worst, finite_all, negative, tried = 0.0, True, False, 4 if meter.tiny else 24
        with kernel_launches(meter) as launches:
            for number in range(tried):
                temperature = 0.1 * 40 ** float(torch.rand((), generator=generator))
                divergence = Divergence(KINDS[kind].kind, KINDS[kind].beta, temperature, KINDS[kind].skew)
                columns = 300 if meter.tiny else 5000
                student = torch.randn(4, columns, generator=generator)
                teacher = student + torch.randn(4, columns, generator=generator) * torch.tensor([[0.0], [1e-3], [0.1], [3.0]])
                gap = 10 ** float(torch.rand((), generator=generator) * 37 - 7)
                teacher[:, 7] = student[:, 7] + (gap if number % 2 else -gap)
                for side in (student, teacher)[number % 3 :]:
                    side[:, 3] = -torch.inf
                student, teacher = student.to(meter.device), teacher.to(meter.device)
                losses = []
                for dtype in (torch.float32, torch.float64):
                    x = student.to(dtype).requires_grad_()
                    loss = logits_divergence(x, teacher.to(dtype), divergence)
                    (gradient,) = torch.autograd.grad(loss.sum(), x)
                    losses.append(loss.detach().double())
                    finite_all &= bool(loss.isfinite().all() and gradient.isfinite().all())
                    negative |= bool((loss < 0).any())
                # fp32 knows a logit to 1e-7 of itself.
                unknown = 2e-7 * (5 + float(max(student.max(), teacher.max())) / temperature)
                off = (losses[0] - losses[1]).abs() / (2e-5 * losses[1] + unknown)
                worst = max(worst, float(off.nan_to_num(1e9).max()))
        good = finite_all and not negative and worst <= 1
        row = {'what': kind, 'status': 'ok' if good else 'wrong', 'loss_off_of_allowed': worst, 'finite': finite_all}
        yield row | {'negative': negative, 'kernels': len(launches)}


def many_logits(meter):
    """One chunk with more logits than 32 bits count."""
    tokens, vocab, small = (64, 300, 8) if meter.tiny else (16384, 151_936, 512)
    half = dict(dtype=torch.bfloat16, device=meter.device)
    weight, head = (torch.randn(vocab, 64, **half) * 0.25 for _ in range(2))
    hidden, other = (torch.randn(tokens, 64, **half) for _ in range(2))
    found = []
    for chunk in (small, tokens):
        x = hidden.clone().requires_grad_()
        loss = linear_divergence(x, weight, other, head, KINDS['jsd'], chunk_tokens=chunk)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    off = [reference.relative(one, other) for one, other in zip(*found, strict=True)]
    good = off[0] <= 1e-5 and off[1] <= 1e-2
    yield {'what': f'{tokens} x {vocab}', 'status': 'ok' if good else 'wrong', 'loss_off': finite(off[0]), 'gradient_off': finite(off[1])}


def twice(meter):
    x = rounded(problem(meter, {'variant': 'labels'}), torch.bfloat16, None, trained=True)
    found = []
    for _ in range(2):
        more = {'labels': x['labels'], 'label_weights': x['label_weights'], 'reduction': 'sum'}
        loss = linear_divergence(x['hidden'], x['weight'], x['other'], x['head'], KINDS['jsd'], **more)
        found.append([loss.detach(), *grad(loss, x)])
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    yield {'what': 'bit for bit', 'status': 'ok' if same else 'wrong', 'same': same}
