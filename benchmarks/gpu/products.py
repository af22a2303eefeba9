"""Matrix products alone, as the operator makes them: by chunk of tokens, hidden size and width of the vocabulary.

Logits in fp32 from bf16, into rows that lie `stride` numbers apart; the gradient of the hidden states in bf16, that of the head in
fp32 from a random bf16 gradient (a constant one lets the GPU run at a higher clock). And what the memory gives.
"""

import torch


def run(case: dict, meter):
    return memory(meter) if case['name'] == 'memory' else products(case, meter)


def memory(meter):
    n = 1 << (12 if meter.tiny else 29)
    one, other = torch.zeros(n, device=meter.device), torch.ones(n, device=meter.device)
    for what, step, moved in (
        ('copy', lambda: one.copy_(other), 8 * n),
        ('read', lambda: torch.amax(other), 4 * n),
        ('write', lambda: one.zero_(), 4 * n),
    ):
        row = meter.measure(step)
        yield {'what': what, **row, 'gb_per_s': moved / row['ms_min'] / 1e6}


def products(case: dict, meter):
    tokens, hidden, columns, stride = (case[name] for name in ('tokens', 'hidden', 'columns', 'stride'))
    half = dict(dtype=torch.bfloat16, device=meter.device)
    x, weight = torch.randn(tokens, hidden, **half), torch.randn(columns, hidden, **half).mul_(hidden**-0.5)
    gradient = torch.randn(tokens, stride, **half).mul_(1e-3)[:, :columns]
    logits = torch.empty(tokens, stride, device=meter.device)[:, :columns]
    of_weight, of_x = torch.zeros(columns, hidden, device=meter.device), torch.empty(tokens, hidden, **half)
    if meter.cuda:
        steps = {
            'logits, fp32': lambda: torch.addmm(logits, x, weight.t(), out_dtype=torch.float32, beta=0, alpha=1.1, out=logits),
            'of the head, fp32': lambda: torch.addmm(of_weight, gradient.t(), x, beta=1, out_dtype=torch.float32, out=of_weight),
        }
    else:  # products of half precision with fp32 results are CUDA's only
        steps = {
            'logits, fp32': lambda: torch.addmm(logits, x.float(), weight.float().t(), beta=0, alpha=1.1, out=logits),
            'of the head, fp32': lambda: of_weight.addmm_(gradient.float().t(), x.float()),
        }
    steps['logits, bf16'] = lambda: x @ weight.t()
    steps['of the hidden states, bf16'] = lambda: torch.mm(gradient, weight, out=of_x)
    steps['of the head, bf16'] = lambda: gradient.t() @ x
    for what, step in steps.items():
        row = meter.measure(step)
        yield {'what': what, **row, 'tflops': 2 * tokens * hidden * columns / row['ms'] / 1e9}
