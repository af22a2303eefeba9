"""The sweeps of Triton or Compiled, whichever the first argument names, against torch operations. The other
arguments name the parts to run. Started by test_divergence_kernels.py with TRITON_INTERPRET=1."""

import dataclasses
import importlib
import os
import sys

import torch
from divergence_reference import assert_as_exact, relative, sure_of_its_labels

from swift_gkd_plugin.divergence import (
    Clipping,
    Divergence,
    LogitTransform,
    TokenStats,
    implementations,
    linear_divergence,
    logits_divergence,
    topk_divergence,
)
from swift_gkd_plugin.divergence import gradients as products
from swift_gkd_plugin.divergence._eager import Eager
from swift_gkd_plugin.divergence.kinds import KINDS as ALL_KINDS

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
    Divergence('skew_reverse_kl', skew=1 - 1e-5),
    Divergence('skew_reverse_kl', skew=1e-6),
    Divergence('skew_forward_kl', skew=1 - 1e-5),
    Divergence(beta=1 - 1e-5),
    Divergence('skew_forward_kl', skew=1e-6),
]
# Of the labels of five tokens, some the divergence's own.
TEMPERATURES = torch.tensor([0.3, 1.0, 0.9, 2.5, 0.7])


def close(found, expected, bound, what):
    error = relative(found, expected)
    assert error < bound, f'{what} is off by {error}'


def of_labels(labels, weights, temperature):
    """Arguments: the weights have both signs. With TEMPERATURES come ratios."""
    if labels is None:
        return {}
    clipping = Clipping(torch.tensor([-30.0, -9.0, torch.nan, -9.0, -13.0]), 0.2, 0.28) if temperature is TEMPERATURES else None
    return dict(labels=labels, label_weights=weights - 0.5, label_temperature=temperature, clipping=clipping)


def run(sweeps, divergence, x, other, head, transform, labels, weights, detail, chunk=3, temperature=1.0):
    implementations.choose = lambda call: sweeps
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
        stats=stats,
        chunk_tokens=chunk,
        **of_labels(labels, weights, temperature),
    )
    return loss, torch.autograd.grad(loss, list(x.values())), stats


compiled = sys.argv[1] == 'Compiled'
if not compiled:
    importlib.import_module('interpreted').patch_once()
sweeps = getattr(importlib.import_module(f'swift_gkd_plugin.divergence._{sys.argv[1].lower()}'), sys.argv[1])


def inputs(distance=1.0):
    x = {'hidden': torch.randn(5, 8), 'weight': torch.randn(5003, 8)}
    return x, x['hidden'] + distance * torch.randn(5, 8), torch.tensor([3, -100, 5002, 0, 4096]), torch.rand(5)


def dense(kinds=KINDS + SMALL, distances=(1e-3, 1.0, 4.0)):
    if compiled:  # each takes seconds: every kind once, and of one a second weight
        kinds = [kind for kind in KINDS if kind.beta == 0.5] + SMALL[1:2]
    for divergence in kinds:
        for distance in distances:
            x, other, labels, weights = inputs(distance)
            # One head for both sides gives the difference of their logits; with a softcap, or another head, both are made.
            variants = [
                (None, None, labels, False, 1.0),
                (None, None, None, True, 1.0),
                (x['weight'], LogitTransform(0.7, 9.0), labels, True, TEMPERATURES),
            ]
            if divergence in SMALL or (divergence is not KINDS[0] and compiled):
                variants = [(None, None, None, False, 1.0)]  # which is needed below
            elif compiled:
                variants[:2] = [(None, None, labels, True, 1.0)]
            if distance != 1:
                variants = variants[:1]  # other numbers for the same code
            for head, transform, wanted, detail, temperature in variants:
                args = (divergence, x, other, head, transform, wanted, weights, detail, 3, temperature)
                (loss, gradients, stats), (right, right_gradients, right_stats) = run(sweeps, *args), run(Eager, *args)
                close(loss, right, 1e-4 if distance == 1e-3 else 1e-5, f'{divergence.kind} at {distance}')
                jumps = divergence.kind == 'tvd' and distance == 1e-3  # at columns of which a rounding says who is ahead
                for one, other_one in zip(gradients, right_gradients, strict=True):
                    close(one, other_one, 1e-3 if jumps else 1e-4, f'{divergence.kind} gradient at {distance}')
                for name, value in vars(right_stats).items():
                    if isinstance(value, torch.Tensor):
                        assert torch.allclose(getattr(stats, name), value, rtol=1e-4, atol=1e-5), (
                            name,
                            divergence.kind,
                            distance,
                        )
        equal = run(sweeps, divergence, x, x['hidden'], None, None, None, weights, False)
        assert equal[0] == 0 and not any(g.any() for g in equal[1]), divergence.kind


