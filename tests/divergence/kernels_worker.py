"""The kernels of divergence/_triton.py or divergence/_compiled.py, named as the argument, against the torch path. Started
by test_divergence_kernels.py with TRITON_INTERPRET=1."""

import importlib
import sys

import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import Divergence, LogitTransform, TokenStats, chunks, heads, linear_divergence

KINDS = [
    Divergence(temperature=0.9),
    Divergence(beta=0.2),
    Divergence('forward_kl', temperature=0.7),
    Divergence('reverse_kl'),
    Divergence('skew_forward_kl'),
    Divergence('skew_reverse_kl', skew=0.3),
    Divergence('tvd'),
]
# Mixtures with a small weight. A second skew, too: torch.compile's cache on disk must tell it from the first.
SMALL = [
    Divergence(beta=1e-5),
    Divergence('skew_reverse_kl', skew=1e-6),
    Divergence(beta=1 - 1e-5),
    Divergence('skew_forward_kl', skew=1e-6),
]


def close(found, expected, bound, what):
    error = relative(found, expected)
    assert error < bound, f'{what} is off by {error}'


def run(kernels, divergence, x, other, head, transform, labels, weights, detail, chunk=3):
    chunks.kernels_for = lambda call: kernels
    x = {n: t.clone().requires_grad_() for n, t in x.items()}
    stats = TokenStats(detail=detail)
    loss = linear_divergence(
        x['hidden'],
        x['weight'],
        other,
        x['weight'].detach() if head is None else head,
        divergence,
        reduction='sum',
        token_weights=weights,
        student_transform=transform,
        labels=labels,
        label_weights=None if labels is None else weights,
        stats=stats,
        chunk_tokens=chunk,
    )
    return loss, torch.autograd.grad(loss, list(x.values())), stats


torch.manual_seed(0)
module = importlib.import_module(f'swift_gkd_plugin.divergence.{sys.argv[1]}')
compiled = sys.argv[1] == '_compiled'
for divergence in KINDS + (SMALL[:2] if compiled else SMALL):
    for distance in (1e-3, 1.0, 4.0):
        x = {'hidden': torch.randn(5, 8), 'weight': torch.randn(5003, 8)}
        other = x['hidden'] + distance * torch.randn(5, 8)
        labels = torch.tensor([3, -100, 5002, 0, 4096])
        weights = torch.rand(5)
        # One head for both sides gives the difference of their logits; with a softcap, or another head, both are made.
        variants = [(None, None, labels, False), (None, None, None, True), (x['weight'], LogitTransform(0.7, 9.0), labels, True)]
        if divergence in SMALL or (divergence is not KINDS[0] and compiled):
            variants = [(None, None, None, False)]  # each variant takes seconds; this one is needed below
        for head, transform, wanted, detail in variants:
            args = (divergence, x, other, head, transform, wanted, weights, detail)
            (loss, gradients, stats), (right, right_gradients, right_stats) = run(module, *args), run(None, *args)
            close(loss, right, 1e-4 if distance == 1e-3 else 1e-5, f'{divergence.kind} at {distance}')
            for one, other_one in zip(gradients, right_gradients, strict=True):
                close(one, other_one, 1e-4, f'{divergence.kind} gradient at {distance}')
            for name, value in vars(right_stats).items():
                if isinstance(value, torch.Tensor):
                    assert torch.allclose(getattr(stats, name), value, rtol=1e-4, atol=1e-5), (
                        name,
                        divergence.kind,
                        distance,
                    )
    equal = run(module, divergence, x, x['hidden'], None, None, None, weights, False)
    assert equal[0] == 0 and not any(g.any() for g in equal[1]), divergence.kind

# Half-precision inputs: the sweep writes the gradient of a chunk in half precision itself, into memory where one chunk's,
# two chunks' or all are kept. Against the torch path on the same numbers in fp32.
for divergence in KINDS[:1] if compiled else KINDS:
    rounded = {name: (t * 0.5).bfloat16() for name, t in x.items()}
    wide = {name: t.float() for name, t in rounded.items()}
    teacher, head, transform = other.bfloat16(), torch.randn(5003, 8).bfloat16(), LogitTransform(0.7, 9.0)
    # On a CPU a chunk's: the kernel compiled for 5 tokens has to do for chunks of 3 and 2.
    for chunk, tokens in ((5, 5), (3, 3)) if compiled else ((3, 3), (3, 6), (3, 5)):
        torch._dynamo.config.error_on_recompile = compiled and chunk == 3
        heads.tokens_per_product = lambda *args, tokens=tokens: tokens
        found = run(module, divergence, rounded, teacher, head, transform, labels, weights, False, chunk)
        right = run(None, divergence, wide, teacher.float(), head.float(), transform, labels, weights, False)
        close(found[0], right[0], 1e-5, f'{divergence.kind} of bf16')
        for one, other_one in zip(found[1], right[1], strict=True):
            assert one.dtype == torch.bfloat16
            close(one, other_one, 5e-3, f'{divergence.kind} gradient of bf16, {tokens} tokens a product')
