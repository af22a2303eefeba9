"""The operators on a GPU that is none, against fp32 on a CPU, from the same numbers. Started by test_divergence_kernels.py
with TRITON_INTERPRET=1."""

import itertools
import sys

import interpreted
import torch
import torch.distributed as dist
from divergence_reference import relative
from pretended_gpu import HALF, PretendedGPU

from swift_gkd_plugin.divergence import Divergence, LogitTransform, linear_divergence, topk_divergence

TOKENS, DIM, VOCAB = 7, 16, 5003
NAMES = ('hidden', 'weight', 'bias', 'a', 'b')
WEIGHT, SCALE = 1e-5, 65536.0  # of a token, and of the loss: as in fp16 training


def run(x, wanted, other, head, labels, transform, group, topk):
    x = {name: t.clone().requires_grad_(name in wanted) for name, t in x.items()}
    extra = {'student_bias': x['bias'], 'student_lora': (x['a'], x['b'], 2.0)} if 'a' in x else {}
    extra |= {'labels': labels, 'label_weights': torch.full((TOKENS,), 0.3 * WEIGHT), 'student_transform': transform}
    extra['label_temperature'] = 1.0 if transform is None else torch.linspace(0.5, 1.5, TOKENS)
    extra |= {'token_weights': torch.full((TOKENS,), WEIGHT), 'reduction': 'sum', 'chunk_tokens': 3, 'vocab_group': group}
    divergence = Divergence(temperature=0.9)
    if topk is None:
        loss = linear_divergence(x['hidden'], x['weight'], other, head, divergence, **extra)
    else:
        loss = topk_divergence(x['hidden'], x['weight'], *topk, divergence, **extra)
    return loss, torch.autograd.grad(loss * SCALE, [x[name] for name in wanted])


def close(found, expected, bound, what):
    error = relative(found, expected)
    assert error < bound, f'{what} is off by {error}'


interpreted.patch_once()
torch.manual_seed(0)
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
drawn = {'hidden': torch.randn(TOKENS, DIM), 'weight': torch.randn(VOCAB, DIM) / 4, 'bias': torch.randn(VOCAB)}
drawn |= {'a': torch.randn(2, DIM) / 4, 'b': torch.randn(VOCAB, 2) / 4}
other, head = torch.randn(TOKENS, DIM), torch.randn(VOCAB, DIM) / 4
labels = torch.tensor([3, -100, 5002, 0, 4096, 7, 7])
probs, ids = torch.randn(TOKENS, VOCAB).log_softmax(-1).topk(4)
choices = (*HALF, torch.float32), (NAMES[:1], NAMES[:2], NAMES), ('same', 'fp32'), (False, True), (False, True), (False, True)
for places in itertools.product(*(range(len(some)) for some in choices)):
    if sum(places) % 3:  # a third of all, in which any three choices meet in every way
        continue
    dtype, wanted, weights, capped, grouped, few = (some[place] for some, place in zip(choices, places, strict=True))
    names = wanted if len(wanted) > 2 else NAMES[:2]
    rounded = {name: drawn[name].to(torch.float32 if weights == 'fp32' and name != 'hidden' else dtype) for name in names}
    sides = other.to(dtype), head.to(dtype)
    transform = LogitTransform(0.7, 9.0) if capped else None
    rest = labels, transform, dist.group.WORLD if grouped else None, (probs, ids) if few else None
    with PretendedGPU() as gpu:
        loss, gradients = run(rounded, wanted, *sides, *rest)
    # fp32 weights are rounded to the dtype of the hidden states, as under autocast.
    same = {name: t.to(dtype).float() if name == 'weight' else t.float() for name, t in rounded.items()}
    right, right_gradients = run(same, wanted, *(side.float() for side in sides), *rest)
    case = f'{dtype} {len(wanted)} {weights} {capped} {grouped} {few}'
    assert bool(gpu.wide) == (dtype in HALF), case
    close(loss, right, 1e-5, case)
    for name, one, expected in zip(wanted, gradients, right_gradients, strict=True):
        assert one.dtype == rounded[name].dtype, case
        # Triton's interpreter cuts the end of a bf16 number off where a GPU rounds it.
        close(one, expected, 1e-5 if dtype == torch.float32 else 1e-2, f'{name} {case}')
dist.destroy_process_group()
works = sys.modules['swift_gkd_plugin.divergence._triton'].works
assert works.cache_info().currsize == 2, 'the kernels of a GPU were not used'
for label_temperatures in (False, True):
    assert works(torch.device('cuda', 0), Divergence(temperature=0.9), label_temperatures), 'they were found wrong'