def run_few(sweeps, divergence, x, topk, tail, transform, labels, weights, detail, temperature=1.0):
    implementations.choose = lambda call: sweeps
    x = {n: t.clone().requires_grad_() for n, t in x.items()}
    stats = TokenStats(detail=detail)
    common = of_labels(labels, weights, temperature) | dict(stats=stats, chunk_tokens=3, reduction='sum')
    common |= dict(student_transform=transform, vocab_size=5001)
    if topk is None:
        loss = linear_divergence(x['hidden'], x['weight'], None, None, divergence, **common)
    else:
        loss = topk_divergence(
            x['hidden'], x['weight'], *topk[:2], divergence, token_weights=weights, tail=tail, topk_temperature=1.0, **topk[2], **common
        )
    return loss, torch.autograd.grad(loss, list(x.values())), stats


def few():
    """A teacher of which k log-probabilities are known, and none: fp32 and bf16, in chunks, with a softcap and without."""
    x, _, labels, weights = inputs()
    values, ids = (torch.randn(5, 5003) * 3).log_softmax(-1).topk(7)
    values[1, 4:], values[4], ids[2, 3] = -torch.inf, -torch.inf, -1
    listed_label = torch.where(labels < 0, labels, ids[:, 1])
    rest_of_mass = torch.log1p(-values.exp().sum(-1))
    for wide, tail, transform, wanted, detail, kinds, temperature in (
        (True, 'bucket', None, None, False, KINDS + SMALL, 1.0),
        (True, 'bucket', LogitTransform(0.7, 9.0), listed_label, False, KINDS[:4], TEMPERATURES),
        (True, 'bucket', None, listed_label, True, KINDS[:2], 0.6),
        (False, 'bucket', None, labels, False, KINDS[:2], 1.0),
        (True, 'renormalize', None, labels, False, KINDS[:4], TEMPERATURES),
        (False, None, None, labels, True, KINDS[:1], TEMPERATURES),
        (True, None, LogitTransform(0.7, 9.0), labels, False, KINDS[:1], 0.9),
    ):
        for number, divergence in enumerate(kinds[:2] if compiled else kinds):
            given = dict(tail_logprobs=rest_of_mass if number % 2 else None)
            same = x if wide else {name: t.bfloat16() for name, t in x.items()}
            right_x = {name: t.float() for name, t in same.items()}
            rest = (None if tail is None else (values, ids, given), tail, transform, wanted, weights, detail, temperature)
            (loss, gradients, stats), right = (
                run_few(one, divergence, with_x, *rest) for one, with_x in ((sweeps, same), (Eager, right_x))
            )
            case = f'top-k {tail} {transform} {wanted} {divergence.kind}'
            close(loss, right[0], 1e-5, case)
            for one, other_one in zip(gradients, right[1], strict=True):
                close(one, other_one, 1e-4 if wide else 2e-2, case)  # the interpreter cuts the end of a bf16 number off
            for name, value in vars(right[2]).items():
                if isinstance(value, torch.Tensor):
                    assert torch.allclose(getattr(stats, name), value, rtol=1e-4, atol=1e-5), (name, case)


def close_few():
    """Buckets of a teacher that is close to the student, where little is left of a mixture with a small weight."""
    x, _, _, weights = inputs()
    teacher = (x['hidden'] @ x['weight'].t() + 1e-3 * torch.randn(5, 5003)).log_softmax(-1)
    values, ids = teacher.topk(7)
    given = dict(tail_logprobs=teacher.scatter(1, ids, -torch.inf).logsumexp(-1))
    for divergence in SMALL:
        rest = divergence, x, (values, ids, given), 'bucket', None, None, weights, False
        found, right = (run_few(one, *rest) for one in (sweeps, Eager))
        close(found[0], right[0], 1e-3, f'{divergence} of close buckets')
        for one, other_one in zip(found[1], right[1], strict=True):
            close(one, other_one, 1e-3, f'gradient of {divergence} of close buckets')


def tempered():
    """Buckets of log-probabilities that were taken at another temperature: where the tail's mass is an end of its interval, and where
    it has to be looked for; with ids that the student lacks."""
    x, _, _, weights = inputs()
    student = x['hidden'] @ x['weight'].t()
    teacher = (student + torch.tensor([[0.01], [0.3], [0.3], [0.3], [2.0]]) * torch.randn(5, 5003)).log_softmax(-1)
    values, ids = teacher.topk(7)
    values[0, 5:], ids[1, 2], ids[2, 0] = -torch.inf, 5003, -1
    given = dict(tail_logprobs=teacher.scatter(1, ids.clamp(0, 5002), -torch.inf).logsumexp(-1))
    for number, divergence in enumerate(KINDS + SMALL):
        for power in (0.4, 1 / 0.9)[: 1 + (divergence in KINDS)]:
            divergence = dataclasses.replace(divergence, temperature=1 / power)
            rest = divergence, x, (values, ids, given if number % 2 else {}), 'bucket', None, None, weights, False
            found, right = (run_few(one, *rest) for one in (sweeps, Eager))
            close(found[0], right[0], 1e-5, f'{divergence} of another temperature')
            for one, other_one in zip(found[1], right[1], strict=True):
                close(one, other_one, 1e-4, f'gradient of {divergence} of another temperature')


def certain():
    """The cross-entropy of tokens that the student is certain of, at several temperatures."""
    implementations.choose = lambda call: sweeps
    hidden, weight, labels = sure_of_its_labels(5003)
    for temperature in (1.0, 0.7) if compiled else (1.0, 0.3, 0.7, 2.7):
        divergence, topk = Divergence(temperature=temperature), torch.log_softmax(hidden @ weight.t() / temperature, -1).topk(3)
        for teacher in ((None, None), (hidden, weight), topk):
            operator = topk_divergence if teacher is topk else linear_divergence
            operator(hidden, weight, *teacher, divergence, labels=labels, stats=(stats := TokenStats()))
            assert stats.cross_entropy.abs().max() < 1e-6, (temperature, stats.cross_entropy)


def strided():
    """Labels and tails that don't lie one after the other in memory, and no listed id at all."""
    x, _, labels, weights = inputs()
    values, ids = (torch.randn(5, 5003) * 3).log_softmax(-1).topk(7)
    rest_of_mass = torch.log1p(-values.exp().sum(-1))
    apart = [torch.stack([t, torch.zeros_like(t)], 1)[:, 0] for t in (labels, rest_of_mass)]
    plain, found = (
        run_few(sweeps, KINDS[0], x, (values, ids, dict(tail_logprobs=tail)), 'bucket', None, wanted, weights, False)
        for wanted, tail in ((labels, rest_of_mass), apart)
    )
    for one, other_one in zip([found[0], *found[1]], [plain[0], *plain[1]], strict=True):
        close(one, other_one, 1e-6, 'strided')
    none = (values[:, :0], ids[:, :0], {})
    right, found = (run_few(one, KINDS[0], x, none, 'bucket', None, labels, weights, False) for one in (Eager, sweeps))
    close(found[0], right[0], 1e-5, 'nothing listed')


def half():
    """Half-precision inputs: the sweep writes the gradient of a chunk in half precision itself, into memory where one chunk's,
    two chunks' or all are kept. Against torch operations on the same numbers in fp32."""
    x, other, labels, weights = inputs()
    for divergence in KINDS[:1] if compiled else KINDS:
        rounded = {name: (t * 0.5).bfloat16() for name, t in x.items()}
        wide = {name: t.float() for name, t in rounded.items()}
        teacher, head, transform = other.bfloat16(), torch.randn(5003, 8).bfloat16(), LogitTransform(0.7, 9.0)
        # On a CPU a chunk's: the kernel compiled for 5 tokens has to do for chunks of 3 and 2.
        # So has what is compiled for some label temperatures for others.
        for (chunk, tokens), temperatures in zip(
            ((5, 5), (3, 3)) if compiled else ((3, 3), (3, 6), (3, 5)), (TEMPERATURES, TEMPERATURES.flip(0), 0.5), strict=False
        ):
            torch._dynamo.config.error_on_recompile = compiled and chunk == 3
            products.tokens_per_product = lambda *args, tokens=tokens: tokens
            rest = transform, labels, weights, False, chunk, temperatures
            found = run(sweeps, divergence, rounded, teacher, head, *rest)
            right = run(Eager, divergence, wide, teacher.float(), head.float(), *rest)
            close(found[0], right[0], 1e-5, f'{divergence.kind} of bf16')
            for one, other_one in zip(found[1], right[1], strict=True):
                assert one.dtype == torch.bfloat16
                close(one, other_one, 5e-3 if compiled else 1e-2, f'{divergence.kind} gradient of bf16, {tokens} tokens a product')


def extremes(cases=90):
    """Logits that differ by 1e-7 to 1e30 in one column, masked ones, and temperatures from 0.1 to 4, against float64."""
    for number in range(cases):
        kind = ALL_KINDS[number % len(ALL_KINDS)]
        weight = (1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6)[number % 7]
        divergence = Divergence(kind, weight, 0.1 * 40 ** float(torch.rand(())), weight)
        student = torch.randn(4, 40)
        teacher = student + torch.randn(4, 40) * torch.tensor([[0.0], [1e-3], [0.1], [3.0]])
        teacher[:, 7] = student[:, 7] + (1 if number % 2 else -1) * 10 ** float(torch.rand(()) * 37 - 7)
        for side in (student, teacher)[number % 3 :]:
            side[:, 3] = -torch.inf
        found = []
        for one, dtype in ((sweeps, torch.float32), (Eager, torch.float64)):
            implementations.choose = lambda call, one=one: one
            x = student.to(dtype).requires_grad_()
            loss = logits_divergence(x, teacher.to(dtype), divergence)
            found += [loss.detach(), torch.autograd.grad(loss.sum(), x)[0]]
        assert_as_exact(divergence, (student, teacher), found[:2], found[2:])


def nan():
    """One logit that is no number: the loss of its token is none, for a run to stop; those of the others are."""
    x, other, _, _ = inputs()
    x['hidden'][1, 0] = torch.nan
    values, ids = (torch.randn(5, 5003) * 3).log_softmax(-1).topk(7)
    implementations.choose = lambda call: sweeps
    for divergence in KINDS + SMALL[1::2]:
        dense = linear_divergence(x['hidden'], x['weight'], other, x['weight'], divergence)
        few = topk_divergence(x['hidden'], x['weight'], values, ids, divergence, topk_temperature=1.0)
        for loss in (dense, few):
            assert loss.isnan().tolist() == [False, True, False, False, False], (divergence, loss)


def one_load():
    """The kernel that reads a row once: in three launches, for programs that are interpreted one after the other can't meet. Where
    it gives other numbers than the sweeps, they do the work, and a warning says so."""
    triton = sys.modules[sweeps.__module__]
    os.environ[triton.ONE_LOAD] = '1'
    whole, launches = sweeps.one_load, []
    sweeps.one_load = lambda self, *args: launches.append(1) or whole(self, *args)
    dense([KINDS[0], KINDS[2]], (1.0,))
    extremes(14)
    assert len(launches) > 14
    x, other, labels, weights = inputs()
    # Other than its own, its own, those of each, and with ratios.
    for temperature, known in ((0.6, True), (0.9, True), (TEMPERATURES.clone(), False), (TEMPERATURES, False)):
        launches.clear()
        found, right = (run(one, KINDS[0], x, other, None, None, labels, weights, False, 3, temperature) for one in (sweeps, Eager))
        assert bool(launches) == known
        for one, other_one in zip([found[0], *found[1]], [right[0], *right[1]], strict=True):
            close(one, other_one, 1e-4, f'one load at {temperature}')
    warnings = []
    triton.logger.warning = lambda *args: warnings.append(args[0] % args[1:])
    triton._one_load_works.cache_clear()
    sweeps.one_load = lambda self, logits, tokens, out: out.zero_()
    dense(KINDS[3:4], (1.0,))
    assert warnings and all('three sweeps' in one and 'off by 1.0e+00' in one for one in warnings), warnings


torch.manual_seed(0)
for part in sys.argv[2:]:
    globals()[part]()
